"""Intent expansion: the teacher is shown known intents and continues the list (Self-Instruct, arXiv 2212.10560).

Passes of requests go through the shared vLLM stage, each into a ledger of its own, so a rerun pays nothing twice. Each line
of an answer is a new intent or dropped with a reason. A pass shows what earlier ones have grown.
"""

import contextlib
import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from udrl import cluster, models, storage
from udrl.context import StageContext
from udrl.generate.intent_lines import HeldOut, Reason, lines_of, problem_of
from udrl.hashing import stable_id
from udrl.intents.intent import INTENT_SCHEMA as SCHEMA
from udrl.intents.intent import ROW_GROUP
from udrl.policies.ledger import list_parts, read_shard
from udrl.policies.policy import Policy, Row
from udrl.policies.requests import Requests, count_intents, key_columns
from udrl.policies.stage import complete
from udrl.policies.teacher import encode_chat
from udrl.recipe import Deduplicate, Expand, Recipe, Teacher
from udrl.scoring import deduplication as dedup

EXPANDED, TRAIN, ABOUT = "expanded.parquet", "train_expanded.parquet", "expanded.json"
TASK = "expand_intents"  # what its rows have in the column `task`
POOL = 20_000  # intents of each kind (given, grown) that requests draw from: megabytes, whatever the number known
SHARD = 256  # requests
LEAST, MOST = 16, 65_536  # requests of a pass: too few say nothing about the yield
EXPECTED = 0.5  # share of the asked lines that is new, as the first pass assumes
TOO_FEW = 0.1  # a pass with less than this share is the last one
_HEAD = "Requests that different people made, in their own words, each about something else:"


@dataclass(frozen=True)
class _Render:
    """Request row -> a numbered list to continue, or a chat that asks for more of it."""

    chat: bool
    per_request: int
    path: str
    revision: str | None

    def __call__(self, row: Row) -> dict[str, Any]:
        shown = row["intent"].split("\n")
        listed = "\n".join(f"{i}. {text}" for i, text in enumerate(shown, 1))
        first, last = len(shown) + 1, len(shown) + self.per_request
        if not self.chat:
            return {"prompt": f"{_HEAD}\n\n{listed}\n{first}.", "sampling": {"stop": [f"\n{last + 1}.", "\n\n"]}}
        asked = (
            f"{_HEAD}\n\n{listed}\n\nContinue the list with {self.per_request} new requests, numbered {first} to {last}, one a"
            " line, of the same kind and length, each about something that is not on it. Write nothing else."
        )
        return {"tokenized_prompt": encode_chat(self.path, self.revision, [{"role": "user", "content": asked}])}


def expansion_policy(teacher: Teacher, config: Expand) -> Policy:
    """The teacher as it is asked for more intents."""
    chat, path = teacher.style == "chat", models.resolve(teacher.model)
    return Policy(
        name="teacher",
        model=teacher.model,
        path=path,
        revision=models.revision(teacher.model, teacher.revision),
        render=_Render(chat, config.per_request, path, teacher.revision),
        sampling=config.sampling,
        engine=teacher.engine,
        placement=teacher.placement,
        describe={"style": teacher.style, "expand": [_HEAD, config.shown, config.per_request]},
    )


