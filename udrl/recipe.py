"""The recipe: one typed config of a run, from YAML and dotted overrides.

``load("recipes/quickstart.yaml", ["teacher.placement.replicas=4"])`` returns a :class:`Recipe` or raises a
:class:`~udrl.errors.UserError` with one line a problem: the dotted key, what was given, what is allowed.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from udrl import logs
from udrl.errors import UserError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _over_defaults(cls, values: Any) -> Any:
        """Keep a place's own defaults beside the keys that are given: serve.engine has others than teacher.engine."""
        if not isinstance(values, dict):
            return values
        for key, field in cls.model_fields.items():
            if isinstance(field.default, Section) and isinstance(values.get(key), dict):
                values = {**values, key: {**field.default.model_dump(exclude_unset=True), **values[key]}}
        return values


class Expand(Section):
    """The teacher grows the intents: it is shown some and asked for more of the kind (Self-Instruct, arXiv 2212.10560)."""

    target: int = Field(ge=1, description="new intents to reach; it stops before where a pass brings too few")
    shown: int = Field(8, ge=2, le=32, description="known intents that a request shows")
    per_request: int = Field(8, ge=1, le=32, description="new intents that a request may bring")
    near: float = Field(0.7, gt=0, le=1, description="a new intent this similar to a known one (Jaccard) is left out")
    sampling: "Sampling" = Field(default_factory=lambda: Sampling(temperature=1.0, min_p=0.05, max_tokens=160))


class Intents(Section):
    """Where the short user requests come from."""

    source: str = Field("builtin:composer", description="builtin:composer, or a URI of Parquet, JSONL, CSV, TSV or text")
    column: str = Field("intent", description="the column that holds the intent (not used for text files)")
    limit: int | None = Field(None, ge=1, description="take this many intents; the composer needs it")
    heldout: float = Field(0.1, ge=0, lt=1, description="share of *subjects* kept out of training")
    expand: Expand | None = Field(None, description="grow the training intents by the teacher")


class Sampling(Section):
    """How completions are drawn. ``min_p`` and ``top_k`` are cheap; ``top_p`` sorts the vocabulary every step."""

    temperature: float = Field(0.8, ge=0, le=2)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.08, ge=0, lt=1)
    repetition_penalty: float = Field(1.0, ge=1, le=2)
    frequency_penalty: float = Field(0.0, ge=0, le=2, description="keeps a small teacher from looping")
    max_tokens: int = Field(72, ge=1, le=4096)


class Placement(Section):
    """Where one engine replica runs. ``gpus: 0`` means CPU."""

    replicas: int = Field(1, ge=1)
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)
    accelerator: str | None = Field(None, description="Ray accelerator type, such as A10G or H100")
    threads: int | None = Field(None, ge=1, description="OpenMP threads of a CPU engine; default: all cores")
    dollars_per_hour: float | None = Field(None, ge=0, description="price of one replica's hour; the job then tells its cost")


