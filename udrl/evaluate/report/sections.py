"""The report's sections from the claim to its limits, as blocks in reading order. Nothing is computed here."""

from collections.abc import Sequence

import pyarrow as pa

from udrl.evaluate.document import EvaluationDocument, PolicyComparison, PolicyProfile, Scope, TaskScope
from udrl.evaluate.metrics.claim import DIVERSITY_LABELS, SCORER
from udrl.evaluate.metrics.intervals import GROUPS
from udrl.evaluate.outputs import STUDENT, TEACHER
from udrl.evaluate.report import examples, plots
from udrl.evaluate.report.blocks import Block, Bullets, Code, Details, Heading, Paragraph, Span, Table, Text
from udrl.evaluate.report.formatting import (
    DASH,
    count,
    interval,
    number,
    parameters,
    percent,
    percent_tenths,
    seconds,
    signed,
    yes_no,
)
from udrl.evaluate.report.measurement_sections import (
    control_section,
    diversity_section,
    judges_section,
    novelty_section,
    or_any,
)
from udrl.evaluate.report.selection import (
    best_judge,
    order_policies,
    pairwise_judges,
    pointwise_judges,
    reference_policy,
    scopes,
)

VERDICTS: dict[bool | None, Span] = {True: Span("met", "good"), False: Span("missed", "bad"), None: Span("open", "open")}


def build_report(document: EvaluationDocument, outputs: pa.Table, plot_names: Sequence[str]) -> list[Block]:
    """Return the blocks of the whole report; ``plot_names`` are the plots that exist."""
    return [
        *_title(document),
        *_claim(document),
        *_results_by_task(document),
        *plots.block("relevance", plot_names),
        *_policies(document),
        *_targets(document),
        *judges_section(document),
        *control_section(document, plot_names),
        *diversity_section(document),
        *novelty_section(document),
        *_plot_section("Quality against cost", "quality_cost", plot_names, "fewer than two policies have a measured cost"),
        Heading(2, "Examples"),
        *examples.side_by_side(outputs, _writers(document), best_judge(document), document.seed),
        *_plot_section("Training", "training_loss", plot_names, "the student came with no training history"),
        Heading(2, "Limits"),
        Bullets(_limits(document)),
        *_settings(document),
    ]


def _title(document: EvaluationDocument) -> list[Block]:
    parts = [
        f"Intents: {count(document.intents)} ({document.source or 'held out'})",
        f"policies: {len(document.policies)}",
        f"outputs: {count(document.rows)}",
        f"seed: {document.seed}",
        "brackets hold 95% confidence intervals over intents",
    ]
    return [Heading(1, f"Evaluation of {document.name or 'the student'}"), Paragraph("; ".join(parts) + ".")]


def _claim(document: EvaluationDocument) -> list[Block]:
    claim = document.claim
    verdict = {True: Span("Yes.", "good"), False: Span("No.", "bad"), None: Span("Open.", "open")}[claim.met]
    blocks: list[Block] = [
        Heading(2, "Is the claim met?"),
        Paragraph([verdict, f" {claim.text or 'Nothing was compared.'}"]),
    ]
    lines: list[Sequence[Text]] = [
        [part.name, VERDICTS[part.met], interval(part.interval, percent_tenths)] for part in claim.parts
    ]
    if lines:
        caption = (
            "Student over the other policy; a judge's scores are counted from its score of prompts for other intents. Met: the"
            f" whole interval is at least {percent(claim.bound)}. Missed: all of it is below. Open: it contains the bound; too"
            f" little was measured; or only {SCORER}, towards which the student was trained, could say met."
        )
        blocks.append(Table(["part of the claim", "verdict", "student / other"], lines, caption, 2))
    return blocks


def _results_by_task(document: EvaluationDocument) -> list[Block]:
    reference, judge = reference_policy(document), best_judge(document)
    name, judge_label = reference or TEACHER, f"judge {judge}" if judge else "judge"
    header = ["task", f"{name} relevance", "student relevance", f"student / {name}", f"{judge_label}: student - {name}"]
    header += ["within 2 words", "length, reward rise", "rejected", "distinct-2, Vendi ratio"]
    lines = [_task_line(task, scope, name, judge) for task, scope in scopes(document)]
    caption = f"The student against {'the teacher' if name == TEACHER else name}, paired by intent; rejected: student / {name}."
    if reference is None:
        caption = "Neither the teacher nor a baseline wrote."
    return [Heading(2, "Results by task"), Table(header, lines, caption)]


def _task_line(task: Span, scope: Scope, reference: str, judge: str | None) -> list[Text]:
    student, other = scope.policies.get(STUDENT), scope.policies.get(reference)
    comparison, ratios = scope.comparisons.get(reference), scope.diversity.ratios.get(reference)
    judged = comparison.judges.get(judge) if comparison and judge else None
    rises = f"{yes_no(scope.length.rises)}, {yes_no(scope.reward.rises)}" if isinstance(scope, TaskScope) else ""
    return [
        task,
        interval(other.relevance if other else None),
        interval(student.relevance if student else None),
        interval(comparison.relevance.ratio if comparison else None, percent),
        interval(judged.difference if judged else None, signed),
        percent(scope.length.within_2),
        rises,
        f"{percent(student.rejected if student else None)} / {percent(other.rejected if other else None)}",
        ", ".join(percent(getattr(ratios, figure).value if ratios else None) for figure in DIVERSITY_LABELS),
    ]


