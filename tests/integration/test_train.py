"""Training for real: Ray Train, DeepSpeed, a tiny GPT-2; killed workers, restarts, exports."""

import contextlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from udrl import storage
from udrl.commands import Command, Vocabulary
from udrl.errors import UserError
from udrl.recipe import Recipe
from udrl.student import dataset, tokenizer, train

pytestmark = pytest.mark.usefixtures("local_ray")


def recipe(run: str, **more: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "tiny",
        "storage": run,
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


@pytest.mark.parametrize(("stage", "micro"), [(1, None), (2, 2), (3, None)])
def test_two_workers_learn_what_one_does(run_with_episodes: str, stage: int, micro: int | None) -> None:
    one = train.run(recipe(run_with_episodes, train={"precision": "fp32", "zero_stage": 0}))
    more = {"workers": 2, "zero_stage": stage, "micro_batch_rows": micro}  # 2 rows at a time: accumulation
    two = train.run(recipe(run_with_episodes, train={"precision": "fp32", **more}))
    assert two["parameters"] == one["parameters"]
    assert two["workers"] == 2
    assert len(one["history"]) == len(two["history"])
    # The rows of a step do not depend on the worker count, so neither do the losses.
    for (_, a), (_, b) in zip(one["history"], two["history"], strict=True):
        assert a == pytest.approx(b, rel=2e-3)


def test_a_killed_worker_resumes_from_the_checkpoint_with_the_same_losses(run_with_episodes: str, tmp_path: Path) -> None:
    settings = {"precision": "fp32", "checkpoint_every": 5, "epochs": 4}
    whole = train.run(recipe(run_with_episodes, train=settings))
    killed: list[int] = []
    stop = threading.Event()

    def kill_one_worker() -> None:
        """End the training worker, a process below this one, once Ray Train has noted its first checkpoint as stored: the
        folder alone is there while the upload still goes on."""
        checkpoints = Path(run_with_episodes) / "checkpoints"
        while not stop.wait(0.05):
            notes = [note.read_text() for note in checkpoints.glob("*/checkpoint_manager_snapshot.json")]
            if any("checkpoint_dir_name" in note for note in notes) and not killed:
                for process in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        if "TrainWorker" in " ".join(process.cmdline()):
                            process.kill()
                            killed.append(process.pid)

    # The first run's checkpoints must not be what sets off the kill, nor what is resumed from.
    storage.remove(storage.join(run_with_episodes, "checkpoints"))
    thread = threading.Thread(target=kill_one_worker)
    thread.start()
    try:
        broken = train.run(recipe(run_with_episodes, train=settings, resume="never"))
    finally:
        stop.set()
        thread.join()
    assert killed
    assert broken["resumed_at"] >= 5
    assert whole["resumed_at"] == 0
    assert [s for s, _ in broken["history"]] == [s for s, _ in whole["history"]]
    for (_, a), (_, b) in zip(whole["history"], broken["history"], strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_packed_rows_do_not_depend_on_the_run(run_with_episodes: str, tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        out = str(tmp_path / name)
        dataset.prepare(
            recipe(run_with_episodes, train={"swapped_copies": 1}),
            storage.join(run_with_episodes, "episodes"),
            out,
            ["text_to_image", "image_search"],
        )
        made.append(dataset.load_rows(out, "train"))
    assert np.array_equal(made[0].tokens, made[1].tokens)
    assert np.array_equal(made[0].targets, made[1].targets)


def test_no_episode_is_a_user_s_error(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    storage.write_json(storage.join(run, "generate.json"), {"ledger": "x", "scoring": "x", "accepted": 0})
    with pytest.raises(UserError, match="no episodes"):
        train.run(recipe(run))
