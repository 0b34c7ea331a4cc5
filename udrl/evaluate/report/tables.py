"""The report's tables, as Markdown: each is a list of columns over some rows. Every text of a run is escaped."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from udrl.evaluate.document import (
    ControlKind,
    EvaluationDocument,
    Interval,
    PolicyComparison,
    PolicyScores,
)
from udrl.evaluate.formatting import (
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
    tenths,
    verdict,
)
from udrl.evaluate.judges.controls import CONTROL_KINDS, HELD_OUT_KINDS
from udrl.evaluate.judges.validation import weakest
from udrl.evaluate.metrics.claim import deciding_judges
from udrl.evaluate.outputs import STUDENT, TEACHER
from udrl.evaluate.report.selection import order_policies, ordered_judges, reference_policy, scopes, writers
from udrl.text import markdown_table

NOTHING = "*Nothing was measured.*"


class Row(NamedTuple):
    """A row of a table by task; ``task`` is "" for all tasks together."""

    task: str
    label: str
    part: Any  # of the document


class Column(NamedTuple):
    """A column's escaped title, and a function: row -> its escaped cell. A text is aligned left, a number right."""

    title: str
    cell: Callable[[Any], str]
    is_text: bool = False


TASK = Column("task", lambda row: code(row.task) if row.task else "**all tasks**", True)


def table(columns: Iterable[Column], rows: Iterable[Any]) -> str:
    """Return a Markdown table of the rows; columns of text come first."""
    columns, rows = list(columns), list(rows)
    cells = [[column.cell(row) for column in columns] for row in rows]
    left = sum(column.is_text for column in columns)
    return markdown_table([column.title for column in columns], cells, left, escaped=True) if rows else NOTHING


# ---- the first screen


def claim_table(document: EvaluationDocument) -> str:
    columns = [
        Column("part of the claim", lambda part: escape_markdown(part.name), True),
        Column("verdict", lambda part: verdict(part.met), True),
        Column("student / other", lambda part: interval(part.interval, percent_tenths)),
    ]
    return table(columns, document.claim.parts)


def task_table(document: EvaluationDocument) -> str:
    return table(task_columns(document), task_rows(document))


def task_rows(document: EvaluationDocument) -> list[Row]:
    return [Row(task, "", scope) for task, scope in scopes(document)]


def task_columns(document: EvaluationDocument) -> list[Column]:
    """Return the student against the reference policy, by each deciding judge and the scorer, and the main figures."""
    reference = reference_policy(document) or TEACHER

    def ratio(get: Callable[[PolicyComparison], Interval | None]) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            comparison = row.part.comparisons.get(reference)
            return interval(get(comparison) if comparison else None, percent)

        return cell

    def by_judge(judge: str) -> Column:
        return Column(
            f"{escape_markdown(judge)}: student / {escape_markdown(reference)}", ratio(lambda one: one.judges.get(judge))
        )

    def both(get: Callable[[PolicyScores], float | None]) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            sides = [row.part.policies.get(policy) for policy in (STUDENT, reference)]
            return " / ".join(percent(get(scores)) if scores else DASH for scores in sides)

        return cell

    return [
        TASK,
        *map(by_judge, deciding_judges(document.judges)[:2]),
        Column("scorer's relevance: ratio", ratio(lambda one: one.relevance)),
        Column("subject's words kept", both(lambda scores: scores.coverage.value)),
        Column("nothing said twice", both(lambda scores: scores.clean.value)),
        Column("within 2 words", lambda row: percent(row.part.length.within_2.value)),
        Column("rejected", both(lambda scores: scores.rejected)),
    ]


def target_table(document: EvaluationDocument) -> str:
    columns = [
        Column("target", lambda target: escape_markdown(target.name), True),
        Column("verdict", lambda target: verdict(target.met), True),
        Column("measured", lambda target: escape_markdown(target.measured), True),
    ]
    return table(columns, document.targets)


# ---- control


