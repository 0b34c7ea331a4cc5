"""Two finished evaluations beside each other: what is compared, what is left out, and when CI fails."""

import json
from pathlib import Path
from typing import Any

import evaluation_made_up as made_up
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import compare as job
from udrl import storage
from udrl.errors import UserError, exit_code
from udrl.evaluate.compare import comparison as compare
from udrl.evaluate.compare import side_by_side as beside
from udrl.evaluate.compare import thresholds
from udrl.evaluate.outputs import columns

JUDGES = {
    "likelihood": {"kind": "likelihood", "model": "hub/base-1b", "believable": True},
    "pairwise": {"kind": "pairwise", "model": "hub/chat-1b", "believable": True},
}
RECIPE = "rewards: {relevance: embedding, embedder: %s}"


def rows(scores: dict[int, float], task: str = "text_to_image", policy: str = "student", **values: Any) -> list[dict]:
    """One accepted prompt of the default probe for each intent, with its relevance; the judge says twice as much."""
    return [
        made_up.row(task, intent, policy, **{"relevance": score, "judge_likelihood": 2 * score, **values})
        for intent, score in scores.items()
    ]


def swept(task: str = "text_to_image", off: int = 0, gain: float = 0.2, intents: int = 4) -> list[dict]:
    """Lengths 6 and 12, missed by ``off`` words; bins 0 and 1, ``gain`` apart."""
    found = []
    for intent in range(intents):
        for words in (6, 12):
            found.append(made_up.row(task, intent, "student", "length", command_words=words, n_words=words + off))
        for level in (0, 1):
            values = {"command_reward": level, "relevance": 0.3 + gain * level + 0.01 * intent}
            found.append(made_up.row(task, intent, "student", "reward", **values))
    return found


def write(folder: Path, *given: dict, judges: dict[str, Any] | None = None, **document: Any) -> str:
    """A finished evaluation at ``folder``/evaluation; returns ``folder``."""
    judges = JUDGES if judges is None else judges
    pointwise = tuple(name for name, facts in judges.items() if facts["kind"] != "pairwise")
    named = [{name: value for name, value in row.items() if name[:6] != "judge_" or name[6:] in pointwise} for row in given]
    table = made_up.table(*named, judges=pointwise)
    facts = {policy: {"kind": policy} for policy in {row["policy"] for row in given}}
    told = {
        "name": folder.name,
        "bootstrap": 200,
        "seed": 0,
        "rows": len(given),
        "policies": facts,
        "judges": judges,
        **document,
    }
    storage.write_table(str(folder / "evaluation" / "outputs.parquet"), table)
    storage.write_json(str(folder / "evaluation" / "metrics.json"), told)
    return str(folder)


def compared(*runs: str, policy: str = "student") -> dict[str, Any]:
    return compare.compare(compare.load(runs), policy)


def figure(document: dict[str, Any], metric: str, task: str = "all", run: str = "B") -> dict[str, Any]:
    return {name: found[run] for name, found in document["scopes"][task][metric].items()}


EVEN = dict.fromkeys(range(4), 0.4)


# --- what is measured ---


def test_values_and_differences_against_hand_counts(tmp_path: Path) -> None:
    a = write(tmp_path / "a", *rows({0: 0.2, 1: 0.4, 2: 0.6}))
    b = write(tmp_path / "b", *rows({0: 0.3, 1: 0.5, 2: 0.7}))
    document = compared(a, b)
    found = document["scopes"]["all"]["relevance"]
    assert found["values"]["A"]["value"] == pytest.approx(0.4)
    assert found["values"]["B"]["value"] == pytest.approx(0.5)
    # Every intent gained the same: paired, there is no doubt, however hard the intents differ.
    assert list(found["differences"]["B"].values()) == pytest.approx([0.1, 0.1, 0.1])
    assert figure(document, "judge.likelihood")["differences"]["value"] == pytest.approx(0.2)
    assert found["values"]["A"]["low"] < 0.3
    assert document["warnings"] == []


