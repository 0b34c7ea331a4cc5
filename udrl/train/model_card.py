"""The model card in an exported student, after the conventions of Hugging Face."""

import os
from collections.abc import Sequence
from typing import Any

import yaml

from udrl import commands, licenses, models
from udrl.commands import Command, CommandVocabulary
from udrl.episodes import COMPONENTS
from udrl.generate.dataset_card import describe_relevance
from udrl.progress import duration
from udrl.recipe import Recipe
from udrl.storage import without_credentials
from udrl.tables import markdown_table
from udrl.tasks import shipped_tasks

OBJECTIVES = {
    "udrl": "Each episode is labelled with the command that it turned out to fulfil (upside-down reinforcement learning,"
    " Schmidhuber 2019, arXiv 1912.02875); the student learns to write what a command asks for.",
    "sft": "It is fine-tuned on all episodes alike. It learnt no lengths and rewards: its command is always `any`.",
    "sft_top": "It is fine-tuned on the episodes with the highest rewards. It learnt no lengths and rewards: its command is"
    " always `any`.",
}


def text(recipe: Recipe, training: dict[str, Any], vocabulary: CommandVocabulary, lineage: dict[str, Any]) -> str:
    """``README.md`` of an export. ``training`` is the content of ``training.json``; of its keys all but ``parameters`` may be
    absent. ``lineage`` is as in :func:`udrl.train.export.export`."""
    by_model = _licenses(recipe)
    notices = list(dict.fromkeys(each.notice for each in by_model.values() if each.notice))
    parts = [
        "---\n" + _front(recipe, by_model) + "\n---",
        f"# {_name(recipe, by_model)}",
        f"A GPT-2 of {training['parameters'] / 1e6:.1f}M parameters that turns a short user request (*intent*) into a prompt"
        f" for {', '.join(f'`{task}`' for task in vocabulary.tasks)}. Task, length and reward are commands. {_origin(recipe)}",
        *(f"**{notice}**" for notice in notices),
        "## Use",
        _use(vocabulary),
        "## Commands",
        _commands(vocabulary),
        "## Metrics",
        _metrics(training, vocabulary),
        "## Training",
        OBJECTIVES[vocabulary.objective],
        _training(recipe, training),
        _settings(recipe),
        "## Data",
        _data(recipe, lineage.get("generate") or {}, lineage.get("round", 0), lineage.get("rounds") or []),
        "## Licenses",
        *map(licenses.license_section, by_model),
        "## Known limits",
        _limits(),
    ]
    return "\n\n".join(parts) + "\n"


def _licenses(recipe: Recipe) -> dict[str, licenses.License]:
    """Return the licenses of the teacher and of the model whose weights the student started from, by model."""
    names = [recipe.teacher.model, *([recipe.student.init] if recipe.student.init else [])]
    return {model: licenses.license_of(model) for model in names}


def _front(recipe: Recipe, by_model: dict[str, licenses.License]) -> str:
    from huggingface_hub import ModelCardData

    ids = {each.id for each in by_model.values()}
    license_ = next(iter(by_model.values()))
    facts: dict[str, Any] = {"license": license_.id if len(ids) == 1 else "other"}
    if facts["license"] == "other":
        facts |= {"license_name": "see-licenses-below", "license_link": license_.url}
    if set(recipe.tasks) <= set(shipped_tasks()):  # these are English; of a user's own tasks the language is not known
        facts["language"] = ["en"]
    if _on_hub(recipe.student.init):
        facts["base_model"] = recipe.student.init
    tags = ["gpt2", "distillation", "prompt-generation", "upside-down-reinforcement-learning", "udrl"]
    data = ModelCardData(
        **facts, library_name="transformers", pipeline_tag="text-generation", tags=tags, teacher=_source(recipe.teacher.model)
    )
    return str(data.to_yaml())


def _on_hub(model: str | None) -> bool:
    return model is not None and not model.startswith(models.PREFIX) and "://" not in model and not os.path.isdir(model)


