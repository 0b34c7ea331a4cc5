"""The report's tables, as Markdown. Nothing is computed here; every text of a run is escaped."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pyarrow as pa

from udrl.commands import ANY
from udrl.evaluate.document import (
    Area,
    ControlKind,
    DiversityFigures,
    EvaluationDocument,
    Interval,
    JudgeProfile,
    LengthControl,
    LengthErrors,
    PolicyScores,
    RewardCurve,
    TaskScope,
)
from udrl.evaluate.judges.controls import CONTROL_KINDS, HELD_OUT_KINDS
from udrl.evaluate.judges.validation import weakest
from udrl.evaluate.metrics.claim import deciding_judges
from udrl.evaluate.outputs import JUDGE, STUDENT, TEACHER, Columns, columns
from udrl.evaluate.report.formatting import (
    DASH,
    code,
    count,
    escape_markdown,
    interval,
    number,
    parameters,
    percent,
    percent_tenths,
    seconds,
    signed,
    verdict,
)
from udrl.evaluate.report.selection import (
    order_policies,
    pairwise_judges,
    pointwise_judges,
    reference_policy,
    scopes,
    writers,
)
from udrl.text import markdown_table

NOTHING = "*Nothing was measured.*"
ALL_TASKS = "**all tasks**"
DIVERSITY = {
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "vendi": "Vendi",
    "compression": "compression (lower)",
    "self_bleu": "Self-BLEU (lower)",
    "within_distance": "distance within an intent",
    "within_vendi": "Vendi within an intent",
}
LENGTH_SHARES = {"exact": "exact", "within_1": "within 1", "within_2": "within 2"}
LENGTH_HEADER = ("n", "rejected", "mean words", "mean error", "bias", *LENGTH_SHARES.values())
PAIRWISE = ("pairs", "decided by a rejection", "same winner in both orders")
Row = Sequence[str]


def table(header: Row, rows: Iterable[Row], left: int = 1) -> str:
    """Return a Markdown table of escaped cells; the first ``left`` columns are texts, the others numbers."""
    rows = list(rows)
    return markdown_table(header, rows, min(left, len(header)), escaped=True) if rows else NOTHING


def claim_table(document: EvaluationDocument) -> str:
    rows = [
        [escape_markdown(part.name), verdict(part.met), interval(part.interval, percent_tenths)]
        for part in document.claim.parts
    ]
    return table(["part of the claim", "verdict", "student / other"], rows, 2)


def task_table(document: EvaluationDocument) -> str:
    """By task: the student against the reference policy, by each deciding judge, the scorer and the main figures."""
    reference = reference_policy(document) or TEACHER
    judges = deciding_judges(document.judges)[:2]
    header = ["task", *(f"{escape_markdown(judge)}: student / {escape_markdown(reference)}" for judge in judges)]
    header += ["scorer's relevance: ratio", "subject's words kept", "nothing said twice", "within 2 words", "rejected"]
    rows = []
    for name, scope in scopes(document):
        student, other = scope.policies.get(STUDENT), scope.policies.get(reference)
        comparison = scope.comparisons.get(reference)
        ratios = [comparison.judges[judge].ratio if comparison and judge in comparison.judges else None for judge in judges]
        rows.append(
            [
                _task(name),
                *(interval(ratio, percent) for ratio in ratios),
                interval(comparison.relevance.ratio if comparison else None, percent),
                _versus(student, other, lambda scores: percent(scores.coverage.value)),
                _versus(student, other, lambda scores: percent(scores.clean.value)),
                percent(scope.length.within_2),
                _versus(student, other, lambda scores: percent(scores.rejected)),
            ]
        )
    return table(header, rows)


def _versus(student: PolicyScores | None, other: PolicyScores | None, show: Callable[[PolicyScores], str]) -> str:
    return " / ".join(show(scores) if scores else DASH for scores in (student, other))


def target_table(document: EvaluationDocument) -> str:
    rows = [
        [escape_markdown(target.name), verdict(target.met), escape_markdown(target.measured)] for target in document.targets
    ]
    return table(["target", "verdict", "measured"], rows, 3)


# ---- control


def length_table(document: EvaluationDocument) -> str:
    """Commanded against achieved words; a share among accepted outputs stands in parentheses."""
    rows = []
    for name, scope in scopes(document):
        for label, figures in (("usual", scope.length), ("outside", scope.reach)):
            if figures.n:
                rows.append([_task(name), label, *_length_cells(figures), number(figures.spearman), _steps(figures)])
    header = [
        "task",
        "lengths",
        "n",
        "rejected",
        "mean words",
        "mean error",
        "bias",
        *LENGTH_SHARES.values(),
        "Spearman",
        "rises",
    ]
    return table(header, rows, 2)


def _steps(figures: LengthControl) -> str:
    return {True: "yes", False: "no", None: "open"}[figures.rises] if figures.n else DASH


def _length_cells(errors: LengthErrors) -> list[str]:
    shares = [
        f"{percent(getattr(errors, name))} ({percent(getattr(errors.accepted, name))})"
        if errors.accepted
        else percent(getattr(errors, name))
        for name in LENGTH_SHARES
    ]
    words = [number(errors.mean, ".1f"), number(errors.mae), signed(errors.bias)]
    return [count(errors.n), percent(errors.rejected), *words, *shares]


def reward_table(document: EvaluationDocument) -> str:
    rows = []
    for name, task in document.tasks.items():
        if not task.reward.levels:
            continue
        curves: list[tuple[str, RewardCurve]] = [("relevance (scorer)", task.reward)]
        curves += [(judge, task.reward.judges[judge]) for judge in pointwise_judges(document) if judge in task.reward.judges]
        for scorer, curve in curves:
            monotone = {True: "yes", False: "no", None: "open"}[curve.monotone]
            figures = [number(curve.spearman), interval(curve.difference, signed), monotone]
            rows.append([_task(name), escape_markdown(scorer), *figures])
    return table(["task", "scored by", "Spearman", "top bin - bottom bin", "every step up"], rows, 2)


def length_levels(task: TaskScope) -> str:
    rows = [
        [str(level.words), label, *_length_cells(level), number(level.p10, ".0f"), number(level.p90, ".0f")]
        for label, control in (("usual", task.length), ("outside", task.reach))
        for level in control.levels or []
    ]
    return table(["words commanded", "lengths", *LENGTH_HEADER, "p10", "p90"], rows, 2)


def reward_levels(document: EvaluationDocument, task: TaskScope) -> str:
    judges = [judge for judge in pointwise_judges(document) if any(judge in level.judges for level in task.reward.levels)]
    rows = [
        [
            str(level.bin),
            count(level.n),
            percent(level.rejected),
            interval(level.relevance),
            *(interval(level.judges.get(judge)) for judge in judges),
            interval(level.reward),
        ]
        for level in task.reward.levels
    ]
    header = ["reward bin commanded", "n", "rejected", "relevance", *map(escape_markdown, judges), "training reward"]
    return table(header, rows)


# ---- examples


def example_tables(document: EvaluationDocument, outputs: pa.Table, judge: str | None) -> dict[str, str]:
    """Return per task the student's best, median and worst prompt and a random one, next to the other policies' prompts.

    ``judge`` ranks the student's accepted prompts; relevance does if it is None or has no scores.
    """
    rows = columns(outputs)
    scores = rows.get(f"{JUDGE}{judge}", np.full(outputs.num_rows, np.nan))
    of_student = (rows["policy"] == STUDENT) & (rows["probe"] == "default")
    ranking = scores if (~np.isnan(scores[of_student])).any() else rows["relevance"]
    others = [policy for policy in writers(document) if policy != STUDENT]
    texts = {name: outputs[name].to_pylist() for name in ("intent", "prompt", "reason")}
    tables = {}
    for task in sorted(set(rows["task"])):
        first_rows = _first_rows(rows, task)
        lines = []
        for label, row in _choose(
            sorted(first_rows.get(STUDENT, {}).values()), rows["rejected"], ranking, document.seed
        ).items():
            intent = int(rows["intent_id"][row])
            places = [row, *(first_rows.get(policy, {}).get(intent) for policy in others)]
            cells = [_example(rows, texts, scores, place) for place in places]
            lines.append([f"**{label}**", escape_markdown(texts["intent"][row] or ""), *cells])
        if lines:
            header = ["student's", "intent", STUDENT, *map(escape_markdown, others)]
            tables[task] = table(header, lines, len(header))
    return tables


def _choose(rows: Sequence[int], rejected: np.ndarray, ranking: np.ndarray, seed: int) -> dict[str, int]:
    """Return the rows to show by the reason why they are shown."""
    if not rows:
        return {}
    ranked = [row for row in rows if not rejected[row] and not np.isnan(ranking[row])]
    ranked.sort(key=lambda row: (-ranking[row], row))
    by_rank = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]} if ranked else {}
    return {**by_rank, "random": rows[int(np.random.default_rng(seed).integers(len(rows)))]}


def _first_rows(rows: Columns, task: str) -> dict[str, dict[int, int]]:
    """Return policy -> intent -> row of its lowest variation in the default probe."""
    first: dict[str, dict[int, int]] = {}
    in_task = (rows["task"] == task) & (rows["probe"] == "default")
    for row in np.lexsort((rows["variation"], rows["intent_id"])):
        if in_task[row]:
            first.setdefault(rows["policy"][row], {}).setdefault(int(rows["intent_id"][row]), int(row))
    return first


def _example(rows: Columns, texts: dict[str, list[str]], scores: np.ndarray, row: int | None) -> str:
    if row is None:
        return DASH
    if rows["rejected"][row]:
        return f"**rejected**: {escape_markdown(texts['reason'][row] or 'empty')}"
    remarks = [f"{rows['n_words'][row]} words", f"relevance {rows['relevance'][row]:.2f}"]
    if not np.isnan(scores[row]):
        remarks.append(f"judge {scores[row]:+.2f}")
    return f"{escape_markdown(texts['prompt'][row])} *({', '.join(remarks)})*"


# ---- appendix: policies


def score_table(document: EvaluationDocument) -> str:
    judges, pairwise = pointwise_judges(document), pairwise_judges(document)
    rows = []
    for name in order_policies(document.overall.policies.keys() | document.policies.keys(), document.policies):
        scores, comparison = document.overall.policies.get(name), document.overall.comparisons.get(name)
        preferred = [comparison.pairwise.get(judge) if comparison else None for judge in pairwise]
        rows.append(
            [
                _policy(name, document),
                document.policies[name].kind if name in document.policies else DASH,
                interval(scores.relevance if scores else None),
                *(interval(scores.judges.get(judge) if scores else None) for judge in judges),
                *(interval(pairs.preferred if pairs else None, percent) for pairs in preferred),
                number(scores.words if scores else None, ".1f"),
                percent(scores.rejected if scores else None),
                count(scores.n if scores else None),
                escape_markdown(_sampling(document, name)),
            ]
        )
    units = [escape_markdown(f"{name} ({judge.unit})" if judge.unit else name) for name, judge in judges.items()]
    preferences = [f"{escape_markdown(judge)}: student preferred" for judge in pairwise]
    header = ["policy", "kind", "relevance", *units, *preferences, "words", "rejected", "outputs", "decoding"]
    return table(header, rows, 2)


def _sampling(document: EvaluationDocument, name: str) -> str:
    profile = document.policies.get(name)
    sampling = profile.sampling if profile else {}
    neutral = {None, 0, 1.0}
    shown = [f"{key} {value}" for key, value in sampling.items() if key == "temperature" or value not in neutral]
    return ", ".join(shown) or DASH


def describe_decoding(document: EvaluationDocument) -> str:
    """Return how the decoding of the student differs from that of the reference policy; max_tokens follows from the task."""
    reference = reference_policy(document)
    own, other = (
        {key: value for key, value in document.policies[name].sampling.items() if value is not None and key != "max_tokens"}
        if name in document.policies
        else {}
        for name in (STUDENT, reference or "")
    )
    differences = [
        f"{key} {own.get(key, DASH)} / {other.get(key, DASH)}" for key in {**own, **other} if own.get(key) != other.get(key)
    ]
    return f"differs: {', '.join(differences)}" if differences else "is the same"


def comparison_table(document: EvaluationDocument) -> str:
    judges, pairwise = pointwise_judges(document), pairwise_judges(document)
    rows = []
    for name in order_policies(document.overall.comparisons, document.policies):
        comparison = document.overall.comparisons[name]
        relevance, judged = comparison.relevance, [comparison.judges.get(judge) for judge in judges]
        pairs = [comparison.pairwise.get(judge) for judge in pairwise]
        rows.append(
            [
                _policy(name, document),
                interval(relevance.difference, signed),
                interval(relevance.ratio, percent),
                interval(relevance.ratio_accepted, percent),
                *(interval(one.ratio if one else None, percent) for one in judged),
                *(
                    cell
                    for one in pairs
                    for cell in (
                        count(one.n if one else None),
                        count(one.settled if one else None),
                        percent(one.consistent if one else None),
                    )
                ),
            ]
        )
    header = ["student against", "relevance difference", "ratio", "ratio, accepted only"]
    header += [f"{escape_markdown(judge)}: ratio" for judge in judges]
    header += [f"{escape_markdown(judge)}: {name}" for judge in pairwise for name in PAIRWISE]
    return table(header, rows)


def wording_table(document: EvaluationDocument) -> str:
    """Subject words that each policy keeps, repetitions and copies; in parentheses figures among accepted outputs."""
    rows = []
    for name, scope in scopes(document):
        for policy in order_policies(scope.policies, document.policies):
            scores, accuracy = scope.policies[policy], scope.accuracy.get(policy)
            repetition = scores.repetition
            rows.append(
                [
                    _task(name),
                    _policy(policy, document),
                    _with_accepted(scores.coverage, scores.accepted.get("coverage")),
                    _with_accepted(scores.clean, scores.accepted.get("clean")),
                    percent(repetition.repeated_pair if repetition else None),
                    percent(repetition.doubled_word if repetition else None),
                    percent(repetition.repeated_trigram if repetition else None),
                    interval(scores.copied_8, percent_tenths),
                    f"{percent(accuracy.recognized)} ({percent(accuracy.recognized_accepted)})" if accuracy else DASH,
                    f"{percent(accuracy.well_formed)} ({percent(accuracy.well_formed_accepted)})" if accuracy else DASH,
                ]
            )
    header = ["task", "policy", "subject's words kept", "nothing said twice", "word pair twice", "word twice in a row"]
    return table([*header, "trigram twice", "runs of 8 words from training", "recognized as its task", "well-formed"], rows, 2)


def _with_accepted(estimate: Interval, accepted: Interval | None) -> str:
    return interval(estimate, percent) + (f" ({percent(accepted.value)})" if accepted else "")


def cost_table(document: EvaluationDocument) -> str:
    rows = []
    for name in writers(document):
        profile = document.policies.get(name)
        if profile is None or (profile.parameters, profile.tokens_per_second, profile.latency_p50) == (None, None, None):
            continue
        memory, dollars = profile.memory_mib, profile.dollars_per_1000
        rows.append(
            [
                _policy(name, document),
                escape_markdown(profile.model),
                parameters(profile.parameters),
                count(profile.tokens_per_second),
                interval(profile.prompts_per_second_spread, lambda value: number(value, ",.1f"))
                if profile.prompts_per_second_spread
                else number(profile.prompts_per_second, ",.1f"),
                seconds(profile.latency_p50),
                seconds(profile.latency_p95),
                DASH if memory is None else f"{memory:,.0f} MiB",
                number(profile.core_seconds_per_1000, ",.1f"),
                number(profile.gpu_seconds_per_1000, ",.1f"),
                DASH if dollars is None else f"${dollars:,.4f}",
            ]
        )
    header = ["policy", "model", "parameters", "tokens/s", "prompts/s [least, most]", "latency p50", "p95", "host memory"]
    return table([*header, "core-seconds / 1,000", "GPU-seconds / 1,000", "cost / 1,000"], rows, 2)


# ---- appendix: judges


def judge_table(document: EvaluationDocument) -> str:
    deciding = deciding_judges(document.judges)[:2]
    rows = []
    for name, judge in _ordered_judges(document).items():
        kind, area = weakest(judge.gold or judge.auc)
        worst = f"{kind} {interval(area)}" if kind else DASH
        role = "decides" if name in deciding else "shown"
        rows.append(
            [
                escape_markdown(name),
                judge.kind,
                escape_markdown(judge.model),
                f"**{'validated' if judge.validated else 'not validated'}**",
                judge.relation,
                role,
                worst,
                f"{count(judge.gold_pairs)} + {count(judge.pairs)}",
                number(judge.unrelated_score),
                percent(judge.parse_failures),
                signed(judge.position_bias),
            ]
        )
    header = ["judge", "kind", "model", "verdict", "relation", "role", "weakest control", "pairs: gold + own"]
    return table([*header, "score of shuffled", "unread answers", "position bias"], rows, 7)


def area_table(document: EvaluationDocument, gold: bool) -> str:
    """The AUC of each judge against each kind of control, with intervals."""
    areas = {name: judge.gold if gold else judge.auc for name, judge in _ordered_judges(document).items()}
    kinds: list[ControlKind] = [kind for kind in CONTROL_KINDS if any(kind in area for area in areas.values())]
    rows = [
        [f"{kind}{' (held out)' if kind in HELD_OUT_KINDS else ''}", *(interval(area.get(kind)) for area in areas.values())]
        for kind in kinds
    ]
    return table(["control", *map(escape_markdown, areas)], rows)


def area_by_task_table(document: EvaluationDocument) -> str:
    rows = []
    for name, judge in _ordered_judges(document).items():
        for label, by_task in (("gold", judge.gold_tasks), ("own", judge.tasks)):
            for task, areas in by_task.items():
                rows.append([escape_markdown(name), label, _task(task), *(_area(areas.get(kind)) for kind in CONTROL_KINDS)])
    return table(["judge", "pairs", "task", *CONTROL_KINDS], rows, 3)


def _area(area: Area | None) -> str:
    return number(area.value if area else None)


def _ordered_judges(document: EvaluationDocument) -> dict[str, JudgeProfile]:
    return {**pointwise_judges(document), **{name: document.judges[name] for name in pairwise_judges(document)}}


# ---- appendix: the rest


def diversity_table(document: EvaluationDocument) -> str:
    assert DIVERSITY.keys() == DiversityFigures.model_fields.keys()  # a new figure needs a column
    rows = []
    for name, scope in scopes(document):
        figures = scope.diversity.policies
        for policy in order_policies(figures, document.policies):
            values = [number(getattr(figures[policy], figure)) for figure in DIVERSITY]
            prompts = count(scope.diversity.n) + ("" if scope.diversity.fewest is None else " in all")
            rows.append([_task(name), _policy(policy, document), prompts, number(scope.diversity.words, ",.0f"), *values])
    return table(["task", "policy", "prompts", "words each", *DIVERSITY.values()], rows, 2)


def novelty_table(document: EvaluationDocument) -> str:
    copied = document.novelty.policies
    rows = [
        [_policy(name, document), *map(percent_tenths, (copied[name].exact, copied[name].copied_5, copied[name].copied_8))]
        for name in order_policies(copied, document.policies)
    ]
    return table(["policy", "whole prompts copied", "runs of 5 words", "runs of 8 words"], rows)


def command_table(document: EvaluationDocument) -> str:
    rows = [
        [
            _task(name),
            _or_any(task.default_words),
            _or_any(task.default_reward),
            " / ".join(map(str, task.words)) or DASH,
            " ".join(map(number, task.achieved_relevance)) or DASH,
        ]
        for name, task in document.commands.tasks.items()
    ]
    header = ["task", "default words", "default bin", "words in training: p5 / median / p95", "training relevance by bin"]
    return table(header, rows)


def settings_table(document: EvaluationDocument) -> str:
    rows = []
    for name in order_policies(document.policies, document.policies):
        profile = document.policies[name]
        sampling = ", ".join(f"{key} {value}" for key, value in profile.sampling.items() if value is not None) or DASH
        seed = DASH if profile.seed is None else str(profile.seed)
        rows.append([*map(escape_markdown, (name, profile.model, profile.revision or DASH, sampling, seed))])
    return table(["policy", "model", "revision", "sampling", "seed"], rows, 5)


def name_value_rows(pairs: Iterable[tuple[str, str]]) -> str:
    return table(["name", "value"], [[escape_markdown(name), escape_markdown(value)] for name, value in pairs], 2)


def _task(name: str) -> str:
    return code(name) if name else ALL_TASKS


def _policy(name: str, document: EvaluationDocument) -> str:
    if name in document.policies and document.policies[name].kind == "trivial baseline":
        return f"*{escape_markdown(name)}*"
    return f"**{escape_markdown(name)}**" if name == STUDENT else escape_markdown(name)


def _or_any(value: int) -> str:
    """Return a commanded value, or ``any``."""
    return "any" if value == ANY else str(value)
