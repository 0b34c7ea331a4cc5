"""The recipe: the one typed configuration of a run.

Every leaf key has a description; ``docs/recipe.md`` is generated from this file. ``udrl.command_line`` reads recipes from YAML
and dotted overrides.
"""

import logging
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from udrl.errors import UserError

log = logging.getLogger(__name__)

MODEL = "bundled:NAME, Hugging Face id, local folder or storage URI"
JUDGE_MODELS = "bundled:wordllama for gated judges, else bundled:smollm2-135m-instruct"
REVISION = "revision of a Hugging Face model; default: main"


class Section(BaseModel):
    """A group of keys; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)
    renamed_keys: ClassVar[dict[str, str]] = {}  # old name -> new name; recipes of earlier versions keep working
    removed_keys: ClassVar[dict[str, str]] = {}  # old name -> reason; it is ignored

    @model_validator(mode="before")
    @classmethod
    def _merge_with_defaults(cls, values: Any) -> Any:
        """Merge a partly given section with its place's own defaults: serve.engine's differ from teacher.engine's."""
        if not isinstance(values, dict):
            return values
        for old, new in cls.renamed_keys.items():
            if old in values and new not in values:
                log.warning("recipe: %s is now called %s; rename the key", old, new)
                values = {**{key: value for key, value in values.items() if key != old}, new: values[old]}
        for old, reason in cls.removed_keys.items():
            if old in values:
                log.warning("recipe: %s is ignored: %s; remove the key", old, reason)
                values = {key: value for key, value in values.items() if key != old}
        for key, field in cls.model_fields.items():
            if isinstance(field.default, Section) and isinstance(values.get(key), dict):
                values = {**values, key: {**field.default.model_dump(exclude_unset=True), **values[key]}}
        return values


class Sampling(Section):
    """How completions are sampled. ``min_p`` and ``top_k`` are cheap; ``top_p`` sorts the vocabulary at every step."""

    temperature: float = Field(0.8, ge=0, le=2, description="0: greedy decoding")
    top_k: int = Field(0, ge=0, description="sample from this many tokens; 0: all")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the smallest set of tokens with this probability; 1: all")
    min_p: float = Field(0.08, ge=0, lt=1, description="least probability of a token, relative to the likeliest one")
    repetition_penalty: float = Field(1.0, ge=1, le=2, description="divides the logits of tokens that occurred; 1: off")
    frequency_penalty: float = Field(0.0, ge=0, le=2, description="subtracted per occurrence; stops a small teacher's loops")
    max_tokens: int = Field(72, ge=1, le=4096, description="longest completion")


class Placement(Section):
    """Where one replica of an engine or a scorer runs."""

    replicas: int = Field(1, ge=1, description="replicas that run at the same time")
    cpus: float = Field(1, ge=0, description="Ray CPUs that a replica reserves")
    gpus: float = Field(0, ge=0, description="GPUs per device of a replica; 0: runs on the CPU")
    accelerator: str | None = Field(None, description="Ray accelerator type, such as A10G or H100")
    threads: int | None = Field(None, ge=1, description="OpenMP threads of a CPU replica; default: all cores")
    dollars_per_hour: float | None = Field(None, ge=0, description="price of one replica's hour; the job then reports its cost")


