"""Expand the training intents: the teacher continues lists of known intents (Self-Instruct, arXiv 2212.10560).

Passes of requests go through the shared vLLM stage, each into a ledger of its own, so that a rerun pays for nothing twice. Each
line of an answer is a new intent or is dropped with a reason. A pass also shows intents that earlier passes added.
"""

import logging
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import Any

import numpy as np
from pydantic import AliasChoices, Field

from udrl import cluster, models, storage
from udrl.context import StageContext
from udrl.hashing import fingerprint, stable_id
from udrl.intents import composer
from udrl.intents.content_words import singulars
from udrl.intents.intent import ROW_GROUP, Intent, intents_table, iter_intents, open_intents_writer
from udrl.policies.ledger import list_parts, read_shard
from udrl.policies.policy import Policy, Row
from udrl.policies.requests import Requests, count_intents, key_columns
from udrl.policies.stage import complete
from udrl.policies.teacher import encode_chat
from udrl.recipe import Deduplicate, Expand, Recipe, Teacher
from udrl.run import Document, IntentPaths, Run
from udrl.scoring import deduplication as dedup
from udrl.scoring.parsing import clean
from udrl.text import count_words

MIN_WORDS = 3  # of an expanded intent: shorter lines are mostly fragments


class LineProblem(StrEnum):
    """Why a line is not a new intent."""

    ENGINE_ERROR = "engine error"
    TRUNCATED = "truncated"
    FRAME = "not a line of the list"
    TOO_SHORT = "too short"
    TOO_LONG = "too long"
    REFUSAL = "refusal"
    MARKUP = "markup"
    HELD_OUT_SUBJECT = "held-out subject"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near-duplicate"
    NEAR_HELD_OUT = "near a held-out intent"
    SURPLUS = "more than requested"


MIN_LETTER_SHARE = 0.8  # share of letters (and the marks and blanks between them) in plain text
_NUMBERED = re.compile(r"\s*(\d{1,4})\s*[.)]\s*(.*)")
_TAIL = re.compile(r"(,\s*\d+|[\s.;,])+$")  # a teacher may count on within the line: "a red barn, 4"
_REFUSAL = re.compile(
    r"\b(i'?m sorry|i am sorry|i (can'?t|cannot|won'?t) |as an ai|language model|unable to|i apologi[sz]e)"
    r"|^(sure|certainly|of course)\b",
    re.IGNORECASE,
)
# The frame of a list or a chat, a field's name, markup, links, code, control characters.
_MARKUP = re.compile(
    r"[{}<>|`\\*_#\[\]=~^\x00-\x1f\x7f\ufffd]|https?:|www\."
    r"|\b(intent|request|prompt|answer|note|example|output|input)s?\s*\d*\s*:|\d+\.\s",
    re.IGNORECASE,
)


def parse_lines(completion: str, first: int, n: int, headless: bool, whole: bool) -> Iterator[tuple[str, LineProblem | None]]:
    """Yield (text, problem) for each line of a continued list of ``n`` lines that are numbered from ``first``.

    ``headless``: the completion lacks the first number, which ends the prompt. Unless ``whole``, the last line is truncated.
    """
    lines = [line for line in completion.split("\n") if line.strip()]
    next_number = first
    for i, line in enumerate(lines):
        numbered = _NUMBERED.fullmatch(line)
        text = _TAIL.sub("", clean(numbered[2] if numbered else line))
        in_order = (headless and i == 0 and not numbered) or (numbered is not None and int(numbered[1]) == next_number)
        if not in_order:
            yield text, LineProblem.FRAME
        elif next_number >= first + n:
            yield text, LineProblem.SURPLUS
        else:
            next_number += 1
            yield text, LineProblem.TRUNCATED if i == len(lines) - 1 and not whole else None


def find_problem(text: str) -> LineProblem | None:
    """Return why a line is not an intent of 3 to 40 words of plain text; None if it is one."""
    if _REFUSAL.search(text):
        return LineProblem.REFUSAL
    if _MARKUP.search(text) or sum(unicodedata.category(c)[0] in "LMZ" for c in text) < MIN_LETTER_SHARE * len(text):
        return LineProblem.MARKUP
    n_words = count_words(text)
    if n_words < MIN_WORDS:
        return LineProblem.TOO_SHORT
    return LineProblem.TOO_LONG if n_words > composer.MAX_WORDS else None


