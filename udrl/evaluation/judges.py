"""Judges that score outputs independently of the scorer that made the training reward.

``likelihood``: the pointwise mutual information of prompt and intent under a causal language model, in nats per intent
token. A prompt that keeps the intent's subject makes the intent easier to guess; one that lost it does not. It needs no
instruction-following, so a small model will do. It does not see quality, and an echo of the intent maximises it: echoes
must be rejected before (they are), and :func:`validate` tells whether the judge can tell right pairs from wrong ones.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from udrl.progress import Progress

WITH_PROMPT = 'A designer wrote this: "{prompt}". The short request behind it was:'
WITHOUT_PROMPT = "A designer wrote something. The short request behind it was:"


class LikelihoodJudge:
    """Scores ``log p(intent | prompt) - log p(intent)`` per intent token; a Ray Data actor by its ``__call__``.

    Args:
        model_path: a local folder of a Hugging Face causal language model with its tokenizer.
        batch_size: sequences of one forward pass.
        dtype: of the weights; ``auto`` is bfloat16 where the machine multiplies it natively, else float32.
        threads: of torch on a CPU; default: as torch finds them. Ray sets OMP_NUM_THREADS=1 for one-CPU actors.
    """

    def __init__(self, model_path: str, batch_size: int = 32, dtype: str = "auto", threads: int | None = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if threads:
            torch.set_num_threads(threads)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.batch_size = batch_size
        self.tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
        weights = native_dtype() if dtype == "auto" else getattr(torch, dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=weights, local_files_only=True)
        self.model = model.to(self.device).eval()
        self.priors: dict[str, float] = {}  # an intent has many prompts, over tasks, policies and samples
        self.positions = int(getattr(model.config, "max_position_embeddings", 1 << 20))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Add the column ``judge`` (float32) from ``prompt`` and ``intent``; NaN where the prompt is empty."""
        return {**batch, "judge": self.score(list(batch["prompt"]), list(batch["intent"])).astype(np.float32)}

    def score(self, prompts: Sequence[str], intents: Sequence[str], progress: Progress | None = None) -> np.ndarray:
        """PMI of each pair in nats per intent token, shape (pairs,); NaN where a text is empty."""
        scores = np.full(len(prompts), np.nan)
        known = [i for i, (p, t) in enumerate(zip(prompts, intents, strict=True)) if p.strip() and t.strip()]
        fresh = sorted({intents[i] for i in known} - self.priors.keys())
        self.priors.update(zip(fresh, self.log_likelihoods([WITHOUT_PROMPT] * len(fresh), fresh).tolist(), strict=True))
        step = 8 * self.batch_size  # enough rows to sort by length, few enough for the progress to move
        for at in range(0, len(known), step):
            some = known[at : at + step]
            contexts = [WITH_PROMPT.format(prompt=" ".join(prompts[i].split())) for i in some]
            given = self.log_likelihoods(contexts, [intents[i] for i in some])
            scores[some] = given - np.array([self.priors[intents[i]] for i in some])
            if progress:
                progress.update(min(at + step, len(known)))
        return scores

    def log_likelihoods(self, contexts: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        """Mean ``log p(token)`` over the tokens of each text after its context, shape (texts,), in nats."""
        heads, tails = self._encode(contexts, start=True), self._encode([" " + " ".join(t.split()) for t in texts], start=False)
        # Longest first, so that a batch too large for the memory fails at once, and neighbours need little padding.
        order = sorted(range(len(heads)), key=lambda i: len(heads[i]) + len(tails[i]), reverse=True)
        found = np.empty(len(heads))
        for at in range(0, len(order), self.batch_size):
            some = order[at : at + self.batch_size]
            found[some] = self._forward([heads[i] for i in some], [tails[i] for i in some])
        return found

    def _encode(self, texts: Sequence[str], start: bool) -> list[list[int]]:
        """Context and text are encoded apart, so that the text has the same tokens with and without the prompt. What users
        typed never becomes a special token."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        begin = self.tokenizer.bos_token_id
        return [[begin, *one] for one in ids] if start and begin is not None else ids

    def _forward(self, heads: list[list[int]], tails: list[list[int]]) -> np.ndarray:
        """One batch, padded on the left: the texts then end together, and logits are made for their positions alone."""
        import torch

        # Too long for the model: the end of the context, which asks the question, and the start of the text stay.
        tails = [tail[: self.positions // 2] for tail in tails]
        heads = [head[-(self.positions - len(tail)) :] for head, tail in zip(heads, tails, strict=True)]
        rows = [head + tail for head, tail in zip(heads, tails, strict=True)]
        width, longest = max(map(len, rows)), max(map(len, tails))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)
        scored = torch.tensor([[0] * (longest - len(tail)) + [1] * len(tail) for tail in tails], device=self.device)
        with torch.inference_mode():
            logits = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                logits_to_keep=longest + 1,  # the logits that foretell a token stand one position before it
                use_cache=False,
            ).logits
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), ids[:, -longest:].flatten(), reduction="none"
            ).view(len(rows), longest)
            means = -(losses * scored).sum(1) / scored.sum(1)
        return means.double().cpu().numpy()


def native_dtype() -> Any:
    """bfloat16 on a GPU, and on a CPU that multiplies it in hardware; float32 elsewhere, where bfloat16 is emulated."""
    import torch

    native = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def score(
    model_path: str, prompts: list[str], intents: list[str], batch_size: int = 32, progress: Progress | None = None
) -> np.ndarray:
    """Load a judge and score pairs in this process; see :class:`LikelihoodJudge`."""
    return LikelihoodJudge(model_path, batch_size).score(prompts, intents, progress)


Scorer = Callable[[Sequence[str], Sequence[str]], np.ndarray]


def validate(
    scorer: Scorer,
    prompts: Sequence[str],
    intents: Sequence[str],
    tasks: Sequence[str],
    scores: np.ndarray | None = None,
    *,
    limit: int = 50,
    seed: int = 0,
) -> dict[str, Any]:
    """Can the judge tell true pairs from shuffled ones? At most ``limit`` pairs a task are drawn by ``seed``.

    Each prompt is scored with its own intent (``scores``, if they are known already) and with another intent of its task.

    Returns:
        ``auc`` over all (0.5 is chance, 1 is perfect), ``tasks`` the same per task, ``pairs`` scored. A task with one
        intent has nothing to shuffle: NaN.
    """
    chosen = _draw(prompts, tasks, limit, seed)
    some_prompts, some_intents, some_tasks = ([column[i] for i in chosen] for column in (prompts, intents, tasks))
    true = scorer(some_prompts, some_intents) if scores is None else np.asarray(scores, dtype=float)[chosen]
    false = scorer(some_prompts, shuffled(some_intents, some_tasks, seed))
    usable = ~np.isnan(true) & ~np.isnan(false)
    of_task = {task: usable & np.array([t == task for t in some_tasks], dtype=bool) for task in sorted(set(tasks))}
    return {
        "auc": auc(true[usable], false[usable]),
        "tasks": {task: auc(true[here], false[here]) for task, here in of_task.items()},
        "pairs": int(usable.sum()),
    }


def _draw(prompts: Sequence[str], tasks: Sequence[str], limit: int, seed: int) -> list[int]:
    order = np.random.default_rng(seed).permutation(len(prompts))
    taken: dict[str, list[int]] = {}
    for i in order:
        if prompts[i].strip() and len(taken.setdefault(tasks[i], [])) < limit:
            taken[tasks[i]].append(int(i))
    return [i for task in sorted(taken) for i in taken[task]]


def shuffled(intents: Sequence[str], tasks: Sequence[str], seed: int = 0) -> list[str]:
    """For each row another intent of its task, never its own; empty where the task has no other. Each intent of a task
    stands in for exactly one other, so that the right and the wrong side hold equally hard intents."""
    rng = np.random.default_rng(seed)
    successor: dict[tuple[str, str], str] = {}
    for task in sorted(set(tasks)):
        ring = sorted({intent for intent, t in zip(intents, tasks, strict=True) if t == task})
        rng.shuffle(ring)
        for here, there in zip(ring, [*ring[1:], ring[0]], strict=True):
            successor[task, here] = there if there != here else ""
    return [successor[task, intent] for intent, task in zip(intents, tasks, strict=True)]


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a true pair scores above a false one, ties counting half (Mann-Whitney U over the pairs)."""
    from scipy import stats

    if not len(positive) or not len(negative):
        return float("nan")
    return float(stats.mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))
