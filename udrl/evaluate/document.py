"""The content of ``metrics.json``: every number of an evaluation, and how it was made.

An unknown number or verdict is None, here and on disk. A part rejects unknown keys when code builds it, so that a misspelled
name never looks like a missing number; ``load`` ignores the keys that only other versions know, and accepts the names that
were used until 2026-11-25.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from udrl.commands import CommandVocabulary
from udrl.run import Document

PolicyKind = Literal["student", "teacher", "baseline", "trivial baseline"]
JudgeKind = Literal["gated", "coverage", "likelihood", "embedding", "rubric", "pairwise"]
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
    """A policy's model, how it samples, and the cost of one replica. A trivial baseline has a kind only.

    Rates and costs are None if nothing was timed; times are seconds. A cost per 1,000 is for 1,000 prompts: of GPUs if the
    policy has any, else of cores, and in dollars if the recipe gives a price.
    """

    kind: Annotated[PolicyKind, BeforeValidator(lambda kind: "trivial baseline" if kind == "yardstick" else kind)]
    model: str = "-"
    revision: str | None = None
    sampling: dict[str, JsonValue] = Field(default_factory=dict)
    seed: int | None = None
    parameters: int | None = Field(None, description="None for a model on a hub")
    tokens_per_second: Number = None
    prompts_per_second: Number = None
    prompts_per_second_spread: Interval | None = Field(None, description="median, least and most of the repetitions")
    latency_p50: Number = None
    latency_p95: Number = None
    memory_mib: Number = None
    core_seconds_per_1000: Number = None
    gpu_seconds_per_1000: Number = None
    dollars_per_1000: Number = None


Relation = Literal["independent", "scorer", "teacher", "teacher's family", "baseline"]
# An AUC; files written until 2026-11-25 have it without bounds.
Area = Annotated[
    Interval, BeforeValidator(lambda area: {"value": area} if area is None or isinstance(area, int | float) else area)
]


class JudgeProfile(Part):
    """A judge, how well it tells true pairs of intent and prompt from controls, and how it is related to the policies.

    An AUC is the probability that a true pair scores above a control, or that a pairwise judge prefers the true prompt.
    """

    kind: JudgeKind
    model: str
    unit: str = ""
    relation: Relation = Field("independent", description="by the hash of its weights and of its vocabulary")
    validated: bool = Field(
        validation_alias=AliasChoices("validated", "believable"),
        description="it tells true pairs from every foreseen kind of control, by the whole interval",
    )
    ratio_scale: bool = Field(
        validation_alias=AliasChoices("ratio_scale", "ratio"),
        description="scores above unrelated_score can be divided: the judge is validated and true pairs score above it",
    )
    unrelated_score: Number = Field(
        None,
        validation_alias=AliasChoices("unrelated_score", "unrelated"),
        description="mean score of shuffled pairs of the run: the zero of the scale, and the score of a rejected output",
    )
    gold: dict[ControlKind, Area] = Field(default_factory=dict, description="AUC on hand-written pairs")
    gold_tasks: dict[str, dict[ControlKind, Area]] = Field(default_factory=dict, description="the same by task")
    gold_pairs: int = Field(0, description="hand-written pairs that were scored")
    auc: dict[ControlKind, Area] = Field(default_factory=dict, description="AUC on the run's own pairs")
    tasks: dict[str, dict[ControlKind, Area]] = Field(default_factory=dict, description="the same by task")
    pairs: int = Field(0, description="true pairs of the run that were scored")
    parse_failures: Number = Field(None, description="share of answers that were not one; None unless the judge generates")
    position_bias: Number = Field(None, description="preference for the first of two prompts; pairwise judges only")

    @model_validator(mode="before")
    @classmethod
    def _accept_old_relation(cls, values: Any) -> Any:
        """Accept ``is_teacher`` or ``of_teacher``, as in files written until 2026-11-25."""
        if not isinstance(values, dict):
            return values
        old = [values.get("is_teacher"), values.get("of_teacher")]
        known = {name: value for name, value in values.items() if name not in ("is_teacher", "of_teacher")}
        return {"relation": "teacher", **known} if any(old) else known


# ---- quality


Quality = Literal["relevance", "coverage", "clean"]  # a rejected output is a miss: 0


class PolicyScores(Part):
    """A policy's outputs of the default probe. A rejected one is a miss, and has a judge's score of unrelated prompts."""

    n: int
    rejected: Number
    words: Number = Field(description="mean of the accepted prompts")
    relevance: Interval
    coverage: Interval = Field(UNKNOWN, description="share of the subject's words, or of the intent's content words, kept")
    clean: Interval = Field(UNKNOWN, description="share of outputs that say nothing twice")
    accepted: dict[Quality, Interval] = Field(default_factory=dict, description="the same three among accepted prompts")
    repetition: "Repetition | None" = None
    copied_8: Interval = Field(
        UNKNOWN, description="mean share of an accepted prompt's runs of 8 words that stand in training prompts"
    )
    judges: dict[str, Interval] = Field(default_factory=dict, description="by pointwise judge")


class Repetition(Part):
    """Shares of accepted prompts."""

    doubled_word: Number = Field(description="the same word twice in a row")
    repeated_pair: Number = Field(description="a word pair twice")
    repeated_trigram: Number


class PairedComparison(Part):
    """The student minus, and over, another policy."""

    difference: Interval
    ratio: Interval


class RelevanceComparison(PairedComparison):
    ratio_accepted: Interval = Field(description="without the rejected prompts of either side")


class JudgeComparison(Part):
    difference: Interval
    ratio: Interval = Field(
        description="of scores above unrelated_score; unknown without a ratio scale, or if the other is not surely above it"
    )


class PairwiseComparison(Part):
    """How often a pairwise judge prefers the student's prompt."""

    preferred: Interval = Field(description="mean preference, 0.5 is even; unknown if the judge answered for no pair")
    n: int = Field(description="pairs with a verdict")
    settled: int = Field(description="of these, decided without the judge because a prompt was rejected")
    consistent: Number = Field(description="share of the judge's own verdicts with the same winner in both orders")