class Engine(Section):
    """vLLM's settings. ``kwargs`` go to vLLM as they are."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"
    max_model_len: int = Field(1024, ge=64)
    max_num_seqs: int = Field(128, ge=1)
    batch_size: int = Field(32, ge=1, description="rows of one Ray Data batch; four of a shard are in the engine at a time")
    eager: bool = Field(True, description="false compiles the model: slower to start, quicker after")
    kwargs: dict[str, Any] = Field(default_factory=dict)


class Teacher(Section):
    """The policy of round 0."""

    model: str = Field("bundled:smollm2-135m-instruct", description="bundled:NAME, Hugging Face id, path or storage URI")
    revision: str | None = None
    style: Literal["completion", "chat"] = Field("completion", description="raw few-shot completion, or the chat template")
    samples: int = Field(4, ge=1, description="completions per intent and task")
    sampling: Sampling = Sampling()
    engine: Engine = Engine()
    placement: Placement = Placement()
    shard_size: int | None = Field(
        None, ge=1, description="requests of one durable unit of work; default: total / 4,096, within 128..16,384"
    )
    structured: dict[str, int] = Field(
        default_factory=dict, description="task -> prompts that one request brings as JSON, by guided decoding"
    )
    max_rejects: float = Field(0.5, gt=0, le=1, description="the job ends early where more than this share is rejected")
    tokens_per_second: float | None = Field(
        None, gt=0, description="of one replica, for dry_run; default: measured on a few requests"
    )


class RewardWeights(Section):
    """The mix that makes ``reward``; components are stored apart, so another mix needs no new scoring."""

    relevance: float = Field(1.0, ge=0)
    novelty: float = Field(0.3, ge=0)
    repetition: float = Field(0.2, ge=0)
    format: float = Field(0.2, ge=0)
    length: float = Field(0.0, ge=0)


class Deduplicate(Section):
    """What counts as said before, within a task and over all rounds."""

    near: float | None = Field(
        0.8, gt=0, le=1, description="MinHash-LSH: prompts of about this Jaccard similarity are near-duplicates; null: off"
    )
    false_positives: float = Field(1e-5, gt=0, lt=0.1, description="of each Bloom filter; smaller takes more memory")


class RubricJudge(Section):
    """A language model that scores a prompt from 1 to 10; the score is the expectation over its token probabilities."""

    model: str = Field("bundled:smollm2-135m-instruct", description="bundled:NAME, Hugging Face id, path or storage URI")
    revision: str | None = None
    style: Literal["completion", "chat"] = "chat"
    engine: Engine = Engine()
    placement: Placement = Placement()


class Rewards(Section):
    relevance: Literal["embedding", "judge"] = Field("embedding", description="who scores relevance")
    embedder: str = Field("bundled:minilm", description="bundled:minilm, or any sentence-transformers id or path")
    batch_size: int = Field(256, ge=1)
    judge: RubricJudge = RubricJudge()
    placement: Placement = Field(Placement(), description="where the scoring pass runs; gpus: 0 means CPU")
    deduplicate: Deduplicate = Deduplicate()
    weights: RewardWeights = RewardWeights()


class Commands(Section):
    """What can be asked of the student."""

    max_words: int = Field(40, ge=4, le=256, description="length commands are exact words up to this cap")
    reward_bins: int = Field(5, ge=2, le=20)
    rank_within: Literal["task", "intent"] = Field("task", description="what an episode's reward is ranked within")
    dropout: float = Field(0.03, ge=0, le=0.5, description="share of examples that carry the 'any' command")


class Student(Section):
    """A GPT-2. ``depth`` is the one dial; the rest follows from it unless set."""

    init: str | None = Field(
        None, description="pretrained GPT-2 to start from: Hugging Face id, path or URI; its shape and tokenizer stand"
    )
    depth: int = Field(6, ge=1, le=48)
    width: int | None = Field(None, ge=16, description="default: 64 x depth (12 -> 768), at least 128")
    heads: int | None = Field(None, ge=1, description="default: width / 64")
    vocab_size: int = Field(6000, ge=400, le=65536)
    context: int = Field(256, ge=32, le=4096, description="tokens of one packed row, and the model's positions")
    lowercase: bool = Field(False, description="the tokenizer folds case: a smaller vocabulary, less to learn")
    dropout: float = Field(0.0, ge=0, lt=1)


class Train(Section):
    objective: Literal["udrl", "sft", "sft_top"] = Field(
        "udrl", description="hindsight commands; or plain fine-tuning on all episodes, or on the top ones, at equal budget"
    )
    top_share: float = Field(0.3, gt=0, le=1, description="of each task's episodes by reward: what sft_top learns from")
    workers: int = Field(1, ge=1)
    min_workers: int | None = Field(None, ge=1, description="go on with this many when nodes are lost, and grow back")
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)
    accelerator: str | None = None
    threads: int | None = Field(None, ge=1, description="OpenMP threads a CPU worker; default: cores / workers")
    epochs: float = Field(4, gt=0)
    batch_tokens: int | None = Field(
        None, ge=32, description="tokens of one optimizer step, over all workers; default: from the width"
    )
    micro_batch_rows: int | None = Field(None, ge=1, description="rows of one forward pass; default: the whole share")
    lr: float | None = Field(None, gt=0, description="default: falls with width (1e-3 at width 320)")
    schedule: Literal["cosine", "wsd"] = Field("cosine", description="after the warm-up: a cosine, or stable and then decay")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps")
    decay: float = Field(0.2, gt=0, le=1, description="share of the steps in which wsd falls, linearly")
    final_lr: float = Field(0.1, ge=0, le=1, description="where the schedule ends, as a share of lr")
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, gt=0)
    precision: Literal["bf16", "fp32"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 1
    deepspeed: str | None = Field(None, description="a DeepSpeed JSON of your own, in place of the one made from these keys")
    checkpoint_every: int = Field(500, ge=1, description="steps")
    keep_checkpoints: int = Field(2, ge=1, description="the latest ones; the best by validation loss is kept beside them")
    validate_every: int | None = Field(None, ge=1, description="steps; default: checkpoint_every")
    sample_intents: int = Field(4, ge=0, description="validation intents a task that are written out at each validation")
    export: Literal["last", "best"] = Field("last", description="which weights become the student")
    trackers: list[Literal["mlflow", "wandb"]] = Field(
        default_factory=list, description="beside TensorBoard; each takes its address and key from its own environment"
    )
    max_failures: int = Field(3, ge=0, description="worker failures that Ray Train mends before it gives up")
    swapped_copies: int = Field(
        0, ge=0, le=8, description="copies of each episode with shared rare words swapped; they teach a small student to copy"
    )
    validation: float = Field(0.03, ge=0, lt=0.5, description="share of intents kept for validation loss")


class Explore(Section):
    """How the student of each round makes the next one's episodes."""

    intents: int | None = Field(None, ge=1, description="training intents a round, drawn by seed; default: all")
    samples: int = Field(2, ge=1, description="prompts of an intent and task")
    top_share: float = Field(0.3, gt=0, le=1, description="the buffer's best, from whose mean upwards rewards are commanded")
    sampling: Sampling = Sampling(temperature=1.0, min_p=0.05)
    engine: Engine = Engine(max_model_len=256)
    placement: Placement = Placement()
    epochs: float = Field(1, gt=0, description="of the retraining, over the buffer")
    lr: float | None = Field(None, gt=0, description="of the retraining; default: a third of train's")
    replay: float = Field(0.5, ge=0, lt=1, description="least share of earlier rounds' episodes in the retraining")
    min_diversity: float = Field(
        0.7, ge=0, le=1, description="a round whose distinct bigrams fall below this share of round 0's is not trained on"
    )


