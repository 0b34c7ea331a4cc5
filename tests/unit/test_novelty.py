"""Shares copied from training prompts, against their definition."""

import math

import pyarrow as pa
import pytest
from fakes.fake_evaluation import row, table
from hypothesis import given, settings
from hypothesis import strategies as st

from udrl.evaluate.metrics import novelty
from udrl.evaluate.outputs import columns

lines = st.lists(st.lists(st.sampled_from(["a", "B", "ü"]), min_size=6, max_size=12).map(" ".join), max_size=8)
EIGHT = "a b c d e f g h"


def training(*prompts: str) -> pa.Table:
    return pa.table({"prompt": pa.array(prompts, pa.string())})


def copied_shares(prompts: list[str], *parts: pa.Table) -> list[float]:
    rows = columns(table(*(row(intent=i, prompt=prompt) for i, prompt in enumerate(prompts))))
    return novelty.add_copied_column(rows, parts)[1][novelty.COPIED_8].tolist()


def test_copied_runs_against_hand_counts() -> None:
    copied = copied_shares([f"{EIGHT} i", "h g f e d c b a", "a b c"], training(f"zero {EIGHT}"), training("four five six"))
    assert copied == pytest.approx([1 / 2, 0, math.nan], nan_ok=True)  # of "a..h" and "b..i" the first; no run in three words


def test_a_run_does_not_cross_into_the_next_prompt() -> None:
    assert copied_shares([EIGHT], training("a b c d", "e f g h")) == [0]


def test_runs_match_regardless_of_case_and_white_space() -> None:
    assert copied_shares(["A  b C d\te f g h"], training("x"), training(f"{EIGHT} ")) == [1]


def test_a_rejected_output_has_no_share_since_it_would_look_original() -> None:
    rows = columns(table(row(prompt=EIGHT), row(intent=1, prompt=EIGHT, reason="echo"), row(policy="teacher", prompt="")))
    n, with_column = novelty.add_copied_column(rows, iter([training(f"{EIGHT} i", "else")]))
    assert with_column[novelty.COPIED_8].tolist() == pytest.approx([1, math.nan, math.nan], nan_ok=True)
    assert n == 2


def test_without_training_prompts_novelty_is_unknown() -> None:
    rows = columns(table(row()))
    assert novelty.add_copied_column(rows, None) == (0, rows)
    assert novelty.add_copied_column(columns(table()), [training("a")])[0] == 1


@settings(deadline=None, max_examples=60)
@given(lines.filter(bool), lines, st.integers(0, 8))
def test_copied_shares_are_their_definition_for_any_batches(prompts: list[str], texts: list[str], at: int) -> None:
    def runs(prompt: str) -> list[tuple[str, ...]]:
        words = prompt.lower().split()
        return [tuple(words[i : i + 8]) for i in range(len(words) - 7)]

    known = {run for prompt in texts for run in runs(prompt)}
    expected = [sum(run in known for run in runs(p)) / len(runs(p)) if runs(p) else math.nan for p in prompts]
    assert copied_shares(prompts, training(*texts[:at]), training(*texts[at:])) == pytest.approx(expected, nan_ok=True)
