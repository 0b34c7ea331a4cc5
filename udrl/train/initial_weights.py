"""Initial weights that make a small student learn sooner: sinusoidal positions, and the teacher's token embeddings."""

import json
import math
from typing import Any

from udrl import models
from udrl.errors import UserError

# Standard deviation of the initial embeddings: GPT-2's own for positions; twice that for tokens, which start informed.
POSITION_STD = 0.02
TOKEN_STD = 0.04
_EMBEDDING_NAMES = ("embed_tokens.weight", "wte.weight")  # of Llama and most others, of GPT-2


def sinusoids(positions: int, width: int) -> Any:
    """Return sinusoidal position embeddings, float32 (positions, width), scaled to :data:`POSITION_STD`.

    A shift by k positions is the same rotation everywhere (Vaswani et al. 2017, arXiv 1706.03762, section 3.5), which attention
    to "the token after the one that matched" needs.
    """
    import torch

    frequencies = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(positions)[:, None] * frequencies
    table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]
    return table * (POSITION_STD / table.square().mean().sqrt())


def teacher_embeddings(model: str, revision: str | None, pretrained: Any, tokenizer: Any, width: int) -> tuple[Any, Any]:
    """Return the teacher's embeddings of the student's pieces, reduced to ``width`` by principal components.

    Args:
        model: the teacher, as in the recipe.
        revision: of the teacher.
        pretrained: the teacher's tokenizer.
        tokenizer: the student's, made by ``cut_tokenizer`` from it.
        width: of the student.

    Returns:
        The pieces' ids, int64 (pieces,), and their embeddings, float32 (pieces, width), with a standard deviation of
        :data:`TOKEN_STD`.
    """
    import torch

    known = pretrained.get_vocab()
    shared = [(student_id, known[piece]) for piece, student_id in sorted(tokenizer.get_vocab().items()) if piece in known]
    student_ids, teacher_ids = (torch.tensor(ids) for ids in zip(*shared, strict=True))
    matrix = _load_embeddings(model, revision)[teacher_ids].float()
    centered = matrix - matrix.mean(dim=0)
    _, directions = torch.linalg.eigh(centered.T @ centered)  # in ascending order of their variance
    reduced = centered @ directions.flip(1)[:, :width]
    if reduced.shape[1] < width:  # a teacher narrower than the student: the other dimensions start empty
        reduced = torch.nn.functional.pad(reduced, (0, width - reduced.shape[1]))
    return student_ids, reduced * (TOKEN_STD / reduced.std())


def _load_embeddings(model: str, revision: str | None) -> Any:
    """Return the token embeddings of a model in safetensors, (vocabulary, width), without loading its other weights."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    folder = models.resolve(model)
    try:
        with open(cached_file(folder, "model.safetensors.index.json", revision=revision), encoding="utf-8") as source:
            weight_files = json.load(source)["weight_map"]
        name = next(name for name in weight_files if name.endswith(_EMBEDDING_NAMES))
        file = weight_files[name]
    except OSError:  # a model in one file has no index
        name, file = None, "model.safetensors"
    try:
        with safe_open(cached_file(folder, file, revision=revision), "pt") as weights:
            names = list(weights.keys())
            name = name or next(name for name in names if name.endswith(_EMBEDDING_NAMES))
            return weights.get_tensor(name)
    except (OSError, StopIteration) as error:
        raise UserError(
            f"student.vocabulary: {model} has no token embeddings in safetensors ({error}); use student.vocabulary=episodes"
        ) from error
