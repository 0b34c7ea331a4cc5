"""A run: every path under its storage URI, and the typed documents that stages exchange.

Layout under the storage URI::

    recipe.yaml                      the resolved recipe
    README.md, card/                 the dataset card and its plots
    plan.json                        GenerationPlan: the cost expected by a dry run
    intents/<fingerprint>/           train, heldout, rejects and, if the teacher grew them, expanded intents (Parquet)
    expansion/<fingerprint>/         completions of the requests that grew the intents
    completions/<fingerprint>/       the ledger: every completion that was paid for, raw; attempts/ has the cost of each attempt
    filtered/, relevance/            intermediate results of scoring
    episodes/, rejects/              accepted and scored prompts; the others with their reasons
    generate.json                    GenerateSummary
    student_data/<fingerprint>/      packed rows and the tokenizer
    checkpoints/<fingerprint>/       training state
    student/                         the exported model of the last round; training.json is written last
    rounds/<k>/                      completions/ to rejects/ as above, round.json (RoundRecord), student/
    rounds.json                      RoundsSummary
    evaluation/                      report.html, report.md, metrics.json, outputs.parquet; work/ is kept for the next
"""

from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from udrl import storage
from udrl.errors import UserError
from udrl.hashing import differences, fingerprint

# ---- paths


@dataclass(frozen=True)
class ScoringPaths:
    """Completions and what scoring makes of them; a run, each round and each evaluated policy have one such folder."""

    folder: str

    def ledger(self, fingerprint: str) -> str:
        return storage.join(self.ledgers, fingerprint)

    @property
    def ledgers(self) -> str:
        return storage.join(self.folder, "completions")

    @property
    def filtered(self) -> str:
        return storage.join(self.folder, "filtered")

    @property
    def sifted(self) -> str:
        """The name of ``filtered`` in runs made before 2026-11-25."""
        return storage.join(self.folder, "sifted")

    @property
    def relevance(self) -> str:
        return storage.join(self.folder, "relevance")

    @property
    def episodes(self) -> str:
        return storage.join(self.folder, "episodes")

    @property
    def rejects(self) -> str:
        return storage.join(self.folder, "rejects")

    @property
    def scored(self) -> list[str]:
        """The folders that scoring writes; all of them can be made again from the ledger."""
        return [self.filtered, self.sifted, self.relevance, self.episodes, self.rejects]


@dataclass(frozen=True)
class IntentPaths:
    """The intents of one source, as Parquet files."""

    folder: str

    @property
    def train(self) -> str:
        return storage.join(self.folder, "train.parquet")

    @property
    def heldout(self) -> str:
        return storage.join(self.folder, "heldout.parquet")

    @property
    def rejects(self) -> str:
        return storage.join(self.folder, "rejects.parquet")

    @property
    def expanded(self) -> str:
        return storage.join(self.folder, "expanded.parquet")

    @property
    def train_expanded(self) -> str:
        """All training intents, those grown by the teacher included."""
        return storage.join(self.folder, "train_expanded.parquet")

    @property
    def expansion(self) -> str:
        return storage.join(self.folder, "expanded.json")


@dataclass(frozen=True)
class PackedDataPaths:
    """Packed rows and the tokenizer of one training."""

    folder: str

    @property
    def tokenizer(self) -> str:
        return storage.join(self.folder, "tokenizer")

    def rows(self, split: Literal["train", "validation"]) -> str:
        return storage.join(self.folder, split)

    @property
    def embeddings(self) -> str:
        """The embeddings that pieces of the teacher's vocabulary start from; absent if the student has its own vocabulary."""
        return storage.join(self.folder, "embeddings.safetensors")

    @property
    def validation_intents(self) -> str:
        """A few validation intents of each task, to sample from during training."""
        return storage.join(self.folder, "held.json")

    @property
    def summary(self) -> str:
        """:class:`PackedDataSummary`, written last."""
        return storage.join(self.folder, "done.json")


@dataclass(frozen=True)
class StudentPaths:
    """An exported student: a Hugging Face folder with ``commands.json`` and ``training.json``."""

    folder: str

    @property
    def config(self) -> str:
        """The model configuration of transformers."""
        return storage.join(self.folder, "config.json")

    @property
    def commands(self) -> str:
        """:class:`udrl.commands.CommandVocabulary`."""
        return storage.join(self.folder, "commands.json")

    @property
    def training(self) -> str:
        """:class:`TrainingSummary`, written last: if it is there, the export is complete."""
        return storage.join(self.folder, "training.json")


@dataclass(frozen=True)
class RoundPaths:
    folder: str

    @property
    def scoring(self) -> ScoringPaths:
        return ScoringPaths(self.folder)

    @property
    def record(self) -> str:
        return storage.join(self.folder, "round.json")

    @property
    def student(self) -> StudentPaths:
        return StudentPaths(storage.join(self.folder, "student"))


