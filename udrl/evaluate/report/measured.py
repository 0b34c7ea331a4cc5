"""The report's sections of measurements: judges, control, diversity, novelty and accuracy."""

from collections.abc import Sequence
from typing import Any

from udrl.evaluate.judges.validation import CONTROL_KINDS as CONTROLS
from udrl.evaluate.judges.validation import MIN_AUC, MIN_PAIRS
from udrl.evaluate.report import plots
from udrl.evaluate.report.blocks import Block, Details, Heading, Paragraph, Span, Table, Text
from udrl.evaluate.report.markdown import number, percent, span, yes
from udrl.evaluate.report.reading import at, in_order, pointwise, scopes, signed

DIVERSITY = {
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "vendi": "Vendi",
    "compression": "compression (lower)",
    "self_bleu": "Self-BLEU (lower)",
    "within_distance": "distance within an intent",
    "within_vendi": "Vendi within an intent",
}
NOT_SWEPT = "Not swept: no output was asked for a length or a reward. A student of plain fine-tuning takes no commands."


def judges(document: dict[str, Any]) -> list[Block]:
    """Who judged, and whether to believe it."""
    asked = at(document, "judges") or {}
    heading = Heading(2, "Judges, and whether to believe them")
    if not asked:
        return [heading, Paragraph("No independent judge was asked: nothing here is free of the training's own scorer.")]
    lines: list[Sequence[Text]] = []
    for name, told in asked.items():
        believed = {True: Span("believed", "good"), False: Span("not believed", "bad"), None: Span("-", "open")}
        model = f"{told.get('model') or '-'}{' (the teacher)' if told.get('of_teacher') else ''}"
        aucs = [number(at(told, "auc", control)) for control in CONTROLS]
        after = [number(told.get("pairs"), ",.0f"), number(told.get("unrelated_score"))]
        after += [percent(told.get("parse_failures")), signed(told.get("position_bias"))]
        lines.append([name, told.get("kind") or "-", model, believed[told.get("validated")], *aucs, *after])
    heads = ["judge", "kind", "model", "verdict", *CONTROLS, "pairs", "score of shuffled", "unread answers", "position bias"]
    caption = (
        "Under each control the AUC: how often a true pair of intent and prompt scores above one of that control, or a "
        "pairwise judge prefers the true prompt (0.5 is chance). Score of shuffled: their mean, which is what a rejected "
        "output counts for, and the zero of the judge's ratios."
    )
    text = (
        "Before a judge is believed, it must tell true pairs from controls: the prompt of another intent (shuffled), the "
        "intent itself (echo), its words stuffed with keywords (stuffed), the prompt's first third (truncated). Believed: an "
        f"AUC of at least {MIN_AUC} on shuffled, from at least {MIN_PAIRS} scored pairs. A low AUC on echo or stuffed says "
        "what the judge can be fooled by. Position bias: how much more a pairwise judge prefers what it sees first, in the "
        "comparisons of policies that it saw and answered."
    )
    found: list[Block] = [heading, Paragraph(text), Table(heads, lines, caption, 4)]
    by_task = [
        [name, Span(task, "code"), *(number(at(aucs, control)) for control in CONTROLS)]
        for name, told in asked.items()
        for task, aucs in (told.get("tasks") or {}).items()
    ]
    if len(at(document, "tasks") or {}) > 1 and by_task:
        found.append(Details("AUC by task", [Table(["judge", "task", *CONTROLS], by_task, left=2)]))
    return found


def control(document: dict[str, Any], drawn: Sequence[str]) -> list[Block]:
    """Does the student do as it is told."""
    tasks = at(document, "tasks") or {}
    heading = Heading(2, "Control")
    if not any(at(task, probe, "levels") for task in tasks.values() for probe in ("length", "reach", "reward")):
        return [heading, Paragraph(NOT_SWEPT)]
    return [
        heading,
        Heading(3, "Length: commanded against achieved words"),
        *plots.block("length_control", drawn),
        _lengths(document),
        Heading(3, "Reward: commanded bin against what was achieved"),
        *plots.block("reward_control", drawn),
        _rewards(document),
        *(Details(f"Every command of {name}", _levels(document, task)) for name, task in tasks.items()),
    ]


def _lengths(document: dict[str, Any]) -> Block:
    lines: list[Sequence[Text]] = []
    for name, scope in scopes(document):
        for probe, told in (("length", "usual"), ("reach", "outside")):
            if at(scope, probe, "n"):
                found = scope[probe]
                lines.append([name, told, *_errors(found), number(found.get("spearman")), yes(found.get("rises"))])
    heads = ["task", "lengths", *ERRORS, "Spearman", "rises"]
    return Table(heads, lines, "Usual: the 5th to the 95th percentile of training lengths. Outside: shorter or longer.", 2)


ERRORS = ("n", "mean words", "mean error", "bias", "exact", "within 1", "within 2", "within 10%")


def _errors(found: dict[str, Any]) -> list[Text]:
    shares = [percent(found.get(key)) for key in ("exact", "within_1", "within_2", "within_10pct")]
    return [
        number(found.get("n"), ",.0f"),
        number(found.get("mean"), ".1f"),
        number(found.get("mae")),
        signed(found.get("bias")),
        *shares,
    ]


