"""Initial weights from which a small student learns sooner: a circuit that copies, and the teacher's token embeddings."""

import json
import math
from typing import Any

from udrl import models
from udrl.errors import UserError

POSITION_STD = 0.02  # of position embeddings: GPT-2's
TOKEN_STD = 0.04  # of token embeddings; twice GPT-2's, because they start informed
# Sizes of the copying circuit's parts. The first two stand in the residual stream next to token embeddings of TOKEN_STD.
POSITION_SCALE = 0.11  # amplitude of the sinusoids
NOTE_SCALE = 0.05  # of the note of the token before
MATCH_SCALE = 1.5  # sharpens the match of a token with the notes
COPY_SCALE = 0.1  # of the token that is copied
_EMBEDDING_NAMES = ("embed_tokens.weight", "wte.weight")  # of Llama and most others, of GPT-2


def sinusoids(positions: int, width: int) -> Any:
    """Return sinusoidal position embeddings, float32 (positions, width), with a standard deviation of :data:`POSITION_STD`.

    A shift by k positions is the same rotation everywhere (Vaswani et al. 2017, arXiv 1706.03762, section 3.5). So positions
    that no training example reaches differ from the trained ones as those do from each other; random rows would be noise.
    """
    import torch

    frequencies = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(positions)[:, None] * frequencies
    table = torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]
    return table * (POSITION_STD / table.square().mean().sqrt())


def wire_copying(network: Any) -> None:
    """Set weights with which a new GPT-2 continues a sequence of tokens that it has read before.

    Copying a word that the training never had takes an induction circuit of two layers (Olsson et al. 2022,
    arXiv 2209.11895), which small trainings end too early to find. Here it is where training starts, and training changes it
    like any other weight. The residual stream is divided into three parts: positions as sinusoids and the token before, of one
    head's width each, and the token. In layer 0, a head attends to the position before and notes that token. In layer 1, all
    heads except two attend to tokens whose noted token is the current one, and each adds its slice of the token there to the
    output. Higher layers only start with copying value matrices: they add what they attend to.
    It takes two layers, and three heads of an even width.
    """
    import torch

    config = network.config
    width, heads = config.n_embd, config.n_head
    size = width // heads  # of a head
    position, before, token = slice(0, size), slice(size, 2 * size), slice(2 * size, width)
    generator = torch.Generator().manual_seed(0)
    # Tokens that agree in a random projection to one head's width are most likely the same (Johnson & Lindenstrauss 1984).
    sketch, _ = torch.linalg.qr(torch.randn(width - 2 * size, size, generator=generator))

    weights = network.transformer
    frequencies = torch.logspace(math.log10(2.5), math.log10(0.03), size // 2)  # radians per token
    angles = torch.arange(config.n_positions)[:, None] * frequencies
    weights.wpe.weight.data.zero_()
    weights.wpe.weight.data[:, position] = POSITION_SCALE * torch.cat([angles.sin(), angles.cos()], dim=1)
    weights.wte.weight.data *= TOKEN_STD / weights.wte.weight.data.std()
    weights.wte.weight.data[:, : 2 * size] = 0.0

    def columns(layer: int, kind: int, head: int) -> Any:
        """Return one head's part of the matrix of queries (0), keys (1) or values (2), a view of (width, size)."""
        start = kind * width + head * size
        return weights.h[layer].attn.c_attn.weight.data[:, start : start + size]

    def rows(layer: int, head: int) -> Any:
        """Return one head's part of the output matrix, a view of (size, width)."""
        return weights.h[layer].attn.c_proj.weight.data[head * size : (head + 1) * size]

    def clear(layer: int, head: int) -> None:
        for kind in range(3):
            columns(layer, kind, head).zero_()

    for block in weights.h:  # outputs start at zero, so that random ones do not drown the circuit's
        block.attn.c_proj.weight.data.zero_()
        block.mlp.c_proj.weight.data.zero_()
    # Layer 0: the query is the position before, by the angle-sum identities; the value is the token's sketch.
    clear(0, 0)
    half, (sine, cosine) = size // 2, (frequencies.sin(), frequencies.cos())
    columns(0, 0, 0)[position] = torch.cat(
        [torch.cat([cosine.diag(), sine.diag()], dim=1), torch.cat([-sine.diag(), cosine.diag()], dim=1)]
    )
    columns(0, 1, 0)[position] = torch.eye(2 * half)
    columns(0, 2, 0)[token] = sketch
    rows(0, 0)[:, before] = NOTE_SCALE * torch.eye(size)
    for head in range(heads - 2):
        # Layer 1: the query is the current token's sketch, the key that of the token before.
        clear(1, head)
        columns(1, 0, head)[token] = MATCH_SCALE * sketch
        columns(1, 1, head)[before] = MATCH_SCALE * torch.eye(size)
        for layer in range(1, config.n_layer):
            slice_of_token = slice(2 * size + head * size, 3 * size + head * size)
            columns(layer, 2, head).zero_()
            columns(layer, 2, head)[slice_of_token] = torch.eye(size)
            # Higher layers share one such addition, since nothing tells yet what they attend to.
            scale = COPY_SCALE if layer == 1 else COPY_SCALE / (config.n_layer - 2)
            rows(layer, head)[:, slice_of_token] = scale * torch.eye(size)


def token_width(width: int, heads: int) -> int:
    """Return the dimensions that :func:`wire_copying` leaves to token embeddings."""
    return width - 2 * (width // heads)


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
