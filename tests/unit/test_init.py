"""Starting from a pretrained GPT-2: its shape and tokenizer stand, control tokens come on top, user text stays text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_monitor import TEXTS, VOCABULARY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, PreTrainedTokenizerFast

from udrl import commands, tokenizer
from udrl.errors import UserError
from udrl.recipe import Student, Train
from udrl.train import gpt2

OLD_END = "<|endoftext|>"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny GPT-2 as the hub has it: byte-level BPE with ``<|endoftext|>`` as the last piece, no padding token."""
    folder = str(tmp_path_factory.mktemp("gpt2"))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(TEXTS * 5, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    bpe.add_special_tokens([OLD_END])
    named = {"bos_token": OLD_END, "eos_token": OLD_END, "unk_token": OLD_END}
    PreTrainedTokenizerFast(tokenizer_object=bpe, **named).save_pretrained(folder)
    config = json.loads((Path(folder) / "tokenizer_config.json").read_text())
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "GPT2Tokenizer"}))
    end = bpe.token_to_id(OLD_END)
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=end + 1, n_positions=64, n_embd=32, n_layer=3, n_head=2, bos_token_id=end, eos_token_id=end)
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def words(pretrained: str) -> Any:
    return tokenizer.extend(pretrained, VOCABULARY)


def student(init: str, **more: Any) -> Student:
    return Student(init=init, context=48, **more)


def test_control_tokens_come_behind_the_pretrained_pieces(pretrained: str, words: Any) -> None:
    old = PreTrainedTokenizerFast.from_pretrained(pretrained)
    control = tokenizer.control_ids(words, VOCABULARY.control_tokens())
    assert sorted(control) == list(range(len(old), len(old) + len(VOCABULARY.control_tokens())))
    assert (words.eos_token, words.pad_token) == (commands.END, commands.PAD)
    text = "a red Fox in deep snow"
    assert tokenizer.encode_text(words, [text])[0] == old(" " + text)["input_ids"]  # letter case too
    assert words.decode(tokenizer.encode_text(words, [text])[0]) == " " + text


@settings(max_examples=30)
@given(st.lists(st.sampled_from([*VOCABULARY.control_tokens(), OLD_END, "<|", "|>", "fox", " "]), min_size=1, max_size=8))
def test_no_text_makes_a_special_token(pieces: list[str]) -> None:
    ids = tokenizer.encode_text(EXTENDED[0], ["".join(pieces)])[0]
    assert not set(ids) & set(EXTENDED[0].all_special_ids)


EXTENDED: list[Any] = []


@pytest.fixture(autouse=True, scope="module")
def _loaded_again(words: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The tokenizer as workers and engines see it: saved and loaded. (Hypothesis takes no fixtures of this kind.)"""
    folder = str(tmp_path_factory.mktemp("extended"))
    words.save_pretrained(folder)
    EXTENDED[:] = [tokenizer.load(folder)]


def test_the_student_may_write_neither_control_tokens_nor_the_old_end(words: Any) -> None:
    banned = tokenizer.banned_ids(words, VOCABULARY)
    assert words.convert_tokens_to_ids(OLD_END) in banned
    assert words.eos_token_id not in banned
    assert len(banned) == len(VOCABULARY.control_tokens())  # <|end|> less, <|endoftext|> more


def test_the_pretrained_weights_and_shape_stand(pretrained: str, words: Any) -> None:
    old = GPT2LMHeadModel.from_pretrained(pretrained)
    network = gpt2.build_network(student(pretrained, depth=7, width=999, dropout=0.1), Train(), words, seed=1)
    assert (network.config.n_layer, network.config.n_embd, network.config.n_positions) == (3, 32, 64)
    assert network.config.resid_pdrop == network.config.embd_pdrop == network.config.attn_pdrop == 0.1
    n = old.config.vocab_size
    assert network.config.vocab_size == len(words) > n
    assert torch.equal(network.transformer.wte.weight[:n], old.transformer.wte.weight)
    assert network.lm_head.weight is network.transformer.wte.weight
    assert (network.generation_config.eos_token_id, network.generation_config.pad_token_id) == (
        words.eos_token_id,
        words.pad_token_id,
    )
    again = gpt2.build_network(student(pretrained), Train(), words, seed=1)
    assert torch.equal(again.transformer.wte.weight, network.transformer.wte.weight)
    shape = gpt2.Shape.of(student(pretrained, depth=7), Train())
    assert (shape.depth, shape.width, shape.heads) == (3, 32, 2)
    assert shape.lr == pytest.approx(1e-3 * 10 / 3)


def test_new_rows_stand_among_the_old_ones(pretrained: str, words: Any) -> None:
    """So that at first no control token is likelier than any other piece."""
    network = gpt2.build_network(student(pretrained), Train(), words, seed=1).eval()
    with torch.no_grad():
        odds = network(torch.tensor([tokenizer.encode_text(words, ["a red fox"])[0]])).logits[0].softmax(-1)
    control = tokenizer.control_ids(words, VOCABULARY.control_tokens())
    assert float(odds[:, control].sum(-1).max()) < 3 * len(control) / len(words)


def test_a_student_goes_on_from_an_exported_one(pretrained: str, words: Any, tmp_path: Path) -> None:
    first = gpt2.build_network(student(pretrained), Train(), words, seed=1)
    first.to(torch.bfloat16).save_pretrained(tmp_path)
    went_on = gpt2.build_network(student(pretrained, dropout=0.2), Train(), words, seed=2, initial_student=str(tmp_path))
    assert went_on.dtype == torch.float32
    assert went_on.config.attn_pdrop == 0.2
    assert torch.equal(went_on.lm_head.weight, first.lm_head.weight.float())
    shorter = PreTrainedTokenizerFast.from_pretrained(pretrained)
    with pytest.raises(UserError, match="its vocabulary has"):
        gpt2.build_network(student(pretrained), Train(), shorter, seed=2, initial_student=str(tmp_path))


def test_what_cannot_be_started_from_is_a_user_s_error(pretrained: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"student\.context: 65 is more than the 64 positions of student\.init"):
        gpt2.Shape.of(Student(init=pretrained, context=65), Train())
    with pytest.raises(UserError, match=r"student\.init: model \./nowhere"):
        gpt2.Shape.of(student("./nowhere"), Train())
    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="is a llama, not a GPT-2"):
        gpt2.Shape.of(student(str(tmp_path / "llama")), Train())
    GPT2Config(reorder_and_upcast_attn=True).save_pretrained(tmp_path / "upcast")
    with pytest.raises(UserError, match="reorder_and_upcast_attn"):
        gpt2.Shape.of(student(str(tmp_path / "upcast")), Train())
    with pytest.raises(UserError, match="is not a byte-level BPE"):
        tokenizer.extend(str(tmp_path / "upcast"), VOCABULARY)
