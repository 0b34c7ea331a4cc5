"""The finished student as a plain Hugging Face folder, which transformers and vLLM load without code of ours.

Its README.md is a model card in the format of Hugging Face.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from udrl import commands, internals, models, storage
from udrl import tokenizer as tokenizers
from udrl.commands import Command, CommandVocabulary
from udrl.episodes import COMPONENTS
from udrl.generate.dataset_card import describe_relevance
from udrl.progress import duration
from udrl.recipe import Recipe, Sampling
from udrl.run import GenerateSummary, StudentPaths, TrainingSummary
from udrl.storage import without_credentials
from udrl.tasks import shipped_tasks
from udrl.text import markdown_table


@dataclass(frozen=True)
class Lineage:
    """The student's origin, for its card: the recipe as the user wrote it, and the summary of the generate stage."""

    recipe: Recipe
    generate: GenerateSummary | None


def gather_weights(engine: Any, network: Any, rank: int) -> dict[str, Any]:
    """Return the network's weights as bf16 on the CPU at rank 0, and nothing on the other ranks.

    Every worker calls it: ZeRO-3 gathers its shards in a collective.
    """
    import torch

    if engine.zero_optimization_stage() == 3:
        state = {name.removeprefix("network."): tensor for name, tensor in internals.gather_zero3_weights(engine).items()}
    else:
        state = network.state_dict() if rank == 0 else {}
    # bf16 copies of tied weights are separate tensors, and transformers would save both.
    state.pop("lm_head.weight", None)
    return {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in state.items()}