@dataclass(frozen=True)
class EvaluationPaths:
    folder: str

    @property
    def metrics(self) -> str:
        return storage.join(self.folder, "metrics.json")

    @property
    def outputs(self) -> str:
        return storage.join(self.folder, "outputs.parquet")

    @property
    def report_markdown(self) -> str:
        return storage.join(self.folder, "report.md")

    @property
    def report_html(self) -> str:
        return storage.join(self.folder, "report.html")

    def plot(self, name: str) -> str:
        return storage.join(self.folder, f"{name}.png")

    @property
    def work(self) -> str:
        """Completions and judgments, kept for the next evaluation."""
        return storage.join(self.folder, "work")

    def policy(self, name: str, fingerprint: str) -> "EvaluatedPolicyPaths":
        return EvaluatedPolicyPaths(storage.join(self.work, f"{name}-{fingerprint}"))

    def speed(self, name: str, fingerprint: str) -> str:
        """Latency and throughput of a policy, measured before it writes."""
        return storage.join(self.work, f"speed-{name}-{fingerprint}.json")

    def judge(self, name: str, fingerprint: str) -> "JudgePaths":
        return JudgePaths(storage.join(self.work, f"judge-{name}-{fingerprint}"))


@dataclass(frozen=True)
class EvaluatedPolicyPaths:
    """The outputs of one policy in an evaluation."""

    folder: str

    @property
    def completions(self) -> str:
        """The only ledger of the folder."""
        return self.scoring.ledgers

    @property
    def scoring(self) -> ScoringPaths:
        return ScoringPaths(self.folder)


@dataclass(frozen=True)
class JudgePaths:
    """Questions to a judge and its answers, in files of the same names."""

    folder: str

    @property
    def questions(self) -> str:
        return storage.join(self.folder, "asked")

    @property
    def scores(self) -> str:
        return storage.join(self.folder, "scores")


@dataclass(frozen=True)
class Run:
    """Every path of one run. ``storage`` is a local folder or a URI that pyarrow opens."""

    storage: str

    @property
    def recipe(self) -> str:
        return storage.join(self.storage, "recipe.yaml")

    @property
    def card(self) -> str:
        return storage.join(self.storage, "README.md")

    def card_plot(self, name: str) -> str:
        return storage.join(self.storage, "card", name)

    @property
    def plan(self) -> str:
        return storage.join(self.storage, "plan.json")

    @property
    def calibration(self) -> str:
        """Completions with which a dry run times the engine; removed afterwards."""
        return storage.join(self.storage, "calibration")

    @property
    def all_intents(self) -> str:
        return storage.join(self.storage, "intents")

    def intents(self, fingerprint: str) -> IntentPaths:
        return IntentPaths(storage.join(self.all_intents, fingerprint))

    @property
    def expansions(self) -> str:
        return storage.join(self.storage, "expansion")

    def expansion(self, fingerprint: str) -> str:
        return storage.join(self.expansions, fingerprint)

    @property
    def scoring(self) -> ScoringPaths:
        return ScoringPaths(self.storage)

    @property
    def generate_summary(self) -> str:
        return storage.join(self.storage, "generate.json")

    def packed_data(self, fingerprint: str) -> PackedDataPaths:
        return PackedDataPaths(storage.join(self.storage, "student_data", fingerprint))

    @property
    def all_checkpoints(self) -> str:
        return storage.join(self.storage, "checkpoints")

    def checkpoints(self, fingerprint: str) -> str:
        return storage.join(self.all_checkpoints, fingerprint)

    def tensorboard(self, name: str) -> str:
        return storage.join(self.storage, "tensorboard", name)

    @property
    def wandb(self) -> str:
        return storage.join(self.storage, "wandb")

    @property
    def student(self) -> StudentPaths:
        return StudentPaths(storage.join(self.storage, "student"))

    @property
    def all_rounds(self) -> str:
        return storage.join(self.storage, "rounds")

    def round(self, k: int) -> RoundPaths:
        return RoundPaths(storage.join(self.all_rounds, str(k)))

    @property
    def rounds_summary(self) -> str:
        return storage.join(self.storage, "rounds.json")

    def evaluation(self, name: str) -> EvaluationPaths:
        return EvaluationPaths(storage.join(self.storage, name))


# ---- documents