def length_table(document: EvaluationDocument) -> str:
    """Commanded against achieved words; a share among accepted outputs stands in parentheses."""
    columns = [
        TASK,
        Column("lengths", lambda row: row.label, True),
        Column("n", lambda row: count(row.part.n)),
        Column("rejected", lambda row: percent(row.part.rejected)),
        Column("mean words", lambda row: number(row.part.mean, ".1f")),
        Column("mean error", lambda row: number(row.part.mae)),
        Column("exact", lambda row: percent(row.part.exact)),
        Column("within 2", lambda row: f"{interval(row.part.within_2, percent)} ({percent(row.part.within_2_accepted)})"),
        Column("Spearman", lambda row: number(row.part.spearman)),
        Column("rises", lambda row: {True: "yes", False: "no", None: "open"}[row.part.rises]),
    ]
    rows = [
        Row(task, label, control)
        for task, scope in scopes(document)
        for label, control in (("usual", scope.length), ("outside", scope.reach))
        if control.n
    ]
    return table(columns, rows)


def reward_table(document: EvaluationDocument) -> str:
    columns = [
        TASK,
        Column("scored by", lambda row: escape_markdown(row.label), True),
        Column("Spearman", lambda row: number(row.part.spearman)),
        Column("top bin - bottom bin", lambda row: interval(row.part.difference, signed)),
        Column("rejected by bin, bottom first", lambda row: " ".join(map(percent, document.tasks[row.task].reward.rejected))),
    ]
    rows = [
        Row(name, scorer, curve)
        for name, task in document.tasks.items()
        for scorer, curve in (("relevance (scorer)", task.reward.relevance), *task.reward.judges.items())
        if task.reward.bins
    ]
    return table(columns, rows)


# ---- appendix


def score_table(document: EvaluationDocument) -> str:
    """Every metric by task and policy; in parentheses the figure among accepted outputs."""

    def with_accepted(quality: str) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            accepted: Interval | None = row.part.accepted.get(quality)
            return interval(getattr(row.part, quality), percent) + (f" ({percent(accepted.value)})" if accepted else "")

        return cell

    def by_judge(judge: str) -> Column:
        return Column(escape_markdown(judge), lambda row: interval(row.part.judges.get(judge)))

    columns = [
        TASK,
        Column("policy", lambda row: _policy(row.label, document), True),
        Column("relevance", lambda row: interval(row.part.relevance)),
        *map(by_judge, ordered_judges(document)),
        Column("subject's words kept", with_accepted("coverage")),
        Column("nothing said twice", with_accepted("clean")),
        Column("runs of 8 words from training", lambda row: interval(row.part.copied_8, percent_tenths)),
        Column("words", lambda row: number(row.part.words, ".1f")),
        Column("outputs", lambda row: count(row.part.n)),
        Column("rejected", lambda row: _rejected(row.part)),
    ]
    rows = [
        Row(task, policy, scope.policies[policy])
        for task, scope in scopes(document)
        for policy in order_policies(scope.policies, document.policies)
    ]
    return table(columns, rows)


def _rejected(scores: PolicyScores) -> str:
    """Return the rejected share, and the share of each reason, most frequent first."""
    reasons = sorted(scores.reasons.items(), key=lambda reason: -reason[1])
    shares = ", ".join(f"{escape_markdown(reason)} {percent(n / scores.n)}" for reason, n in reasons)
    return percent(scores.rejected) + (f" ({shares})" if shares else "")


def policy_table(document: EvaluationDocument) -> str:
    """The model, decoding and speed of each policy that has a model."""
    profiles = document.policies
    columns = [
        Column("policy", lambda name: _policy(name, document), True),
        Column("model", lambda name: escape_markdown(profiles[name].model), True),
        Column("revision", lambda name: escape_markdown(profiles[name].revision or DASH), True),
        Column("decoding", lambda name: escape_markdown(_decoding(document, name)), True),
        Column("parameters", lambda name: parameters(profiles[name].parameters)),
        Column("tokens/s", lambda name: count(profiles[name].tokens_per_second)),
        Column("prompts/s [least, most]", lambda name: interval(profiles[name].prompts_per_second, tenths)),
        Column("latency p50", lambda name: seconds(profiles[name].latency_p50)),
        Column("p95", lambda name: seconds(profiles[name].latency_p95)),
        Column("host memory, MiB", lambda name: count(profiles[name].memory_mib)),
        Column("dollars / 1,000 prompts", lambda name: number(profiles[name].dollars_per_1000, ",.4f")),
    ]
    return table(columns, writers(document))


