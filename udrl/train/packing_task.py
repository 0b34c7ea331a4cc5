"""One Ray task of packing: label, encode and pack the episodes of a few files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from udrl import storage
from udrl.commands import CommandVocabulary
from udrl.recipe import Recipe
from udrl.run import PackedDataPaths
from udrl.train import hindsight
from udrl.train.augment import SwapWords, shared_words, swap_words
from udrl.train.packing import SUFFIX, Examples, assign_to_rows, encode_examples, pack, write_rows
from udrl.train.replay_buffer import BufferFile, hash_ids, select_share, select_validation

SAMPLE_INTENTS = 32  # validation intents of each task that are saved to sample from during training


@dataclass(frozen=True)
class PackingJob:
    """Everything that a packing task needs in addition to its files."""

    recipe: Recipe
    paths: PackedDataPaths
    tokenizer: Any
    vocabulary: CommandVocabulary
    thresholds: dict[str, float]  # least value (see hindsight.rank_values) of a task's episodes that are trained on
    swap: SwapWords | None  # for swapped copies, if the recipe asks for them


class IntentSample(BaseModel):
    """A validation intent; those with the lowest hashes are saved."""

    task: str
    intent_hash: int
    intent: str


class PackedCounts(BaseModel):
    """Counts of packed rows; the fields are described at :class:`~udrl.run.PackedDataSummary`."""

    rows: int = 0
    validation_rows: int = 0
    tokens: int = 0
    dropped: int = 0
    trained: int = 0
    budget_rows: int = 0
    samples: list[IntentSample] = []

    def padding(self, context: int) -> float:
        """Return the share of the training rows' slots that are padding; rows have ``context`` tokens."""
        return 1 - self.tokens / max(self.rows * context, 1)

    def add(self, other: "PackedCounts") -> None:
        for name in ("rows", "validation_rows", "tokens", "dropped", "trained", "budget_rows"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.samples = _select_samples([*self.samples, *other.samples])


def _select_samples(samples: Sequence[IntentSample]) -> list[IntentSample]:
    """Return up to SAMPLE_INTENTS samples of each task, those with the lowest hashes, each intent once."""
    by_task: dict[str, dict[int, IntentSample]] = {}
    for sample in samples:
        by_task.setdefault(sample.task, {})[sample.intent_hash] = sample
    return [by_hash[key] for by_hash in by_task.values() for key in sorted(by_hash)[:SAMPLE_INTENTS]]


def pack_files(job: PackingJob, number: int, files: list[BufferFile]) -> PackedCounts:
    """Write the packed rows of a few files of episodes; ``number`` names their files."""
    encoded = [_encode_file(job, file) for file in files]
    examples = Examples.concatenate([file.examples for file in encoded])
    validation = np.concatenate([file.validation for file in encoded])
    eligible = np.concatenate([file.eligible for file in encoded])
    row_tokens = job.recipe.row_tokens()
    fits = examples.lengths <= min(row_tokens, job.recipe.student.context)
    rows = _write_split(job, "train", number, examples.take(np.flatnonzero(~validation & eligible & fits)))
    return PackedCounts(
        rows=rows,
        validation_rows=_write_split(job, "validation", number, examples.take(np.flatnonzero(validation & eligible & fits))),
        tokens=int(examples.lengths[~validation & eligible & fits].sum()),
        dropped=int((eligible & ~fits).sum()),
        trained=sum(file.trained for file in encoded),
        budget_rows=rows if eligible.all() else assign_to_rows(examples.lengths[~validation & fits], row_tokens)[2],
        samples=[sample for file in encoded for sample in file.samples],
    )


def _write_split(job: PackingJob, split: Literal["train", "validation"], number: int, examples: Examples) -> int:
    """Pack and write the rows of one split; return their number."""
    # In a random order, because examples of equal length fill a row one after another: copies of an episode would share it.
    shuffled = examples.take(np.random.default_rng([job.recipe.seed, number]).permutation(len(examples)))
    batch = pack(shuffled, job.recipe.row_tokens(), job.tokenizer.pad_token_id)
    if len(batch):
        write_rows(storage.join(job.paths.rows(split), f"rows-{number:06d}{SUFFIX}"), batch, len(job.tokenizer))
    return len(batch)


@dataclass(frozen=True)
class _EncodedFile:
    """One file's episodes for training or validation, followed by the swapped copies of those for training."""

    examples: Examples
    validation: np.ndarray  # bool: belongs to validation
    eligible: np.ndarray  # bool: the objective trains on it
    trained: int  # eligible episodes for training, without swapped copies
    samples: list[IntentSample]


def _encode_file(job: PackingJob, file: BufferFile) -> _EncodedFile:
    recipe, vocabulary = job.recipe, job.vocabulary
    names = ["episode_id", "intent_id", "intent", "task", "prompt", "n_words", "reward"]
    columns = file.read_columns(names, list(vocabulary.tasks))
    tasks, intents, prompts = columns["task"], columns["intent"], columns["prompt"]
    values = hindsight.rank_values(columns, recipe.commands.rank_within, file.seed)
    bins = hindsight.find_reward_bins(vocabulary, tasks, values)
    # Labels and copies have random generators of their own, so that every objective makes the same copies.
    words, rewards = hindsight.label_episodes(
        vocabulary, columns["n_words"], bins, recipe.commands.dropout, np.random.default_rng([*file.seed, 0])
    )
    validation = select_validation(intents.tolist(), recipe.train.validation)
    eligible = np.array([v >= job.thresholds.get(t, -np.inf) for t, v in zip(tasks, values, strict=True)], dtype=bool)
    used = np.flatnonzero(validation | select_share(columns["episode_id"], file.keep))
    rng = np.random.default_rng([*file.seed, 1])
    copies = []
    if job.swap:
        copies = [
            (i, *swap_words(intents[i], prompts[i], shared, job.swap.pool, rng))
            for i in used[~validation[used]]
            if (shared := shared_words(intents[i], prompts[i], job.swap.frequent))
            for _ in range(recipe.train.swapped_copies)
        ]
    origin = np.array([*used, *(i for i, _, _ in copies)], dtype=np.int64)  # the episode of each example
    examples = encode_examples(
        job.tokenizer,
        vocabulary,
        [*intents[used], *(intent for _, intent, _ in copies)],
        [*prompts[used], *(prompt for _, _, prompt in copies)],
        tasks[origin],
        words[origin],
        rewards[origin],
    )
    hashes = hash_ids(columns["intent_id"])
    samples = [IntentSample(task=tasks[i], intent_hash=int(hashes[i]), intent=intents[i]) for i in np.flatnonzero(validation)]
    trained = int((eligible & ~validation)[used].sum())
    return _EncodedFile(examples, validation[origin], eligible[origin], trained, _select_samples(samples))