def export_student(
    weights: dict[str, Any], network: Any, tokenizer_folder: str, uri: str, summary: TrainingSummary, lineage: Lineage
) -> None:
    """Write safetensors (bf16), tokenizer, commands, generation settings, model card and ``training.json`` to ``uri``.

    ``training.json`` is written last: if it is there, the export is complete.

    Args:
        weights: from :func:`gather_weights`.
        network: gives the weights' configuration.
        tokenizer_folder: local, with ``commands.json``.
        summary: without ``parameters`` and ``weights``, which are added here.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].view(torch.uint8).numpy().tobytes())
    parameters = sum(tensor.numel() for tensor in weights.values())
    summary = summary.model_copy(update={"parameters": parameters, "weights": digest.hexdigest()[:16]})
    tokenizer, vocabulary = tokenizers.load_tokenizer(tokenizer_folder), CommandVocabulary.load(tokenizer_folder)
    card = render_model_card(lineage.recipe, summary, vocabulary, lineage.generate)
    finished = StudentPaths(uri).training
    with tempfile.TemporaryDirectory() as folder:
        network.config.dtype = "bfloat16"
        sampling = lineage.recipe.serve.sampling
        network.generation_config = _generation_config(sampling, tokenizer, vocabulary, network.config.n_positions)
        network.save_pretrained(folder, state_dict=dict(weights))  # a copy, because save_pretrained empties its argument
        for name in os.listdir(tokenizer_folder):
            shutil.copy(os.path.join(tokenizer_folder, name), folder)
        with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as out:
            out.write(card)
        storage.remove(finished)
        storage.upload_folder(folder, uri)
        summary.save(finished)


def _generation_config(sampling: Sampling, tokenizer: Any, vocabulary: CommandVocabulary, positions: int) -> Any:
    """Return transformers' default generation settings: those that the student is served with.

    transformers has no frequency penalty. vLLM takes only the end of text from this file; our engines pass the recipe's
    sampling settings.
    """
    from transformers import GenerationConfig

    sampling_settings = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,  # also if it is 0, because transformers' default is 50
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
    }
    return GenerationConfig(
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=tokenizers.banned_ids(tokenizer, vocabulary),
        max_new_tokens=min(sampling.max_tokens, positions // 2),
        repetition_penalty=sampling.repetition_penalty,
        do_sample=sampling.temperature > 0,
        **(sampling_settings if sampling.temperature > 0 else {}),
    )


OBJECTIVES = {
    "udrl": "Each episode is labeled with the command that it turned out to fulfill (upside-down reinforcement learning,"
    " Schmidhuber 2019, arXiv 1912.02875). The student learns to write the prompt that a command describes.",
    "sft": "It is fine-tuned on all episodes equally. It has not learned lengths and rewards: its command is always `any`.",
    "sft_top": "It is fine-tuned on the episodes with the highest rewards. It has not learned lengths and rewards: its command"
    " is always `any`.",
}


def render_model_card(
    recipe: Recipe, summary: TrainingSummary, vocabulary: CommandVocabulary, generate: GenerateSummary | None
) -> str:
    """Return ``README.md`` of an export. ``generate`` is None if the episodes have no summary of a generate stage."""
    license_by_model = _licenses_of(recipe)
    notices = list(dict.fromkeys(license_.notice for license_ in license_by_model.values() if license_.notice))
    parts = [
        "---\n" + _front_matter(recipe, license_by_model) + "\n---",
        f"# {_title(recipe, license_by_model)}",
        f"A GPT-2 of {summary.parameters / 1e6:.1f}M parameters that turns a short user request (*intent*) into a prompt"
        f" for {', '.join(f'`{task}`' for task in vocabulary.tasks)}. Task, length and reward are commands. {_origin(recipe)}",
        *(f"**{notice}**" for notice in notices),
        "## Use",
        _usage(vocabulary),
        "## Commands",
        _command_tables(vocabulary),
        "## Metrics",
        _metrics_table(summary, vocabulary),
        "## Training",
        OBJECTIVES[vocabulary.objective],
        _training_table(recipe, summary),
        _all_settings(recipe),
        "## Data",
        _data_section(recipe, generate),
        "## Licenses",
        *map(models.license_section, license_by_model),
        "## Known limits",
        LIMITS,
    ]
    return "\n\n".join(parts) + "\n"


def _licenses_of(recipe: Recipe) -> dict[str, models.License]:
    """Return the licenses of the teacher and of the model whose weights the student started from, by model."""
    names = [recipe.teacher.model, *([recipe.student.init] if recipe.student.init else [])]
    return {model: models.license_of(model) for model in names}


def _front_matter(recipe: Recipe, license_by_model: dict[str, models.License]) -> str:
    from huggingface_hub import ModelCardData

    license_ids = {license_.id for license_ in license_by_model.values()}
    license_ = next(iter(license_by_model.values()))
    fields: dict[str, Any] = {"license": license_.id if len(license_ids) == 1 else "other"}
    if fields["license"] == "other":
        fields |= {"license_name": "see-licenses-below", "license_link": license_.url}
    if set(recipe.tasks) <= set(shipped_tasks()):  # the shipped tasks are English; the language of a user's task is unknown
        fields["language"] = ["en"]
    if _is_on_hub(recipe.student.init):
        fields["base_model"] = recipe.student.init
    tags = ["gpt2", "distillation", "prompt-generation", "upside-down-reinforcement-learning", "udrl"]
    teacher = _public_name(recipe.teacher.model)
    data = ModelCardData(**fields, library_name="transformers", pipeline_tag="text-generation", tags=tags, teacher=teacher)
    return str(data.to_yaml())


def _is_on_hub(model: str | None) -> bool:
    return model is not None and not model.startswith(models.PREFIX) and "://" not in model and not os.path.isdir(model)


def _public_name(model: str) -> str:
    """Return the name of a model outside of this project."""
    if model.startswith(models.PREFIX):
        return models.BUNDLED[model.removeprefix(models.PREFIX)].source
    return without_credentials(model)


def _title(recipe: Recipe, license_by_model: dict[str, models.License]) -> str:
    """Return the run's name, after the word that a Llama license requires (see ``udrl.models``)."""
    notices = {license_.notice for license_ in license_by_model.values()}
    prefix = "Llama 3" if "Built with Meta Llama 3" in notices else "Llama" if "Built with Llama" in notices else ""
    if recipe.name.casefold().replace("-", " ").startswith(prefix.casefold()):
        return recipe.name
    return f"{prefix} {recipe.name}"


