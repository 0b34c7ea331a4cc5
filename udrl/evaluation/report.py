"""The report of an evaluation: ``report.md`` with its plots, ``metrics.json`` and ``outputs.parquet`` in one folder."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa

from udrl import storage
from udrl.commands import ANY, Vocabulary
from udrl.evaluation import examples, plots
from udrl.evaluation.markdown import absent, code, count, escape, number, percent, span, table, yes
from udrl.evaluation.metrics import RATIO_TARGET, STUDENT, TEACHER

WIDTH = 110  # of the short table, in columns
BELIEVABLE = 0.8  # AUC of a judge on true against shuffled pairs, our own bound


class PolicyFacts(TypedDict, total=False):
    """What a policy is and costs. ``tokens_per_second`` counts output tokens over ``seconds`` of generation."""

    model: str
    parameters: int
    tokens_per_second: float
    seconds: float


class Context(TypedDict, total=False):
    """What the report tells beside the numbers; every part may be absent.

    ``judge``: ``name`` and ``model``, with what ``judges.validate`` returned. ``losses``: (step, nats a token).
    """

    recipe: str
    environment: dict[str, Any]
    policies: dict[str, PolicyFacts]
    losses: list[tuple[float, float]]
    commands: Vocabulary
    judge: dict[str, Any]


def write(folder_uri: str, outputs: pa.Table, metrics: dict[str, Any], context: Context) -> dict[str, Any]:
    """Write all files of the report under ``folder_uri``; ``report.md`` comes last, so where it is, all is.

    Returns:
        What ``metrics.json`` holds (NaN as None): the metrics, ``policies`` and ``judge`` from the context, and ``files``
        (name -> URI). :func:`short_table` takes it.
    """
    drawn = plots.draw(metrics, context.get("losses", ()))
    names = ["outputs.parquet", "metrics.json", *drawn, "report.md"]
    document = _plain({**metrics, "policies": context.get("policies", {}), "judge": context.get("judge")})
    storage.write_table(storage.join(folder_uri, "outputs.parquet"), outputs)
    for name, png in drawn.items():
        storage.write_bytes(storage.join(folder_uri, name), png)
    storage.write_json(storage.join(folder_uri, "metrics.json"), document)
    storage.write_bytes(storage.join(folder_uri, "report.md"), markdown(outputs, document, context, list(drawn)).encode())
    return {**document, "files": {name: storage.join(folder_uri, name) for name in names}}


def short_table(metrics: dict[str, Any]) -> str:
    """The evaluation in plain text of at most :data:`WIDTH` columns: one line a task, one a policy, one a target."""
    heads = [
        "task",
        "teacher",
        "student (95%)",
        "ratio",
        ">=90%",
        "within 2",
        "len up",
        "rew up",
        "rejected",
        "judge s-t",
    ]
    lines = [heads]
    for name, task in _rows_of(metrics):
        student = _policy(task, STUDENT)
        lines.append(
            [
                name if len(name) <= 16 else name[:15] + "~",
                number(_policy(task, TEACHER).get("relevance", {}).get("value")),
                span(student.get("relevance")),
                percent(task["ratio"]["value"]),
                _at_least_90(task),
                percent(task["length"]["within_2"]),
                yes(task["length"].get("rises")) if "levels" in task["length"] else "",
                yes(task["reward"]["rises"]) if "reward" in task else "",
                percent(student.get("rejected")),
                number(task["judge_difference"]["value"], "+.2f"),
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    text.insert(1, "-" * len(text[0]))
    mark = {True: "met", False: "MISSED", None: "-"}
    after = [f"{name + ':':<10} {_facts(facts)}" for name, facts in metrics.get("policies", {}).items()]
    after += [f"{mark[t['met']]:<10} {t['target']}: {t['measured']}" for t in metrics["targets"]]
    return "\n".join([*text, *(piece for line in after for piece in textwrap.wrap(line, WIDTH, subsequent_indent=" " * 11))])


def markdown(outputs: pa.Table, metrics: dict[str, Any], context: Context, drawn: Sequence[str]) -> str:
    """The whole report; ``drawn`` names the plots that lie beside it."""
    parts = [
        "# Evaluation: the student against its teacher",
        f"{metrics['intents']:,} held-out intents, {metrics['rows']:,} outputs. Brackets hold 95% intervals from "
        f"{metrics['bootstrap']:,} bootstrap resamples of intents.",
        _headline(metrics),
        _policies(metrics),
        "## What the targets say\n\n" + table(["target", "measured", ""], [_target(t) for t in metrics["targets"]]),
        *([] if not drawn else ["## Plots"]),
        *(f"![{name.removesuffix('.png').replace('_', ' ')}]({name})\n\n*{plots.CAPTIONS[name]}*" for name in drawn),
        "## Control",
        *_control(metrics),
        _diversity(metrics),
        "## Examples",
        examples.side_by_side(outputs),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(metrics)),
    ]
    if vocabulary := context.get("commands"):
        parts.append("## The student's commands\n\n" + _commands(vocabulary))
    if recipe := context.get("recipe"):
        parts.append(f"## Recipe\n\n```yaml\n{recipe.strip()}\n```")
    if environment := context.get("environment"):
        parts.append("## Environment\n\n" + table(["", ""], [[str(k), escape(v)] for k, v in environment.items()]))
    return "\n\n".join(parts) + "\n"


def _rows_of(metrics: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The tasks, and the line over all of them where there are several."""
    tasks = list(metrics["tasks"].items())
    return tasks if len(tasks) == 1 else [*tasks, ("all tasks", metrics["overall"])]


