"""Relevance by embeddings: the cosine similarity of intent and prompt (all-MiniLM-L6-v2 class models).

The scoring pass holds an embedder in each of its workers; the evaluation keeps one in a Ray actor.
"""

from typing import Any

import numpy as np

from udrl import cluster, models
from udrl.context import StageContext
from udrl.errors import StalledError
from udrl.recipe import Rewards

MAX_CHARACTERS = 8192  # the model reads some hundred tokens, but the tokenizer would process a whole megabyte first


class Embedder:
    """A sentence-transformers model on GPU or CPU. Loading takes a few seconds; keep one in a Ray actor.

    ``threads`` sets torch's CPU threads; None keeps torch's default.
    """

    def __init__(self, model: str, batch_size: int, threads: int | None = None) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        if threads:
            torch.set_num_threads(threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = SentenceTransformer(models.resolve(model), device=device, model_kwargs={"dtype": torch.bfloat16})
        self.batch_size = batch_size

    def embed(self, texts: list[str]) -> np.ndarray:
        """Return unit vectors, float32 of shape (texts, dimensions). Equal texts are embedded once.

        ``encode`` sorts the texts by length, so that batches have little padding.
        """
        distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        vectors = self.model.encode(
            [text[:MAX_CHARACTERS] for text in distinct],
            batch_size=self.batch_size,
            convert_to_tensor=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return vectors.float().cpu().numpy()[[distinct[text] for text in texts]]

    def relevance(self, intents: list[str], prompts: list[str]) -> np.ndarray:
        """Return the cosine of each pair, clipped to 0..1, float32 of shape (pairs,)."""
        if not prompts:
            return np.zeros(0, dtype=np.float32)
        vectors = self.embed(intents + prompts)
        cosine = np.einsum("ij,ij->i", vectors[: len(intents)], vectors[len(intents) :])
        return np.clip(cosine, 0, 1).astype(np.float32)


class EmbeddingActor:
    """The embedder in a Ray actor with the placement of ``rewards``; it starts at the first call."""

    def __init__(self, rewards: Rewards, context: StageContext) -> None:
        self.rewards, self.context = rewards, context
        self._actor: Any = None

    def embed(self, texts: list[str]) -> np.ndarray:
        """Return unit vectors of shape (texts, dimensions)."""
        return self._call("embed", texts)

    def relevance(self, intents: list[str], prompts: list[str]) -> np.ndarray:
        """Return the cosine of each pair, shape (pairs,); NaN if a judge scores relevance, since its scale differs."""
        if self.rewards.relevance != "embedding" or not intents:
            return np.full(len(intents), np.nan)
        return self._call("relevance", intents, prompts)

    def release(self) -> None:
        """Free the actor's resources; the next call starts another."""
        import ray

        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None

    def _call(self, method: str, *arguments: Any) -> np.ndarray:
        import ray
        from ray.exceptions import GetTimeoutError

        self._actor = self._actor or self._start()
        minutes = self.context.watchdog_minutes
        try:
            return ray.get(getattr(self._actor, method).remote(*arguments), timeout=60 * minutes)
        except GetTimeoutError as error:
            raise StalledError(f"evaluate: {self.rewards.embedder}: no answer for {minutes:g} minutes") from error

    def _start(self) -> Any:
        import ray

        from udrl.scoring.embedder import Embedder

        place = self.rewards.placement
        options: dict[str, Any] = {"num_cpus": place.cpus, "num_gpus": place.gpus}
        if place.accelerator:
            options["accelerator_type"] = place.accelerator
        threads = None if place.gpus else place.threads or cluster.cpu_count()
        return ray.remote(**options)(Embedder).remote(self.rewards.embedder, self.rewards.batch_size, threads)
