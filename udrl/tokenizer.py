"""The student's BPE tokenizer: trained on the episodes, cut from the teacher's, or a pretrained GPT-2's with control tokens.

User text is always encoded so that it can never produce a control token: ``<|reward:4|>`` typed by a user becomes ordinary
byte-level pieces.
"""

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from udrl import commands, models
from udrl.commands import Command, CommandVocabulary
from udrl.errors import UserError


def train_tokenizer(texts: Iterable[str], vocabulary: CommandVocabulary, vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer and return it as a ``PreTrainedTokenizerFast``.

    Control tokens take the first ids, in the vocabulary's order. ``vocab_size`` includes them; it is an upper bound, because
    a small corpus yields few merges.
    """
    from tokenizers import Tokenizer, pre_tokenizers, trainers
    from tokenizers import models as tokenizer_models

    bpe = Tokenizer(tokenizer_models.BPE())
    bpe.normalizer = _normalizer(vocabulary)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=vocabulary.control_tokens(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return _as_student_tokenizer(bpe, vocabulary)


_CAPITAL = re.compile("[A-Z]")


@lru_cache(maxsize=2)
def load_pretrained_tokenizer(model: str, revision: str | None = None) -> Any:
    """Load the tokenizer of a model, given as in a recipe, once per process.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(models.resolve(model), revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"{model}: its tokenizer can't be loaded ({' '.join(str(error).split())[:200]})") from error


def cut_tokenizer(pretrained: Any, vocabulary: CommandVocabulary, vocab_size: int) -> Any:
    """Return a tokenizer of the most frequent pieces of a byte-level BPE; control tokens take the first ids.

    A piece keeps its spelling, so that its embedding is found in the pretrained model. Pieces that the student's text can't
    hold are left out: of capital letters if the vocabulary folds case, and of several spaces in a row.

    Args:
        pretrained: a tokenizer of transformers.
        vocabulary: the commands of the student.
        vocab_size: of the new tokenizer, control tokens included; an upper bound.

    Raises:
        UserError: the tokenizer is not a byte-level BPE.
    """
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as tokenizer_models

    backend = getattr(pretrained, "backend_tokenizer", None)
    known = pretrained.get_vocab()
    has_bpe = backend is not None and isinstance(backend.model, tokenizer_models.BPE)
    if backend is None or not has_bpe or "Ġ" not in known:  # Ġ: the space of a byte-level BPE
        raise UserError(
            "student.vocabulary: the teacher's tokenizer is not a byte-level BPE, as Llama 3's is; use episodes instead"
        )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    document = json.loads(backend.to_str())
    pieces = dict.fromkeys(alphabet)
    merges = []
    room = vocab_size - len(vocabulary.control_tokens())
    for merge in document["model"]["merges"]:  # in the order of their frequency
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        piece = left + right
        if left not in pieces or right not in pieces or "ĠĠ" in piece or (vocabulary.lowercase and _CAPITAL.search(piece)):
            continue
        if piece not in pieces and len(pieces) == room:
            break
        pieces[piece] = None
        merges.append((left, right))
    ids = {piece: i for i, piece in enumerate([*vocabulary.control_tokens(), *pieces])}
    bpe = Tokenizer(tokenizer_models.BPE(ids, merges))
    bpe.normalizer = _normalizer(vocabulary)
    bpe.pre_tokenizer = backend.pre_tokenizer
    return _as_student_tokenizer(bpe, vocabulary)


def _normalizer(vocabulary: CommandVocabulary) -> Any:
    from tokenizers import normalizers

    return normalizers.Sequence([normalizers.NFC(), *([normalizers.Lowercase()] if vocabulary.lowercase else [])])


def _as_student_tokenizer(bpe: Any, vocabulary: CommandVocabulary) -> Any:
    """Return a byte-level ``tokenizers.Tokenizer`` for transformers, with the student's special tokens."""
    from tokenizers import decoders
    from transformers import PreTrainedTokenizerFast

    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=commands.END,
        pad_token=commands.PAD,
        additional_special_tokens=[t for t in vocabulary.control_tokens() if t not in (commands.END, commands.PAD)],
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def extend_tokenizer(folder: str, vocabulary: CommandVocabulary) -> Any:
    """Load a pretrained GPT-2's tokenizer and add the control tokens after its own; ``folder`` may be a Hugging Face id.

    Its pieces, their ids and their letter case do not change. ``<|end|>`` and ``<|pad|>`` become its end-of-text and padding
    tokens.

    Raises:
        UserError: the folder has no tokenizer, or one that is not a byte-level BPE.
    """
    from tokenizers import models as tokenizer_models
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"student.init: no tokenizer in {folder} ({' '.join(str(error).split())[:200]})") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # transformers returns an empty tokenizer if a GPT-2's folder has none; a byte-level one has a piece for each byte.
    if backend is None or not isinstance(backend.model, tokenizer_models.BPE) or len(tokenizer) < 256:
        raise UserError(
            f"student.init: the tokenizer is not a byte-level BPE ({folder}); give a GPT-2 folder that includes its tokenizer"
        )
    control = vocabulary.control_tokens()
    # The pretrained special tokens stay special: text can't produce them, and the student may not write them.
    pretrained_special = [t for t in tokenizer.all_special_tokens if t not in control]
    new_special = [t for t in control if t not in (commands.END, commands.PAD)]
    tokenizer.add_special_tokens({"eos_token": commands.END, "pad_token": commands.PAD})
    tokenizer.add_special_tokens({"additional_special_tokens": [*new_special, *pretrained_special]})
    tokenizer.split_special_tokens = True
    tokenizer.init_kwargs["split_special_tokens"] = True
    return tokenizer


def load_tokenizer(folder: str) -> Any:
    """Load the tokenizer of an exported student."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def encode_text(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return the token ids of each text; they never include a control token."""
    normalized = [normalize_spaces(text) for text in texts]
    return tokenizer(normalized, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def normalize_spaces(text: str) -> str:
    """Collapse white space and prepend a space, so that a word has the same tokens wherever it stands."""
    return " " + " ".join(text.split())


def control_ids(tokenizer: Any, tokens: list[str]) -> list[int]:
    """Return the ids of control tokens."""
    return tokenizer.convert_tokens_to_ids(tokens)


def encode_request(tokenizer: Any, vocabulary: CommandVocabulary, intent: str, command: Command) -> list[int]:
    """Return the student's input at inference: the token ids of the intent, then of the command.

    Raises:
        ValueError: the command is not in the vocabulary.
    """
    return encode_text(tokenizer, [intent])[0] + control_ids(tokenizer, vocabulary.tokens(command))


def banned_ids(tokenizer: Any, vocabulary: CommandVocabulary) -> list[int]:
    """Return the ids that a student may not write: every special token except ``<|end|>``, sorted.

    Special tokens of a pretrained tokenizer are included.
    """
    special = {*control_ids(tokenizer, vocabulary.control_tokens()), *tokenizer.all_special_ids}
    return sorted(special - set(control_ids(tokenizer, [commands.END])))
