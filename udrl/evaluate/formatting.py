"""Numbers, verdicts and texts as reports print them, with a dash for an unknown number."""

import math
import re
from collections.abc import Callable

from udrl.evaluate.document import Interval

DASH = "-"


def number(value: float | None, form: str = ".2f") -> str:
    return DASH if value is None or math.isnan(value) else format(value, form)


def count(value: float | None) -> str:
    """Return a whole number with thousands separators."""
    return number(value, ",.0f")


def tenths(value: float | None) -> str:
    return number(value, ",.1f")


def percent(value: float | None) -> str:
    return number(value, ".0%")


def percent_tenths(value: float | None) -> str:
    return number(value, ".1%")


def points(value: float | None) -> str:
    """Return a difference of shares in percentage points, without the unit."""
    return DASH if value is None else f"{100 * value:+.1f}"


def signed(value: float | None) -> str:
    """Return ``+0.12``; a value that rounds to zero is ``+0.00``."""
    return number(value, "+z.2f")


def interval(estimate: Interval | None, form: Callable[[float | None], str] = number) -> str:
    """Return ``0.41 [0.38, 0.44]``, or the value by itself if it has no bounds or its bounds are equal."""
    if estimate is None or estimate.value is None:
        return DASH
    if estimate.low is None or estimate.high is None or estimate.low == estimate.high:
        return form(estimate.value)
    return f"{form(estimate.value)} [{form(estimate.low)}, {form(estimate.high)}]"


def verdict(met: bool | None) -> str:
    """Return a verdict in bold, which the page colors."""
    return {True: "**met**", False: "**missed**", None: "**open**"}[met]


def parameters(value: float | None) -> str:
    """Return ``104.0M`` or ``8.0B``."""
    if value is None:
        return DASH
    return f"{value / 1e9:.1f}B" if value >= 1e9 else f"{value / 1e6:.1f}M"


def seconds(value: float | None) -> str:
    """Return ``340 ms`` or ``2.1 s``."""
    if value is None:
        return DASH
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def escape_markdown(text: object) -> str:
    """Return a text on one line in which Markdown reads no markup; numbers in brackets, which can't be a link, stay."""
    escaped = re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", " ".join(str(text).split()))
    return re.sub(r"(?<!\\)\\\[([-+.,%\d ]+)\\\](?!\()", r"[\1]", escaped)


def code(name: str) -> str:
    """Return a name in code style; a bar would end the table cell even there."""
    return f"`{name}`" if name and not re.search(r"[`|\s]", name) else escape_markdown(name)
