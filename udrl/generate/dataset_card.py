"""The dataset card of a run, after the conventions of Hugging Face: ``README.md``, with its plots in ``card/``.

``datasets.load_dataset(<the run's storage>)`` reads it and loads the episodes; the rejects are the second configuration.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow.parquet as pq
import yaml

from udrl import storage
from udrl.episodes import COMPONENTS, Reason
from udrl.generate.histograms import BINS, CAPTIONS, CardStatistics, collect_statistics, draw_plots, median_of_bins
from udrl.models import License, license_of, license_section
from udrl.policies.policy import sampling_kwargs
from udrl.recipe import Deduplicate, Recipe, Rewards
from udrl.run import GenerateSummary, IntentPaths, Run
from udrl.storage import without_credentials
from udrl.tasks import Task, load_tasks, shipped_tasks
from udrl.text import markdown_table

COLUMNS = {
    "episode_id": "63-bit hash of everything in which two requests of a run differ; unique",
    "intent_id": "63-bit hash of the intent's text",
    "intent": "the user's short request",
    "task": "the kind of prompt to write from it",
    "policy": "the writer: the teacher, or a student of some round",
    "model": "the model behind the policy, as the recipe names it",
    "model_revision": "its revision, or a hash of its files",
    "round": "0 for the teacher's prompts, then the number of the round of exploration",
    "variation": "number of the sample for one intent and task",
    "command_words": "the commanded length in words; -1: none",
    "command_reward": "the commanded reward bin; -1: none",
    "request_fingerprint": "hash of template, sampling, model and revision: equal ones draw from one distribution",
    "input_tokens": "tokens of the request; those of a structured request are divided among its prompts",
    "output_tokens": "tokens of the completion, divided in the same way",
    "finish_reason": "why the completion ended: stop, or length if it used all its tokens",
    "prompt": "the text that was written",
    "n_words": "its length in words, separated by white space",
    "relevance": "0..1: how well the prompt serves the intent (the scorer is named below)",
    "novelty": "0..1: share of its distinct words that the intent does not have; 0 for an echo",
    "repetition": "0..1: share of distinct word pairs; 1 if no pair occurs twice",
    "format": "0..1: share of the task's preferred patterns that it matches",
    "length": "0..1: closeness to the commanded length; 1 if none was commanded",
    "reward": "0..1: the weighted mean of the components",
}
REASONS = {
    Reason.ENGINE_ERROR: "the engine failed on the request",
    Reason.INPUT_TOO_LONG: "the request does not fit the model's context",
    Reason.EMPTY: "nothing was written",
    Reason.TRUNCATED: "it did not end within its tokens",
    Reason.MISSING: "a structured completion has fewer prompts than were requested",
    Reason.GARBLED: "it has bytes that are not text",
    Reason.REFUSAL: "the model declined, or wrote about itself",
    Reason.MALFORMED: "it violates the task's length or patterns",
    Reason.WRONG_SCRIPT: "it uses another script than the task",
    Reason.WRONG_LANGUAGE: "it uses another language than the task",
    Reason.ECHO: "it adds little to the intent",
    Reason.REPETITIVE: "it repeats itself",
    Reason.FEW_SHOT_LEAK: "it copies an example from the request",
    Reason.DUPLICATE: "it occurs before, ignoring case",
    Reason.NEAR_DUPLICATE: "it is very similar to an earlier prompt",
}


def write_card(recipe: Recipe, summary: GenerateSummary) -> None:
    """Write ``README.md`` and ``card/*.png`` of a run, from the run's Parquet files."""
    paths = Run(recipe.storage)
    statistics = collect_statistics(paths.scoring)
    plots = draw_plots(statistics)
    for name, data in plots.items():
        storage.write_bytes(paths.card_plot(name), data)
    text = _render_card(recipe, paths.intents(summary.intents), statistics, list(plots))
    storage.write_bytes(paths.card, text.encode())


def describe_relevance(rewards: Rewards) -> str:
    """Return a phrase that says how relevance was scored."""
    if rewards.relevance == "judge":
        return f"expected score of the judge `{rewards.judge.model}` on a rubric of 1 to 10"
    return f"cosine of intent and prompt under the embedder `{rewards.embedder}`"


def _render_card(recipe: Recipe, intents: IntentPaths, statistics: CardStatistics, plots: Sequence[str]) -> str:
    license_ = license_of(recipe.teacher.model)
    has_rejects = bool(storage.parquet_files(Run(recipe.storage).scoring.rejects))
    front = _front_matter(recipe, license_, statistics, has_rejects)
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---",
        f"# {recipe.name}: prompts for {len(recipe.tasks)} tasks, with their rewards",
        f"{statistics.n_accepted:,} *episodes*: a short user request (intent), a task, the prompt that `{recipe.teacher.model}`"
        " wrote for it, and the reward that the prompt achieved. They are made to train a small model by upside-down"
        " reinforcement learning. Weak prompts are kept with their low rewards on purpose; to imitate only the best, filter on"
        " `reward`.",
        *([f"**{license_.notice}**"] if license_.notice else []),
        "## Load",
        _load_section(recipe.storage, has_rejects),
        "## Counts",
        _counts_section(statistics),
        *_plot_sections(plots),
        "## Columns",
        markdown_table(["column", "meaning"], [[f"`{name}`", meaning] for name, meaning in COLUMNS.items()]),
        "The rejects have the same keys, the raw `completion`, its `reason` and a `detail`.",
        "## How it was made",
        _settings_section(recipe),
        *_tasks_section(load_tasks(recipe.tasks)),
        *_intents_section(recipe, intents),
        *_filters_section(recipe.rewards.deduplicate),
        "## Teacher and license",
        _writers_table(statistics),
        license_section(recipe.teacher.model),
        "## Known limits",
        _limits_section(recipe.rewards),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(recipe: Recipe, license_: License, statistics: CardStatistics, has_rejects: bool) -> dict[str, Any]:
    front: dict[str, Any] = {"pretty_name": recipe.name, "license": license_.id}
    if license_.id == "other":
        front |= {"license_name": "as-of-the-teacher-model", "license_link": license_.url}
    if set(recipe.tasks) <= set(shipped_tasks()):  # these are English; the language of a user's own tasks is unknown
        front["language"] = ["en"]
    configs = [{"config_name": "episodes", "default": True, "data_files": "episodes/*.parquet"}]
    if has_rejects:
        configs.append({"config_name": "rejects", "data_files": "rejects/*.parquet"})
    return front | {
        "task_categories": ["text-generation"],
        "size_categories": [size_category(statistics.n_accepted)],
        "annotations_creators": ["machine-generated"],
        "language_creators": ["machine-generated"],
        "tags": ["synthetic", "distillation", "prompt-generation", "upside-down-reinforcement-learning", "udrl"],
        "configs": configs,
    }


def size_category(n: int) -> str:
    """Return Hugging Face's name for the size of a data set: ``12_000`` -> ``10K<n<100K``."""
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    n_reached = sum(n >= 1000 * 10**i for i in range(len(names)))
    if n_reached == 0:
        return "n<1K"
    return "n>1T" if n_reached == len(names) else f"{names[n_reached - 1]}<n<{names[n_reached]}"


def _load_section(folder: str, has_rejects: bool) -> str:
    uri = without_credentials(folder)
    lines = [f'episodes = load_dataset("{uri}", split="train")']
    if has_rejects:
        lines.append(f'rejects = load_dataset("{uri}", "rejects", split="train")')
    return "```python\nfrom datasets import load_dataset\n\n" + "\n".join(lines) + "\n```"


def _counts_section(statistics: CardStatistics) -> str:
    accepted, rejected = statistics.n_accepted, statistics.n_rejected
    requested = accepted + rejected
    tasks = [_task_row(statistics, task) for task in sorted(statistics.words | statistics.rejected)]
    reasons = [
        [f"`{reason}`", f"{n:,}", _percent(n, requested), REASONS.get(Reason(reason), "")]
        for reason, n in statistics.reasons.most_common()
    ]
    parts = [
        f"{requested:,} prompts were requested: {accepted:,} accepted ({_percent(accepted, requested)}),"
        f" {rejected:,} rejected.",
        markdown_table(["task", "accepted", "rejected", "median reward", "median words"], tasks),
    ]
    if reasons:
        parts.append(markdown_table(["reason for rejection", "prompts", "share", "meaning"], reasons))
    return "\n\n".join(parts)


def _task_row(statistics: CardStatistics, task: str) -> list[str]:
    accepted, reward, words = statistics.n_accepted_of(task), "", ""
    if accepted:
        reward = f"{median_of_bins(statistics.values[task, 'reward'], 1 / BINS):.2f}"
        words = f"{median_of_bins(statistics.words[task]):.0f}"
    return [f"`{task}`", f"{accepted:,}", f"{statistics.rejected[task]:,}", reward, words]


def _plot_sections(plots: Sequence[str]) -> Iterator[str]:
    titles = {"reward.png": "Reward", "components.png": "Reward components", "length.png": "Length"}
    for name in plots:
        yield f"### {titles[name]}"
        yield f"![{titles[name]} by task](card/{name})"
        yield CAPTIONS[name]


def _settings_section(recipe: Recipe) -> str:
    teacher = recipe.teacher
    weights = recipe.rewards.weights.model_dump()
    total = sum(weights.values())
    mix = " + ".join(f"{weights[c] / total:.2f} {c}" for c in COMPONENTS if weights[c]) if total else "none"
    rows = [
        ["tasks", ", ".join(f"`{task}`" for task in recipe.tasks)],
        ["prompts", f"{teacher.samples} for each intent and task"],
        ["requests", "chat template" if teacher.style == "chat" else "raw few-shot completion"],
        ["sampling", ", ".join(f"{name} {value}" for name, value in sampling_kwargs(teacher.sampling).items())],
        ["structured", ", ".join(f"{task}: {n} prompts per request" for task, n in teacher.structured.items()) or "no"],
        ["seed", str(recipe.seed)],
        ["reward", mix],
        ["relevance", describe_relevance(recipe.rewards)],
    ]
    return markdown_table(["setting", "value"], rows) + "\n\nAll settings: [recipe.yaml](recipe.yaml)."


def _tasks_section(tasks: Sequence[Task]) -> list[str]:
    rows = [[f"`{t.name}`", f"{t.format.min_words} to {t.format.max_words}", " ".join(t.instruction.split())] for t in tasks]
    return ["### Tasks", markdown_table(["task", "words", "the teacher's instruction, which examples follow"], rows)]


def _intents_section(recipe: Recipe, paths: IntentPaths) -> list[str]:
    config = recipe.intents
    if config.source == "builtin:composer":
        origin = "The intents are composed from a grammar of subjects, occasions and styles; no user wrote them."
    else:
        origin = f"The intents are read from `{without_credentials(config.source)}`, which documents their origin."
    if config.expand:
        origin += (
            f" The teacher then added up to {config.expand.target:,} intents; each request showed it {config.expand.shown} of"
            " them."
        )
    split = f"About {config.heldout:.0%} of their *subjects* are held out for evaluation: no episode has an intent on them."
    train, heldout = _count_rows(paths.train), _count_rows(paths.heldout)
    if train is not None and heldout is not None:
        split += f" {train:,} intents are for training, {heldout:,} are held out (`intents/*/heldout.parquet`)."
    parts = ["### Intents", origin, split]
    if reasons := _count_reasons(paths.rejects):
        counts = ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common())
        parts.append(f"Rows of the source that gave no intent: {counts} (`intents/*/rejects.parquet`).")
    return parts


def _count_rows(uri: str) -> int | None:
    """Return the rows of a Parquet file, from its footer; None if it does not exist."""
    if not storage.exists(uri):
        return None
    fs, path = storage.open_filesystem(uri)
    with fs.open_input_file(path) as source:
        return pq.ParquetFile(source).metadata.num_rows


def _count_reasons(uri: str) -> Counter[str]:
    """Count a file's rows by their reason, in batches: there may be as many as the source has."""
    reasons: Counter[str] = Counter()
    if storage.exists(uri):
        fs, path = storage.open_filesystem(uri)
        with fs.open_input_file(path) as source:
            for batch in pq.ParquetFile(source).iter_batches(columns=["reason"]):
                reasons.update(batch.column(0).to_pylist())
    return reasons


def _filters_section(config: Deduplicate) -> list[str]:
    if config.near is None:
        near = "Near-duplicates are kept."
    else:
        near = (
            "A prompt is a near-duplicate if the Jaccard similarity of its word pairs to those of an earlier prompt of its task"
            f" is about {config.near:g} or more, even for another intent (MinHash-LSH)."
        )
    text = (
        "A completion is rejected for the first of the reasons above that applies. No completion is deleted: rejects are stored"
        " next to the episodes, with the raw text. A prompt is a duplicate if its intent and task already have it, ignoring"
        f" case, from any round. {near} The first prompt stays. Earlier prompts are remembered in Bloom filters with a"
        f" false-positive rate of {config.false_positives:g} each; a false positive rejects a new prompt as a duplicate."
    )
    return ["### Filters and deduplication", text]


def _writers_table(statistics: CardStatistics) -> str:
    rows = [
        [policy, f"`{model}`", f"`{revision}`", str(round_), f"{n:,}"]
        for (policy, model, revision, round_), n in statistics.writers.most_common()
    ]
    return markdown_table(["policy", "model", "revision", "round", "episodes"], rows)


def _limits_section(rewards: Rewards) -> str:
    scorer = f"judged by `{rewards.judge.model}`" if rewards.relevance == "judge" else "measured by embeddings"
    return "\n".join(
        [
            "- Every prompt is machine-written, and nobody has read all of them. They have the teacher's errors and biases.",
            f"- Relevance is {scorer}: an approximation that can be gamed; novelty, repetition and format only limit that."
            " Don't evaluate a model by the scorer that made its rewards.",
            "- Prompts of one intent are alike: split by `intent_id`, or better by subject, never by row.",
            "- Format scores and filters are patterns. They miss everything that no pattern describes.",
        ]
    )


def _percent(n: int, total: int) -> str:
    return f"{n / total:.1%}" if total else "0%"
