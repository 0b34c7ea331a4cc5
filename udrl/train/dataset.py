"""From the replay buffer to packed training rows, tokenised once and kept under ``student_data/`` of the run.

Two passes of Ray Data tasks over the files of episodes: the first counts rewards and lengths, from which come the commands
and the edges of the reward bins; the second labels, tokenises and packs. The driver adds up counts and holds no episode.
Layout under ``out``::

    tokenizer/                 the tokenizer, and commands.json
    train/, validation/        rows-*.arrow, each of a few files of episodes
    held.json                  validation intents of each task, to look at while training
    done.json                  written last: what there is (:func:`facts`)
"""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from udrl import commands, models, storage
from udrl import tokenizer as tokenizers
from udrl.commands import CommandVocabulary
from udrl.errors import UserError
from udrl.progress import Progress
from udrl.recipe import Recipe
from udrl.train import packed_rows as rows
from udrl.train.augment import rare_words, shared_words, swap
from udrl.train.packed_rows import Rows
from udrl.train.packing import Examples, assign, encode_examples, hindsight, pack
from udrl.train.replay_buffer import Source, kept, scrambled
from udrl.watchdog import watched

DONE, HELD = "done.json", "held.json"
SAMPLE_EPISODES = 200_000  # whose texts the tokenizer and the rare words are learnt from: both settle long before this many
SAMPLE_INTENTS = 32  # validation intents a task that are set aside to look at
TALLY_TASKS = 2048  # at most, in the pass that counts
TALLY_ROWS = 1_000_000  # of tallies that wait on the driver to be added up
# Sequences, swapped copies among them, that one task packs together. The last row of a packing is half empty: of about 900
# rows (256 tokens, sequences of 45) that is 0.06%, and of the 3% of them that are validation about 2%.
PACK_TOGETHER = 5_000
VALIDATION_SALT = 7


@dataclass(frozen=True)
class _File:
    """One Parquet file of the buffer. Its draws are seeded by its place in it: packing it again gives the same rows."""

    uri: str
    keep: float
    seed: tuple[int, int, int]  # of the recipe; number of the source; number of the file


@dataclass(frozen=True)
class _Job:
    """All that a packing task needs to know."""

    recipe: Recipe
    out: str
    tokenizer: Any
    vocabulary: CommandVocabulary
    top: dict[str, float]  # least value (:func:`commands.ranked`) of a task's episodes that are trained on
    pool: list[str]  # words for swapped copies


