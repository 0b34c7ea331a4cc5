"""The student's shape from one dial, or from a pretrained GPT-2, and its forward pass over packed rows."""

import tempfile
from dataclasses import asdict, dataclass
from typing import Any

from udrl import models, storage
from udrl.errors import UserError
from udrl.recipe import Student, Train

# Where 1e-3 was a good peak learning rate: a 6 x 320 student. It falls in proportion as the width grows (muP's rule for
# hidden matrices under Adam, arXiv 2203.03466), which gives 4.2e-4 at the full width of 768.
LR_AT_320 = 1e-3
# Tokens a step that served a width of 384 well. Larger models bear, and need, larger batches (arXiv 2001.08361); with the
# fourth power of the width the full size gets 32,768, the order of published 100M models. Not measured beyond width 384.
BATCH_AT_384 = 2048
PRETRAINED_LR = 1 / 3  # of that, for weights that have less to learn and more to lose
# Variants of GPT-2 that vLLM does not run; a student that nobody can serve is not worth its training.
UNSERVED = ("add_cross_attention", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")


@dataclass(frozen=True)
class Shape:
    """All that the dial decides."""

    depth: int
    width: int
    heads: int
    lr: float
    batch_tokens: int

    @classmethod
    def of(cls, student: Student, train: Train) -> "Shape":
        """``depth`` gives width (64 a layer: 12 -> 768), heads of 64, the learning rate and the batch; a set value
        wins. With ``student.init`` depth, width and heads are the pretrained model's.

        Raises:
            UserError: heads do not divide the width, or the pretrained model is absent or can't be used.
        """
        if student.init:
            config = _gpt2_config(_folder_of(student.init), f"student.init: {student.init}", student.context)
            lr = train.lr or PRETRAINED_LR * LR_AT_320 * 320 / config.n_embd
            return cls(config.n_layer, config.n_embd, config.n_head, lr, train.batch_tokens or _batch(config.n_embd))
        width = student.width or max(128, 64 * student.depth)
        heads = student.heads or max(1, width // 64)
        if width % heads:
            raise UserError(f"student.heads: {heads} does not divide the width {width}")
        lr = train.lr or LR_AT_320 * 320 / width
        return cls(student.depth, width, heads, lr, train.batch_tokens or _batch(width))

    def describe(self) -> dict[str, Any]:
        return asdict(self)


def _batch(width: int) -> int:
    return max(1024, round(BATCH_AT_384 * (width / 384) ** 4))


def build(student: Student, train: Train, tokenizer: Any, seed: int, start: str | None = None) -> Any:
    """A ``GPT2LMHeadModel`` in fp32, the same for a seed on every worker: fresh, from ``student.init``, or going on.

    Args:
        tokenizer: for a pretrained model, its own with the control tokens (``tokenizer.extend``).
        start: folder or URI of an exported student whose weights it takes; goes before ``student.init``.

    Raises:
        UserError: the pretrained model can't be used, or ``start`` has another vocabulary or shorter positions.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    settings = {
        "resid_pdrop": student.dropout,
        "embd_pdrop": student.dropout,
        "attn_pdrop": student.dropout,
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if start:
        with tempfile.TemporaryDirectory() as folder:
            network = _pretrained(storage.download_folder(start, folder), start, student.context, settings)
        if network.config.vocab_size != len(tokenizer):
            raise UserError(f"{start}: its vocabulary has {network.config.vocab_size} tokens, the tokenizer {len(tokenizer)}")
        return network
    if student.init:
        network = _pretrained(_folder_of(student.init), f"student.init: {student.init}", student.context, settings)
        # New rows are drawn around the old ones' mean: among random rows they would take all the probability at first.
        network.resize_token_embeddings(len(tokenizer), mean_resizing=True)
        return network
    shape = Shape.of(student, train)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=student.context,
            n_embd=shape.width,
            n_layer=shape.depth,
            n_head=shape.heads,
            **settings,
        )
    )


def _pretrained(folder: str, name: str, context: int, settings: dict[str, Any]) -> Any:
    import torch
    from transformers import GenerationConfig, GPT2LMHeadModel

    config = _gpt2_config(folder, name, context)
    config.update(settings)
    network = GPT2LMHeadModel.from_pretrained(folder, config=config, dtype=torch.float32)
    # Its own generation settings may name another end of text.
    network.generation_config = GenerationConfig.from_model_config(network.config)
    return network


def _folder_of(init: str) -> str:
    try:
        return models.resolve(init)
    except UserError as error:
        raise UserError(f"student.init: {error}") from error


def _gpt2_config(folder: str, name: str, context: int) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: can't be loaded ({' '.join(str(error).split())[:200]})") from error
    if config.model_type != "gpt2":
        raise UserError(f"{name}: is a {config.model_type}, not a GPT-2; give a GPT-2, or student.depth for a fresh one")
    variants = [flag for flag in UNSERVED if getattr(config, flag, False)]
    if variants:
        raise UserError(f"{name}: has {', '.join(variants)}, which vLLM does not run; give a plain GPT-2")
    if config.n_positions < context:
        raise UserError(f"student.context: {context} is more than the {config.n_positions} positions of {name}")
    return config


def packed_loss(model: Any, tokens: Any, positions: Any, targets: Any) -> Any:
    """Sum of the cross-entropy over the tokens that are to be learnt.

    Args:
        tokens: int64 (rows, context).
        positions: int64 (rows, context); each example starts again at 0, which is also what tells examples apart.
        targets: bool (rows, context): tokens that carry loss (prompt and ``<|end|>``).

    Attention does not cross examples. Logits are made only where there is a target: the vocabulary's matrix is a fifth of
    a small student.
    """
    import torch

    example = (positions == 0).cumsum(dim=1)
    same = example[:, :, None] == example[:, None, :]
    causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).tril()
    mask = (same & causal)[:, None]
    hidden = model.transformer(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False)[0]
    # The state at t predicts token t + 1; a target is never the first token of an example.
    learnt = targets[:, 1:]
    logits = model.lm_head(hidden[:, :-1][learnt])
    return torch.nn.functional.cross_entropy(logits.float(), tokens[:, 1:][learnt], reduction="sum")
