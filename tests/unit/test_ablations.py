"""Runs on another run's episodes, and students that follow no commands."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fakes import fake_evaluation as made_up
from fakes.fake_vocabulary import fake_vocabulary

from udrl import command_line, storage
from udrl.commands import ANY, CommandVocabulary
from udrl.errors import UserError
from udrl.evaluate.evaluated_policies import EvaluatedIntent, sample_stream, select_intents, student_requests
from udrl.evaluate.metrics import compute as metrics
from udrl.evaluate.outputs import OUTPUTS
from udrl.evaluate.report import write_report as report
from udrl.policies.requests import key_columns
from udrl.policies.teacher import teacher_policy
from udrl.recipe import Recipe, Teacher
from udrl.run import EvaluationPaths, GenerateSummary, Run
from udrl.tasks import load_tasks

ROOT = Path(__file__).resolve().parents[2]


def make_recipe(tmp_path: Path, **more: Any) -> Recipe:
    required = {"name": "x", "storage": str(tmp_path / "mine"), "tasks": ["image_search"], "intents": {"limit": 5}}
    return Recipe.model_validate({**required, "evaluate": {"intents": 3, "samples": 2}, **more})


def vocabulary(objective: str) -> CommandVocabulary:
    return fake_vocabulary(["image_search"], max_words=20, reward_bins=3, objective=objective)


def test_held_out_intents_come_from_the_run_whose_episodes_are_used(tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    table = pa.table({"intent_id": [1, 2], "intent": ["an owl", "a fox"], "subject": ["owl", "fox"]})
    storage.write_table(Run(other).intents("here").heldout, table)
    GenerateSummary(accepted=0, intents="here", ledger="", scoring="").save(Run(other).generate_summary)
    assert select_intents(make_recipe(tmp_path, episodes_from=other))[0] == [(1, "an owl", "owl"), (2, "a fox", "fox")]
    with pytest.raises(UserError, match="mine: no finished generate stage"):
        select_intents(make_recipe(tmp_path))


def test_a_plainly_fine_tuned_student_gets_no_commands(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tasks = load_tasks(["image_search"])
    policy = teacher_policy(Teacher(model=str(tmp_path)), tasks)
    requests = {
        objective: student_requests(policy, vocabulary(objective), tasks, [EvaluatedIntent(1, "an owl")], make_recipe(tmp_path))
        for objective in ("udrl", "sft")
    }
    assert {row["probe"] for row in requests["udrl"]} == {"default", "length", "reach", "reward"}
    assert {(row["probe"], row["command_words"], row["command_reward"]) for row in requests["sft"]} == {("default", ANY, ANY)}
    assert len(requests["sft"]) == 2


def test_its_report_is_complete_without_control_curves(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tasks = load_tasks(["image_search"])
    policy = teacher_policy(Teacher(model=str(tmp_path)), tasks)
    rows = []
    for policy_name in ("student", "teacher"):
        for i in range(12):
            row = {f.name: None for f in OUTPUTS} | key_columns(policy, i // 2, f"owl {i // 2}", "image_search", i % 2)
            row |= {"policy": policy_name, "model": "m", "probe": "default", "reason": ""}
            row |= {"prompt": f"soft owl {i} in light", "n_words": 5, "relevance": 0.5, "reward": 0.5}
            rows.append({name: row[name] for name in OUTPUTS.names})
    outputs = pa.Table.from_pylist(rows, schema=OUTPUTS)
    measured = metrics.compute(outputs, judges={}, training=None, embed=made_up.embed, subject_words={}, bootstrap=100)
    policies = {name: name for name in ("student", "teacher")}
    document = made_up.document(("image_search",), policies, judges={}, **dict(measured))
    files = report.write_report(EvaluationPaths(str(tmp_path / "evaluation")), outputs, document)
    text = storage.read_bytes(files["report.md"]).decode()
    assert "A student of plain fine-tuning takes no commands." in text
    assert "open       mean achieved words rises with commanded words, on every task: -" in report.verdict_lines(document)
    assert not [name for name in files if "control" in name]


def test_intents_of_another_source_can_be_evaluated(tmp_path: Path) -> None:
    (tmp_path / "requests.tsv").write_text("category\tprompt\nred\ta red bench\nred\ta green car\n")
    source = str(tmp_path / "requests.tsv")
    by_intents = make_recipe(tmp_path, intents={"source": source, "column": "prompt"})
    by_evaluate = make_recipe(tmp_path, evaluate={"source": source, "column": "prompt", "intents": 1})
    storage.write_bytes(storage.join(by_intents.storage, "recipe.yaml"), b"intents: {source: 'builtin:composer'}")
    intents, origin = select_intents(by_intents)
    assert [intent.text for intent in intents] == ["a red bench", "a green car"]
    assert origin == source
    assert [intent.text for intent in select_intents(by_evaluate)[0]] == ["a red bench"]


def test_a_long_source_is_sampled_uniformly_and_in_its_order() -> None:
    lines = [str(i) for i in range(100)]
    samples = [sample_stream(iter(lines), 10, seed) for seed in range(300)]
    assert all(len(set(sample)) == 10 and [int(x) for x in sample] == sorted(map(int, sample)) for sample in samples)
    counts = np.bincount(np.array(samples, dtype=int).ravel(), minlength=100)
    assert 10 < counts.min() <= counts.max() < 55  # 30 expected; 5 is the standard deviation
    assert sample_stream(iter(lines[:3]), 10, 0) == ["0", "1", "2"]


@pytest.mark.parametrize("name", ["ablation-sft", "ablation-sft-top", "rounds"])
def test_the_ablations_differ_from_quickstart_only_in_their_subject(name: str) -> None:
    ours, base = (command_line.load(str(ROOT / "recipes" / f"{n}.yaml")).model_dump() for n in (name, "quickstart"))
    changed = {key for key in ours if ours[key] != base[key]}
    assert changed == {"name", "storage", *({"rounds", "explore"} if name == "rounds" else {"episodes_from", "train"})}
    tuned = {key for key in ours["train"] if ours["train"][key] != base["train"][key]}
    assert tuned == (set() if name == "rounds" else {"objective"})  # the same steps and settings


def test_a_pipeline_on_the_episodes_of_another_run_generates_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.pipeline", "recipes/ablation-sft.yaml", f"storage={tmp_path}/a"]
    done = subprocess.run(
        [*command, f"episodes_from={tmp_path}/b"], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert done.stdout == f"generate: skipped; the episodes are those of {tmp_path}/b\n"
    assert done.returncode == 2
    assert f"{tmp_path}/b: no finished generate stage" in done.stderr
