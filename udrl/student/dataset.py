"""From episodes to packed training rows, tokenised once and kept under ``student_data/`` of the run.

Two passes: the first reads a few numeric columns to make the command vocabulary and every episode's reward bin, and the
texts to train the tokenizer; the second packs shard by shard in Ray tasks. Rows do not depend on the worker count.
"""

import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from udrl import commands, storage
from udrl.commands import Vocabulary
from udrl.episodes import iter_tables
from udrl.errors import UserError
from udrl.progress import Progress
from udrl.recipe import Recipe
from udrl.student import tokenizer as tokenizers
from udrl.student.augment import rare_words, swap
from udrl.student.packing import Rows, encode_examples, hindsight, pack

# Texts the tokenizer is trained on: merges settle long before this many.
TOKENIZER_EPISODES = 200_000
VALIDATION_SALT = 7


def prepare(recipe: Recipe, episodes: str, out: str, tasks: list[str]) -> None:
    """Write ``commands.json``, the tokenizer, and packed rows under ``out``; nothing is done where they are whole.

    Raises:
        UserError: there are no episodes, or a task has none.
    """
    vocabulary, bins = learn_commands(recipe, episodes, tasks)
    tokenizer = tokenizers.train(_texts(episodes), vocabulary, recipe.student.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        vocabulary.save(folder)
        storage.upload_folder(folder, storage.join(out, "tokenizer"))
    _pack_all(recipe, episodes, out, tokenizer, vocabulary, bins)


def learn_commands(recipe: Recipe, episodes: str, tasks: list[str]) -> tuple[Vocabulary, list[np.ndarray]]:
    """The vocabulary, and the reward bin of every episode, one array a Parquet file."""
    names = ["task", "intent_id", "n_words", "reward", "relevance"]
    tables = list(iter_tables(episodes, names))
    if not sum(t.num_rows for t in tables):
        raise UserError(f"{episodes}: no episodes to train on; run jobs.generate first, and look at its table of rejects")
    together = pa.concat_tables(tables)
    columns = {n: together.column(n).to_numpy(zero_copy_only=False) for n in names}
    missing = [t for t in tasks if not (columns["task"] == t).any()]
    if missing:
        raise UserError(f"{episodes}: no episode of {', '.join(missing)}; look at the rejects, or leave the task out")
    vocabulary, bins = commands.learn(
        tasks,
        columns,
        max_words=recipe.commands.max_words,
        reward_bins=recipe.commands.reward_bins,
        rank_within=recipe.commands.rank_within,
        lowercase=recipe.student.lowercase,
        seed=recipe.seed,
    )
    return vocabulary, np.split(bins, np.cumsum([t.num_rows for t in tables])[:-1])


def load_rows(out: str, split: str) -> Rows:
    """All packed rows of ``split`` (``train`` or ``validation``), in the order of their files."""
    table = pa.concat_tables(list(iter_tables(storage.join(out, split))))
    context = table.schema.field("tokens").type.list_size

    def matrix(name: str, kind: Any) -> np.ndarray:
        flat = table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(-1, context).astype(kind)

    return Rows(matrix("tokens", np.int32), matrix("positions", np.int32), matrix("targets", bool))


def _intents(episodes: str) -> Iterator[str]:
    """Each distinct intent once, as far as its episodes stand in one file."""
    for table in iter_tables(episodes, ["intent"]):
        yield from sorted(set(table.column("intent").to_pylist()))


def _texts(episodes: str) -> Iterator[str]:
    taken = 0
    for table in iter_tables(episodes, ["intent", "prompt"]):
        for name in ("intent", "prompt"):
            for text in table.column(name).to_pylist():
                yield " " + " ".join(text.split())
        taken += table.num_rows
        if taken >= TOKENIZER_EPISODES:
            return


def _pack_all(recipe: Recipe, episodes: str, out: str, tokenizer: Any, vocabulary: Vocabulary, bins: list[np.ndarray]) -> None:
    import ray

    names = [n for n in storage.list_files(episodes) if n.endswith(".parquet")]
    pool = rare_words(_intents(episodes)) if recipe.train.swapped_copies else []
    settings = ray.put((tokenizer, vocabulary, bins, pool))

    def pack_file(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tokenizer, vocabulary, bins, pool = ray.get(settings)
        rare = frozenset(pool)
        used, slots, dropped = 0, 0, 0
        for index in batch["id"]:
            table = storage.read_table(
                storage.join(episodes, names[index]), ["intent_id", "intent", "task", "prompt", "n_words"]
            )
            # Seeded by the file, so that packing one again gives the same rows.
            rng = np.random.default_rng([recipe.seed, int(index)])
            columns = table.to_pydict()
            labels = [
                hindsight(vocabulary, task, words, int(b), recipe.commands.dropout, rng)
                for task, words, b in zip(columns["task"], columns["n_words"], bins[index], strict=True)
            ]
            intents, prompts = columns["intent"], columns["prompt"]
            held = _validation(np.array(columns["intent_id"], dtype=np.int64), recipe.train.validation)
            for split, wanted in (("train", ~held), ("validation", held)):
                triples = [(intents[i], prompts[i], labels[i]) for i in np.flatnonzero(wanted)]
                if split == "train":
                    copies = [
                        (*swapped, label)
                        for _ in range(recipe.train.swapped_copies)
                        for intent, prompt, label in triples
                        if (swapped := swap(intent, prompt, pool, rare, rng))
                    ]
                    triples += copies
                examples = encode_examples(tokenizer, vocabulary, triples, recipe.student.context)
                rows = pack(examples, recipe.student.context, tokenizer.pad_token_id)
                dropped += len(triples) - len(examples)
                used += sum(len(ids) for ids, _ in examples)
                slots += rows.tokens.size
                storage.write_table(storage.join(out, split, names[index]), _table(rows))
        return {
            "files": np.array([len(batch["id"])]),
            "used": np.array([used]),
            "slots": np.array([slots]),
            "dropped": np.array([dropped]),
        }

    dataset = ray.data.range(len(names), override_num_blocks=len(names)).map_batches(pack_file, batch_size=None, num_cpus=0.5)
    bar = Progress("tokenise and pack", len(names), "files")
    done, used, slots, dropped = 0, 0, 0, 0
    for batch in dataset.iter_batches(batch_size=None):
        done += int(batch["files"].sum())
        used += int(batch["used"].sum())
        slots += int(batch["slots"].sum())
        dropped += int(batch["dropped"].sum())
        bar.update(done)
    bar.finish(done, f"{used:,} tokens, {100 * (1 - used / max(slots, 1)):.1f}% padding, {dropped:,} too long")
    if not used:
        raise UserError(f"student.context: every one of {dropped:,} examples is longer than {recipe.student.context} tokens")


def _validation(intent_ids: np.ndarray, share: float) -> np.ndarray:
    """Which episodes belong to validation: whole intents, by a hash of their id."""
    return ((intent_ids // VALIDATION_SALT) % 10_000) < share * 10_000


def _table(rows: Rows) -> pa.Table:
    def lists(matrix: np.ndarray, kind: pa.DataType) -> pa.Array:
        flat = pa.array(matrix.reshape(-1), type=kind)
        return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])

    return pa.table(
        {
            "tokens": lists(rows.tokens, pa.int32()),
            "positions": lists(rows.positions, pa.int32()),
            "targets": lists(rows.targets, pa.bool_()),
        }
    )
