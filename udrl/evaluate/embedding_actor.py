"""The embedder of the training reward, in a Ray actor of the evaluation."""

from typing import Any

import numpy as np

from udrl import cluster
from udrl.context import StageContext
from udrl.errors import StalledError
from udrl.recipe import Rewards


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