def _origin(recipe: Recipe) -> str:
    start = f", from the weights of `{without_credentials(recipe.student.init)}`" if recipe.student.init else ""
    return f"It is distilled from `{_public_name(recipe.teacher.model)}`{start}."


def _usage(vocabulary: CommandVocabulary) -> str:
    task = next(iter(vocabulary.tasks))
    command = vocabulary.default(task) if vocabulary.objective == "udrl" else Command(task=task)
    control_tokens = ", ".join(f'"{token}"' for token in vocabulary.tokens(command))
    return f"""```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its id on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
intent = "birthday invitation for a five-year-old who loves dinosaurs"
# A leading space, as in training; split_special_tokens, so that the intent can't contain a command.
ids = tokenizer(" " + " ".join(intent.split()), add_special_tokens=False, split_special_tokens=True)["input_ids"]
ids += tokenizer.convert_tokens_to_ids([{control_tokens}])
output = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
print(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip())
```

`generation_config.json` has the sampling settings, the end of text, and the control tokens that must not be generated
(`suppress_tokens`). vLLM does not read `suppress_tokens`: give it their ids as `logit_bias`, or the logits processor
`udrl.policies.control_token_ban:BanControlTokens`."""


def _command_tables(vocabulary: CommandVocabulary) -> str:
    lengths = [
        [f"`{name}`", *map(str, task.words), _value_or_any(task.default_words), _value_or_any(task.default_reward)]
        for name, task in vocabulary.tasks.items()
    ]
    bins = [
        [f"`{name}`", str(b), _bin_range(task.edges, b), f"{task.counts[b]:,}", f"{task.achieved_reward[b]:.2f}",
         f"{task.achieved_relevance[b]:.2f}"]
        for name, task in vocabulary.tasks.items()
        for b in range(vocabulary.reward_bins)
    ]  # fmt: skip
    any_tokens = ", ".join(f"`{token}`" for token in (commands.word_token(commands.ANY), commands.reward_token(commands.ANY)))
    binned_value = "reward" if vocabulary.rank_within == "task" else "rank within intent"
    return "\n\n".join(
        [
            f"A request is the intent, then one token each for task, length in words (`{commands.word_token(1)}` to"
            f" `{commands.word_token(vocabulary.max_words)}`) and reward bin (`{commands.reward_token(0)}`, the lowest, to"
            f" `{commands.reward_token(vocabulary.reward_bins - 1)}`). {any_tokens}: no preference. `commands.json` has all of"
            " this.",
            markdown_table(["task", "words p5", "median", "p95", "default words", "default bin"], lengths),
            "The training episodes in each reward bin achieved (this is the data, not the student):",
            markdown_table(["task", "bin", binned_value, "episodes", "mean reward", "mean relevance"], bins),
        ]
    )


def _value_or_any(value: int) -> str:
    return "any" if value == commands.ANY else str(value)


def _bin_range(edges: Sequence[float], b: int) -> str:
    low = f"{edges[b - 1]:.3f}" if b else ""
    high = f"{edges[b]:.3f}" if b < len(edges) else ""
    return f"{low} to {high}" if low and high else f"from {low}" if low else f"below {high}"


