"""What keeps rounds from collapsing: old episodes stay in the mix, and a round that repeats itself is not trained on.

A student that learns from its own prompts narrows (Shumailov et al. 2024, doi 10.1038/s41586-024-07566-y); mixing with what
was there before is what helps (Gerstgrasser et al., arXiv 2404.01413; RiC, arXiv 2402.10207).
"""

import math
import zlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from udrl import storage
from udrl.train.achieved import by_task

SAMPLE = 10_000  # intents of a task that diversity is measured on
_GRAIN = 1 << 20

Prompts = dict[str, dict[int, str]]  # task -> intent id -> one prompt


def keep(earlier: int, new: int, replay: float) -> float:
    """The share of ``new`` episodes to train on, so that ``earlier`` ones make up at least ``replay`` of the mix."""
    room = earlier * (1 - replay)
    if new * replay <= room:
        return 1.0
    # Rounded down: fewer new ones keep the promise, more break it.
    return math.floor(1e4 * room / (new * replay)) / 1e4


def diversity(first: str, new: str, intents: int) -> dict[str, dict[str, Any]]:
    """How varied the prompts in the folder of episodes ``new`` are beside those in ``first``, task by task.

    Like is compared with like: one prompt of each intent that both hold (of about ``SAMPLE`` intents among the ``intents``
    of the round), cut to one length, as longer texts and more texts of a subject repeat more.

    Returns:
        ``n`` prompts and ``words`` each; ``distinct_2``, distinct over all word pairs (Li et al. 2016, arXiv 1510.03055),
        ``compression``, bytes over zlib bytes (Shaib et al., arXiv 2403.00553), each as [first, new]; ``ratio``, of
        distinct_2, new to first. None where there is nothing to compare.
    """
    mine = sample(new, share=SAMPLE / max(intents, 1))
    theirs = sample(first, only={task: np.array(list(prompts)) for task, prompts in mine.items()})
    return {task: compare(theirs.get(task, {}), mine[task]) for task in sorted(mine)}


def compare(first: Mapping[int, str], new: Mapping[int, str]) -> dict[str, Any]:
    """The figures of :func:`diversity` for one task, from one prompt an intent on either side."""
    pairs = [(first[i].lower().split(), new[i].lower().split()) for i in sorted(first.keys() & new.keys())]
    words = max(2, min((int(np.quantile([len(p[side]) for p in pairs], 0.25)) for side in (0, 1) if pairs), default=2))
    cut = [(a[:words], b[:words]) for a, b in pairs if min(len(a), len(b)) >= words]
    if not cut:
        return {"n": 0, "words": 0, "distinct_2": None, "compression": None, "ratio": None}
    sides = [[pair[side] for pair in cut] for side in (0, 1)]
    varied = [distinct_pairs(side) for side in sides]
    packed = [_compression("\n".join(map(" ".join, side))) for side in sides]
    return {"n": len(cut), "words": words, "distinct_2": varied, "compression": packed, "ratio": varied[1] / varied[0]}


def distinct_pairs(texts: list[list[str]]) -> float:
    """Distinct over all pairs of neighbouring words; each text has at least two words."""
    said = [pair for text in texts for pair in pairwise(text)]
    return len(set(said)) / len(said)


def _compression(text: str) -> float:
    raw = text.encode()
    return len(raw) / len(zlib.compress(raw, 9))


def verdict(accepted: int, varied: Mapping[str, Mapping[str, Any]], least: float) -> str:
    """Why a round is not trained on; "" where it is."""
    if not accepted:
        return "no prompt of it was accepted"
    poor = [f"{task} {found['ratio']:.2f}" for task, found in varied.items() if (found["ratio"] or least) < least]
    return f"distinct word pairs against round 0's: {', '.join(poor)}; explore.min_diversity={least:g}" if poor else ""


def sample(folder: str, share: float = 1.0, only: Mapping[str, np.ndarray] | None = None) -> Prompts:
    """One prompt of each intent and task in a folder of episodes: of a ``share`` of the intents, or of those in ``only``."""

    def chosen(name: str) -> Prompts:
        table = storage.read_table(storage.join(folder, name), ["episode_id", "intent_id", "task", "prompt"])
        found: Prompts = {}
        for task, part in by_task(table.sort_by("episode_id")).items():
            ids = part.column("intent_id").to_numpy()
            # Ids are hashes already, so their last bits draw.
            mine = ids % _GRAIN < share * _GRAIN if only is None else np.isin(ids, only.get(task, np.array([], dtype=np.int64)))
            part = part.filter(pa.array(mine))
            for intent, prompt in zip(part.column("intent_id").to_pylist(), part.column("prompt").to_pylist(), strict=True):
                found.setdefault(task, {}).setdefault(intent, prompt)  # the one of the lowest id
        return found

    total: Prompts = {}
    # An intent's prompts stand in one file, so it does not matter which file comes first.
    for part in storage.map_files(chosen, [name for name in storage.list_files(folder) if name.endswith(".parquet")]):
        for task, prompts in part.items():
            total.setdefault(task, {}).update(prompts)
    return total