class PolicyComparison(Part):
    """The student minus, or over, another policy, paired by intent."""

    relevance: RelevanceComparison
    coverage: PairedComparison | None = None
    clean: PairedComparison | None = None
    copied_8: PairedComparison | None = None
    judges: dict[str, JudgeComparison] = Field(default_factory=dict)
    pairwise: dict[str, PairwiseComparison] = Field(default_factory=dict)


# ---- control


class LengthShares(Part):
    """Shares of outputs by their distance in words from the commanded length."""

    exact: Number
    within_1: Number
    within_2: Number
    within_10pct: Number = Field(description="share within 10% of the commanded words")


class LengthErrors(LengthShares):
    """Commanded against achieved words of ``n`` outputs: a rejected one misses in every share, and is not in the means."""

    n: int
    rejected: Number = None
    accepted: LengthShares | None = Field(None, description="the shares among accepted outputs")
    mean: Number = Field(description="achieved words")
    mae: Number
    bias: Number = Field(description="mean of achieved minus commanded words")


class LengthLevel(LengthErrors):
    """The outputs of one commanded length."""

    words: int
    p10: Number
    p90: Number


class LengthControl(LengthErrors):
    within_2_interval: Interval = UNKNOWN
    spearman: Number
    rises: bool | None = Field(
        description="every step between commanded lengths is up, by its whole interval, on every task; None if that is open"
    )
    levels: list[LengthLevel] | None = Field(None, description="None over all tasks, since their lengths differ")


class RewardCurve(Part):
    """Accepted prompts by commanded reward bin, as relevance or one judge scores them."""

    spearman: Number
    difference: Interval = Field(description="top bin minus bottom bin, paired by intent; unknown with fewer than two bins")
    monotone: bool | None = Field(
        description="every step is up, by its whole interval; False if one is surely not; None if that is open"
    )


class RewardLevel(Part):
    """The outputs of one commanded bin; intervals are of the accepted prompts."""

    bin: int
    n: int
    rejected: Number
    relevance: Interval
    reward: Interval
    judges: dict[str, Interval] = Field(default_factory=dict)


class RewardControl(RewardCurve):
    rises: bool | None = Field(
        description="top bin above bottom bin, by the whole interval, among accepted prompts and with rejected ones as 0"
    )
    levels: list[RewardLevel] = Field(default_factory=list)
    judges: dict[str, RewardCurve] = Field(default_factory=dict)


# ---- diversity, accuracy, novelty


class DiversityFigures(Part):
    """One policy's diversity across intents and within them; None if it has too few prompts.

    Lower is more varied in ``compression`` and ``self_bleu``, higher in the others.
    """

    distinct_1: Number = None
    distinct_2: Number = None
    compression: Number = None
    self_bleu: Number = None
    vendi: Number = None
    within_distance: Number = None
    within_vendi: Number = None