class Baseline(Section):
    """Another model that writes prompts from the teacher's task templates, to compare with."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="what the report calls it")
    model: str = Field(description="bundled:NAME, Hugging Face id, path or storage URI")
    revision: str | None = None
    style: Literal["completion", "chat"] = "chat"
    sampling: Sampling = Sampling()
    engine: Engine = Engine()
    placement: Placement = Placement()


class Judge(Section):
    """Who scores outputs for a report; never the scorer that made the training reward."""

    kind: Literal["likelihood", "embedding", "rubric", "pairwise"] = Field(
        description="mutual information of prompt and intent; cosine; a score of 1-10 by a language model; two prompts compared"
    )
    name: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9_-]*$", description="what the report calls it; default: its kind")
    model: str = Field("bundled:smollm2-135m-instruct", description="bundled:NAME, Hugging Face id, path or storage URI")
    revision: str | None = None
    style: Literal["completion", "chat"] = Field("chat", description="of rubric and pairwise judges")
    engine: Engine = Engine()
    placement: Placement = Placement()

    @property
    def called(self) -> str:
        """Its name in tables and columns."""
        return self.name or self.kind


class Evaluate(Section):
    intents: int = Field(60, ge=1, description="held-out intents, each asked for every task")
    source: str | None = Field(None, description="evaluate on these intents instead of the run's held-out ones")
    column: str = "intent"
    samples: int = Field(2, ge=1, description="prompts of each policy per intent and task at its default command")
    words: int | None = Field(None, ge=1, description="the student's command: words; default: each task's own default")
    reward: int | None = Field(None, ge=0, description="the student's command: reward bin; default: each task's own default")
    lengths: list[int] | None = Field(
        None, min_length=1, description="commanded words to sweep; default: five from each task's p5 to p95"
    )
    sweep_intents: int = Field(
        100, ge=1, description="of those intents, how many the sweeps of length and reward are asked for"
    )
    sampling: Sampling = Field(Sampling(temperature=0.7), description="of the student")
    engine: Engine = Engine(max_model_len=256)
    placement: Placement = Placement()
    teacher: bool = Field(True, description="let the teacher write too; without it, baselines and yardsticks remain")
    baselines: list[Baseline] = Field(default_factory=list)
    yardsticks: list[Literal["echo", "shuffled", "best_of"]] = Field(
        ["echo", "shuffled", "best_of"],
        description="policies that cost nothing: the intent; the teacher's prompts for other intents; the best of its draws",
    )
    judges: list[Judge] = Field(default_factory=lambda: [Judge(kind="likelihood")])
    pairs: int = Field(50, ge=1, description="pairs a task and policy that a pairwise judge compares")
    bootstrap: int = Field(1000, ge=100)
    folder: str = Field(
        "evaluation", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="where the report goes, below the run's storage"
    )
    latency_requests: int = Field(
        8, ge=0, description="requests sent one at a time, to measure latency and memory before the start; 0: none"
    )

    @model_validator(mode="after")
    def _named_apart(self) -> "Evaluate":
        names = [baseline.name for baseline in self.baselines]
        taken = {"student", "teacher", "echo", "shuffled"} | {n for n in names if n.startswith("best-of-")}
        bad = [n for n in names if n in taken or names.count(n) > 1]
        if bad:
            raise ValueError(f"baselines: the name {bad[0]!r} is taken; give each its own")
        called = [judge.called for judge in self.judges]
        if len(set(called)) < len(called):
            raise ValueError(f"judges: {', '.join(called)}: two have one name; set judges.N.name")
        return self


class ServeLimits(Section):
    """What one request, and one key, may ask of the server."""

    body_bytes: int = Field(65_536, ge=1024)
    intent_characters: int = Field(2000, ge=1)
    prompts: int = Field(16, ge=1, le=64, description="n: prompts a request wants of each task")
    batch: int = Field(64, ge=1, description="intents of one batch request, prompts of one OpenAI request")
    total: int = Field(256, ge=1, description="intents x tasks x n of one request")
    concurrent: int = Field(64, ge=1, description="requests that one key may have running at a time")
    per_minute: int = Field(6000, ge=1, description="requests that one key may send a minute")


class Redraft(Section):
    """How hard the server tries to keep a length that was asked for."""

    rounds: int = Field(2, ge=0, le=16, description="times that missed prompts are written again")
    samples: int = Field(4, ge=1, le=16, description="drafts a round for each missed prompt")


class ServeEngine(Engine):
    """An engine that answers for as long as it lives: it is worth compiling (docs/results/serving-cpu.md)."""

    max_model_len: int = Field(256, ge=64)
    max_num_seqs: int = Field(64, ge=1)
    eager: bool = Field(False, description="true: ready sooner (on two cores by 14 s, 30 the first time), slower after")


class Serve(Section):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    require_keys: bool = Field(True, description="false: no key is asked for, and then only loopback is answered")
    keys_file: str | None = Field(None, description="file of `python -m serve.keys new NAME`; default: $UDRL_API_KEYS")
    cors_origins: list[str] = Field(default_factory=list, description="origins whose pages may call the server")
    ingress_replicas: int = Field(1, ge=1, description="each enforces its share of a key's limits")
    min_replicas: int = Field(1, ge=0, description="engines; 0 lets the last one go after to_zero_delay_s without a request")
    max_replicas: int = Field(2, ge=1)
    target_ongoing_requests: int = Field(32, ge=1, description="requests an engine is to have; more, and another is started")
    upscale_delay_s: float = Field(5, ge=0)
    downscale_delay_s: float = Field(300, ge=0)
    to_zero_delay_s: float = Field(900, ge=0)
    queue: int = Field(64, ge=0, description="requests that may wait for an engine; further ones are answered with 503")
    request_timeout_s: float = Field(30, gt=0)
    redraft: Redraft = Redraft()
    limits: ServeLimits = ServeLimits()
    sampling: Sampling = Sampling(temperature=0.7)
    engine: ServeEngine = ServeEngine()
    placement: Placement = Placement()


class Recipe(Section):
    """One run."""

    name: str = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]*$")
    storage: str = Field(min_length=1, description="folder or URI of the run's outputs")
    resume: Literal["never", "always", "if_possible"] = Field(
        "always", description="where settings changed, 'always' stops and names them, 'if_possible' starts anew beside the old"
    )
    episodes_from: str | None = Field(
        None, min_length=1, description="storage of another run, on whose intents and episodes this one trains and is evaluated"
    )
    dry_run: bool = Field(False, description="jobs.generate prints its plan (requests, tokens, files, hours, cost) and stops")
    watchdog_minutes: float = Field(30, gt=0, description="a stage without progress for this long is ended")
    seed: int = Field(0, ge=0)
    tasks: list[str] = Field(min_length=1, description="shipped task names or paths of task files")
    intents: Intents = Intents()
    teacher: Teacher = Teacher()
    rewards: Rewards = Rewards()
    commands: Commands = Commands()
    student: Student = Student()
    train: Train = Train()
    rounds: int = Field(0, ge=0, le=50, description="after the teacher's: explore, score, relabel, retrain")
    explore: Explore = Explore()
    evaluate: Evaluate = Evaluate()
    serve: Serve = Serve()

    def episodes_of(self) -> str:
        """Storage of the run whose intents and episodes are used."""
        return self.episodes_from or self.storage

    @field_validator("tasks")
    @classmethod
    def _distinct(cls, tasks: list[str]) -> list[str]:
        if len(set(tasks)) < len(tasks):
            raise ValueError("a task is named twice")
        return tasks

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.intents.source.startswith("builtin:") and self.intents.limit is None:
            raise ValueError("intents.limit: must be set when intents.source is the built-in composer")
        too_long = [n for n in self.evaluate.lengths or () if not 1 <= n <= self.commands.max_words]
        if too_long:
            raise ValueError(f"evaluate.lengths: {too_long} lie outside 1..commands.max_words={self.commands.max_words}")
        words, reward, commands = self.evaluate.words or 0, self.evaluate.reward or 0, self.commands
        if words > commands.max_words:
            raise ValueError(f"evaluate.words: {words} is more than commands.max_words={commands.max_words}")
        if reward >= commands.reward_bins:
            raise ValueError(f"evaluate.reward: {reward} is no bin: 0 to {commands.reward_bins - 1} (commands.reward_bins)")
        for judge in self.evaluate.judges:
            self._not_the_scorer(judge)
        if (self.train.min_workers or 0) > self.train.workers:
            raise ValueError(f"train.min_workers: {self.train.min_workers} is more than train.workers={self.train.workers}")
        batch = self.train.batch_tokens
        if batch is not None and batch < self.student.context * self.train.workers:
            raise ValueError(
                f"train.batch_tokens: {batch} is less than one row of student.context={self.student.context}"
                f" for each of train.workers={self.train.workers}"
            )
        if self.serve.min_replicas > self.serve.max_replicas:
            raise ValueError(
                f"serve.min_replicas: {self.serve.min_replicas} is more than serve.max_replicas={self.serve.max_replicas}"
            )
        return self

    def _not_the_scorer(self, judge: Judge) -> None:
        """A student was trained towards the reward's scorer; what that says of it afterwards proves nothing."""
        rewards = self.rewards
        embeds = rewards.relevance == "embedding" and judge.kind == "embedding" and judge.model == rewards.embedder
        scores = rewards.relevance == "judge" and judge.kind in ("rubric", "pairwise") and judge.model == rewards.judge.model
        if embeds or scores:
            raise ValueError(f"evaluate.judges: {judge.called}: {judge.model} made the training reward; choose another model")