class Engine(Section):
    """vLLM's settings."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("bfloat16", description="type of the weights")
    max_model_len: int = Field(1024, ge=64, description="tokens of a request and its completion together")
    max_num_seqs: int = Field(128, ge=1, description="requests that the engine runs at the same time")
    batch_size: int = Field(32, ge=1, description="rows of a Ray Data batch; the engine holds up to four of a shard at a time")
    eager: bool = Field(True, description="false: compile the model, which starts slower and runs faster")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="further engine arguments, passed to vLLM unchanged")


class Expand(Section):
    """The teacher grows the intents: it sees some and writes more like them (Self-Instruct, arXiv 2212.10560)."""

    target: int = Field(ge=1, description="new intents to reach; it stops earlier if a pass brings too few")
    shown: int = Field(8, ge=2, le=32, description="known intents that a request shows")
    per_request: int = Field(8, ge=1, le=32, description="new intents that a request asks for")
    near: float = Field(0.7, gt=0, le=1, description="drop new intents this similar to a known one (Jaccard)")
    sampling: Sampling = Field(
        default_factory=lambda: Sampling(temperature=1.0, min_p=0.05, max_tokens=160), description="of the new intents"
    )


class Intents(Section):
    """Where the users' short requests come from."""

    source: str = Field("builtin:composer", description="builtin:composer, or a URI of Parquet, JSONL, CSV, TSV or text")
    column: str = Field("intent", description="column that holds the intent; ignored for text files")
    limit: int | None = Field(None, ge=1, description="use this many intents; required by the composer")
    heldout: float = Field(0.1, ge=0, lt=1, description="share of *subjects* that is kept out of training")
    expand: Expand | None = Field(None, description="grow the training intents with the teacher")


class Teacher(Section):
    """The policy of round 0."""

    model: str = Field("bundled:smollm2-135m-instruct", description=MODEL)
    revision: str | None = Field(None, description=REVISION)
    style: Literal["completion", "chat"] = Field("completion", description="raw few-shot completion, or the chat template")
    samples: int = Field(4, ge=1, description="prompts per intent and task")
    sampling: Sampling = Field(Sampling(), description="of the prompts")
    engine: Engine = Field(Engine(), description="of the teacher")
    placement: Placement = Field(Placement(), description="of the teacher")
    shard_size: int | None = Field(
        None, ge=1, description="requests per file, the durable unit of work; default: total / 4,096, within 128..16,384"
    )
    structured: dict[str, int] = Field(
        default_factory=dict, description="task -> prompts that one request returns as JSON, by guided decoding"
    )
    max_rejects: float = Field(0.5, gt=0, le=1, description="end the job early if more than this share is rejected")
    tokens_per_second: float | None = Field(
        None, gt=0, description="speed of one replica, for dry_run; default: measured on a few requests"
    )


class RewardWeights(Section):
    """The weights of ``reward``. Components are stored separately, so that other weights need no new scoring."""

    relevance: float = Field(1.0, ge=0, description="similarity of prompt and intent")
    novelty: float = Field(0.3, ge=0, description="share of words that the intent does not have")
    repetition: float = Field(0.2, ge=0, description="share of distinct word pairs")
    format: float = Field(0.2, ge=0, description="share of the task's preferred patterns")
    length: float = Field(0.0, ge=0, description="closeness to the commanded length")


class Deduplicate(Section):
    """Which prompts count as duplicates, within a task and over all rounds."""

    near: float | None = Field(
        0.8, gt=0, le=1, description="MinHash-LSH: prompts of about this Jaccard similarity are near-duplicates; null: off"
    )
    false_positives: float = Field(1e-5, gt=0, lt=0.1, description="rate of each Bloom filter; a smaller one takes more memory")


class RubricJudge(Section):
    """A language model that scores a prompt from 1 to 10; the score is the expectation over its token probabilities."""

    model: str = Field("bundled:smollm2-135m-instruct", description=MODEL)
    revision: str | None = Field(None, description=REVISION)
    style: Literal["completion", "chat"] = Field("chat", description="raw few-shot completion, or the chat template")
    engine: Engine = Field(Engine(), description="of the judge")
    placement: Placement = Field(Placement(), description="of the judge")


class Rewards(Section):
    """How completions are scored."""

    relevance: Literal["embedding", "judge"] = Field("embedding", description="what scores relevance")
    embedder: str = Field("bundled:minilm", description="bundled:minilm, or a sentence-transformers id or folder")
    batch_size: int = Field(256, ge=1, description="texts that the embedder takes at a time")
    judge: RubricJudge = Field(RubricJudge(), description="used if relevance is 'judge'")
    placement: Placement = Field(Placement(), description="of the embedder")
    deduplicate: Deduplicate = Field(Deduplicate(), description="duplicates and near-duplicates")
    weights: RewardWeights = Field(RewardWeights(), description="of the components")


