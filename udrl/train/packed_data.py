"""From the replay buffer to packed training rows, tokenized once and kept under ``student_data/`` of the run.

Two passes of Ray Data tasks read the files of episodes: the first counts rewards and lengths, to which the commands and their
reward bins are fitted; the second labels, tokenizes and packs the episodes. The driver only adds up counts and holds no
episode. Layout of the folder: :class:`~udrl.run.PackedDataPaths`.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from udrl import models, storage
from udrl import tokenizer as tokenizers
from udrl.commands import CommandVocabulary
from udrl.errors import UserError
from udrl.intents import composer
from udrl.intents.intent import is_heldout, is_validation
from udrl.progress import Progress
from udrl.recipe import Recipe
from udrl.run import EpisodeSource, PackedDataPaths, PackedDataSummary, ValidationIntent, ValidationIntents
from udrl.train import hindsight, initial_weights
from udrl.train.augment import SwapWords, frequent_words, whole_words
from udrl.train.gpt2 import Shape
from udrl.train.packing import PackedRows, local_files
from udrl.train.packing_task import PackedCounts, PackingJob, pack_files
from udrl.train.replay_buffer import BufferFile, list_buffer_files, select_validation
from udrl.watchdog import iterate_with_watchdog

SAMPLE_EPISODES = 200_000  # read to train the tokenizer and to find rare words: neither changes much with more
COUNTING_TASKS = 2048  # Ray tasks of the counting pass, at most
BUFFERED_COUNTS = 1_000_000  # rows of counts that the driver holds before it adds them up
# Sequences, swapped copies included, that one task packs together. The last row of a task is half empty on average: that is
# 0.06% of about 900 training rows (256 tokens, sequences of 45), and about 2% of the 3% of them that are validation rows.
PACK_TOGETHER = 5_000


def prepare_packed_data(
    recipe: Recipe,
    sources: Sequence[EpisodeSource],
    paths: PackedDataPaths,
    tasks: list[str],
    start: str | None = None,
    pack_together: int = PACK_TOGETHER,
) -> None:
    """Write tokenizer, ``commands.json``, packed rows, validation intents and, last, the summary.

    Files of an unfinished attempt are replaced. The rows depend only on the recipe and the episodes, not on the cluster.
    Episodes of other tasks than ``tasks`` are left out.

    Args:
        recipe: gives all settings.
        sources: the replay buffer.
        paths: the folder to fill.
        tasks: names of the tasks to train on.
        start: folder of an exported student to continue from; its tokenizer is kept, the reward bins are fitted again.
        pack_together: sequences that one task packs, about.

    Raises:
        UserError: there are no episodes, or none of a task; or the student at ``start`` has other commands than the recipe.
    """
    for uri in (paths.summary, paths.validation_intents, paths.rows("train"), paths.rows("validation")):
        storage.remove(uri)
    files = list_buffer_files(sources, recipe.seed)
    counts = _count_episodes(recipe, files, tasks)
    _require_episodes(counts, tasks, sources)
    n_episodes = int(pc.sum(counts.column("n")).as_py())
    vocabulary = hindsight.fit_vocabulary(
        counts,
        tasks,
        max_words=recipe.commands.max_words,
        reward_bins=recipe.commands.reward_bins,
        rank_within=recipe.commands.rank_within,
        lowercase=recipe.student.lowercase and not recipe.student.init,  # a pretrained tokenizer does not fold case
        objective=recipe.train.objective,
    )
    sample = files[:: -(-n_episodes // SAMPLE_EPISODES)]  # files spread evenly over the buffer
    tokenizer, vocabulary = _make_tokenizer(recipe, vocabulary, sample, start)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        vocabulary.save(folder)
        storage.upload_folder(folder, paths.tokenizer)
    if start is None and recipe.student.vocabulary == "teacher":
        _save_embeddings(recipe, tokenizer, paths)
    is_top_only = recipe.train.objective == "sft_top"
    thresholds = hindsight.top_share_thresholds(counts, tasks, recipe.train.top_share) if is_top_only else {}
    swap = _swap_words(recipe, sample) if recipe.train.swapped_copies else None
    job = PackingJob(recipe, paths, tokenizer, vocabulary, thresholds, swap)
    group_size = max(1, round(pack_together * len(files) / (n_episodes * (1 + recipe.train.swapped_copies))))
    totals = _pack_all(job, [files[i : i + group_size] for i in range(0, len(files), group_size)])
    _require_rows(totals, recipe)
    samples = sorted(totals.samples, key=lambda sample: (tasks.index(sample.task), sample.intent_hash))
    intents = [ValidationIntent(task=sample.task, intent=sample.intent) for sample in samples]
    ValidationIntents(intents=intents).save(paths.validation_intents)
    PackedDataSummary(
        **totals.model_dump(exclude={"samples"}),
        padding=totals.padding(recipe.row_tokens()),
        episodes=n_episodes,
        context=recipe.row_tokens(),
        sources=list(sources),
    ).save(paths.summary)


def load_packed_rows(paths: PackedDataPaths, split: Literal["train", "validation"]) -> PackedRows:
    """Map all packed rows of ``split``; a row has the same number on every node.

    Raises:
        UserError: the data are not completely prepared.
    """
    summary = PackedDataSummary.load(paths.summary)
    return PackedRows(local_files(paths.rows(split), summary.model_dump_json()), summary.context)


# ---- counting


def _count_episodes(recipe: Recipe, files: list[BufferFile], tasks: list[str]) -> pa.Table:
    """Count the episodes of all files in Ray Data tasks; see :func:`hindsight.count_episodes`."""
    import ray

    rank_within = recipe.commands.rank_within
    shared_files = ray.put(files)

    def count(batch: dict[str, np.ndarray]) -> pa.Table:
        batch_files = [ray.get(shared_files)[i] for i in batch["id"]]
        return hindsight.merge_counts(
            [
                hindsight.count_episodes(file.read_columns(hindsight.COUNTED_COLUMNS, tasks), rank_within, file.seed)
                for file in batch_files
            ]
        )

    if not files:
        return pa.table({"task": pa.array([], pa.string()), "n": pa.array([], pa.int64())})
    numbers = ray.data.range(len(files), override_num_blocks=min(len(files), COUNTING_TASKS))
    batches = numbers.map_batches(count, batch_size=None, num_cpus=1).iter_batches(batch_size=None, batch_format="pyarrow")
    tables: list[pa.Table] = []
    buffered = 0
    for table in iterate_with_watchdog(batches, recipe.watchdog_minutes, "count rewards"):
        tables.append(table)
        buffered += table.num_rows
        if buffered > BUFFERED_COUNTS:
            tables, buffered = [hindsight.merge_counts(tables)], 0
    return hindsight.merge_counts(tables)


def _require_episodes(counts: pa.Table, tasks: list[str], sources: Sequence[EpisodeSource]) -> None:
    folders = ", ".join(source.folder for source in sources)
    if not counts.num_rows:
        raise UserError(f"{folders}: no episodes to train on; run jobs.generate first, and look at its table of rejects")
    tasks_with_episodes = set(counts.column("task").unique().to_pylist())
    if missing := [task for task in tasks if task not in tasks_with_episodes]:
        raise UserError(f"{folders}: no episode of {', '.join(missing)}; look at the rejects, or leave the task out")


# ---- tokenizer


def _make_tokenizer(
    recipe: Recipe, vocabulary: CommandVocabulary, sample: list[BufferFile], start: str | None
) -> tuple[Any, CommandVocabulary]:
    """Return the tokenizer of ``start``, of the pretrained student, cut from the teacher's, or trained on ``sample``."""
    if start is None and recipe.student.vocabulary == "teacher":
        pretrained = tokenizers.load_pretrained_tokenizer(recipe.teacher.model, recipe.teacher.revision)
        return tokenizers.cut_tokenizer(pretrained, vocabulary, recipe.student.vocab_size), vocabulary
    if start is None and recipe.student.init is None:
        return tokenizers.train_tokenizer(
            _read_texts(sample, recipe.train.validation), vocabulary, recipe.student.vocab_size
        ), vocabulary
    if start is None:
        return tokenizers.extend_tokenizer(models.resolve(str(recipe.student.init)), vocabulary), vocabulary
    with tempfile.TemporaryDirectory() as folder:
        for name in storage.list_files(start):
            if not name.endswith((".safetensors", ".bin")):  # the weights are not needed here
                with open(os.path.join(folder, name), "wb") as copy:
                    copy.write(storage.read_bytes(storage.join(start, name)))
        start_vocabulary = CommandVocabulary.load(folder)
        if set(start_vocabulary.control_tokens()) != set(vocabulary.control_tokens()):
            raise UserError(
                f"{start}: the student has other commands than the recipe; to train it further, keep tasks, commands.max_words"
                " and commands.reward_bins as they were"
            )
        return tokenizers.load_tokenizer(folder), vocabulary.model_copy(update={"lowercase": start_vocabulary.lowercase})