class Document(BaseModel):
    """A JSON file that one stage writes and another reads.

    Unknown keys of a file are ignored, so that an older version can read a newer run's files; a missing or wrong one is an
    error that names it.
    """

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), populate_by_name=True)

    @classmethod
    def load(cls, uri: str) -> Self:
        """Read the document at ``uri``.

        Raises:
            UserError: the file is absent, not JSON, or lacks a key.
        """
        data = storage.read_bytes(uri)
        try:
            return cls.model_validate_json(data, extra="ignore")
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "the file"
            raise UserError(f"{uri}: {key}: {first['msg']}; delete the file and run the job that wrote it again") from error

    @classmethod
    def load_if_exists(cls, uri: str) -> Self | None:
        return cls.load(uri) if storage.exists(uri) else None

    def save(self, uri: str) -> None:
        storage.write_json(uri, self.model_dump(mode="json"))


class Manifest(Document):
    """The inputs of the rows in a folder, and their fingerprint."""

    fingerprint: str
    inputs: dict[str, JsonValue]

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> "Manifest":
        return cls(fingerprint=fingerprint(inputs), inputs=inputs)

    @classmethod
    def load_from(cls, folder: str) -> "Manifest | None":
        """Read the manifest of ``folder``; None if there is none. Runs made before 2026-11-25 have ``about.json``."""
        manifest = cls.load_if_exists(storage.join(folder, "manifest.json"))
        old = storage.join(folder, "about.json")
        if manifest or not storage.exists(old):
            return manifest
        inputs = storage.read_json(old)
        inputs.pop("fingerprint", None)  # of the other inputs; some folders' about.json had it
        return cls.of(inputs)

    def save_to(self, folder: str) -> None:
        self.save(storage.join(folder, "manifest.json"))

    def matches(self, folder: str) -> bool:
        """Return whether the rows in ``folder`` were made from the same inputs."""
        other = self.load_from(folder)
        return other is not None and other.fingerprint == self.fingerprint

    def claim(self, folder: str) -> None:
        """Write this manifest to ``folder``; delete the folder first if its rows were made from other inputs."""
        if not self.matches(folder):
            storage.remove(folder)
            self.save_to(folder)

    def differences(self, other: "Manifest") -> list[str]:
        """Return a line for each input in which ``other`` differs from this one."""
        return differences(self.inputs, other.inputs)


class Attempts(Document):
    """Every attempt at a generation, killed ones included."""

    runs: int
    unfinished: int
    engine_hours: float


class GenerateSummary(Document):
    """``generate.json``: written when the episodes are complete. Times are seconds."""

    requested: int | None = Field(None, description="prompts; unknown in runs that were imported")
    accepted: int
    rejected: int = 0
    reasons: dict[str, int] = Field(default_factory=dict, description="rejected prompts by reason")
    intents: str = Field("", description="fingerprint of the intents, which names their folder")
    intents_train: int = 0
    intents_heldout: int = 0
    intents_left_out: dict[str, int] = Field(default_factory=dict, description="rows of the source by reason")
    ledger: str = Field(description="fingerprint of the completions, which names their folder")
    scoring: str = Field(description="fingerprint of the scoring settings")
    policy: str = Field("", description="fingerprint of the teacher's requests")
    model: str = ""
    revision: str = ""
    license: str = Field("", validation_alias=AliasChoices("license", "licence"))
    generated_now: int = 0
    reused: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    startup_seconds: float = 0
    generation_seconds: float = 0
    tokens_per_second: float = 0
    cost: list[str] = Field(default_factory=list, description="lines of the cost table")
    attempts: Attempts | None = None


Basis = Literal["measured", "given", "assumed"]


class Figure(Document):
    """A number of a plan and where it comes from."""

    value: float
    basis: Basis

    def times(self, factor: float) -> "Figure":
        return Figure(value=self.value * factor, basis=self.basis)


class GenerationPlan(Document):
    """``plan.json``: the expected cost of a generate stage. Tokens are totals, times are seconds."""

    ledger: str = Field("", description="fingerprint of the completions that were planned")
    requests: int
    prompts: int
    files: int
    bytes: Figure
    input_tokens: Figure
    cached_tokens: Figure
    output_tokens: Figure
    startup_seconds: Figure
    generation_seconds: Figure | None = None
    scoring_seconds: Figure | None = None
    hours: Figure | None = Field(None, description="GPU-hours, or engine-hours without GPUs")
    hours_unit: str = "engine"
    dollars: Figure | None = None


class EpisodeSource(Document):
    """The episodes of one round in the replay buffer.

    Reward bins are fitted to all of its episodes, and validation is on all of its validation intents at any ``keep``.
    """

    model_config = ConfigDict(frozen=True)

    folder: str
    keep: float = Field(1.0, description="share that is trained on, selected by a hash of the episode ids")


class PackedDataSummary(Document):
    """``done.json`` of packed data, written last."""

    rows: int
    validation_rows: int
    tokens: int = Field(description="of the training rows")
    padding: float = Field(description="share of the training rows' slots")
    dropped: int = Field(description="examples longer than a row")
    budget_rows: int = Field(description="training rows if the objective had been 'udrl': equal budgets for all objectives")
    episodes: int = Field(description="in the replay buffer")
    trained: int = Field(description="episodes that are trained on, without swapped copies")
    context: int = Field(description="tokens of a row")
    sources: list[EpisodeSource] = Field(default_factory=list, description="the replay buffer")


