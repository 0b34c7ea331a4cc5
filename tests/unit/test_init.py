"""A student's first weights: a pretrained GPT-2's, or a new network with the teacher's vocabulary and sinusoidal positions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_monitor import TEXTS, VOCABULARY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from udrl import commands, tokenizer
from udrl.errors import UserError
from udrl.recipe import Student, Train
from udrl.train import gpt2, initial_weights

OLD_END = "<|endoftext|>"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny GPT-2 like the hub's: byte-level BPE with ``<|endoftext|>`` as the last token, no padding token."""
    folder = str(tmp_path_factory.mktemp("gpt2"))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(TEXTS * 5, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    bpe.add_special_tokens([OLD_END])
    special_tokens = {"bos_token": OLD_END, "eos_token": OLD_END, "unk_token": OLD_END}
    PreTrainedTokenizerFast(tokenizer_object=bpe, **special_tokens).save_pretrained(folder)
    config = json.loads((Path(folder) / "tokenizer_config.json").read_text())
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "GPT2Tokenizer"}))
    end = bpe.token_to_id(OLD_END)
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=end + 1, n_positions=64, n_embd=32, n_layer=3, n_head=2, bos_token_id=end, eos_token_id=end)
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def extended(pretrained: str) -> Any:
    return tokenizer.extend_tokenizer(pretrained, VOCABULARY)


def student(init: str, **more: Any) -> Student:
    return Student(init=init, context=48, **more)


def test_control_tokens_follow_the_pretrained_tokens(pretrained: str, extended: Any) -> None:
    old = PreTrainedTokenizerFast.from_pretrained(pretrained)
    control = tokenizer.control_ids(extended, VOCABULARY.control_tokens())
    assert sorted(control) == list(range(len(old), len(old) + len(VOCABULARY.control_tokens())))
    assert (extended.eos_token, extended.pad_token) == (commands.END, commands.PAD)
    text = "a red Fox in deep snow"
    assert tokenizer.encode_text(extended, [text])[0] == old(" " + text)["input_ids"]  # letter case is kept
    assert extended.decode(tokenizer.encode_text(extended, [text])[0]) == " " + text


@settings(max_examples=30)
@given(st.lists(st.sampled_from([*VOCABULARY.control_tokens(), OLD_END, "<|", "|>", "fox", " "]), min_size=1, max_size=8))
def test_no_text_encodes_to_a_special_token(pieces: list[str]) -> None:
    ids = tokenizer.encode_text(LOADED[0], ["".join(pieces)])[0]
    assert not set(ids) & set(LOADED[0].all_special_ids)


LOADED: list[Any] = []


