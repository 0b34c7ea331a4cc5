"""``python -m benchmarks.bare_loop RECIPE DATA [--precision autocast|master|fp32]``: the same training as a plain PyTorch loop.

The baseline of ``benchmarks.training``: the train stage's model, loss, rows in the same order, batch, steps, schedule,
optimizer, clipping and threads, without Ray, DeepSpeed and checkpoints. There are two ways to train in bf16:

- ``autocast``: fp32 weights, matrix products in bf16.
- ``master``: bf16 weights and gradients, fp32 master weights in the optimizer, as DeepSpeed's bf16 does.

Prints one JSON line.
"""

import argparse
import json
import resource
import time
from typing import Any

from udrl.command_line import load
from udrl.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.bare_loop")
    parser.add_argument("recipe")
    parser.add_argument("data", help="a run's folder of packed rows")
    parser.add_argument("--precision", choices=("autocast", "master", "fp32"), default="autocast")
    arguments = parser.parse_args()
    print(json.dumps(train_by_bare_loop(load(arguments.recipe), arguments.data, arguments.precision)))


def train_by_bare_loop(recipe: Recipe, data: str, precision: str) -> dict[str, Any]:
    """Train as the recipe says; return seconds, seconds of input and loss of each step, and peak memory in MiB."""
    import torch

    from udrl import tokenizer
    from udrl.run import PackedDataPaths, PackedDataSummary
    from udrl.train import gpt2
    from udrl.train.packed_data import load_packed_rows
    from udrl.train.schedule import TrainingPlan, rows_of_step
    from udrl.train.worker import LOSS_READ_STEPS  # as rarely as the stage: reading a loss waits for the device

    device = "cuda" if recipe.train.gpus_per_worker else "cpu"
    if device == "cpu" and recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    paths = PackedDataPaths(data)
    rows = load_packed_rows(paths, "train")
    budget_rows = PackedDataSummary.load(paths.summary).budget_rows
    plan = TrainingPlan.of(recipe.student, recipe.train, len(rows), budget_rows, world_size=1)
    network = gpt2.build_network(recipe.student, recipe.train, tokenizer.load_tokenizer(paths.tokenizer), recipe.seed).to(
        device
    )
    if precision == "master":
        network.to(torch.bfloat16)
    weights = list(network.parameters())
    masters = [torch.nn.Parameter(p.detach().float()) for p in weights] if precision == "master" else weights
    optimizer = make_optimizer(masters, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, plan.lr_factor)
    autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "autocast")
    step_seconds: list[float] = []
    input_seconds: list[float] = []
    losses: list[float] = []
    unread_losses: list[Any] = []
    last_read = time.perf_counter()
    for step in range(plan.steps):
        step_input_seconds = 0.0
        step_rows = rows_of_step(len(rows), plan.rows_per_step, step, recipe.seed)
        target_count = int(rows.target_counts[step_rows].sum())
        loss_sum = torch.zeros((), device=device)
        for numbers in plan.micro_batches(step_rows, rank=0, world_size=1):
            input_start = time.perf_counter()
            batch = rows.take(numbers)
            inputs = [torch.from_numpy(array).to(device) for array in (batch.tokens, batch.positions, batch.targets)]
            step_input_seconds += time.perf_counter() - input_start
            with autocast:
                loss = gpt2.packed_loss(network, *inputs)
            (loss / target_count).backward()
            loss_sum += loss.detach()
        if masters is not weights:
            for master, weight in zip(masters, weights, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, recipe.train.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if masters is not weights:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)
        unread_losses.append(loss_sum / target_count)
        input_seconds.append(step_input_seconds)
        if len(unread_losses) == LOSS_READ_STEPS or step + 1 == plan.steps:
            losses += torch.stack(unread_losses).tolist()
            now = time.perf_counter()
            step_seconds += [(now - last_read) / len(unread_losses)] * len(unread_losses)
            unread_losses, last_read = [], now
    return {
        "rows_per_step": plan.rows_per_step,
        "step_seconds": step_seconds,
        "input_seconds": input_seconds,
        "losses": losses,
        "peak_rss_mib": peak_rss_mib(),
        "peak_gpu_mib": torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0,
    }


def make_optimizer(weights: list[Any], recipe: Recipe) -> Any:
    """Return the train stage's optimizer: fused AdamW, with weight decay on matrices only."""
    import torch

    from udrl.train.gpt2 import Shape

    groups = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": recipe.train.weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    lr = Shape.of(recipe.student, recipe.train).lr
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def peak_rss_mib() -> float:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
