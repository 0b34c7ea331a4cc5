"""The finished student as a plain Hugging Face folder: what transformers and vLLM load with no code of ours."""

import json
import os
import shutil
import tempfile
from typing import Any

from udrl import storage

TRAINING = "training.json"


def export(engine: Any, network: Any, tokenizer_folder: str, uri: str, training: dict[str, Any], rank: int) -> None:
    """Gather the weights on worker 0 and write safetensors (bf16), tokenizer, commands and training facts to ``uri``.

    Every worker calls it: under ZeRO 3 gathering is a collective. ``training.json`` is written last: where it is, the
    export is whole.
    """
    import torch

    if engine.zero_optimization_stage() == 3:
        state = engine._zero3_consolidated_16bit_state_dict()
        state = {k.removeprefix("network."): v for k, v in state.items()} if rank == 0 else {}
    else:
        state = network.state_dict()
    if rank != 0:
        return
    # bf16 copies of tied weights are no longer one tensor, and transformers would save both.
    state.pop("lm_head.weight", None)
    weights = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in state.items()}
    facts = {**training, "parameters": sum(tensor.numel() for tensor in weights.values())}
    with tempfile.TemporaryDirectory() as folder:
        network.config.dtype = "bfloat16"
        network.save_pretrained(folder, state_dict=weights)
        for name in os.listdir(tokenizer_folder):
            shutil.copy(os.path.join(tokenizer_folder, name), folder)
        storage.remove(storage.join(uri, TRAINING))
        storage.upload_folder(folder, uri)
        storage.write_bytes(storage.join(uri, TRAINING), json.dumps(facts).encode())