def expand_intents(recipe: Recipe, folder: str) -> int:
    """Grow the training intents in ``folder`` by the teacher, up to ``intents.expand.target`` new ones; return how many.

    Writes ``expanded.parquet`` (the new ones, their own text as subject) and ``train_expanded.parquet`` (all training
    intents), with the columns and row groups of ``train.parquet``. What names a held-out subject, or is near a held-out
    intent, stays out. Returns 0 and writes nothing where the recipe asks for no expansion.

    Memory does not grow with the number of lines: the known intents are Bloom filters of a few dozen bytes each.

    Raises:
        UserError: the teacher can't be placed or refuses every request.
    """
    config = recipe.intents.expand
    if config is None:
        return 0
    policy = expansion_policy(recipe.teacher, config)
    train, heldout = (storage.join(folder, f"{name}.parquet") for name in ("train", "heldout"))
    mark = _mark(policy, config, recipe.seed, train, heldout)
    about = storage.join(folder, ABOUT)
    if storage.exists(about) and storage.read_json(about)["mark"] == mark:
        return int(storage.read_json(about)["intents"])
    storage.remove(about)  # it vouches for the two files, which are about to be written
    cluster.connect()
    grow = _Growth(policy, config, recipe.seed, train, heldout)
    with _writer(storage.join(folder, EXPANDED)) as writer:
        for group in _row_groups(grow.passes(storage.join(recipe.storage, "expansion", mark), StageContext.of(recipe))):
            writer.write_table(_table(group), row_group_size=ROW_GROUP)
    with _writer(storage.join(folder, TRAIN)) as writer:
        for uri in (train, storage.join(folder, EXPANDED)):
            for table in _tables(uri):
                writer.write_table(table, row_group_size=ROW_GROUP)
    storage.write_json(about, {"mark": mark, "intents": grow.found, "reasons": dict(grow.reasons)})
    print(grow.report(), file=sys.stderr)
    return grow.found


