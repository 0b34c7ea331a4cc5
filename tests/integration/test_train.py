"""Train a tiny GPT-2 with Ray Train and DeepSpeed. Kills are in ``test_train_kill.py``."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from udrl import storage, tokenizer
from udrl.commands import Command, CommandVocabulary
from udrl.errors import UserError
from udrl.recipe import Recipe
from udrl.run import GenerateSummary, PackedDataSummary, Run, TrainingSummary
from udrl.train import stage

pytestmark = pytest.mark.usefixtures("local_ray")


def recipe(run: str, **more: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "tiny",
        "storage": run,
        "resume": "if_possible",
        "tasks": ["text_to_image", "image_search"],
        "intents": {"limit": 10},
        "student": {"depth": 2, "width": 128, "vocab_size": 500, "context": 64, **more.pop("student", {})},
        "train": {"epochs": 2, "batch_tokens": 512, "checkpoint_every": 10, **more.pop("train", {})},
        "evaluate": {"lengths": [6, 10]},
    }
    return Recipe.model_validate(values | more)


def train(run: str, **values: Any) -> TrainingSummary:
    return stage.run(recipe(run, **values)).training


def test_a_student_loads_in_plain_transformers_and_is_not_trained_twice(
    run_with_episodes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    summary = train(run_with_episodes)
    folder = Run(run_with_episodes).student.folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    student_tokenizer, vocabulary = tokenizer.load_tokenizer(folder), CommandVocabulary.load(folder)
    assert model.config.vocab_size == len(student_tokenizer)
    assert set(vocabulary.tasks) == {"text_to_image", "image_search"}
    ids = tokenizer.encode_request(
        student_tokenizer, vocabulary, "poster of an owl", Command(task="image_search", words=5, reward=4)
    )
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)
    assert out.shape[1] <= len(ids) + 5
    assert {"length_error", "coverage", "reward", "reward/image_search"} <= set(summary.validation)
    losses = [loss for _, loss in summary.history]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5  # it learns
    assert summary.parameters == sum(p.numel() for p in model.parameters())

    assert train(run_with_episodes) == summary
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(UserError, match="other settings"):
        train(run_with_episodes, train={"epochs": 3}, resume="always")


def test_two_workers_under_zero_3_have_the_losses_of_one_worker(run_with_episodes: str) -> None:
    """The kill tests use ZeRO 1 on two workers, the memory part of the benchmark 0 and 2."""
    settings = {"precision": "fp32", "checkpoint_every": 10, "epochs": 3, "row_tokens": 96}
    student = {"vocabulary": "teacher"}
    one = train(run_with_episodes, train=settings, student=student)
    packed = Run(run_with_episodes).packed_data(one.fingerprint)
    assert PackedDataSummary.load(packed.summary).context == 96
    assert storage.exists(packed.embeddings)
    two_workers = {"workers": 2, "zero_stage": 3, "micro_batch_rows": 3}  # three rows, then one: uneven accumulation
    two = train(run_with_episodes, train=settings | two_workers, student=student)
    assert two.parameters == one.parameters
    assert two.workers == 2
    assert [step for step, _ in one.history] == [step for step, _ in two.history]
    for (_, a), (_, b) in zip(one.history, two.history, strict=True):
        assert a == pytest.approx(b, rel=2e-3)


def test_a_bf16_training_resumes_on_another_number_of_workers(run_with_episodes: str) -> None:
    """Its gradients are summed in fp32, by another optimizer of DeepSpeed than those of the kill tests."""
    settings = {"micro_batch_rows": 1, "checkpoint_every": 8, "keep_checkpoints": 9, "sample_intents": 0}
    whole = train(run_with_episodes, train=settings)
    assert whole.deepspeed["data_types"] == {"grad_accum_dtype": "fp32"}
    (checkpoints,) = (Path(run_with_episodes) / "checkpoints").iterdir()
    for folder in [Path(run_with_episodes) / "student", *checkpoints.glob("step-*")]:
        if folder.name != "step-00000008":
            shutil.rmtree(folder)
    resumed = train(run_with_episodes, train=settings | {"workers": 2})
    assert (resumed.resumed_at, resumed.workers) == (8, 2)
    for (_, a), (_, b) in zip(whole.history, resumed.history, strict=True):
        assert a == pytest.approx(b, rel=5e-3)


def test_a_run_without_episodes_is_a_user_error(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    GenerateSummary(ledger="x", scoring="x", accepted=0).save(Run(run).generate_summary)
    with pytest.raises(UserError, match="no episodes"):
        train(run)
