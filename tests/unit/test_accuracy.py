"""Whether prompts are recognized as their task's, and keep its rules."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fakes.fake_evaluation import row, table

from udrl.evaluate.document import TaskAccuracy
from udrl.evaluate.metrics import control
from udrl.evaluate.outputs import columns
from udrl.tasks import load_task

IMAGE, SEARCH = "text_to_image", "image_search"
TASKS = [load_task(IMAGE), load_task(SEARCH)]
NOUNS = ("owl", "rocket", "leaf", "party", "logo", "dinosaur", "lake", "bench", "fox", "car")


def prompt_of(task: str, noun: str) -> str:
    return f"a watercolor painting of {noun} in soft light" if task == IMAGE else f"stock photo {noun} white background"


def shares(rows: list[dict[str, Any]], training: control.Texts | None = None) -> dict[str, TaskAccuracy]:
    return control.accuracy_by_policy(control.add_accuracy_columns(columns(table(*rows)), TASKS, training or {}))


def recognized(accuracy: dict[str, TaskAccuracy]) -> dict[str, float | None]:
    return {policy: shares.recognized for policy, shares in accuracy.items()}


def outputs(policy: str, swap: bool = False) -> list[dict[str, Any]]:
    other = {IMAGE: SEARCH, SEARCH: IMAGE} if swap else {IMAGE: IMAGE, SEARCH: SEARCH}
    return [row(t, i, policy, prompt=prompt_of(other[t], noun)) for t in other for i, noun in enumerate(NOUNS)]


def test_prompts_that_read_like_their_task_are_recognized_and_those_of_another_are_not() -> None:
    accuracy = shares([*outputs("teacher"), *outputs("student"), *outputs("llama", swap=True)])
    assert recognized(accuracy) == {"teacher": 1, "student": 1, "llama": 0}


def test_the_classifier_is_trained_on_training_prompts_if_they_cover_the_tasks() -> None:
    training = {task: [prompt_of(task, f"thing {i}") for i in range(30)] for task in (IMAGE, SEARCH, "unused")}
    assert recognized(shares([*outputs("student"), *outputs("llama", swap=True)], training)) == {"student": 1, "llama": 0}
    # Training does not cover the other task: the teacher's outputs are used.
    assert recognized(shares(outputs("teacher"), {IMAGE: ["a"]})) == {"teacher": 1}


def test_a_rejected_output_is_neither_recognized_nor_well_formed() -> None:
    rows = [*outputs("teacher"), row(IMAGE, 0, prompt=prompt_of(IMAGE, "owl")), row(IMAGE, 1, prompt="", reason="echo")]
    measured = shares(rows)
    student = measured["student"]
    assert (student.recognized, student.well_formed) == (0.5, 0.5)
    assert (student.recognized_accepted, student.well_formed_accepted) == (1, 1)


def test_no_prompt_is_judged_by_a_classifier_that_saw_one_for_its_intent() -> None:
    # Every prompt has words of its own: a classifier that saw it is always right, one that did not can only guess.
    def rows(policy: str) -> list[dict[str, Any]]:
        return [row(t, i, policy, prompt=f"{t}{i}a {t}{i}b {t}{i}c {t}{i}d") for t in (IMAGE, SEARCH) for i in range(50)]

    elsewhere = [{**r, "intent_id": s["intent_id"], "policy": "shuffled"} for r, s in zip(rows(""), rows("")[1:], strict=False)]
    by_policy = recognized(shares([*rows("teacher"), *rows("student"), *elsewhere]))
    assert by_policy["student"] == by_policy["teacher"] < 0.7
    assert by_policy["shuffled"] < 0.7


@pytest.mark.parametrize(
    "rows",
    [[row(IMAGE, i, p) for i in range(9) for p in ("teacher", "student")], outputs("student"), outputs("teacher")[:1]],
    ids=["one task", "no teacher", "one row"],
)
def test_without_two_tasks_of_the_teacher_recognition_is_unknown(rows: list[dict[str, Any]]) -> None:
    assert set(recognized(shares(rows)).values()) == {None}


def test_well_formed_prompts_keep_the_task_s_rules() -> None:
    rows = [row(IMAGE, 0, prompt="a soft golden owl at night"), row(IMAGE, 1, prompt="owl"), row("unknown", 2, prompt="owl")]
    assert shares(rows[:2])["student"].well_formed == 0.5
    assert shares(rows[2:])["student"].well_formed is None


def stream(n: int, parts: int) -> list[pa.Table]:
    return [
        pa.table(
            {"task": [IMAGE] * n, "prompt": [f"{part} {i}" for i in range(n)], "policy": ["teacher", "student"] * (n // 2)}
        )
        for part in range(parts)
    ]


def test_sampling_passes_all_tables_on_and_keeps_a_bounded_sample_of_the_teacher_s() -> None:
    sample: control.Texts = {}
    parts = stream(100, 4)
    assert list(control.sample_teacher_prompts(parts, sample, limit=60)) == parts
    assert len(set(sample[IMAGE])) == 60
    assert all(int(prompt.split()[1]) % 2 == 0 for prompt in sample[IMAGE])  # the student's have odd numbers
    again: control.Texts = {}
    list(control.sample_teacher_prompts(stream(100, 4), again, limit=60))
    assert again == sample


def test_the_sample_is_drawn_evenly_from_the_whole_stream() -> None:
    counts = np.zeros(4)
    for seed in range(30):
        sample: control.Texts = {}
        list(control.sample_teacher_prompts(stream(100, 4), sample, limit=40, seed=seed))
        counts += np.bincount([int(prompt.split()[0]) for prompt in sample[IMAGE]], minlength=4)
    assert counts / counts.sum() == pytest.approx([0.25] * 4, abs=0.05)