class HeldOutSubjects:
    """The held-out subjects, as a set of hashes.

    ``text in subjects`` is true if the text names one of them in whole words, in singular or plural, ignoring case.
    """

    def __init__(self) -> None:
        self._hashes: set[int] = set()
        self._longest = 0  # words

    def add(self, subjects: Iterable[str]) -> None:
        for subject in subjects:
            words = _split_words(subject)
            if words:
                self._hashes.update(_hash_variants(words))
                self._longest = max(self._longest, len(words))

    def __contains__(self, text: str) -> bool:
        words = _split_words(text)
        return any(
            not self._hashes.isdisjoint(_hash_variants(words[i:j]))
            for i in range(len(words))
            for j in range(i + 1, min(i + self._longest, len(words)) + 1)
        )


def _split_words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold().replace("'s", "").replace("’s", ""))


def _hash_variants(words: list[str]) -> Iterator[int]:
    """Yield hashes of the words, and of the words with one in the singular: no subject has two plurals."""
    yield stable_id(" ".join(words))
    for i, word in enumerate(words):
        for singular in singulars(word):
            yield stable_id(" ".join([*words[:i], singular, *words[i + 1 :]]))


log = logging.getLogger(__name__)

TASK = "expand_intents"  # the column `task` of the requests
POOL = 20_000  # intents from the source, and as many new ones, from which requests draw: megabytes for any number of intents
SHARD = 256  # requests
MIN_REQUESTS, MAX_REQUESTS = 16, 65_536  # of a pass; fewer say little about the yield
FIRST_YIELD = 0.5  # share of the requested lines that is new, as the first pass assumes
MIN_YIELD = 0.1  # a pass below it is the last one
_HEAD = "Requests that different people made, in their own words, each about something else:"


class ExpansionSummary(Document):
    """``expanded.json``, written when the files of the expanded intents are complete."""

    fingerprint: str = Field(validation_alias=AliasChoices("fingerprint", "mark"))
    intents: int = Field(description="new intents")
    reasons: dict[str, int] = Field(default_factory=dict, description="dropped lines by reason")


def expand_intents(recipe: Recipe, intents: IntentPaths) -> ExpansionSummary:
    """Add up to ``intents.expand.target`` intents that the teacher writes to the training intents.

    Writes ``expanded.parquet`` (the new intents, with their own text as the subject) and ``train_expanded.parquet`` (all
    training intents), with the columns and row groups of ``train.parquet``. A line that names a held-out subject, or is near
    a held-out intent, is dropped. Memory does not grow with the number of lines: known intents are Bloom filters of a few
    dozen bytes each.

    Raises:
        UserError: the teacher can't be placed or refuses every request.
    """
    config = recipe.intents.expand
    assert config is not None, "the recipe has no intents.expand"
    policy = expansion_policy(recipe.teacher, config)
    # The same fingerprint as in existing runs: it names the folder of the paid completions.
    inputs = [policy.fingerprint, config.model_dump(), recipe.seed]
    origin = fingerprint(inputs, content=_file_contents(intents.train, intents.heldout))
    previous = ExpansionSummary.load_if_exists(intents.expansion)
    if previous and previous.fingerprint == origin:
        return previous
    storage.remove(intents.expansion)  # it states that the two files are complete, which are about to be replaced
    cluster.connect()
    expander = IntentExpander(policy, config, recipe.seed, intents)
    texts = expander.run_passes(Run(recipe.storage).expansion(origin), StageContext.of(recipe))
    with open_intents_writer(intents.expanded) as writer:
        while group := list(islice(texts, ROW_GROUP)):
            table = intents_table([Intent(text, text.casefold()) for text in group])
            writer.write_table(table, row_group_size=ROW_GROUP)
    with open_intents_writer(intents.train_expanded) as writer:
        for uri in (intents.train, intents.expanded):
            for table in iter_intents(uri):
                writer.write_table(table, row_group_size=ROW_GROUP)
    summary = ExpansionSummary(fingerprint=origin, intents=expander.n_new, reasons=dict(expander.reasons))
    summary.save(intents.expansion)
    log.info("%s", expander.describe())
    return summary


