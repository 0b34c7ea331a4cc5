"""Episodes and rejects: the one data type of the project, and its place in a run's storage.

Layout under the storage URI::

    recipe.yaml                    the resolved recipe
    README.md, card/               the dataset card and its pictures
    plan.json                      what a dry run expected
    intents/<source>/              train.parquet, heldout.parquet, rejects.parquet, expanded.parquet
    expansion/<fingerprint>/       what the teacher wrote when it grew the intents
    completions/<fingerprint>/     the ledger: every request that was paid for, raw; attempts/ says what each run cost
    sifted/, relevance/            what scoring keeps between its passes
    episodes/part-*.parquet        accepted and scored
    rejects/part-*.parquet         the rest, each with its reason
    generate.json                  what the generate stage counted
    student_data/, checkpoints/    packed rows and training state, by fingerprint
    student/                       the exported model: the last round's
    rounds/<k>/                    of each round: completions/<mark>/, sifted/, relevance/, episodes/, rejects/ as above,
                                   round.json (what was asked and achieved), student/; round 0 has the last two alone
    rounds.json                    one entry a round, and whose student is in student/
    evaluation/                    report.html, report.md with its plots, metrics.json, outputs.parquet, pairwise.parquet; work/
                                   keeps completions and judgements
"""

from collections.abc import Iterator
from enum import StrEnum

import pyarrow as pa

from udrl import storage

KEYS: list[tuple[str, pa.DataType]] = [
    ("episode_id", pa.int64()),
    ("intent_id", pa.int64()),
    ("intent", pa.string()),
    ("task", pa.string()),
    ("policy", pa.string()),
    ("model", pa.string()),
    ("model_revision", pa.string()),
    ("round", pa.int32()),
    ("variation", pa.int32()),
    ("command_words", pa.int32()),  # what was commanded; ANY (-1) for a policy that takes no commands
    ("command_reward", pa.int32()),
    ("request_fingerprint", pa.string()),
    ("input_tokens", pa.int32()),
    ("output_tokens", pa.int32()),
    ("finish_reason", pa.string()),
]
COMPONENTS = ("relevance", "novelty", "repetition", "format", "length")

COMPLETIONS = pa.schema(
    [
        *KEYS,
        ("prompts", pa.int32()),  # how many prompts this request asked for: more than 1 for a structured one
        ("cached_tokens", pa.int32()),  # of the input, found in the engine's prefix cache
        ("completion", pa.string()),
        ("error", pa.string()),
        # The likeliest first tokens with their log-probabilities, where the policy asks for them (judges); else empty.
        ("top_tokens", pa.list_(pa.string())),
        ("top_logprobs", pa.list_(pa.float32())),
    ]
)
EPISODES = pa.schema(
    [
        *KEYS,
        ("prompt", pa.string()),
        ("n_words", pa.int32()),
        *((c, pa.float32()) for c in COMPONENTS),
        ("reward", pa.float32()),
    ]
)
REJECTS = pa.schema([*KEYS, ("completion", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


class Reason(StrEnum):
    """Why a completion is not an episode."""

    ENGINE_ERROR = "engine_error"
    INPUT_TOO_LONG = "input_too_long"  # the request does not fit the engine's context
    EMPTY = "empty"
    TRUNCATED = "truncated"
    MISSING = "missing"  # a structured completion brought fewer prompts than were asked for
    GARBLED = "garbled"  # bytes that are no text
    REFUSAL = "refusal"
    MALFORMED = "malformed"
    WRONG_SCRIPT = "wrong_script"
    WRONG_LANGUAGE = "wrong_language"
    ECHO = "echo"
    REPETITIVE = "repetitive"
    FEW_SHOT_LEAK = "few_shot_leak"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"


def iter_tables(uri: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield the Parquet files of a folder one by one, in the order of their names."""
    for name in storage.list_files(uri):
        if name.endswith(".parquet"):
            yield storage.read_table(storage.join(uri, name), columns)
