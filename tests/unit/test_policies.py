"""Policies, their requests and their ledger: nothing is lost or counted twice, and every change has another fingerprint."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udrl import storage
from udrl.episodes import COMPLETIONS, EPISODES, REJECTS
from udrl.hashing import stable_id
from udrl.policies.ledger import count_rows, list_parts, part_name, read_ids, read_shard
from udrl.policies.policy import Policy, revision_kwargs, sampling_kwargs
from udrl.policies.requests import intent_requests, key_columns
from udrl.policies.teacher import teacher_policy
from udrl.recipe import Sampling, Teacher
from udrl.tasks import Example, Format, Task

TASK = Task(
    name="paint",
    title="Paint",
    instruction="Write a prompt.",
    examples=[Example(intent=f"thing {i}", prompt=f"a thing number {i} in light") for i in range(3)],
    format=Format(min_words=3, max_words=12, reject=["https?://"]),
)


def make_teacher(folder: Path, **config: object) -> Policy:
    if not (folder / "config.json").exists():  # the revision of a folder depends on the times of its files
        (folder / "config.json").write_text("{}")
    return teacher_policy(Teacher.model_validate({"model": str(folder), **config}), [TASK])


# ---- sampling


def test_settings_without_effect_are_not_sent() -> None:
    assert set(sampling_kwargs(Sampling())) == {"temperature", "min_p", "max_tokens"}
    assert sampling_kwargs(Sampling(top_k=5, frequency_penalty=0.3))["frequency_penalty"] == 0.3


# ---- fingerprints


def test_the_fingerprint_covers_templates_sampling_and_revision(tmp_path: Path) -> None:
    def fingerprint(**config: object) -> str:
        return make_teacher(tmp_path, **config).fingerprint

    assert fingerprint() == fingerprint()
    assert fingerprint() != fingerprint(sampling={"temperature": 0.5})
    assert fingerprint() != fingerprint(style="chat")
    assert fingerprint() == fingerprint(placement={"replicas": 4})  # the same completions on other hardware
    hub_model = teacher_policy(Teacher(model="owner/name"), [TASK])
    assert teacher_policy(Teacher(model="owner/name", revision="abc"), [TASK]).fingerprint != hub_model.fingerprint


def test_other_weights_in_the_same_folder_are_another_model(tmp_path: Path) -> None:
    before = make_teacher(tmp_path).fingerprint
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert make_teacher(tmp_path).fingerprint != before


def test_a_hub_model_is_loaded_at_the_recorded_revision() -> None:
    teacher = teacher_policy(Teacher(model="owner/name", revision="abc"), [TASK])
    assert revision_kwargs(teacher) == {"revision": "abc", "tokenizer_revision": "abc"}
    assert teacher.revision == "abc"


# ---- requests


def write_intents(folder: Path, n: int, group: int = 7) -> str:
    uri = str(folder / "intents.parquet")
    table = pa.table({"intent_id": range(n), "intent": [f"intent {i}" for i in range(n)], "subject": ["s"] * n})
    pq.write_table(table, uri, row_group_size=group)
    return uri


@given(n=st.integers(1, 40), samples=st.integers(1, 3), size=st.integers(1, 30))
def test_shards_contain_each_request_once(tmp_path_factory: pytest.TempPathFactory, n: int, samples: int, size: int) -> None:
    folder = tmp_path_factory.mktemp("shards")
    requests = intent_requests(make_teacher(folder), write_intents(folder, n), ["paint", "find"], samples, size)
    shards = [list(requests.rows(shard)) for shard in range(requests.shards)]
    assert [len(shard) for shard in shards] == [requests.shard_size(shard) for shard in range(requests.shards)]
    rows = [row for shard in shards for row in shard]
    keys = {(row["intent_id"], row["task"], row["variation"]) for row in rows}
    assert len(keys) == len(rows) == requests.total == n * 2 * samples
    assert len({row["episode_id"] for row in rows}) == requests.total
    assert all(row["intent"] == f"intent {row['intent_id']}" for row in rows)


def test_ids_differ_if_anything_that_distinguishes_two_requests_differs(tmp_path: Path) -> None:
    policy = make_teacher(tmp_path)
    base = key_columns(policy, 1, "x", "paint", 0)["episode_id"]
    others = [
        key_columns(policy, 2, "x", "paint", 0),
        key_columns(policy, 1, "x", "find", 0),
        key_columns(policy, 1, "x", "paint", 1),
        key_columns(policy, 1, "x", "paint", 0, round=1),
        key_columns(policy, 1, "x", "paint", 0, command_words=7),
    ]
    assert base not in {row["episode_id"] for row in others}
    assert 0 <= base < 2**63
    assert base == key_columns(policy, 1, "x", "paint", 0)["episode_id"]
    assert stable_id("a", "b") != stable_id("ab")


# ---- the ledger


def completions(ids: list[int]) -> pa.Table:
    blank = {"string": "", "int64": 0, "int32": 0}
    rows = [
        {field.name: blank.get(str(field.type), []) for field in COMPLETIONS} | {"episode_id": row_id, "completion": str(n)}
        for n, row_id in enumerate(ids)
    ]
    return pa.Table.from_pylist(rows, schema=COMPLETIONS)


def test_rows_that_were_written_twice_are_read_and_counted_once(tmp_path: Path) -> None:
    ledger = str(tmp_path)
    for shard, ids in ((3, [1, 2]), (3, [2, 4, 5]), (4, [9])):
        table = completions(ids)
        storage.write_table(storage.join(ledger, part_name(shard, table)), table)
    parts = list_parts(ledger)
    assert list(parts) == [3, 4]
    assert read_shard(ledger, parts[3]).column("episode_id").to_pylist() == [1, 2, 4, 5]
    assert read_ids(ledger, parts[3]) == {1, 2, 4, 5}
    assert count_rows(ledger) == {3: 4, 4: 1}


def test_a_retried_write_replaces_its_file() -> None:
    assert part_name(3, completions([1, 2])) == part_name(3, completions([1, 2])) != part_name(3, completions([1, 3]))


def test_every_table_begins_with_the_ids_and_names_no_column_twice() -> None:
    for schema in (COMPLETIONS, EPISODES, REJECTS):
        assert schema.names[:2] == ["episode_id", "intent_id"]
        assert len(schema.names) == len(set(schema.names))
