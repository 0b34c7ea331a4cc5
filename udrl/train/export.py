"""The finished student as a plain Hugging Face folder: what transformers and vLLM load with no code of ours."""

import hashlib
import json
import os
import shutil
import tempfile
from typing import Any

from udrl import internals, storage
from udrl import tokenizer as tokenizers
from udrl.commands import CommandVocabulary
from udrl.recipe import Recipe, Sampling
from udrl.train import model_card as card

TRAINING = "training.json"


def weights(engine: Any, network: Any, rank: int) -> dict[str, Any]:
    """The network's weights as bf16 on the CPU, on worker 0; nothing on the others.

    Every worker calls it: under ZeRO 3 gathering is a collective.
    """
    import torch

    if engine.zero_optimization_stage() == 3:
        state = {name.removeprefix("network."): v for name, v in internals.gather_zero3_weights(engine).items()}
    else:
        state = network.state_dict() if rank == 0 else {}
    # bf16 copies of tied weights are no longer one tensor, and transformers would save both.
    state.pop("lm_head.weight", None)
    return {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in state.items()}


def export(
    weights: dict[str, Any], network: Any, tokenizer_folder: str, uri: str, training: dict[str, Any], lineage: dict[str, Any]
) -> None:
    """Write safetensors (bf16), tokenizer, commands, generation settings, the model card and the training's facts to ``uri``.

    ``training.json`` is written last: where it is, the export is whole.

    Args:
        weights: of :func:`weights`.
        network: whose configuration they have.
        tokenizer_folder: local, with ``commands.json``.
        training: the content of ``training.json``, less the number of parameters.
        lineage: ``recipe`` (plain values), ``generate`` (``generate.json``, or empty), and where there were rounds of
            exploration ``rounds`` (a flat dict each); for the card.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].view(torch.uint8).numpy().tobytes())
    parameters = sum(tensor.numel() for tensor in weights.values())
    facts = {**training, "parameters": parameters, "weights": digest.hexdigest()[:16]}
    recipe = Recipe.model_validate(lineage["recipe"])
    tokenizer, vocabulary = tokenizers.load(tokenizer_folder), CommandVocabulary.load(tokenizer_folder)
    with tempfile.TemporaryDirectory() as folder:
        network.config.dtype = "bfloat16"
        network.generation_config = _generation(recipe.serve.sampling, tokenizer, vocabulary, network.config.n_positions)
        network.save_pretrained(folder, state_dict=dict(weights))  # which empties what it is given
        for name in os.listdir(tokenizer_folder):
            shutil.copy(os.path.join(tokenizer_folder, name), folder)
        with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as out:
            out.write(card.text(recipe, facts, vocabulary, lineage))
        storage.remove(storage.join(uri, TRAINING))
        storage.upload_folder(folder, uri)
        storage.write_bytes(storage.join(uri, TRAINING), json.dumps(facts).encode())


def _generation(sampling: Sampling, tokenizer: Any, vocabulary: CommandVocabulary, positions: int) -> Any:
    """How transformers draws by default: as the student is served. (It knows no frequency penalty.)

    vLLM takes the end of text from it; its own engines here are told by the recipe how to draw.
    """
    from transformers import GenerationConfig

    draws = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,  # written out even where it is 0: transformers would take 50
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
        **(draws if sampling.temperature > 0 else {}),
    )
