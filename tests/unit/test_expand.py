"""Lines that a teacher wrote become new intents or are dropped with a reason; held-out subjects stay out."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udrl.generate import expand, intent_lines
from udrl.generate.intent_lines import HeldOut, Reason, lines_of, problem_of
from udrl.hashing import stable_id
from udrl.intents import composer
from udrl.intents.intent import INTENT_SCHEMA
from udrl.recipe import Expand, Teacher


def kept(completion: str, first: int = 9, n: int = 3, headless: bool = True, whole: bool = True) -> list[str]:
    return [text for text, reason in lines_of(completion, first, n, headless, whole) if reason is None]


def test_a_continued_list_gives_its_lines_without_numbers_quotes_and_tails() -> None:
    assert kept(' a red barn, 4\n10. "poster for a play."\n11) two cats  in a boat') == [
        "a red barn",
        "poster for a play",
        "two cats in a boat",
    ]
    assert kept("9. a red barn\n10. a blue barn", headless=False) == ["a red barn", "a blue barn"]


def test_lines_out_of_turn_are_the_frame_and_lines_over_the_number_are_surplus() -> None:
    found = list(lines_of("Here are more:\n9. a barn\nEnjoy!\n10. b\n11. c\n12. d\n9. again", 9, 3, False, True))
    reasons = [reason for _, reason in found]
    assert reasons == [Reason.FRAME, None, Reason.FRAME, None, None, Reason.SURPLUS, Reason.FRAME]


def test_the_last_line_of_a_cut_answer_is_dropped() -> None:
    assert kept(" a red barn\n10. a poster for", whole=False) == ["a red barn"]


@given(st.text(max_size=200), st.booleans(), st.booleans())
def test_any_answer_gives_at_most_what_was_asked_for(completion: str, headless: bool, whole: bool) -> None:
    texts = kept(completion, n=2, headless=headless, whole=whole)
    assert len(texts) <= 2
    assert all("\n" not in text for text in texts)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("poster for a school play", None),
        ("invitación para una boda en la playa", None),
        ("दीवाली के लिए निमंत्रण पत्र", None),
        ("birthday card for a boy turning 5", None),
        ("a barn", Reason.TOO_SHORT),
        ("", Reason.TOO_SHORT),
        (" ".join(["word"] * 17), Reason.TOO_LONG),
        ("I'm sorry, I can't write that", Reason.REFUSAL),
        ("Sure, here are more requests", Reason.REFUSAL),
        ("Request: a poster for a play", Reason.MARKUP),
        ("a **bold** poster for a play", Reason.MARKUP),
        ("see https://example.org for more", Reason.MARKUP),
        ("12, 13, 14, 15, 16 and so on", Reason.MARKUP),
        ("a poster 3. a card for mum", Reason.MARKUP),
    ],
)
def test_an_intent_is_three_to_sixteen_words_of_plain_text(text: str, reason: Reason | None) -> None:
    assert problem_of(text) == reason


def test_the_composers_intents_are_such_texts() -> None:
    problems = [i.text for i in composer.compose(2000, 0) if problem_of(i.text)]
    assert not problems


def test_held_out_subjects_are_found_in_singular_and_plural_whatever_the_case() -> None:
    held = HeldOut()
    held.add(["wolf", "pair of sneakers", "running shoes", "walrus", "Mumbai", "mouse"])
    for text in (
        "poster of two wolves at dusk",
        "A Wolf's night",
        "pairs of sneakers for a shop",
        "ad for one running shoe",
        "walruses on ice",
        "a trip to mumbai",
        "three blind mice",
    ):
        assert text in held
    for text in ("a werewolf in fog", "sneakers for a shop", "a mousepad", "running with shoes", ""):
        assert text not in held


def test_every_subject_of_the_grammar_is_found_in_both_its_forms() -> None:
    for singular, plural in composer.subject_plurals().items():
        held = HeldOut()
        held.add([singular])
        assert f"poster of a {singular} at dusk" in held
        assert f"poster of two {plural} at dusk" in held


# Growth: what is known, from lines to new intents, without an engine


def write(folder: Path, name: str, rows: list[tuple[str, str]]) -> str:
    table = pa.table([[stable_id(t) for t, _ in rows], [t for t, _ in rows], [s for _, s in rows]], schema=INTENT_SCHEMA)
    pq.write_table(table, folder / f"{name}.parquet", row_group_size=3)
    return str(folder / f"{name}.parquet")


SEEDS = [(f"{kind} for a {thing}", thing) for kind in ("poster", "card") for thing in ("lion", "barn", "piano", "castle")]


@pytest.fixture
def growth(tmp_path: Path) -> Any:
    (tmp_path / "config.json").write_text("{}")
    config = Expand(target=3, shown=4, per_request=4)
    policy = expand.expansion_policy(Teacher(model=str(tmp_path)), config)
    train = write(tmp_path, "train", SEEDS)
    heldout = write(tmp_path, "heldout", [("a quiet card with one white feather on soft grey paper", "feather")])
    return expand._Growth(policy, config, 0, train, heldout)


def grow(growth: Any, completion: str, error: str = "", finish: str = "stop") -> list[str]:
    row = {"intent": "a b c\nd e f", "completion": completion, "error": error, "finish_reason": finish}
    return list(growth._new([row]))


def test_only_what_is_new_grows(growth: Any) -> None:
    assert grow(growth, " Poster for a LION\n4. a boat race on a lake\n5. wings of feathers on a wall\n6. a hat") == [
        "a boat race on a lake"
    ]
    assert growth.reasons == {Reason.DUPLICATE: 1, Reason.HELD_OUT_SUBJECT: 1, Reason.TOO_SHORT: 1} | dict.fromkeys(
        (Reason.NEAR_DUPLICATE, Reason.NEAR_HELD_OUT), 0
    )
    assert grow(growth, " a boat race on a lake") == []
    assert growth.reasons[Reason.DUPLICATE] == 2


def test_what_is_near_a_known_or_a_held_out_intent_stays_out(growth: Any) -> None:
    assert grow(growth, " the night train to the sea with all its lamps lit and friends aboard") != []
    assert grow(growth, " night train to the sea with all its lamps lit and friends aboard") == []
    assert growth.reasons[Reason.NEAR_DUPLICATE] == 1
    growth.subjects = HeldOut()  # so that the likeness is what is found
    assert grow(growth, " quiet card with one white feather on soft grey paper") == []
    assert growth.reasons[Reason.NEAR_HELD_OUT] == 1


def test_it_stops_at_the_target_and_counts_the_rest(growth: Any) -> None:
    found = grow(
        growth, " a boat race on a lake\n4. tickets to a magic show\n5. my brother baking bread\n6. rain over old roofs"
    )
    assert len(found) == growth.found == 3
    assert growth.reasons[Reason.SURPLUS] == 1
    assert "3 new intents of 3" in growth.report()


def test_a_failed_request_is_counted(growth: Any) -> None:
    assert grow(growth, "", error="boom") == []
    assert growth.reasons[Reason.ENGINE_ERROR] == 1


def test_requests_show_known_intents_and_are_the_same_every_time(growth: Any) -> None:
    first, again = (growth._pass(0, 300) for _ in range(2))
    rows = [row for s in range(first.shards) for row in first.rows(s)]
    assert rows == [row for s in range(again.shards) for row in again.rows(s)]
    assert len({row["episode_id"] for row in rows}) == first.total == 300
    assert [first.shard_size(s) for s in range(first.shards)] == [256, 44]
    shown = [row["intent"].split("\n") for row in rows]
    assert all(len(set(texts)) == 4 and set(texts) <= {t for t, _ in SEEDS} for texts in shown)
    growth.grown = ["a boat race on a lake"]
    later = [row["intent"] for row in growth._pass(1, 20).rows(0)]
    assert all(text.count("a boat race on a lake") == 1 for text in later)


def test_a_request_is_a_numbered_list_that_ends_where_the_new_ones_begin(growth: Any) -> None:
    row = next(growth._pass(0, 1).rows(0))
    rendered = growth.policy.render(row)
    assert rendered["prompt"].endswith("\n5.")
    assert f"\n4. {row['intent'].split(chr(10))[3]}\n" in rendered["prompt"]
    assert rendered["sampling"]["stop"] == ["\n9.", "\n\n"]


def test_the_irregular_plurals_come_from_the_grammar() -> None:
    assert intent_lines._irregular()["geese"] == "goose"
    assert intent_lines._irregular()["wolves"] == "wolf"