class Commands(Section):
    """Which commands the student learns."""

    max_words: int = Field(40, ge=4, le=256, description="longest length command; lengths are exact words")
    reward_bins: int = Field(5, ge=2, le=20, description="quantile bins of the reward; 0 is the lowest")
    rank_within: Literal["task", "intent"] = Field("task", description="the group in which rewards are ranked into bins")
    dropout: float = Field(0.03, ge=0, le=0.5, description="share of examples that carry the 'any' command")


class Student(Section):
    """A GPT-2. ``depth`` is the one dial; the other sizes follow from it unless set."""

    init: str | None = Field(
        None, description="pretrained GPT-2 to start from: Hugging Face id, folder or URI; its shape and tokenizer are kept"
    )
    depth: int = Field(6, ge=1, le=48, description="layers")
    width: int | None = Field(None, ge=16, description="default: 64 x depth (12 -> 768), at least 128")
    heads: int | None = Field(None, ge=1, description="default: width / 64")
    vocab_size: int = Field(6000, ge=400, le=65536, description="of the tokenizer, control tokens included; an upper bound")
    vocabulary: Literal["episodes", "teacher"] = Field(
        "episodes",
        description="origin of the tokenizer's pieces: trained on the episodes, or the most frequent ones of the teacher's"
        " byte-level BPE; the student then starts from their embeddings in the teacher, reduced to its width",
    )
    context: int = Field(256, ge=32, le=4096, description="tokens of intent, command and prompt: the model's positions")
    start: Literal["random", "copying"] = Field(
        "random", description="weights of a new student: random, or with heads that continue a sequence read before"
    )
    lowercase: bool = Field(False, description="the tokenizer folds case: a smaller vocabulary, less to learn")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the network")


class Train(Section):
    """The train stage."""

    objective: Literal["udrl", "sft", "sft_top"] = Field(
        "udrl", description="hindsight commands, or plain fine-tuning on all or on the top episodes at equal budget"
    )
    top_share: float = Field(0.3, gt=0, le=1, description="share of each task's episodes by reward that sft_top learns from")
    workers: int = Field(1, ge=1, description="Ray Train workers")
    min_workers: int | None = Field(None, ge=1, description="continue with this many if nodes are lost, and grow back")
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="how Ray places the workers on nodes"
    )
    cpus_per_worker: float = Field(1, gt=0, description="Ray CPUs that a worker reserves")
    gpus_per_worker: float = Field(0, ge=0, description="0: trains on the CPU")
    accelerator: str | None = Field(None, description="Ray accelerator type, such as A10G or H100")
    threads: int | None = Field(None, ge=1, description="OpenMP threads of a CPU worker; default: cores / workers")
    epochs: float = Field(4, gt=0, description="passes over the training rows")
    batch_tokens: int | None = Field(
        None, ge=32, description="tokens of one optimizer step over all workers; default: from the width"
    )
    row_tokens: int | None = Field(
        None, ge=32, le=65536, description="tokens of one packed row of several examples; default: student.context"
    )
    micro_batch_rows: int | None = Field(None, ge=1, description="rows of one forward pass; default: a worker's whole share")
    lr: float | None = Field(None, gt=0, description="peak learning rate; default: falls with the width (1e-3 at 320)")
    schedule: Literal["cosine", "wsd"] = Field("cosine", description="after the warm-up: a cosine, or stable and then decay")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps")
    decay: float = Field(0.2, gt=0, le=1, description="share of the steps over which wsd falls linearly")
    final_lr: float = Field(0.1, ge=0, le=1, description="end of the schedule, as a share of lr")
    weight_decay: float = Field(0.1, ge=0, description="of matrices; biases and layer norms do not decay")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="of the forward and backward pass")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="DeepSpeed's ZeRO stage; 0 is the fastest for a single worker on a CPU"
    )
    deepspeed: str | None = Field(None, description="your own DeepSpeed JSON, used instead of the one made from these keys")
    checkpoint_every: int = Field(500, ge=1, description="steps")
    keep_checkpoints: int = Field(2, ge=1, description="latest checkpoints to keep; the best weights are kept in addition")
    validate_every: int | None = Field(None, ge=1, description="steps; default: checkpoint_every")
    sample_intents: int = Field(4, ge=0, description="validation intents per task for which samples are shown")
    export: Literal["last", "best"] = Field("last", description="weights that become the student; best by validation loss")
    trackers: list[Literal["mlflow", "wandb"]] = Field(
        default_factory=list,
        description="in addition to TensorBoard; addresses and keys come from their environment variables",
    )
    max_failures: int = Field(3, ge=0, description="worker failures after which Ray Train gives up")
    swapped_copies: int = Field(
        0, ge=0, le=8, description="copies of each episode with the subject's words swapped: teaches a small student to copy"
    )
    validation: float = Field(0.03, ge=0, lt=0.5, description="share of subjects that is kept for validation")


