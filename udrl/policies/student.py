"""The exported student as a policy of the shared vLLM stage."""

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from udrl import commands, models, storage
from udrl import tokenizer as tokenizers
from udrl.commands import Command, CommandVocabulary
from udrl.errors import UserError
from udrl.policies.policy import Policy, Row
from udrl.recipe import Engine, Placement, Sampling
from udrl.run import StudentPaths

# Named, not imported: vLLM loads it inside the engine.
BAN = "udrl.policies.control_token_ban:BanControlTokens"


@dataclass(frozen=True)
class _Render:
    """Request row -> token ids: the intent, then the command of the row."""

    folder: str

    def __call__(self, row: Row) -> dict[str, Any]:
        tokenizer, vocabulary = _parts(self.folder)
        command = Command(task=row["task"], words=row["command_words"], reward=row["command_reward"])
        return {"tokenized_prompt": tokenizers.encode_request(tokenizer, vocabulary, row["intent"], command)}


@lru_cache(maxsize=2)
def _parts(folder: str) -> tuple[Any, CommandVocabulary]:
    """Loaded once a worker process, not once a task."""
    return tokenizers.load(folder), CommandVocabulary.load(folder)


def fetch(uri: str) -> str:
    """Local folder of an exported student; a remote one is copied to the cache.

    Raises:
        UserError: there is no finished export.
    """
    if not storage.exists(StudentPaths(uri).training):
        raise UserError(f"{uri}: no exported student; run jobs.train with this recipe first")
    if storage.is_local(uri):
        return storage.download_folder(uri, "")
    mark = hashlib.sha256(storage.read_bytes(StudentPaths(uri).training)).hexdigest()[:16]
    return models.download(uri, os.path.join(models.cache_folder(), "students", mark))


def student_policy(uri: str, sampling: Sampling, engine: Engine, placement: Placement) -> tuple[Policy, CommandVocabulary]:
    """The student in the folder ``uri`` and its command vocabulary. It ends at ``<|end|>`` and may write no other control
    token."""
    folder = fetch(uri)
    tokenizer, vocabulary = tokenizers.load(folder), CommandVocabulary.load(folder)
    facts = storage.read_json(StudentPaths(folder).training)
    positions = storage.read_json(storage.join(folder, "config.json"))["n_positions"]
    policy = Policy(
        name="student",
        model=uri,
        path=folder,
        revision=facts.get("weights", facts["fingerprint"]),  # students exported before 2026-11-23 have no hash
        render=_Render(folder),
        sampling=sampling,
        engine=fit(engine, positions),
        placement=placement,
        stop_token_ids=tuple(tokenizers.control_ids(tokenizer, [commands.END])),
    )
    return policy, vocabulary


def fit(engine: Engine, positions: int) -> Engine:
    """Engine settings for a student: no longer than its positions (vLLM refuses more), control tokens banned."""
    return engine.model_copy(
        update={
            "max_model_len": min(engine.max_model_len, positions),
            "kwargs": {"logits_processors": [BAN], **engine.kwargs},
        }
    )
