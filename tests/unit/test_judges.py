"""Judges: validation against controls, gates, and questions that are asked once."""

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udrl import models, storage
from udrl.episodes import COMPONENTS
from udrl.errors import UserError
from udrl.evaluate.document import UNKNOWN, Areas
from udrl.evaluate.judges.answers import QUESTIONS, SCORES, add_questions, judge_paths, question
from udrl.evaluate.judges.controls import (
    CONTROL_KINDS,
    HELD_OUT_KINDS,
    Pair,
    gold_pairs,
    make_controls,
    sample_per_task,
    shuffle_intents,
    stuff_keywords,
    truncate,
)
from udrl.evaluate.judges.gated import GatedJudge, coverage_relevance, embedding_relevance
from udrl.evaluate.judges.judging import JudgedOutputs, ask_judges, relate, score_pairs
from udrl.evaluate.judges.validation import (
    FORESEEN_KINDS,
    MIN_AUC,
    areas_by_task,
    auc,
    is_validated,
    weakest,
)
from udrl.evaluate.outputs import OUTPUTS
from udrl.recipe import Judge, Recipe
from udrl.run import EvaluationPaths, JudgePaths
from udrl.scoring.parsing import parse_row
from udrl.tasks import load_task, shipped_tasks

TASK = load_task("image_search").model_copy(update={"name": "own_search"})  # without gold: the pairs below validate

# --- controls and validation ---


def test_auc_of_small_examples() -> None:
    assert auc(np.array([3.0, 4.0]), np.array([1.0, 2.0])).value == 1
    assert auc(np.array([1.0, 2.0]), np.array([1.0, 2.0])).value == 0.5
    assert auc(np.array([2.0, 0.0]), np.array([1.0])).value == 0.5
    assert auc(np.array([]), np.array([1.0])) == UNKNOWN


@pytest.mark.parametrize("separation", [0.0, 1.0, 2.5])
def test_the_interval_of_an_auc_holds_the_true_one_in_about_95_of_100_samples(separation: float) -> None:
    from scipy.stats import norm

    rng, truth = np.random.default_rng(0), float(norm.cdf(separation / np.sqrt(2)))
    intervals = [auc(rng.normal(separation, 1, 60), rng.normal(0, 1, 60)) for _ in range(400)]
    held = np.mean([interval.low <= truth <= interval.high for interval in intervals])
    assert 0.92 <= held <= 0.995
    widths = [interval.high - interval.low for interval in intervals]
    assert max(widths) < 0.3


def test_an_interval_has_a_width_even_if_no_pair_is_wrong() -> None:
    few, many = auc(np.ones(20), np.zeros(20)), auc(np.ones(500), np.zeros(500))
    assert few.high == many.high == 1
    assert few.low == pytest.approx(0.84, abs=0.01)
    assert many.low > 0.99


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from(["t", "u"])), max_size=20), st.integers(0, 5))
def test_a_shuffled_pair_is_never_a_true_pair(pairs: list[tuple[str, str]], seed: int) -> None:
    intents, tasks = [p[0] for p in pairs], [p[1] for p in pairs]
    shuffled = shuffle_intents(intents, tasks, seed)
    for intent, other, task in zip(intents, shuffled, tasks, strict=True):
        others = {i for i, t in pairs if t == task} - {intent}
        assert other in others if others else other == ""


