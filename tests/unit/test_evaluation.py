"""Metrics, control tables, the likelihood judge and the report, on values worked out by hand."""

import json
import math
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from udrl.episodes import stable_id
from udrl.evaluation import control, intervals, judges, metrics, plots, report

WORDS = [
    *("soft", "vivid", "poster", "cheerful", "dinosaur", "party", "balloons", "retro"),
    *("golden", "watercolor", "minimal", "logo", "floral", "vintage", "rocket", "leaves"),
]


def row(task="image", intent=0, policy="student", probe="default", **values):
    """One row of the outputs; what is not given is an accepted prompt of four words."""
    return {
        "episode_id": stable_id(task, intent, policy, probe, str(values)),
        "intent_id": stable_id(intent),
        "intent": f"card number {intent} | *for* a <friend>",
        "task": task,
        "policy": policy,
        "model": "m",
        "model_revision": "",
        "round": 0,
        "variation": 0,
        "command_words": -1,
        "command_reward": -1,
        "request_fingerprint": "f",
        "input_tokens": 9,
        "output_tokens": 9,
        "finish_reason": "stop",
        "probe": probe,
        "prompt": "a soft golden balloon",
        "reason": "",
        "n_words": 4,
        **dict.fromkeys(("relevance", "novelty", "repetition", "format", "length", "reward"), 0.5),
        "judge": float("nan"),
        **values,
    }


def outputs(*rows):
    return pa.Table.from_pylist(list(rows), schema=metrics.OUTPUTS)


def realistic(tasks=("image", "search"), intents=12, policies=("teacher", "student"), judge=True, seed=0):
    """A student that obeys with noise, and a teacher a little better."""
    rng = np.random.default_rng(seed)
    rows = []

    def add(task, i, policy, probe, words, relevance, **values):
        prompt = " ".join(rng.choice(WORDS, words))
        score = 2 * relevance if judge and probe == "default" else float("nan")
        values |= {"prompt": prompt, "n_words": words, "relevance": relevance, "reward": relevance, "judge": score}
        if rng.random() < 0.05:
            values |= {"prompt": "", "reason": "empty", "n_words": 0, "relevance": None, "reward": None, "judge": float("nan")}
        rows.append(row(task, i, policy, probe, **values))

    for task in tasks:
        for i in range(intents):
            for policy in policies:
                for variation in range(2):
                    base = 0.5 if policy == "teacher" else 0.48
                    add(task, i, policy, "default", int(rng.integers(8, 20)), base + rng.normal(0, 0.05), variation=variation)
            if "student" in policies:
                for words in (6, 12, 18):
                    add(task, i, "student", "length", words + int(rng.integers(-1, 2)), 0.5, command_words=words)
                for level in range(3):
                    add(task, i, "student", "reward", 12, 0.3 + 0.1 * level + rng.normal(0, 0.02), command_reward=level)
    return outputs(*rows)


# --- intervals ---

numbers = st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 8)), min_size=1, max_size=40)


@settings(deadline=None, max_examples=40)
@given(numbers)
def test_an_interval_contains_its_mean(pairs):
    values, clusters = map(np.array, zip(*pairs, strict=True))
    found = intervals.mean(values, clusters, resamples=100)
    assert found.value == pytest.approx(values.mean(), abs=1e-9)
    assert found.low <= found.value <= found.high
    assert values.min() - 1e-9 <= found.low
    assert found.high <= values.max() + 1e-9


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(0.01, 1), st.integers(0, 8)), min_size=1, max_size=40))
def test_the_ratio_of_a_policy_to_itself_is_one_without_doubt(pairs):
    values, clusters = map(np.array, zip(*pairs, strict=True))
    assert intervals.ratio(values, clusters, values, clusters, resamples=100) == pytest.approx((1, 1, 1))
    assert intervals.difference(values, clusters, values, clusters, resamples=100) == pytest.approx((0, 0, 0), abs=1e-12)


def test_the_unit_of_resampling_is_the_intent_not_the_row():
    rng = np.random.default_rng(0)
    per_intent = rng.normal(size=50)
    values, clusters = np.repeat(per_intent, 40), np.repeat(np.arange(50), 40)
    found = intervals.mean(values, clusters, resamples=2000)
    half = (found.high - found.low) / 2
    assert half == pytest.approx(1.96 * per_intent.std() / math.sqrt(50), rel=0.1)  # 40 copies of a row tell nothing new