def _policies(document: EvaluationDocument) -> list[Block]:
    scores, comparisons = document.overall.policies, document.overall.comparisons
    names = order_policies(scores.keys() | document.policies.keys(), document.policies)
    blocks: list[Block] = [Heading(2, "Policies side by side"), _scores_table(document, names)]
    if lines := [
        [_label(name, document), *_comparison_cells(comparisons[name], document)] for name in names if name in comparisons
    ]:
        pairwise = pairwise_judges(document)
        header = ["student against", "relevance difference", "ratio", "ratio, accepted only"]
        header += [f"{judge}: difference" for judge in pointwise_judges(document)]
        header += [
            f"{judge}: {column}"
            for judge in pairwise
            for column in ("pairs", "decided by a rejection", "same winner in both orders")
        ]
        caption = "The student minus, or over, each other policy, paired by intent; all tasks."
        if pairwise:
            caption += " A rejected prompt loses its pair without the judge; same winner: of the pairs that the judge saw."
        blocks.append(Table(header, lines, caption))
    profiles = {name: document.policies[name] for name in names if name in document.policies}
    if costs := [
        [_label(name, document), profile.model, *_cost_cells(profile)]
        for name, profile in profiles.items()
        if (profile.parameters, profile.tokens_per_second, profile.latency_p50) != (None, None, None)
    ]:
        header = ["policy", "model", "parameters", "tokens/s", "prompts/s", "latency p50", "p95", "host memory"]
        header += ["core-seconds / 1,000", "GPU-seconds / 1,000", "cost / 1,000"]
        caption = (
            "The cost of one replica on this machine. Latency: one request at a time; rates: many at once. The last three"
            " columns are for 1,000 prompts."
        )
        blocks.append(Table(header, costs, caption, 2))
    return blocks


def _scores_table(document: EvaluationDocument, names: Sequence[str]) -> Table:
    pointwise, pairwise = pointwise_judges(document), pairwise_judges(document)
    lines: list[Sequence[Text]] = []
    for name in names:
        scores, comparison = document.overall.policies.get(name), document.overall.comparisons.get(name)
        judged = [interval(scores.judges.get(judge) if scores else None) for judge in pointwise]
        preferred = [
            interval(comparison.pairwise[judge].preferred if comparison and judge in comparison.pairwise else None, percent)
            for judge in pairwise
        ]
        kind = document.policies[name].kind if name in document.policies else DASH
        lines.append(
            [
                _label(name, document),
                kind,
                interval(scores.relevance if scores else None),
                *judged,
                *preferred,
                number(scores.words if scores else None, ".1f"),
                percent(scores.rejected if scores else None),
                count(scores.n if scores else None),
            ]
        )
    units = [f"{name} ({judge.unit})" if judge.unit else name for name, judge in pointwise.items()]
    preferences = [f"{judge}: student preferred" for judge in pairwise]
    header = ["policy", "kind", "relevance", *units, *preferences, "words", "rejected", "outputs"]
    caption = "Scores of the outputs, over all tasks. * A trivial baseline: it has no model and shows how easy a score is."
    return Table(header, lines, caption, 2)


def _label(name: str, document: EvaluationDocument) -> Text:
    if name in document.policies and document.policies[name].kind == "trivial baseline":
        return Span(f"{name} *", "soft")
    return Span(name, "strong") if name == STUDENT else name


def _comparison_cells(comparison: PolicyComparison, document: EvaluationDocument) -> list[Text]:
    relevance = comparison.relevance
    cells: list[Text] = [
        interval(relevance.difference, signed),
        interval(relevance.ratio, percent),
        interval(relevance.ratio_accepted, percent),
    ]
    for judge in pointwise_judges(document):
        judged = comparison.judges.get(judge)
        cells.append(interval(judged.difference if judged else None, signed))
    for judge in pairwise_judges(document):
        pairs = comparison.pairwise.get(judge)
        cells += [
            count(pairs.n if pairs else None),
            count(pairs.settled if pairs else None),
            percent(pairs.consistent if pairs else None),
        ]
    return cells


def _cost_cells(profile: PolicyProfile) -> list[Text]:
    memory, dollars = profile.memory_mib, profile.dollars_per_1000
    return [
        parameters(profile.parameters),
        count(profile.tokens_per_second),
        number(profile.prompts_per_second, ",.1f"),
        seconds(profile.latency_p50),
        seconds(profile.latency_p95),
        DASH if memory is None else f"{memory:,.0f} MiB",
        number(profile.core_seconds_per_1000, ",.1f"),
        number(profile.gpu_seconds_per_1000, ",.1f"),
        DASH if dollars is None else f"${dollars:,.4f}",
    ]


