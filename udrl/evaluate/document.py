"""The content of ``metrics.json``: every number of an evaluation, and how it was made.

An unknown number or verdict is None, here and on disk. A part rejects unknown keys when code builds it, so that a misspelled
name never looks like a missing number. ``jobs.compare`` reads files of every version by its own, smaller view
(:mod:`udrl.evaluate.compare.evaluated_runs`).
"""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, JsonValue

from udrl.run import Document

PolicyKind = Literal["student", "teacher", "baseline", "trivial baseline"]
JudgeKind = Literal["gated", "coverage", "rubric"]
# Prompts that are worse than the true one by construction; see udrl.evaluate.judges.controls.
ControlKind = Literal[
    "shuffled",
    "echo",
    "stuffed",
    "truncated",
    "near_echo",
    "loop",
    "salad",
    "wrong_task",
    "reversed",
    "spliced",
    "other_subject",
]


def _none_if_not_finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_none_if_not_finite)]  # None: unknown; NaN becomes None


class Part(Document):
    """A part of the document."""

    model_config = ConfigDict(extra="forbid")


class Interval(Part):
    """An estimate with its 95% bounds. Without bounds nothing was resampled; without a value nothing was measured."""

    value: Number
    low: Number = None
    high: Number = None


UNKNOWN = Interval(value=None)


# ---- policies and judges


class PolicyProfile(Part):
    """A policy's model, how it samples, and the speed of one replica. A trivial baseline has a kind only.

    Speeds are None if nothing was timed; times are seconds.
    """

    kind: PolicyKind
    model: str = "-"
    revision: str | None = None
    sampling: dict[str, JsonValue] = Field(default_factory=dict)
    seed: int | None = None
    parameters: int | None = Field(None, description="None for a model on a hub")
    tokens_per_second: Number = None
    prompts_per_second: Interval = Field(UNKNOWN, description="median, least and most of the repetitions")
    latency_p50: Number = None
    latency_p95: Number = None
    memory_mib: Number = None
    dollars_per_1000: Number = Field(None, description="cost of 1,000 prompts, if the recipe gives a price")


Relation = Literal["independent", "scorer", "teacher", "teacher's family", "baseline"]
Areas = dict[ControlKind, Interval]  # AUC against each kind of control


class JudgeProfile(Part):
    """A judge, how well it tells true pairs of intent and prompt from controls, and how it is related to the policies.

    An AUC is the probability that a true pair scores above a control.
    """

    kind: JudgeKind
    model: str
    relation: Relation = Field("independent", description="by the hash of its weights and of its vocabulary")
    validated: bool = Field(description="it tells true pairs from every foreseen kind of control, by the whole interval")
    ratio_scale: bool = Field(
        description="scores above unrelated_score can be divided: the judge is validated and true pairs score above it"
    )
    unrelated_score: Number = Field(
        None,
        description="mean score of shuffled pairs of the run: the zero of the scale, and the score of a rejected output",
    )
    gold: Areas = Field(default_factory=dict, description="on hand-written pairs")
    gold_tasks: dict[str, Areas] = Field(default_factory=dict, description="the same by task")
    gold_pairs: int = Field(0, description="hand-written pairs that were scored")
    auc: Areas = Field(default_factory=dict, description="on the run's own pairs")
    tasks: dict[str, Areas] = Field(default_factory=dict, description="the same by task")
    pairs: int = Field(0, description="true pairs of the run that were scored")
    parse_failures: Number = Field(None, description="share of answers that were not one; None unless the judge generates")

    @property
    def deciding_areas(self) -> Areas:
        """The AUCs that validate it: on the gold set, or on the run's own pairs if its tasks have no gold."""
        return self.gold or self.auc


# ---- quality


Quality = Literal["relevance", "coverage", "clean"]  # a rejected output is a miss: 0


class PolicyScores(Part):
    """A policy's outputs of the default probe. A rejected one is a miss, and has a judge's score of unrelated prompts."""

    n: int
    rejected: Number
    reasons: dict[str, int] = Field(default_factory=dict, description="rejected outputs by reason")
    words: Number = Field(description="mean of the accepted prompts")
    relevance: Interval
    coverage: Interval = Field(UNKNOWN, description="share of the subject's words, or of the intent's content words, kept")
    clean: Interval = Field(UNKNOWN, description="share of outputs that say nothing twice")
    accepted: dict[Quality, Interval] = Field(default_factory=dict, description="the same three among accepted prompts")
    copied_8: Interval = Field(
        UNKNOWN, description="mean share of an accepted prompt's runs of 8 words that stand in training prompts"
    )
    judges: dict[str, Interval] = Field(default_factory=dict)


