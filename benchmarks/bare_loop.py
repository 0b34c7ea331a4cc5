"""``python -m benchmarks.bare_loop RECIPE DATA [--precision autocast|master|fp32]``: the same training as a plain PyTorch loop.

The yardstick of ``benchmarks.training``: the train stage's own model, loss, rows in its order, batch, steps, schedule,
optimizer, clipping and threads, and nothing around them: no Ray, no DeepSpeed, no checkpoints. Two ways to train in bf16
stand beside each other:

- ``autocast``: fp32 weights, matrix products in bf16.
- ``master``: bf16 weights and gradients, fp32 master weights in the optimizer, which is what DeepSpeed's bf16 does.

Prints one JSON line.
"""

import argparse
import json
import resource
import time
from typing import Any

from udrl import command_line
from udrl.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.bare_loop")
    parser.add_argument("recipe")
    parser.add_argument("data", help="a run's folder of packed rows")
    parser.add_argument("--precision", choices=("autocast", "master", "fp32"), default="autocast")
    arguments = parser.parse_args()
    print(json.dumps(train(command_line.load(arguments.recipe), arguments.data, arguments.precision)))


def train(recipe: Recipe, data: str, precision: str) -> dict[str, Any]:
    """Train as the recipe says; return seconds, seconds of input and loss of each step, and peak memory in MiB."""
    import torch

    from udrl import tokenizer
    from udrl.run import PackedDataPaths, PackedDataSummary
    from udrl.train import gpt2 as model
    from udrl.train.packed_data import load_packed_rows
    from udrl.train.schedule import Plan, batch_rows
    from udrl.train.worker import TOLD_EVERY  # as seldom as the stage, since reading a loss waits for the device

    device = "cuda" if recipe.train.gpus_per_worker else "cpu"
    if device == "cpu" and recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    paths = PackedDataPaths(data)
    rows, summary = load_packed_rows(paths, "train"), PackedDataSummary.load(paths.summary)
    plan = Plan.of(recipe.student, recipe.train, len(rows), summary.budget_rows, 1)
    network = model.build(recipe.student, recipe.train, tokenizer.load(f"{data}/tokenizer"), recipe.seed).to(device)
    if precision == "master":
        network.to(torch.bfloat16)
    weights = list(network.parameters())
    masters = [torch.nn.Parameter(p.detach().float()) for p in weights] if precision == "master" else weights
    optimizer = optimizer_of(masters, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, plan.lr_factor)
    cast = torch.autocast(device, torch.bfloat16, enabled=precision == "autocast")
    step_seconds: list[float] = []
    input_seconds: list[float] = []
    losses: list[float] = []
    waiting: list[Any] = []
    begun = time.perf_counter()
    for step in range(plan.steps):
        waited = 0.0
        chosen = batch_rows(len(rows), plan.rows, step, recipe.seed)
        total = int(rows.target_counts[chosen].sum())
        summed = torch.zeros((), device=device)
        for part in plan.share_of(chosen, 0, 1):
            asked = time.perf_counter()
            batch = rows.take(part)
            inputs = [torch.from_numpy(array).to(device) for array in (batch.tokens, batch.positions, batch.targets)]
            waited += time.perf_counter() - asked
            with cast:
                loss = model.packed_loss(network, *inputs)
            (loss / total).backward()
            summed += loss.detach()
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
        waiting.append(summed / total)
        input_seconds.append(waited)
        if len(waiting) == TOLD_EVERY or step + 1 == plan.steps:
            losses += torch.stack(waiting).tolist()
            now = time.perf_counter()
            step_seconds += [(now - begun) / len(waiting)] * len(waiting)
            waiting, begun = [], now
    return {
        "rows_per_step": plan.rows,
        "step_seconds": step_seconds,
        "input_seconds": input_seconds,
        "losses": losses,
        "peak_rss_mib": peak_rss_mib(),
        "peak_gpu_mib": torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0,
    }


def optimizer_of(weights: list[Any], recipe: Recipe) -> Any:
    """The train stage's optimizer: fused AdamW, weight decay on matrices alone."""
    import torch

    from udrl.train.gpt2 import Shape

    groups = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": recipe.train.weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    lr = Shape.of(recipe.student, recipe.train).lr
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def peak_rss_mib() -> float:
    """Of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