def expansion_policy(teacher: Teacher, config: Expand) -> Policy:
    """Return the teacher with the requests for more intents."""
    chat, path = teacher.style == "chat", models.resolve(teacher.model)
    return Policy(
        name="teacher",
        model=teacher.model,
        path=path,
        revision=models.revision(teacher.model, teacher.revision),
        render=_ExpansionRequest(chat, config.per_request, path, teacher.revision),
        sampling=config.sampling,
        engine=teacher.engine,
        placement=teacher.placement,
        describe={"style": teacher.style, "expand": [_HEAD, config.shown, config.per_request]},
    )


@dataclass(frozen=True)
class _ExpansionRequest:
    """Render a request row as a numbered list to continue, or as a chat that asks for its continuation."""

    chat: bool
    per_request: int
    path: str
    revision: str | None

    def __call__(self, row: Row) -> dict[str, Any]:
        shown = row["intent"].split("\n")
        numbered = "\n".join(f"{i}. {text}" for i, text in enumerate(shown, 1))
        first, last = len(shown) + 1, len(shown) + self.per_request
        if not self.chat:
            return {"prompt": f"{_HEAD}\n\n{numbered}\n{first}.", "sampling": {"stop": [f"\n{last + 1}.", "\n\n"]}}
        message = (
            f"{_HEAD}\n\n{numbered}\n\nContinue the list with {self.per_request} new requests, numbered {first} to {last}, one"
            " a line, of the same kind and length, each about something that is not on it. Write nothing else."
        )
        return {"tokenized_prompt": encode_chat(self.path, self.revision, [{"role": "user", "content": message}])}


