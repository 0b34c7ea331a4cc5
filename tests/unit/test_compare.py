"""Finished evaluations side by side: the metrics that are compared, those that are left out, and when CI fails."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fakes import fake_evaluation as made_up
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import compare as job
from udrl import storage
from udrl.errors import UserError, exit_code
from udrl.evaluate.compare import thresholds
from udrl.evaluate.compare.comparison import Comparison, compare, plain_text
from udrl.evaluate.compare.evaluated_runs import EvaluatedRun, StoredEvaluation, load_runs
from udrl.evaluate.document import EvaluationDocument, Interval, JudgeProfile
from udrl.evaluate.outputs import columns
from udrl.run import Run

JUDGES = {"gated": made_up.judge(model="hub/base-1b")}
RECIPE = "rewards: {relevance: embedding, embedder: %s}"


def rows(scores: dict[int, float], task: str = "text_to_image", policy: str = "student", **values: Any) -> list[dict]:
    """One accepted prompt of the default probe for each intent, with its relevance; the judge says twice as much."""
    return [
        made_up.row(task, intent, policy, **{"relevance": score, "judge_gated": 2 * score, **values})
        for intent, score in scores.items()
    ]


def swept(task: str = "text_to_image", off: int = 0, gain: float = 0.2, intents: int = 4) -> list[dict]:
    """Lengths 6 and 12, missed by ``off`` words; bins 0 and 1, ``gain`` apart."""
    rows = []
    for intent in range(intents):
        for words in (6, 12):
            rows.append(made_up.row(task, intent, "student", "length", command_words=words, n_words=words + off))
        for level in (0, 1):
            values = {"command_reward": level, "relevance": 0.3 + gain * level + 0.01 * intent}
            rows.append(made_up.row(task, intent, "student", "reward", **values))
    return rows


def write(folder: Path, *outputs: dict, judges: dict[str, JudgeProfile] | None = None, **changes: Any) -> str:
    """Write a finished evaluation to ``folder``/evaluation; return ``folder``."""
    judges = JUDGES if judges is None else judges
    named = [{name: value for name, value in row.items() if name[:6] != "judge_" or name[6:] in judges} for row in outputs]
    document = made_up.document(("text_to_image",), judges=judges, rows=len(outputs), bootstrap=200)
    changes = {"name": folder.name, "seed": 0, "policies": {}, **changes}
    return save(folder, made_up.table(*named, judges=tuple(judges)), document.model_copy(update=changes))


def save(folder: Path, table: pa.Table, document: EvaluationDocument) -> str:
    paths = Run(str(folder)).evaluation("evaluation")
    storage.write_table(paths.outputs, table)
    document.save(paths.metrics)
    return str(folder)


def compared(*runs: str, policy: str = "student") -> Comparison:
    return compare(load_runs(runs), policy)


def value(comparison: Comparison, metric: str, task: str = "all", run: str = "B") -> Interval:
    return comparison.scopes[task][metric].values[run]


def difference(comparison: Comparison, metric: str, task: str = "all", run: str = "B") -> Interval:
    return comparison.scopes[task][metric].differences[run]


def bounds(interval: Interval) -> tuple[float | None, float | None, float | None]:
    return interval.value, interval.low, interval.high


EVEN = dict.fromkeys(range(4), 0.4)


# --- measurements ---


def test_values_and_differences_against_hand_counts(tmp_path: Path) -> None:
    a = write(tmp_path / "a", *rows({0: 0.2, 1: 0.4, 2: 0.6}))
    b = write(tmp_path / "b", *rows({0: 0.3, 1: 0.5, 2: 0.7}))
    comparison = compared(a, b)
    assert value(comparison, "relevance", run="A").value == pytest.approx(0.4)
    assert value(comparison, "relevance").value == pytest.approx(0.5)
    # Every intent gained the same: paired, the difference is certain although the intents differ in difficulty.
    assert bounds(difference(comparison, "relevance")) == pytest.approx((0.1, 0.1, 0.1))
    assert difference(comparison, "judge.gated").value == pytest.approx(0.2)
    assert value(comparison, "relevance", run="A").low < 0.3
    assert comparison.warnings == []


def test_a_rejected_prompt_counts_as_zero_and_for_a_judge_as_its_table_says(tmp_path: Path) -> None:
    refused = rows({3: 0.0}, prompt="", reason="empty", relevance=None, judge_gated=0.2)
    comparison = compared(write(tmp_path / "a", *rows(EVEN)), write(tmp_path / "b", *rows({0: 0.4, 1: 0.4, 2: 0.4}), *refused))
    assert value(comparison, "relevance").value == pytest.approx(0.3)
    assert difference(comparison, "judge.gated").value == pytest.approx(-0.15)
    assert difference(comparison, "rejected").value == pytest.approx(0.25)


def test_control_is_measured_by_task_and_over_all(tmp_path: Path) -> None:
    a = write(tmp_path / "a", *rows(EVEN), *swept(), *rows(EVEN, "image_search"), *swept("image_search"))
    more = [*rows(EVEN, "image_search"), *swept("image_search", gain=-0.2)]
    b = write(tmp_path / "b", *rows(EVEN), *swept(off=3, gain=0.1), *more)
    comparison = compared(a, b)
    assert value(comparison, "length.mae", "text_to_image").value == pytest.approx(3)
    assert value(comparison, "length.mae").value == pytest.approx(1.5)
    assert difference(comparison, "length.exact").value == pytest.approx(-0.5)
    assert value(comparison, "length.within_2", "image_search").value == 1
    assert value(comparison, "reward.difference", "text_to_image").value == pytest.approx(0.1)
    assert bounds(difference(comparison, "reward.difference", "text_to_image")) == pytest.approx((-0.1, -0.1, -0.1))
    assert value(comparison, "reward.difference").value == pytest.approx((0.1 - 0.2) / 2)


def test_the_reward_s_gain_takes_only_intents_with_both_ends_accepted(tmp_path: Path) -> None:
    sweep = swept(intents=2)
    sweep[-2] |= {"prompt": "", "reason": "echo", "relevance": None}  # bin 0 of the last intent
    run = write(tmp_path / "a", *rows(EVEN), *sweep)
    assert bounds(value(compared(run, run), "reward.difference")) == pytest.approx((0.2, 0.2, 0.2))


def test_another_policy_can_be_compared(tmp_path: Path) -> None:
    teacher = rows({0: 0.9, 1: 0.9}, policy="teacher")
    a, b = (write(tmp_path / name, *rows(EVEN), *teacher) for name in "ab")
    assert value(compared(a, b, policy="teacher"), "relevance").value == pytest.approx(0.9)
    with pytest.raises(UserError, match=r"no outputs of policy 'llama'; policies with outputs: student, teacher"):
        compared(a, b, policy="llama")


def test_three_runs_are_each_compared_with_the_first(tmp_path: Path) -> None:
    runs = [write(tmp_path / str(n), *rows({0: n, 1: n})) for n in (0.4, 0.5, 0.2)]
    comparison = compared(*runs)
    assert [difference(comparison, "relevance", run=run).value for run in "BC"] == pytest.approx([0.1, -0.2])


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8))
def test_a_run_does_not_differ_from_itself(scores: list[float]) -> None:
    table = made_up.table(*rows(dict(enumerate(scores))), *swept(), judges=("gated",))
    evaluation = StoredEvaluation.model_validate(made_up.document(judges=JUDGES, bootstrap=100).model_dump())
    comparison = compare([EvaluatedRun(label, label, evaluation, columns(table), {}) for label in "AB"])
    for metric in comparison.scopes["all"].values():
        assert all(number in (None, 0) for number in bounds(metric.differences["B"]))


# --- metrics that are left out ---


def test_intents_and_tasks_that_a_run_lacks_are_left_out_and_named(tmp_path: Path) -> None:
    a = write(tmp_path / "a", *rows({0: 0.4, 1: 0.4, 9: 1.0}), *rows({0: 1.0}, "image_search"))
    b = write(tmp_path / "b", *rows({0: 0.5, 1: 0.5}))
    comparison = compared(a, b)
    assert value(comparison, "relevance", run="A").value == pytest.approx(0.4)
    assert (comparison.intents, list(comparison.scopes)) == (2, ["all", "text_to_image"])
    tasks, intents = comparison.warnings
    assert tasks == "tasks: 1 of A left out, not in all runs: 'image_search'"
    assert "intents: 1 of A left out" in intents
    assert "card number 9" in intents


def test_no_common_intent_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no common intents \(A has 1, B has 1\); evaluate the runs with the same"):
        compared(write(tmp_path / "a", *rows({0: 0.4})), write(tmp_path / "b", *rows({1: 0.4})))


@pytest.mark.parametrize(
    ("judges", "reason"),
    [
        ({}, "no scores of it in B"),
        ({"gated": made_up.judge(model="hub/other")}, "not the same judge: A gated by hub/base-1b, B"),
    ],
)
def test_a_judge_that_is_not_the_same_in_all_runs_is_left_out(tmp_path: Path, judges: dict, reason: str) -> None:
    comparison = compared(write(tmp_path / "a", *rows(EVEN)), write(tmp_path / "b", *rows(EVEN), judges=judges))
    assert "judge.gated" not in comparison.scopes["all"]
    (warning,) = comparison.warnings
    assert f"judge.gated: left out, {reason}" in warning


def test_a_judge_that_was_not_validated_is_a_warning(tmp_path: Path) -> None:
    doubted = {"gated": made_up.judge(model="hub/base-1b", validated=False)}
    comparison = compared(write(tmp_path / "a", *rows(EVEN)), write(tmp_path / "b", *rows(EVEN), judges=doubted))
    assert comparison.warnings == ["judge.gated: not validated on the controls in B; do not rely on it"]


def test_relevance_of_different_scorers_is_not_compared(tmp_path: Path) -> None:
    runs = [write(tmp_path / name, *rows(EVEN), recipe=RECIPE % name) for name in ("minilm", "bge")]
    comparison = compared(*runs)
    assert not {"relevance", "reward.difference"} & set(comparison.scopes["all"])
    assert "not the same scorer: A minilm, B bge" in comparison.warnings[0]


def test_commands_that_a_run_lacks_are_left_out_and_named(tmp_path: Path) -> None:
    other = [{**row, "command_words": 7} if row["command_words"] == 6 else row for row in swept()]
    comparison = compared(write(tmp_path / "a", *rows(EVEN), *swept()), write(tmp_path / "b", *rows(EVEN), *other))
    assert comparison.warnings == [
        "commands: 1 of A left out, not in all runs: 'length 6 of text_to_image'",
        "commands: 1 of B left out, not in all runs: 'length 7 of text_to_image'",
    ]
    assert value(comparison, "length.exact").value == 1  # of the 12 words that both commanded


# --- loading ---


def test_a_file_of_an_earlier_version_can_be_compared(tmp_path: Path) -> None:
    run = write(tmp_path / "a", *rows(EVEN))
    metrics = tmp_path / "a" / "evaluation" / "metrics.json"
    written = json.loads(metrics.read_text())
    judges = {
        "gated": {"kind": "gated", "model": "hub/base-1b", "believable": True, "of_teacher": True, "auc": {"shuffled": 0.9}}
    }
    kept = {name: written[name] for name in ("name", "rows", "bootstrap", "seed", "recipe")}
    metrics.write_text(json.dumps({**kept, "judges": judges, "against": {}, "losses": [[1, 4.5]], "tasks": {}}))
    comparison = compared(write(tmp_path / "b", *rows(EVEN)), run)
    assert comparison.warnings == []
    assert difference(comparison, "judge.gated").value == 0


def test_a_run_and_its_evaluation_folder_are_the_same(tmp_path: Path) -> None:
    run = write(tmp_path / "a", *rows(EVEN))
    assert load_runs([run])[0].uri == load_runs([f"{run}/evaluation"])[0].uri


def test_an_evaluation_that_is_not_finished_is_an_error_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no finished evaluation \(metrics.json\); run jobs.evaluate"):
        load_runs([str(tmp_path / "nowhere")])
    run = write(tmp_path / "a", *rows(EVEN), rows=5)
    with pytest.raises(UserError, match="of different evaluations"):
        load_runs([run])
    (tmp_path / "a" / "evaluation" / "metrics.json").write_text('{"policies": ')
    with pytest.raises(UserError, match=r"metrics.json: the file: Invalid JSON"):
        load_runs([run])
    old = write(tmp_path / "b", *rows(EVEN))
    table = storage.read_table(f"{old}/evaluation/outputs.parquet").drop_columns(["probe"])
    storage.write_table(f"{old}/evaluation/outputs.parquet", table)
    with pytest.raises(UserError, match=r"outputs.parquet: made by another version \(no column probe\)"):
        load_runs([old])


# --- thresholds ---


def two(tmp_path: Path, first: dict[int, float], second: dict[int, float]) -> Comparison:
    return compared(write(tmp_path / "a", *rows(first), *swept()), write(tmp_path / "b", *rows(second), *swept(off=2)))


def holds(comparison: Comparison, **rule: Any) -> bool:
    return all(verdict.holds for verdict in thresholds.check([thresholds.Rule(**rule)], comparison))


def test_bounds_fail_beyond_their_value_and_hold_at_it(tmp_path: Path) -> None:
    comparison = two(tmp_path, EVEN, dict.fromkeys(range(4), 0.38))  # a drop of 0.02, or 5%
    assert holds(comparison, metric="relevance", max_drop=0.02)
    assert not holds(comparison, metric="relevance", max_drop=0.019)
    assert not holds(comparison, metric="relevance", max_drop=0.019, task="text_to_image")
    assert holds(comparison, metric="relevance", max_rise=0)
    assert holds(comparison, metric="length.mae", max_rise=2, max=2)
    assert not holds(comparison, metric="length.mae", max_rise=1.9)
    assert not holds(comparison, metric="length.mae", max=1.9)
    assert holds(comparison, metric="length.within_2", min=0.8)
    assert not holds(comparison, metric="length.exact", min=0.8)
    assert not holds(comparison, metric="length.exact", max_drop=0.99)


def test_a_certain_rule_fails_only_if_the_whole_interval_does(tmp_path: Path) -> None:
    noisy = two(tmp_path / "noisy", dict.fromkeys(range(10), 0.5), {i: 0.9 if i == 0 else 0.4 for i in range(10)})
    assert not holds(noisy, metric="relevance", max_drop=0.02)  # a mean drop of 0.05, with 0 in its interval
    assert holds(noisy, metric="relevance", max_drop=0.02, certain=True)
    sure = two(tmp_path / "sure", dict.fromkeys(range(10), 0.5), dict.fromkeys(range(10), 0.4))
    assert not holds(sure, metric="relevance", max_drop=0.02, certain=True)
    assert holds(noisy, metric="relevance", min=0.46, certain=True)
    assert not holds(sure, metric="relevance", min=0.46, certain=True)
    assert not holds(sure, metric="length.mae", max_rise=1, certain=True)
    assert not holds(sure, metric="length.mae", max=1, certain=True)


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 1), st.floats(-1, 1), st.floats(0, 0.2))
def test_a_certain_rule_never_fails_if_the_plain_one_holds(limit: float, value: float, half: float) -> None:
    measured = made_up.interval(value, half)
    for bound in thresholds.BOUNDS:
        plain = thresholds.excess_over(bound, limit, measured, certain=False)
        assert thresholds.excess_over(bound, limit, measured, certain=True) <= plain


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"metric": "relevanse", "max_drop": 0},
            "rule 1: relevanse: unknown metric; known: relevance, judge.gated, rejec",
        ),
        ({"metric": "judge.rubric", "max_drop": 0}, "rule 1: judge.rubric: unknown metric"),
        ({"metric": "relevance", "task": "sing", "min": 0}, "task sing: not in all runs; known: all, text_to_image"),
        ({"metric": "diversity.vendi", "min": 1}, "rule 1: diversity.vendi: unknown metric; known: relevance, "),
    ],
)
def test_a_rule_that_can_t_be_checked_is_an_error(tmp_path: Path, rule: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        thresholds.check([thresholds.Rule(**rule)], two(tmp_path, EVEN, EVEN))


def test_a_rule_on_a_number_that_no_run_has_is_an_error(tmp_path: Path) -> None:
    comparison = compared(*(write(tmp_path / name, *rows(EVEN)) for name in "ab"))
    with pytest.raises(UserError, match=r"length.mae \(all\): not measured in A, B"):
        thresholds.check([thresholds.Rule(metric="length.mae", max=1)], comparison)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {metric: relevance, max_dropp: 1}", "rule 1: max_dropp: unknown key; allowed here: metric, task, max_drop,"),
        ("- {metric: relevance}", "rule 1: no bound; set at least one of max_drop, max_rise, min, max"),
        ("- {metric: relevance, max_drop: -1}", "rule 1: max_drop: Input should be greater than or equal to 0: got -1"),
        ("- {metric: relevance, min: .nan}", "rule 1: min: Input should be a finite number"),
        ("- {max_drop: 1}", "rule 1: metric: missing; it must be given"),
        ("- relevance", "rule 1: expected keys and values, such as {metric: relevance, max_drop: 0.02}; got 'relevance'"),
        ("metric: relevance", "expected a list of rules, such as - {metric: relevance, max_drop: 0.02}"),
        ("", "expected a list of rules"),
        ("- {", "not YAML"),
    ],
)
def test_a_bad_thresholds_file_is_one_line_a_problem(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        thresholds.load_rules(str(file))
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"thresholds {file}: ")
    assert message in line


def test_a_missing_thresholds_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.yaml: no such file"):
        thresholds.load_rules(str(tmp_path / "absent.yaml"))


# --- output ---


def big(folder: Path, seed: int) -> str:
    """An evaluation of three tasks; its own folder's name is long."""
    table = made_up.outputs(seed=seed)
    return save(folder / f"{'a-long-name-' * 8}{seed}", table, made_up.document(rows=table.num_rows, bootstrap=100))