def test_intervals_cover_the_true_mean_about_95_times_in_100():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        values = rng.normal(0.4, 0.2, size=(60, 1)) + rng.normal(0, 0.1, size=(60, 2))
        found = intervals.mean(values.ravel(), np.repeat(np.arange(60), 2), resamples=300)
        covered += found.low <= 0.4 <= found.high
    assert 180 <= covered <= 198


def test_pairing_by_intent_takes_the_difficulty_of_intents_out():
    rng = np.random.default_rng(2)
    difficulty, intents = rng.normal(0, 5, 100), np.arange(100)
    teacher, student = difficulty + 1, difficulty + 1.5 + rng.normal(0, 0.1, 100)
    paired = intervals.difference(student, intents, teacher, intents)
    apart = intervals.difference(student, intents, teacher, intents + 1000)
    assert paired.low > 0.4
    assert apart.low < 0 < apart.high


def test_intervals_are_the_same_for_the_same_seed_and_nan_rows_are_left_out():
    values, clusters = np.array([1.0, np.nan, 3.0, 5.0]), np.array([1, 1, 2, 3])
    assert intervals.mean(values, clusters, seed=3) == intervals.mean(values, clusters, seed=3)
    assert intervals.mean(values, clusters).value == 3
    assert all(math.isnan(x) for x in intervals.mean(np.array([]), np.array([])))
    assert all(math.isnan(x) for x in intervals.ratio(values, clusters, np.zeros(4), clusters))


# --- the headline ---


def test_a_rejected_output_counts_as_zero_for_both_policies():
    table = outputs(
        row(intent=0, policy="teacher", relevance=0.8, judge=2.0),
        row(intent=1, policy="teacher", relevance=None, prompt="", reason="echo", n_words=0),
        row(intent=0, policy="student", relevance=0.6, judge=1.0),
        row(intent=1, policy="student", relevance=0.9, prompt="", reason="truncated", n_words=7),
        row(intent=2, policy="student", relevance=0.3, judge=2.0),
    )
    found = metrics.compute(table, bootstrap=100)["tasks"]["image"]
    assert found["policies"]["teacher"]["relevance"]["value"] == pytest.approx(0.4)
    assert found["policies"]["student"]["relevance"]["value"] == pytest.approx(0.3)
    assert found["policies"]["student"]["judge"]["value"] == pytest.approx(1.0)
    assert found["policies"]["student"]["rejected"] == pytest.approx(1 / 3)
    assert found["ratio"]["value"] == pytest.approx(0.75)
    assert found["judge_difference"]["value"] == pytest.approx(0.0)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.floats(0, 0.5, width=32), min_size=1, max_size=10),
    st.lists(st.floats(0.625, 1, width=32), min_size=1, max_size=10),
)
def test_mixing_in_better_outputs_raises_the_mean_and_the_judge(worse, better):
    def means(scores):
        rows = [row(intent=i, relevance=s, judge=s) for i, s in enumerate(scores)]
        found = metrics.compute(outputs(*rows), bootstrap=100)["overall"]["policies"]["student"]
        return found["relevance"]["value"], found["judge"]["value"]

    for before, after in zip(means(worse), means(worse + better), strict=True):
        assert after > before


def test_targets_say_met_missed_and_not_measured():
    good = metrics.compute(realistic(), bootstrap=100)
    assert [t["met"] for t in good["targets"]] == [True] * 6
    teacher_only = metrics.compute(realistic(policies=("teacher",)), bootstrap=100)
    assert [t["met"] for t in teacher_only["targets"]] == [None] * 6
    rows = realistic().to_pylist()
    for r in rows:
        if r["policy"] == "student" and r["task"] == "search":
            r["relevance"] = 0.1 - 0.01 * r["command_reward"]
            r["n_words"] = 40
    bad = metrics.compute(outputs(*rows), bootstrap=100)["targets"]
    assert [t["met"] for t in bad] == [False] * 6
    assert bad[2]["measured"] == "1 of 2 tasks; missed by search"


# --- diversity ---


