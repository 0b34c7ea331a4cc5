"""Tasks: the shipped ones, the rules for a user's own file, and the rendering as a teacher's input."""

from pathlib import Path

import pytest
import yaml

from udrl import tasks
from udrl.errors import UserError
from udrl.text import count_words

SHIPPED = ["image_search", "text_to_image", "text_to_template", "text_to_video"]
FIFTH = """
name: haiku
title: Haiku
instruction: Write a haiku for each request.
label: Haiku
examples:
  - {intent: rain, prompt: "Rain on the tin roof, the cat counts every drop."}
  - {intent: a train, prompt: "Night train, one window lit."}
  - {intent: tea, prompt: "Steam leaves the cup, the hands stay warm."}
format:
  min_words: 3
  max_words: 20
  reject: ['\\bpoem\\b']
  prefer: [',', 'cat']
"""


@pytest.fixture(params=SHIPPED)
def task(request: pytest.FixtureRequest) -> tasks.Task:
    return tasks.load_task(request.param)


def error_of(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(UserError) as problem:
        tasks.load_task(str(path))
    assert all(str(path) in line for line in str(problem.value).splitlines())
    return str(problem.value)


def test_four_tasks_ship() -> None:
    assert tasks.shipped_tasks() == SHIPPED
    assert [task.name for task in tasks.load_tasks(SHIPPED)] == SHIPPED


def test_shipped_examples_keep_the_rules_of_their_task(task: tasks.Task) -> None:
    for example in task.examples:
        assert task.find_violation(example.prompt) is None, example.prompt
        assert task.format_score(example.prompt) >= 0.5, example.prompt


def test_shipped_examples_are_single_lines_of_different_lengths(task: tasks.Task) -> None:
    # The teacher copies the lengths of its examples, and length control is learned from the lengths that the teacher writes.
    assert len(task.examples) >= 4
    lengths = [count_words(example.prompt) for example in task.examples]
    assert max(lengths) >= 2 * min(lengths)
    assert len(set(lengths)) >= 3
    for example in task.examples:
        assert "\n" not in example.prompt
        assert "\n" not in example.intent


def test_shipped_prefixes_stay_short_enough_for_a_small_teacher(task: tasks.Task) -> None:
    assert count_words(tasks.render_completion(task, "")) < 190


@pytest.mark.parametrize(
    "prompt",
    [
        "Sure, a red fox jumps over a fence at dawn in the rain",
        "Here is a red fox that jumps over a fence at dawn",
        "A red fox jumps over a fence at dawn Intent: a cat",
        "Prompt: a red fox jumps over a fence at dawn today",
        "red fox over a fence https://example.org/fox dawn light photo",
        "red fox over a fence from foxes.com dawn light photo",
        "1. red fox jumps over a fence at dawn light photo",
        "- red fox jumps over a fence at dawn light photo",
        "**red fox** jumps over a fence at dawn light photo",
        "<b>red fox</b> jumps over a fence at dawn light photo",
        "red fox [insert place] over a fence dawn light photo",
        "red fox jumps over a fence at dawn light and the",
        "red",
        "fox " * 60,
    ],
)
def test_shipped_tasks_reject_texts_that_are_not_prompts(task: tasks.Task, prompt: str) -> None:
    assert task.find_violation(prompt)


@pytest.mark.parametrize(
    ("name", "better", "worse"),
    [
        (
            "text_to_image",
            "Red fox on a mossy log, low evening sun, soft watercolor",
            "Red fox that is on a log somewhere there",
        ),
        (
            "text_to_template",
            "Fox club flyer, bold headline at the top, teal border, date below",
            "A flyer that is for the fox club of our town",
        ),
        ("image_search", "red fox forest snow winter photo", "the red fox that is in a forest with some snow"),
        (
            "text_to_video",
            "Red fox runs through snow, low tracking shot, cold dawn light",
            "There is a fox and it is in the snow there",
        ),
    ],
)
def test_format_score_prefers_the_better_prompt(name: str, better: str, worse: str) -> None:
    task = tasks.load_task(name)
    assert task.find_violation(better) is None
    assert task.format_score(better) > task.format_score(worse)


def test_a_fifth_task_is_one_yaml_file(tmp_path: Path) -> None:
    (tmp_path / "haiku.yaml").write_text(FIFTH)
    *_, haiku = tasks.load_tasks([*SHIPPED, str(tmp_path / "haiku.yaml")])
    assert haiku.find_violation("A cat sleeps, the sun moves on.") is None
    assert haiku.find_violation("This poem is about a cat")
    assert haiku.find_violation("too short")
    assert haiku.format_score("A cat sleeps, the sun moves on.") == 1.0
    assert haiku.format_score("A dog sleeps, the sun moves on.") == 0.5
    text = tasks.render_completion(haiku, "a cat in the sun")
    assert text.startswith("Write a haiku for each request.\n\nIntent: rain\nHaiku: Rain on")
    assert text.endswith("\n\nIntent: a cat in the sun\nHaiku:")
    chat = tasks.render_chat(haiku, "a cat in the sun")
    assert [message["role"] for message in chat] == ["system", *["user", "assistant"] * 3, "user"]
    assert chat[-1]["content"] == "a cat in the sun"


def test_a_task_without_format_rules_accepts_any_prompt_of_ordinary_length(tmp_path: Path) -> None:
    values = yaml.safe_load(FIFTH)
    del values["format"]
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(values))
    plain = tasks.load_task(str(tmp_path / "plain.yaml"))
    assert plain.find_violation("a poem of five words") is None
    assert plain.format_score("anything") == 1.0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: Haiku\n", "", "title: Field required"),
        ("name: haiku", "name: My Haiku", "name: String should match"),
        ("label: Haiku", "lable: Haiku", "lable: Extra inputs"),
        ("min_words: 3", "min_words: 30", "min_words 30 is above max_words 20"),
        ("min_words: 3", "min_words: few", "format.min_words"),
        ("'\\bpoem\\b'", "'(poem'", "not a regular expression: '(poem'"),
        ("  - {intent: tea,", "  - {intent: '',", "examples.2.intent"),
    ],
)
def test_a_malformed_task_file_is_reported_in_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in FIFTH
    error = error_of(tmp_path / "haiku.yaml", FIFTH.replace(old, new))
    assert message in error.splitlines()[0]


def test_too_few_examples(tmp_path: Path) -> None:
    values = yaml.safe_load(FIFTH)
    values["examples"] = values["examples"][:2]
    assert "examples: List should have at least 3 items" in error_of(tmp_path / "haiku.yaml", yaml.safe_dump(values))


@pytest.mark.parametrize(("text", "message"), [("a: [", "not YAML"), ("- a\n- b", "(list)"), ("", "(NoneType)")])
def test_files_that_do_not_contain_a_task(tmp_path: Path, text: str, message: str) -> None:
    error = error_of(tmp_path / "task.yaml", text)
    assert message in error
    assert "\n" not in error


def test_an_unknown_name_lists_the_shipped_tasks() -> None:
    with pytest.raises(UserError, match=r"text_to_musik: not shipped .*text_to_image"):
        tasks.load_task("text_to_musik")


def test_one_name_defined_twice(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(FIFTH.replace("name: haiku", "name: text_to_image"))
    with pytest.raises(UserError, match=r"mine\.yaml: the task name 'text_to_image' is defined twice"):
        tasks.load_tasks(["text_to_image", str(tmp_path / "mine.yaml")])
