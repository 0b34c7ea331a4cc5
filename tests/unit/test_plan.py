"""The plan of a training, DeepSpeed's configuration, checkpoints, and the documents that a training leaves."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from udrl import storage
from udrl.errors import UserError
from udrl.recipe import Student, Train
from udrl.run import TrainingSummary
from udrl.train import checkpoint
from udrl.train.gpt2 import Shape
from udrl.train.progress_actor import TrainingProgress
from udrl.train.schedule import TrainingPlan, deepspeed_config, rows_of_step


def plan(workers: int = 1, rows: int = 100, budget: int = 100, **train: Any) -> TrainingPlan:
    return TrainingPlan.of(Student(context=64), Train(**({"batch_tokens": 640, "epochs": 2} | train)), rows, budget, workers)


def test_depth_sets_the_batch_size_unless_the_recipe_does() -> None:
    assert Shape.of(Student(depth=6), Train()).batch_tokens == 2048
    assert Shape.of(Student(depth=12), Train()).batch_tokens == 32768
    assert Shape.of(Student(depth=1), Train()).batch_tokens == 1024
    assert Shape.of(Student(depth=12), Train(batch_tokens=640)).batch_tokens == 640


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("micro_batch_rows", [None, 1, 2])
def test_any_number_of_workers_trains_on_every_row_of_a_step_once(workers: int, micro_batch_rows: int | None) -> None:
    p = plan(workers, micro_batch_rows=micro_batch_rows)
    assert (p.rows_per_step, p.steps) == (10, 20)
    step_rows = rows_of_step(100, p.rows_per_step, 3, 0)
    shares = [p.micro_batches(step_rows, rank, workers) for rank in range(workers)]
    assert {len(batches) for batches in shares} == {p.accumulation}, "every worker makes the same number of passes"
    assert all(len(batch) <= p.micro_batch_rows for batches in shares for batch in batches)
    assert sorted(np.concatenate([batch for batches in shares for batch in batches])) == sorted(step_rows)


def test_an_epoch_has_every_row_once() -> None:
    rows = np.concatenate([rows_of_step(25, 10, step, 0) for step in range(5)])
    assert sorted(rows[:25]) == list(range(25))
    assert sorted(rows[25:]) == list(range(25))
    assert list(rows[:25]) != list(rows[25:])


def test_an_objective_with_fewer_rows_has_the_same_number_of_steps() -> None:
    assert plan(rows=30, budget=100).steps == plan(rows=100, budget=100).steps


def test_learning_rates_of_the_cosine_and_wsd_schedules() -> None:
    cosine, wsd = plan(epochs=10, warmup=0.1), plan(epochs=10, warmup=0.1, schedule="wsd", decay=0.2, final_lr=0)
    for p in (cosine, wsd):
        assert [p.lr_factor(s) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert cosine.lr_factor(55) == pytest.approx(0.55)
    assert cosine.lr_factor(100) == pytest.approx(0.1)
    assert [wsd.lr_factor(s) for s in (10, 50, 80, 90, 100)] == pytest.approx([1, 1, 1, 0.5, 0])


def test_deepspeed_config_follows_the_recipe() -> None:
    p = plan(workers=2, micro_batch_rows=3)
    config = deepspeed_config(Train(zero_stage=2, clip=0.5), p, 2)
    assert config["train_batch_size"] == config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 2
    assert config["zero_optimization"]["stage"] == 2
    assert config["gradient_clipping"] == 0.5


def test_gradients_of_many_passes_are_summed_in_fp32() -> None:
    assert deepspeed_config(Train(), plan(), 1)["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in deepspeed_config(Train(precision="fp32"), plan(), 1)
    one_pass, five = plan(zero_stage=0), plan(zero_stage=0, micro_batch_rows=2)
    assert "data_types" not in deepspeed_config(Train(zero_stage=0), one_pass, 1)  # DeepSpeed has no such choice there
    with pytest.raises(UserError, match=r"train\.zero_stage: 0 would sum the gradients of 5 passes in bf16; use 1"):
        deepspeed_config(Train(zero_stage=0), five, 1)
    deepspeed_config(Train(zero_stage=0, precision="fp32"), five, 1)


def test_a_user_s_deepspeed_config_is_used_with_our_batch_sizes(tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    train = Train(deepspeed=str(file))
    with pytest.raises(UserError, match="no such file"):
        deepspeed_config(train, plan(), 1)
    file.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        deepspeed_config(train, plan(), 1)
    file.write_text(json.dumps({"train_batch_size": "auto", "zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}))
    config = deepspeed_config(train, plan(), 1)
    assert config["train_batch_size"] == 10
    assert "bf16" not in config
    file.write_text(json.dumps({"train_batch_size": 64}))
    with pytest.raises(UserError, match='train_batch_size is 64, but the recipe makes it 10; set it to "auto"'):
        deepspeed_config(train, plan(), 1)


def write_checkpoint(checkpoints: Path, step: int, workers: int = 2) -> Path:
    """Write a checkpoint as ``workers`` workers do."""
    target = checkpoints / checkpoint.step_folder(step)
    for rank in range(workers):
        part = checkpoints.parent / f"part-{step}-{rank}"
        (part / "state").mkdir(parents=True)
        (part / "state" / f"rank{rank}.pt").write_bytes(b"x" * 10)
        checkpoint.upload(str(part), str(target), rank, workers)
    return target


def test_a_checkpoint_with_a_missing_part_is_ignored_and_removed(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    assert checkpoint.latest(str(checkpoints)) is None
    first, second, third, fourth = (write_checkpoint(checkpoints, step) for step in (5, 10, 15, 20))
    assert checkpoint.world_size_of(str(fourth)) == 2
    (fourth / checkpoint.NOTE.format(1)).unlink()
    assert checkpoint.latest(str(checkpoints)) == str(third)
    (third / "state" / "rank1.pt").write_bytes(b"cut")
    assert checkpoint.latest(str(checkpoints)) == str(second)
    (second / "state" / "rank0.pt").unlink()
    assert checkpoint.latest(str(checkpoints)) == str(first)
    checkpoint.remove_incomplete(str(checkpoints))
    assert storage.list_folders(str(checkpoints)) == [first.name]


def test_pruning_removes_old_checkpoints_but_not_one_that_is_still_uploading(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    for step in (5, 10, 15, 20):
        write_checkpoint(checkpoints, step)
    (checkpoints / checkpoint.step_folder(20) / checkpoint.NOTE.format(0)).unlink()  # still uploading
    checkpoint.prune(str(checkpoints), 2)
    assert storage.list_folders(str(checkpoints)) == [checkpoint.step_folder(step) for step in (10, 15, 20)]


def test_only_the_best_weights_are_kept(tmp_path: Path) -> None:
    import torch

    for step, value in ((5, 1.0), (10, 2.0)):
        checkpoint.save_best(str(tmp_path), {"w": torch.full((2,), value)}, step, validation_loss=3.0)
    weights, best = checkpoint.load_best(str(tmp_path))
    assert best.step == 10
    assert weights["w"].tolist() == [2.0, 2.0]
    assert len(list((tmp_path / checkpoint.BEST).glob("*.safetensors"))) == 1


def test_the_state_in_a_checkpoint_keeps_the_keys_of_older_versions() -> None:
    facts = {"step": 12, "history": [(1, 7.0)], "best": math.inf, "seen": {"validation_loss": None, "words/paint": 5.0}}
    state = checkpoint.TrainingState.model_validate(facts)
    assert (state.step, state.best_validation_loss, state.validation["words/paint"]) == (12, math.inf, 5.0)
    assert state.model_dump(by_alias=True) == facts


def test_summaries_of_older_students_load(tmp_path: Path) -> None:
    """Before 2026-11-25 the validation metrics were top-level keys; before 2026-11-23 there was no hash of the weights."""
    file = tmp_path / "training.json"
    flat = {"fingerprint": "abc", "history": [[1, 7.0]], "validation_loss": 5.5, "length_error": 14.1, "within_two/paint": 0.2}
    file.write_text(json.dumps(flat))
    summary = TrainingSummary.load(str(file))
    assert summary.validation == {"length_error": 14.1, "within_two/paint": 0.2}
    assert (summary.validation_loss, summary.history, summary.weights) == (5.5, [(1, 7.0)], "")
    summary.save(str(file))
    assert TrainingSummary.load(str(file)) == summary
    file.write_text(json.dumps({"weights": "w1"}))
    assert TrainingSummary.load(str(file)).weights == "w1"


def test_the_progress_line_shows_a_validation_once_there_is_one() -> None:
    progress = TrainingProgress(steps=20, resumed_at=0, step=10, loss=2.5, tokens_per_second=1234, mfu=0.131)
    assert progress.describe() == "loss 2.500, 1,234 tokens/s, MFU 13%"
    validated = dataclasses.replace(progress, validation_loss=2.75, length_error=1.25)
    assert validated.describe() == "loss 2.500 (validation 2.750, 1.2 words off), 1,234 tokens/s, MFU 13%"