def test_distinct_and_compression_against_hand_counts():
    assert metrics.distinct([["a", "b", "a", "b"]], 2) == pytest.approx(2 / 3)  # ab ba ab
    assert metrics.distinct([["a", "b"], ["c", "d"]], 2) == 1
    assert math.isnan(metrics.distinct([["a"]], 2))
    raw = b"soft light\nsoft light"
    assert metrics.compression_ratio(["soft light", "soft light"]) == len(raw) / len(zlib.compress(raw, 9))
    owners = np.array([1, 1, 2])
    assert metrics.within_intent([["a", "b"], ["b", "c"], ["x"]], owners) == pytest.approx(2 / 3)


texts = st.lists(st.lists(st.sampled_from(WORDS), min_size=4, max_size=4), min_size=2, max_size=12)


@settings(deadline=None, max_examples=40)
@given(texts)
def test_no_texts_vary_less_than_copies(words):
    copies = [words[0]] * len(words)
    assert metrics.distinct(copies, 2) <= metrics.distinct(words, 2)
    assert metrics.within_intent(copies, np.zeros(len(copies))) == 0
    assert metrics.within_intent(words, np.zeros(len(words))) >= 0


def test_diversity_compares_equal_lengths_and_equal_numbers():
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):  # both draw from one distribution, but the teacher writes three times as much, twice as often
        for policy, words, samples in (("teacher", 30, 2), ("student", 10, 1)):
            for v in range(samples):
                prompt = " ".join(rng.choice(WORDS, words))
                rows.append(row(intent=i, policy=policy, variation=v, prompt=prompt, n_words=words))
    found = metrics.diversity(metrics.columns(outputs(*rows)))
    assert (found["words"], found["n"]) == (10, 40)
    student, teacher = found["policies"]["student"], found["policies"]["teacher"]
    assert student["distinct_2"] == pytest.approx(teacher["distinct_2"], rel=0.15)
    assert student["compression"] == pytest.approx(teacher["compression"], rel=0.1)
    assert math.isnan(student["within_intent"])


# --- control ---


def test_length_table_against_hand_counts():
    achieved = {6: [6, 7, 9], 12: [12, 12, 10]}
    rows = [row(probe="length", command_words=c, n_words=n) for c, all_n in achieved.items() for n in all_n]
    rows.append(row(probe="length", command_words=12, n_words=0, prompt="", reason="empty"))  # a refusal is a miss
    found = control.length_table(metrics.columns(outputs(*rows)))
    six, twelve = found["levels"]
    assert (six["words"], six["n"], six["mean"], six["mae"]) == (6, 3, pytest.approx(22 / 3), pytest.approx(4 / 3))
    assert [six[s] for s in ("exact", "within_1", "within_2")] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert [twelve[s] for s in ("exact", "within_1", "within_2")] == pytest.approx([2 / 4, 2 / 4, 3 / 4])
    assert found["within_2"] == pytest.approx(5 / 7)
    assert found["rises"] is True


def test_reward_table_says_whether_the_curve_rises_and_whether_at_every_step():
    def found(*means, **extra):
        rows = [row(intent=i, probe="reward", command_reward=b, relevance=m) for b, m in enumerate(means) for i in range(3)]
        rows += [row(intent=9, probe="reward", command_reward=-1, relevance=1.0)]  # "any" is no bin
        return control.reward_table(metrics.columns(outputs(*rows, *extra.get("rows", []))), resamples=100)

    up, bent, down = found(0.1, 0.2, 0.3), found(0.1, 0.4, 0.3), found(0.3, 0.2)
    assert [(t["rises"], t["monotone"]) for t in (up, bent, down)] == [(True, True), (True, False), (False, False)]
    assert up["spearman"] == pytest.approx(1)
    assert up["difference"]["value"] == pytest.approx(0.2)
    assert [level["relevance"]["value"] for level in bent["levels"]] == pytest.approx([0.1, 0.4, 0.3])
    assert (found(0.3)["rises"], found(0.3)["monotone"]) == (None, None)


def test_a_top_bin_that_refuses_does_not_rise():
    rows = [row(intent=i, probe="reward", command_reward=0, relevance=0.4) for i in range(4)]
    rows += [row(intent=i, probe="reward", command_reward=1, prompt="", reason="echo") for i in range(3)]
    rows += [row(intent=3, probe="reward", command_reward=1, relevance=0.9)]
    found = control.reward_table(metrics.columns(outputs(*rows)), resamples=100)
    assert found["levels"][1]["relevance"]["value"] == pytest.approx(0.9)
    assert found["levels"][1]["rejected"] == 0.75
    assert found["rises"] is False


