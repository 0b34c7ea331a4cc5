"""Control tables on values worked out by hand."""

from typing import Any

import pytest
from fakes.fake_evaluation import row, table

from udrl.evaluate.document import LengthControl, RewardControl
from udrl.evaluate.metrics import control
from udrl.evaluate.metrics.intervals import Bootstrap
from udrl.evaluate.outputs import columns


def lengths(achieved: dict[int, list[int]], probe: str = "length") -> list[dict[str, Any]]:
    return [
        row(probe=probe, intent=i, command_words=c, n_words=n) for c, all_n in achieved.items() for i, n in enumerate(all_n)
    ]


def measure(rows: list[dict[str, Any]]) -> LengthControl:
    return control.length_control(columns(table(*rows)), Bootstrap(100))


def test_length_control_against_hand_counts() -> None:
    rows = lengths({6: [6, 7, 9], 12: [12, 12, 10]})
    # A refusal is a miss, however many words it had.
    rows.append(row(probe="length", intent=3, command_words=12, n_words=12, prompt="", reason="repetitive"))
    measured = measure(rows)
    six, twelve = measured.levels
    assert (six.words, six.mean, six.p10, six.p90) == (6, pytest.approx(22 / 3), pytest.approx(6.2), pytest.approx(8.6))
    assert (twelve.words, twelve.mean) == (12, pytest.approx(34 / 3))
    assert (measured.n, measured.rejected, measured.mean) == (7, pytest.approx(1 / 7), pytest.approx(28 / 3))
    assert (measured.mae, measured.exact) == (pytest.approx((0 + 1 + 3 + 0 + 0 + 2) / 6), pytest.approx(3 / 7))
    assert measured.within_2_accepted == pytest.approx(5 / 6)
    assert measured.within_2.value == pytest.approx(5 / 7)
    assert measured.within_2.low < 5 / 7 < measured.within_2.high
    assert measured.rises is True


def test_an_output_that_is_always_rejected_has_no_length() -> None:
    measured = measure([row(probe="length", command_words=6, n_words=6, prompt="", reason="echo")])
    assert (measured.within_2.value, measured.exact, measured.mean, measured.rejected) == (0, 0, None, 1)


def test_over_tasks_the_length_rises_only_if_it_does_on_every_task() -> None:
    up, down = measure(lengths({6: [6], 12: [12]})), measure(lengths({6: [9], 12: [8]}))
    rows = columns(table(*lengths({6: [6, 9], 12: [12, 8]})))
    assert control.length_control_over_tasks(rows, [up, up], Bootstrap(100)).rises is True
    assert control.length_control_over_tasks(rows, [up, down], Bootstrap(100)).rises is False
    assert control.length_control_over_tasks(rows, [], Bootstrap(100)).rises is None
    assert control.length_control_over_tasks(rows, [up], Bootstrap(100)).levels == []


def test_a_rise_that_half_of_the_intents_contradict_is_open() -> None:
    rows = [
        row(intent=i, probe="length", command_words=c, n_words=10 + (c if i % 2 else -c)) for i in range(20) for c in (1, 2)
    ]
    assert measure(rows).rises is None


def rewards(*means: float, **by_judge: list[float]) -> RewardControl:
    rows = [
        row(
            intent=i,
            probe="reward",
            command_reward=b,
            relevance=m,
            **{f"judge_{judge}": scores[b] for judge, scores in by_judge.items()},
        )
        for b, m in enumerate(means)
        for i in range(3)
    ]
    rows += [row(intent=9, probe="reward", command_reward=-1, relevance=1.0)]  # "any" is not a bin
    return control.reward_control(columns(table(*rows, judges=tuple(by_judge))), Bootstrap(100))


def test_reward_control_says_whether_the_curve_rises() -> None:
    up, bent, down = rewards(0.1, 0.2, 0.3), rewards(0.1, 0.4, 0.3), rewards(0.3, 0.2)
    assert [t.rises for t in (up, bent, down)] == [True, True, False]
    assert up.relevance.spearman == pytest.approx(1)
    assert up.relevance.difference.value == pytest.approx(0.2)
    assert [mean.value for mean in bent.relevance.means] == pytest.approx([0.1, 0.4, 0.3])
    assert rewards(0.3).rises is None


def test_a_judge_sees_a_reward_curve_of_its_own() -> None:
    measured = rewards(0.1, 0.2, 0.3, agrees=[1.0, 2.0, 4.0], differs=[0.5, 0.3, 0.4])
    agrees, differs = measured.judges["agrees"], measured.judges["differs"]
    assert agrees.difference.value == pytest.approx(3)
    assert differs.difference.value == pytest.approx(-0.1)
    assert agrees.spearman == pytest.approx(1)
    assert differs.spearman == pytest.approx(-0.5)
    assert [mean.value for mean in agrees.means] == pytest.approx([1, 2, 4])


def test_a_top_bin_that_refuses_does_not_rise() -> None:
    rows = [row(intent=i, probe="reward", command_reward=0, relevance=0.4, judge_x=0.4) for i in range(40)]
    rows += [row(intent=i, probe="reward", command_reward=1, prompt="", reason="echo") for i in range(30)]
    rows += [row(intent=i, probe="reward", command_reward=1, relevance=0.9, judge_x=0.9) for i in range(30, 40)]
    measured = control.reward_control(columns(table(*rows, judges=("x",))), Bootstrap(100))
    assert measured.relevance.means[1].value == pytest.approx(0.9)
    assert measured.judges["x"].means[1].value == pytest.approx(0.9)  # of accepted prompts, as relevance is
    assert measured.rejected[1] == 0.75
    assert measured.rises is False
