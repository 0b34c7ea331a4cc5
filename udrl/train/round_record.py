"""What a round asked for and what it got, and the table of all rounds."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from udrl import storage
from udrl.train.achieved import by_task


@dataclass
class Asked:
    """One task's commands, and how well its accepted prompts kept to their length."""

    requests: int = 0
    with_words: int = 0
    words: int = 0  # commanded, summed
    rewards: Counter[int] = field(default_factory=Counter)  # bin -> requests
    kept: int = 0  # accepted prompts with a commanded length
    off: int = 0  # words that they are off, summed
    within_2: int = 0

    def add(self, other: "Asked") -> None:
        for name in ("requests", "with_words", "words", "kept", "off", "within_2"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.rewards.update(other.rewards)

    def plain(self) -> dict[str, Any]:
        """For JSON: ``words_off`` is the mean error of accepted prompts in words; None where there is nothing to average."""
        return {
            "requests": self.requests,
            "mean_words": round(self.words / self.with_words, 2) if self.with_words else None,
            "reward_bins": {str(b): self.rewards[b] for b in sorted(self.rewards)},
            "words_off": round(self.off / self.kept, 3) if self.kept else None,
            "within_2": round(self.within_2 / self.kept, 3) if self.kept else None,
        }


def asked(episodes: str, rejects: str) -> dict[str, Asked]:
    """What the rows of a round were commanded, task by task, whatever became of them."""
    total: dict[str, Asked] = {}
    for folder in (episodes, rejects):
        files = [storage.join(folder, name) for name in storage.list_files(folder) if name.endswith(".parquet")]
        for found in storage.map_files(partial(_asked, accepted=folder == episodes), files):
            for task, part in found.items():
                total.setdefault(task, Asked()).add(part)
    return total


def _asked(uri: str, accepted: bool) -> dict[str, Asked]:
    found = {}
    table = storage.read_table(uri, ["task", "command_words", "command_reward", *(["n_words"] if accepted else [])])
    for task, part in by_task(table).items():
        words, rewards = (part.column(name).to_numpy() for name in ("command_words", "command_reward"))
        told = words > 0
        off = np.abs(part.column("n_words").to_numpy() - words)[told] if accepted else np.zeros(0, dtype=np.int64)
        bins = Counter(dict(zip(*(column.tolist() for column in np.unique(rewards, return_counts=True)), strict=True)))
        found[task] = Asked(
            len(words), int(told.sum()), int(words[told].sum()), bins, len(off), int(off.sum()), int((off <= 2).sum())
        )
    return found


def average(values: Sequence[float | None]) -> float | None:
    """Mean over tasks of what is known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def table(rounds: Sequence[dict[str, Any]]) -> list[str]:
    """One line a round, figures averaged over tasks."""
    lines = [["round", "episodes", "accepted", "reward (before)", "words off", "distinct-2", "kept", "student"]]
    for one in rounds:
        reward, before = (average([t["mean"] for t in one.get(key, {}).values()]) for key in ("achieved", "before"))
        off = average([t["words_off"] for t in one.get("commands", {}).values()])
        varied = average([t["ratio"] for t in one.get("diversity", {}).values()])
        lines.append(
            [
                str(one["round"]),
                f"{one['accepted']:,}",
                f"{one['accepted'] / one['requested']:.0%}" if one.get("requested") else "-",
                ("-" if reward is None else f"{reward:.3f}") + ("" if before is None else f" ({before:.3f})"),
                "-" if off is None else f"{off:.1f}",
                "-" if varied is None else f"{varied:.0%}",
                "-" if one.get("keep") is None else f"{one['keep']:.0%}",
                "trained" if not one["refused"] else f"not trained on: {one['refused']}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join([*(c.rjust(w) for c, w in zip(line[:-1], widths, strict=False)), line[-1]]) for line in lines]
    return [text[0], "-" * len(text[0]), *text[1:]]
