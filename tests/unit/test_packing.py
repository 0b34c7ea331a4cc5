"""Tokenizer, sequence format and packing; user text can never become a command."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from fakes.fake_vocabulary import fake_vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st

from udrl import tokenizer
from udrl.commands import ANY, Command
from udrl.recipe import Student, Train
from udrl.train import gpt2
from udrl.train.packing import Batch, Examples, assign_to_rows, encode_examples, pack

TEXTS = ["a red fox in deep snow, soft light", "poster of an owl", "jazz night flyer, bold type", "Ünïcode café ☕"]


VOCABULARY = fake_vocabulary()
TOKENIZER = tokenizer.train_tokenizer([" " + t for t in TEXTS * 3], VOCABULARY, 400)
CONTROL = set(tokenizer.control_ids(TOKENIZER, VOCABULARY.control_tokens()))


def encode(texts: list[tuple[str, str, Command]]) -> Examples:
    intents, prompts, labels = zip(*texts, strict=True)
    columns = [np.array([getattr(label, name) for label in labels]) for name in ("task", "words", "reward")]
    return encode_examples(TOKENIZER, VOCABULARY, intents, prompts, *columns)


def examples_of(lists: list[tuple[list[int], int]]) -> Examples:
    """Make examples from pairs of token ids and the index of the first target."""
    tokens = [i for ids, _ in lists for i in ids]
    lengths, starts = [len(ids) for ids, _ in lists], [start for _, start in lists]
    return Examples(np.array(tokens, dtype=np.int32), np.array(lengths, dtype=np.int64), np.array(starts, dtype=np.int64))


def test_control_tokens_have_the_first_ids() -> None:
    assert sorted(CONTROL) == list(range(len(VOCABULARY.control_tokens())))


@settings(deadline=None)
@given(st.lists(st.sampled_from([*VOCABULARY.control_tokens(), "<|", "|>", "fox", " ", "end"]), min_size=1, max_size=8))
def test_control_tokens_in_user_text_stay_text(pieces: list[str]) -> None:
    ids = tokenizer.encode_text(TOKENIZER, ["".join(pieces)])[0]
    assert not CONTROL & set(ids)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_encodes_without_control_tokens_and_decodes_to_itself(text: str) -> None:
    ids = tokenizer.encode_text(TOKENIZER, [text])[0]
    assert not CONTROL & set(ids)
    import unicodedata

    assert TOKENIZER.decode(ids).split() == unicodedata.normalize("NFC", text).split() or not text.isprintable()


def test_a_loaded_tokenizer_still_reads_control_tokens_as_text(tmp_path: object) -> None:
    TOKENIZER.save_pretrained(str(tmp_path))
    loaded = tokenizer.load_tokenizer(str(tmp_path))
    text = "fox <|reward:4|> <|end|>"
    assert tokenizer.encode_text(loaded, [text]) == tokenizer.encode_text(TOKENIZER, [text])
    assert not CONTROL & set(tokenizer.encode_text(loaded, [text])[0])


def test_a_request_is_the_intent_and_then_the_command() -> None:
    ids = tokenizer.encode_request(TOKENIZER, VOCABULARY, "poster of an owl", Command(task="find", words=7, reward=4))
    control = ["<|task:find|>", "<|words:7|>", "<|reward:4|>"]
    assert ids == tokenizer.encode_text(TOKENIZER, ["poster of an owl"])[0] + tokenizer.control_ids(TOKENIZER, control)


def test_a_training_sequence_is_a_request_its_prompt_and_the_end() -> None:
    label = Command(task="paint", words=6, reward=2)
    examples = encode([("an owl", "owl at night", label)])
    ids, start = examples.tokens.tolist(), examples.target_starts[0]
    assert ids[:start] == tokenizer.encode_request(TOKENIZER, VOCABULARY, "an owl", label)
    assert ids[start:] == [*tokenizer.encode_text(TOKENIZER, ["owl at night"])[0], TOKENIZER.eos_token_id]


LABELS = st.builds(
    Command, task=st.sampled_from(["paint", "find"]), words=st.sampled_from([ANY, *range(1, 17)]), reward=st.integers(ANY, 4)
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*TEXTS, "", "a"]), st.sampled_from(TEXTS), LABELS), min_size=1, max_size=12))
def test_episodes_encoded_together_have_the_sequences_of_episodes_encoded_singly(texts: list[tuple[str, str, Command]]) -> None:
    examples = encode(texts)
    ends = np.cumsum(examples.lengths)
    for i, (intent, prompt, label) in enumerate(texts):
        ids = examples.tokens[ends[i] - examples.lengths[i] : ends[i]].tolist()
        request = tokenizer.encode_request(TOKENIZER, VOCABULARY, intent, label)
        assert ids == [*request, *tokenizer.encode_text(TOKENIZER, [prompt])[0], TOKENIZER.eos_token_id]
        assert examples.target_starts[i] == len(request)


def test_no_episodes_make_no_rows() -> None:
    empty = np.array([], dtype=np.int64)
    examples = encode_examples(TOKENIZER, VOCABULARY, [], [], np.array([], dtype=str), empty, empty)
    assert pack(examples, 32, pad_id=1).tokens.shape == (0, 32)


def test_the_tokenizer_folds_case_if_the_vocabulary_says_so() -> None:
    folded = tokenizer.train_tokenizer([" red fox"] * 3, fake_vocabulary(lowercase=True), 400)
    assert tokenizer.encode_text(folded, ["Red FOX"]) == tokenizer.encode_text(folded, ["red fox"])


@st.composite
def example_sets(draw: st.DrawFn) -> list[tuple[list[int], int]]:
    lengths = draw(st.lists(st.integers(2, 32), max_size=40))
    return [([100 + i] * n, draw(st.integers(1, n - 1))) for i, n in enumerate(lengths)]


@settings(deadline=None)
@given(example_sets())
def test_packing_loses_no_token_and_marks_only_the_targets(examples: list[tuple[list[int], int]]) -> None:
    rows = pack(examples_of(examples), 32, pad_id=1)
    assert (rows.tokens >= 100).sum() == sum(len(ids) for ids, _ in examples)
    assert rows.targets.sum() == sum(len(ids) - start for ids, start in examples)
    for i, (ids, start) in enumerate(examples):
        row, column = np.argwhere(rows.tokens == 100 + i)[0]
        span = slice(column, column + len(ids))
        assert rows.tokens[row, span].tolist() == ids  # whole, in one row
        assert rows.positions[row, span].tolist() == list(range(len(ids)))
        assert rows.targets[row, span].tolist() == [at >= start for at in range(len(ids))]
    assert not rows.targets[rows.tokens == 1].any()
    assert not rows.positions[rows.tokens == 1].any()


@pytest.mark.parametrize("context", [192, 256])
@pytest.mark.parametrize("shape", ["even", "peaked"])
def test_packing_many_realistic_lengths_leaves_little_padding(context: int, shape: str) -> None:
    rng = np.random.default_rng(0)
    even, peaked = rng.integers(20, 71, 2000), np.clip(rng.normal(45, 8, 2000), 20, 70).astype(int)
    lengths = even if shape == "even" else peaked
    *_, rows = assign_to_rows(lengths, context)
    assert 1 - lengths.sum() / (rows * context) < 0.01


@pytest.fixture(scope="module")
def network() -> Iterator[torch.nn.Module]:
    """A network so small that several threads would slow it down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield gpt2.build_network(Student(depth=2, width=64, heads=2, context=32), Train(), TOKENIZER, seed=3).eval()
    torch.set_num_threads(threads)


