"""Observe a training: samples of the student with their lengths, subjects and rewards, and model FLOPs utilization (MFU).

``MFU = tokens_per_second * train_flops_per_token(config, context) / (peak_flops_per_second(device, dtype) * workers)``, as in
PaLM (arXiv 2204.02311, appendix B). The peak is the data sheet's for a known GPU, otherwise measured.
"""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from udrl import tokenizer as tokenizers
from udrl.commands import ANY, END, Command, CommandVocabulary
from udrl.intents.content_words import coverage, naming_words
from udrl.recipe import Rewards
from udrl.run import ValidationIntent
from udrl.scoring.embedder import Embedder
from udrl.scoring.parsing import parse
from udrl.scoring.rewards import score_prompts
from udrl.tasks import Task
from udrl.text import count_words, markdown_table

# Not greedy: an undertrained student loops when it is greedy, and it is never served that way.
TEMPERATURE = 0.7
# Widths up to this one sample with one thread: a token's matrix products are so small that threads wait for each other. On two
# busy cores, 48 prompts of 72 tokens from a 5 x 320 student took 81 s with two threads and 4 s with one.
SINGLE_THREAD_WIDTH = 512
WITHIN_WORDS = 2  # distance in words from the commanded length that counts as kept, in the metric ``within_two``


@dataclass(frozen=True)
class StudentSample:
    """One prompt that the student wrote.

    ``coverage`` is the share of the words that name the intent's subject. ``ended`` is false if the prompt reached the token
    limit before ``<|end|>``.
    """

    intent: str
    command: Command
    text: str
    words: int
    coverage: float
    ended: bool


@dataclass(frozen=True)
class Observation:
    """Samples and their metrics, ready for a tracker. Without commanded lengths there is no metric of their errors."""

    samples: list[StudentSample]
    metrics: dict[str, float]

    def markdown(self, samples_per_task: int = 4) -> str:
        """Return a table of a few samples of each task."""
        rows = []
        for task in dict.fromkeys(s.command.task for s in self.samples):
            for s in [s for s in self.samples if s.command.task == task][:samples_per_task]:
                text = s.text + ("" if s.ended else " ...")
                cells = [task, s.intent, _describe_command(s.command), str(s.words), text]
                rows.append([" ".join(cell.split()) for cell in cells])
        return markdown_table(["task", "intent", "command", "words", "prompt"], rows)


