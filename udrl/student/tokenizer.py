"""The student's BPE tokenizer, trained on the episodes, with the control tokens first.

User text is always encoded so that it can never produce a control token: ``<|reward:4|>`` typed by a user becomes
ordinary byte-level pieces.
"""

from collections.abc import Iterable
from typing import Any

from udrl import commands
from udrl.commands import Command, Vocabulary


def train(texts: Iterable[str], vocabulary: Vocabulary, vocab_size: int) -> Any:
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


def encode_request(tokenizer: Any, vocabulary: Vocabulary, intent: str, command: Command) -> list[int]:
    """What the student is given at inference: the intent, then the command. Shape (tokens,).

    Raises:
        ValueError: the command is not in the vocabulary.
    """
    return encode_text(tokenizer, [intent])[0] + control_ids(tokenizer, vocabulary.tokens(command))


def banned_ids(tokenizer: Any, vocabulary: Vocabulary) -> list[int]:
    """Ids that a student may not write: every control token but ``<|end|>``."""
    return control_ids(tokenizer, [t for t in vocabulary.control_tokens() if t != commands.END])
