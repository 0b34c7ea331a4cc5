"""``python -m benchmarks.training_stage RECIPE [--describe]``: the train stage in a process of its own.

What an earlier turn left of student and checkpoints is removed first; packed rows of the same data stay. Prints what the
student's ``training.json`` says, as one JSON line; ``benchmarks.training`` reads it. ``--describe`` adds facts of the rows.
"""

import argparse
import glob
import json
import os
from typing import Any

import numpy as np

from udrl import cluster, command_line, storage
from udrl.train import fit as train

WANTED = (
    "steps",
    "rows_per_step",
    "seconds",
    "tokens_per_second",
    "step_seconds",
    "input_share",
    "memory",
    "history",
    "parameters",
    "deepspeed",
    "workers",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.training_stage")
    parser.add_argument("recipe")
    parser.add_argument("--describe", action="store_true")
    arguments = parser.parse_args()
    config = command_line.load(arguments.recipe)
    for name in ("student", "checkpoints"):
        storage.remove(storage.join(config.storage, name))
    # One core more than the workers take, for Ray Data's tasks; cores are numbers to Ray and bind no process.
    cluster.connect(num_cpus=max(cluster.cpu_count(), int(config.train.workers * config.train.cpus_per_worker) + 1))
    found = {name: value for name, value in train.run(config).model_dump().items() if name in WANTED}
    if arguments.describe:
        found |= describe(config.storage)
    print(json.dumps(found))


def describe(run: str) -> dict[str, Any]:
    """Where the newest packed rows of a local run lie, how many, their real tokens, and how many of them carry loss."""
    from udrl import tokenizer
    from udrl.run import PackedDataPaths, PackedDataSummary
    from udrl.train.packed_data import load_packed_rows

    made = [os.path.dirname(path) for path in glob.glob(f"{run}/student_data/*/tokenizer")]
    data = max(made, key=os.path.getmtime)
    paths = PackedDataPaths(data)
    rows = load_packed_rows(paths, "train")
    pad = tokenizer.load(f"{data}/tokenizer").pad_token_id
    slots = tokens = targets = examples = squares = 0
    for first in range(0, len(rows), 1024):
        batch = rows.take(np.arange(first, min(first + 1024, len(rows))))
        real = np.asarray(batch.tokens) != pad
        slots += real.size
        tokens += int(real.sum())
        targets += int(np.asarray(batch.targets).sum())
        # An example of n tokens has positions 0..n-1, which add up to (n^2 - n) / 2.
        squares += int((2 * np.asarray(batch.positions, dtype=np.int64) + 1)[real].sum())
        examples += int((real & (np.asarray(batch.positions) == 0)).sum())
    return {
        "data": data,
        "rows": len(rows),
        "budget_rows": PackedDataSummary.load(paths.summary).budget_rows,
        "examples": examples,
        "padding": 1 - tokens / slots,
        "mean_tokens": tokens / examples,
        "example_length": squares / tokens,  # of the example that a token stands in, on average
        "target_share": targets / tokens,
    }


if __name__ == "__main__":
    main()
