"""An exported student as a policy of the shared vLLM stage."""

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from udrl import commands, models, storage
from udrl import tokenizer as tokenizers
from udrl.commands import Command, CommandVocabulary
from udrl.errors import UserError
from udrl.hashing import fingerprint_of_bytes
from udrl.policies.policy import Policy, Row
from udrl.recipe import Engine, Placement, Sampling
from udrl.run import StudentPaths, TrainingSummary

# A name, not an import: vLLM loads the class inside the engine.
CONTROL_TOKEN_BAN = "udrl.policies.control_token_ban:BanControlTokens"


def student_policy(uri: str, sampling: Sampling, engine: Engine, placement: Placement) -> tuple[Policy, CommandVocabulary]:
    """Return the student in the folder ``uri``, and its command vocabulary.

    It stops at ``<|end|>``.

    Raises:
        UserError: there is no finished export.
    """
    folder = fetch_student(uri)
    tokenizer, vocabulary = tokenizers.load_tokenizer(folder), CommandVocabulary.load(folder)
    training = TrainingSummary.load(StudentPaths(folder).training)
    positions = storage.read_json(storage.join(folder, "config.json"))["n_positions"]
    policy = Policy(
        name="student",
        model=uri,
        path=folder,
        revision=training.weights or training.fingerprint,  # students exported before 2026-11-23 have no hash of their weights
        render=_StudentRequest(folder),
        sampling=sampling,
        engine=engine_for_student(engine, positions),
        placement=placement,
        stop_token_ids=tuple(tokenizers.control_ids(tokenizer, [commands.END])),
    )
    return policy, vocabulary


def fetch_student(uri: str) -> str:
    """Return the local folder of a student; a remote one is copied to the cache.

    Raises:
        UserError: there is no finished export.
    """
    training = StudentPaths(uri).training
    if not storage.exists(training):
        raise UserError(f"{uri}: no exported student; run jobs.train with this recipe first")
    if storage.is_local(uri):
        return storage.download_folder(uri, "")
    return models.download(
        uri, os.path.join(models.cache_folder(), "students", fingerprint_of_bytes(storage.read_bytes(training)))
    )


def engine_for_student(engine: Engine, positions: int) -> Engine:
    """Return engine settings that a student can run with.

    The context is at most the student's positions, since vLLM refuses more; all control tokens except ``<|end|>`` are banned.
    """
    return engine.model_copy(
        update={
            "max_model_len": min(engine.max_model_len, positions),
            "kwargs": {"logits_processors": [CONTROL_TOKEN_BAN], **engine.kwargs},
        }
    )


@dataclass(frozen=True)
class _StudentRequest:
    """Render a request row as token ids: the intent, then the command of the row."""

    folder: str

    def __call__(self, row: Row) -> dict[str, Any]:
        tokenizer, vocabulary = _load_tokenizer_and_commands(self.folder)
        command = Command(task=row["task"], words=row["command_words"], reward=row["command_reward"])
        return {"tokenized_prompt": tokenizers.encode_request(tokenizer, vocabulary, row["intent"], command)}


@lru_cache(maxsize=2)
def _load_tokenizer_and_commands(folder: str) -> tuple[Any, CommandVocabulary]:
    """Load once per worker process, not once per task."""
    return tokenizers.load_tokenizer(folder), CommandVocabulary.load(folder)
