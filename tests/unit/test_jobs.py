"""The command line is quick, and reports a user's mistake in one clear line with exit code 2."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMOKE = str(ROOT / "recipes" / "smoke.yaml")


def job(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"jobs.{name}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, env=environment, check=False)


@pytest.mark.parametrize("name", ["generate", "train", "evaluate", "pipeline"])
def test_help_imports_nothing_heavy(name: str) -> None:
    heavy = "{'ray', 'torch', 'vllm', 'transformers', 'deepspeed'}"
    code = (
        f"import atexit, sys, jobs.{name} as job; "
        f"atexit.register(lambda: print(sorted({heavy} & set(sys.modules)))); job.main(['--help'])"
    )
    begun = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
    assert result.stdout.strip().endswith("[]")
    assert time.monotonic() - begun < 10  # seconds; about one on an idle machine, so this bound only catches a heavy import


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["intents.colum=x"], "intents.colum"),
        (["teacher.samples=none"], "teacher.samples"),
        (["tasks=[no_such_task]"], "no_such_task"),
        (["teacher.model=/nowhere/model"], "/nowhere/model"),
        (["teacher.model=bundled:nothing"], "bundled:nothing"),
        (["intents.source={tmp}/absent.jsonl"], "absent.jsonl"),
        (["intents.source={tmp}/empty.jsonl"], "empty.jsonl"),
        (["intents.source={tmp}/other.csv"], "column"),
        (["tasks=[{tmp}/task.yaml]"], "task.yaml"),
        (["storage={tmp}/other.csv/run"], "other.csv"),
    ],
)
def test_a_user_s_mistake_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], culprit: str) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "other.csv").write_text("text\nan owl\n")
    (tmp_path / "task.yaml").write_text("name: Sing!\ntitle: x\n")
    run = tmp_path / "run"
    overrides = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    result = job("generate", SMOKE, f"storage={run}", *overrides)
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert any(culprit in line for line in lines)
    assert "Traceback" not in result.stderr
    assert not [p for p in run.rglob("*") if p.is_file()]  # no partial output


def test_a_missing_recipe_is_an_error_with_its_name() -> None:
    result = job("train", "recipes/absent.yaml")
    assert result.returncode == 2
    assert "recipes/absent.yaml" in result.stderr


@pytest.mark.parametrize(("name", "first_stage"), [("train", "jobs.generate"), ("evaluate", "jobs.train")])
def test_a_stage_names_the_stage_that_must_run_first(tmp_path: Path, name: str, first_stage: str) -> None:
    result = job(name, SMOKE, f"storage={tmp_path / 'run'}")
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert first_stage in result.stderr