def test_a_rejected_prompt_counts_as_zero_and_for_a_judge_as_its_table_says(tmp_path: Path) -> None:
    refused = rows({3: 0.0}, prompt="", reason="empty", relevance=None, judge_likelihood=0.2)
    document = compared(write(tmp_path / "a", *rows(EVEN)), write(tmp_path / "b", *rows({0: 0.4, 1: 0.4, 2: 0.4}), *refused))
    assert figure(document, "relevance")["values"]["value"] == pytest.approx(0.3)
    assert figure(document, "judge.likelihood")["differences"]["value"] == pytest.approx(-0.15)
    assert figure(document, "rejected")["differences"]["value"] == pytest.approx(0.25)


def test_control_is_measured_by_task_and_over_all(tmp_path: Path) -> None:
    a = write(tmp_path / "a", *rows(EVEN), *swept(), *rows(EVEN, "image_search"), *swept("image_search"))
    more = [*rows(EVEN, "image_search"), *swept("image_search", gain=-0.2)]
    b = write(tmp_path / "b", *rows(EVEN), *swept(off=3, gain=0.1), *more)
    document = compared(a, b)
    assert figure(document, "length.mae", "text_to_image")["values"]["value"] == pytest.approx(3)
    assert figure(document, "length.mae")["values"]["value"] == pytest.approx(1.5)
    assert figure(document, "length.exact")["differences"]["value"] == pytest.approx(-0.5)
    assert figure(document, "length.within_2", "image_search")["values"]["value"] == 1
    gain = figure(document, "reward.difference", "text_to_image")
    assert gain["values"]["value"] == pytest.approx(0.1)
    assert list(gain["differences"].values()) == pytest.approx([-0.1] * 3)
    assert figure(document, "reward.difference")["values"]["value"] == pytest.approx((0.1 - 0.2) / 2)
    by_task = [figure(document, "reward.spearman", task)["values"]["value"] for task in ("text_to_image", "image_search")]
    assert by_task[0] > 0.8
    assert by_task[1] == pytest.approx(-by_task[0], abs=1e-6)
    assert figure(document, "reward.spearman")["values"]["value"] == pytest.approx(0, abs=1e-6)


def test_the_reward_s_gain_takes_only_intents_with_both_ends_accepted(tmp_path: Path) -> None:
    sweep = swept(intents=2)
    sweep[-2] |= {"prompt": "", "reason": "echo", "relevance": None}  # bin 0 of the last intent
    run = write(tmp_path / "a", *rows(EVEN), *sweep)
    assert figure(compared(run, run), "reward.difference")["values"] == pytest.approx({"value": 0.2, "low": 0.2, "high": 0.2})


def test_diversity_is_compared_at_equal_length(tmp_path: Path) -> None:
    short = [made_up.row(intent=i, prompt=f"red fox{i}") for i in range(4)]
    long = [made_up.row(intent=i, prompt=f"red fox{i} and the same words over and over") for i in range(4)]
    document = compared(write(tmp_path / "a", *short), write(tmp_path / "b", *long))
    for name in ("diversity.distinct_2", "diversity.vendi", "diversity.self_bleu"):
        assert figure(document, name)["differences"]["value"] == 0
    assert figure(document, "diversity.distinct_2")["values"]["value"] == 1


def test_speed_is_what_the_evaluations_timed(tmp_path: Path) -> None:
    speeds = [{"student": {"tokens_per_second": n, "latency_p50": 0.1}} for n in (100.0, 150.0)]
    a, b = (write(tmp_path / name, *rows(EVEN), policies=told) for name, told in zip("ab", speeds, strict=True))
    document = compared(a, b)
    assert figure(document, "tokens_per_second")["differences"] == {"value": 50, "low": None, "high": None}
    assert figure(document, "latency_p95")["values"]["value"] is None


def test_another_policy_can_be_compared(tmp_path: Path) -> None:
    teacher = rows({0: 0.9, 1: 0.9}, policy="teacher")
    a, b = (write(tmp_path / name, *rows(EVEN), *teacher) for name in "ab")
    assert figure(compared(a, b, policy="teacher"), "relevance")["values"]["value"] == pytest.approx(0.9)
    with pytest.raises(UserError, match=r"policy 'llama' wrote nothing there; who did: student, teacher"):
        compared(a, b, policy="llama")


