"""Cosine of intent and prompt under a second embedding model, 0 to 1; not the one that made the training reward.

A causal language model's folder works too: sentence-transformers takes the mean of its last hidden states. Such vectors all
point much the same way, so their cosines tell better from worse but their ratio tells nothing.
"""

import os

from udrl import models
from udrl.scoring.embedder import Embedder


def load(model: str, batch_size: int, threads: int | None = None, revision: str | None = None) -> Embedder:
    """The embedder of ``model`` (a sentence-transformers model or a causal language model)."""
    path = models.resolve(model)
    if revision and not os.path.isdir(path):
        from huggingface_hub import snapshot_download

        path = snapshot_download(path, revision=revision)
    embedder = Embedder(path, batch_size, threads)
    tokenizer = embedder.model.tokenizer
    if tokenizer.pad_token is None:  # language models write one text at a time and may know no padding
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return embedder