def _source(model: str) -> str:
    """The name under which others know a model."""
    if model.startswith(models.PREFIX):
        return models.BUNDLED[model.removeprefix(models.PREFIX)].source
    return without_credentials(model)


def _name(recipe: Recipe, by_model: dict[str, licenses.License]) -> str:
    """Return the run's name, after the word that a Llama license requires (see ``udrl.licenses``)."""
    notices = {each.notice for each in by_model.values()}
    begin = "Llama 3" if "Built with Meta Llama 3" in notices else "Llama" if "Built with Llama" in notices else ""
    if recipe.name.casefold().replace("-", " ").startswith(begin.casefold()):
        return recipe.name
    return f"{begin} {recipe.name}"


def _origin(recipe: Recipe) -> str:
    start = f", from the weights of `{without_credentials(recipe.student.init)}`" if recipe.student.init else ""
    return f"It is distilled from `{_source(recipe.teacher.model)}`{start}."


def _use(vocabulary: CommandVocabulary) -> str:
    task = next(iter(vocabulary.tasks))
    asked = vocabulary.default(task) if vocabulary.objective == "udrl" else Command(task=task)
    control = ", ".join(f'"{token}"' for token in vocabulary.tokens(asked))
    return f"""```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its id on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
intent = "birthday invitation for a five-year-old who loves dinosaurs"
# A leading space, and split_special_tokens, so that no user can type a command.
ids = tokenizer(" " + " ".join(intent.split()), add_special_tokens=False, split_special_tokens=True)["input_ids"]
ids += tokenizer.convert_tokens_to_ids([{control}])
written = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
print(tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True).strip())
```

`generation_config.json` has the sampling, the end of text, and the control tokens that it may not write (`suppress_tokens`,
which vLLM does not read: give it their ids as `logit_bias`, or the logits processor
`udrl.policies.control_token_ban:BanControlTokens`)."""


def _commands(vocabulary: CommandVocabulary) -> str:
    lengths = [
        [f"`{name}`", *map(str, learnt.words), _or_any(learnt.default_words), _or_any(learnt.default_reward)]
        for name, learnt in vocabulary.tasks.items()
    ]
    bins = [
        [f"`{name}`", str(b), _span(learnt.edges, b), f"{learnt.counts[b]:,}", f"{learnt.achieved_reward[b]:.2f}",
         f"{learnt.achieved_relevance[b]:.2f}"]
        for name, learnt in vocabulary.tasks.items()
        for b in range(vocabulary.reward_bins)
    ]  # fmt: skip
    any_ = ", ".join(f"`{token}`" for token in (commands.word_token(commands.ANY), commands.reward_token(commands.ANY)))
    edges = "reward" if vocabulary.rank_within == "task" else "rank within intent"
    return "\n\n".join(
        [
            f"A request is the intent, then one token each for task, length in words (`{commands.word_token(1)}` to"
            f" `{commands.word_token(vocabulary.max_words)}`) and reward bin (`{commands.reward_token(0)}`, the lowest, to"
            f" `{commands.reward_token(vocabulary.reward_bins - 1)}`). {any_}: no matter. All of it is in `commands.json`.",
            markdown_table(["task", "words p5", "median", "p95", "default words", "default bin"], lengths),
            "What the training episodes in each reward bin achieved, before anything was learnt from them:",
            markdown_table(["task", "bin", edges, "episodes", "mean reward", "mean relevance"], bins),
        ]
    )


def _or_any(value: int) -> str:
    return "any" if value == commands.ANY else str(value)


def _span(edges: Sequence[float], b: int) -> str:
    low = f"{edges[b - 1]:.3f}" if b else ""
    high = f"{edges[b]:.3f}" if b < len(edges) else ""
    return f"{low} to {high}" if low and high else f"from {low}" if low else f"below {high}"