def observe(
    network: Any,
    tokenizer: Any,
    vocabulary: CommandVocabulary,
    intents: Sequence[ValidationIntent],
    seed: int,
    max_new_tokens: int,
    *,
    commanded: bool = True,
    synced: bool = False,
    scorer: "SampleScorer | None" = None,
) -> Observation:
    """Let the network write prompts for ``intents``, and measure them.

    Each intent gets three commands: the task's p5, median and p95 lengths at its default reward. Sampling is seeded, so two
    observations with one seed differ only by the weights. Training is not disturbed: the random state and the network's mode
    are restored.

    Args:
        network: a ``GPT2LMHeadModel``, bf16 or fp32, on any device.
        intents: one whose request leaves no room for ``max_new_tokens`` in the network's positions is skipped.
        commanded: false for a student that was trained without commands; each intent then gets the "any" command once.
        synced: every rank calls it at the same time with the same arguments, which ZeRO-3 needs: each forward pass gathers the
            weights.
        scorer: gives the samples' rewards.

    Returns:
        Samples in the order of ``intents``, and the metrics ``length_error`` (mean distance from the commanded length in
        words), ``within_two`` (share at most two words off), ``words``, ``coverage`` (mean share of the subject's words) and,
        with a scorer, ``reward`` (0 if rejected), over all tasks and as ``<metric>/<task>``.
    """
    max_new_tokens = min(max_new_tokens, network.config.n_positions // 2)
    requests = []
    for row in intents:
        for command in _length_commands(vocabulary, row.task) if commanded else [Command(task=row.task)]:
            ids = tokenizers.encode_request(tokenizer, vocabulary, row.intent, command)
            if len(ids) + max_new_tokens <= network.config.n_positions:
                requests.append((row.intent, command, ids))
    if not requests:
        return Observation([], {})
    banned = tokenizers.banned_ids(tokenizer, vocabulary)
    completions = _generate(network, tokenizer, [ids for *_, ids in requests], banned, max_new_tokens, seed, synced)
    end = tokenizers.control_ids(tokenizer, [END])[0]
    samples = []
    for (intent, command, _), ids in zip(requests, completions, strict=True):
        ended = end in ids
        text = tokenizer.decode(ids[: ids.index(end)] if ended else ids).strip()
        samples.append(StudentSample(intent, command, text, count_words(text), coverage(naming_words(intent), text), ended))
    return Observation(samples, _sample_metrics(samples, scorer.score(samples) if scorer else None))


class SampleScorer:
    """The reward that the run's scoring would give to samples, 0 if it would reject them."""

    def __init__(self, tasks: Sequence[Task], rewards: Rewards) -> None:
        self.tasks, self.weights = {task.name: task for task in tasks}, rewards.weights
        self.embedder = Embedder(rewards.embedder, rewards.batch_size)

    def score(self, samples: Sequence[StudentSample]) -> np.ndarray:
        """Return the rewards, float (samples,)."""
        rewards = np.zeros(len(samples))
        parsed = [
            parse(self.tasks[s.command.task], s.intent, s.text, "stop" if s.ended else "length", error="") for s in samples
        ]
        accepted = [i for i, (_, reason, _) in enumerate(parsed) if reason is None]
        intents, prompts = [samples[i].intent for i in accepted], [parsed[i][0] for i in accepted]
        commands = [samples[i].command for i in accepted]
        rewards[accepted] = score_prompts(
            intents,
            prompts,
            [self.tasks[command.task] for command in commands],
            [command.words for command in commands],
            self.embedder.relevance(intents, prompts),
            self.weights,
        )["reward"]
        return rewards


def _length_commands(vocabulary: CommandVocabulary, task: str) -> list[Command]:
    statistics = vocabulary.tasks[task]
    lengths = sorted({min(max(n, 1), vocabulary.max_words) for n in statistics.words})
    return [Command(task=task, words=n, reward=statistics.default_reward) for n in lengths]


def _generate(
    network: Any, tokenizer: Any, requests: list[list[int]], banned: list[int], max_new_tokens: int, seed: int, synced: bool
) -> list[list[int]]:
    """Return the token ids that follow each request, as one batch padded on the left."""
    import torch

    device = network.lm_head.weight.device
    longest = max(map(len, requests))
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(r)) + r for r in requests], device=device)
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in requests], device=device)
    with _evaluation_mode(network, device), torch.no_grad():
        torch.manual_seed(seed)
        out = network.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,  # transformers' default is 50
            suppress_tokens=banned,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            synced_gpus=synced,
        )
    return out[:, longest:].tolist()


@contextmanager
def _evaluation_mode(network: Any, device: Any) -> Iterator[None]:
    """Put the network in evaluation mode; restore mode, random state and threads afterwards."""
    import torch

    was_training, threads = network.training, torch.get_num_threads()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        network.eval()
        if device.type == "cpu" and network.config.n_embd <= SINGLE_THREAD_WIDTH:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            network.train(was_training)
            torch.set_num_threads(threads)


