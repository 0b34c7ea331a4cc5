"""The report convicts students that are bad by construction, and acquits the teacher as its own student.

The teacher's prompts are those of the gold set; judges, metrics and verdicts are real. The scorer likes every bad student, as a
cosine likes an echo.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fakes.fake_evaluation import document, embed, row

from udrl.evaluate.document import EvaluationDocument
from udrl.evaluate.judges.controls import Pair, gold_pairs, shuffle_intents
from udrl.evaluate.judges.judging import ask_judges
from udrl.evaluate.metrics import compute as metrics
from udrl.evaluate.outputs import OUTPUTS
from udrl.evaluate.report.render import render_markdown
from udrl.hashing import stable_id
from udrl.intents.content_words import content_words
from udrl.recipe import Recipe
from udrl.run import EvaluationPaths
from udrl.tasks import load_tasks

NAMES = ["text_to_image", "text_to_template", "text_to_video", "image_search"]
TASKS = load_tasks(NAMES)
GOLD = [pair for name in NAMES for pair in gold_pairs(name)[60:110]]
OTHERS = dict(zip(GOLD, shuffle_intents([p.intent for p in GOLD], [p.task for p in GOLD]), strict=True))
PROMPT_OF = {(pair.task, pair.intent): pair.prompt for pair in GOLD}
# One long prompt a task, learned by heart; training holds it.
LEARNED = {name: max((pair.prompt for pair in gold_pairs(name)[:60]), key=len) for name in NAMES}


def echo(pair: Pair) -> str:
    return pair.intent


def loop(pair: Pair) -> str:
    words = pair.prompt.split()[:3]
    return " ".join(words * (len(pair.prompt.split()) // 3))


def shuffled(pair: Pair) -> str:
    return PROMPT_OF[pair.task, OTHERS[pair]]


def memorizer(pair: Pair) -> str:
    return LEARNED[pair.task]


def teacher(pair: Pair) -> str:
    return pair.prompt


def evaluate(student: Callable[[Pair], str], folder: Path) -> tuple[EvaluationDocument, str]:
    """Return the document of an evaluation of ``student`` and its report."""

    def output(policy: str, pair: Pair, prompt: str, relevance: float) -> dict[str, Any]:
        values = {"prompt": prompt, "n_words": len(prompt.split()), "relevance": relevance, "reward": relevance}
        return row(pair.task, policy=policy, **values) | {"intent": pair.intent, "intent_id": stable_id(pair.intent)}

    rng = np.random.default_rng(0)
    rows = [output("teacher", pair, pair.prompt, rng.uniform(0.4, 0.6)) for pair in GOLD]
    rows += [output("student", pair, student(pair), rng.uniform(0.6, 0.9)) for pair in GOLD]
    outputs = pa.Table.from_pylist(rows, schema=OUTPUTS)
    recipe = Recipe.model_validate({"name": "verdicts", "storage": str(folder), "tasks": NAMES, "intents": {"limit": 9}})
    judged = ask_judges(recipe, TASKS, outputs, EvaluationPaths(str(folder)))
    measured = metrics.compute(
        judged.outputs,
        judges=judged.judges,
        training=[pa.table({"prompt": list(LEARNED.values())})],
        embed=embed,
        subject_words={stable_id(pair.intent): content_words(pair.intent) for pair in GOLD},
        bootstrap=300,
    )
    changes = {**dict(measured), "judges": judged.judges}
    whole = document(tuple(NAMES), {"student": "student", "teacher": "teacher"}).model_copy(update=changes)
    return whole, render_markdown(whole, judged.outputs, [])


@pytest.mark.parametrize(
    ("student", "target"),
    [
        (echo, None),
        (loop, "say nothing twice"),
        (shuffled, "subject's words"),
        (memorizer, "copies runs of 8 words"),
    ],
)
def test_a_student_that_is_bad_by_construction_is_convicted(
    student: Callable[[Pair], str], target: str | None, tmp_path: Path
) -> None:
    evaluation, report = evaluate(student, tmp_path)
    assert evaluation.claim.met is False
    missed = [part.name for part in evaluation.claim.parts if part.met is False]
    assert "relevance (judge gated) against teacher" in missed
    assert "**No.** The student is not within 6% of the teacher" in report
    assert evaluation.overall.comparisons["teacher"].relevance.low > 1, "the scorer likes this student"
    if target:
        (verdict,) = [one for one in evaluation.targets if target in one.name]
        assert verdict.met is False


def test_the_teacher_as_its_own_student_is_acquitted(tmp_path: Path) -> None:
    evaluation, report = evaluate(teacher, tmp_path)
    assert evaluation.claim.met is True
    assert len([part for part in evaluation.claim.parts if part.name.startswith("relevance (judge")]) == 2
    assert "**Yes.** The student is within 6% of the teacher" in report
    measured = [one for one in evaluation.targets if one.measured != "-" and "every task" not in one.name]
    assert {one.met for one in measured} == {True}
