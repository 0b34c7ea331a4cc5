"""Shares copied from training prompts, against their definition."""

import pyarrow as pa
import pytest
from fakes.fake_evaluation import row, table
from hypothesis import given, settings
from hypothesis import strategies as st

from udrl.evaluate.document import CopiedShares, Novelty
from udrl.evaluate.metrics import novelty
from udrl.evaluate.outputs import columns

lines = st.lists(st.lists(st.sampled_from(["a", "B", "ü", "d"]), min_size=1, max_size=10).map(" ".join), max_size=8)


def training(*prompts: str) -> pa.Table:
    return pa.table(
        {"task": ["x"] * len(prompts), "prompt": pa.array(prompts, pa.string()), "policy": ["teacher"] * len(prompts)}
    )


def student_shares(prompts: list[str], *parts: pa.Table) -> CopiedShares:
    rows = columns(table(*(row(intent=i, prompt=prompt) for i, prompt in enumerate(prompts))))
    return novelty.copied_shares(rows, parts)[0].policies["student"]


def test_copied_runs_against_hand_counts() -> None:
    copied = student_shares(
        ["one two three four five six", "a b c d e"], training("zero one two three four five", "four five six")
    )
    assert copied.copied_5 == pytest.approx((1 / 2 + 0) / 2)  # of "one..five" and "two..six" the first
    assert copied.copied_8 is None  # no prompt has eight words
    assert copied.exact == 0


def test_an_n_gram_does_not_cross_into_the_next_prompt() -> None:
    assert student_shares(["a b c d e"], training("a b c", "d e")).copied_5 == 0


def test_whole_prompts_match_regardless_of_case_and_white_space() -> None:
    copied = student_shares(["A  soft Light", "another"], training("x"), training("a soft light "))
    assert copied.exact == 0.5


def test_each_policy_has_its_own_shares_and_rejected_prompts_are_left_out() -> None:
    rows = columns(
        table(
            row(prompt="a b c d e f g h"),
            row(intent=1, prompt="", reason="empty"),
            row(policy="teacher", prompt="h g f e d c b a"),
        )
    )
    copied, with_column = novelty.copied_shares(rows, iter([training("a b c d e f g h i", "else")]))
    assert with_column[novelty.COPIED_8].tolist() == pytest.approx([1, float("nan"), 0], nan_ok=True)
    assert copied.training == 2
    assert copied.policies["student"] == CopiedShares(exact=0, copied_5=1, copied_8=1)
    assert copied.policies["teacher"] == CopiedShares(exact=0, copied_5=0, copied_8=0)


def test_without_training_prompts_novelty_is_unknown() -> None:
    assert novelty.copied_shares(columns(table(row())), None)[0] == Novelty(policies={}, training=0)
    assert novelty.copied_shares(columns(table()), [training("a")])[0] == Novelty(policies={}, training=1)


@settings(deadline=None, max_examples=60)
@given(lines.filter(bool), lines, st.integers(0, 8))
def test_copied_shares_are_their_definition_for_any_batches(prompts: list[str], texts: list[str], at: int) -> None:
    def grams(prompt: str, n: int) -> list[tuple[str, ...]]:
        words = prompt.lower().split()
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    copied = student_shares(prompts, training(*texts[:at]), training(*texts[at:]))
    for n in (5, 8):
        training_grams = {gram for prompt in texts for gram in grams(prompt, n)}
        shares = [sum(gram in training_grams for gram in grams(p, n)) / len(grams(p, n)) for p in prompts if grams(p, n)]
        expected = sum(shares) / len(shares) if shares else None
        assert getattr(copied, f"copied_{n}") == pytest.approx(expected)
    exact = {prompt.lower() for prompt in texts}
    assert copied.exact == pytest.approx(sum(prompt.lower() in exact for prompt in prompts) / len(prompts))
