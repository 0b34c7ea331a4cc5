"""Which policies, judges and scopes the report shows, and in which order."""

from collections.abc import Iterable, Mapping

from udrl.evaluate.document import EvaluationDocument, JudgeProfile, PolicyProfile, Scope
from udrl.evaluate.judges.validation import weakest
from udrl.evaluate.metrics.claim import deciding_judges
from udrl.evaluate.outputs import TEACHER

KIND_ORDER = ("student", "teacher", "baseline", "trivial baseline")


def order_policies(names: Iterable[str], profiles: Mapping[str, PolicyProfile]) -> list[str]:
    """Sort policies: student, teacher, baselines, trivial baselines; by name within a kind."""
    return sorted(names, key=lambda name: (KIND_ORDER.index(profiles[name].kind), name))


def writers(document: EvaluationDocument) -> list[str]:
    """Return the policies that have a model: all except trivial baselines."""
    names = order_policies(document.policies, document.policies)
    return [name for name in names if document.policies[name].kind != "trivial baseline"]


def reference_policy(document: EvaluationDocument) -> str | None:
    """Return the policy that the student is compared with first: the teacher, or the first baseline if it did not write."""
    others = [name for name in writers(document)[1:] if name in document.overall.comparisons]
    return TEACHER if TEACHER in others else next(iter(others), None)


def ordered_judges(document: EvaluationDocument) -> dict[str, JudgeProfile]:
    """Return the judges, best first: deciding ones, validated ones, by their weakest control."""
    deciding = deciding_judges(document.judges)

    def rank(name: str) -> tuple[int, bool, float]:
        judge = document.judges[name]
        place = deciding.index(name) if name in deciding else len(deciding)
        return place, not judge.validated, -(weakest(judge.deciding_areas)[1].low or 0.0)

    return {name: document.judges[name] for name in sorted(document.judges, key=rank)}


def validated_judges(document: EvaluationDocument) -> list[str]:
    """Return the validated judges, best first; the first one is to be read next to relevance."""
    return [name for name, judge in ordered_judges(document).items() if judge.validated]


def scopes(document: EvaluationDocument) -> list[tuple[str, Scope]]:
    """Return each task, followed by all of them together, named "", if there are several."""
    tasks: list[tuple[str, Scope]] = list(document.tasks.items())
    return tasks if len(tasks) == 1 else [*tasks, ("", document.overall)]
