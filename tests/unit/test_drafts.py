"""Rejected drafts are replaced within a budget, else reported; no draft is shortened and the cost of each is counted."""

import asyncio
from typing import Any

import pytest
from fakes.fake_engine import FakeEngine, draft

from serve.drafts import (
    DraftAccepted,
    DraftEvent,
    DraftRejected,
    GenerationCost,
    PromptSpec,
    RetryBudget,
    write_prompts,
)
from serve.engine_protocol import Draft, SampleRequest, SampleResult, SamplingOptions, TextDelta
from serve.request_errors import RequestError
from udrl.commands import Command

COMMAND = Command(task="text_to_image", words=3, reward=2)


def engine_with_rounds(*rounds: list[Draft]) -> FakeEngine:
    """An engine that answers its first call with the first list, and so on; the last one is repeated."""
    return FakeEngine(lambda request, call: rounds[min(call, len(rounds)) - 1])


def any_length(n: int = 1, **conditions: Any) -> PromptSpec:
    return PromptSpec(SampleRequest("a card", COMMAND, n, SamplingOptions(temperature=0.7)), **conditions)


def exactly_3_words(n: int = 1, options: SamplingOptions | None = None, **conditions: Any) -> PromptSpec:
    request = SampleRequest("a card", COMMAND, n, options or SamplingOptions(temperature=0.7))
    return PromptSpec(request, 3, 3, **conditions)


def run(
    engine: FakeEngine, spec: PromptSpec, budget: RetryBudget | None = None, live: bool = False
) -> tuple[list[DraftEvent], GenerationCost]:
    cost = GenerationCost()

    async def collect() -> list[DraftEvent]:
        return [event async for event in write_prompts(engine, spec, budget or RetryBudget(), cost, live=live)]

    return asyncio.run(collect()), cost


def texts(events: list[DraftEvent]) -> dict[int, str]:
    return {event.index: event.draft.text for event in events if isinstance(event, DraftAccepted)}


def test_fitting_drafts_need_one_call() -> None:
    engine = engine_with_rounds([draft("one two three"), draft("four five six")])
    events, cost = run(engine, exactly_3_words(2))
    assert texts(events) == {0: "one two three", 1: "four five six"}
    assert engine.requests == [exactly_3_words(2).request]
    assert (cost.drafts, cost.completion_tokens, cost.prompt_tokens, cost.revision) == (2, 6, 10, "cafe")


def test_a_draft_of_the_wrong_length_is_replaced_and_both_are_counted() -> None:
    engine = engine_with_rounds([draft("one two"), draft("a b c")], [draft("x"), draft("d e f"), draft("g h i")])
    events, cost = run(engine, exactly_3_words(2), RetryBudget(rounds=2, drafts_per_slot=4))
    assert DraftRejected(0, 2, "length") in events
    assert texts(events) == {0: "d e f", 1: "a b c"}
    assert [request.n for request in engine.requests] == [2, 4]
    assert cost.drafts == 5


def test_after_the_last_round_the_nearest_draft_is_returned_unshortened() -> None:
    engine = engine_with_rounds([draft("a b c d e f")], [draft("a b c d"), draft("a b c d e")])
    events, _ = run(engine, exactly_3_words(), RetryBudget(rounds=2))
    assert texts(events) == {0: "a b c d"}
    assert len(engine.requests) == 3


def test_an_empty_draft_is_replaced_unless_the_clients_token_limit_caused_it() -> None:
    spec = any_length(reject_cut=False, reject_duplicates=False)
    events, cost = run(engine_with_rounds([draft("", "length")]), spec)
    assert (texts(events), cost.drafts) == ({0: ""}, 1)
    _, cost = run(engine_with_rounds([draft("")], [draft("a b c")]), spec)
    assert cost.drafts == 2


def test_a_range_includes_both_ends() -> None:
    events, cost = run(
        engine_with_rounds([draft("a b"), draft("a b c"), draft("a b c d")]), any_length(3, min_words=2, max_words=4)
    )
    assert len(texts(events)) == 3
    assert cost.drafts == 3


def test_any_length_is_accepted_if_none_was_requested() -> None:
    events, cost = run(engine_with_rounds([draft("a b c d e f g")]), any_length())
    assert texts(events) == {0: "a b c d e f g"}
    assert cost.drafts == 1


def test_a_cut_draft_is_rejected_and_is_the_last_choice() -> None:
    engine = engine_with_rounds([draft("a b c", "length")], [draft("a b", "stop"), draft("d e f", "length")])
    events, _ = run(engine, exactly_3_words(), RetryBudget(rounds=1))
    assert DraftRejected(0, 3, "cut") in events
    assert texts(events) == {0: "a b"}  # complete, though one word short


