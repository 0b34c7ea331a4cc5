"""The student: its shape from one dial or from a pretrained GPT-2, its network, and its loss on packed rows."""

import tempfile
from dataclasses import dataclass
from typing import Any

from udrl import models, storage
from udrl.errors import UserError
from udrl.recipe import Student, Train
from udrl.train.initial_weights import sinusoids, wire_copying

# Peak learning rate that was tuned on a 6 x 320 student. It scales with the inverse of the width (muP's rule for hidden
# matrices under Adam, arXiv 2203.03466): 4.2e-4 at the full width of 768.
LR_AT_320 = 1e-3
# Share of that rate for pretrained weights: fine-tuning at the full rate would overwrite them.
PRETRAINED_LR = 1 / 3
# Tokens per step that were tuned at width 384. Larger models need larger batches (arXiv 2001.08361). The batch grows with the
# fourth power of the width: 32,768 tokens at the full size, as published 100M models have. Not measured above width 384.
BATCH_AT_384 = 2048
# Flags of GPT-2 variants that vLLM does not run, so that a student with them could not be served.
UNSERVED = ("add_cross_attention", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")


@dataclass(frozen=True)
class Shape:
    """A student's size, peak learning rate and tokens per optimizer step."""

    depth: int
    width: int
    heads: int
    lr: float
    batch_tokens: int

    @classmethod
    def of(cls, student: Student, train: Train) -> "Shape":
        """Derive all values from ``student.depth``, except those that the recipe sets.

        The width is 64 per layer (12 -> 768), the heads have 64 dimensions. With ``student.init`` depth, width and heads are
        the pretrained model's.

        Raises:
            UserError: the number of heads does not divide the width, the network is too small for ``student.start``, or the
                pretrained model is absent or unusable.
        """
        if student.init:
            config = _gpt2_config(_init_folder(student.init), f"student.init: {student.init}", student.context)
            lr = train.lr or PRETRAINED_LR * LR_AT_320 * 320 / config.n_embd
            return cls(config.n_layer, config.n_embd, config.n_head, lr, train.batch_tokens or _batch_tokens(config.n_embd))
        width = student.width or max(128, 64 * student.depth)
        heads = student.heads or max(1, width // 64)
        if width % heads:
            raise UserError(f"student.heads: {heads} does not divide the width {width}; set a divisor of it")
        if student.start == "copying" and (student.depth < 2 or heads < 3 or width // heads % 2):
            raise UserError(
                "student.start: copying takes two layers and three heads of an even width"
                f" ({student.depth} layers, {heads} heads of {width // heads}); use random, or raise student.depth"
            )
        lr = train.lr or LR_AT_320 * 320 / width
        return cls(student.depth, width, heads, lr, train.batch_tokens or _batch_tokens(width))


def _batch_tokens(width: int) -> int:
    return max(1024, round(BATCH_AT_384 * (width / 384) ** 4))


def build_network(
    student: Student,
    train: Train,
    tokenizer: Any,
    seed: int,
    initial_student: str | None = None,
    embeddings: str | None = None,
) -> Any:
    """Return a ``GPT2LMHeadModel`` in fp32, identical on every worker for the same seed.

    Args:
        tokenizer: for a pretrained model, its own tokenizer with the control tokens added (``tokenizer.extend_tokenizer``).
        initial_student: folder or URI of an exported student to take the weights from; precedes ``student.init``. Without both
            the weights are random.
        embeddings: URI of the embeddings that some tokens of a new student start from (``ids`` and ``embeddings``).

    Raises:
        UserError: the pretrained model is unusable, or ``initial_student`` has another vocabulary or fewer positions.
    """
    import torch
    from safetensors.torch import load as safetensors_load
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
    if initial_student:
        with tempfile.TemporaryDirectory() as folder:
            local = storage.download_folder(initial_student, folder)
            network = _load_pretrained(local, initial_student, student.context, settings)
        if network.config.vocab_size != len(tokenizer):
            raise UserError(
                f"{initial_student}: its vocabulary has {network.config.vocab_size} tokens, the tokenizer {len(tokenizer)};"
                " train with resume=never"
            )
        return network
    if student.init:
        network = _load_pretrained(_init_folder(student.init), f"student.init: {student.init}", student.context, settings)
        # New rows are sampled around the mean of the old ones; random rows would take all the probability at first.
        network.resize_token_embeddings(len(tokenizer), mean_resizing=True)
        return network
    shape = Shape.of(student, train)
    network = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=student.context,
            n_embd=shape.width,
            n_layer=shape.depth,
            n_head=shape.heads,
            activation_function="gelu_pytorch_tanh",  # GPT-2's gelu_new as one kernel: a twelfth of a step on a CPU
            **settings,
        )
    )
    network.transformer.wpe.weight.data.copy_(sinusoids(student.context, shape.width))
    if student.start == "copying":
        wire_copying(network)
    if embeddings:
        initial = safetensors_load(storage.read_bytes(embeddings))
        network.transformer.wte.weight.data[initial["ids"], -initial["embeddings"].shape[1] :] = initial["embeddings"]
    return network


def _load_pretrained(folder: str, name: str, context: int, settings: dict[str, Any]) -> Any:
    import torch
    from transformers import GenerationConfig, GPT2LMHeadModel

    config = _gpt2_config(folder, name, context)
    config.update(settings)
    network = GPT2LMHeadModel.from_pretrained(folder, config=config, dtype=torch.float32)
    # The pretrained model's generation settings may name another end of text.
    network.generation_config = GenerationConfig.from_model_config(network.config)
    return network


def _init_folder(init: str) -> str:
    try:
        return models.resolve(init)
    except UserError as error:
        raise UserError(f"student.init: {error}") from error


def _gpt2_config(folder: str, name: str, context: int) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: can't be loaded ({' '.join(str(error).split())[:200]}); give a GPT-2") from error
    if config.model_type != "gpt2":
        raise UserError(f"{name}: is a {config.model_type}, not a GPT-2; give a GPT-2, or student.depth for a new one")
    variants = [flag for flag in UNSERVED if getattr(config, flag, False)]
    if variants:
        raise UserError(f"{name}: has {', '.join(variants)}, which vLLM does not run; give a plain GPT-2")
    if config.n_positions < context:
        raise UserError(f"student.context: {context} is more than the {config.n_positions} positions of {name}; lower it")
    return config


def packed_loss(model: Any, tokens: Any, positions: Any, targets: Any) -> Any:
    """Return the sum of the cross-entropy over the target tokens, a scalar.

    Args:
        tokens: int64 (rows, context).
        positions: int64 (rows, context); each example starts at 0, which also separates the examples.
        targets: bool (rows, context): tokens that carry loss (prompt and ``<|end|>``).

    Attention does not cross examples. Logits are computed only for targets: the output matrix is a fifth of a small student.
    """
    import torch

    example = (positions == 0).cumsum(dim=1)
    same_example = example[:, :, None] == example[:, None, :]
    causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).tril()
    mask = (same_example & causal)[:, None]
    hidden = model.transformer(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False)[0]
    # The state at t predicts token t + 1. A target is never the first token of an example.
    predicts_target = targets[:, 1:]
    logits = model.lm_head(hidden[:, :-1][predicts_target])
    return torch.nn.functional.cross_entropy(logits.float(), tokens[:, 1:][predicts_target], reduction="sum")