def prepare(recipe: Recipe, sources: Sequence[Source], out: str, tasks: list[str], start: str | None = None) -> None:
    """Write tokenizer, ``commands.json``, packed rows, ``held.json`` and, last, ``done.json`` under ``out``.

    What an unfinished attempt left there is replaced. Rows depend on recipe and episodes alone, not on the cluster. Tasks of
    the buffer that are not in ``tasks`` are left out. Budget: ``budget_rows`` of :func:`facts` does not depend on
    ``train.objective``, so that objectives can be compared after as many steps.

    Args:
        start: folder of an exported student to go on from; its tokenizer is kept, the bins are learnt anew.

    Raises:
        UserError: there are no episodes, or a task has none; or ``start`` knows other commands than the recipe.
    """
    for name in (DONE, HELD, "train", "validation"):
        storage.remove(storage.join(out, name))
    files = _files(recipe, sources)
    counted = _count(recipe, files, tasks)
    episodes = _require(counted, tasks, sources)
    vocabulary = commands.fit_vocabulary(
        counted,
        tasks,
        max_words=recipe.commands.max_words,
        reward_bins=recipe.commands.reward_bins,
        rank_within=recipe.commands.rank_within,
        lowercase=recipe.student.lowercase and not recipe.student.init,  # a pretrained tokenizer does not fold case
        objective=recipe.train.objective,
    )
    sample = files[:: -(-episodes // SAMPLE_EPISODES)]  # files spread evenly over the buffer
    tokenizer, vocabulary = _tokenizer(recipe, vocabulary, sample, start)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        vocabulary.save(folder)
        storage.upload_folder(folder, storage.join(out, "tokenizer"))
    top = commands.top_edges(counted, tasks, recipe.train.top_share) if recipe.train.objective == "sft_top" else {}
    pool = rare_words(_intents(sample)) if recipe.train.swapped_copies else []
    together = max(1, round(PACK_TOGETHER * len(files) / (episodes * (1 + recipe.train.swapped_copies))))
    groups = [files[i : i + together] for i in range(0, len(files), together)]
    made, held = _pack_all(_Job(recipe, out, tokenizer, vocabulary, top, pool), groups)
    storage.write_json(storage.join(out, HELD), held)
    more = {"episodes": episodes, "context": recipe.student.context, "sources": [asdict(source) for source in sources]}
    storage.write_json(storage.join(out, DONE), {**made, **more})


def facts(out: str) -> dict[str, Any]:
    """What :func:`prepare` made: ``rows``, ``validation_rows``, ``tokens`` (of training), ``padding`` (share of the training
    rows' slots), ``dropped`` (examples longer than a row), ``budget_rows`` (training rows had the objective been 'udrl'),
    ``episodes`` (in the buffer), ``trained`` (of them, without swapped copies), ``context`` and ``sources``.

    Raises:
        UserError: ``out`` was not prepared to the end.
    """
    return storage.read_json(storage.join(out, DONE))


def load_rows(out: str, split: str) -> Rows:
    """All packed rows of ``split`` (``train`` or ``validation``); a row has the same number wherever it is loaded."""
    made = facts(out)
    return Rows(rows.local_files(storage.join(out, split), json.dumps(made, sort_keys=True)), made["context"])


def _files(recipe: Recipe, sources: Sequence[Source]) -> list[_File]:
    return [
        _File(storage.join(source.folder, name), source.keep, (recipe.seed, s, f))
        for s, source in enumerate(sources)
        for f, name in enumerate(n for n in storage.list_files(source.folder) if n.endswith(".parquet"))
    ]


def _read(file: _File, tasks: Sequence[str], names: list[str]) -> pa.Table:
    table = storage.read_table(file.uri, names)
    return table.filter(pc.is_in(table.column("task"), pa.array(tasks, pa.string())))


def _numpy(table: pa.Table) -> dict[str, np.ndarray]:
    return {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}


def _count(recipe: Recipe, files: list[_File], tasks: list[str]) -> pa.Table | None:
    """The tally of all episodes; None where there is no file."""
    import ray

    within = recipe.commands.rank_within
    shared = ray.put(files)
    names = ["task", "intent_id", "n_words", "reward", "relevance"]

    def count(batch: dict[str, np.ndarray]) -> pa.Table:
        mine = [ray.get(shared)[i] for i in batch["id"]]
        return commands.merge([commands.tally(_numpy(_read(file, tasks, names)), within, file.seed) for file in mine])

    if not files:
        return None
    numbers = ray.data.range(len(files), override_num_blocks=min(len(files), TALLY_TASKS))
    counted = numbers.map_batches(count, batch_size=None, num_cpus=1)
    tallies: list[pa.Table] = []
    waiting = 0
    batches = counted.iter_batches(batch_size=None, batch_format="pyarrow")
    for table in watched(batches, recipe.watchdog_minutes, "count rewards"):
        tallies.append(table)
        waiting += table.num_rows
        if waiting > TALLY_ROWS:
            tallies, waiting = [commands.merge(tallies)], 0
    return commands.merge(tallies)


def _require(counted: pa.Table | None, tasks: list[str], sources: Sequence[Source]) -> int:
    """How many episodes there are."""
    folders = ", ".join(source.folder for source in sources)
    if counted is None or not counted.num_rows:
        raise UserError(f"{folders}: no episodes to train on; run jobs.generate first, and look at its table of rejects")
    there = set(counted.column("task").unique().to_pylist())
    if missing := [task for task in tasks if task not in there]:
        raise UserError(f"{folders}: no episode of {', '.join(missing)}; look at the rejects, or leave the task out")
    return int(pc.sum(counted.column("n")).as_py())


def _tokenizer(
    recipe: Recipe, vocabulary: CommandVocabulary, sample: list[_File], start: str | None
) -> tuple[Any, CommandVocabulary]:
    """The student's tokenizer: that of ``start``, the pretrained one with the control tokens added, or one trained here."""
    if start is None and recipe.student.init is None:
        return tokenizers.train(_texts(sample), vocabulary, recipe.student.vocab_size), vocabulary
    if start is None:
        return tokenizers.extend(models.resolve(str(recipe.student.init)), vocabulary), vocabulary
    with tempfile.TemporaryDirectory() as folder:
        for name in storage.list_files(start):
            if not name.endswith((".safetensors", ".bin")):  # the weights are not needed here
                with open(os.path.join(folder, name), "wb") as copy:
                    copy.write(storage.read_bytes(storage.join(start, name)))
        before = CommandVocabulary.load(folder)
        if set(before.control_tokens()) != set(vocabulary.control_tokens()):
            raise UserError(
                f"{start}: knows other commands than the recipe; tasks, commands.max_words and commands.reward_bins have to"
                " stay as they were for a student to be trained on"
            )
        return tokenizers.load(folder), vocabulary.model_copy(update={"lowercase": before.lowercase})


def _texts(files: list[_File]) -> Iterator[str]:
    for file in files:
        table = storage.read_table(file.uri, ["intent", "prompt"])
        for name in ("intent", "prompt"):
            for text in table.column(name).to_pylist():
                yield " " + " ".join(text.split())


def _intents(files: list[_File]) -> Iterator[str]:
    """Each distinct intent once, as far as its episodes stand in one file."""
    for file in files:
        yield from sorted(set(storage.read_table(file.uri, ["intent"]).column("intent").to_pylist()))


def _pack_all(job: _Job, groups: list[list[_File]]) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Pack every group in a Ray Data task; what was made, and the validation intents to look at."""
    import ray

    shared = ray.put((job, groups))

    def pack_groups(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        # A job has a core; the tokenizer would otherwise start a thread on every core of the node.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        job, groups = ray.get(shared)
        # As text: Ray Data would look for a schema in it.
        return {"made": np.array([json.dumps(_pack_group(job, int(i), groups[i])) for i in batch["id"]])}

    numbers = ray.data.range(len(groups), override_num_blocks=len(groups))
    packed = numbers.map_batches(pack_groups, batch_size=None, num_cpus=1)
    bar = Progress("tokenise and pack", len(groups), "files of rows")
    done = 0
    sums: dict[str, int] = {}
    held: dict[str, dict[int, str]] = {task: {} for task in job.vocabulary.tasks}
    for batch in watched(packed.iter_batches(batch_size=None), job.recipe.watchdog_minutes, "tokenise and pack"):
        for text in batch["made"]:
            made = json.loads(text)
            for task, mark, intent in made.pop("held"):
                held[task][mark] = intent
            sums = {name: sums.get(name, 0) + n for name, n in made.items()}
            done += 1
        held = {task: dict(sorted(intents.items())[:SAMPLE_INTENTS]) for task, intents in held.items()}
        bar.update(done)
    padding = 1 - sums["tokens"] / max(sums["rows"] * job.recipe.student.context, 1)
    note = f"{sums['tokens']:,} tokens, {100 * padding:.2f}% padding, {sums['dropped']:,} too long"
    bar.finish(done, note)
    if not sums["rows"] and sums["dropped"]:
        longest = job.recipe.student.context
        raise UserError(f"student.context: every one of {sums['dropped']:,} examples is longer than {longest} tokens")
    if not sums["rows"]:
        raise UserError("train.validation: no episode is left to train on; lower it, or add intents")
    return {**sums, "padding": padding}, [{"task": t, "intent": i} for t in held for i in held[t].values()]


def _pack_group(job: _Job, group: int, files: list[_File]) -> dict[str, Any]:
    """Write the rows of a few files of episodes; what was made, summed over them."""
    encoded = [_encode(job, file) for file in files]
    examples = Examples.joined([file.examples for file in encoded])
    held = np.concatenate([file.held for file in encoded])
    chosen = np.concatenate([file.chosen for file in encoded])
    context = job.recipe.student.context
    fits = examples.lengths <= context
    made: dict[str, Any] = {"dropped": int((chosen & ~fits).sum()), "trained": sum(file.trained for file in encoded)}
    for split, wanted, key in (("train", ~held, "rows"), ("validation", held, "validation_rows")):
        packed = pack(examples.where(wanted & chosen & fits), context, job.tokenizer.pad_token_id)
        if len(packed):
            name = f"rows-{group:06d}{rows.SUFFIX}"
            rows.write(storage.join(job.out, split, name), packed, len(job.tokenizer))
        made[key] = len(packed)
    made["tokens"] = int(examples.lengths[~held & chosen & fits].sum())
    made["budget_rows"] = made["rows"] if chosen.all() else assign(examples.lengths[~held & fits], context)[2]
    made["held"] = [sample for file in encoded for sample in file.samples]
    return made


@dataclass(frozen=True)
class _Encoded:
    """One file's episodes that may be trained or validated on, and then the swapped copies of those for training."""

    examples: Examples
    held: np.ndarray  # bool: belongs to validation
    chosen: np.ndarray  # bool: what the objective learns from
    trained: int  # episodes for training that are chosen, without their copies
    samples: list[tuple[str, int, str]]  # task, mark and text of a few validation intents


def _encode(job: _Job, file: _File) -> _Encoded:
    recipe, vocabulary = job.recipe, job.vocabulary
    names = ["episode_id", "intent_id", "intent", "task", "prompt", "n_words", "reward"]
    columns = _numpy(_read(file, list(vocabulary.tasks), names))
    task, intents, prompts = columns["task"], columns["intent"], columns["prompt"]
    values = commands.ranked(columns, recipe.commands.rank_within, file.seed)
    bins = commands.reward_bins_of(vocabulary, task, values)
    # Labels and copies are drawn apart, so that every objective makes the same copies.
    words, rewards = hindsight(
        vocabulary, columns["n_words"], bins, recipe.commands.dropout, np.random.default_rng([*file.seed, 0])
    )
    held = _validation(columns["intent_id"], recipe.train.validation)
    chosen = np.array([v >= job.top.get(t, -np.inf) for t, v in zip(task, values, strict=True)], dtype=bool)
    used = np.flatnonzero(held | kept(columns["episode_id"], file.keep))
    rng = np.random.default_rng([*file.seed, 1])
    rare = frozenset(job.pool)
    copies = [
        (i, *swap(intents[i], prompts[i], shared, job.pool, rng))
        for i in used[~held[used]]
        if (shared := shared_words(intents[i], prompts[i], rare))
        for _ in range(recipe.train.swapped_copies)
    ]
    origin = np.array([*used, *(i for i, _, _ in copies)], dtype=np.int64)
    examples = encode_examples(
        job.tokenizer,
        vocabulary,
        [*intents[used], *(intent for _, intent, _ in copies)],
        [*prompts[used], *(prompt for _, _, prompt in copies)],
        task[origin],
        words[origin],
        rewards[origin],
    )
    trained = int((chosen & ~held)[used].sum())
    return _Encoded(examples, held[origin], chosen[origin], trained, _samples(columns, held))


def _samples(columns: dict[str, np.ndarray], held: np.ndarray) -> list[tuple[str, int, str]]:
    """Up to SAMPLE_INTENTS validation intents of each task, the lowest by a hash of their ids."""
    marks = scrambled(columns["intent_id"])
    each: dict[str, dict[int, str]] = {}
    for i in np.flatnonzero(held):
        each.setdefault(columns["task"][i], {})[int(marks[i])] = columns["intent"][i]
    return [(task, mark, text) for task in each for mark, text in sorted(each[task].items())[:SAMPLE_INTENTS]]


def _validation(intent_ids: np.ndarray, share: float) -> np.ndarray:
    """Which episodes belong to validation: whole intents, by a hash of their id."""
    return ((intent_ids // VALIDATION_SALT) % 10_000) < share * 10_000
