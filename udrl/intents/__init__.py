"""Intents: the short user requests that prompts are written from; read from files or composed, then split by subject."""

from udrl.intents.composer import capacity, compose, subjects
from udrl.intents.prepare import Summary, prepare
from udrl.intents.readers import read
from udrl.intents.split import Intent, is_heldout

__all__ = ["Intent", "Summary", "capacity", "compose", "is_heldout", "prepare", "read", "subjects"]
