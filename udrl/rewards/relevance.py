"""Relevance in bulk: cosine similarity of intent and prompt embeddings (all-MiniLM-L6-v2 class models)."""

import numpy as np

from udrl import models


class Embedder:
    """A sentence-transformers model on GPU or CPU. Loading takes a few seconds; keep one in a Ray actor."""

    def __init__(self, model: str, batch_size: int) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = SentenceTransformer(models.resolve(model), device=device, model_kwargs={"dtype": torch.bfloat16})
        self.batch_size = batch_size

    def embed(self, texts: list[str]) -> np.ndarray:
        """Unit vectors, float32 of shape (texts, dimensions). A text that comes twice is embedded once."""
        distinct, inverse = np.unique(np.array(texts, dtype=object).astype(str), return_inverse=True)
        vectors = self.model.encode(
            distinct.tolist(),
            batch_size=self.batch_size,
            convert_to_tensor=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return vectors.float().cpu().numpy()[inverse]

    def relevance(self, intents: list[str], prompts: list[str]) -> np.ndarray:
        """Cosine of each pair, cut to 0..1, float32 of shape (pairs,)."""
        if not prompts:
            return np.zeros(0, dtype=np.float32)
        vectors = self.embed(intents + prompts)
        cosine = np.einsum("ij,ij->i", vectors[: len(intents)], vectors[len(intents) :])
        return np.clip(cosine, 0, 1).astype(np.float32)
