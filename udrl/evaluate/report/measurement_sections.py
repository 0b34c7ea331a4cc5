"""The report's sections of measurements: judges, control, diversity, novelty and accuracy."""

from collections.abc import Iterable, Sequence
from typing import Literal

from udrl.commands import ANY
from udrl.evaluate.document import DiversityFigures, EvaluationDocument, LengthErrors, RewardCurve, Scope, TaskScope
from udrl.evaluate.judges.validation import CONTROL_KINDS, MIN_AUC, MIN_PAIRS
from udrl.evaluate.report import plots
from udrl.evaluate.report.blocks import Block, Details, Heading, Paragraph, Span, Table, Text
from udrl.evaluate.report.formatting import count, interval, number, percent, signed, yes_no
from udrl.evaluate.report.selection import order_policies, pointwise_judges, scopes

DIVERSITY = {
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "vendi": "Vendi",
    "compression": "compression (lower)",
    "self_bleu": "Self-BLEU (lower)",
    "within_distance": "distance within an intent",
    "within_vendi": "Vendi within an intent",
}
ERRORS = ("n", "mean words", "mean error", "bias", "exact", "within 1", "within 2", "within 10%")
NOT_SWEPT = "Not swept: no length or reward was commanded. A student of plain fine-tuning takes no commands."
LengthProbe = Literal["length", "reach"]
LENGTH_PROBES: dict[LengthProbe, str] = {"length": "usual", "reach": "outside"}


def judges_section(document: EvaluationDocument) -> list[Block]:
    """Return the section that says who judged, and whether each judge is validated."""
    heading = Heading(2, "Judges and their validation")
    if not document.judges:
        return [heading, Paragraph("No independent judge was used: every score here comes from the training's own scorer.")]
    lines: list[Sequence[Text]] = []
    for name, judge in document.judges.items():
        verdict = Span("validated", "good") if judge.validated else Span("not validated", "bad")
        lines.append(
            [
                name,
                judge.kind,
                f"{judge.model}{' (the teacher)' if judge.is_teacher else ''}",
                verdict,
                *(number(judge.auc.get(control)) for control in CONTROL_KINDS),
                count(judge.pairs),
                number(judge.unrelated_score),
                percent(judge.parse_failures),
                signed(judge.position_bias),
            ]
        )
    header = [
        "judge",
        "kind",
        "model",
        "verdict",
        *CONTROL_KINDS,
        "pairs",
        "score of shuffled",
        "unread answers",
        "position bias",
    ]
    caption = (
        "Under each control the AUC: how often a true pair of intent and prompt scores above one of that control, or a"
        " pairwise judge prefers the true prompt (0.5 is chance). Score of shuffled: the mean score of shuffled pairs, which is"
        " the score of a rejected output and the zero of the judge's ratios."
    )
    text = (
        "A judge is validated if it tells true pairs from controls: the prompt of another intent (shuffled), the intent itself"
        " (echo), its words stuffed with keywords (stuffed), the prompt's first third (truncated). Validated: an AUC of at"
        f" least {MIN_AUC} on shuffled, from at least {MIN_PAIRS} scored pairs. A low AUC on echo or stuffed says how the"
        " judge can be fooled. Position bias: how much more a pairwise judge prefers the first prompt, in the comparisons that"
        " it saw and answered."
    )
    blocks: list[Block] = [heading, Paragraph(text), Table(header, lines, caption, 4)]
    by_task: list[Sequence[Text]] = [
        [name, Span(task, "code"), *(number(aucs.get(control)) for control in CONTROL_KINDS)]
        for name, judge in document.judges.items()
        for task, aucs in judge.tasks.items()
    ]
    if len(document.tasks) > 1 and by_task:
        blocks.append(Details("AUC by task", [Table(["judge", "task", *CONTROL_KINDS], by_task, left=2)]))
    return blocks


def control_section(document: EvaluationDocument, plot_names: Sequence[str]) -> list[Block]:
    """Return the section that compares commands with achievements."""
    heading = Heading(2, "Control")
    if not any(task.length.levels or task.reach.levels or task.reward.levels for task in document.tasks.values()):
        return [heading, Paragraph(NOT_SWEPT)]
    return [
        heading,
        Heading(3, "Length: commanded against achieved words"),
        *plots.block("length_control", plot_names),
        _length_table(document),
        Heading(3, "Reward: commanded bin against achieved scores"),
        *plots.block("reward_control", plot_names),
        _reward_table(document),
        *(Details(f"Every command of {name}", _levels(document, task)) for name, task in document.tasks.items()),
    ]


def or_any(value: int) -> str:
    """Return a commanded value, or ``any``."""
    return "any" if value == ANY else str(value)


def _length_table(document: EvaluationDocument) -> Table:
    lines: list[Sequence[Text]] = []
    for name, scope in scopes(document):
        for probe, label in LENGTH_PROBES.items():
            figures = getattr(scope, probe)
            if figures.n:
                lines.append([name, label, *_error_cells(figures), number(figures.spearman), yes_no(figures.rises)])
    header = ["task", "lengths", *ERRORS, "Spearman", "rises"]
    return Table(header, lines, "Usual: the 5th to the 95th percentile of training lengths. Outside: shorter or longer.", 2)


def _error_cells(errors: LengthErrors) -> list[Text]:
    shares = [percent(value) for value in (errors.exact, errors.within_1, errors.within_2, errors.within_10pct)]
    return [count(errors.n), number(errors.mean, ".1f"), number(errors.mae), signed(errors.bias), *shares]