def test_controls_are_worse_by_construction() -> None:
    texts = ["one two, three four five six seven eight", "a grey owl", "a brown owl at dusk", "w x"]
    intents = ["a poster of the red fox", "an owl", "an owl", "only one"]
    pairs = [Pair(*values) for values in zip(intents, ["t", "t", "t", "u"], texts, strict=True)]
    controls = make_controls(pairs, seed=0)
    prompt_of = {(row["pair"], row["kind"]): row["prompt"] for row in controls.to_pylist()}
    assert [prompt_of[i, "echo"] for i in range(4)] == intents
    assert [prompt_of[i, "truncated"] for i in range(4)] == ["one two,", "a", "a", "w"]
    assert prompt_of[0, "stuffed"].startswith("poster, red, fox, masterpiece, ")
    assert prompt_of[0, "stuffed"].count("fox") == 2
    assert prompt_of[0, "near_echo"] == "a poster of the red fox, soft natural light, high resolution"
    assert prompt_of[3, "near_echo"].startswith("only one "), "keywords have no commas"
    assert prompt_of[0, "loop"] == "one two, one two, one two, one two,"
    assert prompt_of[1, "loop"] == "owl, owl, owl"
    assert sorted(prompt_of[0, "salad"].split()) == sorted(texts[0].split())
    assert prompt_of[0, "reversed"].startswith("eight seven six")
    assert (3, "salad") not in prompt_of, "the order of keywords does not matter"
    assert prompt_of[0, "wrong_task"] == "w x"
    assert prompt_of[2, "other_subject"] == "a brown poster at dusk"
    assert (0, "other_subject") not in prompt_of, "this prompt has no word of its intent"
    assert prompt_of[0, "shuffled"] in texts[1:3]
    assert {prompt_of[i, "shuffled"] for i in (1, 2)} == {texts[0]}
    assert prompt_of[1, "spliced"] == "a five six seven eight"
    assert (3, "shuffled") not in prompt_of, "a task with one intent has no other"
    assert all(row["intent"] == intents[row["pair"]] for row in controls.to_pylist())
    assert controls.equals(make_controls(pairs, seed=0))


def test_controls_of_unusual_texts() -> None:
    assert truncate("one") == "one"
    assert stuff_keywords("of the").startswith("of, the, masterpiece")
    assert stuff_keywords("!!!").startswith("!!!, masterpiece")
    assert make_controls([], 0).num_rows == 0


@pytest.mark.parametrize("name", shipped_tasks())
def test_every_shipped_task_has_a_gold_set_that_its_own_rules_accept(name: str) -> None:
    task, pairs = load_task(name), gold_pairs(name)
    assert len(pairs) >= 100
    assert len({pair.intent.lower() for pair in pairs}) == len({pair.prompt.lower() for pair in pairs}) == len(pairs)
    for pair in pairs:
        row = {"intent": pair.intent, "completion": pair.prompt, "finish_reason": "stop", "error": ""}
        (parsed,) = parse_row(task, row)
        assert (parsed.prompt, parsed.reason) == (pair.prompt, ""), pair
    assert gold_pairs("a task of a user's") == ()


@given(st.lists(st.sampled_from("tuv"), max_size=30), st.integers(1, 5), st.integers(0, 3))
def test_a_sample_has_as_many_rows_of_each_task_as_the_limit_allows(tasks: list[str], limit: int, seed: int) -> None:
    sample = sample_per_task(tasks, limit, seed)
    assert len(set(sample)) == len(sample)
    for task in set(tasks):
        assert sum(tasks[i] == task for i in sample) == min(limit, tasks.count(task))
    assert sample_per_task(tasks, limit, seed) == sample


