"""Judges: mutual information, comparisons in both orders, validation against controls, and questions that are asked once."""

import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udrl import storage
from udrl.episodes import COMPONENTS
from udrl.errors import UserError
from udrl.evaluate.document import JudgeProfile
from udrl.evaluate.judges import pairwise
from udrl.evaluate.judges.answers import QUESTIONS, SCORES, add_questions, judge_paths, question
from udrl.evaluate.judges.judging import JudgedOutputs, ask_judges, compare_pairs, score_pairs
from udrl.evaluate.judges.likelihood import WITH_PROMPT, WITHOUT_PROMPT, LikelihoodJudge
from udrl.evaluate.judges.validation import (
    CONTROL_KINDS,
    auc,
    make_controls,
    sample_per_task,
    shuffle_intents,
    stuff_keywords,
    truncate,
    validate,
    validate_pairwise,
)
from udrl.evaluate.outputs import OUTPUTS, PAIRWISE
from udrl.recipe import Judge, Recipe
from udrl.run import EvaluationPaths, JudgePaths
from udrl.tasks import load_task

TASK = load_task("image_search")
WORDS = "soft vivid poster cheerful dinosaur party balloons retro golden watercolor minimal logo floral vintage rocket leaves"

# --- likelihood ---


def _tiny_model(folder: Path, kind: str) -> str:
    """A random causal LM with a byte-level BPE tokenizer, saved as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([WORDS, WITH_PROMPT], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>")
    torch.manual_seed(0)
    model: Any
    if kind == "llama":
        sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        llama = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.3, **sizes)
        model = LlamaForCausalLM(llama)
    else:
        gpt2 = GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
        model = GPT2LMHeadModel(gpt2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def likelihood(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LikelihoodJudge:
    folder = _tiny_model(tmp_path_factory.mktemp(request.param), request.param)
    return LikelihoodJudge(folder, batch_size=4, dtype="float32", threads=1)


def _reference_score(judge: LikelihoodJudge, prompt: str, intent: str) -> float:
    """PMI from one plain forward pass each, token by token."""
    import torch

    means = []
    for context in (WITH_PROMPT.format(prompt=prompt), WITHOUT_PROMPT):
        head = [judge.tokenizer.bos_token_id, *judge.tokenizer(context, split_special_tokens=True)["input_ids"]]
        tail = judge.tokenizer(" " + intent, split_special_tokens=True)["input_ids"]
        with torch.no_grad():
            logits = judge.model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        means.append(np.mean([logits[len(head) + k - 1, token].item() for k, token in enumerate(tail)]))
    return float(means[0] - means[1])


def test_batched_padded_scores_equal_an_unbatched_reference(likelihood: LikelihoodJudge) -> None:
    prompts = ["a soft {golden} balloon", "poster", WORDS, "typed <s> by a user", "retro logo, minimal"]
    intents = ["dinosaur party", "a long vintage request for a rocket", "logo", "party", "dinosaur party"]
    expected = [_reference_score(likelihood, p, i) for p, i in zip(prompts, intents, strict=True)]
    assert np.std(expected) > 0.01
    assert likelihood.score(prompts, intents) == pytest.approx(expected, abs=1e-4)


def test_an_empty_text_has_no_likelihood_score_and_a_long_one_is_truncated(likelihood: LikelihoodJudge) -> None:
    scores = likelihood.score(["soft balloon", " ", WORDS * 30, "logo"], ["party", "party", "dinosaur party", ""])
    assert np.isnan(scores).tolist() == [False, True, False, True]
    assert likelihood.score([], []).shape == (0,)


# --- controls and validation ---


def test_auc_of_small_examples() -> None:
    assert auc(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1
    assert auc(np.array([1.0, 2.0]), np.array([1.0, 2.0])) == 0.5
    assert auc(np.array([2.0, 0.0]), np.array([1.0])) == 0.5
    assert math.isnan(auc(np.array([]), np.array([1.0])))


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from(["t", "u"])), max_size=20), st.integers(0, 5))
def test_a_shuffled_pair_is_never_a_true_pair(pairs: list[tuple[str, str]], seed: int) -> None:
    intents, tasks = [p[0] for p in pairs], [p[1] for p in pairs]
    shuffled = shuffle_intents(intents, tasks, seed)
    for intent, other, task in zip(intents, shuffled, tasks, strict=True):
        others = {i for i, t in pairs if t == task} - {intent}
        assert other in others if others else other == ""


def test_controls_are_worse_by_construction() -> None:
    intents = ["a poster of the red fox", "an owl", "an owl", "one alone"]
    prompts = ["one two three four five six seven", "grey owl", "brown owl at dusk", "w"]
    controls = make_controls(intents, prompts, ["t", "t", "t", "u"], seed=0)
    prompt_of = {(row["pair"], row["kind"]): row["prompt"] for row in controls.to_pylist()}
    assert [prompt_of[i, "echo"] for i in range(4)] == intents
    assert [prompt_of[i, "truncated"] for i in range(4)] == ["one two", "grey", "brown", "w"]
    assert prompt_of[0, "stuffed"].startswith("poster, red, fox, masterpiece, ")
    assert prompt_of[0, "stuffed"].count("fox") == 2
    assert prompt_of[0, "shuffled"] in ("grey owl", "brown owl at dusk")
    assert {prompt_of[i, "shuffled"] for i in (1, 2)} == {prompts[0]}
    assert (3, "shuffled") not in prompt_of, "a task with one intent has no other"
    assert all(row["intent"] == intents[row["pair"]] for row in controls.to_pylist())
    assert controls.equals(make_controls(intents, prompts, ["t", "t", "t", "u"], seed=0))


def test_controls_of_unusual_texts() -> None:
    assert truncate("one") == "one"
    assert stuff_keywords("of the").startswith("of, the, masterpiece")
    assert stuff_keywords("!!!").startswith("!!!, masterpiece")
    assert make_controls([], [], [], 0).num_rows == 0


@given(st.lists(st.sampled_from("tuv"), max_size=30), st.integers(1, 5), st.integers(0, 3))
def test_a_sample_has_as_many_rows_of_each_task_as_the_limit_allows(tasks: list[str], limit: int, seed: int) -> None:
    sample = sample_per_task(tasks, limit, seed)
    assert len(set(sample)) == len(sample)
    for task in set(tasks):
        assert sum(tasks[i] == task for i in sample) == min(limit, tasks.count(task))
    assert sample_per_task(tasks, limit, seed) == sample


def controls_of(pairs: int) -> tuple[pa.Table, np.ndarray, list[str]]:
    """Controls of ``pairs`` true pairs, half of each task, with the kinds of the controls and the tasks of the pairs."""
    tasks = ["t"] * (pairs // 2) + ["u"] * (pairs - pairs // 2)
    controls = make_controls([f"i{n}" for n in range(pairs)], [f"p{n}" for n in range(pairs)], tasks, 0)
    return controls, np.array(controls["kind"].to_pylist(), dtype=object), tasks


CONTROLS_OF_40, KINDS_OF_40, TASKS_OF_40 = controls_of(40)
IS_SHUFFLED = KINDS_OF_40 == "shuffled"


def test_a_judge_that_prefers_true_pairs_to_shuffled_ones_is_validated() -> None:
    true = np.array([3.0, 2.0] * 19 + [3.0, np.nan])
    scores = np.select([IS_SHUFFLED, KINDS_OF_40 == "echo"], [1.0, 9.0], 3.0)
    validation = validate(true, scores, CONTROLS_OF_40, TASKS_OF_40)
    of_task = {"shuffled": 1, "echo": 0, "stuffed": 0.25, "truncated": 0.25}
    assert validation.auc == pytest.approx({**of_task, "stuffed": 10 / 39, "truncated": 10 / 39})
    assert validation.tasks["t"] == of_task
    assert (validation.pairs, validation.validated) == (39, True)
    blind = validate(true, np.full(len(KINDS_OF_40), 2.5), CONTROLS_OF_40, TASKS_OF_40)
    assert (blind.auc["shuffled"], blind.validated, blind.ratio_scale) == (pytest.approx(20 / 39), False, False)


@pytest.mark.parametrize(("pairs", "validated"), [(19, False), (20, True)])
def test_fewer_than_20_pairs_validate_no_judge(pairs: int, validated: bool) -> None:
    controls, kinds, tasks = controls_of(pairs)
    pointwise = validate(np.ones(pairs), np.zeros(len(kinds)), controls, tasks)
    assert (pointwise.auc["shuffled"], pointwise.validated, pointwise.ratio_scale) == (1, validated, validated)
    compared = validate_pairwise(np.ones(len(kinds)), controls)
    assert (compared.auc["shuffled"], compared.validated, compared.ratio_scale) == (1, validated, False)


def test_pairs_whose_shuffled_control_has_no_score_do_not_count_towards_the_20() -> None:
    scores = np.where(IS_SHUFFLED & (np.cumsum(IS_SHUFFLED) > 19), np.nan, 0.0)
    assert not validate(np.ones(40), scores, CONTROLS_OF_40, TASKS_OF_40).validated
    assert not validate_pairwise(1 - scores, CONTROLS_OF_40).validated


def test_a_judge_without_shuffled_pairs_is_not_validated() -> None:
    controls = make_controls(["one"], ["a prompt"], ["t"], 0)
    validation = validate(np.array([1.0]), np.zeros(controls.num_rows), controls, ["t"])
    assert math.isnan(validation.auc["shuffled"])
    assert math.isnan(validation.unrelated_score)
    assert validation.validated is validation.ratio_scale is False
    empty = validate(np.zeros(0), np.zeros(0), make_controls([], [], [], 0), [])
    assert (empty.pairs, empty.validated, empty.ratio_scale, empty.tasks) == (0, False, False, {})


def test_a_pairwise_judge_is_measured_by_how_often_it_prefers_the_true_prompt() -> None:
    number = np.cumsum(IS_SHUFFLED)  # of the shuffled control
    of_shuffled = np.select([number <= 30, number <= 36], [0.51, 0.5 + 1e-9], 0.01)  # 30 won, 6 even, 4 lost
    preferences = np.select([IS_SHUFFLED, KINDS_OF_40 == "echo"], [of_shuffled, 0.4], np.nan)
    validation = validate_pairwise(preferences, CONTROLS_OF_40)
    assert validation.auc["shuffled"] == pytest.approx((30 + 6 / 2) / 40)
    assert validation.tasks["u"]["echo"] == 0
    assert math.isnan(validation.auc["stuffed"])
    assert (validation.pairs, validation.validated) == (40, True)


def test_a_judge_that_always_prefers_the_first_prompt_is_at_chance() -> None:
    first = np.random.default_rng(0).uniform(0.5, 1, len(KINDS_OF_40))
    assert validate_pairwise((first + (1 - first)) / 2, CONTROLS_OF_40).auc["shuffled"] == 0.5


def test_the_mean_score_of_unrelated_prompts_is_the_zero_of_the_scale() -> None:
    true = np.array([0.6] * 39 + [np.nan])
    cosines = validate(true, np.where(IS_SHUFFLED, 0.5, 0.9), CONTROLS_OF_40, TASKS_OF_40)
    assert (cosines.unrelated_score, cosines.ratio_scale) == (pytest.approx(0.5), True)
    nats = validate(true, np.where(IS_SHUFFLED, -0.2, 0.9), CONTROLS_OF_40, TASKS_OF_40)
    assert (nats.unrelated_score, nats.ratio_scale) == (pytest.approx(-0.2), True)
    # Nine true pairs in ten score above it, but their mean is below it.
    skewed = validate(np.array([0.6] * 36 + [-9.0] * 4), np.where(IS_SHUFFLED, 0.1, 0.9), CONTROLS_OF_40, TASKS_OF_40)
    assert (skewed.validated, skewed.ratio_scale) == (True, False)


# --- comparisons ---


def logs(*shares: float) -> list[float]:
    return [math.log(share) for share in shares]


def test_a_preference_is_the_share_of_a_among_a_and_b() -> None:
    assert pairwise.preference(["A", " B", "The", " A"], logs(0.4, 0.2, 0.3, 0.1)) == pytest.approx((0.5 / 0.7, 0.7))
    assert pairwise.preference(["B"], logs(0.9)) == pytest.approx((0.0, 0.9))
    value, mass = pairwise.preference(["a", "AB", ""], logs(0.5, 0.3, 0.2))
    assert math.isnan(value)
    assert mass == 0


shares = st.tuples(st.floats(0, 1), st.floats(0, 1))


@given(shares, shares)
def test_swapping_the_prompts_swaps_the_preference_in_both_orders(one: tuple[float, float], two: tuple[float, float]) -> None:
    comparison, swapped = pairwise.combine_orders(one, two), pairwise.combine_orders(two, one)
    assert swapped.first == pytest.approx(1 - comparison.second)
    assert swapped.second == pytest.approx(1 - comparison.first)
    assert comparison.parsed == swapped.parsed == (one[1] >= 0.5 and two[1] >= 0.5)


def test_the_comparison_prompt_ends_before_the_answer_and_its_examples_are_balanced() -> None:
    render = pairwise.RenderComparison({TASK.name: TASK}, False, "", None)
    row = {"task": TASK.name, "intent": "a red fox", "judged": "red fox\nBetter: A", "against": "blue owl"}
    text = render(row)["prompt"]
    assert text.endswith("Request: a red fox\nA: red fox Better: A\nB: blue owl\nBetter:")
    assert sorted(better for _, better in pairwise.compared_examples(TASK)) == ["A", "A", "B", "B"]
    assert text.count("\nBetter: A\n") == text.count("\nBetter: B\n") == 2


def test_a_rejected_output_loses_without_a_judge() -> None:
    assert pairwise.settle_without_judge(True, True) is None
    assert pairwise.settle_without_judge(True, False) == 1
    assert pairwise.settle_without_judge(False, True) == 0
    assert pairwise.settle_without_judge(False, False) == 0.5


# --- a table of outputs ---


def output(policy: str, intent: int, prompt: str | None = None, **values: Any) -> dict[str, Any]:
    blank: dict[str, Any] = {"string": "", "int64": 0, "int32": 0, "float": 0.5}
    row = {field.name: blank[str(field.type)] for field in OUTPUTS}
    text = f"{policy} writes of thing {intent}" if prompt is None else prompt
    row |= {"policy": policy, "intent_id": intent, "intent": f"thing {intent}", "task": TASK.name, "probe": "default"}
    return row | {"prompt": text, "n_words": len(text.split()), **values}


def outputs(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=OUTPUTS)


def test_the_student_is_compared_with_every_other_policy_on_the_same_intent_task_and_variation() -> None:
    table = outputs(
        *(output("student", i, variation=v) for i in range(3) for v in range(2)),
        *(output("teacher", i, variation=v, prompt=f"{i} {v}") for i in range(3) for v in range(2)),
        *(output("echo", i) for i in range(2)),  # one variation, and not of every intent
        output("student", 0, variation=2000, probe="reward"),
    )
    pairs = pairwise.pairs_to_compare(table, 50, seed=0)
    keys = {(o["policy"], s["intent_id"], s["variation"], o["variation"]) for s, o in pairs}
    assert keys == {("teacher", i, v, v) for i in range(3) for v in range(2)} | {
        ("echo", i, v, 0) for i in range(2) for v in range(2)
    }
    few = pairwise.pairs_to_compare(table, 3, seed=1)
    assert [sum(o["policy"] == name for _, o in few) for name in ("teacher", "echo")] == [3, 3]
    assert few == pairwise.pairs_to_compare(table, 3, seed=1)
    assert few != pairwise.pairs_to_compare(table, 3, seed=2)


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


WITHOUT_MODEL = Judge(kind="likelihood", model="/nowhere")


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
        judge = Judge(kind="likelihood", model=name)
        with pytest.raises(UserError, match=name):
            score_pairs(judge, pairs_of(("fox", "red fox")), recipe(tmp_path, judge), [TASK], evaluation)
        assert answer_open_questions(evaluation, length) == 1


def test_answers_of_earlier_versions_are_reused(tmp_path: Path) -> None:
    paths = judge_paths(WITHOUT_MODEL, EvaluationPaths(str(tmp_path)), [TASK])
    assert paths.folder == str(tmp_path / "work" / "judge-likelihood-57ea27f14563f0d6")
    row = {"intent_id": 1, "intent": "fox", "task": "image_search"}
    assert question(row, "red fox", "grey fox")["episode_id"] == 4077211307524989216


def test_questions_are_written_once_in_files_of_bounded_size(tmp_path: Path) -> None:
    paths = JudgePaths(str(tmp_path))
    questions = [question(row, row["prompt"]) for row in pairs_of(*((f"i{n % 7}", f"p{n}") for n in range(1100)))]
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


TEXTS = ["red fox", "blue owl", "old map"]


def test_each_pair_is_shown_in_both_orders_and_shares_its_questions_with_its_swap(tmp_path: Path) -> None:
    judge, evaluation = Judge(kind="pairwise", model="/nowhere"), EvaluationPaths(str(tmp_path))
    orders = [(a, b) for a, b in combinations(TEXTS, 2)] + [(b, a) for a, b in combinations(TEXTS, 2)]
    firsts = pairs_of(*(("i", a) for a, _ in orders))
    pairs = [{**row, "other_prompt": b} for row, (_, b) in zip(firsts, orders, strict=True)]
    with pytest.raises(UserError):
        compare_pairs(judge, pairs, recipe(tmp_path, judge), [TASK], evaluation)

    def biased(row: dict[str, Any]) -> tuple[float, float]:
        """Prefers the later text of the list, and a little the text that is shown first."""
        is_better = TEXTS.index(row["prompt"]) > TEXTS.index(row["other_prompt"])
        return (0.75 if is_better else 0.25) + 0.125, 0.9 if row["prompt"] != "old map" else 0.3

    assert answer_open_questions(evaluation, biased) == 6
    comparisons, parse_failures = compare_pairs(judge, pairs, recipe(tmp_path, judge), [TASK], evaluation)
    assert [c.first for c in comparisons] == pytest.approx([0.375] * 3 + [0.875] * 3)
    assert [c.second for c in comparisons] == pytest.approx([0.125] * 3 + [0.625] * 3)
    assert [c.parsed for c in comparisons] == [True, False, False] * 2
    assert parse_failures == pytest.approx(1 / 3)


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
    """Likes prompts that contain the intent but do not only repeat it; compares likewise, with a bonus for the first."""

    def worth(prompt: str) -> float:
        return 0.0 if row["intent"] not in prompt else 0.1 if prompt == row["intent"] else 0.8

    if row["other_prompt"]:
        return 0.5 + (worth(row["prompt"]) - worth(row["other_prompt"])) / 2 + 0.1, 1.0
    return worth(row["prompt"]), 1.0


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
    judges = [Judge(kind="rubric", model="/nowhere", name="big"), Judge(kind="pairwise", model="/nowhere"), WITHOUT_MODEL]
    judged = ask_and_answer(recipe(tmp_path, *judges), table, tmp_path, likes_relevant_prompts)
    assert judged.outputs.select(table.column_names).equals(table)
    assert judged.outputs.column_names[-2:] == ["judge_big", "judge_likelihood"]
    expected = [0.8] * 28 + [0.0, 0.1, math.nan, 0.0, 0.0, math.nan]
    assert judged.outputs["judge_big"].to_pylist() == pytest.approx(expected, nan_ok=True)

    assert judged.comparisons.schema.equals(PAIRWISE)
    row_of = {(row["other"], row["intent_id"]): row for row in judged.comparisons.to_pylist()}
    assert set(row_of) == {("teacher", i) for i in range(5)} | {("echo", 0)}
    assert (row_of["teacher", 0]["first"], row_of["teacher", 0]["second"]) == pytest.approx((0.6, 0.4))
    assert [row_of["teacher", 4][name] for name in ("first", "second", "parsed")] == [0, 0, True]
    assert row_of["echo", 0]["first"] == pytest.approx(0.95)

    assert list(judged.judges) == ["big", "pairwise", "likelihood"]
    assert judged.judges["big"] == JudgeProfile(
        kind="rubric",
        model="/nowhere",
        unit="score, 0 to 1",
        is_teacher=False,
        validated=True,
        ratio_scale=True,
        unrelated_score=0,
        auc=dict.fromkeys(CONTROL_KINDS, 1),
        tasks={TASK.name: dict.fromkeys(CONTROL_KINDS, 1)},
        pairs=24,
        parse_failures=0,
    )
    likelihood, pairwise_judge = judged.judges["likelihood"], judged.judges["pairwise"]
    assert (likelihood.ratio_scale, likelihood.unrelated_score, likelihood.parse_failures) == (True, 0, None)
    assert pairwise_judge.position_bias == pytest.approx(0.2), "of the judge's own verdicts, not of settled pairs"
    assert (pairwise_judge.auc["shuffled"], pairwise_judge.ratio_scale) == (1, False)
    assert set(pairwise_judge.tasks[TASK.name]) == set(CONTROL_KINDS)


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
    assert judged.judges["likelihood"].unrelated_score == pytest.approx(zero)
    assert judged.outputs["judge_likelihood"].to_pylist()[-3:] == pytest.approx([zero, zero, math.nan], nan_ok=True)


def test_unparsed_answers_of_a_pairwise_judge_count_neither_as_wins_nor_as_bias(tmp_path: Path) -> None:
    config = recipe(tmp_path, Judge(kind="pairwise", model="/nowhere"))
    table = outputs(*(output(policy, i) for i in range(24) for policy in ("student", "teacher")))

    def often_unclear(row: dict[str, Any]) -> tuple[float, float]:
        """Parses for half of the comparisons of policies, and among the controls only for shuffled ones."""
        if "student" in row["prompt"] + row["other_prompt"]:
            is_clear = int(row["intent"].split()[-1]) % 2 == 1
        else:
            is_clear = "teacher" in row["prompt"] and "teacher" in row["other_prompt"]
        return (0.7, 0.9) if is_clear else (1.0, 0.2)

    judged = ask_and_answer(config, table, tmp_path, often_unclear)
    profile = judged.judges["pairwise"]
    assert sum(judged.comparisons["parsed"].to_pylist()) == 12
    assert profile.position_bias == pytest.approx(0.4)  # 0.7 first, 0.3 second
    assert profile.auc["shuffled"] == 0.5
    assert profile.auc["echo"] is None


def test_without_a_teacher_judges_are_validated_on_the_student(tmp_path: Path) -> None:
    config = recipe(tmp_path, WITHOUT_MODEL, Judge(kind="pairwise", model="/nowhere"))
    judged = ask_and_answer(config, outputs(*(output("student", i) for i in range(3))), tmp_path, likes_relevant_prompts)
    assert judged.comparisons.num_rows == 0
    assert judged.judges["likelihood"].pairs == judged.judges["pairwise"].pairs == 3
    assert judged.judges["pairwise"].position_bias is None


def test_without_any_accepted_output_a_judge_is_not_validated(tmp_path: Path) -> None:
    config = recipe(tmp_path, WITHOUT_MODEL, Judge(kind="pairwise", model="/nowhere"))
    rejected = outputs(output("student", 0, "", reason="empty", **dict.fromkeys(COMPONENTS)))
    judged = ask_judges(config, [TASK], rejected, EvaluationPaths(str(tmp_path)))
    assert judged.outputs["judge_likelihood"].to_pylist() == [0]  # no shuffled pair tells the score of unrelated prompts
    assert (judged.judges["likelihood"].pairs, judged.judges["likelihood"].validated) == (0, False)
    assert ask_judges(recipe(tmp_path), [TASK], rejected, EvaluationPaths(str(tmp_path))).judges == {}