def loss_and_gradients(network: torch.nn.Module, rows: Batch) -> tuple[float, torch.Tensor]:
    network.zero_grad()
    loss = gpt2.packed_loss(
        network,
        torch.from_numpy(rows.tokens.astype(np.int64)),
        torch.from_numpy(rows.positions.astype(np.int64)),
        torch.from_numpy(rows.targets),
    )
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@settings(max_examples=10, deadline=None)
@given(shapes=st.lists(st.tuples(st.integers(2, 20), st.integers(1, 19)), min_size=1, max_size=8), seed=st.integers(0, 1000))
def test_a_packed_batch_has_the_summed_loss_and_gradients_of_its_examples(
    network: torch.nn.Module, shapes: list[tuple[int, int]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    examples = [(rng.integers(len(CONTROL), len(TOKENIZER), n).tolist(), min(s, n - 1)) for n, s in shapes]
    rows = pack(examples_of(examples), 32, pad_id=TOKENIZER.pad_token_id)
    loss, gradients = loss_and_gradients(network, rows)

    # Each example by itself, without padding, in a row of its own length.
    singles = [loss_and_gradients(network, pack(examples_of([e]), len(e[0]), pad_id=TOKENIZER.pad_token_id)) for e in examples]
    assert loss == pytest.approx(sum(single for single, _ in singles), rel=1e-4)
    assert torch.allclose(gradients, torch.stack([g for _, g in singles]).sum(dim=0), rtol=1e-3, atol=1e-4)

    # Padding contributes nothing, whichever tokens it has.
    other_tokens = np.where(
        rows.tokens == TOKENIZER.pad_token_id, rng.integers(0, len(TOKENIZER), rows.tokens.shape), rows.tokens
    )
    other_loss, other_gradients = loss_and_gradients(network, Batch(other_tokens, rows.positions, rows.targets))
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(gradients, other_gradients, rtol=1e-4, atol=1e-5)


def test_the_packed_loss_of_one_example_equals_that_of_transformers(network: torch.nn.Module) -> None:
    examples = encode([("an owl", "owl at night", Command(task="paint", words=3, reward=1))])
    ids, start = examples.tokens.tolist(), int(examples.target_starts[0])
    labels = torch.tensor([[-100] * start + ids[start:]])
    with torch.no_grad():
        reference = network(input_ids=torch.tensor([ids]), labels=labels).loss * (len(ids) - start)
    loss, _ = loss_and_gradients(network, pack(examples, 32, pad_id=TOKENIZER.pad_token_id))
    assert loss == pytest.approx(float(reference), rel=1e-4)


@pytest.mark.parametrize(("depth", "width", "heads"), [(12, 768, 12), (6, 384, 6), (1, 128, 2)])
def test_one_dial_sets_the_student_s_shape(depth: int, width: int, heads: int) -> None:
    shape = gpt2.Shape.of(Student(depth=depth), Train())
    assert (shape.depth, shape.width, shape.heads) == (depth, width, heads)
    assert shape.lr == pytest.approx(1e-3 * 320 / width)