def _headline(metrics: dict[str, Any]) -> str:
    heads = [
        "task",
        "teacher relevance",
        "student relevance",
        "student / teacher",
        "accepted alone",
        ">= 90%",
        "judge: student - teacher",
    ]
    heads += ["within 2 words", "length rises", "reward rises", "distinct-2 student / teacher", "rejected student / teacher"]
    lines = []
    for name, task in _rows_of(metrics):
        student, teacher = _policy(task, STUDENT), _policy(task, TEACHER)
        varied = task["diversity"]["policies"]
        lines.append(
            [
                code(name) if name in metrics["tasks"] else f"**{name}**",
                span(teacher.get("relevance")),
                span(student.get("relevance")),
                span(task["ratio"], percent),
                percent(task["ratio_accepted"]["value"]),
                _at_least_90(task),
                span(task["judge_difference"], lambda value: number(value, "+.2f")),
                percent(task["length"]["within_2"]),
                yes(task["length"].get("rises")) if "levels" in task["length"] else "",
                yes(task["reward"]["rises"]) if "reward" in task else "",
                " / ".join(number(varied.get(policy, {}).get("distinct_2")) for policy in (STUDENT, TEACHER)),
                " / ".join(percent(policy.get("rejected")) for policy in (student, teacher)),
            ]
        )
    return table(heads, lines)


def _policies(metrics: dict[str, Any]) -> str:
    found = metrics["overall"]["policies"]
    names = sorted(found.keys() | metrics["policies"].keys())
    heads = ["policy", "model", "parameters", "tokens/s", "seconds", "prompts", "rejected", "words", "judge"]
    lines = []
    for name in names:
        facts, measured = metrics["policies"].get(name, {}), found.get(name, {})
        lines.append(
            [
                name,
                escape(facts.get("model", "-")),
                count(facts.get("parameters")),
                number(facts.get("tokens_per_second"), ",.0f"),
                number(facts.get("seconds"), ",.0f"),
                number(measured.get("n"), ",.0f"),
                percent(measured.get("rejected")),
                number(measured.get("words"), ".1f"),
                span(measured.get("judge")),
            ]
        )
    return table(heads, lines)


def _target(target: dict[str, Any]) -> list[str]:
    return [
        target["target"],
        escape(target["measured"]),
        {True: "met", False: "**missed**", None: "not measured"}[target["met"]],
    ]


def _control(metrics: dict[str, Any]) -> list[str]:
    if not any(t[probe]["levels"] for t in metrics["tasks"].values() for probe in ("length", "reward")):
        return ["Not swept: no output was asked for a length or a reward. A student of plain fine-tuning takes no commands."]
    parts = []
    for name, task in metrics["tasks"].items():
        length, reward = task["length"], task["reward"]
        parts.append(f"### {code(name)}")
        lines = [
            [str(row["words"]), str(row["n"]), number(row["mean"], ".1f"), number(row["mae"]), *_shares(row)]
            for row in length["levels"]
        ]
        lines.append(["all", str(length["n"]), number(length["mean"], ".1f"), number(length["mae"]), *_shares(length)])
        parts.append(table(["words commanded", "n", "mean achieved", "mean error", "exact", "within 1", "within 2"], lines))
        bins = [
            [str(row["bin"]), str(row["n"]), percent(row["rejected"]), span(row["relevance"]), span(row["reward"])]
            for row in reward["levels"]
        ]
        parts.append(table(["reward bin commanded", "n", "rejected", "achieved relevance", "achieved reward"], bins))
        parts.append(
            f"Spearman, commanded to achieved: words {number(length['spearman'])}, relevance {number(reward['spearman'])}. "
            f"Top bin minus bottom bin: {span(reward['difference'])} relevance; every step up: {yes(reward['monotone'])}."
        )
    return parts


