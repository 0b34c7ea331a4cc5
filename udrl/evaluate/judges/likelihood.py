"""The pointwise mutual information of prompt and intent under a causal language model, in nats per intent token.

A prompt that keeps the intent's subject makes the intent easier to guess; one that lost it does not. This needs no
instruction following, so a small model is enough. It does not see quality, and an echo of the intent maximizes it.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

WITH_PROMPT = 'A designer wrote this: "{prompt}". The short request behind it was:'
WITHOUT_PROMPT = "A designer wrote something. The short request behind it was:"


class LikelihoodJudge:
    """Scores ``log p(intent | prompt) - log p(intent)`` per intent token.

    Args:
        model_path: local folder, or Hugging Face id, of a causal language model with its tokenizer.
        batch_size: sequences of one forward pass.
        dtype: of the weights; ``auto`` is bfloat16 if the hardware multiplies it natively, else float32.
        threads: of torch on a CPU; None leaves torch's own number. Ray sets OMP_NUM_THREADS=1 for one-CPU actors.
        revision: of a model on a hub.
    """

    def __init__(
        self,
        model_path: str,
        batch_size: int = 32,
        dtype: str = "auto",
        threads: int | None = None,
        revision: str | None = None,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if threads:
            torch.set_num_threads(threads)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.batch_size = batch_size
        source: dict[str, Any] = {"local_files_only": True} if os.path.isdir(model_path) else {"revision": revision}
        self.tokenizer = AutoTokenizer.from_pretrained(model_path, **source)
        weights = _native_dtype() if dtype == "auto" else getattr(torch, dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=weights, **source)
        self.model = model.to(self.device).eval()
        self.priors: dict[str, float] = {}  # by intent: it has many prompts, over tasks, policies and samples
        self.max_positions = int(getattr(model.config, "max_position_embeddings", 1 << 20))

    def score(self, prompts: Sequence[str], intents: Sequence[str]) -> np.ndarray:
        """Return the PMI of each pair in nats per intent token, shape (pairs,); NaN if a text is empty."""
        scores = np.full(len(prompts), np.nan)
        scored = [i for i, (p, t) in enumerate(zip(prompts, intents, strict=True)) if p.strip() and t.strip()]
        new = sorted({intents[i] for i in scored} - self.priors.keys())
        self.priors.update(zip(new, self.log_likelihoods([WITHOUT_PROMPT] * len(new), new).tolist(), strict=True))
        contexts = [WITH_PROMPT.format(prompt=" ".join(prompts[i].split())) for i in scored]
        conditional = self.log_likelihoods(contexts, [intents[i] for i in scored])
        scores[scored] = conditional - np.array([self.priors[intents[i]] for i in scored])
        return scores

    def log_likelihoods(self, contexts: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        """Return the mean ``log p(token)`` of each text after its context in nats, shape (texts,)."""
        heads, tails = self._encode(contexts, start=True), self._encode([" " + " ".join(t.split()) for t in texts], start=False)
        # Longest first: a batch too large for the memory fails at once, and neighbors need little padding.
        order = sorted(range(len(heads)), key=lambda i: len(heads[i]) + len(tails[i]), reverse=True)
        means = np.empty(len(heads))
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            means[batch] = self._forward([heads[i] for i in batch], [tails[i] for i in batch])
        return means

    def _encode(self, texts: Sequence[str], start: bool) -> list[list[int]]:
        """Encode contexts and texts separately, so that a text has the same tokens with and without the prompt.

        User text never becomes a special token.
        """
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        bos = self.tokenizer.bos_token_id
        return [[bos, *row] for row in ids] if start and bos is not None else ids

    def _forward(self, heads: list[list[int]], tails: list[list[int]]) -> np.ndarray:
        """Run one batch, padded on the left: all texts end together, and only their positions need logits."""
        import torch

        # If a pair is too long for the model, the end of the context (the question) and the start of the text stay.
        tails = [tail[: self.max_positions // 2] for tail in tails]
        heads = [head[-(self.max_positions - len(tail)) :] for head, tail in zip(heads, tails, strict=True)]
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
                logits_to_keep=longest + 1,  # the logits that predict a token are one position before it
                use_cache=False,
            ).logits
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), ids[:, -longest:].flatten(), reduction="none"
            ).view(len(rows), longest)
            means = -(losses * scored).sum(1) / scored.sum(1)
        return means.double().cpu().numpy()


def _native_dtype() -> Any:
    """bfloat16 on a GPU or a CPU that multiplies it in hardware; float32 elsewhere, since bfloat16 is emulated there."""
    import torch

    is_native = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if is_native else torch.float32
