"""What an intent is, and which subjects stay out of training."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Intent:
    """A user's short request, and the subject on which the held-out split is made."""

    text: str
    subject: str


def stable_hash(text: str) -> int:
    """A 63-bit number that depends on ``text`` alone: the same on every machine and in every run."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def is_heldout(subject: str, share: float) -> bool:
    """Whether ``subject`` is kept out of training; about ``share`` (0 to 1) of all subjects are.

    It knows no seed, so no round and no rerun ever trains on what another one evaluates; and a larger share only adds subjects.
    """
    # The prefix keeps the decision independent of intent ids, which hash the same text for intents that users bring.
    return stable_hash(f"heldout\x1f{subject.casefold()}") < share * 2**63
