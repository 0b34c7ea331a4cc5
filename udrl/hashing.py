"""Stable ids and fingerprints: the same on every machine, in every run and in every version.

The values name folders and rows that someone paid for. Changing how they are computed strands existing runs.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any


def stable_id(*parts: object) -> int:
    """Return a 63-bit id of the parts' texts."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def fingerprint(inputs: Any, content: Iterable[str] = ()) -> str:
    """Return 16 hex digits of plain data, followed by streamed ``content`` (such as the intents of a file)."""
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode())
    for text in content:
        digest.update(text.encode())
    return digest.hexdigest()[:16]


def fingerprint_of_bytes(data: bytes) -> str:
    """Return 16 hex digits of a file's content or a URI."""
    return hashlib.sha256(data).hexdigest()[:16]


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Return one line for each value in which two fingerprints' inputs differ: ``teacher.sampling.top_k: 0 -> 40``."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        return [
            line for name in names for line in differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, (a, b) in enumerate(zip(old, new, strict=True)) for line in differences(a, b, f"{key}.{i}")]
    return [] if old == new else [f"{key}: {str(old)[:60]} -> {str(new)[:60]}"]
