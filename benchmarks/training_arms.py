"""The arms of ``benchmarks.training``: one training each, in a process of its own, and what it showed."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generation import HERE, child
from udrl import cluster, command_line
from udrl import recipe as recipes
from udrl.recipe import Recipe
from udrl.train.gpt2 import Shape

# What a turn of an arm showed: see Bench.measured.
Turn = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """Packed rows of a run, and the batch that the stage makes of them."""

    folder: str
    budget_rows: int
    rows_per_step: int
    padding: float
    target_share: float
    example_length: float


@dataclass(frozen=True)
class Bench:
    """What all arms share. ``steps`` counts those of the warm-up, which are not measured."""

    folder: str
    steps: int
    warmup: int
    repeats: int
    overrides: tuple[str, ...]

    def recipe(self, run: str, *overrides: str) -> Recipe:
        """The recipe of a training that is measured: nothing else happens between its first step and its last."""
        values = [f"storage={self.folder}/run", f"episodes_from={run}", "resume=if_possible", "train.checkpoint_every=1000000"]
        values += ["train.sample_intents=0", f"train.threads={cluster.cpu_count()}"]
        return command_line.load(f"{HERE}/recipes/quickstart.yaml", [*values, *overrides, *self.overrides])

    def prepare(self, recipe: Recipe) -> tuple[Recipe, Data]:
        """Pack the rows by a training of one step; DeepSpeed compiles then, too. Returns the recipe with its steps set."""
        found = self._child("training_stage", with_train(recipe, epochs=1e-9), "--describe")
        print(
            f"{found['examples']:,} examples, {found['mean_tokens']:.0f} tokens each, in {found['rows']:,} rows of"
            f" {recipe.student.context}; {found['padding']:.1%} padding; {found['rows_per_step']} rows a step;"
            f" {found['parameters'] / 1e6:.1f}M parameters",
            flush=True,
        )
        names = ("budget_rows", "rows_per_step", "padding", "target_share", "example_length")
        data = Data(found["data"], **{name: found[name] for name in names})
        # Steps are rounded up from the epochs.
        epochs = (self.steps - 0.5) * data.rows_per_step / data.budget_rows
        return with_train(recipe, epochs=epochs), data

    def stage(self, recipe: Recipe, data: Data, **train: Any) -> Turn:
        """Train by the stage, with these settings of ``train``, for as many steps."""
        batch = Shape.of(recipe.student, recipe.train).batch_tokens
        bigger = train.get("batch_tokens", batch) / batch
        found = self._child("training_stage", with_train(recipe, epochs=recipe.train.epochs * bigger, **train))
        found["losses"] = [loss for _, loss in found["history"]]
        return self._measured(found, found["rows_per_step"] * recipe.student.context * (1 - data.padding))

    def bare(self, recipe: Recipe, data: Data, precision: str) -> Turn:
        """Train by the plain loop."""
        found = self._child("bare_loop", recipe, data.folder, "--precision", precision)
        return self._measured(found, found["rows_per_step"] * recipe.student.context * (1 - data.padding))

    def trainer(self, recipe: Recipe, data: Data, grouped: bool) -> Turn:
        """Train by Hugging Face's Trainer."""
        found = self._child("hf_trainer", recipe, data.folder, *(["--grouped"] if grouped else []))
        return self._measured(found, found["step_tokens"])

    def in_turns(self, arms: Mapping[str, Callable[[], Turn]]) -> dict[str, Turn]:
        """Run every arm ``repeats`` times, one after another, and print a line each; the mean of each arm's turns."""
        print(
            f"{'':<34}{'tokens/s':>10}{'step ms':>9}{'tokens':>9}{'input':>8}{'padding':>9}{'loss':>7}   peak MiB, host; gpu",
            flush=True,
        )
        turns: dict[str, list[Turn]] = {name: [] for name in arms}
        for _ in range(self.repeats):
            for name, run in arms.items():
                turns[name].append(run())
                print(f"{name:<34}{line(turns[name][-1])}", flush=True)
        return {name: mean(found) for name, found in turns.items()}

    def _child(self, module: str, recipe: Recipe, *arguments: str) -> dict[str, Any]:
        path = Path(self.folder, "recipe.yaml")
        path.write_text(recipes.dump(recipe), encoding="utf-8")
        printed = child("-m", f"benchmarks.{module}", str(path), *arguments, env={"OMP_NUM_THREADS": str(recipe.train.threads)})
        found: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return found

    def _measured(self, found: dict[str, Any], step_tokens: float | list[int]) -> Turn:
        """Rates over the steps after the warm-up; ``step_tokens`` are real ones, padding aside."""
        seconds = np.array(found["step_seconds"])[self.warmup :]
        tokens = np.broadcast_to(step_tokens, self.steps)[self.warmup :]
        share = found.get("input_share")
        if "input_seconds" in found:
            share = sum(found["input_seconds"][self.warmup :]) / seconds.sum()
        slots = found.get("step_slots")
        ranks = found.get("memory", [found])
        return {
            "tokens_per_second": tokens.sum() / seconds.sum(),
            "step_ms": float(np.median(seconds)) * 1000,
            "tokens_per_step": float(tokens.mean()),
            "input_share": share,
            "padding": 1 - tokens.sum() / sum(slots[self.warmup :]) if slots else None,
            # The same in the stage and in the loops but for rounding: they learn the same rows in the same order.
            "loss": float(np.mean(found["losses"][-10:])) if "losses" in found else None,
            "host_mib": [rank["peak_rss_mib"] for rank in ranks],
            "gpu_mib": [rank["peak_gpu_mib"] for rank in ranks if rank["peak_gpu_mib"]],
        }


def with_train(recipe: Recipe, **values: Any) -> Recipe:
    """The recipe with these settings of ``train``."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=values)})


def line(turn: Turn) -> str:
    """The columns of one turn; blank where an arm has no such figure."""
    share, padding = (f"{turn[n]:.1%}" if turn[n] is not None else "" for n in ("input_share", "padding"))
    loss = f"{turn['loss']:.3f}" if turn["loss"] is not None else ""
    memory = "; ".join(" ".join(f"{mib:,.0f}" for mib in turn[kind]) for kind in ("host_mib", "gpu_mib") if turn[kind])
    rates = f"{turn['tokens_per_second']:>10,.0f}{turn['step_ms']:>9.1f}{turn['tokens_per_step']:>9,.0f}"
    return f"{rates}{share:>8}{padding:>9}{loss:>7}   {memory}"


def mean(turns: list[Turn]) -> Turn:
    """Means over the turns, the most of each worker's memory, and the rate of each turn."""
    found: Turn = {"turns": [round(turn["tokens_per_second"], 1) for turn in turns]}
    for name in ("tokens_per_second", "step_ms", "tokens_per_step", "input_share", "padding", "loss"):
        values = [turn[name] for turn in turns if turn[name] is not None]
        found[name] = round(float(np.mean(values)), 4) if values else None
    for name in ("host_mib", "gpu_mib"):
        found[name] = [round(max(ranks)) for ranks in zip(*(turn[name] for turn in turns), strict=True)]
    return found
