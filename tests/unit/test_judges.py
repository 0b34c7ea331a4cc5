"""Judges: mutual information, comparisons in both orders, controls that a judge must see through, what is asked once."""

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
from udrl.evaluate.judges import ask, judge_pairwise, judge_pointwise, pairwise
from udrl.evaluate.judges import judgments as store
from udrl.evaluate.judges.likelihood import WITH_PROMPT, WITHOUT_PROMPT, LikelihoodJudge
from udrl.evaluate.judges.validation import (
    KINDS,
    auc,
    controls,
    draw,
    shuffled,
    stuffed,
    truncated,
    validate,
    validate_pairwise,
)
from udrl.evaluate.outputs import OUTPUTS, PAIRWISE
from udrl.recipe import Judge, Recipe
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


def _by_hand(judge: LikelihoodJudge, prompt: str, intent: str) -> float:
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


def test_batched_padded_scores_equal_the_mutual_information_by_hand(likelihood: LikelihoodJudge) -> None:
    prompts = ["a soft {golden} balloon", "poster", WORDS, "typed <s> by a user", "retro logo, minimal"]
    intents = ["dinosaur party", "a long vintage request for a rocket", "logo", "party", "dinosaur party"]
    expected = [_by_hand(likelihood, p, i) for p, i in zip(prompts, intents, strict=True)]
    assert np.std(expected) > 0.01
    assert likelihood.score(prompts, intents) == pytest.approx(expected, abs=1e-4)


def test_an_empty_text_has_no_likelihood_score_and_a_long_one_is_cut(likelihood: LikelihoodJudge) -> None:
    found = likelihood.score(["soft balloon", " ", WORDS * 30, "logo"], ["party", "party", "dinosaur party", ""])
    assert np.isnan(found).tolist() == [False, True, False, True]
    assert likelihood.score([], []).shape == (0,)


# --- controls and validation ---


def test_auc_against_hand_counts() -> None:
    assert auc(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1
    assert auc(np.array([1.0, 2.0]), np.array([1.0, 2.0])) == 0.5
    assert auc(np.array([2.0, 0.0]), np.array([1.0])) == 0.5
    assert math.isnan(auc(np.array([]), np.array([1.0])))


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from(["t", "u"])), max_size=20), st.integers(0, 5))
def test_a_shuffled_pair_is_never_a_true_one(pairs: list[tuple[str, str]], seed: int) -> None:
    intents, tasks = [p[0] for p in pairs], [p[1] for p in pairs]
    wrong = shuffled(intents, tasks, seed)
    for here, there, task in zip(intents, wrong, tasks, strict=True):
        others = {i for i, t in pairs if t == task} - {here}
        assert there in others if others else there == ""


def test_controls_are_worse_by_construction() -> None:
    intents = ["a poster of the red fox", "an owl", "an owl", "one alone"]
    prompts = ["one two three four five six seven", "grey owl", "brown owl at dusk", "w"]
    made = controls(intents, prompts, ["t", "t", "t", "u"], seed=0)
    by = {(r["pair"], r["kind"]): r for r in made.to_pylist()}
    assert [by[i, "echo"]["prompt"] for i in range(4)] == intents
    assert [by[i, "truncated"]["prompt"] for i in range(4)] == ["one two", "grey", "brown", "w"]
    assert by[0, "stuffed"]["prompt"].startswith("poster, red, fox, masterpiece, ")
    assert by[0, "stuffed"]["prompt"].count("fox") == 2
    assert by[0, "shuffled"]["prompt"] in ("grey owl", "brown owl at dusk")
    assert {by[i, "shuffled"]["prompt"] for i in (1, 2)} == {prompts[0]}
    assert (3, "shuffled") not in by, "a task with one intent has no other"
    assert all(by[i, kind]["intent"] == intents[i] for i, kind in by)
    assert made.equals(controls(intents, prompts, ["t", "t", "t", "u"], seed=0))


def test_controls_of_odd_texts() -> None:
    assert truncated("one") == "one"
    assert stuffed("of the").startswith("of, the, masterpiece")
    assert stuffed("!!!").startswith("!!!, masterpiece")
    assert controls([], [], [], 0).num_rows == 0