def controls_of(n: int) -> tuple[pa.Table, np.ndarray, list[str]]:
    """Controls of ``n`` true pairs, half of each task, with the kinds of the controls and the tasks of the pairs."""
    tasks = ["t"] * (n // 2) + ["u"] * (n - n // 2)
    pairs = [Pair(f"an i{i} thing", task, f"p{i}, a thing of light {i}") for i, task in enumerate(tasks)]
    controls = make_controls(pairs, 0)
    return controls, np.array(controls["kind"].to_pylist(), dtype=object), tasks


CONTROLS_OF_40, KINDS_OF_40, TASKS_OF_40 = controls_of(40)
IS_SHUFFLED = KINDS_OF_40 == "shuffled"


def areas(true: np.ndarray, control: np.ndarray) -> Areas:
    return areas_by_task(true, control, CONTROLS_OF_40, TASKS_OF_40)[None]


def test_a_judge_that_tells_true_pairs_from_every_control_is_validated() -> None:
    true = np.array([3.0] * 39 + [np.nan])
    measured = areas_by_task(true, np.ones(len(KINDS_OF_40)), CONTROLS_OF_40, TASKS_OF_40)
    assert {area.value for area in measured[None].values()} == {1}
    assert set(measured) == {None, "t", "u"}
    assert set(measured[None]) == set(CONTROL_KINDS)
    assert is_validated(measured[None])


@pytest.mark.parametrize("kind", FORESEEN_KINDS)
def test_one_control_that_a_judge_prefers_is_enough_to_distrust_it(kind: str) -> None:
    measured = areas(np.full(40, 3.0), np.where(kind == KINDS_OF_40, 9.0, 1.0))
    assert not is_validated(measured)
    assert weakest(measured)[0] == kind


@pytest.mark.parametrize("kind", HELD_OUT_KINDS)
def test_a_held_out_control_is_measured_and_does_not_decide(kind: str) -> None:
    measured = areas(np.full(40, 3.0), np.where(kind == KINDS_OF_40, 9.0, 1.0))
    assert measured[kind].value == 0
    assert is_validated(measured)


def test_the_interval_decides_and_not_the_point() -> None:
    """With ten pairs a judge that is never wrong may be a poor one."""
    controls, kinds, tasks = controls_of(10)
    measured = areas_by_task(np.ones(10), np.zeros(len(kinds)), controls, tasks)[None]
    assert measured["echo"].value == 1
    assert not is_validated(measured)


def test_a_judge_without_scores_is_not_validated() -> None:
    assert not is_validated({})
    assert not is_validated(areas(np.full(40, np.nan), np.ones(len(KINDS_OF_40))))
    failed = areas(np.full(40, 3.0), np.where(KINDS_OF_40 == "echo", np.nan, 1.0))
    assert failed["echo"] == UNKNOWN
    assert not is_validated(failed)


# --- gated judges ---


GATED = {"coverage": GatedJudge(coverage_relevance), "gated": GatedJudge(embedding_relevance("bundled:wordllama"))}


@pytest.mark.parametrize("name", GATED)
def test_a_gated_judge_is_validated_on_the_gold_set(name: str) -> None:
    judge, pairs = GATED[name], [pair for task in shipped_tasks() for pair in gold_pairs(task)]
    controls = make_controls(pairs, 0)
    rows = [Pair(row["intent"], row["task"], row["prompt"]) for row in controls.to_pylist()]
    measured = areas_by_task(judge.score(pairs), judge.score(rows), controls, [pair.task for pair in pairs])[None]
    assert is_validated(measured), measured
    assert measured["reversed"].low > MIN_AUC
    assert measured["other_subject"].low > MIN_AUC
    assert measured["spliced"].high < 0.6, "a known blind spot, which the report names"


@pytest.mark.parametrize("name", GATED)
def test_the_scores_of_a_gated_judge_are_shares_and_fall_with_each_attack(name: str) -> None:
    pair = Pair(
        "a red fox in the snow", "text_to_image", "Red fox trotting through deep snow at dawn, pine trunks behind, pale light."
    )
    better = GATED[name].score([pair])[0]
    attacks = [
        "a red fox in the snow",
        "fox fox fox fox fox fox",
        "light pale behind, pine trunks snow dawn through trotting fox Red",
    ]
    assert 0 < better <= 1
    for text in attacks:
        assert GATED[name].score([pair._replace(prompt=text)])[0] < better / 2, text
    other_task = GATED[name].score([pair._replace(task="a task of a user's")])[0]
    assert 0 < other_task <= 1
    assert GATED[name].score([]).shape == (0,)


# --- a table of outputs ---


def output(policy: str, intent: int, prompt: str | None = None, **values: Any) -> dict[str, Any]:
    blank: dict[str, Any] = {"string": "", "int64": 0, "int32": 0, "float": 0.5}
    row = {field.name: blank[str(field.type)] for field in OUTPUTS}
    text = f"{policy} writes of thing {intent}" if prompt is None else prompt
    row |= {"policy": policy, "intent_id": intent, "intent": f"thing {intent}", "task": TASK.name, "probe": "default"}
    return row | {"prompt": text, "n_words": len(text.split()), **values}


def outputs(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=OUTPUTS)


# --- questions and answers. A judge without a model writes its questions and fails; the test answers in its place. ---

AnswerOf = Callable[[dict[str, Any]], tuple[float, float]]  # row of QUESTIONS -> (score, mass)


def recipe(tmp_path: Path, *judges: Judge) -> Recipe:
    values = {"name": "r", "storage": str(tmp_path), "tasks": [TASK.name], "intents": {"limit": 9}}
    return Recipe.model_validate({**values, "evaluate": {"judges": [judge.model_dump() for judge in judges]}})


def answer_open_questions(evaluation: EvaluationPaths, answer: AnswerOf) -> int:
    """Answer every question that has no answer; return their number."""
    n = 0
    for folder in storage.list_folders(evaluation.work):
        paths = JudgePaths(storage.join(evaluation.work, folder))
        for name in set(storage.list_files(paths.questions)) - set(storage.list_files(paths.scores)):
            rows = storage.read_table(storage.join(paths.questions, name)).to_pylist()
            answers = [dict(zip(SCORES.names, (row["episode_id"], *answer(row)), strict=True)) for row in rows]
            storage.write_table(storage.join(paths.scores, name), pa.Table.from_pylist(answers, schema=SCORES))
            n += len(rows)
    return n


def pairs_of(*texts: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"intent_id": n, "intent": intent, "task": TASK.name, "prompt": prompt} for n, (intent, prompt) in enumerate(texts)]


