"""What a judge was asked and what it answered, in files that a killed evaluation goes on from.

``asked/part-<n>.parquet`` holds texts, ``scores/`` has a file of the same name when they are judged. Parts are only ever
added: a text that was asked once is in no later part, and a part keeps its number, by which a ledger knows it.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from udrl import storage
from udrl.hashing import stable_id
from udrl.policies.policy import Row

PART = 512  # texts: what a kill loses at most, of each replica
ASKED = pa.schema(
    [
        ("episode_id", pa.int64()),
        ("intent_id", pa.int64()),
        ("intent", pa.string()),
        ("task", pa.string()),
        ("prompt", pa.string()),
        ("other_prompt", pa.string()),  # what stands second, for a judge that compares; else empty
        ("reason", pa.string()),  # always empty: scoring asks about rows that have none
    ]
)
Answer = tuple[float, float]  # score, NaN where the judge failed; share of its probability on what counts as an answer
SCORES = pa.schema([("episode_id", pa.int64()), ("score", pa.float32()), ("mass", pa.float32())])


def question(row: Row, prompt: str, other: str = "") -> Row:
    """A row of :data:`ASKED`; equal texts have equal ids."""
    key = stable_id("judged", row["task"], row["intent"], prompt, other)
    kept = {name: row[name] for name in ("intent_id", "intent", "task")}
    return {"episode_id": key, **kept, "prompt": prompt, "other_prompt": other, "reason": ""}


def asked(folder: str) -> str:
    return storage.join(folder, "asked")


def scores(folder: str) -> str:
    return storage.join(folder, "scores")


def add(folder: str, questions: Iterable[Row]) -> None:
    """Write those questions that were never asked before as further parts."""
    names = storage.list_files(asked(folder))
    known: set[int] = set()
    for name in names:
        known.update(storage.read_table(storage.join(asked(folder), name), ["episode_id"])["episode_id"].to_pylist())
    new = {row["episode_id"]: row for row in questions if row["episode_id"] not in known}
    # The prompts of an intent beside each other: its own likelihood is then computed once, and a cached prefix is shared.
    ordered = sorted(new.values(), key=lambda row: (row["task"], row["intent"], row["prompt"], row["other_prompt"]))
    for number, at in enumerate(range(0, len(ordered), PART), start=len(names)):
        part = pa.Table.from_pylist(ordered[at : at + PART], schema=ASKED)
        storage.write_table(storage.join(asked(folder), f"part-{number:08d}.parquet"), part)


def answers(folder: str) -> dict[int, Answer]:
    """By the id of its question, each answer that is there."""
    found: dict[int, Answer] = {}
    for name in storage.list_files(scores(folder)):
        table = storage.read_table(storage.join(scores(folder), name), SCORES.names)
        score, mass = (table[column].to_numpy().astype(np.float64).tolist() for column in ("score", "mass"))
        found.update(zip(table["episode_id"].to_pylist(), zip(score, mass, strict=True), strict=True))
    return found