def _reward_table(document: EvaluationDocument) -> Table:
    lines: list[Sequence[Text]] = []
    for name, task in document.tasks.items():
        if not task.reward.levels:
            continue
        curves: list[tuple[str, RewardCurve]] = [("relevance", task.reward)]
        curves += [(judge, task.reward.judges[judge]) for judge in pointwise_judges(document) if judge in task.reward.judges]
        for scorer, curve in curves:
            figures = [number(curve.spearman), interval(curve.difference, signed), yes_no(curve.monotone)]
            lines.append([Span(name, "code"), scorer, *figures])
    header = ["task", "scored by", "Spearman", "top bin - bottom bin", "every step up"]
    caption = (
        "Relevance made the training reward and a judge did not: a judge's rows say whether a higher bin is better or only"
        " scores higher."
    )
    return Table(header, lines, caption, 2)


def _levels(document: EvaluationDocument, task: TaskScope) -> list[Block]:
    blocks: list[Block] = []
    lengths: list[Sequence[Text]] = [
        [str(level.words), label, *_error_cells(level), number(level.p10, ".0f"), number(level.p90, ".0f")]
        for probe, label in LENGTH_PROBES.items()
        for level in getattr(task, probe).levels or ()
    ]
    if lengths:
        blocks.append(Table(["words commanded", "lengths", *ERRORS, "p10", "p90"], lengths, left=2))
    levels = task.reward.levels
    scorers = [judge for judge in pointwise_judges(document) if any(judge in level.judges for level in levels)]
    bins: list[Sequence[Text]] = [
        [
            str(level.bin),
            count(level.n),
            percent(level.rejected),
            interval(level.relevance),
            *(interval(level.judges.get(judge)) for judge in scorers),
            interval(level.reward),
        ]
        for level in levels
    ]
    if bins:
        blocks.append(Table(["reward bin commanded", "n", "rejected", "relevance", *scorers, "training reward"], bins))
    return blocks or [Paragraph("Not swept.")]


def diversity_section(document: EvaluationDocument) -> list[Block]:
    """Return the section on how much the prompts vary, at equal length and number."""
    *by_task, whole = scopes(document)
    caption = (
        "Accepted prompts, cut to the same number of words: one per intent and policy, for the intents that all models answered"
        " with enough words (a trivial baseline may answer others). A higher figure varies more, except in columns marked"
        " lower. Within an intent: over several samples for it. A dash: too few prompts, for a model fewer than half of the"
        " median model's."
    )
    blocks: list[Block] = [Heading(2, "Diversity"), _diversity_table([whole], document, caption)]
    return [*blocks, Details("Diversity by task", [_diversity_table(by_task, document)])] if by_task else blocks


def _diversity_table(scoped: Iterable[tuple[Span, Scope]], document: EvaluationDocument, caption: str = "") -> Table:
    lines: list[Sequence[Text]] = []
    for name, scope in scoped:
        figures = scope.diversity.policies
        for policy in order_policies(figures, document.policies):
            values = [number(getattr(figures[policy], figure)) for figure in DIVERSITY]
            lines.append([name, policy, count(scope.diversity.n), count(scope.diversity.words), *values])
    assert DIVERSITY.keys() == DiversityFigures.model_fields.keys()  # a new figure needs a column
    return Table(["task", "policy", "prompts", "words each", *DIVERSITY.values()], lines, caption, 2)


def novelty_section(document: EvaluationDocument) -> list[Block]:
    """Return the section on copies from training, and on whether a prompt serves its task."""
    overall, copied = document.overall, document.novelty.policies
    lines: list[Sequence[Text]] = []
    for name in order_policies(copied.keys() | _accuracy_policies(overall), document.policies):
        shares = copied.get(name)
        values = (shares.exact, shares.copied_5, shares.copied_8) if shares else (None, None, None)
        lines.append([name, *map(percent, values), *_accuracy_cells(overall, name)])
    prompts = f"{document.novelty.training:,} prompts" if document.novelty.training else "prompts"
    text = (
        f"Copied: words that stand in the {prompts} of training, as whole prompts and as runs of 5 and of 8 words. The teacher"
        " wrote those prompts, so it repeats itself too. "
    )
    holdout = overall.accuracy.classifier.teacher_holdout
    if holdout is not None:
        text += (
            f"A classifier of tasks, trained on the teacher's prompts, is right on {percent(holdout)} of those it did"
            " not see; 'recognized' is the share of a policy's prompts that it assigns to their own task. "
        )
    text += "Well-formed: the share that keeps the task's format rules; a rejected prompt does not."
    header = ["policy", "whole prompts copied", "runs of 5", "runs of 8", "recognized", "well-formed"]
    blocks: list[Block] = [Heading(2, "Novelty and task accuracy"), Paragraph(text), Table(header, lines)]
    by_task: list[Sequence[Text]] = [
        [Span(task, "code"), name, *_accuracy_cells(scope, name)]
        for task, scope in document.tasks.items()
        for name in order_policies(_accuracy_policies(scope), document.policies)
    ]
    if len(document.tasks) > 1 and by_task:
        blocks.append(Details("Accuracy by task", [Table(["task", "policy", "recognized", "well-formed"], by_task, left=2)]))
    return blocks


def _accuracy_policies(scope: Scope) -> set[str]:
    return scope.accuracy.classifier.policies.keys() | scope.accuracy.format.policies.keys()


def _accuracy_cells(scope: Scope, policy: str) -> list[str]:
    accuracy = scope.accuracy
    return [percent(accuracy.classifier.policies.get(policy)), percent(accuracy.format.policies.get(policy))]