def length(row: dict[str, Any]) -> tuple[float, float]:
    return float(len(row["prompt"])), 1.0


WITHOUT_MODEL = Judge(kind="rubric", model="/nowhere")


def test_equal_texts_are_judged_once_and_known_answers_need_no_model(tmp_path: Path) -> None:
    evaluation, config = EvaluationPaths(str(tmp_path)), recipe(tmp_path, WITHOUT_MODEL)

    def scores(*texts: tuple[str, str]) -> list[float]:
        return score_pairs(WITHOUT_MODEL, pairs_of(*texts), config, [TASK], evaluation)[0].tolist()

    texts = [("fox", "red fox"), ("owl", ""), ("fox", "red fox"), ("fox", "a fox")]
    with pytest.raises(UserError, match="/nowhere"):
        scores(*texts)
    assert answer_open_questions(evaluation, length) == 2
    assert scores(*texts) == pytest.approx([7, math.nan, 7, 5], nan_ok=True)
    with pytest.raises(UserError):
        scores(*texts, ("owl", "grey owl"))
    assert answer_open_questions(evaluation, length) == 1, "the old questions are not asked again"
    assert scores(("owl", "grey owl"), *texts[:1]) == [8, 7]
    assert scores() == []


def test_another_model_never_reuses_an_answer(tmp_path: Path) -> None:
    evaluation = EvaluationPaths(str(tmp_path))
    for name in ("/nowhere", "/elsewhere"):
        judge = Judge(kind="rubric", model=name)
        with pytest.raises(UserError, match=name):
            score_pairs(judge, pairs_of(("fox", "red fox")), recipe(tmp_path, judge), [TASK], evaluation)
        assert answer_open_questions(evaluation, length) == 1


def test_answers_of_earlier_versions_are_reused(tmp_path: Path) -> None:
    evaluation = EvaluationPaths(str(tmp_path))
    folders = [judge_paths(Judge(kind=kind), evaluation, [TASK]).folder for kind in ("coverage", "gated")]
    assert folders == [
        str(tmp_path / "work" / name) for name in ("judge-coverage-74a2d4d1f3ce4041", "judge-gated-ec8f62f8864a43d7")
    ]
    assert judge_paths(WITHOUT_MODEL, evaluation, [TASK]).folder == str(tmp_path / "work" / "judge-rubric-782aa7a09a392d6c")
    row = {"intent_id": 1, "intent": "fox", "task": "image_search", "prompt": "red fox"}
    assert question(row)["episode_id"] == 2839163946133407567


