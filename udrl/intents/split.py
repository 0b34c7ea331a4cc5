"""What an intent is, and which subjects stay out of training."""

from dataclasses import dataclass

from udrl.hashing import stable_id


@dataclass(frozen=True)
class Intent:
    """A user's short request, and the subject on which the held-out split is made."""

    text: str
    subject: str


def is_heldout(subject: str, share: float) -> bool:
    """Whether ``subject`` is kept out of training; about ``share`` (0 to 1) of all subjects are.

    It knows no seed, so no round and no rerun ever trains on what another one evaluates; and a larger share only adds subjects.
    """
    # The prefix keeps the decision independent of intent ids, which hash the same text for intents that users bring.
    return stable_id(f"heldout\x1f{subject.casefold()}") < share * 2**63