def load(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply ``dotted.key=value`` overrides (values are YAML).

    Raises:
        UserError: file absent, not YAML, or a key or value that the recipe does not allow.
    """
    try:
        with open(path, encoding="utf-8") as source:
            values = yaml.safe_load(source)
    except OSError as error:
        raise UserError(f"recipe {path}: {error.strerror or error}; recipes shipped here lie in recipes/") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {path}: expected keys and values, found {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return validate(values, path)


def validate(values: dict[str, Any], origin: str) -> Recipe:
    """Build a recipe from plain values; ``origin`` is named in the error lines."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(problem_line(origin, problem) for problem in error.errors())) from error


def problem_line(origin: str, problem: Any) -> str:
    """One line of a pydantic problem: the dotted key, what was given, what is allowed."""
    parts = [str(part) for part in problem["loc"]]
    key = ".".join(part if part and part.isprintable() else repr(part) for part in parts)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"{origin}: {key}: unknown key; allowed here: {', '.join(_siblings(problem['loc'])) or 'see the docs'}"
    if problem["type"] == "missing":
        return f"{origin}: {key}: missing; it must be given"
    given = f": got {problem['input']!r}" if key else ""
    return f"{origin}: {key + ': ' if key else ''}{message}{given[:120]}"


def _siblings(loc: Sequence[str | int]) -> list[str]:
    model: Any = Recipe
    for part in loc[:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        model = field.annotation if field else None
    return sorted(getattr(model, "model_fields", {}))


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}: expected dotted.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not YAML: {' '.join(str(error).split())}") from error
    *sections, last = key.split(".")
    target = values
    for section in sections:
        if target.get(section) is None:  # absent, or a heading with nothing below it
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise UserError(f"override {override!r}: {section} is a value, not a section")
    target[last] = value


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key with its value."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def from_command_line(argv: Sequence[str], description: str, plans: bool = False) -> Recipe:
    """Parse ``RECIPE [dotted.key=value ...]``; ``--print`` shows the resolved recipe and stops. ``plans`` says that the job
    knows ``dry_run``."""
    parser = argparse.ArgumentParser(description=description, epilog="Overrides are YAML values: train.epochs=2")
    parser.add_argument("recipe", help="recipe file, such as recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    parser.add_argument("--print", action="store_true", help="print the resolved recipe and stop")
    logs.configure()
    arguments = parser.parse_intermixed_args(argv)  # --print may stand anywhere
    recipe = load(arguments.recipe, arguments.overrides)
    places = {"storage": recipe.storage, "episodes_from": recipe.episodes_from}
    recipe = recipe.model_copy(
        update={
            key: place if place is None or "://" in place else os.path.abspath(os.path.expanduser(place))
            for key, place in places.items()
        }
    )
    if recipe.dry_run and not plans:
        raise UserError("dry_run: only jobs.generate has a plan to show; run it there")
    if arguments.print:
        print(dump(recipe), end="")
        raise SystemExit(0)
    return recipe
