"""Reading an evaluation's document, of which any part may be missing."""

from typing import Any

from udrl.evaluate.outputs import STUDENT, TEACHER
from udrl.evaluate.report.blocks import Span
from udrl.evaluate.report.markdown import number


def at(found: Any, *path: str) -> Any:
    """What lies under the keys of ``path``; None where one of them is not there."""
    for key in path:
        if not isinstance(found, dict):
            return None
        found = found.get(key)
    return found


def in_order(names: set[str], facts: dict[str, Any]) -> list[str]:
    """The policies as the report lists them: student, teacher, baselines, yardsticks; by name within a kind."""
    place = {kind: i for i, kind in enumerate((STUDENT, TEACHER, "baseline", "trivial baseline"))}
    return sorted(names, key=lambda name: (place.get(kind(name, facts), 2), name))


def kind(name: str, facts: dict[str, Any]) -> str:
    """A policy's kind; one that nothing is told of is of its own."""
    return at(facts, name, "kind") or name


def reference(document: dict[str, Any]) -> str | None:
    """Whom the student is held against first: the teacher, or the first baseline where the teacher was not asked."""
    measured, facts = at(document, "overall", "policies") or {}, at(document, "policies") or {}
    if TEACHER in measured:
        return TEACHER
    return next((name for name in in_order(set(measured), facts) if kind(name, facts) == "baseline"), None)


def pointwise(document: dict[str, Any]) -> list[str]:
    """The judges that score one prompt at a time, best first: believable, not of the teacher's model, by AUC."""
    judges = {name: told for name, told in (at(document, "judges") or {}).items() if told.get("kind") != "pairwise"}

    def worth(name: str) -> tuple[bool, bool, float]:
        told = judges[name]
        return not told.get("validated"), bool(told.get("is_teacher")), -(at(told, "auc", "shuffled") or 0.0)

    return sorted(judges, key=worth)


def best_judge(document: dict[str, Any]) -> str | None:
    """The pointwise judge to read beside relevance; None where none proved itself."""
    return next((name for name in pointwise(document) if at(document, "judges", name, "validated")), None)


def seconds(value: float | None) -> str:
    """``340 ms``, ``2.1 s``."""
    if value is None:
        return "-"
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def signed(value: float | None) -> str:
    """``+0.12``; what rounds to nothing is ``+0.00``."""
    return number(value, "+z.2f")


def scopes(document: dict[str, Any]) -> list[tuple[Span, dict[str, Any]]]:
    """The tasks, and the line over all of them where there are several."""
    tasks = [(Span(name, "code"), scope) for name, scope in (at(document, "tasks") or {}).items()]
    return tasks if len(tasks) == 1 else [*tasks, (Span("all tasks", "strong"), at(document, "overall") or {})]
