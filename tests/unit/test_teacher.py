"""Requests for several prompts at once: their shards, ids, rendering and guided decoding."""

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
from udrl.policies.policy import Policy
from udrl.policies.requests import intent_requests, key_columns
from udrl.policies.teacher import structured_outputs, teacher_policy
from udrl.recipe import Teacher
from udrl.tasks import (
    Example,
    Format,
    Task,
    load_task,
    render_chat_json,
    render_completion,
    render_completion_json,
    shipped_tasks,
)


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


def make_teacher(folder: Path, **config: Any) -> Policy:
    return teacher_policy(Teacher.model_validate({"model": str(folder), **config}), [task("paint"), task("find")])


@given(samples=st.integers(1, 9), group=st.integers(1, 9), size=st.integers(1, 60))
def test_every_prompt_is_requested_once_for_any_group_and_shard_size(folder: Path, samples: int, group: int, size: int) -> None:
    teacher = make_teacher(folder, structured={"paint": group})
    intents = str(folder / "intents.parquet")
    requests = intent_requests(teacher, intents, ["paint", "find"], samples, size, {"paint": group})
    rows = [row for shard in range(requests.shards) for row in requests.rows(shard)]
    assert [len(list(requests.rows(s))) for s in range(requests.shards)] == [
        requests.shard_size(s) for s in range(requests.shards)
    ]
    assert len(rows) == requests.total == len({row["episode_id"] for row in rows}) == 11 * (samples + -(-samples // group))
    prompts = [(r["intent_id"], r["task"], r["variation"] + j) for r in rows for j in range(r["prompts"])]
    assert sorted(prompts) == [(i, t, v) for i in range(11) for t in ("find", "paint") for v in range(samples)]
    assert all(row["prompts"] == 1 for row in rows if row["task"] == "find")


def test_the_ids_of_structured_requests_differ_from_those_of_plain_ones(folder: Path) -> None:
    teacher = make_teacher(folder)
    plain = key_columns(teacher, 1, "x", "paint", 0)
    assert plain["prompts"] == 1
    assert plain["episode_id"] == key_columns(teacher, 1, "x", "paint", 0, prompts=1)["episode_id"]
    ids = {key_columns(teacher, 1, "x", "paint", 0, prompts=n)["episode_id"] for n in (1, 2, 3)}
    assert len(ids) == 3


def test_the_fingerprint_covers_structured_only_if_it_is_set(folder: Path) -> None:
    assert "structured" not in make_teacher(folder).describe
    values = ({}, {"paint": 2}, {"paint": 3}, {"find": 2})
    assert len({make_teacher(folder, structured=value).fingerprint for value in values}) == 4


@pytest.mark.parametrize(
    ("structured", "line"),
    [
        ({"draw": 2}, "teacher.structured.draw: no such task in this run; its tasks are paint, find"),
        ({"paint": 0}, "teacher.structured.paint: 0 prompts in one request; 1 to 32 are allowed"),
        ({"paint": 33}, "teacher.structured.paint: 33 prompts in one request; 1 to 32 are allowed"),
    ],
)
def test_structured_takes_only_tasks_of_the_run_and_numbers_in_range(
    folder: Path, structured: dict[str, int], line: str
) -> None:
    with pytest.raises(UserError) as error:
        make_teacher(folder, structured=structured)
    assert str(error.value) == line


def test_only_a_structured_request_overrides_the_sampling(folder: Path) -> None:
    teacher = make_teacher(folder, structured={"paint": 3}, sampling={"max_tokens": 50})
    row = key_columns(teacher, 1, "a fox", "paint", 0)
    assert teacher.render(row) == {"prompt": render_completion(task("paint"), "a fox")}
    rendered = teacher.render({**row, "prompts": 3})
    assert rendered["prompt"] == render_completion_json(task("paint"), "a fox", 3)
    assert rendered["sampling"]["stop"] == []
    assert 150 < rendered["sampling"]["max_tokens"] < 200
    assert json.loads(json.dumps(rendered["sampling"])) == rendered["sampling"]  # it travels to the engine as JSON


@pytest.mark.parametrize("name", shipped_tasks())
def test_the_examples_have_the_form_of_a_structured_answer(name: str) -> None:
    task_shown = load_task(name)
    answers = [
        line.split(": ", 1)[1] for line in render_completion_json(task_shown, "a fox", 2).split("\n") if '{"prompts"' in line
    ]
    turns = [m["content"] for m in render_chat_json(task_shown, "a fox", 2) if m["role"] == "assistant"]
    guide = structured_outputs(task_shown, 1)["regex"]
    assert answers == turns
    for answer, example in zip(answers, task_shown.examples, strict=True):
        assert json.loads(answer) == {"prompts": [example.prompt]}
        assert re.fullmatch(guide, answer)


def is_allowed(rules: Task, n: int, text: str) -> bool:
    return re.fullmatch(structured_outputs(rules, n)["regex"], text) is not None


def test_the_guide_fixes_the_number_of_prompts_and_excludes_blanks_and_endless_text() -> None:
    rules = task(min_words=2, max_words=4)
    assert is_allowed(rules, 2, '{"prompts": ["a red fox", "one, two; three"]}')
    assert is_allowed(rules, 2, ' {"prompts": ["a \\"red\\" fox", "émail 雪 ok"]}')
    assert not is_allowed(rules, 2, '{"prompts": ["a red fox"]}')
    assert not is_allowed(rules, 2, '{"prompts": ["a red fox", "b", "c"]}')
    assert not is_allowed(rules, 1, '{ "prompts": ["a red fox"]}')
    assert not is_allowed(rules, 1, '{"prompts": ["a  red"]}')
    assert not is_allowed(rules, 1, '{"prompts": [""]}')
    assert not is_allowed(rules, 1, '{"prompts": ["a\nb"]}')
    assert is_allowed(
        rules, 1, '{"prompts": ["' + " ".join("abcde") + '"]}'
    )  # one word over: a text that does not end is rejected, not cut to fit
    assert not is_allowed(rules, 1, '{"prompts": ["' + " ".join("abcdef") + '"]}')
    assert not is_allowed(rules, 1, '{"prompts": ["' + "a" * 100 + '"]}')


WORD = st.text(
    st.characters(blacklist_categories=["Cc", "Cs", "Zs", "Zl", "Zp"], blacklist_characters='"\\'), min_size=1, max_size=12
)


@given(st.lists(st.lists(WORD, min_size=1, max_size=5).map(" ".join), min_size=1, max_size=4))
def test_json_of_plain_words_fits_the_guide(prompts: list[str]) -> None:
    assert is_allowed(task(max_words=5), len(prompts), json.dumps({"prompts": prompts}, ensure_ascii=False))
