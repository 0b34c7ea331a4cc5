"""What the report says: the blocks of one evaluation's document, in the order of reading. Nothing is computed here.

Any part of the document may be missing or None: a number that is not known is a dash, a part that is not there is said so.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from udrl.evaluate.metrics.claim import DIVERSITY_LABELS, SCORER
from udrl.evaluate.metrics.intervals import GROUPS
from udrl.evaluate.outputs import STUDENT, TEACHER
from udrl.evaluate.report import examples, plots
from udrl.evaluate.report.appendix import appendix
from udrl.evaluate.report.blocks import Block, Bullets, Heading, Paragraph, Span, Table, Text
from udrl.evaluate.report.markdown import count, number, percent, span, yes
from udrl.evaluate.report.measured import control, diversity, judges, novelty
from udrl.evaluate.report.reading import at, best_judge, in_order, pointwise, reference, scopes, seconds, signed

VERDICTS: dict[bool | None, Span] = {True: Span("met", "good"), False: Span("missed", "bad"), None: Span("open", "open")}


def blocks(document: dict[str, Any], outputs: pa.Table, drawn: Sequence[str]) -> list[Block]:
    """The whole report; ``drawn`` names the plots that there are."""
    chosen = best_judge(document)
    return [
        *_title(document),
        *_claim(document),
        *_headline(document),
        *plots.block("relevance", drawn),
        *_policies(document),
        *_targets(document),
        *judges(document),
        *control(document, drawn),
        *diversity(document),
        *novelty(document),
        *_cost(drawn),
        Heading(2, "Examples"),
        *examples.side_by_side(outputs, _writers(document), chosen, at(document, "seed") or 0),
        *_training(drawn),
        Heading(2, "Limits"),
        Bullets(_limits(document)),
        *appendix(document),
    ]


def _title(document: dict[str, Any]) -> list[Block]:
    facts = [
        f"Intents: {number(at(document, 'intents'), ',')} ({document.get('source') or 'held out'})",
        f"policies: {len(at(document, 'policies') or {})}",
        f"outputs: {number(at(document, 'rows'), ',')}",
        f"seed: {number(at(document, 'seed'), 'd')}",
        "brackets hold 95% intervals over intents",
    ]
    return [Heading(1, f"Evaluation of {document.get('name') or 'the student'}"), Paragraph("; ".join(facts) + ".")]


def _claim(document: dict[str, Any]) -> list[Block]:
    claim = at(document, "claim") or {}
    met, bound = claim.get("met"), claim.get("bound")
    word = {True: Span("Yes.", "good"), False: Span("No.", "bad"), None: Span("Open.", "open")}[met]
    lines = [
        [part["name"], VERDICTS[part.get("met")], span(part.get("interval"), _tenths)] for part in claim.get("parts") or ()
    ]
    found: list[Block] = [
        Heading(2, "Is the claim met?"),
        Paragraph([word, f" {claim.get('text') or 'Nothing was compared.'}"]),
    ]
    if lines:
        caption = (
            "Student over the other; by a judge, from its score of prompts for other intents up. Met: the whole interval is at "
            f"least {percent(bound)}. Missed: it lies below. Open: it holds the bound; too little was measured; or only "
            f"{SCORER} could say met, towards which the student was trained."
        )
        found.append(Table(["part of the claim", "verdict", "student / other"], lines, caption, 2))
    return found


def _headline(document: dict[str, Any]) -> list[Block]:
    other, judge = reference(document), best_judge(document)
    name, by = other or TEACHER, f"judge {judge}" if judge else "judge"
    heads = ["task", f"{name} relevance", "student relevance", f"student / {name}", f"{by}: student - {name}"]
    heads += ["within 2 words", "length, reward rise", "rejected", "distinct-2, Vendi ratio"]
    lines: list[Sequence[Text]] = []
    for task, scope in scopes(document):
        policies, against = at(scope, "policies") or {}, at(scope, "comparisons", name) or {}
        student, peer = policies.get(STUDENT) or {}, policies.get(name) or {}
        ratios = [percent(at(scope, "diversity", "ratios", name, f, "value")) for f in DIVERSITY_LABELS]
        lines.append(
            [
                task,
                span(peer.get("relevance")),
                span(student.get("relevance")),
                span(at(against, "relevance", "ratio"), percent),
                span(at(against, "judges", judge or "", "difference"), signed),
                percent(at(scope, "length", "within_2")),
                f"{yes(at(scope, 'length', 'rises'))}, {yes(at(scope, 'reward', 'rises'))}" if "reward" in scope else "",
                f"{percent(student.get('rejected'))} / {percent(peer.get('rejected'))}",
                ", ".join(ratios),
            ]
        )
    caption = f"The student against {'the teacher' if name == TEACHER else name}, paired by intent; rejected: student / {name}."
    caption = caption if other else "Neither the teacher nor a baseline was asked."
    return [Heading(2, "Results by task"), Table(heads, lines, caption)]


def _policies(document: dict[str, Any]) -> list[Block]:
    facts, overall = at(document, "policies") or {}, at(document, "overall") or {}
    measured, against = at(overall, "policies") or {}, at(overall, "comparisons") or {}
    names = in_order(set(measured) | set(facts), facts)
    asked = {j: told for j, told in (at(document, "judges") or {}).items() if j in pointwise(document)}
    paired = [j for j, told in (at(document, "judges") or {}).items() if told.get("kind") == "pairwise"]
    units = [f"{j} ({told['unit']})" if told.get("unit") else j for j, told in asked.items()]
    written: list[Sequence[Text]] = []
    cost: list[Sequence[Text]] = []
    beside: list[Sequence[Text]] = []
    for name in names:
        told, found = facts.get(name) or {}, measured.get(name) or {}
        kind = told.get("kind") or (name if name in (STUDENT, TEACHER) else "-")
        shown: Text = (
            Span(f"{name} *", "soft") if kind == "trivial baseline" else Span(name, "strong") if name == STUDENT else name
        )
        judged = [span(at(found, "judges", judge)) for judge in asked]
        preferred = [span(at(against, name, "pairwise", judge, "preferred"), percent) for judge in paired]
        row = [span(found.get("relevance")), *judged, *preferred, number(found.get("words"), ".1f")]
        written.append([shown, kind, *row, percent(found.get("rejected")), number(found.get("n"), ",.0f")])
        if any(told.get(key) is not None for key in ("parameters", "tokens_per_second", "latency_p50", "seconds")):
            cost.append([shown, told.get("model") or "-", *_costs(told)])
        if name in against:
            beside.append([shown, *_beside(against[name], list(asked), paired)])
    heads = [
        "policy",
        "kind",
        "relevance",
        *units,
        *(f"{j}: student preferred" for j in paired),
        "words",
        "rejected",
        "outputs",
    ]
    found_blocks: list[Block] = [
        Heading(2, "Policies side by side"),
        Table(
            heads, written, "What they write, over all tasks. * A yardstick: no model of its own, there to read the rest by.", 2
        ),
    ]
    if beside:
        heads = ["student against", "relevance difference", "ratio", "ratio, accepted alone"]
        heads += [f"{j}: difference" for j in asked]
        heads += [f"{j}: {told}" for j in paired for told in ("pairs", "settled by a rejection", "same winner in both orders")]
        caption = "The student minus, or over, each of the others, paired by intent; all tasks."
        if paired:
            caption += " A rejected prompt loses its pair, unseen by the judge; same winner: of the pairs that it saw."
        found_blocks.append(Table(heads, beside, caption))
    if cost:
        heads = ["policy", "model", "parameters", "tokens/s", "prompts/s", "latency p50", "p95", "host memory"]
        heads += ["core-seconds / 1,000", "GPU-seconds / 1,000", "cost / 1,000"]
        caption = (
            "What one replica of each costs on this machine. Latency: one request at a time; rates: many at once. The last "
            "three are for 1,000 prompts."
        )
        found_blocks.append(Table(heads, cost, caption, 2))
    return found_blocks


def _costs(told: dict[str, Any]) -> list[Text]:
    memory, dollars = told.get("memory_mib"), told.get("dollars_per_1000")
    return [
        count(told.get("parameters")),
        number(told.get("tokens_per_second"), ",.0f"),
        number(told.get("prompts_per_second"), ",.1f"),
        seconds(told.get("latency_p50")),
        seconds(told.get("latency_p95")),
        "-" if memory is None else f"{memory:,.0f} MiB",
        number(told.get("core_seconds_per_1000"), ",.1f"),
        number(told.get("gpu_seconds_per_1000"), ",.1f"),
        "-" if dollars is None else f"${dollars:,.4f}",
    ]


def _beside(against: dict[str, Any], asked: Sequence[str], paired: Sequence[str]) -> list[Text]:
    relevance = [
        span(at(against, "relevance", "difference"), signed),
        span(at(against, "relevance", "ratio"), percent),
        span(at(against, "relevance", "ratio_accepted"), percent),
    ]
    judged = [span(at(against, "judges", judge, "difference"), signed) for judge in asked]
    counted: list[Text] = []
    for judge in paired:
        told = at(against, "pairwise", judge) or {}
        counted += [number(told.get("n"), ",.0f"), number(told.get("settled"), ",.0f"), percent(told.get("consistent"))]
    return [*relevance, *judged, *counted]


def _targets(document: dict[str, Any]) -> list[Block]:
    told = {**VERDICTS, None: Span("not measured", "open")}
    lines = [[t["name"], told[t["met"]], t["measured"]] for t in at(document, "targets") or ()]
    return [Heading(2, "Targets"), Table(["target", "verdict", "measured"], lines, left=3)]


def _cost(drawn: Sequence[str]) -> list[Block]:
    none: Block = Paragraph("Not drawn: fewer than two policies have a measured cost.")
    return [Heading(2, "Quality against cost"), *(plots.block("quality_cost", drawn) or [none])]


def _training(drawn: Sequence[str]) -> list[Block]:
    none: Block = Paragraph("Not drawn: the student came with no training history.")
    return [Heading(2, "Training"), *(plots.block("training_loss", drawn) or [none])]


def _writers(document: dict[str, Any]) -> list[str]:
    """The policies whose examples are shown: all but yardsticks."""
    facts = at(document, "policies") or {}
    names = in_order(set(facts) | set(at(document, "overall", "policies") or {}), facts)
    return [name for name in names if at(facts, name, "kind") != "trivial baseline"]


def _limits(document: dict[str, Any]) -> list[Text]:
    lines: list[Text] = [
        "Relevance is the scorer that made the training reward: the student was trained towards it, and the others were not. "
        "Read it together with the judges.",
        "A rejected or empty output counts as relevance 0, and for a judge as a prompt for another intent, for every policy, "
        "so that refusing never pays. A pairwise judge does not see it: it loses.",
        "The reward curve describes accepted prompts, with the rejected share beside it; it counts as rising only if it "
        "also rises with rejected ones as 0.",
        "Length tables count every output with the words it has; the words of a rejected one are those of its text, if any.",
        f"Intervals are from {number(at(document, 'bootstrap'), ',')} bootstrap resamples of intents; those of ratios of "
        f"diversity are from a jackknife of up to {GROUPS} groups of intents.",
        "Intervals cover the choice of intents, not another training run or another seed of the sampler; a judge's score of "
        "prompts for other intents, from which its ratios count, is taken as known.",
        "Speed, memory and cost hold for this machine and these settings; see the environment below.",
    ]
    found = at(document, "judges") or {}
    if not found:
        lines.append("No independent judge was asked: nothing here is free of the training's own scorer.")
    for name, told in found.items():
        if told.get("validated") is False:
            lines.append(["Judge ", Span(name, "code"), " did not prove itself on the controls: do not lean on it."])
        if told.get("is_teacher"):
            said = "'s model is the teacher's own: a leaning towards the teacher's wording is to be expected."
            lines.append(["Judge ", Span(name, "code"), said])
        if told.get("kind") in ("likelihood", "embedding"):
            lines.append(["Judge ", Span(name, "code"), " sees whether the subject is kept, not whether the prompt is good."])
    kinds = {told.get("kind") for told in (at(document, "policies") or {}).values()}
    if "trivial baseline" in kinds:
        lines.append(
            "Yardsticks show what a metric lets through: echo repeats the intent, shuffled answers another intent, best-of-N "
            "picks by the training reward and pays for N draws."
        )
    if TEACHER not in (at(document, "overall", "policies") or {}):
        lines.append("The teacher was not asked: what is said against it has no measurement here.")
    return lines


def _tenths(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"