class Explore(Section):
    """How the student of each round makes the next round's episodes."""

    intents: int | None = Field(None, ge=1, description="training intents per round, drawn by seed; default: all")
    samples: int = Field(2, ge=1, description="prompts per intent and task")
    top_share: float = Field(0.3, gt=0, le=1, description="share of the best episodes; commanded rewards start at their mean")
    sampling: Sampling = Field(Sampling(temperature=1.0, min_p=0.05), description="of the prompts")
    engine: Engine = Field(Engine(max_model_len=256), description="of the student")
    placement: Placement = Field(Placement(), description="of the student")
    epochs: float = Field(1, gt=0, description="of the retraining, over the replay buffer")
    lr: float | None = Field(None, gt=0, description="of the retraining; default: a third of train.lr")
    replay: float = Field(0.5, ge=0, lt=1, description="least share of earlier rounds' episodes in the retraining")
    min_diversity: float = Field(
        0.7, ge=0, le=1, description="do not train on a round whose distinct bigrams fall below this share of round 0's"
    )


class Baseline(Section):
    """Another model that writes prompts from the teacher's task templates."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="its name in the report")
    model: str = Field(description=MODEL)
    revision: str | None = Field(None, description=REVISION)
    style: Literal["completion", "chat"] = Field("chat", description="raw few-shot completion, or the chat template")
    sampling: Sampling = Field(Sampling(), description="of the prompts")
    engine: Engine = Field(Engine(), description="of the baseline")
    placement: Placement = Field(Placement(), description="of the baseline")


class Judge(Section):
    """Who scores outputs for the report, next to the scorer that made the training reward."""

    kind: Literal["gated", "coverage", "rubric"] = Field(
        description="cosine of static word embeddings, or share of the intent's words, each with gates against echoes; "
        "a language model's score of 1-10"
    )
    name: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9_-]*$", description="its name in the report; default: its kind")
    model: str = Field("", description=f"{MODEL}; default: {JUDGE_MODELS}")
    revision: str | None = Field(None, description=REVISION)
    style: Literal["completion", "chat"] = Field("chat", description="of a rubric judge")
    engine: Engine = Field(Engine(), description="of the judge")
    placement: Placement = Field(Placement(), description="of the judge")

    @model_validator(mode="after")
    def _choose_model(self) -> "Judge":
        if not self.model:
            self.model = "bundled:wordllama" if self.kind in ("gated", "coverage") else "bundled:smollm2-135m-instruct"
        return self

    @property
    def display_name(self) -> str:
        """Its name in tables and columns."""
        return self.name or self.kind


class Evaluate(Section):
    """The evaluate stage."""

    renamed_keys: ClassVar[dict[str, str]] = {"yardsticks": "trivial_baselines"}
    removed_keys: ClassVar[dict[str, str]] = {"pairs": "there is no pairwise judge"}
    removed_judges: ClassVar[dict[str, str]] = {  # kind -> reason; it is ignored
        "likelihood": "an echo of the intent wins it, so it could never decide",
        "embedding": "an echo of the intent wins it, so it could never decide",
        "pairwise": "it had no scale, so it could never decide",
    }

    intents: int = Field(60, ge=1, description="held-out intents; every task is evaluated on each")
    source: str | None = Field(None, description="evaluate on these intents instead of the run's held-out ones")
    column: str = Field("intent", description="column of source that holds the intent")
    samples: int = Field(2, ge=1, description="prompts of each policy per intent and task at its default command")
    words: int | None = Field(None, ge=1, description="commanded words; default: each task's own default")
    reward: int | None = Field(None, ge=0, description="commanded reward bin; default: each task's own default")
    lengths: list[int] | None = Field(
        None, min_length=1, description="commanded words of the length sweep; default: five from each task's p5 to p95"
    )
    sweep_intents: int = Field(100, ge=1, description="how many of the intents the length and reward sweeps use")
    sampling: Sampling = Field(Sampling(temperature=0.7), description="of the student")
    engine: Engine = Field(Engine(max_model_len=256), description="of the student")
    placement: Placement = Field(Placement(), description="of the student")
    teacher: bool = Field(True, description="evaluate the teacher too; without it only baselines remain")
    baselines: list[Baseline] = Field(default_factory=list, description="further models to compare with")
    trivial_baselines: list[Literal["echo", "shuffled", "best_of"]] = Field(
        ["echo", "shuffled", "best_of"],
        description="policies that cost nothing: the intent; the teacher's prompts for other intents; the best of its samples",
    )
    judges: list[Judge] = Field(
        default_factory=lambda: [Judge(kind="gated"), Judge(kind="coverage")], description="who scores the outputs"
    )
    bootstrap: int = Field(1000, ge=100, description="resamples of the confidence intervals")
    folder: str = Field(
        "evaluation", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder of the report, under the run's storage"
    )
    latency_requests: int = Field(
        8, ge=0, description="requests sent one at a time before the start, to measure latency and memory; 0: none"
    )

    @model_validator(mode="before")
    @classmethod
    def _ignore_removed_judges(cls, values: Any) -> Any:
        """Ignore judges that only earlier versions had; if no other is named, the default ones are asked."""
        judges = values.get("judges") if isinstance(values, dict) else None
        if not isinstance(judges, list):
            return values
        kinds = [str(judge.get("kind")) if isinstance(judge, dict) else "" for judge in judges]
        removed = [kind for kind in kinds if kind in cls.removed_judges]
        if not removed:
            return values
        for kind in removed:
            log.warning("recipe: evaluate.judges: a %s judge is ignored: %s; remove it", kind, cls.removed_judges[kind])
        kept = [judge for judge, kind in zip(judges, kinds, strict=True) if kind not in cls.removed_judges]
        others = {key: value for key, value in values.items() if key != "judges"}
        return {**others, "judges": kept} if kept else others

    @model_validator(mode="after")
    def _check_names(self) -> "Evaluate":
        names = [baseline.name for baseline in self.baselines]
        reserved = {"student", "teacher", "echo", "shuffled"} | {name for name in names if name.startswith("best-of-")}
        bad = [name for name in names if name in reserved or names.count(name) > 1]
        if bad:
            raise ValueError(f"baselines: the name {bad[0]!r} is taken; give each baseline its own")
        judge_names = [judge.display_name for judge in self.judges]
        if len(set(judge_names)) < len(judge_names):
            raise ValueError(f"judges: {', '.join(judge_names)}: two have one name; set judges.N.name")
        return self


class ServeLimits(Section):
    """Limits of one request and of one key."""

    body_bytes: int = Field(65_536, ge=1024, description="size of a request's body")
    intent_characters: int = Field(2000, ge=1, description="length of an intent")
    prompts: int = Field(16, ge=1, le=64, description="n: prompts of each task in one request")
    batch: int = Field(64, ge=1, description="intents of a batch request, prompts of an OpenAI request")
    total: int = Field(256, ge=1, description="intents x tasks x n of one request")
    concurrent: int = Field(64, ge=1, description="requests of one key that may run at the same time")
    per_minute: int = Field(6000, ge=1, description="requests of one key per minute")


class Redraft(Section):
    """How hard the server tries to meet a requested length."""

    rounds: int = Field(2, ge=0, le=16, description="times that prompts of the wrong length are written again")
    samples: int = Field(4, ge=1, le=16, description="drafts per round for each of these prompts")


class ServeEngine(Engine):
    """An engine that lives long: compiling it pays off (docs/results/serving-cpu.md)."""

    max_model_len: int = Field(256, ge=64, description="tokens of a request and its completion together")
    max_num_seqs: int = Field(64, ge=1, description="requests that the engine runs at the same time")
    eager: bool = Field(False, description="true: starts sooner (on two cores by 14 s, 30 s the first time), runs slower")


class Serve(Section):
    """The serve stage."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=1, le=65535, description="port to listen on")
    require_keys: bool = Field(True, description="false: requests need no key, and only loopback is answered")
    keys_file: str | None = Field(None, description="file of `python -m serve.keys new NAME`; default: $UDRL_API_KEYS")
    cors_origins: list[str] = Field(default_factory=list, description="origins whose pages may call the server")
    ingress_replicas: int = Field(1, ge=1, description="each enforces its share of a key's limits")
    min_replicas: int = Field(1, ge=0, description="engines; 0: the last one stops after to_zero_delay_s without a request")
    max_replicas: int = Field(2, ge=1, description="engines")
    target_ongoing_requests: int = Field(32, ge=1, description="requests per engine above which another engine is started")
    upscale_delay_s: float = Field(5, ge=0, description="seconds of load before an engine is added")
    downscale_delay_s: float = Field(300, ge=0, description="seconds of little load before an engine is removed")
    to_zero_delay_s: float = Field(900, ge=0, description="seconds without a request before the last engine is removed")
    queue: int = Field(64, ge=0, description="requests that may wait for an engine; further ones are answered with 503")
    request_timeout_s: float = Field(30, gt=0, description="seconds after which a request is answered with an error")
    redraft: Redraft = Field(Redraft(), description="prompts of the wrong length")
    limits: ServeLimits = Field(ServeLimits(), description="of requests and keys")
    sampling: Sampling = Field(Sampling(temperature=0.7), description="default of a request")
    engine: ServeEngine = Field(ServeEngine(), description="of the student")
    placement: Placement = Field(Placement(), description="of the engines")


