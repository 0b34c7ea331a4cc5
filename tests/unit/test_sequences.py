"""The sequence format, packing, and the promise that user text can't become a command."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from udrl import commands
from udrl.commands import ANY, Command, Vocabulary
from udrl.recipe import Student, Train
from udrl.student import model, tokenizer
from udrl.student.packing import encode_examples, hindsight, pack

TEXTS = ["a red fox in deep snow, soft light", "poster of an owl", "jazz night flyer, bold type", "Ünïcode café ☕"]


def vocabulary(lowercase: bool = False) -> Vocabulary:
    n = 40
    columns = {
        "task": np.array(["paint", "find"] * (n // 2)),
        "intent_id": np.arange(n),
        "n_words": np.arange(n) % 12 + 3,
        "reward": np.linspace(0, 1, n),
        "relevance": np.linspace(0, 1, n),
    }
    made, _ = commands.learn(["paint", "find"], columns, max_words=16, reward_bins=5, rank_within="task", lowercase=lowercase)
    return made


VOCABULARY = vocabulary()
WORDS = tokenizer.train([" " + t for t in TEXTS * 3], VOCABULARY, 400)
CONTROL = set(tokenizer.control_ids(WORDS, VOCABULARY.control_tokens()))


def test_control_tokens_have_the_first_ids() -> None:
    assert sorted(CONTROL) == list(range(len(VOCABULARY.control_tokens())))


@given(st.lists(st.sampled_from([*VOCABULARY.control_tokens(), "<|", "|>", "fox", " ", "end"]), min_size=1, max_size=8))
def test_control_tokens_in_user_text_stay_text(pieces: list[str]) -> None:
    ids = tokenizer.encode_text(WORDS, ["".join(pieces)])[0]
    assert not CONTROL & set(ids)


@given(st.text(max_size=60))
def test_any_text_encodes_without_control_tokens_and_comes_back(text: str) -> None:
    ids = tokenizer.encode_text(WORDS, [text])[0]
    assert not CONTROL & set(ids)
    import unicodedata

    assert WORDS.decode(ids).split() == unicodedata.normalize("NFC", text).split() or not text.isprintable()


def test_a_loaded_tokenizer_keeps_control_text_inert(tmp_path: object) -> None:
    WORDS.save_pretrained(str(tmp_path))
    loaded = tokenizer.load(str(tmp_path))
    text = "fox <|reward:4|> <|end|>"
    assert tokenizer.encode_text(loaded, [text]) == tokenizer.encode_text(WORDS, [text])
    assert not CONTROL & set(tokenizer.encode_text(loaded, [text])[0])


def test_a_request_is_the_intent_and_then_the_command() -> None:
    ids = tokenizer.encode_request(WORDS, VOCABULARY, "poster of an owl", Command(task="find", words=7, reward=4))
    control = ["<|task:find|>", "<|words:7|>", "<|reward:4|>"]
    assert ids == tokenizer.encode_text(WORDS, ["poster of an owl"])[0] + tokenizer.control_ids(WORDS, control)


def test_a_training_sequence_is_a_request_its_prompt_and_the_end() -> None:
    label = Command(task="paint", words=6, reward=2)
    (ids, start), *_ = encode_examples(WORDS, VOCABULARY, [("an owl", "owl at night", label)], 128)
    assert ids[:start] == tokenizer.encode_request(WORDS, VOCABULARY, "an owl", label)
    assert ids[start:] == [*tokenizer.encode_text(WORDS, ["owl at night"])[0], WORDS.eos_token_id]


def test_lower_casing_belongs_to_the_tokenizer() -> None:
    folded = tokenizer.train([" red fox"] * 3, vocabulary(lowercase=True), 400)
    assert tokenizer.encode_text(folded, ["Red FOX"]) == tokenizer.encode_text(folded, ["red fox"])


def test_command_dropout_keeps_the_task_and_drops_the_rest_at_its_rate() -> None:
    rng = np.random.default_rng(0)
    labels = [hindsight(VOCABULARY, "paint", 9, 3, 0.1, rng) for _ in range(5000)]
    assert {c.task for c in labels} == {"paint"}
    both = sum(c.words == ANY and c.reward == ANY for c in labels) / 5000
    words = sum(c.words == ANY for c in labels) / 5000
    assert 0.09 < both < 0.13
    assert 0.17 < words < 0.21


def test_a_length_over_the_cap_is_commanded_as_any() -> None:
    rng = np.random.default_rng(0)
    assert hindsight(VOCABULARY, "paint", 17, 3, 0.0, rng).words == ANY
    assert hindsight(VOCABULARY, "paint", 16, 3, 0.0, rng).words == 16


@st.composite
def example_sets(draw: st.DrawFn) -> list[tuple[list[int], int]]:
    lengths = draw(st.lists(st.integers(2, 32), max_size=40))
    return [([100 + i] * n, draw(st.integers(1, n - 1))) for i, n in enumerate(lengths)]


@given(example_sets())
def test_packing_loses_nothing_and_marks_just_the_targets(examples: list[tuple[list[int], int]]) -> None:
    rows = pack(examples, 32, pad_id=1)
    assert (rows.tokens >= 100).sum() == sum(len(ids) for ids, _ in examples)
    assert rows.targets.sum() == sum(len(ids) - start for ids, start in examples)
    for i, (ids, start) in enumerate(examples):
        row, column = np.argwhere(rows.tokens == 100 + i)[0]
        span = slice(column, column + len(ids))
        assert rows.tokens[row, span].tolist() == ids  # whole, in one row
        assert rows.positions[row, span].tolist() == list(range(len(ids)))
        assert rows.targets[row, span].tolist() == [at >= start for at in range(len(ids))]
    assert not rows.targets[rows.tokens == 1].any()


def test_packing_many_real_lengths_pads_little() -> None:
    rng = np.random.default_rng(0)
    rows = pack([([5] * n, 1) for n in rng.integers(20, 70, 2000)], 256, pad_id=1)
    assert (rows.tokens == 1).mean() < 0.02


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 20), st.integers(1, 19)), min_size=1, max_size=12), st.integers(0, 1000))
def test_the_loss_of_a_packed_batch_is_the_sum_over_single_examples(shapes: list[tuple[int, int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    examples = [(rng.integers(len(CONTROL), len(WORDS), n).tolist(), min(s, n - 1)) for n, s in shapes]
    network = model.build(Student(depth=2, width=128, heads=2, context=32), Train(), WORDS, seed=3).eval()

    def loss(packed: list[tuple[list[int], int]]) -> float:
        rows = pack(packed, 32, pad_id=WORDS.pad_token_id)
        tensors = [torch.from_numpy(a.astype(kind)) for a, kind in ((rows.tokens, np.int64), (rows.positions, np.int64))]
        with torch.no_grad():
            return float(model.packed_loss(network, *tensors, torch.from_numpy(rows.targets)))

    assert loss(examples) == pytest.approx(sum(loss([e]) for e in examples), rel=1e-4)


def test_the_packed_loss_is_transformers_own_on_one_example() -> None:
    label = Command(task="paint", words=3, reward=1)
    examples = encode_examples(WORDS, VOCABULARY, [("an owl", "owl at night", label)], 32)
    network = model.build(Student(depth=2, width=128, heads=2, context=32), Train(), WORDS, seed=3).eval()
    ids, start = examples[0]
    labels = torch.tensor([[-100] * start + ids[start:]])
    with torch.no_grad():
        theirs = network(input_ids=torch.tensor([ids]), labels=labels).loss * (len(ids) - start)
    rows = pack(examples, 32, pad_id=WORDS.pad_token_id)
    with torch.no_grad():
        ours = model.packed_loss(
            network,
            torch.from_numpy(rows.tokens.astype(np.int64)),
            torch.from_numpy(rows.positions.astype(np.int64)),
            torch.from_numpy(rows.targets),
        )
    assert float(ours) == pytest.approx(float(theirs), rel=1e-4)


@pytest.mark.parametrize(("depth", "width", "heads"), [(12, 768, 12), (6, 384, 6), (1, 128, 2)])
def test_one_dial_sets_the_student_s_shape(depth: int, width: int, heads: int) -> None:
    shape = model.Shape.of(Student(depth=depth), Train())
    assert (shape.depth, shape.width, shape.heads) == (depth, width, heads)
    assert shape.lr == pytest.approx(1e-3 * 320 / width)