class IntentExpander:
    """Filters of the known intents, pools to show, and counts of what happened to each line."""

    def __init__(self, policy: Policy, config: Expand, seed: int, intents: IntentPaths) -> None:
        self.policy, self.config, self.seed = policy, config, seed
        self.n_new, self.n_requests = 0, 0
        self.reasons: Counter[str] = Counter()
        self.end_reason = ""
        self.source_pool: list[str] = []
        self.new_pool: list[str] = []
        self.heldout_subjects = HeldOutSubjects()
        n_train, n_heldout = count_intents(intents.train), count_intents(intents.heldout)
        deduplicate = Deduplicate(near=config.near)
        self._known = dedup.BloomDeduplicator(n_train + config.target, deduplicate)
        self._heldout = dedup.BloomDeduplicator(n_heldout + config.target, deduplicate)
        positions = range(n_train) if n_train <= POOL else random.Random(seed).sample(range(n_train), POOL)
        pooled, start = set(positions), 0
        for table in iter_intents(intents.train):
            texts = table.column("intent").to_pylist()
            self._known.add_known(self._known.next, self._keys(texts))
            self.source_pool += [text for i, text in enumerate(texts, start) if i in pooled]
            start += len(texts)
        for table in iter_intents(intents.heldout):
            self._heldout.add_known(self._heldout.next, self._keys(table.column("intent").to_pylist()))
            self.heldout_subjects.add(table.column("subject").to_pylist())

    def run_passes(self, folder: str, context: StageContext) -> Iterator[str]:
        """Yield new intents until the target is reached or a pass adds too few; each pass has a ledger under ``folder``."""
        expected_yield, number = FIRST_YIELD, 0
        while True:
            missing = (self.config.target - self.n_new) / (self.config.per_request * expected_yield)
            n = min(max(round(missing + 0.5), MIN_REQUESTS), MAX_REQUESTS)
            ledger = storage.join(folder, f"pass-{number:03d}")
            complete(self.policy, self.pass_requests(number, n), ledger, f"expand, pass {number + 1}", context=context)
            n_before = self.n_new
            for names in list_parts(ledger).values():
                yield from self.accept_new(read_shard(ledger, names).sort_by("variation").to_pylist())
            self.n_requests += n
            expected_yield = (self.n_new - n_before) / (n * self.config.per_request)
            number += 1
            if self.n_new >= self.config.target:
                self.end_reason = "the target is reached"
                return
            if expected_yield < MIN_YIELD:
                self.end_reason = f"pass {number} added too few, {expected_yield:.0%} of the requested lines"
                return

    def pass_requests(self, number: int, n: int) -> Requests:
        """Return the ``n`` requests of a pass; up to a quarter of the intents that each shows are new ones."""
        policy, shown, seed, source, new = self.policy, self.config.shown, self.seed, self.source_pool, list(self.new_pool)

        def rows(shard: int) -> Iterator[Row]:
            for i in range(shard * SHARD, min((shard + 1) * SHARD, n)):
                rng = random.Random(f"{seed}/{number}/{i}")
                picks = rng.sample(new, min(len(new), shown // 4))
                picks += rng.sample(source, min(len(source), shown - len(picks)))
                rng.shuffle(picks)
                text = "\n".join(picks)
                yield key_columns(policy, stable_id(text), text, TASK, i, round=number)

        return Requests(n, -(-n // SHARD), rows, lambda shard: min((shard + 1) * SHARD, n) - shard * SHARD)

    def accept_new(self, rows: list[Row]) -> Iterator[str]:
        """Yield the new intents among the lines of ``rows`` (completions), in order, and count the dropped lines."""
        candidates = [text for row in rows for text in self._valid_lines(row)]
        keys = self._keys(candidates)
        verdicts = self._known.check_and_add(self._known.next, keys)
        self.reasons[LineProblem.DUPLICATE] += int((verdicts == dedup.EXACT).sum())
        self.reasons[LineProblem.NEAR_DUPLICATE] += int((verdicts == dedup.NEAR).sum())
        fresh = np.flatnonzero(verdicts == dedup.NEW)
        # This also adds the fresh ones to the held-out filter. That has no effect: a later line near to them is a duplicate.
        heldout_verdicts = self._heldout.check_and_add(self._heldout.next, keys[fresh])
        self.reasons[LineProblem.NEAR_HELD_OUT] += int((heldout_verdicts != dedup.NEW).sum())
        for i in fresh[heldout_verdicts == dedup.NEW].tolist():
            if self.n_new >= self.config.target:
                self.reasons[LineProblem.SURPLUS] += 1
                continue
            self.n_new += 1
            if len(self.new_pool) < POOL:
                self.new_pool.append(candidates[i])
            yield candidates[i]

    def describe(self) -> str:
        """Return the lines that end the expansion: the number of new intents, and the dropped lines by reason."""
        n_lines = self.n_requests * self.config.per_request
        lines = [
            f"expand: {self.n_new:,} new intents of {self.config.target:,}, from {self.n_requests:,} requests for"
            f" {n_lines:,} lines ({self.n_new / max(n_lines, 1):.0%}); {self.end_reason}"
        ]
        lines += [f"  dropped, {reason}: {n:,}" for reason, n in self.reasons.most_common() if n]
        return "\n".join(lines)

    def _valid_lines(self, row: Row) -> Iterator[str]:
        """Yield the lines of one completion that have no problem of their own, and count the others."""
        if row["error"]:
            self.reasons[LineProblem.ENGINE_ERROR] += 1
            return
        lines = parse_lines(
            row["completion"],
            first=row["intent"].count("\n") + 2,
            n=self.config.per_request,
            headless=self.policy.describe["style"] == "completion",
            whole=row["finish_reason"] != "length",
        )
        for text, problem in lines:
            problem = problem or find_problem(text)
            if problem is None and text in self.heldout_subjects:
                problem = LineProblem.HELD_OUT_SUBJECT
            if problem:
                self.reasons[problem] += 1
            else:
                yield text

    def _keys(self, texts: list[str]) -> np.ndarray:
        return dedup.compute_keys([("", TASK, text) for text in texts], self.config.near)


def _file_contents(*uris: str) -> Iterator[str]:
    """Yield the name of each intents file and the texts of its row groups."""
    for uri in uris:
        yield uri.rsplit("/", 1)[-1]
        for table in iter_intents(uri):
            yield "\n".join(table.column("intent").to_pylist())
