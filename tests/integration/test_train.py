"""Training for real: Ray Train, DeepSpeed, a tiny GPT-2; killed workers, restarts, exports."""

import contextlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from episodes_made_up import fill_with_episodes

from udrl import storage
from udrl.commands import Command, Vocabulary
from udrl.errors import UserError
from udrl.recipe import Recipe
from udrl.student import checkpoint, tokenizer, train

pytestmark = pytest.mark.usefixtures("local_ray")


def recipe(run: str, **more: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "tiny",
        "storage": run,
        "resume": "if_possible",
        "tasks": ["text_to_image", "image_search"],
        "intents": {"limit": 10},
        "student": {"depth": 2, "width": 128, "vocab_size": 500, "context": 64},
        "train": {"epochs": 2, "batch_tokens": 512, "checkpoint_every": 10, **more.pop("train", {})},
        "evaluate": {"lengths": [6, 10]},
    }
    return Recipe.model_validate(values | more)


def test_an_exported_student_loads_in_plain_transformers(run_with_episodes: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    facts = train.run(recipe(run_with_episodes))
    folder = storage.join(run_with_episodes, "student")
    model = AutoModelForCausalLM.from_pretrained(folder)
    words, vocabulary = tokenizer.load(folder), Vocabulary.load(folder)
    assert model.config.vocab_size == len(words)
    assert set(vocabulary.tasks) == {"text_to_image", "image_search"}
    ids = tokenizer.encode_request(words, vocabulary, "poster of an owl", Command(task="image_search", words=5, reward=4))
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)
    assert out.shape[1] <= len(ids) + 5
    losses = [loss for _, loss in facts["history"]]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5  # it learns
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())


def test_the_same_episodes_and_settings_are_not_trained_twice(
    run_with_episodes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train.run(recipe(run_with_episodes, train={"epochs": 1}))
    again = train.run(recipe(run_with_episodes, train={"epochs": 1}))
    assert again == first
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(UserError, match="other settings"):
        train.run(recipe(run_with_episodes, train={"epochs": 3}, resume="always"))


FP32 = {"precision": "fp32", "checkpoint_every": 5, "epochs": 4, "zero_stage": 1}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One worker, nothing that goes wrong."""
    run = str(tmp_path_factory.mktemp("unbroken"))
    fill_with_episodes(run)
    return train.run(recipe(run, train=FP32))


def assert_same_losses(one: dict[str, Any], other: dict[str, Any], rel: float) -> None:
    assert [step for step, _ in one["history"]] == [step for step, _ in other["history"]]
    for (_, a), (_, b) in zip(one["history"], other["history"], strict=True):
        assert a == pytest.approx(b, rel=rel)


@pytest.mark.parametrize(("stage", "micro"), [(2, 1), (3, None)])
def test_two_workers_learn_what_one_does(
    run_with_episodes: str, unbroken: dict[str, Any], stage: int, micro: int | None
) -> None:
    more = {"workers": 2, "zero_stage": stage, "micro_batch_rows": micro}  # a row at a time: accumulation
    two = train.run(recipe(run_with_episodes, train=FP32 | more))
    assert two["parameters"] == unbroken["parameters"]
    assert two["workers"] == 2
    assert_same_losses(unbroken, two, rel=2e-3)


def test_a_killed_worker_resumes_from_the_checkpoint_with_the_same_losses(
    run_with_episodes: str, unbroken: dict[str, Any]
) -> None:
    killed: list[int] = []
    stop = threading.Event()

    def kill_one_worker() -> None:
        """End the training worker, a process below this one, once its first checkpoint is whole."""
        folder = Path(run_with_episodes) / "checkpoints"
        while not stop.wait(0.05):
            if not killed and any(checkpoint.latest(str(runs)) for runs in folder.glob("*")):
                for process in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        if "TrainWorker" in " ".join(process.cmdline()):
                            process.kill()
                            killed.append(process.pid)

    thread = threading.Thread(target=kill_one_worker)
    thread.start()
    try:
        broken = train.run(recipe(run_with_episodes, train=FP32))
    finally:
        stop.set()
        thread.join()
    assert killed
    assert broken["resumed_at"] >= 5
    assert unbroken["resumed_at"] == 0
    assert_same_losses(unbroken, broken, rel=1e-3)


def test_no_episode_is_a_user_s_error(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    storage.write_json(storage.join(run, "generate.json"), {"ledger": "x", "scoring": "x", "accepted": 0})
    with pytest.raises(UserError, match="no episodes"):
        train.run(recipe(run))
