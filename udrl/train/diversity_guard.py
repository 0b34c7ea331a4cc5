"""Protection against collapse: earlier episodes stay in the mix, and a round that lost diversity is not trained on.

A student that learns from its own prompts narrows (Shumailov et al. 2024, doi 10.1038/s41586-024-07566-y); mixing in earlier
data prevents it (Gerstgrasser et al., arXiv 2404.01413; RiC, arXiv 2402.10207).
"""

import math
import zlib
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pyarrow as pa

from udrl import storage
from udrl.run import DiversityStatistics
from udrl.train.round_statistics import split_by_task

SAMPLE_INTENTS = 10_000  # of each task, on which diversity is measured
_HASH_BUCKETS = 1 << 20

PromptSample = dict[str, dict[int, str]]  # task -> intent id -> one prompt


def share_to_train_on(earlier: int, new: int, replay: float) -> float:
    """Return the share of ``new`` episodes to train on, so that ``earlier`` ones are at least ``replay`` of the mix."""
    max_new = earlier * (1 - replay)
    if new * replay <= max_new:
        return 1.0
    # Rounded down, because more new episodes would break the promise.
    return math.floor(1e4 * max_new / (new * replay)) / 1e4


def reason_to_refuse(accepted: int, diversity: Mapping[str, DiversityStatistics], min_diversity: float) -> str:
    """Return why a round must not be trained on, or an empty string."""
    if not accepted:
        return "no prompt was accepted"
    ratios = {task: statistics.ratio for task, statistics in diversity.items() if statistics.ratio is not None}
    too_low = [f"{task} {ratio:.2f}" for task, ratio in ratios.items() if ratio < min_diversity]
    if not too_low:
        return ""
    return f"distinct word pairs relative to round 0: {', '.join(too_low)}; explore.min_diversity={min_diversity:g}"


def measure_diversity(first: str, new: str, n_intents: int) -> dict[str, DiversityStatistics]:
    """Compare the diversity of the prompts in two folders of episodes, task by task.

    Longer texts and more texts on one subject repeat more, so the comparison takes one prompt of each intent that both folders
    have, cut to one length.

    Args:
        first: folder of round 0's episodes.
        new: folder of the new round's episodes.
        n_intents: intents of the new round; about ``SAMPLE_INTENTS`` of them are compared.
    """
    new_sample = sample_prompts(new, share=SAMPLE_INTENTS / max(n_intents, 1))
    first_sample = sample_prompts(first, only={task: np.array(list(prompts)) for task, prompts in new_sample.items()})
    return {task: compare_prompts(first_sample.get(task, {}), new_sample[task]) for task in sorted(new_sample)}


def compare_prompts(first: Mapping[int, str], new: Mapping[int, str]) -> DiversityStatistics:
    """Compare one task's prompts, given one per intent id, over the intents that both have.

    ``distinct_2`` is distinct over all word pairs (Li et al. 2016, arXiv 1510.03055), ``compression`` is bytes over zlib bytes
    (Shaib et al., arXiv 2403.00553). All values are None if there is nothing to compare.
    """
    pairs = [(first[i].lower().split(), new[i].lower().split()) for i in sorted(first.keys() & new.keys())]
    quantiles = [int(np.quantile([len(pair[side]) for pair in pairs], 0.25)) for side in (0, 1) if pairs]
    words = max(2, min(quantiles, default=2))
    cut = [(a[:words], b[:words]) for a, b in pairs if min(len(a), len(b)) >= words]
    if not cut:
        return DiversityStatistics(n=0, words=0, distinct_2=None, compression=None, ratio=None)
    first_texts, new_texts = [a for a, _ in cut], [b for _, b in cut]
    distinct_2 = distinct_word_pairs(first_texts), distinct_word_pairs(new_texts)
    compression = _compression_ratio(first_texts), _compression_ratio(new_texts)
    ratio = distinct_2[1] / distinct_2[0]
    return DiversityStatistics(n=len(cut), words=words, distinct_2=distinct_2, compression=compression, ratio=ratio)


def distinct_word_pairs(texts: list[list[str]]) -> float:
    """Return the share of distinct ones among all pairs of neighboring words; each text has at least two words."""
    pairs = [pair for text in texts for pair in pairwise(text)]
    return len(set(pairs)) / len(pairs)


def _compression_ratio(texts: list[list[str]]) -> float:
    data = "\n".join(map(" ".join, texts)).encode()
    return len(data) / len(zlib.compress(data, 9))


def sample_prompts(folder: str, share: float = 1.0, only: Mapping[str, np.ndarray] | None = None) -> PromptSample:
    """Return one prompt for each task and intent in a folder of episodes.

    Args:
        folder: the episodes.
        share: share of the intents, 0 to 1, selected by their ids.
        only: intent ids by task; replaces ``share``.
    """
    no_ids = np.array([], dtype=np.int64)

    def sample_file(uri: str) -> PromptSample:
        table = storage.read_table(uri, ["episode_id", "intent_id", "task", "prompt"])
        sample: PromptSample = {}
        for task, rows in split_by_task(table.sort_by("episode_id")).items():
            ids = rows.column("intent_id").to_numpy()
            # Ids are hashes already, so their last bits select at random.
            selected = ids % _HASH_BUCKETS < share * _HASH_BUCKETS if only is None else np.isin(ids, only.get(task, no_ids))
            rows = rows.filter(pa.array(selected))
            for intent_id, prompt in zip(rows.column("intent_id").to_pylist(), rows.column("prompt").to_pylist(), strict=True):
                sample.setdefault(task, {}).setdefault(intent_id, prompt)  # the prompt with the lowest episode id
        return sample

    total: PromptSample = {}
    # All prompts of an intent are in one file, so the order of files does not matter.
    for sample in storage.map_files(sample_file, storage.parquet_files(folder)):
        for task, prompts in sample.items():
            total.setdefault(task, {}).update(prompts)
    return total
