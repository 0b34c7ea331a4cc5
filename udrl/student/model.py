"""The student's shape from one dial, and its forward pass over packed rows."""

from dataclasses import asdict, dataclass
from typing import Any

from udrl.recipe import Student, Train

# Where 1e-3 was a good peak learning rate: a 6 x 320 student. It falls in proportion as the width grows (muP's rule for
# hidden matrices under Adam, arXiv 2203.03466), which gives 4.2e-4 at the full width of 768.
LR_AT_320 = 1e-3


@dataclass(frozen=True)
class Shape:
    """All that the dial decides."""

    depth: int
    width: int
    heads: int
    lr: float

    @classmethod
    def of(cls, student: Student, train: Train) -> "Shape":
        """``depth`` gives width (64 a layer: 12 -> 768), heads of 64 and the learning rate; a set value wins.

        Raises:
            UserError: heads do not divide the width.
        """
        from udrl.errors import UserError

        width = student.width or max(128, 64 * student.depth)
        heads = student.heads or max(1, width // 64)
        if width % heads:
            raise UserError(f"student.heads: {heads} does not divide the width {width}")
        return cls(student.depth, width, heads, train.lr or LR_AT_320 * 320 / width)

    def describe(self) -> dict[str, Any]:
        return asdict(self)


def build(student: Student, train: Train, tokenizer: Any, seed: int) -> Any:
    """A fresh ``GPT2LMHeadModel`` in fp32, the same for a seed on every worker."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = Shape.of(student, train)
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=student.context,
            n_embd=shape.width,
            n_layer=shape.depth,
            n_head=shape.heads,
            resid_pdrop=student.dropout,
            embd_pdrop=student.dropout,
            attn_pdrop=student.dropout,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


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