def test_three_runs_are_each_held_against_the_first(tmp_path: Path) -> None:
    runs = [write(tmp_path / str(n), *rows({0: n, 1: n})) for n in (0.4, 0.5, 0.2)]
    found = compared(*runs)["scopes"]["all"]["relevance"]["differences"]
    assert {label: round(d["value"], 6) for label, d in found.items()} == {"B": 0.1, "C": -0.2}


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8))
def test_a_run_does_not_differ_from_itself(scores: list[float]) -> None:
    table = made_up.table(*rows(dict(enumerate(scores))), *swept(), judges=("likelihood",))
    run = compare.Run("A", "a", {"policies": {}, "judges": JUDGES, "bootstrap": 100}, columns(table), {})
    document = compare.compare([run, compare.Run("B", *list(vars(run).values())[1:])])
    for found in document["scopes"]["all"].values():
        assert all(v in (None, 0) for v in found["differences"]["B"].values())


# --- what is left out ---


def test_intents_and_tasks_that_not_all_have_are_left_out_and_named(tmp_path: Path) -> None:
    a = write(tmp_path / "a", *rows({0: 0.4, 1: 0.4, 9: 1.0}), *rows({0: 1.0}, "image_search"))
    b = write(tmp_path / "b", *rows({0: 0.5, 1: 0.5}))
    document = compared(a, b)
    assert document["scopes"]["all"]["relevance"]["values"]["A"]["value"] == pytest.approx(0.4)
    assert (document["intents"], list(document["scopes"])) == (2, ["all", "text_to_image"])
    tasks, intents = document["warnings"]
    assert tasks == "tasks: 1 of A left out, not in all runs: 'image_search'"
    assert "intents: 1 of A left out" in intents
    assert "card number 9" in intents


def test_no_common_intent_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no common intents \(A has 1, B has 1\); evaluate the runs with the same"):
        compared(write(tmp_path / "a", *rows({0: 0.4})), write(tmp_path / "b", *rows({1: 0.4})))


@pytest.mark.parametrize(
    ("judges", "said"),
    [
        ({}, "no scores of it in B"),
        ({"likelihood": {"kind": "likelihood", "model": "hub/other"}}, "not the same judge: A likelihood by hub/base-1b, B"),
    ],
)
def test_a_judge_that_is_not_the_same_everywhere_is_left_out(tmp_path: Path, judges: dict, said: str) -> None:
    document = compared(write(tmp_path / "a", *rows(EVEN)), write(tmp_path / "b", *rows(EVEN), judges=judges))
    assert "judge.likelihood" not in document["metrics"]
    (warning,) = document["warnings"]
    assert f"judge.likelihood: left out, {said}" in warning


def test_a_judge_that_did_not_prove_itself_is_told(tmp_path: Path) -> None:
    doubted = {"likelihood": {**JUDGES["likelihood"], "believable": False}}
    document = compared(write(tmp_path / "a", *rows(EVEN)), write(tmp_path / "b", *rows(EVEN), judges=doubted))
    assert document["warnings"] == ["judge.likelihood: did not prove itself on the controls in B: don't lean on it"]


def test_relevance_of_different_scorers_is_not_compared(tmp_path: Path) -> None:
    runs = [write(tmp_path / name, *rows(EVEN), recipe=RECIPE % name) for name in ("minilm", "bge")]
    document = compared(*runs)
    assert not {"relevance", "reward.spearman", "reward.difference"} & set(document["metrics"])
    assert "not the same scorer: A minilm, B bge" in document["warnings"][0]


def test_other_commands_and_other_machines_are_told(tmp_path: Path) -> None:
    other = [{**row, "command_words": 7} if row["command_words"] == 6 else row for row in swept()]
    a = write(tmp_path / "a", *rows(EVEN), *swept(), environment={"machine": "x86_64", "cores": 2})
    b = write(tmp_path / "b", *rows(EVEN), *other, environment={"machine": "x86_64", "cores": 64})
    lengths, machines = compared(a, b)["warnings"]
    assert lengths.startswith("length.*: the runs were not asked for the same lengths in text_to_image; set evaluate.lengths")
    assert machines.endswith("not measured on the same machine")


# --- what can't be read ---


def test_a_run_and_its_evaluation_folder_are_the_same(tmp_path: Path) -> None:
    run = write(tmp_path / "a", *rows(EVEN))
    assert compare.load([run])[0].uri == compare.load([f"{run}/evaluation"])[0].uri


