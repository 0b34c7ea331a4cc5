"""``python -m benchmarks.hf_trainer RECIPE DATA [--grouped]``: Hugging Face's Trainer.

The second baseline of ``benchmarks.training``, on the same episodes. The packed rows are unpacked into one sequence per
example, and padded to the longest of a batch by transformers' own collator. A step has as many real tokens, on average, as a
step of the train stage. Labels are -100 on intent, command and padding; bf16 is by autocast. ``--grouped`` samples examples of
similar length together (``train_sampling_strategy="group_by_length"``). Prints one JSON line.
"""

import argparse
import json
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.bare_loop import peak_rss_mib
from udrl.command_line import load
from udrl.recipe import Recipe

IGNORED = -100


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.hf_trainer")
    parser.add_argument("recipe")
    parser.add_argument("data", help="a run's folder of packed rows")
    parser.add_argument("--grouped", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps(train_by_hf_trainer(load(arguments.recipe), arguments.data, arguments.grouped)))


def train_by_hf_trainer(recipe: Recipe, data: str, grouped: bool) -> dict[str, Any]:
    """Train the recipe's number of steps; return the seconds, real tokens and slots (with padding) of each."""
    import torch
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging

    from udrl import tokenizer
    from udrl.run import PackedDataPaths, PackedDataSummary
    from udrl.train import gpt2
    from udrl.train.packed_data import load_packed_rows
    from udrl.train.schedule import TrainingPlan

    logging.set_verbosity_error()
    on_cpu = not recipe.train.gpus_per_worker
    if on_cpu and recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    paths = PackedDataPaths(data)
    student_tokenizer = tokenizer.load_tokenizer(paths.tokenizer)
    rows = load_packed_rows(paths, "train")
    budget_rows = PackedDataSummary.load(paths.summary).budget_rows
    plan = TrainingPlan.of(recipe.student, recipe.train, len(rows), budget_rows, world_size=1)
    examples = unpack(rows, student_tokenizer.pad_token_id)
    batch_size = max(1, round(plan.rows_per_step * len(examples) / len(rows)))  # the examples of a step's rows, on average
    pad = DataCollatorForSeq2Seq(student_tokenizer, label_pad_token_id=IGNORED)
    step_tokens: list[int] = []
    step_slots: list[int] = []
    step_ends: list[float] = []

    def collate(features: list[dict[str, Any]]) -> Any:
        batch = pad(features)
        # Called in this process and in the order of the steps, at most one batch ahead of them.
        step_tokens.append(int(batch["attention_mask"].sum()))
        step_slots.append(batch["input_ids"].numel())
        return batch

    class Clock(TrainerCallback):
        """Records the end of each step; loading the next batch counts for the next step."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            step_ends.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            step_ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=plan.steps,
            per_device_train_batch_size=batch_size,
            train_sampling_strategy="group_by_length" if grouped else "random",
            use_cpu=on_cpu,
            bf16=recipe.train.precision == "bf16",
            optim="adamw_torch_fused",
            learning_rate=gpt2.Shape.of(recipe.student, recipe.train).lr,
            adam_beta1=0.9,
            adam_beta2=0.95,
            weight_decay=recipe.train.weight_decay,
            max_grad_norm=recipe.train.clip,
            lr_scheduler_type="cosine",
            warmup_steps=plan.warmup,
            seed=recipe.seed,
            # Only the training is timed.
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=not on_cpu,
        )
        network = gpt2.build_network(recipe.student, recipe.train, student_tokenizer, recipe.seed)
        trainer = Trainer(
            model=network,
            args=settings,
            train_dataset=examples,  # type: ignore[arg-type, unused-ignore]  # a list has the methods of a dataset
            data_collator=collate,
            callbacks=[Clock()],
        )
        trainer.train()
    return {
        "step_seconds": np.diff(step_ends).tolist(),
        "step_tokens": step_tokens[: plan.steps],
        "step_slots": step_slots[: plan.steps],
        "examples": len(examples),
        "batch_size": batch_size,
        "peak_rss_mib": peak_rss_mib(),
        "peak_gpu_mib": 0.0 if on_cpu else torch.cuda.max_memory_allocated() / 2**20,
    }


def unpack(rows: Any, pad_id: int, chunk: int = 1024) -> list[dict[str, list[int]]]:
    """Return one sequence per example of the packed rows: ``input_ids``, and ``labels`` that are -100 except on targets."""
    examples = []
    for first in range(0, len(rows), chunk):
        batch = rows.take(np.arange(first, min(first + chunk, len(rows))))
        for tokens, positions, targets in zip(batch.tokens, batch.positions, batch.targets, strict=True):
            used = int((np.asarray(tokens) != pad_id).sum())  # padding is only at the end of a row
            starts = np.flatnonzero(np.asarray(positions)[:used] == 0)
            for start, end in zip(starts, [*starts[1:], used], strict=True):
                ids, is_target = np.asarray(tokens)[start:end], np.asarray(targets)[start:end]
                examples.append({"input_ids": ids.tolist(), "labels": np.where(is_target, ids, IGNORED).tolist()})
    return examples


if __name__ == "__main__":
    main()
