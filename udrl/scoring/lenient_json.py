"""Strings out of JSON that may be unfinished or sloppy: whatever is whole is kept."""

import json
import re

_LIST = re.compile(r'"prompts"\s*:\s*\[')
_TOKEN = re.compile(r'["\[\]{}]')
# Possessive, so that a string without an end costs one look at the text and no more.
_STRING = re.compile(r'"((?:[^"\\]++|\\.)*+)"', re.DOTALL)
_KEY = re.compile(r"\s*+:")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_PLAIN = {"n": "\n", "t": "\t", "r": "\n", "b": " ", "f": " "}


def strings(text: str, limit: int) -> list[str]:
    """The whole strings of the list under ``"prompts"`` in JSON text, at most ``limit``; without that key, of the first list.

    Anything may stand around it, strings may hold raw line breaks and escapes that JSON does not know, items may be objects
    (their values count). A string without its closing quote is not whole.
    """
    start = _LIST.search(text)
    at = start.end() if start else text.find("[") + 1
    if not at:
        return []
    found: list[str] = []
    depth = 0
    while len(found) < limit and (token := _TOKEN.search(text, at)):
        at = token.end()
        if token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
            if depth < 0:
                break
        else:
            whole = _STRING.match(text, token.start())
            if not whole:
                break
            at = whole.end()
            if not _KEY.match(text, at):
                found.append(_unescaped(whole[1]))
    return found


def _unescaped(body: str) -> str:
    try:
        value = json.loads(f'"{body}"', strict=False)
    except json.JSONDecodeError:
        return _ESCAPE.sub(lambda m: _PLAIN.get(m[1], m[1]), body)
    return str(value)


def storable(text: str) -> str:
    """``text`` with U+FFFD for lone surrogates, which an escape in JSON can bring and no file can hold."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