def test_what_is_no_finished_evaluation_is_named_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no finished evaluation \(metrics.json\); run jobs.evaluate"):
        compare.load([str(tmp_path / "nowhere")])
    run = write(tmp_path / "a", *rows(EVEN), rows=5)
    with pytest.raises(UserError, match="of different evaluations"):
        compare.load([run])
    (tmp_path / "a" / "evaluation" / "metrics.json").write_text('{"policies": ')
    with pytest.raises(UserError, match="can't be read"):
        compare.load([run])
    old = write(tmp_path / "b", *rows(EVEN))
    table = storage.read_table(f"{old}/evaluation/outputs.parquet").drop_columns(["probe"])
    storage.write_table(f"{old}/evaluation/outputs.parquet", table)
    with pytest.raises(UserError, match=r"made by another version \(outputs.parquet has no probe\)"):
        compare.load([old])


# --- thresholds ---


def two(tmp_path: Path, first: dict[int, float], second: dict[int, float]) -> dict[str, Any]:
    return compared(write(tmp_path / "a", *rows(first), *swept()), write(tmp_path / "b", *rows(second), *swept(off=2)))


def holds(document: dict[str, Any], **rule: Any) -> bool:
    return all(verdict.holds for verdict in thresholds.check([thresholds.Rule(**rule)], document))


def test_bounds_fail_beyond_their_value_and_hold_at_it(tmp_path: Path) -> None:
    document = two(tmp_path, EVEN, dict.fromkeys(range(4), 0.38))  # a drop of 0.02, or 5%
    assert holds(document, metric="relevance", max_drop=0.02)
    assert not holds(document, metric="relevance", max_drop=0.019)
    assert holds(document, metric="relevance", max_drop_percent=5.001, task="text_to_image")
    assert not holds(document, metric="relevance", max_drop_percent=4.999)
    assert holds(document, metric="relevance", max_rise=0)
    assert holds(document, metric="length.mae", max_rise=2, max=2)
    assert not holds(document, metric="length.mae", max_rise=1.9)
    assert not holds(document, metric="length.mae", max=1.9)
    assert holds(document, metric="length.within_2", min=0.8)
    assert not holds(document, metric="length.exact", min=0.8)
    assert not holds(document, metric="length.exact", max_drop_percent=99)


def test_a_percentage_is_of_the_base_s_size_whatever_its_sign(tmp_path: Path) -> None:
    document = two(tmp_path, dict.fromkeys(range(4), -1.0), dict.fromkeys(range(4), -1.1))
    assert holds(document, metric="judge.likelihood", max_drop_percent=11)
    assert not holds(document, metric="judge.likelihood", max_drop_percent=9)


def test_a_certain_rule_fails_only_where_the_whole_interval_does(tmp_path: Path) -> None:
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
def test_a_certain_rule_never_fails_where_the_plain_one_holds(bound: float, value: float, half: float) -> None:
    judged = {"value": value, "low": value - half, "high": value + half}
    for name in thresholds.BOUNDS:
        assert thresholds._beyond(name, bound, judged, True) <= thresholds._beyond(name, bound, judged, False)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (
            {"metric": "relevanse", "max_drop": 0},
            "rule 1: relevanse: unknown metric; known: relevance, judge.likelihood, rejec",
        ),
        ({"metric": "judge.rubric", "max_drop": 0}, "rule 1: judge.rubric: unknown metric"),
        ({"metric": "judge.pairwise", "min": 0.5}, "judge.pairwise: not compared, it compares the policies of one evaluation"),
        ({"metric": "relevance", "task": "sing", "min": 0}, "task sing: not in all runs; known: all, text_to_image"),
        ({"metric": "tokens_per_second", "min": 1}, r"tokens_per_second \(all\): not measured in A, B"),
        ({"metric": "reward.spearman", "min": 0, "certain": True}, "has no interval, so nothing is certain"),
        ({"metric": "rejected", "max_rise_percent": 5}, "the base is 0, of which there are no per cent; use max_rise"),
    ],
)
def test_a_rule_that_can_t_be_checked_is_an_error(tmp_path: Path, rule: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        thresholds.check([thresholds.Rule(**rule)], two(tmp_path, EVEN, EVEN))


def test_a_rule_that_bounds_an_improvement_is_doubted(tmp_path: Path) -> None:
    document = two(tmp_path, EVEN, EVEN)
    rules = [thresholds.Rule(metric="rejected", max_drop=0.1), thresholds.Rule(metric="relevance", max_drop=0.1)]
    assert thresholds.doubts(rules, document) == ["rule 1: max_drop bounds an improvement: rejected is better lower"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- {metric: relevance, max_dropp: 1}", "rule 1: max_dropp: unknown key; allowed here: metric, task, max_drop,"),
        ("- {metric: relevance}", "rule 1: no bound is given; give at least one of max_drop, max_drop_percent"),
        ("- {metric: relevance, max_drop: -1}", "rule 1: max_drop: Input should be greater than or equal to 0: got -1"),
        ("- {metric: relevance, min: .nan}", "rule 1: min: Input should be a finite number"),
        ("- {max_drop: 1}", "rule 1: metric: missing; it must be given"),
        ("- relevance", "rule 1: expected keys and values, such as {metric: relevance, max_drop: 0.02}; got 'relevance'"),
        ("metric: relevance", "expected a list of rules, such as - {metric: relevance, max_drop: 0.02}"),
        ("", "expected a list of rules"),
        ("- {", "not YAML"),
    ],
)
def test_a_bad_thresholds_file_is_one_line_a_problem(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        thresholds.load(str(file))
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"thresholds {file}: ")
    assert said in line