# --- the likelihood judge ---


def _tiny_model(folder, kind):
    """A random causal LM with a byte-level BPE tokenizer, saved as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([" ".join(WORDS), judges.WITH_PROMPT], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>")
    torch.manual_seed(0)
    if kind == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.3, **sizes)
        model = LlamaForCausalLM(config)
    else:
        config = GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
        model = GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def judge(request, tmp_path_factory):
    folder = _tiny_model(tmp_path_factory.mktemp(request.param), request.param)
    return judges.LikelihoodJudge(folder, batch_size=4, dtype="float32", threads=1)


def _by_hand(judge, prompt, intent):
    """PMI from one plain forward pass each, token by token."""
    import torch

    means = []
    for context in (judges.WITH_PROMPT.format(prompt=prompt), judges.WITHOUT_PROMPT):
        head = [judge.tokenizer.bos_token_id, *judge.tokenizer(context, split_special_tokens=True)["input_ids"]]
        tail = judge.tokenizer(" " + intent, split_special_tokens=True)["input_ids"]
        with torch.no_grad():
            logits = judge.model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        means.append(np.mean([logits[len(head) + k - 1, token].item() for k, token in enumerate(tail)]))
    return means[0] - means[1]


def test_batched_padded_scores_equal_the_mutual_information_by_hand(judge):
    prompts = ["a soft {golden} balloon", "poster", " ".join(WORDS), "typed <s> by a user", "retro logo, minimal"]
    intents = ["dinosaur party", "a long vintage request for a rocket", "logo", "party", "dinosaur party"]
    expected = [_by_hand(judge, p, i) for p, i in zip(prompts, intents, strict=True)]
    assert np.std(expected) > 0.01
    assert judge.score(prompts, intents) == pytest.approx(expected, abs=1e-4)


def test_the_judge_as_an_actor_adds_a_column_and_leaves_empty_prompts_unknown(judge):
    batch = {"prompt": np.array(["soft balloon", "", "logo"], dtype=object), "intent": np.array(["party"] * 3, dtype=object)}
    found = judge({**batch, "episode_id": np.arange(3)})
    assert found["judge"].dtype == np.float32
    assert np.isnan(found["judge"]).tolist() == [False, True, False]
    assert found["episode_id"].tolist() == [0, 1, 2]


def test_a_prompt_longer_than_the_model_is_cut_not_refused(judge):
    assert np.isfinite(judge.score([" ".join(WORDS * 30)], ["dinosaur party"])).all()


def test_auc_against_hand_counts():
    assert judges.auc(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1
    assert judges.auc(np.array([1.0, 2.0]), np.array([1.0, 2.0])) == 0.5
    assert judges.auc(np.array([2.0, 0.0]), np.array([1.0])) == 0.5
    assert math.isnan(judges.auc(np.array([]), np.array([1.0])))


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from(["t", "u"])), max_size=20), st.integers(0, 5))
def test_a_shuffled_pair_is_never_a_true_one(pairs, seed):
    intents, tasks = [p[0] for p in pairs], [p[1] for p in pairs]
    wrong = judges.shuffled(intents, tasks, seed)
    for here, there, task in zip(intents, wrong, tasks, strict=True):
        others = {i for i, t in pairs if t == task} - {here}
        assert there in others if others else there == ""


def test_validation_tells_a_judge_that_sees_from_one_that_guesses():
    intents = [f"intent {i}" for i in range(40)] * 2
    prompts, tasks = [f"about {i}" for i in intents], ["t"] * 40 + ["u"] * 40

    def sees(prompts, intents):
        return np.array([float(p == f"about {i}") for p, i in zip(prompts, intents, strict=True)])

    def guesses(prompts, intents):
        return np.random.default_rng(len(set(zip(prompts, intents, strict=True)))).random(len(prompts))

    good = judges.validate(sees, prompts, intents, tasks, limit=30)
    assert (good["auc"], good["pairs"], good["tasks"]) == (1, 60, {"t": 1, "u": 1})
    assert judges.validate(sees, prompts, intents, tasks, sees(prompts, intents))["auc"] == 1
    noise = np.random.default_rng(7).random(80)
    assert 0.3 < judges.validate(guesses, prompts, intents, tasks, noise)["auc"] < 0.7


# --- plots and report ---


def _ink(png):
    """Distinct grey levels of a PNG: an empty canvas has one."""
    import io

    from matplotlib.image import imread

    return len(np.unique(imread(io.BytesIO(png))[..., :3].mean(axis=-1).round(3)))


def test_the_report_writes_all_its_files_and_they_hold_something(tmp_path):
    table = realistic()
    found = metrics.compute(table, bootstrap=100)
    context: report.Context = {
        "recipe": "name: test\n",
        "environment": {"machine": "two | cores"},
        "policies": {"teacher": {"parameters": 135_000_000, "tokens_per_second": 640.0, "seconds": 9.0, "model": "big"}},
        "losses": [(i, 5 - i / 10) for i in range(40)],
        "judge": {"name": "likelihood", "model": "big", "auc": 0.9, "pairs": 50, "tasks": {"image": 0.9}},
    }
    document = report.write(str(tmp_path / "evaluation"), table, found, context)
    for name in ("report.md", "metrics.json", "outputs.parquet", *plots.CAPTIONS):
        assert document["files"][name] == str(tmp_path / "evaluation" / name)
    for name in plots.CAPTIONS:
        assert _ink((tmp_path / "evaluation" / name).read_bytes()) > 50
    stored_outputs = pq.read_table(tmp_path / "evaluation" / "outputs.parquet")
    assert stored_outputs.schema == metrics.OUTPUTS
    assert stored_outputs.drop_columns(["judge"]).equals(table.drop_columns(["judge"]))  # NaN equals nothing
    text = (tmp_path / "evaluation" / "report.md").read_text()
    assert text.index("| task |") < text.index("| target |") < text.index("![")
    for part in ("AUC", "name: test", "two \\| cores", "135.0M", "teacher's own", "card number", "\\*for\\* a \\<friend\\>"):
        assert part in text
    stored = json.loads((tmp_path / "evaluation" / "metrics.json").read_text(), parse_constant=pytest.fail)  # no bare NaN
    assert stored["tasks"]["image"]["ratio"]["value"] == pytest.approx(found["tasks"]["image"]["ratio"]["value"])


def test_every_table_row_has_as_many_cells_as_its_head(tmp_path):
    table = realistic(tasks=("a|b", "with space", "$x_y$"))
    found = report.write(str(tmp_path), table, metrics.compute(table, bootstrap=100), {})
    assert set(found["tasks"]) == {"a|b", "with space", "$x_y$"}
    width = 0
    for line in (tmp_path / "report.md").read_text().splitlines():
        cells = line.replace("\\|", "").count("|")
        assert not cells or not width or cells == width
        width = cells


@pytest.mark.parametrize(
    "table",
    [
        metrics.OUTPUTS.empty_table(),
        realistic(policies=("teacher",)),
        realistic(policies=("student",), judge=False),
        outputs(row(prompt="", reason="engine_error", n_words=0, relevance=None, reward=None)),
        outputs(row(policy="teacher"), row(probe="length", command_words=6), row(probe="reward", command_reward=2)),
    ],
    ids=["nothing", "teacher only", "student only", "one rejected row", "one row a probe"],
)
def test_missing_policies_and_probes_leave_dashes(table, tmp_path):
    document = report.write(str(tmp_path), table, metrics.compute(table, bootstrap=100), {})
    text = (tmp_path / "report.md").read_text()
    assert "nan" not in text
    assert "None" not in text
    assert "| - |" in text
    assert "-" in report.short_table(document)


def test_the_short_table_fits_a_terminal_and_names_what_missed():
    names = ("text_to_template", "a task with a very long name indeed", "x")
    found = metrics.compute(realistic(tasks=names), bootstrap=100)
    found["policies"] = {"student": {"parameters": 8_900_000, "tokens_per_second": 4100.4, "model": "runs/" + "long/" * 30}}
    found["targets"][2] = {"target": "80% of prompts land within two words", "met": False, "measured": "71.0%"}
    text = report.short_table(found)
    assert max(map(len, text.splitlines())) <= report.WIDTH
    assert "MISSED     80% of prompts land within two words: 71.0%" in text
    assert "8.9M parameters, 4,100 tokens/s" in text