@pytest.mark.parametrize("number", [2, 3, 4])
def test_every_run_is_shown_next_to_the_first(tmp_path: Path, number: int) -> None:
    comparison = compared(*(big(tmp_path, seed) for seed in range(number)))
    text = plain_text(comparison)
    tables = text.split("\n\n", 2)[2]
    assert max(len(line) for line in tables.splitlines()) <= 120
    assert "-0.000" not in text
    for words in ("text_to_template", "judge.gated", "reward.difference", *"ABCD"[:number]):
        assert words in text
    for label in "BCD"[: number - 1]:
        assert f"{label} - A" in text


def test_better_and_worse_are_marked_only_if_the_whole_interval_is(tmp_path: Path) -> None:
    comparison = two(tmp_path, EVEN, dict.fromkeys(range(4), 0.5))
    lines = {line.split()[0]: line for line in plain_text(comparison).splitlines() if line}
    assert lines["relevance"].endswith("*")
    assert lines["length.mae"].endswith("!")  # a larger error is worse
    assert lines["rejected"].endswith("+0.000 [+0.000, +0.000]")
    assert "+0.100 [+0.100, +0.100] *" in lines["relevance"]


def test_the_job_exits_0_1_and_2_and_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", *rows(EVEN)), write(tmp_path / "b", *rows(dict.fromkeys(range(4), 0.3)))
    rules = tmp_path / "rules.yaml"
    rules.write_text("- {metric: relevance, max_drop: 0.2}")
    out = tmp_path / "out"
    assert exit_code(job.main, [a, b, "--thresholds", str(rules)]) == 0
    assert capsys.readouterr().out.endswith("thresholds: 1 of 1 hold\n")
    rules.write_text("- {metric: relevance, max_drop: 0.05}\n- {metric: rejected, max: 0}")
    with pytest.raises(SystemExit) as ended:
        job.main([a, b, "--thresholds", str(rules), "--out", str(out), "--json"])
    assert ended.value.code == 1
    *_, failing, summary, last = capsys.readouterr().out.splitlines()
    assert failing == (
        "FAILS: relevance (all), run B: base 0.400 [0.400, 0.400], candidate 0.300 [0.300, 0.300], "
        "difference -0.100 [-0.100, -0.100]; max_drop 0.05"
    )
    assert summary == "thresholds: 1 of 2 hold"
    assert json.loads(last) == json.loads((out / "compare.json").read_text())
    assert "FAILS: relevance" in (out / "compare.txt").read_text()
    rules.write_text("- {metric: relevance, task: sing, min: 0}")
    assert exit_code(job.main, [a, b, "--thresholds", str(rules)]) == 2
    assert "error: rule 1: task sing" in capsys.readouterr().err


def test_unknown_numbers_are_null_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "a", *rows(EVEN))
    job.main([run, run, "--json"])
    *_, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["scopes"]["all"]["length.mae"]["values"]["A"] == {"value": None, "low": None, "high": None}
