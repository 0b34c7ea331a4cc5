"""The plan of a training, known before it starts: steps, rows of each step, learning rate, DeepSpeed's configuration.

Only the division of a step's rows among workers depends on their number, so a training may lose or gain workers.
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

# DeepSpeed's settings that must agree with the rows that workers get. A user's JSON may leave them out or say "auto".
BATCH_SETTINGS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")

# Passes of one step whose gradients may be summed in bf16: it has 8 bits, of which a sum of n terms loses the last log2(n).
MAX_BF16_PASSES = 4


@dataclass(frozen=True)
class TrainingPlan:
    """Optimizer steps, their rows, and the learning rate of each.

    A worker trains on its share of a step's rows in ``accumulation`` micro-batches of at most ``micro_batch_rows``.
    ``warmup`` and ``decay`` are steps; ``final_lr`` is a share of the peak learning rate.
    """

    steps: int
    rows_per_step: int
    micro_batch_rows: int
    accumulation: int
    warmup: int
    decay: int
    schedule: str
    final_lr: float

    @classmethod
    def of(cls, student: Student, train: Train, n_rows: int, budget_rows: int, world_size: int) -> "TrainingPlan":
        """Plan a training on ``n_rows`` packed rows of ``train.row_tokens`` tokens.

        ``budget_rows`` (the packed rows of objective "udrl") gives the steps, so that all objectives have an equal budget.
        """
        rows_per_step = max(1, min(Shape.of(student, train).batch_tokens // (train.row_tokens or student.context), n_rows))
        rows_per_worker = math.ceil(rows_per_step / world_size)
        micro_batch_rows = min(train.micro_batch_rows or rows_per_worker, rows_per_worker)
        steps = max(1, math.ceil(train.epochs * budget_rows / rows_per_step))
        return cls(
            steps=steps,
            rows_per_step=rows_per_step,
            micro_batch_rows=micro_batch_rows,
            accumulation=math.ceil(rows_per_worker / micro_batch_rows),
            warmup=math.ceil(train.warmup * steps),
            decay=math.ceil(train.decay * steps),
            schedule=train.schedule,
            final_lr=train.final_lr,
        )

    def lr_factor(self, step: int) -> float:
        """Return the learning rate at ``step`` as a share of its peak.

        Linear warm-up, then a cosine down to ``final_lr``. For "wsd" (arXiv 2404.06395) it is constant after the warm-up, and
        decays linearly over the last ``decay`` steps.
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "wsd":
            remaining = min(1.0, max(0, self.steps - step) / self.decay)
            return self.final_lr + (1 - self.final_lr) * remaining
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def micro_batches(self, step_rows: np.ndarray, rank: int, world_size: int) -> list[np.ndarray]:
        """Return the row numbers of one worker's micro-batches.

        Every worker has ``accumulation`` of them. If the rows do not divide evenly, some are shorter or empty.
        """
        rows, size = step_rows[rank::world_size], self.micro_batch_rows
        return [rows[i * size : (i + 1) * size] for i in range(self.accumulation)]


def rows_of_step(n_rows: int, size: int, step: int, seed: int) -> np.ndarray:
    """Return the row numbers of one step, int64 of shape (size,): a slice of concatenated permutations, one per epoch."""
    start = step * size
    numbers = np.empty(size, dtype=np.int64)
    filled = 0
    while filled < size:
        epoch, offset = divmod(start + filled, n_rows)
        n = min(size - filled, n_rows - offset)
        numbers[filled : filled + n] = _permutation(n_rows, epoch, seed)[offset : offset + n]
        filled += n
    return numbers


@lru_cache(maxsize=2)
def _permutation(n_rows: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n_rows)


def deepspeed_config(train: Train, plan: TrainingPlan, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration: from the recipe, or the user's own file with the batch sizes filled in.

    Raises:
        UserError: the user's file can't be read, or its sizes contradict the recipe; or many gradients would be summed in bf16.
    """
    in_bf16 = train.precision == "bf16"
    if in_bf16 and not train.zero_stage and not train.deepspeed and plan.accumulation > MAX_BF16_PASSES:
        raise UserError(
            f"train.zero_stage: 0 would sum the gradients of {plan.accumulation} passes in bf16; use 1, which sums in fp32, or"
            " raise train.micro_batch_rows"
        )
    # One contiguous gradient buffer avoids fragmentation of GPU memory; on a CPU it costs a twelfth of the step time.
    tuning = {} if train.gpus_per_worker or train.zero_stage == 3 else {"contiguous_gradients": False}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.micro_batch_rows,
        "gradient_accumulation_steps": plan.accumulation,
        "train_batch_size": plan.micro_batch_rows * plan.accumulation * world_size,
        "gradient_clipping": train.clip,
        # The loop checks the loss; checking every gradient as well costs 2% of a step.
        "bf16": {"enabled": in_bf16, "check_grad_overflow": False},
        # For any number of passes, because a checkpoint of other sums could not be resumed. Stage 0 has no such choice.
        **({"data_types": {"grad_accum_dtype": "fp32"}} if in_bf16 and train.zero_stage else {}),
        "zero_optimization": {"stage": train.zero_stage, **tuning},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if not train.deepspeed:
        return config
    user_config = read_deepspeed_config(train.deepspeed)
    for name in BATCH_SETTINGS:
        if user_config.get(name, "auto") == "auto":
            user_config[name] = config[name]
        elif user_config[name] != config[name]:
            raise UserError(
                f'{train.deepspeed}: {name} is {user_config[name]}, but the recipe makes it {config[name]}; set it to "auto",'
                " or change train.batch_tokens, train.micro_batch_rows or train.clip"
            )
    return {name: config[name] for name in ("zero_allow_untested_optimizer", "steps_per_print")} | user_config


def read_deepspeed_config(uri: str) -> dict[str, Any]:
    """Return the user's DeepSpeed configuration.

    Raises:
        UserError: the file is absent or not a JSON object.
    """
    if not storage.exists(uri):
        raise UserError(f"train.deepspeed: no such file ({uri}); give the path or URI of a DeepSpeed JSON file")
    try:
        config = storage.read_json(uri)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"train.deepspeed: {uri} is not JSON ({error}); correct the file") from error
    if not isinstance(config, dict):
        raise UserError(f"train.deepspeed: {uri} holds a {type(config).__name__}; write an object of DeepSpeed's settings")
    return config