def _sample_metrics(samples: list[StudentSample], rewards: np.ndarray | None) -> dict[str, float]:
    metrics: dict[str, float] = {}
    tasks = list(dict.fromkeys(s.command.task for s in samples))
    for task in [None, *tasks]:
        numbers = [i for i, s in enumerate(samples) if task is None or s.command.task == task]
        selected = [samples[i] for i in numbers]
        suffix = f"/{task}" if task else ""
        errors = np.array([abs(s.words - s.command.words) for s in selected if s.command.words != ANY])
        if len(errors):
            metrics[f"length_error{suffix}"] = float(errors.mean())
            metrics[f"within_two{suffix}"] = float((errors <= WITHIN_WORDS).mean())
        metrics[f"words{suffix}"] = float(np.mean([s.words for s in selected]))
        metrics[f"coverage{suffix}"] = float(np.mean([s.coverage for s in selected]))
        if rewards is not None:
            metrics[f"reward{suffix}"] = float(rewards[numbers].mean())
    return metrics


def _describe_command(command: Command) -> str:
    words = "any length" if command.words == ANY else f"{command.words} words"
    return f"{words}, {'any reward' if command.reward == ANY else f'reward {command.reward}'}"


# 10^12 operations per second of dense bf16 products, by a word of the device's name; from NVIDIA's data sheets.
PEAK_TERAFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "L40S": 362,
    "A100": 312,
    "A10G": 70,
    "A10": 125,
    "L4": 121,
}
MATRIX_SIZES = {"cpu": 1024, "cuda": 8192}  # rows of the square matrices: large enough to be bound by arithmetic


def train_flops_per_token(config: Any, context: float, target_share: float = 1.0) -> float:
    """Return the floating-point operations to train on one token, forward and backward: ``6 N + 12 L d T``.

    N counts the weights that a token is multiplied with: L layers of ``4 d^2 + 2 d f``, and the output matrix ``V d``; the
    embedding lookup is free. The second term is attention's two products (queries with keys, weights with values) over T
    tokens. Biases, norms and activations are left out, as in PaLM's appendix B.

    Args:
        config: a ``GPT2Config``.
        context: T, the tokens of a row. By convention neither causality nor the mask of packing is deducted, because a kernel
            with a dense mask computes the hidden part as well. For a kernel that skips it, give the mean length of a packed
            example, weighted by tokens.
        target_share: share of the tokens whose logits are computed; ``packed_loss`` computes only those of targets.
    """
    inner = config.n_inner or 4 * config.n_embd
    weights = config.n_layer * (4 * config.n_embd**2 + 2 * config.n_embd * inner)
    weights += target_share * config.vocab_size * config.n_embd
    return 6.0 * weights + 12.0 * config.n_layer * config.n_embd * context


def peak_flops_per_second(device: Any, dtype: Any) -> float:
    """Return the operations per second that a device can do: of the data sheet, else as measured."""
    import torch

    device = torch.device(device)
    known = peak_of_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" and dtype == torch.bfloat16 else None
    return known or matmul_flops_per_second(device, dtype)


def peak_of_gpu(name: str) -> float | None:
    """Return the operations per second of dense bf16 products that the data sheet of a GPU gives; None if it is not known."""
    models = (teraflops for model, teraflops in PEAK_TERAFLOPS.items() if re.search(rf"\b{model}\b", name))
    return next((teraflops * 1e12 for teraflops in models), None)


def matmul_flops_per_second(device: Any, dtype: Any, seconds: float = 0.3) -> float:
    """Return the operations per second of a square matrix product, the best of several over about ``seconds``.

    The best, because other work on the machine only ever slows one down. On a CPU it uses torch's current number of threads.
    Workers that share a machine share this rate: measure in all of them at the same time, or divide.
    """
    import torch

    device = torch.device(device)
    n = MATRIX_SIZES.get(device.type, MATRIX_SIZES["cuda"])
    # A generator of its own: the measurement must not change the random state of the training.
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, n, generator=generator).to(device, dtype)
    out = torch.empty_like(a)

    def time_product() -> float:
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for _ in range(2):  # warm-up: loads and selects kernels
        time_product()
    times = [time_product()]
    while sum(times) < seconds or len(times) < 3:
        times.append(time_product())
    return 2.0 * n**3 / min(times)
