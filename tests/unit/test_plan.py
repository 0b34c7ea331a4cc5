"""Steps, rows, schedules and DeepSpeed's settings, and which checkpoints count."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from udrl import storage
from udrl.errors import UserError
from udrl.recipe import Student, Train
from udrl.train import checkpoint
from udrl.train.gpt2 import Shape
from udrl.train.schedule import Plan, batch_rows, deepspeed_config


def plan(world: int = 1, rows: int = 100, budget: int = 100, **train: Any) -> Plan:
    return Plan.of(Student(context=64), Train(**({"batch_tokens": 640, "epochs": 2} | train)), rows, budget, world)


def test_the_dial_sets_the_batch_too() -> None:
    assert Shape.of(Student(depth=6), Train()).batch_tokens == 2048
    assert Shape.of(Student(depth=12), Train()).batch_tokens == 32768
    assert Shape.of(Student(depth=1), Train()).batch_tokens == 1024
    assert Shape.of(Student(depth=12), Train(batch_tokens=640)).batch_tokens == 640


@pytest.mark.parametrize("world", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("micro", [None, 1, 2])
def test_every_row_of_a_step_is_learnt_once_by_any_number_of_workers(world: int, micro: int | None) -> None:
    p = plan(world, micro_batch_rows=micro)
    assert (p.rows, p.steps) == (10, 20)
    chosen = batch_rows(100, p.rows, 3, 0)
    shares = [p.share_of(chosen, rank, world) for rank in range(world)]
    assert {len(passes) for passes in shares} == {p.accumulation}, "every worker makes as many passes"
    assert all(len(part) <= p.micro for passes in shares for part in passes)
    assert sorted(np.concatenate([part for passes in shares for part in passes])) == sorted(chosen)


def test_an_epoch_takes_every_row_once() -> None:
    taken = np.concatenate([batch_rows(25, 10, step, 0) for step in range(5)])
    assert sorted(taken[:25]) == list(range(25))
    assert sorted(taken[25:]) == list(range(25))
    assert list(taken[:25]) != list(taken[25:])


def test_objectives_on_fewer_rows_take_as_many_steps() -> None:
    assert plan(rows=30, budget=100).steps == plan(rows=100, budget=100).steps


def test_cosine_and_wsd() -> None:
    cosine, wsd = plan(epochs=10, warmup=0.1), plan(epochs=10, warmup=0.1, schedule="wsd", decay=0.2, final_lr=0)
    for p in (cosine, wsd):
        assert [p.lr_factor(s) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert cosine.lr_factor(55) == pytest.approx(0.55)
    assert cosine.lr_factor(100) == pytest.approx(0.1)
    assert [wsd.lr_factor(s) for s in (10, 50, 80, 90, 100)] == pytest.approx([1, 1, 1, 0.5, 0])


def test_deepspeed_s_settings_follow_the_recipe() -> None:
    p = plan(world=2, micro_batch_rows=3)
    made = deepspeed_config(Train(zero_stage=2, clip=0.5), p, 2)
    assert made["train_batch_size"] == made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"] * 2
    assert made["zero_optimization"]["stage"] == 2
    assert made["gradient_clipping"] == 0.5


def test_a_user_s_deepspeed_settings_take_their_place(tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    train = Train(deepspeed=str(mine))
    with pytest.raises(UserError, match="is not there"):
        deepspeed_config(train, plan(), 1)
    mine.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        deepspeed_config(train, plan(), 1)
    mine.write_text(json.dumps({"train_batch_size": "auto", "zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}))
    made = deepspeed_config(train, plan(), 1)
    assert made["train_batch_size"] == 10
    assert "bf16" not in made
    mine.write_text(json.dumps({"train_batch_size": 64}))
    with pytest.raises(UserError, match='train_batch_size is 64, the recipe makes it 10; set it to "auto"'):
        deepspeed_config(train, plan(), 1)


def written(runs: Path, step: int, world: int = 2) -> Path:
    """A checkpoint as ``world`` workers write it."""
    target = runs / checkpoint.name_of(step)
    for rank in range(world):
        part = runs.parent / f"part-{step}-{rank}"
        (part / "state").mkdir(parents=True)
        (part / "state" / f"rank{rank}.pt").write_bytes(b"x" * 10)
        checkpoint.upload(str(part), str(target), rank, world)
    return target


def test_a_checkpoint_without_all_of_its_parts_is_not_one(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert checkpoint.latest(str(runs)) is None
    first, second, third, fourth = (written(runs, step) for step in (5, 10, 15, 20))
    assert checkpoint.world_of(str(fourth)) == 2
    (fourth / checkpoint.NOTE.format(1)).unlink()
    assert checkpoint.latest(str(runs)) == str(third)
    (third / "state" / "rank1.pt").write_bytes(b"cut")
    assert checkpoint.latest(str(runs)) == str(second)
    (second / "state" / "rank0.pt").unlink()
    assert checkpoint.latest(str(runs)) == str(first)
    checkpoint.sweep(str(runs))
    assert storage.list_folders(str(runs)) == [first.name]


def test_old_checkpoints_go_and_unfinished_ones_stay(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for step in (5, 10, 15, 20):
        written(runs, step)
    (runs / checkpoint.name_of(20) / checkpoint.NOTE.format(0)).unlink()  # on its way
    checkpoint.prune(str(runs), 2)
    assert storage.list_folders(str(runs)) == [checkpoint.name_of(step) for step in (10, 15, 20)]


def test_the_best_weights_are_kept_apart(tmp_path: Path) -> None:
    import torch

    for step, value in ((5, 1.0), (10, 2.0)):
        checkpoint.save_best(str(tmp_path), {"w": torch.full((2,), value)}, {"step": step, "validation_loss": 3.0})
    weights, facts = checkpoint.load_best(str(tmp_path))
    assert facts["step"] == 10
    assert weights["w"].tolist() == [2.0, 2.0]
    assert len(list((tmp_path / checkpoint.BEST).glob("*.safetensors"))) == 1
