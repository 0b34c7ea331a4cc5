"""The command line: quick to answer, and one clear line with exit code 2 for what the user can mend."""

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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
    assert done.stdout.strip().endswith("[]")
    assert time.monotonic() - begun < 10  # a second where nothing else runs; this bound only catches a heavy import


def bad_file(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.parametrize(
    ("arguments", "named"),
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
def test_a_user_s_mistake_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], named: str) -> None:
    bad_file(tmp_path, "empty.jsonl", "")
    bad_file(tmp_path, "other.csv", "text\nan owl\n")
    bad_file(tmp_path, "task.yaml", "name: Sing!\ntitle: x\n")
    run = tmp_path / "run"
    given = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    done = job("generate", SMOKE, f"storage={run}", *given)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert any(named in line for line in lines)
    assert "Traceback" not in done.stderr
    assert not [p for p in run.rglob("*") if p.is_file()]  # nothing half-written


def test_a_missing_recipe_is_named() -> None:
    done = job("train", "recipes/absent.yaml")
    assert done.returncode == 2
    assert "recipes/absent.yaml" in done.stderr


@pytest.mark.parametrize(("name", "first"), [("train", "jobs.generate"), ("evaluate", "jobs.train")])
def test_a_stage_names_the_stage_it_needs(tmp_path: Path, name: str, first: str) -> None:
    done = job(name, SMOKE, f"storage={tmp_path / 'run'}")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert first in done.stderr
