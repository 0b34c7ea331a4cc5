"""The dataset card beside a run's episodes, after the conventions of Hugging Face: ``README.md`` and pictures in ``card/``.

``datasets.load_dataset(<the run's storage>)`` reads it and finds the episodes, and the rejects as its second configuration.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow.parquet as pq
import yaml

from udrl import storage
from udrl.episodes import COMPONENTS, Reason
from udrl.generate import histograms
from udrl.generate.histograms import Counts, median
from udrl.licenses import License, license_of, license_section
from udrl.policies.policy import sampling_kwargs
from udrl.recipe import Recipe, Rewards
from udrl.storage import without_credentials
from udrl.tables import markdown_table
from udrl.tasks import Task, load_tasks, shipped_tasks

COLUMNS = {
    "episode_id": "63-bit hash of everything that tells two requests of a run apart; unique",
    "intent_id": "63-bit hash of the intent's text",
    "intent": "the user's short request",
    "task": "the kind of prompt to write from it",
    "policy": "who wrote it: the teacher, or a student of some round",
    "model": "the model behind the policy, as the recipe names it",
    "model_revision": "its revision, or a hash of its files",
    "round": "0 for the teacher's, then one a round of exploration",
    "variation": "number of the sample, of one intent and task",
    "command_words": "the length in words that was asked for; -1 for none",
    "command_reward": "the reward bin that was asked for; -1 for none",
    "request_fingerprint": "hash of template, sampling, model and revision: equal ones draw from one distribution",
    "input_tokens": "tokens of the request; those of a structured one are shared out among the prompts that it brings",
    "output_tokens": "tokens of the completion, shared out likewise",
    "finish_reason": "why the completion ended: stop, or length where it used all its tokens",
    "prompt": "the text that was written",
    "n_words": "its length in words, as white space separates them",
    "relevance": "0..1: how well the prompt serves the intent (see below for who says so)",
    "novelty": "0..1: share of its distinct words that the intent does not have; 0 for an echo",
    "repetition": "0..1: share of distinct word pairs; 1 where none comes twice",
    "format": "0..1: share of the task's preferred patterns that it matches",
    "length": "0..1: closeness to the commanded length; 1 where none was asked for",
    "reward": "0..1: the weighted mean of the components",
}
REASONS = {
    Reason.ENGINE_ERROR: "the engine failed on the request",
    Reason.INPUT_TOO_LONG: "the request does not fit the model's context",
    Reason.EMPTY: "nothing was written",
    Reason.TRUNCATED: "it did not end within its tokens",
    Reason.MISSING: "a structured completion brought fewer prompts than were asked for",
    Reason.GARBLED: "bytes that are no text",
    Reason.REFUSAL: "the model declined, or spoke of itself",
    Reason.MALFORMED: "it breaks the task's length or patterns",
    Reason.WRONG_SCRIPT: "another script than the task's",
    Reason.WRONG_LANGUAGE: "another language than the task's",
    Reason.ECHO: "it says little that the intent does not",
    Reason.REPETITIVE: "it repeats itself",
    Reason.FEW_SHOT_LEAK: "it copies an example that the model was shown",
    Reason.DUPLICATE: "said before, letter case aside",
    Reason.NEAR_DUPLICATE: "almost said before",
}


def write_card(recipe: Recipe, summary: dict[str, Any], folder: str) -> None:
    """Write ``README.md`` and ``card/*.png`` under ``folder``, the run's storage, from the Parquet files that lie there.

    ``summary`` is the stage's (``generate.json``): ``intents`` names the folder of the run's intents.
    """
    counts = histograms.count(folder)
    pictures = histograms.draw(counts)
    for name, data in pictures.items():
        storage.write_bytes(storage.join(folder, "card", name), data)
    storage.write_bytes(storage.join(folder, "README.md"), _text(recipe, summary, folder, counts, list(pictures)).encode())


def _text(recipe: Recipe, summary: dict[str, Any], folder: str, counts: Counts, pictures: Sequence[str]) -> str:
    license_ = license_of(recipe.teacher.model)
    has_rejects = any(n.endswith(".parquet") for n in storage.list_files(storage.join(folder, "rejects")))
    parts = [
        "---\n" + yaml.safe_dump(_front(recipe, license_, counts, has_rejects), sort_keys=False, allow_unicode=True) + "---",
        f"# {recipe.name}: prompts for {len(recipe.tasks)} tasks, with their rewards",
        f"{counts.accepted:,} *episodes*: a short user request (intent), a task, the prompt that `{recipe.teacher.model}` wrote"
        " for it, and the reward that the prompt achieved. They are made to train a small model by upside-down reinforcement"
        " learning. Weak prompts are kept with their low rewards on purpose; to imitate the best alone, filter on `reward`.",
        *([f"**{license_.notice}**"] if license_.notice else []),
        "## Load",
        _load(folder, has_rejects),
        "## Counts",
        _counts(counts),
        *_pictured(pictures),
        "## Columns",
        markdown_table(["column", "meaning"], [[f"`{name}`", meaning] for name, meaning in COLUMNS.items()]),
        "The rejects have the same keys, the raw `completion`, its `reason` and a `detail`.",
        "## How it was made",
        _recipe(recipe),
        *_tasks(load_tasks(recipe.tasks)),
        _intents(recipe, summary, folder),
        _filters(recipe),
        "## Teacher and license",
        _writers(counts),
        license_section(recipe.teacher.model),
        "## Known limits",
        _limits(recipe),
    ]
    return "\n\n".join(parts) + "\n"


def _front(recipe: Recipe, license_: License, counts: Counts, has_rejects: bool) -> dict[str, Any]:
    front: dict[str, Any] = {"pretty_name": recipe.name, "license": license_.id}
    if license_.id == "other":
        front |= {"license_name": "as-of-the-teacher-model", "license_link": license_.url}
    if set(recipe.tasks) <= set(shipped_tasks()):  # these are English; of a user's own tasks the language is not known
        front["language"] = ["en"]
    configs = [{"config_name": "episodes", "default": True, "data_files": "episodes/*.parquet"}]
    if has_rejects:
        configs.append({"config_name": "rejects", "data_files": "rejects/*.parquet"})
    return front | {
        "task_categories": ["text-generation"],
        "size_categories": [_size_category(counts.accepted)],
        "annotations_creators": ["machine-generated"],
        "language_creators": ["machine-generated"],
        "tags": ["synthetic", "distillation", "prompt-generation", "upside-down-reinforcement-learning", "udrl"],
        "configs": configs,
    }


def _size_category(n: int) -> str:
    """``12_000`` -> ``10K<n<100K``, as Hugging Face names them."""
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    place = sum(n >= 1000 * 10**i for i in range(len(names)))
    return "n<1K" if place == 0 else "n>1T" if place == len(names) else f"{names[place - 1]}<n<{names[place]}"


def _load(folder: str, has_rejects: bool) -> str:
    lines = [f'episodes = load_dataset("{without_credentials(folder)}", split="train")']
    if has_rejects:
        lines.append(f'rejects = load_dataset("{without_credentials(folder)}", "rejects", split="train")')
    return "```python\nfrom datasets import load_dataset\n\n" + "\n".join(lines) + "\n```"


def _counts(counts: Counts) -> str:
    rejected = counts.reasons.total()
    asked = counts.accepted + rejected
    rows = [
        [f"`{task}`", f"{n:,}", f"{counts.rejected[task]:,}", _median_reward(counts, task), _median_words(counts, task)]
        for task, n in ((task, counts.of_task(task)) for task in sorted(counts.words | counts.rejected))
    ]
    text = (
        f"{asked:,} prompts were requested: {counts.accepted:,} accepted ({_share(counts.accepted, asked)}),"
        f" {rejected:,} rejected.\n\n"
    )
    text += markdown_table(["task", "accepted", "rejected", "median reward", "median words"], rows)
    reasons = [
        [f"`{reason}`", f"{n:,}", _share(n, asked), REASONS.get(Reason(reason), "")]
        for reason, n in counts.reasons.most_common()
    ]
    return text + ("\n\n" + markdown_table(["reason of rejection", "prompts", "of all", "meaning"], reasons) if reasons else "")


def _median_reward(counts: Counts, task: str) -> str:
    return f"{median(counts.values[task, 'reward'], 1 / histograms.BINS):.2f}" if counts.of_task(task) else ""


def _median_words(counts: Counts, task: str) -> str:
    return f"{median(counts.words[task]):.0f}" if counts.of_task(task) else ""


def _pictured(pictures: Sequence[str]) -> Iterator[str]:
    titles = {"reward.png": "Reward", "components.png": "Reward components", "length.png": "Length"}
    for name in pictures:
        yield f"### {titles[name]}"
        yield f"![{titles[name]} by task](card/{name})"
        yield histograms.CAPTIONS[name]


def _recipe(recipe: Recipe) -> str:
    teacher = recipe.teacher
    weights = recipe.rewards.weights.model_dump()
    total = sum(weights.values())
    mix = " + ".join(f"{weights[c] / total:.2f} {c}" for c in COMPONENTS if weights[c]) if total else "none"
    rows = [
        ["tasks", ", ".join(f"`{task}`" for task in recipe.tasks)],
        ["prompts", f"{teacher.samples} for each intent and task"],
        ["asked by", "chat template" if teacher.style == "chat" else "raw few-shot completion"],
        ["sampling", ", ".join(f"{name} {value}" for name, value in sampling_kwargs(teacher.sampling).items())],
        ["structured", ", ".join(f"{t}: {k} prompts a request" for t, k in teacher.structured.items()) or "no"],
        ["seed", str(recipe.seed)],
        ["reward", mix],
        ["relevance", describe_relevance(recipe.rewards)],
    ]
    return markdown_table(["setting", "value"], rows) + "\n\nAll settings: [recipe.yaml](recipe.yaml)."


def describe_relevance(rewards: Rewards) -> str:
    """Return a phrase that says how relevance was scored."""
    if rewards.relevance == "judge":
        return f"expected score of the judge `{rewards.judge.model}` on a rubric of 1 to 10"
    return f"cosine of intent and prompt under the embedder `{rewards.embedder}`"


def _tasks(tasks: Sequence[Task]) -> list[str]:
    rows = [[f"`{t.name}`", f"{t.format.min_words} to {t.format.max_words}", " ".join(t.instruction.split())] for t in tasks]
    return ["### Tasks", markdown_table(["task", "words", "what the teacher is told, before examples"], rows)]


def _intents(recipe: Recipe, summary: dict[str, Any], folder: str) -> str:
    config = recipe.intents
    if config.source == "builtin:composer":
        origin = "The intents are composed from a grammar of subjects, occasions and styles; no user wrote them."
    else:
        origin = f"The intents are read from `{without_credentials(config.source)}`; their origin is documented there."
    if config.expand:
        origin += f" The teacher then grew them towards {config.expand.target:,} more, shown {config.expand.shown} at a time."
    place = storage.join(folder, "intents", str(summary.get("intents", "")))
    train, heldout = (_rows(storage.join(place, f"{name}.parquet")) for name in ("train", "heldout"))
    split = (
        f"About {config.heldout:.0%} of their *subjects* are held out: no episode has an intent on them; they are for"
        " evaluation."
    )
    if train is not None and heldout is not None:
        split += f" {train:,} intents are for training, {heldout:,} are held out (`intents/*/heldout.parquet`)."
    lines = ["### Intents", origin, split]
    reasons = _dropped(storage.join(place, "rejects.parquet"))
    if reasons:
        told = ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common())
        lines.append(f"Rows of the source that gave no intent: {told} (`intents/*/rejects.parquet`).")
    return "\n\n".join(lines)


def _rows(uri: str) -> int | None:
    """Rows of a Parquet file, from its footer."""
    if not storage.exists(uri):
        return None
    fs, path = storage.open_filesystem(uri)
    with fs.open_input_file(path) as source:
        return pq.ParquetFile(source).metadata.num_rows


def _dropped(uri: str) -> Counter[str]:
    """Rows of the source by the reason why they gave no intent; they may be as many as the source has."""
    reasons: Counter[str] = Counter()
    if storage.exists(uri):
        fs, path = storage.open_filesystem(uri)
        with fs.open_input_file(path) as source:
            for batch in pq.ParquetFile(source).iter_batches(columns=["reason"]):
                reasons.update(batch.column(0).to_pylist())
    return reasons


def _filters(recipe: Recipe) -> str:
    config = recipe.rewards.deduplicate
    near = (
        f" One whose word pairs have a Jaccard similarity of about {config.near:g} or more to those of an earlier prompt of its"
        " task is a near-duplicate, whichever intent brought it (MinHash-LSH)."
        if config.near is not None
        else " Near-duplicates are kept."
    )
    return (
        "### Filters and deduplication\n\nA completion is rejected for one of the reasons above, the first that holds. Nothing"
        " is thrown away: rejects lie beside the episodes, with what the model wrote. A prompt that its intent and task already"
        f" have, letter case aside, is a duplicate, whichever round brought it.{near} The first one stays. What was said is"
        f" remembered in Bloom filters with a false-positive rate of {config.false_positives:g} each: so few new prompts are"
        " rejected as said before."
    )


def _writers(counts: Counts) -> str:
    rows = [
        [policy, f"`{model}`", f"`{revision}`", str(round_), f"{n:,}"]
        for (policy, model, revision, round_), n in counts.writers.most_common()
    ]
    return markdown_table(["policy", "model", "revision", "round", "episodes"], rows)


def _limits(recipe: Recipe) -> str:
    judged = f"judged by `{recipe.rewards.judge.model}`" if recipe.rewards.relevance == "judge" else "measured by embeddings"
    return "\n".join(
        [
            "- Every prompt is machine-written; nobody has read them all. They have the teacher's errors and biases.",
            f"- Relevance is {judged}: an approximation that can be gamed; novelty, repetition and format bound that, no more."
            " Don't evaluate a model by the scorer that made its rewards.",
            "- Prompts of one intent are alike: split by `intent_id`, or better by subject, never by row.",
            "- Format scores and filters are patterns. They miss what no pattern names.",
        ]
    )


def _share(n: int, of: int) -> str:
    return f"{n / of:.1%}" if of else "0%"
