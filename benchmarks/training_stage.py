"""``python -m benchmarks.training_stage RECIPE [--describe]``: the train stage in a process of its own.

An earlier turn's student and checkpoints are removed first; its packed rows are reused. Prints values of the student's
``training.json`` as one JSON line for ``benchmarks.training``. ``--describe`` adds statistics of the rows.
"""

import argparse
import json
import os
from typing import Any

import numpy as np

from udrl import cluster, command_line, storage
from udrl.run import PackedDataSummary, Run
from udrl.train import stage

PRINTED = {"rows_per_step", "step_seconds", "input_share", "memory", "history", "parameters"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.training_stage")
    parser.add_argument("recipe")
    parser.add_argument("--describe", action="store_true")
    arguments = parser.parse_args()
    config = command_line.load(arguments.recipe)
    run = Run(config.storage)
    for folder in (run.student.folder, run.all_checkpoints):
        storage.remove(folder)
    # One CPU more than the workers use, for Ray Data's tasks. To Ray, CPUs are a number and bind no process.
    cluster.connect(num_cpus=max(cluster.cpu_count(), int(config.train.workers * config.train.cpus_per_worker) + 1))
    result = stage.run(config).training.model_dump(mode="json", include=PRINTED)
    if arguments.describe:
        result |= describe_rows(config.storage)
    print(json.dumps(result))


def describe_rows(run: str) -> dict[str, Any]:
    """Return the folder of a local run's newest packed rows, and statistics of their tokens and examples."""
    from udrl import tokenizer
    from udrl.train.packed_data import load_packed_rows

    paths = max(map(Run(run).packed_data, os.listdir(f"{run}/student_data")), key=lambda p: os.path.getmtime(p.folder))
    rows = load_packed_rows(paths, "train")
    pad = tokenizer.load_tokenizer(paths.tokenizer).pad_token_id
    slots = tokens = targets = examples = squares = 0
    for first in range(0, len(rows), 1024):
        batch = rows.take(np.arange(first, min(first + 1024, len(rows))))
        real = np.asarray(batch.tokens) != pad
        slots += real.size
        tokens += int(real.sum())
        targets += int(np.asarray(batch.targets).sum())
        # The positions 0..n-1 of an example of n tokens add up to (n^2 - n) / 2.
        squares += int((2 * np.asarray(batch.positions, dtype=np.int64) + 1)[real].sum())
        examples += int((real & (np.asarray(batch.positions) == 0)).sum())
    return {
        "data": paths.folder,
        "rows": len(rows),
        "budget_rows": PackedDataSummary.load(paths.summary).budget_rows,
        "examples": examples,
        "padding": 1 - tokens / slots,
        "mean_tokens": tokens / examples,
        "example_length": squares / tokens,  # mean length of the example that a token belongs to
        "target_share": targets / tokens,
    }


if __name__ == "__main__":
    main()