def _save_embeddings(recipe: Recipe, tokenizer: Any, paths: PackedDataPaths) -> None:
    """Save the teacher's embeddings of the student's pieces under the run's storage, where every worker reads them."""
    from safetensors.torch import save

    teacher, shape = recipe.teacher, Shape.of(recipe.student, recipe.train)
    width = initial_weights.token_width(shape.width, shape.heads) if recipe.student.start == "copying" else shape.width
    pretrained = tokenizers.load_pretrained_tokenizer(teacher.model, teacher.revision)
    ids, embeddings = initial_weights.teacher_embeddings(teacher.model, teacher.revision, pretrained, tokenizer, width)
    storage.write_bytes(paths.embeddings, save({"ids": ids, "embeddings": embeddings.contiguous()}))


def _read_texts(files: list[BufferFile], validation: float) -> Iterator[str]:
    """Yield intents and prompts to train a tokenizer on; the share ``validation`` of the subjects must not shape it."""
    for file in files:
        table = storage.read_table(file.uri, ["intent", "prompt"])
        is_trained = ~select_validation(table.column("intent").to_pylist(), validation)
        for name in ("intent", "prompt"):
            yield from map(tokenizers.normalize_spaces, table.column(name).filter(pa.array(is_trained)).to_pylist())


def _read_intents(files: list[BufferFile]) -> Iterator[str]:
    """Yield the distinct intents of each file; an intent in several files is repeated."""
    for file in files:
        yield from sorted(set(storage.read_table(file.uri, ["intent"]).column("intent").to_pylist()))