def _targets(document: EvaluationDocument) -> list[Block]:
    verdicts = {**VERDICTS, None: Span("not measured", "open")}
    lines: list[Sequence[Text]] = [[target.name, verdicts[target.met], target.measured] for target in document.targets]
    return [Heading(2, "Targets"), Table(["target", "verdict", "measured"], lines, left=3)]


def _plot_section(title: str, plot: str, plot_names: Sequence[str], reason: str) -> list[Block]:
    missing: Block = Paragraph(f"Not drawn: {reason}.")
    return [Heading(2, title), *(plots.block(plot, plot_names) or [missing])]


def _writers(document: EvaluationDocument) -> list[str]:
    """Return the policies whose examples are shown: all except trivial baselines."""
    names = order_policies(document.policies.keys() | document.overall.policies.keys(), document.policies)
    return [name for name in names if name not in document.policies or document.policies[name].kind != "trivial baseline"]


def _limits(document: EvaluationDocument) -> list[Text]:
    lines: list[Text] = [
        "Relevance is the scorer that made the training reward: the student was trained towards it, and the others were not."
        " Read it together with the judges.",
        "A rejected or empty output counts as relevance 0, and for a judge as a prompt for another intent, for every policy,"
        " so that refusing never pays. A pairwise judge does not see it: it loses.",
        "The reward curve describes accepted prompts and shows the rejected share next to them; it counts as rising only if it"
        " also rises with rejected prompts as 0.",
        "Length tables count every output with its number of words; a rejected output counts with the words of its text.",
        f"Intervals are from {count(document.bootstrap)} bootstrap resamples of intents; those of ratios of diversity are from"
        f" a jackknife of up to {GROUPS} groups of intents.",
        "Intervals cover the choice of intents, not another training run or another seed of the sampler; a judge's score of"
        " prompts for other intents, from which its ratios are counted, is taken as exact.",
        "Speed, memory and cost hold for this machine and these settings; see the environment below.",
    ]
    if not document.judges:
        lines.append("No independent judge was used: every score here comes from the training's own scorer.")
    for name, judge in document.judges.items():
        label = Span(name, "code")
        if not judge.validated:
            lines.append(["Judge ", label, " is not validated on the controls: do not rely on it."])
        if judge.is_teacher:
            lines.append(["Judge ", label, " has the teacher's own model: expect it to lean towards the teacher's wording."])
        if judge.kind in ("likelihood", "embedding"):
            lines.append(["Judge ", label, " sees whether the subject is kept, not whether the prompt is good."])
    if any(profile.kind == "trivial baseline" for profile in document.policies.values()):
        lines.append(
            "Trivial baselines show how a metric can be fooled: echo repeats the intent, shuffled answers another intent,"
            " best-of-N picks by the training reward and pays for N samples."
        )
    if TEACHER not in document.overall.policies:
        lines.append("The teacher did not write: comparisons with it have no measurement here.")
    return lines


def _settings(document: EvaluationDocument) -> list[Block]:
    """Return the folded blocks at the end: commands, sampling, times, machine, recipe."""
    blocks: list[Block] = [
        Details("The student's commands", [_commands_table(document)]),
        Details("Settings of each policy", [_sampling_table(document)]),
    ]
    if document.seconds:
        lines = [[phase, seconds(value)] for phase, value in document.seconds.items()]
        blocks.append(Details("Time per phase", [Table(["phase", "time"], lines)]))
    environment = document.environment
    packages = ", ".join(f"{name} {version}" for name, version in environment.packages.items()) or DASH
    rows = [
        ["python", environment.python or DASH],
        ["cores", str(environment.cores)],
        ["machine", environment.machine],
        ["packages", packages],
    ]
    blocks.append(Details("Environment", [Table(["name", "value"], rows, left=2)]))
    if document.recipe:
        blocks.append(Details("Recipe", [Code(document.recipe, "yaml")]))
    return [Heading(2, "Settings"), *blocks]


def _commands_table(document: EvaluationDocument) -> Table:
    commands = document.commands
    lines: list[Sequence[Text]] = [
        [
            Span(name, "code"),
            or_any(task.default_words),
            or_any(task.default_reward),
            " / ".join(map(str, task.words)) or DASH,
            " ".join(map(number, task.achieved_relevance)) or DASH,
        ]
        for name, task in commands.tasks.items()
    ]
    header = ["task", "default words", "default bin", "words in training: p5 / median / p95", "training relevance by bin"]
    caption = f"{commands.reward_bins} reward bins, ranked within the {commands.rank_within}; up to {commands.max_words} words."
    return Table(header, lines, caption)


def _sampling_table(document: EvaluationDocument) -> Table:
    lines = []
    for name in order_policies(document.policies, document.policies):
        profile = document.policies[name]
        sampling = ", ".join(f"{key} {value}" for key, value in profile.sampling.items() if value is not None) or DASH
        seed = DASH if profile.seed is None else str(profile.seed)
        lines.append([name, profile.kind, profile.model, profile.revision or DASH, sampling, seed])
    return Table(["policy", "kind", "model", "revision", "sampling", "seed"], lines, left=6)