def test_questions_are_written_once_in_files_of_bounded_size(tmp_path: Path) -> None:
    paths = JudgePaths(str(tmp_path))
    questions = [question(row) for row in pairs_of(*((f"i{n % 7}", f"p{n}") for n in range(1100)))]
    add_questions(paths, questions[:600])
    add_questions(paths, questions)
    names = storage.list_files(paths.questions)
    tables = [storage.read_table(storage.join(paths.questions, name)) for name in names]
    assert [table.num_rows for table in tables] == [512, 88, 500]
    assert all(table.schema.equals(QUESTIONS) for table in tables)
    assert {i for table in tables for i in table["episode_id"].to_pylist()} == {q["episode_id"] for q in questions}
    add_questions(paths, questions)
    assert storage.list_files(paths.questions) == names


def test_a_rubric_without_a_score_gives_nan_and_counts_as_a_parse_failure(tmp_path: Path) -> None:
    judge, evaluation = Judge(kind="rubric", model="/nowhere"), EvaluationPaths(str(tmp_path))
    answers = {"none": (0.0, 0.0), "little": (0.25, 0.4), "whole": (0.75, 0.9)}
    pairs = pairs_of(("i", "none"), ("i", "little"), ("i", "whole"), ("i", " "))
    with pytest.raises(UserError):
        score_pairs(judge, pairs, recipe(tmp_path, judge), [TASK], evaluation)
    answer_open_questions(evaluation, lambda row: answers[row["prompt"]])
    scores, parse_failures = score_pairs(judge, pairs, recipe(tmp_path, judge), [TASK], evaluation)
    assert scores.tolist() == pytest.approx([math.nan, 0.25, 0.75, math.nan], nan_ok=True)
    assert parse_failures == pytest.approx(2 / 3)


# --- all judges of a recipe ---


def ask_and_answer(config: Recipe, table: pa.Table, tmp_path: Path, answer: AnswerOf) -> JudgedOutputs:
    evaluation = EvaluationPaths(str(tmp_path))
    for _ in range(1 + len(config.evaluate.judges)):
        try:
            return ask_judges(config, [TASK], table, evaluation)
        except UserError:
            assert answer_open_questions(evaluation, answer)
    raise AssertionError("a judge asked twice")


def likes_relevant_prompts(row: dict[str, Any]) -> tuple[float, float]:
    """Likes prompts that write of the intent and of nothing else."""
    is_good = re.fullmatch(rf"\w+ writes of {row['intent']}", row["prompt"])
    return 0.1 if row["prompt"] == row["intent"] else 0.8 if is_good else 0.0, 1.0


def test_judges_score_accepted_outputs_and_are_validated_on_the_teachers(tmp_path: Path) -> None:
    table = outputs(
        *(output("student", i) for i in range(4)),
        *(output("teacher", i) for i in range(24)),
        output("student", 4, "", reason="echo"),
        output("echo", 0, "thing 0"),
        output("student", 0, probe="length", variation=1000),
        output("student", 1, probe="reward", variation=2000, prompt="of a bin"),
        output("student", 2, "", probe="reward", variation=2001, reason="empty"),
        output("student", 2, "", probe="length", variation=1001, reason="empty"),
    )
    judges = [Judge(kind="rubric", model="/nowhere", name="big"), WITHOUT_MODEL]
    judged = ask_and_answer(recipe(tmp_path, *judges), table, tmp_path, likes_relevant_prompts)
    assert judged.outputs.select(table.column_names).equals(table)
    assert judged.outputs.column_names[-2:] == ["judge_big", "judge_rubric"]
    expected = [0.8] * 28 + [0.0, 0.1, math.nan, 0.0, 0.0, math.nan]
    assert judged.outputs["judge_big"].to_pylist() == pytest.approx(expected, nan_ok=True)

    assert list(judged.judges) == ["big", "rubric"]
    big = judged.judges["big"]
    assert (big.kind, big.model, big.relation) == ("rubric", "/nowhere", "independent")
    assert (big.validated, big.ratio_scale, big.unrelated_score, big.parse_failures) == (True, True, 0, 0)
    assert (big.pairs, big.gold_pairs, big.gold) == (24, 0, {})
    assert {kind: area.value for kind, area in big.auc.items()} == dict.fromkeys(set(CONTROL_KINDS) - {"wrong_task"}, 1)
    assert big.tasks == {TASK.name: big.auc}
    assert judged.judges["rubric"] == big