class Recipe(Section):
    """One run."""

    name: str = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]*$", description="name of the run, in cards and reports")
    storage: str = Field(min_length=1, description="folder or URI of the run's outputs")
    resume: Literal["never", "always", "if_possible"] = Field(
        "always",
        description="if settings changed: 'always' stops and names them, 'if_possible' starts over next to the old outputs,"
        " 'never' deletes them",
    )
    episodes_from: str | None = Field(
        None, min_length=1, description="storage of another run whose intents and episodes this one uses"
    )
    dry_run: bool = Field(False, description="jobs.generate prints its plan (requests, tokens, files, hours, cost) and stops")
    watchdog_minutes: float = Field(30, gt=0, description="end a stage that makes no progress for this long")
    seed: int = Field(0, ge=0, description="of every random choice")
    tasks: list[str] = Field(min_length=1, description="names of shipped tasks, or paths of task files")
    intents: Intents = Field(Intents(), description="the users' requests")
    teacher: Teacher = Field(Teacher(), description="the policy of round 0")
    rewards: Rewards = Field(Rewards(), description="scoring")
    commands: Commands = Field(Commands(), description="commands that the student learns")
    student: Student = Field(Student(), description="the model")
    train: Train = Field(Train(), description="the train stage")
    rounds: int = Field(0, ge=0, le=50, description="rounds after the teacher's: explore, score, relabel, retrain")
    explore: Explore = Field(Explore(), description="exploration in those rounds")
    evaluate: Evaluate = Field(Evaluate(), description="the evaluate stage")
    serve: Serve = Field(Serve(), description="the serve stage")

    def row_tokens(self) -> int:
        """Return the tokens of one packed row."""
        return self.train.row_tokens or self.student.context

    def episodes_storage(self) -> str:
        """Return the storage of the run whose intents and episodes are used."""
        return self.episodes_from or self.storage

    @field_validator("tasks")
    @classmethod
    def _check_tasks(cls, tasks: list[str]) -> list[str]:
        if len(set(tasks)) < len(tasks):
            raise ValueError("a task is named twice")
        return tasks

    @model_validator(mode="after")
    def _check_consistency(self) -> "Recipe":
        if self.intents.source.startswith("builtin:") and self.intents.limit is None:
            raise ValueError("intents.limit: must be set when intents.source is the built-in composer")
        too_long = [n for n in self.evaluate.lengths or () if not 1 <= n <= self.commands.max_words]
        if too_long:
            raise ValueError(f"evaluate.lengths: {too_long} lie outside 1..commands.max_words={self.commands.max_words}")
        words, reward, commands = self.evaluate.words or 0, self.evaluate.reward or 0, self.commands
        if words > commands.max_words:
            raise ValueError(f"evaluate.words: {words} is more than commands.max_words={commands.max_words}")
        if reward >= commands.reward_bins:
            raise ValueError(
                f"evaluate.reward: {reward} is not a reward bin; use 0..{commands.reward_bins - 1} (commands.reward_bins)"
            )
        for key, default in (("start", "random"), ("vocabulary", "episodes")):
            if self.student.init and (value := getattr(self.student, key)) != default:
                raise ValueError(f"student.{key}: {value} is for a new student; remove it or student.init={self.student.init}")
        for judge in self.evaluate.judges:
            self._check_independence(judge)
        if (self.train.min_workers or 0) > self.train.workers:
            raise ValueError(f"train.min_workers: {self.train.min_workers} is more than train.workers={self.train.workers}")
        batch = self.train.batch_tokens
        if batch is not None and batch < self.row_tokens() * self.train.workers:
            raise ValueError(
                f"train.batch_tokens: {batch} is less than one row of {self.row_tokens()} tokens"
                f" for each of train.workers={self.train.workers}"
            )
        if self.serve.min_replicas > self.serve.max_replicas:
            raise ValueError(
                f"serve.min_replicas: {self.serve.min_replicas} is more than serve.max_replicas={self.serve.max_replicas}"
            )
        return self

    def _check_independence(self, judge: Judge) -> None:
        """Refuse the reward's scorer as a judge: the student was trained towards it, so its verdict proves nothing."""
        rewards = self.rewards
        if rewards.relevance == "judge" and judge.kind == "rubric" and judge.model == rewards.judge.model:
            raise ValueError(
                f"evaluate.judges: {judge.display_name}: {judge.model} made the training reward; choose another model"
            )


def from_values(values: dict[str, Any], origin: str) -> Recipe:
    """Build a recipe from plain values; error lines name ``origin``.

    Raises:
        UserError: one line per problem: the dotted key, the value given, the values allowed.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(problem_line(origin, problem) for problem in error.errors())) from error


def problem_line(origin: str, problem: Any) -> str:
    """Return one line for a Pydantic problem: the dotted key, the value given, the values allowed."""
    parts = [str(part) for part in problem["loc"]]
    key = ".".join(part if part and part.isprintable() else repr(part) for part in parts)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"{origin}: {key}: unknown key; allowed here: {', '.join(_sibling_keys(problem['loc'])) or 'see the docs'}"
    if problem["type"] == "missing":
        return f"{origin}: {key}: missing; it must be given"
    value = f": got {problem['input']!r}" if key else ""
    return f"{origin}: {key + ': ' if key else ''}{message}{value[:120]}"


def _sibling_keys(location: Sequence[str | int]) -> list[str]:
    model: Any = Recipe
    for part in location[:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        model = field.annotation if field else None
    return sorted(getattr(model, "model_fields", {}))


def dump(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML: every key with its value."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
