"""The arms of ``benchmarks.training``: each is one training in a process of its own."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generation import HERE, child
from udrl import cluster, command_line
from udrl import recipe as recipes
from udrl.recipe import Recipe
from udrl.text import text_table
from udrl.train.gpt2 import Shape

HEADER = ["", "tokens/s", "step ms", "tokens", "input", "padding", "loss", "peak MiB, host; gpu"]


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
class Measurement:
    """One turn of an arm, over the steps after the warm-up. Tokens are those of examples, without padding."""

    tokens_per_second: float
    step_ms: float
    tokens_per_step: float
    input_share: float | None
    padding: float | None
    loss: float | None  # in the stage and the bare loop equal except for rounding: they train on the same rows in one order
    host_mib: list[float]
    gpu_mib: list[float]

    def cells(self) -> list[str]:
        """Return the cells under :data:`HEADER`, without the arm's name; blank if the arm has no such value."""
        input_share, padding = (f"{share:.1%}" if share is not None else "" for share in (self.input_share, self.padding))
        loss = f"{self.loss:.3f}" if self.loss is not None else ""
        memory = "; ".join(" ".join(f"{mib:,.0f}" for mib in peaks) for peaks in (self.host_mib, self.gpu_mib) if peaks)
        rates = [f"{self.tokens_per_second:,.0f}", f"{self.step_ms:.1f}", f"{self.tokens_per_step:,.0f}"]
        return [*rates, input_share, padding, loss, memory]


@dataclass(frozen=True)
class Bench:
    """The settings of all arms. ``steps`` includes the warm-up, which is not measured."""

    folder: str
    steps: int
    warmup: int
    repeats: int
    overrides: tuple[str, ...]

    def recipe(self, run: str, *overrides: str) -> Recipe:
        """Return the recipe of a measured training: it does nothing but steps between its first and its last one."""
        values = [f"storage={self.folder}/run", f"episodes_from={run}", "resume=if_possible", "train.checkpoint_every=1000000"]
        values += ["train.sample_intents=0", f"train.threads={cluster.cpu_count()}"]
        return command_line.load(f"{HERE}/recipes/quickstart.yaml", [*values, *overrides, *self.overrides])

    def prepare(self, recipe: Recipe) -> tuple[Recipe, Data]:
        """Pack the rows and compile DeepSpeed's operator by a training of one step; return the recipe with its steps set."""
        result = self._run_child("training_stage", with_train(recipe, epochs=1e-9), "--describe")
        print(
            f"{result['examples']:,} examples, {result['mean_tokens']:.0f} tokens each, in {result['rows']:,} rows of"
            f" {recipe.row_tokens()}; {result['padding']:.1%} padding; {result['rows_per_step']} rows per step;"
            f" {result['parameters'] / 1e6:.1f}M parameters",
            flush=True,
        )
        names = ("budget_rows", "rows_per_step", "padding", "target_share", "example_length")
        data = Data(result["data"], **{name: result[name] for name in names})
        # The stage rounds the steps up from the epochs.
        epochs = (self.steps - 0.5) * data.rows_per_step / data.budget_rows
        return with_train(recipe, epochs=epochs), data

    def stage(self, recipe: Recipe, data: Data, **train: Any) -> Measurement:
        """Train by the stage with these settings of ``train``, for the same number of steps."""
        batch = Shape.of(recipe.student, recipe.train).batch_tokens
        batch_ratio = train.get("batch_tokens", batch) / batch
        result = self._run_child("training_stage", with_train(recipe, epochs=recipe.train.epochs * batch_ratio, **train))
        result["losses"] = [loss for _, loss in result["history"]]
        return self._measure(result, result["rows_per_step"] * recipe.row_tokens() * (1 - data.padding))

    def bare(self, recipe: Recipe, data: Data, precision: str) -> Measurement:
        """Train by the plain PyTorch loop."""
        result = self._run_child("bare_loop", recipe, data.folder, "--precision", precision)
        return self._measure(result, result["rows_per_step"] * recipe.row_tokens() * (1 - data.padding))

    def trainer(self, recipe: Recipe, data: Data, grouped: bool) -> Measurement:
        """Train by Hugging Face's Trainer."""
        result = self._run_child("hf_trainer", recipe, data.folder, *(["--grouped"] if grouped else []))
        return self._measure(result, result["step_tokens"])

    def in_turns(self, arms: Mapping[str, Callable[[], Measurement]]) -> dict[str, dict[str, Any]]:
        """Run all arms in turns, ``repeats`` times, and print a table of all turns; return the means of each arm."""
        rows: list[list[str]] = []
        turns: dict[str, list[Measurement]] = {name: [] for name in arms}
        for turn in range(self.repeats):
            for name, run in arms.items():
                turns[name].append(run())
                rows.append([name, *turns[name][-1].cells()])
                print(f"{name}: turn {turn + 1} of {self.repeats} is done", file=sys.stderr)
        print(text_table(HEADER, rows, ragged_last=True), flush=True)
        return {name: average_turns(measurements) for name, measurements in turns.items()}

    def _run_child(self, module: str, recipe: Recipe, *arguments: str) -> dict[str, Any]:
        path = Path(self.folder, "recipe.yaml")
        path.write_text(recipes.dump(recipe), encoding="utf-8")
        output = child("-m", f"benchmarks.{module}", str(path), *arguments, env={"OMP_NUM_THREADS": str(recipe.train.threads)})
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
        return result

    def _measure(self, result: dict[str, Any], step_tokens: float | list[int]) -> Measurement:
        seconds = np.array(result["step_seconds"])[self.warmup :]
        tokens = np.broadcast_to(step_tokens, self.steps)[self.warmup :]
        input_share = result.get("input_share")
        if "input_seconds" in result:
            input_share = sum(result["input_seconds"][self.warmup :]) / seconds.sum()
        slots = result.get("step_slots")
        workers = result.get("memory", [result])
        return Measurement(
            tokens_per_second=tokens.sum() / seconds.sum(),
            step_ms=float(np.median(seconds)) * 1000,
            tokens_per_step=float(tokens.mean()),
            input_share=input_share,
            padding=1 - tokens.sum() / sum(slots[self.warmup :]) if slots else None,
            loss=float(np.mean(result["losses"][-10:])) if "losses" in result else None,
            host_mib=[worker["peak_rss_mib"] for worker in workers],
            gpu_mib=[worker["peak_gpu_mib"] for worker in workers if worker["peak_gpu_mib"]],
        )


def with_train(recipe: Recipe, **values: Any) -> Recipe:
    """Return the recipe with these settings of ``train``."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=values)})


def average_turns(turns: Sequence[Measurement]) -> dict[str, Any]:
    """Return means over the turns, each worker's highest memory, and the speed of each turn, for the JSON line."""
    measurements = [asdict(turn) for turn in turns]
    averages: dict[str, Any] = {"turns": [round(turn.tokens_per_second, 1) for turn in turns]}
    for name in ("tokens_per_second", "step_ms", "tokens_per_step", "input_share", "padding", "loss"):
        values = [values[name] for values in measurements if values[name] is not None]
        averages[name] = round(float(np.mean(values)), 4) if values else None
    for name in ("host_mib", "gpu_mib"):
        averages[name] = [round(max(peaks)) for peaks in zip(*(values[name] for values in measurements), strict=True)]
    return averages