class ValidationIntent(Document):
    """A validation intent to write prompts for during training."""

    task: str
    intent: str


class ValidationIntents(Document):
    """``held.json`` of packed data: a few validation intents of each task."""

    intents: list[ValidationIntent]

    @model_validator(mode="before")
    @classmethod
    def _accept_list(cls, value: Any) -> Any:
        """Runs made before 2026-11-25 have the bare list."""
        return {"intents": value} if isinstance(value, list) else value


VALIDATION_METRICS = ("length_error", "within_two", "words", "coverage", "reward")


class WorkerMemory(Document):
    """Peak memory of one training worker."""

    address: str
    peak_rss_mib: float
    peak_gpu_mib: float


class TrainingSummary(Document):
    """``training.json`` of an exported student, written last. Every key may be absent in an older student's.

    ``validation`` has the metrics of the last validation on a few validation intents: ``length_error`` (mean distance from the
    commanded length in words), ``within_two`` (share at most two words off), ``words`` (mean length), ``coverage`` (mean
    share of the subject's words that a prompt holds) and ``reward``, over all tasks and as ``<metric>/<task>``.
    """

    fingerprint: str = Field("", description="of the episodes and settings that the student depends on")
    weights: str = Field("", description="hash of the weights; empty in students exported before 2026-11-23")
    parameters: int = 0
    round: int = 0
    objective: str = "udrl"
    steps: int = 0
    rows_per_step: int = 0
    seconds: float = 0
    tokens_per_second: float = 0
    mfu: float = Field(0, description="model FLOPs utilization, see udrl.train.monitor")
    step_seconds: list[float] = Field(default_factory=list, description="of the last 1,000 steps")
    input_share: float = Field(0, description="share of the time that the loop waited for its input")
    memory: list[WorkerMemory] = Field(default_factory=list)
    workers: int = 0
    resumed_at: int = Field(0, description="step of the checkpoint that the last attempt started from")
    history: list[tuple[int, float]] = Field(default_factory=list, description="(step, training loss)")
    best_validation_loss: float | None = None
    validation_loss: float | None = None
    validation: dict[str, float] = Field(default_factory=dict)
    exported_step: int | None = Field(None, description="step of the exported weights, if train.export is 'best'")
    shape: dict[str, int | float] = Field(default_factory=dict, description="udrl.train.gpt2.Shape")
    data: PackedDataSummary | None = None
    deepspeed: dict[str, JsonValue] = Field(default_factory=dict, description="DeepSpeed's configuration")

    @model_validator(mode="before")
    @classmethod
    def _gather_validation(cls, values: Any) -> Any:
        """Students exported before 2026-11-25 have the metrics of ``validation`` as top-level keys."""
        if not isinstance(values, dict) or "validation" in values:
            return values
        metrics = {name: values[name] for name in values if name.partition("/")[0] in VALIDATION_METRICS}
        return {**values, "validation": metrics}


class RewardStatistics(Document):
    episodes: int
    mean: float
    sd: float


class CommandStatistics(Document):
    """One task's commands in a round, and how well accepted prompts kept to the commanded length."""

    requests: int
    mean_words: float | None
    reward_bins: dict[str, int]
    words_off: float | None = Field(description="mean distance in words")
    within_2: float | None


class DiversityStatistics(Document):
    """A round's prompts against round 0's at equal length: pairs are (round 0, this round)."""

    n: int
    words: int
    distinct_2: tuple[float, float] | None
    compression: tuple[float, float] | None
    ratio: float | None


class RoundRecord(Document):
    """``round.json``: the commands of a round and their results. Dictionaries are by task."""

    round: int
    origin: str = Field(description="fingerprint of the round's inputs")
    ledger: str = ""
    student: str = Field("", description="revision of the student that explored")
    requested: int | None = None
    accepted: int
    rejected: int = 0
    reasons: dict[str, int] = Field(default_factory=dict)
    commands: dict[str, CommandStatistics] = Field(default_factory=dict)
    achieved: dict[str, RewardStatistics] = Field(default_factory=dict)
    before: dict[str, RewardStatistics] = Field(default_factory=dict, description="achieved in the round before")
    diversity: dict[str, DiversityStatistics] = Field(default_factory=dict)
    keep: float | None = Field(None, description="share of the round's episodes that was trained on")
    refused: str = Field("", description="why the round was not trained on; empty if it was")


class RoundsSummary(Document):
    """``rounds.json``: all rounds, and the round whose student is the run's."""

    rounds: list[RoundRecord]
    student: int