@given(st.lists(st.sampled_from("tuv"), max_size=30), st.integers(1, 5), st.integers(0, 3))
def test_a_draw_takes_as_many_of_each_task_as_it_may(tasks: list[str], limit: int, seed: int) -> None:
    drawn = draw(tasks, limit, seed)
    assert len(set(drawn)) == len(drawn)
    for task in set(tasks):
        assert sum(tasks[i] == task for i in drawn) == min(limit, tasks.count(task))
    assert draw(tasks, limit, seed) == drawn


def made_of(pairs: int) -> tuple[pa.Table, np.ndarray, list[str]]:
    """Controls of so many pairs, half of each task, with their kinds and the pairs' tasks."""
    tasks = ["t"] * (pairs // 2) + ["u"] * (pairs - pairs // 2)
    made = controls([f"i{n}" for n in range(pairs)], [f"p{n}" for n in range(pairs)], tasks, 0)
    return made, np.array(made["kind"].to_pylist(), dtype=object), tasks


MADE, KIND, OF = made_of(40)


def test_a_judge_is_believed_where_it_tells_true_pairs_from_shuffled_ones() -> None:
    true = np.array([3.0, 2.0] * 19 + [3.0, np.nan])
    scores = np.select([KIND == "shuffled", KIND == "echo"], [1.0, 9.0], 3.0)
    found = validate(true, scores, MADE, OF)
    of_task = {"shuffled": 1, "echo": 0, "stuffed": 0.25, "truncated": 0.25}
    assert found["auc"] == pytest.approx({**of_task, "stuffed": 10 / 39, "truncated": 10 / 39})
    assert found["tasks"]["t"] == of_task
    assert (found["pairs"], found["believable"]) == (39, True)
    blind = validate(true, np.full(len(KIND), 2.5), MADE, OF)
    assert (blind["auc"]["shuffled"], blind["believable"], blind["ratio"]) == (pytest.approx(20 / 39), False, False)


@pytest.mark.parametrize(("pairs", "believed"), [(19, False), (20, True)])
def test_a_few_pairs_prove_no_judge(pairs: int, believed: bool) -> None:
    made, kinds, tasks = made_of(pairs)
    found = validate(np.ones(pairs), np.zeros(len(kinds)), made, tasks)
    assert (found["auc"]["shuffled"], found["believable"], found["ratio"]) == (1, believed, believed)
    compared = validate_pairwise(np.ones(len(kinds)), made)
    assert (compared["auc"]["shuffled"], compared["believable"], compared["ratio"]) == (1, believed, False)


def test_pairs_whose_shuffled_control_has_no_score_do_not_count_towards_belief() -> None:
    scores = np.where((KIND == "shuffled") & (np.cumsum(KIND == "shuffled") > 19), np.nan, 0.0)
    assert not validate(np.ones(40), scores, MADE, OF)["believable"]
    assert not validate_pairwise(1 - scores, MADE)["believable"]


def test_without_anything_to_shuffle_no_judge_is_believed() -> None:
    made = controls(["one"], ["a prompt"], ["t"], 0)
    found = validate(np.array([1.0]), np.zeros(made.num_rows), made, ["t"])
    assert math.isnan(found["auc"]["shuffled"])
    assert math.isnan(found["unrelated"])
    assert found["believable"] is found["ratio"] is False
    nothing = validate(np.zeros(0), np.zeros(0), controls([], [], [], 0), [])
    assert (nothing["pairs"], nothing["believable"], nothing["ratio"], nothing["tasks"]) == (0, False, False, {})


def test_a_comparing_judge_is_measured_by_how_often_it_prefers_the_true_prompt() -> None:
    turn = np.cumsum(KIND == "shuffled")  # which shuffled control it is
    often = np.select([turn <= 30, turn <= 36], [0.51, 0.5 + 1e-9], 0.01)  # 30 won, 6 even, 4 lost
    preferred = np.select([KIND == "shuffled", KIND == "echo"], [often, 0.4], np.nan)
    found = validate_pairwise(preferred, MADE)
    assert found["auc"]["shuffled"] == pytest.approx((30 + 6 / 2) / 40)
    assert found["tasks"]["u"]["echo"] == 0
    assert math.isnan(found["auc"]["stuffed"])
    assert (found["pairs"], found["believable"]) == (40, True)


def test_a_judge_that_always_takes_the_first_is_at_chance() -> None:
    first = np.random.default_rng(0).uniform(0.5, 1, len(KIND))
    found = validate_pairwise((first + (1 - first)) / 2, MADE)
    assert found["auc"]["shuffled"] == 0.5


def test_unrelated_prompts_are_the_zero_of_a_scale() -> None:
    true = np.array([0.6] * 39 + [np.nan])
    found = validate(true, np.where(KIND == "shuffled", 0.5, 0.9), MADE, OF)
    assert (found["unrelated"], found["ratio"]) == (pytest.approx(0.5), True)
    nats = validate(true, np.where(KIND == "shuffled", -0.2, 0.9), MADE, OF)
    assert (nats["unrelated"], nats["ratio"]) == (pytest.approx(-0.2), True)
    # Eight true pairs in ten score above, and the mean is below all the same.
    skewed = validate(np.array([0.6] * 36 + [-9.0] * 4), np.where(KIND == "shuffled", 0.1, 0.9), MADE, OF)
    assert (skewed["believable"], skewed["ratio"]) == (True, False)


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
def test_swapping_the_prompts_swaps_who_is_preferred_in_both_orders(one: tuple[float, float], two: tuple[float, float]) -> None:
    first, second, parsed = pairwise.both_orders(one, two)
    theirs_first, theirs_second, theirs_parsed = pairwise.both_orders(two, one)
    assert theirs_first == pytest.approx(1 - second)
    assert theirs_second == pytest.approx(1 - first)
    assert parsed == theirs_parsed == (one[1] >= 0.5 and two[1] >= 0.5)


def test_the_text_to_compare_ends_where_the_answer_is_due_and_its_examples_are_even() -> None:
    render = pairwise._Render({TASK.name: TASK}, False, "", None)
    row = {"task": TASK.name, "intent": "a red fox", "judged": "red fox\nBetter: A", "against": "blue owl"}
    text = render(row)["prompt"]
    assert text.endswith("Request: a red fox\nA: red fox Better: A\nB: blue owl\nBetter:")
    assert sorted(better for _, better in pairwise._compared(TASK)) == ["A", "A", "B", "B"]
    assert text.count("\nBetter: A\n") == text.count("\nBetter: B\n") == 2


def test_a_rejected_output_loses_without_being_asked_about() -> None:
    assert pairwise.settled(True, True) is None
    assert (pairwise.settled(True, False), pairwise.settled(False, True), pairwise.settled(False, False)) == (1, 0, 0.5)


# --- a table of outputs ---


def output(policy: str, intent: int, prompt: str | None = None, **values: Any) -> dict[str, Any]:
    blank: dict[str, Any] = {"string": "", "int64": 0, "int32": 0, "float": 0.5}
    row = {field.name: blank[str(field.type)] for field in OUTPUTS}
    text = f"{policy} writes of thing {intent}" if prompt is None else prompt
    row |= {"policy": policy, "intent_id": intent, "intent": f"thing {intent}", "task": TASK.name, "probe": "default"}
    return row | {"prompt": text, "n_words": len(text.split()), **values}


def outputs(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=OUTPUTS)


def test_the_student_is_compared_with_every_other_on_the_same_intent_task_and_variation() -> None:
    table = outputs(
        *(output("student", i, variation=v) for i in range(3) for v in range(2)),
        *(output("teacher", i, variation=v, prompt=f"{i} {v}") for i in range(3) for v in range(2)),
        *(output("echo", i) for i in range(2)),  # one variation, and not of every intent
        output("student", 0, variation=2000, probe="reward"),
    )
    found = pairwise.comparisons(table, 50, seed=0)
    places = {(o["policy"], m["intent_id"], m["variation"], o["variation"]) for m, o in found}
    assert places == {("teacher", i, v, v) for i in range(3) for v in range(2)} | {
        ("echo", i, v, 0) for i in range(2) for v in range(2)
    }
    few = pairwise.comparisons(table, 3, seed=1)
    assert [sum(o["policy"] == name for _, o in few) for name in ("teacher", "echo")] == [3, 3]
    assert few == pairwise.comparisons(table, 3, seed=1)
    assert few != pairwise.comparisons(table, 3, seed=2)


# --- what is asked, and not asked again. A judge that is nowhere asks; the test answers in its place. ---

Value = Callable[[dict[str, Any]], tuple[float, float]]


def recipe(tmp_path: Path, *judges: Judge) -> Recipe:
    values = {"name": "r", "storage": str(tmp_path), "tasks": [TASK.name], "intents": {"limit": 9}}
    return Recipe.model_validate({**values, "evaluate": {"judges": [judge.model_dump() for judge in judges]}})


def answer_by_hand(work: str, value: Value) -> int:
    """Answer all that was asked and has no answer; how many texts that was."""
    n = 0
    for folder in (storage.join(work, name) for name in storage.list_folders(work)):
        for name in set(storage.list_files(store.asked(folder))) - set(storage.list_files(store.scores(folder))):
            rows = storage.read_table(storage.join(store.asked(folder), name)).to_pylist()
            score, mass = zip(*map(value, rows), strict=True)
            table = pa.table([[r["episode_id"] for r in rows], pa.array(score, pa.float32()), pa.array(mass, pa.float32())],
                             schema=store.SCORES)  # fmt: skip
            storage.write_table(storage.join(store.scores(folder), name), table)
            n += len(rows)
    return n


def pairs_of(*texts: tuple[str, str]) -> pa.Table:
    rows = [
        {"pair_id": n, "intent_id": n, "intent": intent, "task": TASK.name, "prompt": prompt}
        for n, (intent, prompt) in enumerate(texts)
    ]
    return pa.Table.from_pylist(rows)


def length(row: dict[str, Any]) -> tuple[float, float]:
    return float(len(row["prompt"])), 1.0


NOWHERE = Judge(kind="likelihood", model="/nowhere")


def test_equal_texts_are_judged_once_and_what_is_judged_needs_no_model(tmp_path: Path) -> None:
    work = str(tmp_path / "work")
    config = recipe(tmp_path, NOWHERE)

    def judged(*texts: tuple[str, str]) -> list[float]:
        return judge_pointwise(NOWHERE, pairs_of(*texts), work, [TASK], config)[0].tolist()

    texts = [("fox", "red fox"), ("owl", ""), ("fox", "red fox"), ("fox", "a fox")]
    with pytest.raises(UserError, match="/nowhere"):
        judged(*texts)
    assert answer_by_hand(work, length) == 2
    assert judged(*texts) == pytest.approx([7, math.nan, 7, 5], nan_ok=True)
    with pytest.raises(UserError):
        judged(*texts, ("owl", "grey owl"))
    assert answer_by_hand(work, length) == 1, "the old ones are not asked again"
    assert judged(("owl", "grey owl"), *texts[:1]) == [8, 7]
    assert judged() == []


def test_another_model_never_takes_over_a_score(tmp_path: Path) -> None:
    work = str(tmp_path / "work")
    for name in ("/nowhere", "/elsewhere"):
        judge = Judge(kind="likelihood", model=name)
        with pytest.raises(UserError, match=name):
            judge_pointwise(judge, pairs_of(("fox", "red fox")), work, [TASK], recipe(tmp_path, judge))
        assert answer_by_hand(work, length) == 1


def test_many_texts_are_cut_into_files_of_bounded_size(tmp_path: Path) -> None:
    questions = [store.question(r, r["prompt"]) for r in pairs_of(*((f"i{n % 7}", f"p{n}") for n in range(1100))).to_pylist()]
    store.add(str(tmp_path), questions[:600])
    store.add(str(tmp_path), questions)
    names = storage.list_files(store.asked(str(tmp_path)))
    tables = [storage.read_table(storage.join(store.asked(str(tmp_path)), name)) for name in names]
    assert [t.num_rows for t in tables] == [512, 88, 500]
    assert {i for t in tables for i in t["episode_id"].to_pylist()} == {q["episode_id"] for q in questions}
    store.add(str(tmp_path), questions)
    assert storage.list_files(store.asked(str(tmp_path))) == names


def test_a_rubric_that_gave_no_score_leaves_nan_and_counts_as_a_parse_failure(tmp_path: Path) -> None:
    judge, work = Judge(kind="rubric", model="/nowhere"), str(tmp_path / "work")
    said = {"none": (0.0, 0.0), "little": (0.25, 0.4), "whole": (0.75, 0.9)}
    table = pairs_of(("i", "none"), ("i", "little"), ("i", "whole"), ("i", " "))
    with pytest.raises(UserError):
        judge_pointwise(judge, table, work, [TASK], recipe(tmp_path, judge))
    answer_by_hand(work, lambda row: said[row["prompt"]])
    scores, facts = judge_pointwise(judge, table, work, [TASK], recipe(tmp_path, judge))
    assert scores.tolist() == pytest.approx([math.nan, 0.25, 0.75, math.nan], nan_ok=True)
    assert facts == {"parse_failures": pytest.approx(2 / 3)}


TEXTS = ["red fox", "blue owl", "old map"]


def test_each_pair_is_shown_in_both_orders_and_a_pair_and_its_swap_are_one_question_each(tmp_path: Path) -> None:
    judge, work = Judge(kind="pairwise", model="/nowhere"), str(tmp_path / "work")
    config = recipe(tmp_path, judge)
    both = [(a, b) for a, b in combinations(TEXTS, 2)] + [(b, a) for a, b in combinations(TEXTS, 2)]
    table = pairs_of(*(("i", a) for a, _ in both)).append_column("other_prompt", pa.array([b for _, b in both]))
    with pytest.raises(UserError):
        judge_pairwise(judge, table, work, [TASK], config)

    def biased(row: dict[str, Any]) -> tuple[float, float]:
        """Prefers what comes later in the list, and a little what stands first."""
        better = TEXTS.index(row["prompt"]) > TEXTS.index(row["other_prompt"])
        return (0.75 if better else 0.25) + 0.125, 0.9 if row["prompt"] != "old map" else 0.3

    assert answer_by_hand(work, biased) == 6
    found, facts = judge_pairwise(judge, table, work, [TASK], config)
    assert found["first"].to_pylist() == pytest.approx([0.375] * 3 + [0.875] * 3)
    assert found["second"].to_pylist() == pytest.approx([0.125] * 3 + [0.625] * 3)
    assert found["parsed"].to_pylist() == [True, False, False] * 2
    assert facts == {"parse_failures": pytest.approx(1 / 3)}


def asked_and_answered(config: Recipe, table: pa.Table, work: str, value: Value) -> tuple[pa.Table, pa.Table, dict[str, Any]]:
    for _ in range(1 + len(config.evaluate.judges)):
        try:
            return ask(config, [TASK], table, work)
        except UserError:
            assert answer_by_hand(work, value)
    raise AssertionError("a judge asked twice")


def knows(row: dict[str, Any]) -> tuple[float, float]:
    """Likes prompts that name the intent, beyond repeating it; compares by the same, with something for the first place."""

    def worth(prompt: str) -> float:
        return 0.0 if row["intent"] not in prompt else 0.1 if prompt == row["intent"] else 0.8

    if row["other_prompt"]:
        return 0.5 + (worth(row["prompt"]) - worth(row["other_prompt"])) / 2 + 0.1, 1.0
    return worth(row["prompt"]), 1.0


def test_judges_are_asked_about_accepted_outputs_and_validated_on_the_teachers(tmp_path: Path) -> None:
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
    judges = [Judge(kind="rubric", model="/nowhere", name="big"), Judge(kind="pairwise", model="/nowhere"), NOWHERE]
    config = recipe(tmp_path, *judges)
    filled, compared, facts = asked_and_answered(config, table, str(tmp_path / "work"), knows)
    assert filled.select(table.column_names).equals(table)
    assert filled.column_names[-2:] == ["judge_big", "judge_likelihood"]
    expected = [0.8] * 28 + [0.0, 0.1, math.nan, 0.0, 0.0, math.nan]
    assert filled["judge_big"].to_pylist() == pytest.approx(expected, nan_ok=True)

    assert compared.schema.equals(PAIRWISE)
    by = {(r["other"], r["intent_id"]): r for r in compared.to_pylist()}
    assert set(by) == {("teacher", i) for i in range(5)} | {("echo", 0)}
    assert (by["teacher", 0]["first"], by["teacher", 0]["second"]) == pytest.approx((0.6, 0.4))
    assert (by["teacher", 4]["first"], by["teacher", 4]["second"], by["teacher", 4]["parsed"]) == (0, 0, True)
    assert by["echo", 0]["first"] == pytest.approx(0.95)

    assert list(facts) == ["big", "pairwise", "likelihood"]
    big = facts["big"]
    assert (big["kind"], big["model"], big["unit"], big["of_teacher"]) == ("rubric", "/nowhere", "score, 0 to 1", False)
    assert big["auc"] == {"shuffled": 1, "echo": 1, "stuffed": 1, "truncated": 1}
    assert (big["pairs"], big["believable"], big["ratio"], big["parse_failures"]) == (24, True, True, 0)
    assert (facts["likelihood"]["ratio"], facts["likelihood"]["unrelated"]) == (True, 0)
    assert facts["likelihood"]["parse_failures"] is None
    assert facts["pairwise"]["position_bias"] == pytest.approx(0.2), "of what was asked, not of what was settled"
    assert (facts["pairwise"]["auc"]["shuffled"], facts["pairwise"]["ratio"]) == (1, False)
    assert set(facts["pairwise"]["tasks"][TASK.name]) == set(KINDS)


@pytest.mark.parametrize("zero", [-0.5, 0.25])
def test_a_rejected_output_gets_what_a_judge_gives_to_prompts_for_other_intents(tmp_path: Path, zero: float) -> None:
    table = outputs(
        *(output("teacher", i) for i in range(24)),
        output("student", 0, "", reason="echo"),
        output("student", 0, "", reason="echo", probe="reward"),
        output("student", 0, "", reason="echo", probe="reach"),
    )

    def shifted(row: dict[str, Any]) -> tuple[float, float]:
        return zero + (row["intent"] in row["prompt"]), 1.0

    filled, _, facts = asked_and_answered(recipe(tmp_path, NOWHERE), table, str(tmp_path / "work"), shifted)
    assert facts["likelihood"]["unrelated"] == pytest.approx(zero)
    assert filled["judge_likelihood"].to_pylist()[-3:] == pytest.approx([zero, zero, math.nan], nan_ok=True)


def test_unread_answers_of_a_comparing_judge_count_neither_for_it_nor_as_its_bias(tmp_path: Path) -> None:
    config = recipe(tmp_path, Judge(kind="pairwise", model="/nowhere"))
    table = outputs(*(output(policy, i) for i in range(24) for policy in ("student", "teacher")))

    def mumbles(row: dict[str, Any]) -> tuple[float, float]:
        """Half of the comparisons of policies are not read; all controls but the shuffled ones are not."""
        policies = "student" in row["prompt"] + row["other_prompt"]
        read = (
            int(row["intent"].split()[-1]) % 2 if policies else "teacher" in row["prompt"] and "teacher" in row["other_prompt"]
        )
        return (0.7, 0.9) if read else (1.0, 0.2)

    _, compared, facts = asked_and_answered(config, table, str(tmp_path / "work"), mumbles)
    told = facts["pairwise"]
    assert sum(compared["parsed"].to_pylist()) == 12
    assert told["position_bias"] == pytest.approx(0.4)  # 0.7 first, 0.3 second
    assert told["auc"]["shuffled"] == 0.5
    assert math.isnan(told["auc"]["echo"])


def test_without_a_teacher_judges_are_validated_on_the_student_and_nobody_is_no_error(tmp_path: Path) -> None:
    config = recipe(tmp_path, NOWHERE, Judge(kind="pairwise", model="/nowhere"))
    alone = outputs(*(output("student", i) for i in range(3)))
    _, compared, facts = asked_and_answered(config, alone, str(tmp_path / "work"), knows)
    assert compared.num_rows == 0
    assert facts["likelihood"]["pairs"] == facts["pairwise"]["pairs"] == 3
    assert math.isnan(facts["pairwise"]["position_bias"])
    rejected = outputs(output("student", 0, "", reason="empty", **dict.fromkeys(COMPONENTS)))
    filled, _, facts = ask(config, [TASK], rejected, str(tmp_path / "none"))
    assert filled["judge_likelihood"].to_pylist() == [0]  # no control tells what another intent's prompt would have
    assert (facts["likelihood"]["pairs"], facts["likelihood"]["believable"]) == (0, False)
    assert ask(recipe(tmp_path), [TASK], alone, str(tmp_path / "none"))[2] == {}
