"""The whole line on `recipes/smoke.yaml`: the jobs as a user runs them, and as `ray job submit` does."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run's folder and what `python -m jobs.pipeline` printed."""
    folder = tmp_path_factory.mktemp("smoke") / "run"
    command = [sys.executable, "-m", "jobs.pipeline", "recipes/smoke.yaml", f"storage={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done.stdout + done.stderr


def test_every_stage_shows_its_progress_and_the_table_ends_it(run: tuple[Path, str]) -> None:
    folder, said = run
    for words in ("generate: ", "score: ", "train: ", "evaluate student: ", "evaluate teacher: ", "episodes/s", " left"):
        assert words in said
    assert re.search(r"^task +.*scorer +subject +clean +within2 +rejected$", said, re.MULTILINE)
    assert re.search(r"^image_search ", said, re.MULTILINE)
    assert f"report: {folder}/evaluation/report.md" in said
    assert "python -m serve.app recipes/smoke.yaml" in said


def test_the_run_is_complete(run: tuple[Path, str]) -> None:
    folder, _ = run
    generated = json.loads((folder / "generate.json").read_text())
    assert generated["accepted"] + generated["rejected"] == generated["requested"]
    for name in ("model.safetensors", "tokenizer.json", "commands.json", "training.json", "config.json"):
        assert (folder / "student" / name).exists()
    for name in ("report.html", "report.md", "metrics.json", "outputs.parquet", "length_control.png"):
        assert (folder / "evaluation" / name).exists()
    assert (folder / "recipe.yaml").read_text().startswith("name: smoke")


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A Ray head of this test's own, with token authentication; ended by its own process id."""

    def free_port() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    folder = Path(tempfile.mkdtemp(prefix="udrl-"))  # short: Ray's socket paths below it may have 107 characters
    (folder / "token").write_text("t" * 64)
    os.chmod(folder / "token", 0o600)
    gcs, dashboard = free_port(), free_port()
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "UDRL_CACHE": os.environ.get("UDRL_CACHE", str(ROOT / ".cache")),  # the submitted code has no checkout around it
    }
    head = subprocess.Popen(
        [BIN / "ray", "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}", "--num-cpus=2",
         "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={folder / 'ray'}"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        head.terminate()
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_job_submitted_to_a_cluster_finds_the_run_finished(
    run: tuple[Path, str], cluster: dict[str, str], tmp_path: Path
) -> None:
    folder, _ = run
    code = tmp_path / "code"  # what a user's checkout would be, without its caches
    for name in ("jobs", "udrl", "recipes"):
        shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    for attempt in range(60):
        listed = subprocess.run(
            [BIN / "ray", "job", "list"], env=cluster, capture_output=True, text=True, timeout=60, check=False
        )
        if listed.returncode == 0:
            break
        assert attempt < 59, listed.stderr[-2000:]
    for _ in range(60):
        done = subprocess.run(
            [BIN / "ray", "job", "submit", f"--working-dir={code}", "--",
             sys.executable, "-m", "jobs.pipeline", "recipes/smoke.yaml", f"storage={folder}"],
            env={**cluster, "PYTHONPATH": ""}, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        if "No available agent" not in done.stderr + done.stdout:  # the node's agent starts after the head's dashboard
            break
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert "succeeded" in said
    assert " 0 made now" in said  # generation was reused, not paid for again
    assert "is there already" in said  # so was the student
    assert "evaluate: nothing left to write" in said  # and no policy was asked again


def test_a_student_is_evaluated_on_intents_from_elsewhere_without_its_teacher(run: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = run
    (tmp_path / "requests.tsv").write_text("kind\tprompt\nred\ta red bench and a green car\nblue\ta blue clock\n")
    command = [sys.executable, "-m", "jobs.evaluate", "recipes/smoke.yaml", f"storage={folder}", "evaluate.folder=elsewhere"]
    command += [f"intents.source={tmp_path}/requests.tsv", "intents.column=prompt", "evaluate.teacher=false"]
    command += ["evaluate.judges=[]", "evaluate.latency_requests=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "prompts, about" in done.stderr  # how long it will take, before it starts
    document = json.loads((folder / "elsewhere" / "metrics.json").read_text())
    assert document["intents"] == 2
    assert set(document["policies"]) == {"student", "echo"}
    assert 0 < document["policies"]["student"]["latency_p50"] <= document["policies"]["student"]["latency_p95"]
    assert document["policies"]["student"]["memory_mib"] > 100


def test_evaluations_are_compared_and_a_drop_fails(run: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = run
    (tmp_path / "rules.yaml").write_text("- {metric: relevance, max_drop: 0}\n- {metric: rejected, max: -1}\n")
    command = [sys.executable, "-m", "jobs.compare", str(folder), str(folder), "--thresholds", f"{tmp_path}/rules.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert "FAILS: rejected (all)" in done.stdout
    assert "1 of 2 hold" in done.stdout