class _Growth:
    """What is known while intents grow, and what became of each line."""

    def __init__(self, policy: Policy, config: Expand, seed: int, train: str, heldout: str) -> None:
        self.policy, self.config, self.seed = policy, config, seed
        self.found, self.asked, self.requests = 0, 0, 0
        self.reasons: Counter[str] = Counter()
        self.ended = ""
        near = Deduplicate(near=config.near)
        n_train = count_intents(train)
        self.known = dedup.BloomDeduplicator(n_train + config.target, near)
        self.near_heldout = dedup.BloomDeduplicator(count_intents(heldout) + config.target, near)
        self.seeds: list[str] = []
        self.grown: list[str] = []
        places = range(n_train) if n_train <= POOL else random.Random(seed).sample(range(n_train), POOL)
        chosen, at = set(places), 0
        for table in _tables(train):
            texts = table.column("intent").to_pylist()
            self.known.add_known(self.known.next, self._keys(texts))
            self.seeds += [text for i, text in enumerate(texts, at) if i in chosen]
            at += len(texts)
        subjects = HeldOut()
        for table in _tables(heldout):
            self.near_heldout.add_known(self.near_heldout.next, self._keys(table.column("intent").to_pylist()))
            subjects.add(table.column("subject").to_pylist())
        self.subjects = subjects

    def _keys(self, texts: list[str]) -> Any:
        return dedup.compute_keys([("", TASK, text) for text in texts], self.config.near)

    def passes(self, root: str, context: StageContext) -> Iterator[str]:
        """New intents, until the target is reached or a pass brings too few."""
        share, number = EXPECTED, 0
        while True:
            wanted = (self.config.target - self.found) / (self.config.per_request * share)
            n = min(max(round(wanted + 0.5), LEAST), MOST)
            ledger = storage.join(root, f"pass-{number:03d}")
            requests = self._pass(number, n)
            complete(self.policy, requests, ledger, f"expand, pass {number + 1}", context=context)
            before = self.found
            for names in list_parts(ledger).values():
                rows = read_shard(ledger, names).sort_by("variation").to_pylist()
                yield from self._new(rows)
            self.requests += n
            self.asked += n * self.config.per_request
            share = (self.found - before) / (n * self.config.per_request)
            number += 1
            if self.found >= self.config.target:
                self.ended = "the target is reached"
                return
            if share < TOO_FEW:
                self.ended = f"pass {number} brought too few, {share:.0%} of what it asked for"
                return

    def _pass(self, number: int, n: int) -> Requests:
        """``n`` requests, each showing a draw of its own; up to a quarter of it are intents grown by earlier passes."""
        policy, shown, seed, seeds, grown = self.policy, self.config.shown, self.seed, self.seeds, list(self.grown)

        def rows(shard: int) -> Iterator[Row]:
            for i in range(shard * SHARD, min((shard + 1) * SHARD, n)):
                draw = random.Random(f"{seed}/{number}/{i}")
                picked = draw.sample(grown, min(len(grown), shown // 4))
                picked += draw.sample(seeds, min(len(seeds), shown - len(picked)))
                draw.shuffle(picked)
                listed = "\n".join(picked)
                yield key_columns(policy, stable_id(listed), listed, TASK, i, round=number)

        return Requests(n, -(-n // SHARD), rows, lambda shard: min((shard + 1) * SHARD, n) - shard * SHARD)

    def _new(self, rows: list[Row]) -> Iterator[str]:
        """The new intents of one shard, in order; the rest is counted."""
        candidates: list[str] = []
        for row in rows:
            if row["error"]:
                self.reasons[Reason.ENGINE_ERROR] += 1
                continue
            whole = row["finish_reason"] != "length"
            first = row["intent"].count("\n") + 2
            headless = self.policy.describe["style"] == "completion"
            for text, reason in lines_of(row["completion"], first, self.config.per_request, headless, whole):
                reason = reason or problem_of(text) or (Reason.HELD_OUT_SUBJECT if text in self.subjects else None)
                if reason:
                    self.reasons[reason] += 1
                else:
                    candidates.append(text)
        keys = self._keys(candidates)
        verdicts = self.known.check_and_add(self.known.next, keys)
        self.reasons[Reason.DUPLICATE] += int((verdicts == dedup.EXACT).sum())
        self.reasons[Reason.NEAR_DUPLICATE] += int((verdicts == dedup.NEAR).sum())
        fresh = [i for i, verdict in enumerate(verdicts) if verdict == dedup.NEW]
        # It adds them too. That changes nothing: what is near to one of these is found among the known first.
        apart = self.near_heldout.check_and_add(self.near_heldout.next, keys[fresh])
        self.reasons[Reason.NEAR_HELD_OUT] += int((apart != dedup.NEW).sum())
        for i, verdict in zip(fresh, apart, strict=True):
            if verdict != dedup.NEW:
                continue
            if self.found >= self.config.target:
                self.reasons[Reason.SURPLUS] += 1
                continue
            self.found += 1
            if len(self.grown) < POOL:
                self.grown.append(candidates[i])
            yield candidates[i]

    def report(self) -> str:
        """The table that ends the expansion."""
        lines = [
            f"expand: {self.found:,} new intents of {self.config.target:,}, from {self.requests:,} requests for"
            f" {self.asked:,} lines ({self.found / max(self.asked, 1):.0%}); {self.ended}"
        ]
        lines += [f"  dropped, {reason}: {n:,}" for reason, n in self.reasons.most_common() if n]
        return "\n".join(lines)


def _mark(policy: Policy, config: Expand, seed: int, *files: str) -> str:
    digest = hashlib.sha256(json.dumps([policy.fingerprint, config.model_dump(), seed], sort_keys=True).encode())
    for uri in files:
        digest.update(uri.rsplit("/", 1)[-1].encode())
        for table in _tables(uri):
            digest.update("\n".join(table.column("intent").to_pylist()).encode())
    return digest.hexdigest()[:16]


def _tables(uri: str) -> Iterator[pa.Table]:
    """Row groups of an intents file."""
    fs, path = storage.open_filesystem(uri)
    with fs.open_input_file(path) as source:
        file = pq.ParquetFile(source)
        for group in range(file.num_row_groups):
            yield file.read_row_group(group)


def _row_groups(texts: Iterator[str]) -> Iterator[list[str]]:
    waiting: list[str] = []
    for text in texts:
        waiting.append(text)
        if len(waiting) == ROW_GROUP:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _table(texts: list[str]) -> pa.Table:
    return pa.table([[stable_id(t) for t in texts], texts, [t.casefold() for t in texts]], schema=SCHEMA)


@contextlib.contextmanager
def _writer(uri: str) -> Iterator[pq.ParquetWriter]:
    with storage.atomic_file(uri) as sink, pq.ParquetWriter(sink, SCHEMA, compression="zstd") as writer:
        yield writer