@pytest.mark.parametrize("zero", [-0.5, 0.25])
def test_a_rejected_output_gets_the_mean_score_of_unrelated_prompts(tmp_path: Path, zero: float) -> None:
    table = outputs(
        *(output("teacher", i) for i in range(24)),
        output("student", 0, "", reason="echo"),
        output("student", 0, "", reason="echo", probe="reward"),
        output("student", 0, "", reason="echo", probe="reach"),
    )

    def shifted(row: dict[str, Any]) -> tuple[float, float]:
        return zero + (row["intent"] in row["prompt"]), 1.0

    judged = ask_and_answer(recipe(tmp_path, WITHOUT_MODEL), table, tmp_path, shifted)
    assert judged.judges["rubric"].unrelated_score == pytest.approx(zero)
    assert judged.outputs["judge_rubric"].to_pylist()[-3:] == pytest.approx([zero, zero, math.nan], nan_ok=True)


def test_without_a_teacher_judges_are_validated_on_the_student(tmp_path: Path) -> None:
    config = recipe(tmp_path, WITHOUT_MODEL)
    judged = ask_and_answer(config, outputs(*(output("student", i) for i in range(3))), tmp_path, likes_relevant_prompts)
    assert judged.judges["rubric"].pairs == 3


def test_without_any_accepted_output_a_judge_is_not_validated(tmp_path: Path) -> None:
    rejected = outputs(output("student", 0, "", reason="empty", **dict.fromkeys(COMPONENTS)))
    judged = ask_judges(recipe(tmp_path, Judge(kind="coverage")), [TASK], rejected, EvaluationPaths(str(tmp_path)))
    assert judged.outputs["judge_coverage"].to_pylist() == [0]  # no shuffled pair tells the score of unrelated prompts
    assert (judged.judges["coverage"].pairs, judged.judges["coverage"].validated) == (0, False)
    assert ask_judges(recipe(tmp_path).model_copy(), [TASK], rejected, EvaluationPaths(str(tmp_path))).judges == {}


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The bundled teacher's folder under another name, and the same model with other weights."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models")
    source = Path(models.resolve("bundled:smollm2-135m-instruct"))
    shutil.copytree(source, folder / "renamed")
    shutil.copytree(source, folder / "sibling", ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(source)
    model.lm_head.weight.data[0] += 1
    model.save_pretrained(folder / "sibling")
    return str(folder / "renamed"), str(folder / "sibling")


def test_a_judge_is_recognized_by_its_weights_and_not_by_its_name(tmp_path: Path, copies: tuple[str, str]) -> None:
    renamed, sibling = copies
    config = recipe(tmp_path)

    def relation(kind: str, model: str) -> str:
        return relate(Judge.model_validate({"kind": kind, "model": model}), config)

    assert relation("rubric", renamed) == "teacher"
    assert relation("rubric", sibling) == "teacher's family"
    assert relation("rubric", models.resolve("bundled:minilm")) == "scorer"
    assert relation("gated", "bundled:wordllama") == "independent"
    assert relation("coverage", "") == "independent"
    assert relation("rubric", "/nowhere") == "independent"
    values = {**config.model_dump(), "teacher": {"model": "/elsewhere"}}
    values["evaluate"]["baselines"] = [{"name": "small", "model": "bundled:smollm2-135m-instruct"}]
    assert relate(Judge(kind="rubric", model=renamed), Recipe.model_validate(values)) == "baseline"
