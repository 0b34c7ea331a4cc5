"""Numbers, flags and texts as the report writes them: a dash for what is not known, Markdown that holds any text."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any


def absent(value: float | None) -> bool:
    return value is None or math.isnan(value)


def number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.0f}%"


def span(interval: dict[str, Any] | None, show: Callable[[float | None], str] = number) -> str:
    """``0.41 [0.38, 0.44]``."""
    if not interval or absent(interval["value"]):
        return "-"
    return f"{show(interval['value'])} [{show(interval['low'])}, {show(interval['high'])}]"


def yes(flag: bool | None) -> str:
    return "-" if flag is None else "yes" if flag else "no"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; cells must be escaped already."""
    if not lines:
        return "*Nothing was measured.*"
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def escape(text: object) -> str:
    """Any text on one line, with nothing in it that Markdown would read."""
    return re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", " ".join(str(text).split()))


def code(name: str) -> str:
    """A name in code style; a bar would end the table cell even there."""
    return f"`{name}`" if not re.search(r"[`|\s]", name) else escape(name)


def count(parameters: float | None) -> str:
    if absent(parameters):
        return "-"
    assert parameters is not None
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"
