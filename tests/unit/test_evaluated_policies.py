"""Evaluated policies and their requests, trivial baselines, and the plan that is shown before the start."""

from pathlib import Path
from typing import Any

import numpy as np
from fakes.fake_evaluation import row, table

from udrl import commands
from udrl.evaluate.evaluated_policies import EvaluatedIntent, EvaluatedPolicy, student_requests, unusual_lengths, usual_lengths
from udrl.evaluate.outputs import columns
from udrl.evaluate.policy_outputs import trivial_baseline_outputs
from udrl.evaluate.speed import PolicySpeed
from udrl.evaluate.stage import plan_lines
from udrl.policies.teacher import teacher_policy
from udrl.recipe import Recipe, Teacher
from udrl.tasks import load_tasks


def values(**evaluate: Any) -> Recipe:
    base = {"name": "x", "storage": "s", "tasks": ["image_search", "text_to_image"], "intents": {"limit": 5}}
    return Recipe.model_validate({**base, "evaluate": evaluate})


def vocabulary(lengths: list[int], max_words: int = 40) -> commands.CommandVocabulary:
    learned = {"edges": [0.5], "achieved_reward": [0.2, 0.8], "achieved_relevance": [0.2, 0.8], "counts": [9, 9]}
    task = commands.TaskCommands.model_validate({**learned, "words": lengths, "default_words": 12, "default_reward": 1})
    return commands.CommandVocabulary(max_words=max_words, reward_bins=2, rank_within="task", tasks={"image_search": task})


def test_usual_and_unusual_lengths_do_not_overlap() -> None:
    learned = vocabulary([8, 14, 24])
    assert usual_lengths(learned, "image_search") == [8, 12, 16, 20, 24]
    assert unusual_lengths(learned, "image_search") == [4, 32, 40]
    everything = vocabulary([1, 20, 40])
    assert unusual_lengths(everything, "image_search") == []


def test_student_requests_have_distinct_ids_and_those_of_an_intent_are_adjacent(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tasks = load_tasks(["image_search"])
    policy = teacher_policy(Teacher(model=str(tmp_path)), tasks)
    requests = student_requests(
        policy, vocabulary([8, 14, 24]), tasks, [EvaluatedIntent(7, "an owl"), EvaluatedIntent(3, "a fox")], values(samples=2)
    )
    assert len({r["episode_id"] for r in requests}) == len(requests) == 2 * (2 + 5 + 3 + 2)
    assert [r["intent_id"] for r in requests] == [7] * 12 + [3] * 12
    words = {probe: {r["command_words"] for r in requests if r["probe"] == probe} for probe in ("length", "reach")}
    assert words == {"length": {8, 12, 16, 20, 24}, "reach": {4, 32, 40}}


def test_the_recipe_can_set_the_default_command(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tasks = load_tasks(["image_search"])
    policy = teacher_policy(Teacher(model=str(tmp_path)), tasks)
    learned, recipe = vocabulary([8, 14, 24]), values(words=9, reward=0)
    requests = student_requests(policy, learned, tasks, [EvaluatedIntent(1, "an owl")], recipe)
    assert {(r["command_words"], r["command_reward"]) for r in requests if r["probe"] == "default"} == {(9, 0)}
    plain = student_requests(policy, learned, tasks, [EvaluatedIntent(1, "an owl")], values())
    assert {(r["command_words"], r["command_reward"]) for r in plain if r["probe"] == "default"} == {(12, 1)}


def test_sweeps_cover_a_few_intents_spread_over_all(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tasks = load_tasks(["image_search"])
    policy = teacher_policy(Teacher(model=str(tmp_path)), tasks)
    intents = [EvaluatedIntent(i, f"owl {i}") for i in range(9)]
    requests = student_requests(policy, vocabulary([8, 14, 24]), tasks, intents, values(sweep_intents=3))
    assert {r["intent_id"] for r in requests if r["probe"] == "default"} == set(range(9))
    assert {r["intent_id"] for r in requests if r["probe"] != "default"} == {0, 4, 8}


def scorer(intents: list[str], prompts: list[str]) -> np.ndarray:
    return np.array([1.0 if intent == prompt else 0.1 for intent, prompt in zip(intents, prompts, strict=True)])


def test_trivial_baselines_copy_the_intent_swap_prompts_and_take_the_best_sample() -> None:
    samples = [
        row(intent=i, policy="teacher", variation=v, prompt=f"sample {i} {v}", reward=[0.2, 0.9][(i + v) % 2])
        for i in range(3)
        for v in range(2)
    ]
    outputs = table(*samples, row(intent=0), row(intent=1), row(intent=2))
    baselines = trivial_baseline_outputs(values(samples=2), outputs, scorer)
    rows_of: dict[str, list[dict[str, Any]]] = {}
    for baseline_row in baselines.to_pylist():
        rows_of.setdefault(baseline_row["policy"], []).append(baseline_row)
    assert {name: len(rows) for name, rows in rows_of.items()} == {"echo": 3, "shuffled": 6, "best-of-2": 3}
    assert all(echo["prompt"] == echo["intent"] and echo["relevance"] == 1.0 for echo in rows_of["echo"])
    own = {sample["intent"]: f"sample {i}" for i, sample in enumerate(samples[::2])}
    assert not any(shuffled["prompt"].startswith(own[shuffled["intent"]]) for shuffled in rows_of["shuffled"])
    assert {best["prompt"] for best in rows_of["best-of-2"]} == {"sample 0 1", "sample 1 0", "sample 2 1"}
    assert not columns(baselines)["rejected"].any()
    assert len(set(baselines["episode_id"].to_pylist())) == baselines.num_rows


def test_without_a_teacher_the_only_trivial_baseline_is_the_echo() -> None:
    baselines = trivial_baseline_outputs(values(), table(row(intent=0), row(intent=1)), scorer)
    assert set(baselines["policy"].to_pylist()) == {"echo"}


def test_the_plan_counts_missing_work_and_names_the_basis_of_its_times(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    policy = teacher_policy(Teacher(model=str(tmp_path)), load_tasks(["image_search"]))
    teacher = EvaluatedPolicy("teacher", policy, [{}] * 1000)
    speeds = {
        "teacher": PolicySpeed(
            latency_p50=1, latency_p95=1, prompts_per_second=10, tokens_per_second=200, memory_mib=300, startup_seconds=20
        )
    }
    assert plan_lines([teacher], {"teacher": 600}, speeds) == [
        "evaluate: to write",
        "  teacher: 600 prompts, about 1m49s (measured 10.0 prompts/s)",
    ]
    assert plan_lines([teacher], {"teacher": 0}, speeds) == ["evaluate: nothing left to write"]
    assert plan_lines([teacher], {"teacher": 600}, {})[1] == "  teacher: 600 prompts; speed not measured"
