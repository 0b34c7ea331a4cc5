"""Keep the requested length: rejected drafts are replaced by new ones within a budget, else reported as missed.

A request for n prompts has n slots. The first n drafts are offered to one slot each; a draft that is cut off, duplicate or
of the wrong length leaves its slot open. A bounded number of further rounds fills the open slots. Slots that are still open
then get the nearest rejected draft, marked as missed. No draft is ever shortened.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Literal

from serve.engine_protocol import Draft, SampleRequest, SampleResult, SamplingEngine, TextDelta
from serve.request_errors import RequestError
from serve.schemas import MAX_SEED
from udrl.text import count_words

DraftFault = Literal["length", "cut", "duplicate", "empty"]


@dataclass(frozen=True)
class PromptSpec:
    """The prompts of one task: the request to the engine and the conditions under which a draft is accepted.

    ``min_words`` and ``max_words`` are None unless the client asked for a length. ``reject_cut`` is false if the client set
    the token limit itself. ``reject_duplicates`` ignores letter case and white space.
    """

    request: SampleRequest
    min_words: int | None = None
    max_words: int | None = None
    reject_cut: bool = True
    reject_duplicates: bool = True

    @property
    def task(self) -> str:
        return self.request.command.task

    def count_words_off(self, n_words: int) -> int:
        """Return the words by which a length misses the requested range; 0 if no length was requested."""
        if self.min_words is None or self.max_words is None:
            return 0
        return max(self.min_words - n_words, n_words - self.max_words, 0)

    def accepting_any(self) -> "PromptSpec":
        """Return a spec that accepts the first drafts, for a stream that cannot retract text."""
        return replace(self, reject_cut=False, reject_duplicates=False)


@dataclass(frozen=True)
class RetryBudget:
    """Bounds on replacing rejected drafts.

    ``rounds`` after the first, with ``drafts_per_slot`` for each open slot and at most ``max_drafts`` in all; no round runs
    longer than ``seconds`` after the first drafts, because a missed length is better than a timeout.
    """

    rounds: int = 2
    drafts_per_slot: int = 4
    max_drafts: int = 16
    seconds: float = 15


@dataclass
class GenerationCost:
    """Tokens of all drafts, rejected ones included, and the revision of the weights that wrote them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    drafts: int = 0
    revision: str | None = None

    def add(self, result: SampleResult) -> None:
        self.prompt_tokens += result.prompt_tokens
        self.completion_tokens += result.completion_tokens
        self.drafts += len(result.drafts)
        self.revision = result.revision


@dataclass(frozen=True)
class DraftRejected:
    """The first draft of slot ``index`` was rejected; the engine writes another."""

    index: int
    words: int
    reason: DraftFault


@dataclass(frozen=True)
class DraftAccepted:
    """Slot ``index`` has its final draft."""

    index: int
    draft: Draft


DraftEvent = TextDelta | DraftRejected | DraftAccepted


