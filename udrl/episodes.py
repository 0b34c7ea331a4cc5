"""The schemas of completions, episodes and rejects: the one data type that flows through the project.

:mod:`udrl.run` describes where a run stores them.
"""

from enum import StrEnum

import pyarrow as pa

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
    ("command_words", pa.int32()),  # desired length; ANY (-1) if none was commanded
    ("command_reward", pa.int32()),  # desired reward bin; ANY (-1) if none was commanded
    ("request_fingerprint", pa.string()),
    ("input_tokens", pa.int32()),
    ("output_tokens", pa.int32()),
    ("finish_reason", pa.string()),
]
COMPONENTS = ("relevance", "novelty", "repetition", "format", "length")

COMPLETIONS = pa.schema(
    [
        *KEYS,
        ("prompts", pa.int32()),  # requested prompts; more than 1 for a structured request
        ("cached_tokens", pa.int32()),  # input tokens from the engine's prefix cache
        ("completion", pa.string()),
        ("error", pa.string()),
        # The most probable first tokens and their log-probabilities, if the policy requests them, as judges do; else empty.
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
    INPUT_TOO_LONG = "input_too_long"  # the request exceeds the engine's context
    EMPTY = "empty"
    TRUNCATED = "truncated"
    MISSING = "missing"  # a structured completion has fewer prompts than requested
    GARBLED = "garbled"  # control characters or invalid bytes
    REFUSAL = "refusal"
    MALFORMED = "malformed"
    WRONG_SCRIPT = "wrong_script"
    WRONG_LANGUAGE = "wrong_language"
    ECHO = "echo"
    REPETITIVE = "repetitive"
    FEW_SHOT_LEAK = "few_shot_leak"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"