def _decoding(document: EvaluationDocument, name: str) -> str:
    profile = document.policies[name]
    neutral = {None, 0, 1.0}
    settings = [f"{key} {value}" for key, value in profile.sampling.items() if key == "temperature" or value not in neutral]
    return ", ".join([*settings, DASH if profile.seed is None else f"seed {profile.seed}"])


def describe_decoding(document: EvaluationDocument) -> str:
    """Return how the decoding of the student differs from that of the reference policy; max_tokens follows from the task."""
    own, other = (
        {key: value for key, value in document.policies[name].sampling.items() if value is not None and key != "max_tokens"}
        for name in (STUDENT, reference_policy(document) or STUDENT)
    )
    differences = [
        f"{key} {own.get(key, DASH)} / {other.get(key, DASH)}" for key in {**own, **other} if own.get(key) != other.get(key)
    ]
    return f"differs: {', '.join(differences)}" if differences else "is the same"


def judge_table(document: EvaluationDocument) -> str:
    judges, deciding = ordered_judges(document), deciding_judges(document.judges)[:2]

    def worst(name: str) -> str:
        kind, area = weakest(judges[name].deciding_areas)
        return f"{kind} {interval(area)}" if kind else DASH

    columns = [
        Column("judge", escape_markdown, True),
        Column("kind", lambda name: judges[name].kind, True),
        Column("model", lambda name: escape_markdown(judges[name].model), True),
        Column("verdict", lambda name: f"**{'validated' if judges[name].validated else 'not validated'}**", True),
        Column("relation", lambda name: judges[name].relation, True),
        Column("role", lambda name: "decides" if name in deciding else "shown", True),
        Column("weakest control", worst, True),
        Column("pairs: gold + own", lambda name: f"{count(judges[name].gold_pairs)} + {count(judges[name].pairs)}"),
        Column("score of shuffled", lambda name: number(judges[name].unrelated_score)),
        Column("unread answers", lambda name: percent(judges[name].parse_failures)),
    ]
    return table(columns, judges)


def area_table(document: EvaluationDocument) -> str:
    """The AUC of each judge against each kind of control, with intervals: on gold pairs and on the run's own, by task."""
    rows = [
        Row(task, f"{name}: {pairs}", areas)
        for name, judge in ordered_judges(document).items()
        for pairs, of_all, by_task in (("gold", judge.gold, judge.gold_tasks), ("own", judge.auc, judge.tasks))
        for task, areas in (by_task if len(by_task) == 1 else {"": of_all, **by_task}).items()
        if areas
    ]

    def by_kind(kind: ControlKind) -> Column:
        return Column(f"{kind}{' (held out)' if kind in HELD_OUT_KINDS else ''}", lambda row: interval(row.part.get(kind)))

    columns = [Column("judge: pairs", lambda row: escape_markdown(row.label), True), TASK, *map(by_kind, CONTROL_KINDS)]
    return table(columns, rows)


def diversity_table(document: EvaluationDocument) -> str:
    def by_figure(title: str, figure: str) -> Column:
        def cell(row: Row) -> str:
            ratios = row.part.ratios.get(row.label)
            ratio = f" ({interval(getattr(ratios, figure), percent)})" if ratios else ""
            return number(getattr(row.part.policies[row.label], figure)) + ratio

        return Column(f"{title} (student / it)", cell)

    columns = [
        TASK,
        Column("policy", lambda row: _policy(row.label, document), True),
        Column("prompts", lambda row: count(row.part.n)),
        Column("words each", lambda row: number(row.part.words, ",.0f")),
        by_figure("distinct-2", "distinct_2"),
        by_figure("Vendi", "vendi"),
    ]
    rows = [
        Row(task, policy, scope.diversity)
        for task, scope in scopes(document)
        for policy in order_policies(scope.diversity.policies, document.policies)
    ]
    return table(columns, rows)


def _policy(name: str, document: EvaluationDocument) -> str:
    if document.policies[name].kind == "trivial baseline":
        return f"*{escape_markdown(name)}*"
    return f"**{escape_markdown(name)}**" if name == STUDENT else escape_markdown(name)