class DiversityRatios(Part):
    """The student's figures over another policy's; unknown unless both have them on every task."""

    distinct_2: Interval
    vendi: Interval


class Diversity(Part):
    words: float = Field(description="words that every prompt is cut to")
    n: int = Field(description="prompts of each policy")
    fewest: int | None = Field(None, description="n of the task with the fewest; None within a task")
    policies: dict[str, DiversityFigures]
    ratios: dict[str, DiversityRatios] = Field(default_factory=dict, description="by other policy, trivial baselines left out")


class TaskAccuracy(Part):
    """Shares of a policy's outputs; a rejected one is neither recognized nor well-formed. None: not measured."""

    recognized: Number = Field(
        description="assigned to their own task by a classifier that was trained on the teacher's prompts"
    )
    well_formed: Number = Field(description="keep the task's format rules")
    recognized_accepted: Number = Field(description="the same among accepted prompts")
    well_formed_accepted: Number


class CopiedShares(Part):
    exact: Number = Field(description="share of prompts that are training prompts")
    copied_5: Number = Field(description="mean share of a prompt's 5-grams that stand in training prompts")
    copied_8: Number


class Novelty(Part):
    training: int = Field(description="training prompts; 0 if they are unknown")
    policies: dict[str, CopiedShares]


# ---- verdicts


class ClaimPart(Part):
    name: str = Field(validation_alias=AliasChoices("name", "what"))
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

    name: str = Field(validation_alias=AliasChoices("name", "target"))
    met: bool | None = Field(description="None: open, or not measured")
    measured: str


# ---- the whole


class Scope(Part):
    """Everything that is measured over all tasks together, and within one."""

    policies: dict[str, PolicyScores]
    comparisons: dict[str, PolicyComparison] = Field(
        validation_alias=AliasChoices("comparisons", "against"), description="by other policy; empty without a student"
    )
    diversity: Diversity
    length: LengthControl = Field(description="lengths between the 5th and the 95th percentile of training")
    reach: LengthControl = Field(description="lengths outside")
    accuracy: dict[str, TaskAccuracy] = Field(default_factory=dict, description="by policy")

    @model_validator(mode="before")
    @classmethod
    def _accept_old_accuracy(cls, values: Any) -> Any:
        """Accept one table per measure instead of one per policy, as in files written until 2026-11-25."""
        accuracy = values.get("accuracy") if isinstance(values, dict) else None
        if not isinstance(accuracy, dict) or "classifier" not in accuracy:
            return values
        recognized, well_formed = (accuracy[name]["policies"] for name in ("classifier", "format"))
        unknown = {"recognized_accepted": None, "well_formed_accepted": None}
        by_policy = {
            policy: {"recognized": recognized.get(policy), "well_formed": well_formed.get(policy), **unknown}
            for policy in {**recognized, **well_formed}
        }
        return {**values, "accuracy": by_policy}


class TaskScope(Scope):
    reward: RewardControl


class Measurements(Part):
    """All that follows from the tables of outputs and of comparisons."""

    intents: int
    rows: int
    bootstrap: int = Field(description="resamples of an interval")
    seed: int
    overall: Scope
    tasks: dict[str, TaskScope]
    novelty: Novelty
    claim: Claim
    targets: list[Target]


class Environment(Part):
    """The machine and the versions that the numbers were measured on."""

    python: str = ""
    cores: int
    machine: str
    packages: dict[str, str] = Field(default_factory=dict, description="name -> version")

    @model_validator(mode="before")
    @classmethod
    def _nest_packages(cls, values: Any) -> Any:
        """Accept packages next to the other keys, as in files written until 2026-11-25."""
        if not isinstance(values, dict) or "packages" in values:
            return values
        own = {name: value for name, value in values.items() if name in cls.model_fields}
        return {**own, "packages": {name: value for name, value in values.items() if name not in own}}


class EvaluationDocument(Measurements):
    """``metrics.json``."""

    name: str = Field(description="of the run")
    source: str = Field(description="of the intents")
    policies: dict[str, PolicyProfile]
    judges: dict[str, JudgeProfile]
    losses: list[tuple[int, Number]] = Field(default_factory=list, description="training history: step, loss; empty if unknown")
    commands: CommandVocabulary
    environment: Environment
    recipe: str = Field(description="resolved, as YAML")
    seconds: dict[str, float] = Field(description="of each phase of the evaluation")