def test_a_thresholds_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.yaml: no such file"):
        thresholds.load(str(tmp_path / "absent.yaml"))


# --- what is told ---


def big(folder: Path, seed: int) -> str:
    """An evaluation of three tasks; its own folder's name is long."""
    table = made_up.outputs(seed=seed)
    document = made_up.document().model_dump(mode="json")
    run = folder / f"{'a-long-name-' * 8}{seed}"
    storage.write_table(str(run / "evaluation" / "outputs.parquet"), table)
    storage.write_json(str(run / "evaluation" / "metrics.json"), {**document, "rows": table.num_rows, "bootstrap": 100})
    return str(run)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_the_plain_table_fits_120_columns_and_holds_all_runs(tmp_path: Path, number: int) -> None:
    document = compared(*(big(tmp_path, seed) for seed in range(number)))
    text = beside.text(document)
    assert max(len(line) for line in text.splitlines()) <= 120
    assert f"name-{number - 1}/evaluation" in text  # the end of a long path is what tells runs apart
    assert "-0.000" not in text
    for words in ("text_to_template", "judge.likelihood", "diversity.vendi", "tokens_per_second", *"ABCD"[:number]):
        assert words in text
    for label in "BCD"[: number - 1]:
        assert f"{label} - A" in text
        assert f"{label} - A" in beside.markdown(document)


def test_better_and_worse_are_said_only_where_the_whole_interval_is(tmp_path: Path) -> None:
    document = two(tmp_path, EVEN, dict.fromkeys(range(4), 0.5))
    lines = {line.split()[0]: line for line in beside.text(document).splitlines() if line}
    assert lines["relevance"].endswith("*")
    assert lines["length.mae"].endswith("!")  # a larger error is worse
    assert lines["rejected"].endswith("+0.000 [+0.000, +0.000]")
    markdown = beside.markdown(document)
    assert "+0.100 [+0.100, +0.100] better" in markdown
    assert "+2.000 [+2.000, +2.000] **worse**" in markdown


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
        "FAILS: relevance (all), run B: base 0.400, candidate 0.300 [0.300, 0.300], "
        "difference -0.100 [-0.100, -0.100]; max_drop 0.05"
    )
    assert summary == "thresholds: 1 of 2 hold"
    assert json.loads(last) == json.loads((out / "compare.json").read_text())
    assert "FAILS: relevance" in (out / "compare.md").read_text()
    rules.write_text("- {metric: relevance, task: sing, min: 0}")
    assert exit_code(job.main, [a, b, "--thresholds", str(rules)]) == 2
    assert "error: rule 1: task sing" in capsys.readouterr().err


def test_numbers_that_are_not_known_are_null_in_json(tmp_path: Path) -> None:
    run = write(tmp_path / "a", *rows(EVEN))
    line = compare.one_line(compared(run, run))
    assert "\n" not in line
    assert json.loads(line)["scopes"]["all"]["length.mae"]["values"]["A"] == {"value": None, "low": None, "high": None}