def _swap_words(recipe: Recipe, sample: list[BufferFile]) -> SwapWords:
    """Return the words for swapped copies: the replacements are whole words of the teacher's vocabulary.

    They exclude the subjects that are held out or validated on, so that the student meets those there for the first time.
    """
    unseen = [
        subject
        for subject in composer.subjects()
        if is_heldout(subject, recipe.intents.heldout) or is_validation(subject, recipe.train.validation)
    ]
    pool = whole_words(tokenizers.load_pretrained_tokenizer(recipe.teacher.model, recipe.teacher.revision).get_vocab(), unseen)
    if not pool:
        raise UserError(
            f"train.swapped_copies: the vocabulary of {recipe.teacher.model} has no lower-case English words to swap in;"
            " set train.swapped_copies=0"
        )
    return SwapWords(frequent_words(_read_intents(sample)), pool)


# ---- packing


def _pack_all(job: PackingJob, groups: list[list[BufferFile]]) -> PackedCounts:
    """Pack each group of files in a Ray Data task; return the sums."""
    import ray

    shared = ray.put((job, groups))

    def pack_groups(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        # A task has one core; the tokenizer would otherwise start a thread on every core of the node.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        job, groups = ray.get(shared)
        # As JSON text, because Ray Data would infer a schema from nested values.
        return {"counts": np.array([pack_files(job, int(i), groups[i]).model_dump_json() for i in batch["id"]])}

    label = "tokenize and pack"
    numbers = ray.data.range(len(groups), override_num_blocks=len(groups))
    batches = numbers.map_batches(pack_groups, batch_size=None, num_cpus=1).iter_batches(batch_size=None)
    bar = Progress(label, len(groups), "files of rows")
    n_groups = 0
    totals = PackedCounts()
    for batch in iterate_with_watchdog(batches, job.recipe.watchdog_minutes, label):
        for text in batch["counts"]:
            totals.add(PackedCounts.model_validate_json(text))
            n_groups += 1
        bar.update(n_groups)
    padding = totals.padding(job.recipe.row_tokens())
    bar.finish(n_groups, f"{totals.tokens:,} tokens, {padding:.2%} padding, {totals.dropped:,} too long")
    return totals


def _require_rows(totals: PackedCounts, recipe: Recipe) -> None:
    if totals.rows:
        return
    if totals.dropped:
        key = "train.row_tokens" if recipe.row_tokens() < recipe.student.context else "student.context"
        limit = min(recipe.row_tokens(), recipe.student.context)
        raise UserError(f"{key}: all {totals.dropped:,} examples are longer than {limit} tokens; raise it")
    raise UserError("train.validation: no episode is left to train on; lower it, or add intents")