@dataclass
class PromptSlots:
    """The slots of one task's prompts and the drafts that none of them accepted."""

    spec: PromptSpec
    accepted: dict[int, Draft] = field(default_factory=dict)
    rejected: list[Draft] = field(default_factory=list)
    _normalized_texts: set[str] = field(default_factory=set)

    def offer(self, index: int, draft: Draft) -> DraftFault | None:
        """Fill slot ``index`` with ``draft``, or keep the draft as rejected and return the reason."""
        reason = self._find_fault(draft)
        if reason is None:
            self._fill(index, draft)
        else:
            self.rejected.append(draft)
        return reason

    def find_open_slots(self) -> list[int]:
        return [index for index in range(self.spec.request.n) if index not in self.accepted]

    def fill_from_rejected(self) -> dict[int, Draft]:
        """Fill open slots with the nearest rejected drafts and return them by slot.

        Complete drafts come before cut ones, then the nearest length counts. A slot stays open rather than hold a duplicate.
        """

        def distance(draft: Draft) -> tuple[bool, bool, int]:
            cut = draft.finish_reason == "length" and self.spec.reject_cut
            return not draft.text, cut, self.spec.count_words_off(count_words(draft.text))

        candidates = sorted(self.rejected, key=distance)
        filled: dict[int, Draft] = {}
        for index in self.find_open_slots():
            for draft in candidates:
                if not self.spec.reject_duplicates or (draft.text and _normalize(draft) not in self._normalized_texts):
                    self._fill(index, draft)
                    filled[index] = draft
                    candidates.remove(draft)
                    break
        return filled

    def _find_fault(self, draft: Draft) -> DraftFault | None:
        text = _normalize(draft)
        if not text and (self.spec.reject_cut or draft.finish_reason == "stop"):
            return "empty"
        if draft.finish_reason == "length" and self.spec.reject_cut:
            return "cut"
        if self.spec.count_words_off(count_words(draft.text)):
            return "length"
        if self.spec.reject_duplicates and text in self._normalized_texts:
            return "duplicate"
        return None

    def _fill(self, index: int, draft: Draft) -> None:
        self.accepted[index] = draft
        self._normalized_texts.add(_normalize(draft))


def _normalize(draft: Draft) -> str:
    return " ".join(draft.text.lower().split())


async def write_prompts(
    engine: SamplingEngine, spec: PromptSpec, budget: RetryBudget, cost: GenerationCost, *, live: bool
) -> AsyncGenerator[DraftEvent, None]:
    """Write the prompts of one task; ends when every slot is filled or none can be.

    Args:
        cost: is updated after each call of the engine, so that it is right however the iteration ends.
        live: yield the text of the first drafts while it grows.

    Raises:
        RequestError: the engine failed before its first drafts. If a later round fails, misses are reported as such.
    """
    slots = PromptSlots(spec)
    first: SampleResult | None = None
    if live:
        # aclosing: closing this iteration must reach the engine at once
        async with contextlib.aclosing(engine.stream(spec.request)) as stream:
            async for item in stream:
                if isinstance(item, SampleResult):
                    first = item
                    break
                for delta in item:
                    yield delta
        if first is None:
            raise RequestError("the engine ended its stream early; try again", None, 503, "engine_lost", 1)
    else:
        first = await engine.sample(spec.request)
    cost.add(first)
    deadline = time.monotonic() + budget.seconds
    rounds = budget.rounds if spec.request.options.temperature != 0 else 0  # greedy decoding would repeat the same drafts
    for index, draft in enumerate(first.drafts):
        reason = slots.offer(index, draft)
        if reason is None:
            yield DraftAccepted(index, draft)
        elif rounds:
            yield DraftRejected(index, count_words(draft.text), reason)
    for round_number in range(1, rounds + 1):
        open_slots = slots.find_open_slots()
        if not open_slots:
            break
        request = _retry_request(spec.request, round_number, len(open_slots), budget)
        try:
            result = await asyncio.wait_for(engine.sample(request), max(deadline - time.monotonic(), 0))
        except (RequestError, TimeoutError):  # overload or a lost engine: the rejected drafts are better than nothing
            break
        cost.add(result)
        for draft in result.drafts:
            if open_slots and slots.offer(open_slots[0], draft) is None:
                yield DraftAccepted(open_slots.pop(0), draft)
    for index, draft in slots.fill_from_rejected().items():
        yield DraftAccepted(index, draft)


def _retry_request(request: SampleRequest, round_number: int, n_open: int, budget: RetryBudget) -> SampleRequest:
    """Return the request of a further round; a client's seed becomes another one in each round."""
    options = request.options
    if options.seed is not None:
        options = replace(options, seed=(options.seed + 7919 * round_number) % (MAX_SEED + 1))
    return replace(request, n=min(n_open * budget.drafts_per_slot, budget.max_drafts), options=options)