def test_a_client_that_sets_the_token_limit_gets_cut_drafts() -> None:
    events, cost = run(engine_with_rounds([draft("a b c", "length")]), exactly_3_words(reject_cut=False))
    assert texts(events) == {0: "a b c"}
    assert cost.drafts == 1


def test_duplicates_are_replaced_regardless_of_case_and_white_space() -> None:
    engine = engine_with_rounds(
        [draft("one two three"), draft("One  Two three")], [draft("ONE two three"), draft("four five six")]
    )
    events, _ = run(engine, exactly_3_words(2))
    assert texts(events) == {0: "one two three", 1: "four five six"}


def test_a_slot_stays_open_rather_than_hold_a_duplicate() -> None:
    events, _ = run(engine_with_rounds([draft("one two three")] * 3), exactly_3_words(3))
    assert texts(events) == {0: "one two three"}


def test_duplicates_fill_every_slot_if_they_are_allowed() -> None:
    events, cost = run(engine_with_rounds([draft("one two three")] * 3), exactly_3_words(3, reject_duplicates=False))
    assert texts(events) == dict.fromkeys(range(3), "one two three")
    assert cost.drafts == 3


def test_an_empty_text_is_never_a_prompt() -> None:
    events, _ = run(engine_with_rounds([draft("")]), any_length())
    assert texts(events) == {}


def test_greedy_decoding_is_not_repeated() -> None:
    engine = engine_with_rounds([draft("a b")])
    events, _ = run(engine, exactly_3_words(options=SamplingOptions(temperature=0)))
    assert texts(events) == {0: "a b"}
    assert len(engine.requests) == 1


def test_each_round_has_its_own_seed() -> None:
    engine = engine_with_rounds([draft("a b")])
    run(engine, exactly_3_words(options=SamplingOptions(temperature=0.7, seed=2**32 - 1)), RetryBudget(rounds=2))
    seeds = [request.options.seed for request in engine.requests]
    assert len(set(seeds)) == 3
    assert all(seed is not None and 0 <= seed < 2**32 for seed in seeds)


def test_rounds_and_drafts_are_bounded() -> None:
    engine = engine_with_rounds([draft("a")] * 16)
    run(engine, exactly_3_words(16), RetryBudget(rounds=3, drafts_per_slot=4, max_drafts=16))
    assert [request.n for request in engine.requests] == [16, 16, 16, 16]


def test_overload_in_a_later_round_returns_the_nearest_draft() -> None:
    def write(request: SampleRequest, call: int) -> list[Draft]:
        if call > 1:
            raise RequestError("too many", None, 503, "overloaded", 1)
        return [draft("a b")]

    events, _ = run(FakeEngine(write), exactly_3_words())
    assert texts(events) == {0: "a b"}


def test_a_slow_later_round_returns_the_nearest_draft_in_time() -> None:
    class StuckEngine(FakeEngine):
        async def sample(self, request: SampleRequest) -> SampleResult:
            if self.requests:
                await asyncio.Event().wait()
            return await super().sample(request)

    events, _ = run(StuckEngine(lambda request, call: [draft("a b")]), exactly_3_words(), RetryBudget(seconds=0.05))
    assert texts(events) == {0: "a b"}


def test_overload_in_the_first_round_fails_the_request() -> None:
    engine = FakeEngine()
    engine.error = RequestError("too many", None, 503, "overloaded", 1)
    with pytest.raises(RequestError, match="too many"):
        run(engine, exactly_3_words())


def test_a_stream_yields_the_text_of_the_first_drafts_and_then_accepts_or_replaces_them() -> None:
    engine = engine_with_rounds([draft("a b c"), draft("d e")], [draft("g h i")])
    events, _ = run(engine, exactly_3_words(2), live=True)
    streamed = {i: "".join(e.text for e in events if isinstance(e, TextDelta) and e.index == i) for i in (0, 1)}
    assert streamed == {0: "a b c", 1: "d e"}
    assert [event for event in events if not isinstance(event, TextDelta)] == [
        DraftAccepted(0, draft("a b c")),
        DraftRejected(1, 2, "length"),
        DraftAccepted(1, draft("g h i")),
    ]


def test_closing_a_stream_aborts_the_engines_call() -> None:
    async def read_first_event() -> FakeEngine:
        engine = FakeEngine(gate=asyncio.Event())
        events = write_prompts(engine, exactly_3_words(), RetryBudget(), GenerationCost(), live=True)
        assert isinstance(await anext(events), TextDelta)
        await events.aclose()
        return engine

    assert asyncio.run(read_first_event()).aborted == 1
