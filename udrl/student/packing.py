"""Sequences and packing: episodes become token rows of one length, several examples a row.

A sequence is ``intent, task, words, reward, prompt, <|end|>``; only prompt and ``<|end|>`` carry loss.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from udrl import commands
from udrl.commands import ANY, Command, Vocabulary
from udrl.student.tokenizer import control_ids, encode_text


@dataclass(frozen=True)
class Rows:
    """Packed rows, each array of shape (rows, context)."""

    tokens: np.ndarray  # int32
    positions: np.ndarray  # int32, 0 where an example starts
    targets: np.ndarray  # bool, what carries loss

    def __len__(self) -> int:
        return len(self.tokens)


def hindsight(vocabulary: Vocabulary, task: str, n_words: int, bin_: int, dropout: float, rng: np.random.Generator) -> Command:
    """The command that an episode turned out to fulfil. With probability ``dropout`` all of it but the task becomes 'any',
    and each half alone as often, so that the student also knows partial commands."""
    words = n_words if 1 <= n_words <= vocabulary.max_words else ANY
    whole, no_words, no_reward = rng.random(3) < dropout
    return Command(
        task=task,
        words=ANY if whole or no_words else words,
        reward=ANY if whole or no_reward else bin_,
    )


def encode_examples(
    tokenizer: Any, vocabulary: Vocabulary, triples: list[tuple[str, str, Command]], context: int
) -> list[tuple[list[int], int]]:
    """Token ids of each (intent, prompt, command) and where its targets begin; those over ``context`` are left out."""
    end = control_ids(tokenizer, [commands.END])
    if not triples:
        return []
    heads = encode_text(tokenizer, [intent for intent, _, _ in triples])
    bodies = encode_text(tokenizer, [prompt for _, prompt, _ in triples])
    examples = []
    for head, body, (_, _, label) in zip(heads, bodies, triples, strict=True):
        start = [*head, *control_ids(tokenizer, vocabulary.tokens(label))]
        ids = [*start, *body, *end]
        if len(ids) <= context:
            examples.append((ids, len(start)))
    return examples


def pack(examples: list[tuple[list[int], int]], context: int, pad_id: int) -> Rows:
    """Best-fit decreasing: each example goes to the fullest row that still holds it. Deterministic.

    Padding is left only where no example fits; it carries no loss and its position is 0, so it attends to itself alone.
    """
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i][0]), i))
    by_space: list[list[int]] = [[] for _ in range(context + 1)]  # rows by their free space
    rows: list[list[int]] = []
    for i in order:
        need = len(examples[i][0])
        space = next((s for s in range(need, context + 1) if by_space[s]), None)
        if space is None:
            rows.append([i])
            by_space[context - need].append(len(rows) - 1)
        else:
            row = by_space[space].pop()
            rows[row].append(i)
            by_space[space - need].append(row)
    tokens = np.full((len(rows), context), pad_id, dtype=np.int32)
    positions = np.zeros((len(rows), context), dtype=np.int32)
    targets = np.zeros((len(rows), context), dtype=bool)
    for r, members in enumerate(rows):
        at = 0
        for i in members:
            ids, start = examples[i]
            tokens[r, at : at + len(ids)] = ids
            positions[r, at : at + len(ids)] = np.arange(len(ids))
            targets[r, at + start : at + len(ids)] = True
            at += len(ids)
    return Rows(tokens, positions, targets)