class PolicyComparison(Part):
    """The student against another policy, paired by intent: ratios of means, except of ``copied_8``.

    A judge's ratio is of scores above its unrelated_score. It is unknown without a ratio scale, or if the other policy is not
    surely above that score.
    """

    relevance: Interval
    relevance_accepted: Interval = Field(description="without the rejected prompts of either side")
    coverage: Interval
    clean: Interval
    copied_8: Interval = Field(description="student minus other; unknown if training is")
    judges: dict[str, Interval] = Field(default_factory=dict)


# ---- control


class LengthLevel(Part):
    """Achieved words of the accepted outputs of one commanded length."""

    words: int = Field(description="commanded")
    mean: Number
    p10: Number
    p90: Number


class LengthControl(Part):
    """Commanded against achieved words of ``n`` outputs: a rejected one misses, and is not in the means."""

    n: int
    rejected: Number
    mean: Number = Field(description="achieved words")
    mae: Number
    exact: Number = Field(description="share with the commanded number of words")
    within_2: Interval = Field(description="share at most two words off")
    within_2_accepted: Number = Field(description="the same among accepted outputs")
    spearman: Number
    rises: bool | None = Field(
        description="every step between commanded lengths is up, by its whole interval, on every task; None if that is open"
    )
    levels: list[LengthLevel] = Field(default_factory=list, description="empty over all tasks, since their lengths differ")


class RewardCurve(Part):
    """Accepted prompts by commanded reward bin, as relevance or one judge scores them."""

    spearman: Number
    difference: Interval = Field(description="top bin minus bottom bin, paired by intent; unknown with fewer than two bins")
    means: list[Interval] = Field(description="of each bin")


class RewardControl(Part):
    bins: list[int]
    rejected: list[Number] = Field(description="share of each bin")
    rises: bool | None = Field(
        description="top bin above bottom bin, by the whole interval, among accepted prompts and with rejected ones as 0"
    )
    relevance: RewardCurve
    judges: dict[str, RewardCurve] = Field(default_factory=dict)


# ---- diversity


class DiversityFigures(Part):
    """One policy's diversity across intents; None if it has too few prompts."""

    distinct_2: Number = None
    vendi: Number = None


class DiversityRatios(Part):
    """The student's figures over another policy's; unknown unless both have them on every task."""

    distinct_2: Interval
    vendi: Interval


class Diversity(Part):
    words: float = Field(description="words that every prompt is cut to")
    n: int = Field(description="prompts of each policy")
    fewest: int = Field(description="n of the task with the fewest")
    policies: dict[str, DiversityFigures]
    ratios: dict[str, DiversityRatios] = Field(default_factory=dict, description="by other policy, trivial baselines left out")


# ---- verdicts


class ClaimPart(Part):
    name: str
    interval: Interval
    met: bool | None = Field(description="None: open")


class Claim(Part):
    """Whether the student is as good as the others: met if all parts are, missed if one is, else open (None)."""

    met: bool | None
    text: str
    bound: float = Field(description="of student over other")
    parts: list[ClaimPart]


class Target(Part):
    """A target is met if the whole interval is on its right side, missed if all of it is on the wrong one, else open."""

    name: str
    met: bool | None = Field(description="None: open, or not measured")
    measured: str


# ---- the whole


class Scope(Part):
    """Everything that is measured over all tasks together, and within one."""

    policies: dict[str, PolicyScores]
    comparisons: dict[str, PolicyComparison] = Field(description="by other policy; empty without a student")
    diversity: Diversity
    length: LengthControl = Field(description="lengths between the 5th and the 95th percentile of training")
    reach: LengthControl = Field(description="lengths outside")


class TaskScope(Scope):
    reward: RewardControl


class Measurements(Part):
    """All that follows from the table of outputs."""

    intents: int
    rows: int
    bootstrap: int = Field(description="resamples of an interval")
    seed: int
    training_prompts: int = Field(description="in which copies were looked for; 0 if they are unknown")
    overall: Scope
    tasks: dict[str, TaskScope]
    claim: Claim
    targets: list[Target]


class Environment(Part):
    """The machine and the versions that the numbers were measured on."""

    python: str
    cores: int
    machine: str
    packages: dict[str, str] = Field(description="name -> version")


class EvaluationDocument(Measurements):
    """``metrics.json``."""

    name: str = Field(description="of the run")
    source: str = Field(description="of the intents")
    policies: dict[str, PolicyProfile]
    judges: dict[str, JudgeProfile]
    environment: Environment
    recipe: str = Field(description="resolved, as YAML")
