"""The application that the tests of this package share."""

import json
from pathlib import Path
from typing import Any

from fakes.tiny_student import TASKS, export_tiny_student, find_free_port

from serve import app

MAX_TOKENS = 96
SETTINGS = {
    "require_keys": False,
    "redraft": {"rounds": 1},  # an untrained student hardly ever ends a prompt
    "sampling": {"max_tokens": MAX_TOKENS},
    "engine": {"max_num_seqs": 8, "eager": True},  # a queue that a test can fill
    "target_ongoing_requests": 8,
    "queue": 8,
    "max_replicas": 1,
    "placement": {"cpus": 1, "threads": 1},  # engines that run at the same time share the cores
    "limits": {"concurrent": 1000, "per_minute": 1_000_000, "prompts": 64},
}


class Deployment:
    """An application that serves one of two students, which differ in their weights."""

    def __init__(self, folder: Path) -> None:
        self.port = find_free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.students = [folder / "student-0", folder / "student-1"]
        self.revisions = [export_tiny_student(student, seed) for seed, student in enumerate(self.students)]
        self.recipe = folder / "recipe.yaml"
        text = {"name": "tiny", "storage": str(folder), "tasks": TASKS, "intents": {"limit": 9}, "serve": SETTINGS}
        self.recipe.write_text(json.dumps(text))

    def deploy(self, model: str, *overrides: str) -> None:
        """Start new engines; Ray Serve gives each deployment a new version, even if nothing has changed."""
        from ray import serve as ray_serve

        args = {"recipe": str(self.recipe), "model": model, "overrides": list(overrides)}
        ray_serve.run(app.build(args), name=app.APPLICATION_NAME)

    def n_running_engines(self) -> int:
        from ray import serve as ray_serve

        engine = ray_serve.status().applications[app.APPLICATION_NAME].deployments["StudentServer:tiny"]
        return engine.replica_states.get("RUNNING", 0)

    def engine_state(self) -> dict[str, Any]:
        state: dict[str, Any] = app.get_engine_handle("tiny").state.remote().result(timeout_s=60)
        return state