@pytest.fixture(autouse=True, scope="module")
def _load_saved_tokenizer(extended: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Save and load the tokenizer, as workers and engines do. (Hypothesis can't use a fixture of this scope.)"""
    folder = str(tmp_path_factory.mktemp("extended"))
    extended.save_pretrained(folder)
    LOADED[:] = [tokenizer.load_tokenizer(folder)]


def test_control_tokens_and_the_old_end_token_are_banned(extended: Any) -> None:
    banned = tokenizer.banned_ids(extended, VOCABULARY)
    assert extended.convert_tokens_to_ids(OLD_END) in banned
    assert extended.eos_token_id not in banned
    assert len(banned) == len(VOCABULARY.control_tokens())  # <|end|> less, <|endoftext|> more


def test_the_pretrained_weights_and_shape_are_kept(pretrained: str, extended: Any) -> None:
    old = GPT2LMHeadModel.from_pretrained(pretrained)
    network = gpt2.build_network(student(pretrained, depth=7, width=999, dropout=0.1), Train(), extended, seed=1)
    assert (network.config.n_layer, network.config.n_embd, network.config.n_positions) == (3, 32, 64)
    assert network.config.resid_pdrop == network.config.embd_pdrop == network.config.attn_pdrop == 0.1
    n = old.config.vocab_size
    assert network.config.vocab_size == len(extended) > n
    assert torch.equal(network.transformer.wte.weight[:n], old.transformer.wte.weight)
    assert network.lm_head.weight is network.transformer.wte.weight
    assert (network.generation_config.eos_token_id, network.generation_config.pad_token_id) == (
        extended.eos_token_id,
        extended.pad_token_id,
    )
    again = gpt2.build_network(student(pretrained), Train(), extended, seed=1)
    assert torch.equal(again.transformer.wte.weight, network.transformer.wte.weight)
    shape = gpt2.Shape.of(student(pretrained, depth=7), Train())
    assert (shape.depth, shape.width, shape.heads) == (3, 32, 2)
    assert shape.lr == pytest.approx(1e-3 * 10 / 3)


def test_new_embedding_rows_are_near_the_old_ones(pretrained: str, extended: Any) -> None:
    """Control tokens are at first not much likelier than other tokens."""
    network = gpt2.build_network(student(pretrained), Train(), extended, seed=1).eval()
    with torch.no_grad():
        odds = network(torch.tensor([tokenizer.encode_text(extended, ["a red fox"])[0]])).logits[0].softmax(-1)
    control = tokenizer.control_ids(extended, VOCABULARY.control_tokens())
    assert float(odds[:, control].sum(-1).max()) < 3 * len(control) / len(extended)


def test_a_student_starts_from_an_exported_one(pretrained: str, extended: Any, tmp_path: Path) -> None:
    first = gpt2.build_network(student(pretrained), Train(), extended, seed=1)
    first.to(torch.bfloat16).save_pretrained(tmp_path)
    second = gpt2.build_network(student(pretrained, dropout=0.2), Train(), extended, seed=2, initial_student=str(tmp_path))
    assert second.dtype == torch.float32
    assert second.config.attn_pdrop == 0.2
    assert torch.equal(second.lm_head.weight, first.lm_head.weight.float())
    shorter = PreTrainedTokenizerFast.from_pretrained(pretrained)
    with pytest.raises(UserError, match="its vocabulary has"):
        gpt2.build_network(student(pretrained), Train(), shorter, seed=2, initial_student=str(tmp_path))


def test_an_unusable_pretrained_model_is_a_user_error(pretrained: str, tmp_path: Path) -> None:
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
        tokenizer.extend_tokenizer(str(tmp_path / "upcast"), VOCABULARY)


# ---- the teacher's vocabulary


@pytest.fixture(scope="module")
def teacher(pretrained: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama with a byte-level BPE; its embeddings lie in the second of two files, as those of a large model may."""
    folder = tmp_path_factory.mktemp("teacher")
    old = PreTrainedTokenizerFast.from_pretrained(pretrained)
    old.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(old), hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(folder, max_shard_size="9KB")
    assert (folder / "model.safetensors.index.json").exists()
    return str(folder)


@pytest.fixture(scope="module")
def cut(teacher: str) -> Any:
    return tokenizer.cut_tokenizer(tokenizer.load_pretrained_tokenizer(teacher), VOCABULARY, 290)


def test_the_cut_vocabulary_has_the_most_frequent_pieces_of_the_teacher_after_the_control_tokens(
    teacher: str, cut: Any
) -> None:
    control = VOCABULARY.control_tokens()
    assert len(cut) == 290
    assert cut.convert_ids_to_tokens(list(range(len(control)))) == control
    text = "an owl in deep snow, soft light"
    pieces = cut.convert_ids_to_tokens(tokenizer.encode_text(cut, [text])[0])
    assert cut.decode(tokenizer.encode_text(cut, [text])[0]) == f" {text}"
    known = tokenizer.load_pretrained_tokenizer(teacher).get_vocab()
    assert all(piece in known for piece in pieces)
    n_whole = len(tokenizer.load_pretrained_tokenizer(teacher).tokenize(f" {text}"))
    assert n_whole <= len(pieces) < len(text)


def test_a_cut_vocabulary_that_folds_case_has_no_piece_with_capitals(teacher: str) -> None:
    folding = VOCABULARY.model_copy(update={"lowercase": True})
    cut = tokenizer.cut_tokenizer(tokenizer.load_pretrained_tokenizer(teacher), folding, 310)
    texts = [*VOCABULARY.control_tokens(), "An OWL"]
    assert cut.decode(tokenizer.encode_text(cut, texts)[-1]) == " an owl"
    assert all(not set(ids) & set(cut.all_special_ids) for ids in tokenizer.encode_text(cut, texts))


@pytest.mark.parametrize("width", [16, 24, 32])
def test_a_new_student_starts_from_the_teachers_embeddings_of_its_pieces(
    teacher: str, cut: Any, width: int, tmp_path: Path
) -> None:
    pretrained_tokenizer = tokenizer.load_pretrained_tokenizer(teacher)
    ids, embeddings = initial_weights.teacher_embeddings(teacher, None, pretrained_tokenizer, cut, width)
    assert embeddings.shape == (len(cut) - len(VOCABULARY.control_tokens()), width)
    assert float(embeddings.std()) == pytest.approx(initial_weights.TOKEN_STD)
    known = pretrained_tokenizer.get_vocab()
    original = LlamaForCausalLM.from_pretrained(teacher).model.embed_tokens.weight.detach()
    original = original[[known[piece] for piece in cut.convert_ids_to_tokens(ids.tolist())]]
    distances, reduced = torch.pdist(original), torch.pdist(embeddings)
    correlation = torch.corrcoef(torch.stack([distances, reduced]))[0, 1]
    # Principal components keep the distances: nearly at 16 of 24 dimensions, fully from 24 on.
    assert float(correlation) > (0.7 if width < 24 else 0.999)
    save_file({"ids": ids, "embeddings": embeddings}, tmp_path / "embeddings.safetensors")
    network = gpt2.build_network(
        Student(depth=1, width=width, heads=2, context=32), Train(), cut, 1, embeddings=str(tmp_path / "embeddings.safetensors")
    )
    assert torch.equal(network.lm_head.weight[ids], embeddings)


def test_a_teacher_without_a_byte_level_vocabulary_is_a_user_error(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"student\.vocabulary: the teacher's tokenizer is not a byte-level BPE"):
        tokenizer.cut_tokenizer(tokenizer.load_pretrained_tokenizer(str(tmp_path)), VOCABULARY, 300)
    with pytest.raises(UserError, match="has no token embeddings in safetensors"):
        initial_weights.teacher_embeddings(str(tmp_path), None, LOADED[0], LOADED[0], 16)
    LlamaConfig().save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="its tokenizer can't be loaded"):
        tokenizer.load_pretrained_tokenizer(str(tmp_path / "bare"))


# ---- positions and the copying circuit


def test_the_same_distance_is_the_same_rotation_at_every_position(extended: Any) -> None:
    network = gpt2.build_network(Student(depth=1, width=64, heads=2, context=96), Train(), extended, seed=1)
    table = network.transformer.wpe.weight.detach()
    products = table @ table.T
    for distance in (1, 7, 40):
        assert torch.allclose(products.diagonal(distance), products[0, distance], atol=1e-5)
    assert float(table.square().mean().sqrt()) == pytest.approx(initial_weights.POSITION_STD)


@pytest.mark.parametrize(("depth", "width", "heads"), [(2, 192, 3), (3, 384, 6), (6, 384, 6)])
def test_a_network_that_starts_copying_continues_a_sequence_that_it_has_read(depth: int, width: int, heads: int) -> None:
    torch.manual_seed(0)
    network = GPT2LMHeadModel(GPT2Config(vocab_size=2000, n_positions=128, n_embd=width, n_layer=depth, n_head=heads)).eval()
    read = torch.randint(0, 2000, (4, 50))
    with torch.no_grad():
        before = network(torch.cat([read, read], dim=1)).logits[:, 50:-1].argmax(-1)
        initial_weights.wire_copying(network)
        after = network(torch.cat([read, read], dim=1)).logits[:, 50:-1].argmax(-1)
    assert float((before == read[:, 1:]).float().mean()) < 0.05
    assert float((after == read[:, 1:]).float().mean()) > 0.9


def test_a_new_student_starts_copying_with_the_teachers_embeddings(teacher: str, cut: Any, tmp_path: Path) -> None:
    shape = Student(depth=2, width=48, heads=3, context=64, start="copying")
    width = initial_weights.token_width(48, 3)
    ids, embeddings = initial_weights.teacher_embeddings(
        teacher, None, tokenizer.load_pretrained_tokenizer(teacher), cut, width
    )
    save_file({"ids": ids, "embeddings": embeddings}, tmp_path / "embeddings.safetensors")
    network = gpt2.build_network(shape, Train(), cut, seed=1, embeddings=str(tmp_path / "embeddings.safetensors"))
    assert torch.equal(network.lm_head.weight[ids, -width:], embeddings)
    assert not network.lm_head.weight[:, :-width].any()
    assert network.transformer.wpe.weight[:, :16].std() > 0


def test_a_network_too_small_to_copy_is_a_user_error() -> None:
    for small in (Student(depth=1, width=192, start="copying"), Student(depth=3, width=128, start="copying")):
        with pytest.raises(UserError, match=r"student\.start: copying takes two layers and three heads"):
            gpt2.Shape.of(small, Train())
