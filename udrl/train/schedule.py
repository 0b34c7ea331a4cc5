"""What a training does, known before it starts: steps, rows of each step, learning rate, DeepSpeed's settings.

Nothing here depends on the number of workers but how a step's rows are dealt out, so a run may lose or gain workers.
"""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from udrl import storage
from udrl.errors import UserError
from udrl.recipe import Student, Train
from udrl.train.gpt2 import Shape

# What DeepSpeed's settings must agree on with the rows that are dealt out; "auto" or absence in a user's JSON takes ours.
SIZES = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")


@dataclass(frozen=True)
class Plan:
    """``rows`` of each of ``steps`` optimizer steps; a worker takes ``accumulation`` passes of ``micro`` rows."""

    steps: int
    rows: int
    micro: int
    accumulation: int
    warmup: int
    decay: int
    schedule: str
    final_lr: float

    @classmethod
    def of(cls, student: Student, train: Train, n_rows: int, budget_rows: int, world: int) -> "Plan":
        """Plan for ``n_rows`` packed rows of ``student.context`` tokens. ``budget_rows`` (what the objective "udrl" would have
        packed) gives the steps, so that objectives are compared at equal budget."""
        rows = max(1, min(Shape.of(student, train).batch_tokens // student.context, n_rows))
        share = math.ceil(rows / world)
        micro = min(train.micro_batch_rows or share, share)
        steps = max(1, math.ceil(train.epochs * budget_rows / rows))
        return cls(
            steps=steps,
            rows=rows,
            micro=micro,
            accumulation=math.ceil(share / micro),
            warmup=math.ceil(train.warmup * steps),
            decay=math.ceil(train.decay * steps),
            schedule=train.schedule,
            final_lr=train.final_lr,
        )

    def lr_factor(self, step: int) -> float:
        """Share of the peak learning rate at ``step``: linear warm-up, then a cosine down to ``final_lr``; or, for "wsd"
        (arXiv 2404.06395), stable until a linear decay over the last ``decay`` steps."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "wsd":
            left = min(1.0, max(0, self.steps - step) / self.decay)
            return self.final_lr + (1 - self.final_lr) * left
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def share_of(self, chosen: np.ndarray, rank: int, world: int) -> list[np.ndarray]:
        """The rows of one worker, as ``accumulation`` arrays of at most ``micro`` row numbers. Where rows do not divide
        evenly, some are shorter, or empty: every worker makes as many passes."""
        mine = chosen[rank::world]
        return [mine[i * self.micro : (i + 1) * self.micro] for i in range(self.accumulation)]


def batch_rows(n_rows: int, size: int, step: int, seed: int) -> np.ndarray:
    """Numbers of the rows of one step, int64 of shape (size,): epochs are permutations laid end to end."""
    start = step * size
    out = np.empty(size, dtype=np.int64)
    filled = 0
    while filled < size:
        epoch, offset = divmod(start + filled, n_rows)
        take = min(size - filled, n_rows - offset)
        out[filled : filled + take] = _order(n_rows, epoch, seed)[offset : offset + take]
        filled += take
    return out


@lru_cache(maxsize=2)
def _order(n_rows: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n_rows)


def deepspeed_config(train: Train, plan: Plan, world: int) -> dict[str, Any]:
    """DeepSpeed's JSON: made from the recipe, or the user's own (``train.deepspeed``) with the batch's sizes filled in.

    Raises:
        UserError: the user's file can't be read, or its sizes contradict the recipe.
    """
    # Copying gradients into one buffer spares a GPU's memory from fragments; on a CPU it is a twelfth of the step.
    tuned = {} if train.gpus_per_worker or train.zero_stage == 3 else {"contiguous_gradients": False}
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.micro,
        "gradient_accumulation_steps": plan.accumulation,
        "train_batch_size": plan.micro * plan.accumulation * world,
        "gradient_clipping": train.clip,
        # The loop looks at the loss itself; looking at every gradient costs a fiftieth of a step.
        "bf16": {"enabled": train.precision == "bf16", "check_grad_overflow": False},
        "zero_optimization": {"stage": train.zero_stage, **tuned},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if not train.deepspeed:
        return ours
    theirs = read_deepspeed(train.deepspeed)
    for name in SIZES:
        if theirs.get(name, "auto") == "auto":
            theirs[name] = ours[name]
        elif theirs[name] != ours[name]:
            raise UserError(
                f'{train.deepspeed}: {name} is {theirs[name]}, the recipe makes it {ours[name]}; set it to "auto", or change'
                " train.batch_tokens, train.micro_batch_rows or train.clip"
            )
    return {name: ours[name] for name in ("zero_allow_untested_optimizer", "steps_per_print")} | theirs


def read_deepspeed(uri: str) -> dict[str, Any]:
    """A user's DeepSpeed JSON.

    Raises:
        UserError: it is absent, or no JSON object.
    """
    if not storage.exists(uri):
        raise UserError(f"train.deepspeed: {uri} is not there")
    try:
        values = storage.read_json(uri)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"train.deepspeed: {uri} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"train.deepspeed: {uri} holds {type(values).__name__}, not an object of DeepSpeed's settings")
    return values
