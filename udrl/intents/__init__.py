"""Intents: the short user requests that prompts are written from. Read from files or composed, then split by subject."""

from udrl.intents.composer import capacity, compose, subjects
from udrl.intents.intent import Intent, is_heldout
from udrl.intents.readers import read
from udrl.intents.split import IntentSplit, split_intents

__all__ = ["Intent", "IntentSplit", "capacity", "compose", "is_heldout", "read", "split_intents", "subjects"]