def _metrics_table(summary: TrainingSummary, vocabulary: CommandVocabulary) -> str:
    rows = []
    if summary.validation_loss is not None:
        rows.append(["validation loss per target token", f"{summary.validation_loss:.3f}"])
    if summary.history:
        rows.append(["training loss of the last step", f"{summary.history[-1][1]:.3f}"])
    for task in [None, *vocabulary.tasks]:
        key, label = (f"/{task}", f", `{task}`") if task else ("", "")
        if f"length_error{key}" in summary.validation:
            rows.append(
                [f"mean distance from the commanded length{label}", f"{summary.validation[f'length_error{key}']:.1f} words"]
            )
            rows.append([f"within two words of it{label}", f"{summary.validation[f'within_two{key}']:.0%}"])
        if f"coverage{key}" in summary.validation:
            rows.append([f"words of the subject that a prompt holds{label}", f"{summary.validation[f'coverage{key}']:.0%}"])
        if f"reward{key}" in summary.validation:
            rows.append([f"reward{label}", f"{summary.validation[f'reward{key}']:.3f}"])
    if not rows:
        return "No metric was measured."
    note = "Measured at the last validation, on subjects that are not trained on; all but the loss on a few intents."
    return markdown_table(["metric", "value"], rows) + "\n\n" + note


def _training_table(recipe: Recipe, summary: TrainingSummary) -> str:
    rows = [
        ["shape", ", ".join(f"{name} {value:g}" for name, value in summary.shape.items())],
        ["context", f"{recipe.student.context} tokens; packed rows of {recipe.row_tokens()}, no attention across examples"],
        ["steps", f"{summary.steps:,}" if summary.steps else ""],
        ["rows per step", f"{summary.rows_per_step:,}" if summary.rows_per_step else ""],
        ["learning rate", f"{recipe.train.schedule}, warm-up {recipe.train.warmup:.0%} of the steps"],
        ["precision", f"{recipe.train.precision}, ZeRO stage {recipe.train.zero_stage}; exported as bf16"],
        ["time", duration(summary.seconds) if summary.seconds else ""],
        ["speed", f"{summary.tokens_per_second:,.0f} tokens/s" if summary.tokens_per_second else ""],
        ["workers", f"{summary.workers}" if summary.workers else ""],
        ["seed", str(recipe.seed)],
        ["fingerprint", f"`{summary.fingerprint}`" if summary.fingerprint else ""],
    ]
    return markdown_table(["setting", "value"], [row for row in rows if row[1]])


def _all_settings(recipe: Recipe) -> str:
    """Return the settings that shape the student, folded; without the run's storage and without credentials."""
    sections = recipe.model_dump(mode="json", include={"commands", "student", "train"})
    sections["student"]["init"] = without_credentials(recipe.student.init) if recipe.student.init else None
    text = yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)
    return f"<details><summary>All settings</summary>\n\n```yaml\n{text}```\n\n</details>"


def _data_section(recipe: Recipe, generate: GenerateSummary | None) -> str:
    weights = recipe.rewards.weights.model_dump()
    rows = [["teacher", f"`{without_credentials(recipe.teacher.model)}`"]]
    if generate:
        rejected = generate.rejected if generate.requested is not None else None  # imported runs know only the accepted ones
        counts = {"requested": generate.requested, "accepted": generate.accepted, "rejected": rejected}
        rows += [[f"prompts {name}", f"{n:,}"] for name, n in counts.items() if n is not None]
        ids = {
            "teacher's revision": generate.revision,
            "intents": generate.intents,
            "ledger of completions": generate.ledger,
            "scoring": generate.scoring,
        }
        rows += [[label, f"`{value}`"] for label, value in ids.items() if value]
    rows.append(["relevance", describe_relevance(recipe.rewards)])
    rows.append(["reward", ", ".join(f"{weights[c]:g} {c}" for c in COMPONENTS if weights.get(c))])
    return (
        "The episodes (intent, task, prompt, reward) are machine-written. They are in the run's storage, with a card of their"
        " own.\n\n" + markdown_table(["lineage", "value"], rows)
    )


LIMITS = """\
- It writes one family of short texts and is not an assistant. It has its teacher's errors and biases.
- It meets a commanded length approximately. The effect of a commanded reward bin is in the run's evaluation report.
- It copies subjects far from the training intents badly or not at all."""
