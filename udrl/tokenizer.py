"""The student's BPE tokenizer: trained on the episodes, with the control tokens first, or a pretrained GPT-2's own, with the
control tokens last.

User text is always encoded so that it can never produce a control token: ``<|reward:4|>`` typed by a user becomes
ordinary byte-level pieces.
"""

from collections.abc import Iterable
from typing import Any

from udrl import commands
from udrl.commands import Command, CommandVocabulary
from udrl.errors import UserError


def train(texts: Iterable[str], vocabulary: CommandVocabulary, vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer and return it as a ``PreTrainedTokenizerFast``.

    Control tokens take the first ids, in the vocabulary's order. ``vocab_size`` counts them; it is an upper bound, since
    little text has few merges.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    control = vocabulary.control_tokens()
    bpe = Tokenizer(models.BPE())
    steps = [normalizers.NFC(), *([normalizers.Lowercase()] if vocabulary.lowercase else [])]
    bpe.normalizer = normalizers.Sequence(steps)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=control,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=commands.END,
        pad_token=commands.PAD,
        additional_special_tokens=[t for t in control if t not in (commands.END, commands.PAD)],
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def extend(folder: str, vocabulary: CommandVocabulary) -> Any:
    """The tokenizer of a pretrained GPT-2 with the control tokens added behind its own; ``folder`` may be a Hugging Face id.

    Its pieces and their ids stay as they are, letter case with them. ``<|end|>`` and ``<|pad|>`` take the place of the
    special tokens that it had for these.

    Raises:
        UserError: there is no tokenizer, or it is no byte-level BPE.
    """
    from tokenizers import models
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"student.init: no tokenizer in {folder} ({' '.join(str(error).split())[:200]})") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # transformers makes an empty tokenizer where a GPT-2's folder has none; a byte-level one has a piece for each byte.
    if backend is None or not isinstance(backend.model, models.BPE) or len(tokenizer) < 256:
        raise UserError(f"student.init: the tokenizer of {folder} is no byte-level BPE; give a GPT-2 with its own tokenizer")
    control = vocabulary.control_tokens()
    # The old ones stay special, so that text can't produce them and the student may not write them.
    old = [t for t in tokenizer.all_special_tokens if t not in control]
    others = [t for t in control if t not in (commands.END, commands.PAD)]
    tokenizer.add_special_tokens({"eos_token": commands.END, "pad_token": commands.PAD})
    tokenizer.add_special_tokens({"additional_special_tokens": [*others, *old]})
    tokenizer.split_special_tokens = True
    tokenizer.init_kwargs["split_special_tokens"] = True
    return tokenizer


def load(folder: str) -> Any:
    """Load the tokenizer of an exported student."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def encode_text(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of user or teacher text, never a control token's. Text before a prompt and prompts alike carry a leading
    space, so that a word has one spelling wherever it stands."""
    spaced = [" " + " ".join(text.split()) for text in texts]
    return tokenizer(spaced, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def control_ids(tokenizer: Any, tokens: list[str]) -> list[int]:
    """Ids of control tokens."""
    return tokenizer.convert_tokens_to_ids(tokens)


def encode_request(tokenizer: Any, vocabulary: CommandVocabulary, intent: str, command: Command) -> list[int]:
    """What the student is given at inference: the intent, then the command. Shape (tokens,).

    Raises:
        ValueError: the command is not in the vocabulary.
    """
    return encode_text(tokenizer, [intent])[0] + control_ids(tokenizer, vocabulary.tokens(command))


def banned_ids(tokenizer: Any, vocabulary: CommandVocabulary) -> list[int]:
    """Ids that a student may not write: every special token but ``<|end|>``, those of a pretrained tokenizer too."""
    special = {*control_ids(tokenizer, vocabulary.control_tokens()), *tokenizer.all_special_ids}
    return sorted(special - set(control_ids(tokenizer, [commands.END])))