def _metrics(training: dict[str, Any], vocabulary: CommandVocabulary) -> str:
    rows = []
    if training.get("validation_loss") is not None:
        rows.append(["validation loss, a target token", f"{training['validation_loss']:.3f}"])
    if training.get("history"):
        rows.append(["training loss of the last step", f"{training['history'][-1][1]:.3f}"])
    for task in [None, *vocabulary.tasks]:
        end, where = (f"/{task}", f", `{task}`") if task else ("", "")
        if f"length_error{end}" in training:
            rows.append([f"mean distance from the commanded length{where}", f"{training[f'length_error{end}']:.1f} words"])
            rows.append([f"within two words of it{where}", f"{training[f'within_two{end}']:.0%}"])
    note = "Measured on validation intents, which are not trained on; lengths on a few of them, at the last validation."
    return markdown_table(["metric", "value"], rows) + "\n\n" + note if rows else "None was measured."


def _training(recipe: Recipe, training: dict[str, Any]) -> str:
    shape: dict[str, Any] = training.get("shape") or {}
    rows = [
        ["shape", ", ".join(f"{name} {value:g}" for name, value in shape.items())],
        ["context", f"{recipe.student.context} tokens a packed row; no attention across examples"],
        ["steps", f"{training['steps']:,}" if "steps" in training else ""],
        ["rows a step", f"{training['rows_per_step']:,}" if "rows_per_step" in training else ""],
        ["learning rate", f"{recipe.train.schedule}, warm-up {recipe.train.warmup:.0%} of the steps"],
        ["precision", f"{recipe.train.precision}, ZeRO stage {recipe.train.zero_stage}; exported as bf16"],
        ["time", duration(training["seconds"]) if "seconds" in training else ""],
        ["speed", f"{training['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in training else ""],
        ["workers", str(training.get("workers", ""))],
        ["seed", str(recipe.seed)],
        ["fingerprint", f"`{training['fingerprint']}`" if "fingerprint" in training else ""],
    ]
    return markdown_table(["setting", "value"], [row for row in rows if row[1]])


def _settings(recipe: Recipe) -> str:
    """What shaped it, in full; no place where anything lies."""
    sections = recipe.model_dump(mode="json", include={"commands", "student", "train"})
    sections["student"]["init"] = without_credentials(recipe.student.init) if recipe.student.init else None
    dumped = yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)
    return f"<details><summary>All settings</summary>\n\n```yaml\n{dumped}```\n\n</details>"


def _data(recipe: Recipe, generate: dict[str, Any], round_: int, rounds: Sequence[dict[str, Any]]) -> str:
    weights = recipe.rewards.weights.model_dump()
    mix = ", ".join(f"{weights[c]:g} {c}" for c in COMPONENTS if weights.get(c))
    numbers = [[f"prompts {name}", f"{generate[name]:,}"] for name in ("requested", "accepted", "rejected") if name in generate]
    marks = [[label, f"`{generate[name]}`"] for label, name in _MARKS.items() if generate.get(name)]
    rows = [
        ["teacher", f"`{without_credentials(recipe.teacher.model)}`"],
        *numbers,
        *marks,
        ["relevance", describe_relevance(recipe.rewards)],
        ["reward", mix],
    ]
    parts = [
        "The episodes (intent, task, prompt, reward) are machine-written; the run's storage has them with a card of their own.",
        markdown_table(["lineage", "value"], rows),
    ]
    if rounds:
        head = list(rounds[0])
        parts += [
            "Rounds of exploration:",
            markdown_table(head, [[str(entry.get(name, "")) for name in head] for entry in rounds]),
        ]
    return "\n\n".join(parts)


_MARKS = {"teacher's revision": "revision", "intents": "intents", "ledger of completions": "ledger", "scoring": "scoring"}


def _limits() -> str:
    return "\n".join(
        [
            "- It writes one family of short texts and is no assistant. It has its teacher's errors and biases.",
            "- A commanded length is met about, not exactly. A reward bin is a wish: what it buys is in the run's evaluation.",
            "- Subjects far from the training intents are copied with difficulty, or not at all.",
        ]
    )
