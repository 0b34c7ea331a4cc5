"""Requests are cut, named and counted so that nothing is lost."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udrl import storage
from udrl.episodes import COMPLETIONS, EPISODES, REJECTS
from udrl.hashing import stable_id
from udrl.policies import ledger
from udrl.policies import policy as policies
from udrl.policies.policy import Policy, sampling_kwargs
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


def test_settings_that_do_nothing_are_not_sent() -> None:
    assert set(sampling_kwargs(Sampling())) == {"temperature", "min_p", "max_tokens"}
    assert sampling_kwargs(Sampling(top_k=5, frequency_penalty=0.3))["frequency_penalty"] == 0.3


def write_intents(folder: str, n: int, group: int = 7) -> str:
    import pyarrow.parquet as pq

    uri = storage.join(folder, "intents.parquet")
    table = pa.table({"intent_id": range(n), "intent": [f"intent {i}" for i in range(n)], "subject": ["s"] * n})
    pq.write_table(table, uri, row_group_size=group)
    return uri


@pytest.fixture
def policy(tmp_path: object) -> object:
    model = tmp_path / "model"  # type: ignore[operator]
    model.mkdir()
    (model / "config.json").write_text("{}")
    return teacher_policy(Teacher(model=str(model)), [TASK])


@given(n=st.integers(1, 40), samples=st.integers(1, 3), size=st.integers(1, 30))
def test_shards_hold_each_request_once(tmp_path_factory: pytest.TempPathFactory, n: int, samples: int, size: int) -> None:
    folder = tmp_path_factory.mktemp("shards")
    (folder / "config.json").write_text("{}")
    teacher = teacher_policy(Teacher(model=str(folder)), [TASK])
    requests = intent_requests(teacher, write_intents(str(folder), n), ["paint", "find"], samples, size)
    rows = [list(requests.rows(s)) for s in range(requests.shards)]
    assert [len(r) for r in rows] == [requests.shard_size(s) for s in range(requests.shards)]
    keys = {(r["intent_id"], r["task"], r["variation"]) for part in rows for r in part}
    assert len(keys) == sum(len(r) for r in rows) == requests.total == n * 2 * samples
    assert len({r["episode_id"] for part in rows for r in part}) == requests.total
    assert all(r["intent"] == f"intent {r['intent_id']}" for part in rows for r in part)


def test_ids_change_with_all_that_tells_two_requests_apart(policy: Policy) -> None:
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


def test_the_fingerprint_follows_templates_sampling_and_revision(tmp_path: object) -> None:
    (tmp_path / "config.json").write_text("{}")  # type: ignore[operator]

    def mark(**more: object) -> str:
        return teacher_policy(Teacher.model_validate({"model": str(tmp_path), **more}), [TASK]).fingerprint

    assert mark() == mark()
    assert mark() != mark(sampling={"temperature": 0.5})
    assert teacher_policy(Teacher(model="owner/name", revision="abc"), [TASK]).fingerprint != (
        teacher_policy(Teacher(model="owner/name"), [TASK]).fingerprint
    )
    assert mark() != mark(style="chat")
    assert mark() == mark(placement={"replicas": 4})  # where it runs does not matter


def test_other_weights_in_the_same_folder_are_another_model(tmp_path: object) -> None:
    folder = tmp_path  # type: ignore[assignment]
    (folder / "config.json").write_text("{}")  # type: ignore[operator]
    before = teacher_policy(Teacher(model=str(folder)), [TASK]).fingerprint
    (folder / "model.safetensors").write_bytes(b"weights")  # type: ignore[operator]
    assert teacher_policy(Teacher(model=str(folder)), [TASK]).fingerprint != before


def test_a_hub_model_is_loaded_at_the_revision_that_is_recorded() -> None:
    teacher = teacher_policy(Teacher(model="owner/name", revision="abc"), [TASK])
    assert policies.revision_kwargs(teacher) == {"revision": "abc", "tokenizer_revision": "abc"}
    assert teacher.revision == "abc"


def test_rows_written_twice_are_read_once(tmp_path: object) -> None:
    def table(ids: list[int]) -> pa.Table:
        blank = {"string": "", "int64": 0, "int32": 0}.get
        rows = [
            {f.name: blank(str(f.type), []) for f in COMPLETIONS} | {"episode_id": i, "completion": str(n)}
            for n, i in enumerate(ids)
        ]
        return pa.Table.from_pylist(rows, schema=COMPLETIONS)

    def write(shard: int, rows: pa.Table) -> None:
        storage.write_table(storage.join(out, ledger.part_name(shard, rows)), rows)

    out = str(tmp_path)
    write(3, table([1, 2]))
    write(3, table([2, 4, 5]))
    write(4, table([9]))
    assert list(ledger.list_parts(out)) == [3, 4]
    assert ledger.read_shard(out, ledger.list_parts(out)[3]).column("episode_id").to_pylist() == [1, 2, 4, 5]


def test_every_table_has_the_key_columns() -> None:
    for schema in (COMPLETIONS, EPISODES, REJECTS):
        assert schema.names[:2] == ["episode_id", "intent_id"]
        assert len(schema.names) == len(set(schema.names))
