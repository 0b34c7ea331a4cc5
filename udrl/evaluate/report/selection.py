"""Which policies, judges and scopes the report shows, and in which order."""

from collections.abc import Iterable, Mapping

from udrl.evaluate.document import EvaluationDocument, JudgeProfile, PolicyProfile, Scope
from udrl.evaluate.outputs import TEACHER
from udrl.evaluate.report.blocks import Span

KIND_ORDER = ("student", "teacher", "baseline", "trivial baseline")


def order_policies(names: Iterable[str], profiles: Mapping[str, PolicyProfile]) -> list[str]:
    """Sort policies: student, teacher, baselines, trivial baselines; by name within a kind."""
    return sorted(names, key=lambda name: (KIND_ORDER.index(kind_of(name, profiles)), name))


def kind_of(name: str, profiles: Mapping[str, PolicyProfile]) -> str:
    """Return a policy's kind; one without a profile counts as a baseline unless its name says otherwise."""
    if name in profiles:
        return profiles[name].kind
    return name if name in KIND_ORDER else "baseline"


def reference_policy(document: EvaluationDocument) -> str | None:
    """Return the policy that the student is compared with first: the teacher, or the first baseline if it did not write."""
    names = document.overall.policies
    if TEACHER in names:
        return TEACHER
    ordered = order_policies(names, document.policies)
    return next((name for name in ordered if kind_of(name, document.policies) == "baseline"), None)


def pointwise_judges(document: EvaluationDocument) -> dict[str, JudgeProfile]:
    """Return the judges that score single prompts, best first: validated, not the teacher's model, by AUC."""

    def rank(entry: tuple[str, JudgeProfile]) -> tuple[bool, bool, float]:
        _, judge = entry
        return not judge.validated, judge.is_teacher, -(judge.auc.get("shuffled") or 0.0)

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


def scopes(document: EvaluationDocument) -> list[tuple[Span, Scope]]:
    """Return each task, followed by the line over all of them if there are several."""
    tasks: list[tuple[Span, Scope]] = [(Span(name, "code"), scope) for name, scope in document.tasks.items()]
    return tasks if len(tasks) == 1 else [*tasks, (Span("all tasks", "strong"), document.overall)]
