"""Length is kept by writing again, within bounds, or reported; nothing is shortened and no draft's cost is lost."""

import asyncio
from typing import Any

import pytest
from served import FakeEngine, draft

from serve.api import RequestError
from serve.drafts import Ask, Cost, Draft, Effort, Event, Grown, PromptSpec, Redrafted, Settled, write
from udrl.commands import Command

COMMAND = Command(task="text_to_image", words=3, reward=2)
ASK = Ask(intent="a card", temperature=0.7)


def rounds(*answers: list[Draft]) -> FakeEngine:
    """An engine that answers its first call with the first list, and so on; the last one again and again."""
    return FakeEngine(lambda ask, call: answers[min(call, len(answers)) - 1])


def run(
    engine: FakeEngine, wanted: PromptSpec, effort: Effort | None = None, ask: Ask = ASK, live: bool = False
) -> tuple[list[Event], Cost]:
    cost = Cost()

    async def collect() -> list[Event]:
        return [event async for event in write(engine, ask, wanted, effort or Effort(), cost, live=live)]

    return asyncio.run(collect()), cost


def texts(events: list[Event]) -> dict[int, str]:
    return {event.index: event.draft["text"] for event in events if isinstance(event, Settled)}


def exactly(n: int, words: int = 3, **more: Any) -> PromptSpec:
    return PromptSpec(COMMAND, n, words, words, **more)


def test_what_fits_at_once_is_drawn_once() -> None:
    engine = rounds([draft("one two three"), draft("four five six")])
    events, cost = run(engine, exactly(2))
    assert texts(events) == {0: "one two three", 1: "four five six"}
    assert [ask["n"] for ask in engine.asked] == [2]
    assert (engine.asked[0]["words"], engine.asked[0]["reward"], engine.asked[0]["task"]) == (3, 2, "text_to_image")
    assert (cost.drafts, cost.completion_tokens, cost.prompt_tokens, cost.revision) == (2, 6, 10, "cafe")


def test_a_missed_length_is_written_again_and_each_draft_counts() -> None:
    engine = rounds([draft("one two"), draft("a b c")], [draft("x"), draft("d e f"), draft("g h i")])
    events, cost = run(engine, exactly(2), Effort(rounds=2, samples=4))
    assert Redrafted(0, 2, "length") in events
    assert texts(events) == {0: "d e f", 1: "a b c"}
    assert [ask["n"] for ask in engine.asked] == [2, 4]
    assert cost.drafts == 5


def test_after_the_last_round_the_nearest_draft_is_reported_unshortened() -> None:
    engine = rounds([draft("a b c d e f")], [draft("a b c d"), draft("a b c d e")])
    events, _ = run(engine, exactly(1), Effort(rounds=2))
    assert texts(events) == {0: "a b c d"}
    assert len(engine.asked) == 3


def test_what_a_client_s_own_token_limit_leaves_empty_is_not_written_again() -> None:
    engine = rounds([draft("", "length")])
    events, cost = run(engine, PromptSpec(COMMAND, 1, whole=False, distinct=False))
    assert (texts(events), cost.drafts) == ({0: ""}, 1)
    _, cost = run(rounds([draft("")], [draft("a b c")]), PromptSpec(COMMAND, 1, whole=False, distinct=False))
    assert cost.drafts == 2  # the student itself ended it with nothing


def test_a_range_takes_both_its_ends() -> None:
    wanted = PromptSpec(COMMAND, 3, 2, 4)
    events, cost = run(rounds([draft("a b"), draft("a b c"), draft("a b c d")]), wanted)
    assert len(texts(events)) == 3
    assert cost.drafts == 3


def test_no_length_asked_is_no_miss() -> None:
    events, cost = run(rounds([draft("a b c d e f g")]), PromptSpec(COMMAND, 1))
    assert texts(events) == {0: "a b c d e f g"}
    assert cost.drafts == 1


def test_a_draft_that_was_cut_off_is_a_miss_and_goes_last() -> None:
    engine = rounds([draft("a b c", "length")], [draft("a b", "stop"), draft("d e f", "length")])
    events, _ = run(engine, exactly(1), Effort(rounds=1))
    assert Redrafted(0, 3, "cut") in events
    assert texts(events) == {0: "a b"}  # whole, though a word short


