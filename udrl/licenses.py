"""Licenses of models, and what they require of those who publish data or models made with them.

A license is inferred from the model's name. The terms are a starting point for a person who reads the license; they are not
legal advice.
"""

import os
import re
from dataclasses import dataclass

from udrl.models import BUNDLED, PREFIX


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