def _rewards(document: dict[str, Any]) -> Block:
    lines: list[Sequence[Text]] = []
    for name, scope in (at(document, "tasks") or {}).items():
        reward = scope.get("reward") or {}
        if not reward.get("levels"):
            continue
        views = [("relevance", reward)] + [(j, at(reward, "judges", j)) for j in pointwise(document) if at(reward, "judges", j)]
        for by, found in views:
            figures = [number(found.get("spearman")), span(found.get("difference"), signed), yes(found.get("monotone"))]
            lines.append([Span(name, "code"), by, *figures])
    heads = ["task", "seen by", "Spearman", "top bin - bottom bin", "every step up"]
    caption = (
        "Relevance made the training reward; a judge did not, so its rows say whether a higher bin is better or only scores so."
    )
    return Table(heads, lines, caption, 2)


def _levels(document: dict[str, Any], task: dict[str, Any]) -> list[Block]:
    found: list[Block] = []
    lengths: list[Sequence[Text]] = [
        [str(level.get("words")), told, *_errors(level), number(level.get("p10"), ".0f"), number(level.get("p90"), ".0f")]
        for probe, told in (("length", "usual"), ("reach", "outside"))
        for level in at(task, probe, "levels") or ()
    ]
    if lengths:
        found.append(Table(["words commanded", "lengths", *ERRORS, "p10", "p90"], lines=lengths, left=2))
    asked = [j for j in pointwise(document) if any(at(level, "judges", j) for level in at(task, "reward", "levels") or ())]
    bins: list[Sequence[Text]] = [
        [
            str(level.get("bin")),
            number(level.get("n"), ",.0f"),
            percent(level.get("rejected")),
            span(level.get("relevance")),
            *(span(at(level, "judges", judge)) for judge in asked),
            span(level.get("reward")),
        ]
        for level in at(task, "reward", "levels") or ()
    ]
    if bins:
        found.append(Table(["reward bin commanded", "n", "rejected", "relevance", *asked, "training reward"], bins))
    return found or [Paragraph("Not swept.")]


def diversity(document: dict[str, Any]) -> list[Block]:
    """How much the prompts vary, at equal length and number."""
    *by_task, whole = scopes(document)
    caption = (
        "Accepted prompts, cut to the same number of words: of each policy one an intent, for the intents that all models "
        "answered with enough words (a yardstick may give others). Higher varies more, but where it says lower. Within an "
        "intent: over several draws for it. A dash: too few prompts, of a model fewer than half of what the median model has."
    )
    found: list[Block] = [Heading(2, "Diversity"), _varied([whole], document, caption)]
    return [*found, Details("Diversity by task", [_varied(by_task, document)])] if by_task else found


def _varied(scopes: Sequence[tuple[Span, dict[str, Any]]], document: dict[str, Any], caption: str = "") -> Table:
    facts = at(document, "policies") or {}
    lines: list[Sequence[Text]] = []
    for name, scope in scopes:
        found = at(scope, "diversity", "policies") or {}
        sizes = [number(at(scope, "diversity", key), ",.0f") for key in ("n", "words")]
        for policy in in_order(set(found), facts):
            lines.append([name, policy, *sizes, *(number(found[policy].get(figure)) for figure in DIVERSITY)])
    return Table(["task", "policy", "prompts", "words each", *DIVERSITY.values()], lines, caption, 2)


def novelty(document: dict[str, Any]) -> list[Block]:
    """What is copied from training, and whether a prompt serves its task."""
    facts, overall = at(document, "policies") or {}, at(document, "overall") or {}
    copied = at(document, "novelty", "policies") or {}
    lines: list[Sequence[Text]] = []
    for name in in_order(set(copied) | set(_accuracy(overall)), facts):
        shares = [percent(at(copied, name, key)) for key in ("exact", "copied_5", "copied_8")]
        lines.append([name, *shares, *_recognised(overall, name)])
    training = at(document, "novelty", "training")
    prompts = f"{training:,} prompts" if training else "prompts"
    text = (
        f"Copied: words that stand in the {prompts} of training, as whole prompts and as runs of 5 and of 8 words. "
        "The teacher wrote those prompts, so it too repeats itself. "
    )
    holdout = at(overall, "accuracy", "classifier", "teacher_holdout")
    if holdout is not None:
        text += (
            f"A classifier of tasks, trained on the teacher's prompts, is right on {percent(holdout)} of those it did not see; "
        )
        text += "'recognised' is its share of prompts that it takes for their own task. "
    text += "Well-formed: the share that keeps the task's format rules, rejected ones counted as not."
    heads = ["policy", "whole prompts copied", "runs of 5", "runs of 8", "recognised", "well-formed"]
    found: list[Block] = [Heading(2, "Novelty and task accuracy"), Paragraph(text), Table(heads, lines)]
    tasks = at(document, "tasks") or {}
    by_task: list[Sequence[Text]] = [
        [Span(task, "code"), name, *_recognised(scope, name)]
        for task, scope in tasks.items()
        for name in in_order(set(_accuracy(scope)), facts)
    ]
    if len(tasks) > 1 and by_task:
        found.append(Details("Accuracy by task", [Table(["task", "policy", "recognised", "well-formed"], by_task, left=2)]))
    return found


def _accuracy(scope: dict[str, Any]) -> dict[str, Any]:
    recognised, formed = (at(scope, "accuracy", kind, "policies") or {} for kind in ("classifier", "format"))
    return {**recognised, **formed}


def _recognised(scope: dict[str, Any], policy: str) -> list[str]:
    return [percent(at(scope, "accuracy", kind, "policies", policy)) for kind in ("classifier", "format")]