def test_a_client_that_sets_the_limit_itself_gets_what_is_cut() -> None:
    events, cost = run(rounds([draft("a b c", "length")]), exactly(1, whole=False))
    assert texts(events) == {0: "a b c"}
    assert cost.drafts == 1


def test_duplicates_are_written_again_whatever_their_case_and_spaces() -> None:
    engine = rounds([draft("one two three"), draft("One  Two three")], [draft("ONE two three"), draft("four five six")])
    events, _ = run(engine, exactly(2))
    assert texts(events) == {0: "one two three", 1: "four five six"}


def test_a_place_stays_open_rather_than_hold_a_duplicate() -> None:
    events, _ = run(rounds([draft("one two three")] * 3), exactly(3))
    assert texts(events) == {0: "one two three"}


def test_where_distinct_is_not_asked_every_place_is_filled() -> None:
    events, cost = run(rounds([draft("one two three")] * 3), exactly(3, distinct=False))
    assert texts(events) == dict.fromkeys(range(3), "one two three")
    assert cost.drafts == 3


def test_nothing_is_no_prompt() -> None:
    events, _ = run(rounds([draft("")]), PromptSpec(COMMAND, 1))
    assert texts(events) == {}


def test_greedy_decoding_is_not_asked_twice() -> None:
    engine = rounds([draft("a b")])
    events, _ = run(engine, exactly(1), ask=Ask(intent="a card", temperature=0))
    assert texts(events) == {0: "a b"}
    assert len(engine.asked) == 1


def test_a_seed_makes_further_rounds_with_seeds_of_their_own() -> None:
    engine = rounds([draft("a b")])
    run(engine, exactly(1), Effort(rounds=2), ask=Ask(intent="a card", temperature=0.7, seed=2**32 - 1))
    seeds = [ask["seed"] for ask in engine.asked]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_rounds_and_samples_are_bounded() -> None:
    engine = rounds([draft("a")] * 16)
    run(engine, exactly(16), Effort(rounds=3, samples=4, most=16))
    assert [ask["n"] for ask in engine.asked] == [16, 16, 16, 16]


def test_overload_while_writing_again_reports_what_is_at_hand() -> None:
    engine = rounds([draft("a b")])

    def say(ask: Ask, call: int) -> list[Draft]:
        if call > 1:
            raise RequestError("too many", None, 503, "overloaded", 1)
        return [draft("a b")]

    engine.say = say
    events, _ = run(engine, exactly(1))
    assert texts(events) == {0: "a b"}


def test_writing_again_ends_in_time_with_what_is_at_hand() -> None:
    class Stuck(FakeEngine):
        async def draw(self, ask: Ask) -> Any:
            if self.asked:
                await asyncio.Event().wait()
            return await super().draw(ask)

    events, _ = run(Stuck(lambda ask, call: [draft("a b")]), exactly(1), Effort(seconds=0.05))
    assert texts(events) == {0: "a b"}


def test_overload_at_first_is_the_requests_own_error() -> None:
    engine = rounds([])
    engine.fails = RequestError("too many", None, 503, "overloaded", 1)
    with pytest.raises(RequestError, match="too many"):
        run(engine, exactly(1))


def test_a_stream_grows_its_first_drafts_and_then_settles_them() -> None:
    engine = rounds([draft("a b c"), draft("d e")], [draft("g h i")])
    events, _ = run(engine, exactly(2), live=True)
    grown = {i: "".join(e.text for e in events if isinstance(e, Grown) and e.index == i) for i in (0, 1)}
    assert grown == {0: "a b c", 1: "d e"}
    assert [e for e in events if not isinstance(e, Grown)] == [
        Settled(0, draft("a b c")),
        Redrafted(1, 2, "length"),
        Settled(1, draft("g h i")),
    ]


def test_giving_a_stream_up_gives_the_engines_up() -> None:
    async def part() -> FakeEngine:
        engine = FakeEngine(gate=asyncio.Event())
        events = write(engine, ASK, exactly(1), Effort(), Cost(), live=True)
        assert isinstance(await anext(events), Grown)
        await events.aclose()
        return engine

    assert asyncio.run(part()).given_up == 1
