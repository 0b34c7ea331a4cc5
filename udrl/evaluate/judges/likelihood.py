"""The pointwise mutual information of prompt and intent under a causal language model, in nats per intent token.

A prompt that keeps the intent's subject makes the intent easier to guess; one that lost it does not. It needs no
instruction-following, so a small model will do. It does not see quality, and an echo of the intent maximises it.
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
        model_path: a local folder, or a Hugging Face id, of a causal language model with its tokenizer.
        batch_size: sequences of one forward pass.
        dtype: of the weights; ``auto`` is bfloat16 where the machine multiplies it natively, else float32.
        threads: of torch on a CPU; default: as torch finds them. Ray sets OMP_NUM_THREADS=1 for one-CPU actors.
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
        weights = native_dtype() if dtype == "auto" else getattr(torch, dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=weights, **source)
        self.model = model.to(self.device).eval()
        self.priors: dict[str, float] = {}  # an intent has many prompts, over tasks, policies and samples
        self.positions = int(getattr(model.config, "max_position_embeddings", 1 << 20))

    def score(self, prompts: Sequence[str], intents: Sequence[str]) -> np.ndarray:
        """PMI of each pair in nats per intent token, shape (pairs,); NaN where a text is empty."""
        scores = np.full(len(prompts), np.nan)
        known = [i for i, (p, t) in enumerate(zip(prompts, intents, strict=True)) if p.strip() and t.strip()]
        fresh = sorted({intents[i] for i in known} - self.priors.keys())
        self.priors.update(zip(fresh, self.log_likelihoods([WITHOUT_PROMPT] * len(fresh), fresh).tolist(), strict=True))
        contexts = [WITH_PROMPT.format(prompt=" ".join(prompts[i].split())) for i in known]
        given = self.log_likelihoods(contexts, [intents[i] for i in known])
        scores[known] = given - np.array([self.priors[intents[i]] for i in known])
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
