"""Requests that ask for several prompts at once: how they are cut, named, rendered and guided."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udrl.errors import UserError
from udrl.policies.requests import intent_requests, key_columns
from udrl.policies.teacher import structured_outputs, teacher_policy
from udrl.recipe import Teacher
from udrl.tasks import Example, Format, Task, load_task, render_chat_json, render_completion, render_completion_json, shipped


def task(name: str = "paint", **rules: Any) -> Task:
    examples = [Example(intent=f'thing "{i}"', prompt=f'a "thing" number {i} in light') for i in range(3)]
    return Task(name=name, title="Paint", instruction="Write.", examples=examples, format=Format(**rules))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "config.json").write_text("{}")
    table = pa.table({"intent_id": range(11), "intent": [f"intent {i}" for i in range(11)], "subject": ["s"] * 11})
    pq.write_table(table, folder / "intents.parquet", row_group_size=4)
    return folder


def policy(folder: Path, **settings: Any) -> Any:
    return teacher_policy(Teacher.model_validate({"model": str(folder), **settings}), [task("paint"), task("find")])


@given(samples=st.integers(1, 9), at_once=st.integers(1, 9), size=st.integers(1, 60))
def test_every_prompt_is_asked_for_once_however_requests_are_cut(folder: Path, samples: int, at_once: int, size: int) -> None:
    teacher = policy(folder, structured={"paint": at_once})
    intents = str(folder / "intents.parquet")
    requests = intent_requests(teacher, intents, ["paint", "find"], samples, size, {"paint": at_once})
    rows = [row for shard in range(requests.shards) for row in requests.rows(shard)]
    assert [len(list(requests.rows(s))) for s in range(requests.shards)] == [
        requests.shard_size(s) for s in range(requests.shards)
    ]
    assert len(rows) == requests.total == len({row["episode_id"] for row in rows}) == 11 * (samples + -(-samples // at_once))
    prompts = [(r["intent_id"], r["task"], r["variation"] + j) for r in rows for j in range(r["prompts"])]
    assert sorted(prompts) == [(i, t, v) for i in range(11) for t in ("find", "paint") for v in range(samples)]
    assert all(row["prompts"] == 1 for row in rows if row["task"] == "find")


def test_ids_of_plain_requests_stay_and_structured_ones_differ(folder: Path) -> None:
    teacher = policy(folder)
    plain = key_columns(teacher, 1, "x", "paint", 0)
    assert plain["prompts"] == 1
    assert plain["episode_id"] == key_columns(teacher, 1, "x", "paint", 0, prompts=1)["episode_id"]
    ids = {key_columns(teacher, 1, "x", "paint", 0, prompts=n)["episode_id"] for n in (1, 2, 3)}
    assert len(ids) == 3


def test_the_fingerprint_changes_with_structured_and_with_nothing_where_it_is_absent(folder: Path) -> None:
    assert "structured" not in policy(folder).describe
    marks = {policy(folder, structured=s).fingerprint for s in ({}, {"paint": 2}, {"paint": 3}, {"find": 2})}
    assert len(marks) == 4


@pytest.mark.parametrize(
    ("structured", "line"),
    [
        ({"draw": 2}, "teacher.structured.draw: no such task in this run; its tasks are paint, find"),
        ({"paint": 0}, "teacher.structured.paint: 0 prompts in one request; 1 to 32 are allowed"),
        ({"paint": 33}, "teacher.structured.paint: 33 prompts in one request; 1 to 32 are allowed"),
    ],
)
def test_what_structured_names_must_exist_and_fit(folder: Path, structured: dict[str, int], line: str) -> None:
    with pytest.raises(UserError) as error:
        policy(folder, structured=structured)
    assert str(error.value) == line


def test_a_structured_request_is_drawn_in_its_own_way_and_a_plain_one_is_not(folder: Path) -> None:
    teacher = policy(folder, structured={"paint": 3}, sampling={"max_tokens": 50})
    row = key_columns(teacher, 1, "a fox", "paint", 0)
    assert teacher.render(row) == {"prompt": render_completion(task("paint"), "a fox")}
    rendered = teacher.render({**row, "prompts": 3})
    assert rendered["prompt"] == render_completion_json(task("paint"), "a fox", 3)
    assert rendered["sampling"]["stop"] == []
    assert 150 < rendered["sampling"]["max_tokens"] < 200
    assert json.loads(json.dumps(rendered["sampling"])) == rendered["sampling"]  # it travels to the engine as JSON


@pytest.mark.parametrize("name", shipped())
def test_the_examples_keep_the_form_that_is_asked_for(name: str) -> None:
    shown = load_task(name)
    answers = [line.split(": ", 1)[1] for line in render_completion_json(shown, "a fox", 2).split("\n") if '{"prompts"' in line]
    turns = [m["content"] for m in render_chat_json(shown, "a fox", 2) if m["role"] == "assistant"]
    guide = structured_outputs(shown, 1)["regex"]
    assert answers == turns
    for answer, example in zip(answers, shown.examples, strict=True):
        assert json.loads(answer) == {"prompts": [example.prompt]}
        assert re.fullmatch(guide, answer)


def guided(rules: Task, n: int, text: str) -> bool:
    return re.fullmatch(structured_outputs(rules, n)["regex"], text) is not None


def test_the_guide_holds_the_number_of_prompts_and_leaves_no_room_for_blanks_or_endless_text() -> None:
    rules = task(min_words=2, max_words=4)
    assert guided(rules, 2, '{"prompts": ["a red fox", "one, two; three"]}')
    assert guided(rules, 2, ' {"prompts": ["a \\"red\\" fox", "émail 雪 ok"]}')
    assert not guided(rules, 2, '{"prompts": ["a red fox"]}')
    assert not guided(rules, 2, '{"prompts": ["a red fox", "b", "c"]}')
    assert not guided(rules, 1, '{ "prompts": ["a red fox"]}')
    assert not guided(rules, 1, '{"prompts": ["a  red"]}')
    assert not guided(rules, 1, '{"prompts": [""]}')
    assert not guided(rules, 1, '{"prompts": ["a\nb"]}')
    assert guided(rules, 1, '{"prompts": ["' + " ".join("abcde") + '"]}')  # one over: a runaway is rejected, not cut to fit
    assert not guided(rules, 1, '{"prompts": ["' + " ".join("abcdef") + '"]}')
    assert not guided(rules, 1, '{"prompts": ["' + "a" * 100 + '"]}')


WORD = st.text(
    st.characters(blacklist_categories=["Cc", "Cs", "Zs", "Zl", "Zp"], blacklist_characters='"\\'), min_size=1, max_size=12
)


@given(st.lists(st.lists(WORD, min_size=1, max_size=5).map(" ".join), min_size=1, max_size=4))
def test_whatever_json_writes_for_plain_words_fits_the_guide(prompts: list[str]) -> None:
    assert guided(task(max_words=5), len(prompts), json.dumps({"prompts": prompts}, ensure_ascii=False))