def _shares(row: dict[str, Any]) -> list[str]:
    return [percent(row["exact"]), percent(row["within_1"]), percent(row["within_2"])]


def _diversity(metrics: dict[str, Any]) -> str:
    lines = [
        [code(task), policy, str(found["diversity"]["n"]), str(found["diversity"]["words"])]
        + [number(values[figure]) for figure in ("distinct_2", "compression", "within_intent")]
        for task, found in metrics["tasks"].items()
        for policy, values in found["diversity"]["policies"].items()
    ]
    heads = ["task", "policy", "prompts", "words each", "distinct-2 (higher varies more)", "compression (lower varies more)"]
    text = "## Diversity at equal length\n\nAccepted prompts, cut to the same number of words, the same number of each policy."
    return f"{text}\n\n{table([*heads, 'distance within an intent'], lines)}"


def _limits(metrics: dict[str, Any]) -> list[str]:
    lines = [
        "Relevance is the cosine of MiniLM embeddings, the scorer that made the training reward: the student was trained "
        "towards it, and the teacher was not. Read it together with the judge.",
        "A rejected or empty output counts as relevance 0 and judge 0 for every policy, so that refusing never pays.",
        "The reward curve describes accepted prompts, with the rejected share beside it; it counts as rising only if it "
        "also rises with rejected ones as 0.",
        "Length tables count every output with the words it has; the words of a rejected one are those of its text, if any.",
        "Intervals cover the choice of intents, not another training run or another seed of the sampler.",
    ]
    judge = metrics.get("judge")
    if not judge or metrics["overall"]["judge_difference"]["value"] is None:
        lines.append("No independent judge was asked: nothing here is free of the training's own scorer.")
    if judge:
        value = judge.get("auc")
        verdict = "-" if value is None else "it can be believed" if value >= BELIEVABLE else "do not lean on it"
        lines.append(
            f"The independent judge is `{judge.get('name', 'likelihood')}` (mutual information of prompt and intent, nats per "
            f"intent token) under {escape(judge.get('model', '-'))}. Its AUC for true against shuffled pairs is "
            f"{number(value)} over {judge.get('pairs', '-')} pairs (0.5 is chance): {verdict}. Per task: "
            + (", ".join(f"{code(t)} {number(v)}" for t, v in judge.get("tasks", {}).items()) or "-")
            + ". It sees whether the subject is kept, not whether the prompt is good."
        )
        if judge.get("model") and judge.get("model") == metrics["policies"].get(TEACHER, {}).get("model"):
            lines.append("The judge's model is the teacher's own: a leaning towards the teacher's wording is to be expected.")
    return lines


def _or_any(value: int) -> str:
    return "any" if value == ANY else str(value)


def _commands(vocabulary: Vocabulary) -> str:
    lines = [
        [
            code(name),
            _or_any(task.default_words),
            _or_any(task.default_reward),
            " / ".join(map(str, task.words)),
            " ".join(f"{x:.2f}" for x in task.achieved_relevance),
        ]
        for name, task in vocabulary.tasks.items()
    ]
    text = (
        f"{vocabulary.reward_bins} reward bins, ranked within the {vocabulary.rank_within}; up to {vocabulary.max_words} words."
    )
    heads = ["task", "default words", "default bin", "words in training: p5 / median / p95", "training relevance by bin"]
    return f"{text}\n\n{table(heads, lines)}"


def _policy(found: dict[str, Any], name: str) -> dict[str, Any]:
    policy: dict[str, Any] = found["policies"].get(name, {})
    return policy


def _at_least_90(task: dict[str, Any]) -> str:
    value = task["ratio"]["value"]
    return "-" if absent(value) else yes(value >= RATIO_TARGET)


def _facts(facts: PolicyFacts) -> str:
    speed = number(facts.get("tokens_per_second"), ",.0f")
    return f"{count(facts.get('parameters'))} parameters, {speed} tokens/s, {facts.get('model', '-')}"


def _plain(value: Any) -> Any:
    """For strict JSON: NaN becomes None, numpy numbers become Python's."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
