"""What the student writes while it trains, and how well it keeps to the commanded length, on a few held-out intents."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from udrl import tokenizer as tokenizers
from udrl.commands import ANY, END, Command, CommandVocabulary
from udrl.text import count_words

# SampleResult, not greedy: a young student is greedy in loops, and is never asked that way once it serves.
TEMPERATURE = 0.7
# Up to this width a token's products are so small that threads wait for one another: on two busy cores, 48 prompts of 72 tokens
# from a 5 x 320 student took 81 s with two threads and 4 s with one.
SMALL = 512
NEAR = 2  # words from the commanded length that still count as kept


@dataclass(frozen=True)
class Sample:
    """One prompt that the student wrote. ``ended`` is false where its tokens ran out before ``<|end|>``."""

    intent: str
    command: Command
    text: str
    words: int
    ended: bool


@dataclass(frozen=True)
class Observation:
    """``metrics`` are ready for a tracker; without commanded lengths only ``words`` (their mean) is there."""

    samples: list[Sample]
    metrics: dict[str, float]

    def markdown(self, of_each: int = 4) -> str:
        """A table of a few samples of each task."""
        lines = ["| task | intent | asked | words | prompt |", "| --- | --- | --- | --- | --- |"]
        for task in dict.fromkeys(s.command.task for s in self.samples):
            for s in [s for s in self.samples if s.command.task == task][:of_each]:
                text = s.text + ("" if s.ended else " ...")
                cells = [task, s.intent, _asked(s.command), str(s.words), text]
                lines.append(f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in cells)} |")
        return "\n".join(lines)


def observe(
    network: Any,
    tokenizer: Any,
    vocabulary: CommandVocabulary,
    held: Sequence[dict[str, Any]],
    seed: int,
    max_new_tokens: int,
    *,
    commanded: bool = True,
    synced: bool = False,
) -> Observation:
    """Let the network as it trains write prompts for ``held`` and count their words.

    Each intent is asked for three lengths (the task's p5, median and p95) at the task's default reward, drawn at
    temperature 0.7 by ``seed``: with one seed, two observations differ by the weights alone. Training is not disturbed: the
    random state and the network's mode are as before.

    Args:
        network: a ``GPT2LMHeadModel``, bf16 or fp32, on any device.
        held: dicts with ``task`` and ``intent``. One whose request leaves no room in the network's positions is left out.
        commanded: false for a student that learnt no commands; it is asked once an intent for any length and reward.
        synced: every rank calls it at the same time with the same arguments, as ZeRO-3 needs, where each forward pass gathers
            the weights.

    Returns:
        Samples in the order of ``held``, and the metrics ``length_error`` (mean distance in words from what was asked),
        ``within_two`` (share at most two words off) and ``words``, over all and as ``<metric>/<task>``.
    """
    room = min(max_new_tokens, network.config.n_positions // 2)
    asked = []
    for row in held:
        for command in _commands(vocabulary, row["task"]) if commanded else [Command(task=row["task"])]:
            ids = tokenizers.encode_request(tokenizer, vocabulary, row["intent"], command)
            if len(ids) + room <= network.config.n_positions:
                asked.append((row["intent"], command, ids))
    if not asked:
        return Observation([], {})
    banned = tokenizers.banned_ids(tokenizer, vocabulary)
    written = _generate(network, tokenizer, [ids for *_, ids in asked], banned, room, seed, synced)
    end = tokenizers.control_ids(tokenizer, [END])[0]
    samples = []
    for (intent, command, _), ids in zip(asked, written, strict=True):
        ended = end in ids
        text = tokenizer.decode(ids[: ids.index(end)] if ended else ids).strip()
        samples.append(Sample(intent, command, text, count_words(text), ended))
    return Observation(samples, _metrics(samples))


def _commands(vocabulary: CommandVocabulary, task: str) -> list[Command]:
    learnt = vocabulary.tasks[task]
    lengths = sorted({min(max(n, 1), vocabulary.max_words) for n in learnt.words})
    return [Command(task=task, words=n, reward=learnt.default_reward) for n in lengths]


def _generate(
    network: Any, tokenizer: Any, requests: list[list[int]], banned: list[int], room: int, seed: int, synced: bool
) -> list[list[int]]:
    """Token ids that follow each request, as one batch padded on the left."""
    import torch

    device = network.lm_head.weight.device
    longest = max(map(len, requests))
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(r)) + r for r in requests], device=device)
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in requests], device=device)
    with _undisturbed(network, device), torch.no_grad():
        torch.manual_seed(seed)
        out = network.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=room,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,  # transformers would take 50
            suppress_tokens=banned,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            synced_gpus=synced,
        )
    return out[:, longest:].tolist()


@contextmanager
def _undisturbed(network: Any, device: Any) -> Iterator[None]:
    """Evaluation mode, and random draws that the training never sees."""
    import torch

    was_training, threads = network.training, torch.get_num_threads()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        network.eval()
        if device.type == "cpu" and network.config.n_embd <= SMALL:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            network.train(was_training)
            torch.set_num_threads(threads)


def _metrics(samples: list[Sample]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    tasks = list(dict.fromkeys(s.command.task for s in samples))
    for task in [None, *tasks]:
        mine = [s for s in samples if task is None or s.command.task == task]
        end = f"/{task}" if task else ""
        off = np.array([abs(s.words - s.command.words) for s in mine if s.command.words != ANY])
        if len(off):
            metrics[f"length_error{end}"] = float(off.mean())
            metrics[f"within_two{end}"] = float((off <= NEAR).mean())
        metrics[f"words{end}"] = float(np.mean([s.words for s in mine]))
    return metrics


def _asked(command: Command) -> str:
    words = "any length" if command.words == ANY else f"{command.words} words"
    return f"{words}, {'any reward' if command.reward == ANY else f'reward {command.reward}'}"
