"""The finished student as a plain Hugging Face folder, which transformers and vLLM load without code of ours."""

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from typing import Any

from udrl import internals, storage
from udrl import tokenizer as tokenizers
from udrl.commands import CommandVocabulary
from udrl.recipe import Recipe, Sampling
from udrl.run import GenerateSummary, StudentPaths, TrainingSummary
from udrl.train.model_card import render_model_card


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
