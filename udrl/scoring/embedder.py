"""Relevance by embeddings: the cosine similarity of intent and prompt (all-MiniLM-L6-v2 class models)."""

import numpy as np

from udrl import models

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
