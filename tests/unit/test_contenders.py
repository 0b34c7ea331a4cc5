"""Who is evaluated, what is asked of them, and what the plan says before it starts."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from evaluation_made_up import row, table

from udrl import commands
from udrl.evaluate import evaluated_policies as contenders
from udrl.evaluate import speed
from udrl.evaluate.evaluated_policies import EvaluatedPolicy
from udrl.evaluate.outputs import OUTPUTS, columns
from udrl.policies.teacher import teacher_policy
from udrl.recipe import Recipe, Teacher
from udrl.tasks import load_tasks


def values(**evaluate: Any) -> Recipe:
    given = {"name": "x", "storage": "s", "tasks": ["image_search", "text_to_image"], "intents": {"limit": 5}}
    return Recipe.model_validate({**given, "evaluate": evaluate})


def vocabulary(lengths: list[int], max_words: int = 40) -> commands.CommandVocabulary:
    learnt = {"edges": [0.5], "achieved_reward": [0.2, 0.8], "achieved_relevance": [0.2, 0.8], "counts": [9, 9]}
    task = commands.TaskCommands.model_validate({**learnt, "words": lengths, "default_words": 12, "default_reward": 1})
    return commands.CommandVocabulary(max_words=max_words, reward_bins=2, rank_within="task", tasks={"image_search": task})


def test_lengths_in_and_out_of_the_usual_range_never_meet() -> None:
    learnt = vocabulary([8, 14, 24])
    assert contenders.usual_lengths(learnt, "image_search") == [8, 12, 16, 20, 24]
    assert contenders.unusual_lengths(learnt, "image_search") == [4, 32, 40]
    everything = vocabulary([1, 20, 40])
    assert contenders.unusual_lengths(everything, "image_search") == []


def test_every_request_of_the_student_has_its_own_id_and_its_intent_s_are_neighbours(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tasks = load_tasks(["image_search"])
    policy = teacher_policy(Teacher(model=str(tmp_path)), tasks)
    asked = contenders._student_requests(
        policy, vocabulary([8, 14, 24]), tasks, [(7, "an owl"), (3, "a fox")], values(samples=2)
    )
    assert len({r["episode_id"] for r in asked}) == len(asked) == 2 * (2 + 5 + 3 + 2)
    assert [r["intent_id"] for r in asked] == [7] * 12 + [3] * 12
    of_probe = {probe: {r["command_words"] for r in asked if r["probe"] == probe} for probe in ("length", "reach")}
    assert of_probe == {"length": {8, 12, 16, 20, 24}, "reach": {4, 32, 40}}


def test_the_student_is_evaluated_at_any_command(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tasks = load_tasks(["image_search"])
    policy = teacher_policy(Teacher(model=str(tmp_path)), tasks)
    learnt, recipe = vocabulary([8, 14, 24]), values(words=9, reward=0)
    asked = contenders._student_requests(policy, learnt, tasks, [(1, "an owl")], recipe)
    assert {(r["command_words"], r["command_reward"]) for r in asked if r["probe"] == "default"} == {(9, 0)}
    plain = contenders._student_requests(policy, learnt, tasks, [(1, "an owl")], values())
    assert {(r["command_words"], r["command_reward"]) for r in plain if r["probe"] == "default"} == {(12, 1)}


def test_sweeps_are_asked_for_some_intents_from_all_over(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tasks = load_tasks(["image_search"])
    policy = teacher_policy(Teacher(model=str(tmp_path)), tasks)
    chosen = [(i, f"owl {i}") for i in range(9)]
    asked = contenders._student_requests(policy, vocabulary([8, 14, 24]), tasks, chosen, values(sweep_intents=3))
    assert {r["intent_id"] for r in asked if r["probe"] == "default"} == set(range(9))
    assert {r["intent_id"] for r in asked if r["probe"] != "default"} == {0, 4, 8}


def scorer(intents: list[str], prompts: list[str]) -> np.ndarray:
    return np.array([1.0 if intent == prompt else 0.1 for intent, prompt in zip(intents, prompts, strict=True)])


def test_yardsticks_copy_the_intent_swap_prompts_and_take_the_best() -> None:
    written = [
        row(intent=i, policy="teacher", variation=v, prompt=f"drawn {i} {v}", reward=[0.2, 0.9][(i + v) % 2])
        for i in range(3)
        for v in range(2)
    ]
    found = contenders.yardsticks(values(samples=2), table(*written, row(intent=0), row(intent=1), row(intent=2)), scorer)
    by_name: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        by_name.setdefault(one["policy"], []).append(one)
    assert {name: len(rows) for name, rows in by_name.items()} == {"echo": 3, "shuffled": 6, "best-of-2": 3}
    assert all(one["prompt"] == one["intent"] and one["relevance"] == 1.0 for one in by_name["echo"])
    own = {one["intent"]: f"drawn {i}" for i, one in enumerate(written[::2])}
    assert not any(one["prompt"].startswith(own[one["intent"]]) for one in by_name["shuffled"])
    assert {one["prompt"] for one in by_name["best-of-2"]} == {"drawn 0 1", "drawn 1 0", "drawn 2 1"}
    rows = columns(pa.Table.from_pylist(found, schema=OUTPUTS))
    assert not rows["rejected"].any()
    assert len({one["episode_id"] for one in found}) == len(found)


def test_without_a_teacher_there_is_only_the_echo() -> None:
    found = contenders.yardsticks(values(), table(row(intent=0), row(intent=1)), scorer)
    assert {one["policy"] for one in found} == {"echo"}


def test_the_plan_counts_what_is_missing_and_says_on_what_its_times_rest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    policy = teacher_policy(Teacher(model=str(tmp_path)), load_tasks(["image_search"]))
    one = EvaluatedPolicy("teacher", policy, [{}] * 1000)
    speeds = {"teacher": {"startup_seconds": 20.0, "prompts_per_second": 10.0}}
    lines = speed.plan([one], {"teacher": 600}, speeds, [speed.Judging("rubric", 500, 50.0), speed.Judging("pmi", 0, None)])
    assert lines == [
        "evaluate: about 1m59s in all",
        "  teacher: 600 prompts, about 1m49s (measured 10.0 prompts/s)",
        "  judge rubric: at most 500 texts, about 10s (measured before 50 texts/s)",
        "  judge pmi: all its scores are there already",
    ]
    assert speed.plan([one], {"teacher": 0}, speeds, []) == [
        "evaluate: nothing left to ask",
        "  teacher: all 1,000 prompts are there already",
    ]
    unknown = speed.plan([one], {"teacher": 600}, {}, [])
    assert unknown[0].endswith("without what was not measured")
