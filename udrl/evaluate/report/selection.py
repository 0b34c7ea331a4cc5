"""Which policies, judges and scopes the report shows, and in which order."""

from collections.abc import Iterable, Mapping

from udrl.evaluate.document import EvaluationDocument, JudgeProfile, PolicyProfile, Scope
from udrl.evaluate.judges.validation import weakest
from udrl.evaluate.metrics.claim import deciding_judges
from udrl.evaluate.outputs import TEACHER

KIND_ORDER = ("student", "teacher", "baseline", "trivial baseline")


def order_policies(names: Iterable[str], profiles: Mapping[str, PolicyProfile]) -> list[str]:
    """Sort policies: student, teacher, baselines, trivial baselines; by name within a kind."""
    return sorted(names, key=lambda name: (KIND_ORDER.index(kind_of(name, profiles)), name))


def kind_of(name: str, profiles: Mapping[str, PolicyProfile]) -> str:
    """Return a policy's kind; one without a profile counts as a baseline unless its name says otherwise."""
    if name in profiles:
        return profiles[name].kind
    return name if name in KIND_ORDER else "baseline"


def writers(document: EvaluationDocument) -> list[str]:
    """Return the policies that have a model: all except trivial baselines."""
    names = order_policies(document.policies.keys() | document.overall.policies.keys(), document.policies)
    return [name for name in names if kind_of(name, document.policies) != "trivial baseline"]


def reference_policy(document: EvaluationDocument) -> str | None:
    """Return the policy that the student is compared with first: the teacher, or the first baseline if it did not write."""
    names = document.overall.policies
    if TEACHER in names:
        return TEACHER
    ordered = order_policies(names, document.policies)
    return next((name for name in ordered if kind_of(name, document.policies) == "baseline"), None)


def pointwise_judges(document: EvaluationDocument) -> dict[str, JudgeProfile]:
    """Return the judges that score single prompts, best first: deciding ones, validated ones, by their weakest control."""
    deciding = deciding_judges(document.judges)

    def rank(entry: tuple[str, JudgeProfile]) -> tuple[int, bool, float]:
        name, judge = entry
        place = deciding.index(name) if name in deciding else len(deciding)
        return place, not judge.validated, -(weakest(judge.gold or judge.auc)[1].low or 0.0)

    judges = [(name, judge) for name, judge in document.judges.items() if judge.kind != "pairwise"]
    return dict(sorted(judges, key=rank))


def pairwise_judges(document: EvaluationDocument) -> list[str]:
    return [name for name, judge in document.judges.items() if judge.kind == "pairwise"]


def validated_judges(document: EvaluationDocument) -> list[str]:
    """Return the validated pointwise judges, best first."""
    return [name for name, judge in pointwise_judges(document).items() if judge.validated]


def best_judge(document: EvaluationDocument) -> str | None:
    """Return the pointwise judge to read next to relevance, None if none is validated."""
    return next(iter(validated_judges(document)), None)


def scopes(document: EvaluationDocument) -> list[tuple[str, Scope]]:
    """Return each task, followed by all of them together, named "", if there are several."""
    tasks: list[tuple[str, Scope]] = list(document.tasks.items())
    return tasks if len(tasks) == 1 else [*tasks, ("", document.overall)]
