"""Lines that a teacher writes become new intents or are dropped with a reason; held-out subjects stay out."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udrl.generate.expand import (
    ExpansionSummary,
    HeldOutSubjects,
    IntentExpander,
    LineProblem,
    expansion_policy,
    find_problem,
    parse_lines,
)
from udrl.hashing import stable_id
from udrl.intents import composer
from udrl.intents.intent import INTENT_SCHEMA
from udrl.recipe import Expand, Teacher
from udrl.run import IntentPaths


def valid_lines(completion: str, first: int = 9, n: int = 3, headless: bool = True, whole: bool = True) -> list[str]:
    return [text for text, problem in parse_lines(completion, first, n, headless, whole) if problem is None]


def test_a_continued_list_gives_its_lines_without_numbers_quotes_and_tails() -> None:
    assert valid_lines(' a red barn, 4\n10. "poster for a play."\n11) two cats  in a boat') == [
        "a red barn",
        "poster for a play",
        "two cats in a boat",
    ]
    assert valid_lines("9. a red barn\n10. a blue barn", headless=False) == ["a red barn", "a blue barn"]


def test_unnumbered_lines_are_the_frame_and_additional_lines_are_surplus() -> None:
    lines = parse_lines("Here are more:\n9. a barn\nEnjoy!\n10. b\n11. c\n12. d\n9. again", 9, 3, False, True)
    frame, surplus = LineProblem.FRAME, LineProblem.SURPLUS
    assert [problem for _, problem in lines] == [frame, None, frame, None, None, surplus, frame]


def test_the_last_line_of_a_truncated_completion_is_dropped() -> None:
    assert valid_lines(" a red barn\n10. a poster for", whole=False) == ["a red barn"]


@given(st.text(max_size=200), st.booleans(), st.booleans())
def test_no_completion_gives_more_lines_than_requested(completion: str, headless: bool, whole: bool) -> None:
    texts = valid_lines(completion, n=2, headless=headless, whole=whole)
    assert len(texts) <= 2
    assert all("\n" not in text for text in texts)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("poster for a school play", None),
        ("invitación para una boda en la playa", None),
        ("दीवाली के लिए निमंत्रण पत्र", None),
        ("birthday card for a boy turning 5", None),
        ("a barn", LineProblem.TOO_SHORT),
        ("", LineProblem.TOO_SHORT),
        (" ".join(["word"] * 41), LineProblem.TOO_LONG),
        ("I'm sorry, I can't write that", LineProblem.REFUSAL),
        ("Sure, here are more requests", LineProblem.REFUSAL),
        ("Request: a poster for a play", LineProblem.MARKUP),
        ("a **bold** poster for a play", LineProblem.MARKUP),
        ("see https://example.org for more", LineProblem.MARKUP),
        ("12, 13, 14, 15, 16 and so on", LineProblem.MARKUP),
        ("a poster 3. a card for mum", LineProblem.MARKUP),
    ],
)
def test_an_intent_is_three_to_forty_words_of_plain_text(text: str, reason: LineProblem | None) -> None:
    assert find_problem(text) == reason


def test_the_composers_intents_have_no_problem() -> None:
    problems = {find_problem(i.text) for i in composer.compose(2000, 0)}
    assert problems == {None, LineProblem.TOO_SHORT}  # some of its intents are one or two words


def test_held_out_subjects_match_in_singular_and_plural_and_any_case() -> None:
    subjects = HeldOutSubjects()
    subjects.add(["wolf", "pair of sneakers", "running shoes", "walrus", "Mumbai", "mouse", "goose"])
    for text in (
        "poster of two wolves at dusk",
        "A Wolf's night",
        "pairs of sneakers for a shop",
        "ad for one running shoe",
        "walruses on ice",
        "a trip to mumbai",
        "three blind mice",
        "wild geese in autumn",
    ):
        assert text in subjects
    for text in ("a werewolf in fog", "sneakers for a shop", "a mousepad", "running with shoes", ""):
        assert text not in subjects


def test_every_subject_of_the_grammar_matches_in_singular_and_plural() -> None:
    for singular, plural in composer.subject_plurals().items():
        subjects = HeldOutSubjects()
        subjects.add([singular])
        assert f"poster of a {singular} at dusk" in subjects
        assert f"poster of two {plural} at dusk" in subjects


# From completions to new intents, without an engine


def write(folder: Path, name: str, rows: list[tuple[str, str]]) -> None:
    table = pa.table([[stable_id(t) for t, _ in rows], [t for t, _ in rows], [s for _, s in rows]], schema=INTENT_SCHEMA)
    pq.write_table(table, folder / f"{name}.parquet", row_group_size=3)


SEEDS = [(f"{kind} for a {thing}", thing) for kind in ("poster", "card") for thing in ("lion", "barn", "piano", "castle")]


def make_expander(folder: Path, heldout_subject: str) -> IntentExpander:
    (folder / "config.json").write_text("{}")
    config = Expand(target=3, shown=4, per_request=4)
    policy = expansion_policy(Teacher(model=str(folder)), config)
    write(folder, "train", SEEDS)
    write(folder, "heldout", [("a quiet card with one white feather on soft grey paper", heldout_subject)])
    return IntentExpander(policy, config, 0, IntentPaths(str(folder)))


@pytest.fixture
def expander(tmp_path: Path) -> IntentExpander:
    return make_expander(tmp_path, "feather")


def accept(expander: IntentExpander, completion: str, error: str = "", finish: str = "stop") -> list[str]:
    row = {"intent": "a b c\nd e f", "completion": completion, "error": error, "finish_reason": finish}
    return list(expander.accept_new([row]))


def test_only_new_intents_are_accepted(expander: IntentExpander) -> None:
    assert accept(expander, " Poster for a LION\n4. a boat race on a lake\n5. wings of feathers on a wall\n6. a hat") == [
        "a boat race on a lake"
    ]
    assert +expander.reasons == {LineProblem.DUPLICATE: 1, LineProblem.HELD_OUT_SUBJECT: 1, LineProblem.TOO_SHORT: 1}
    assert accept(expander, " a boat race on a lake") == []
    assert expander.reasons[LineProblem.DUPLICATE] == 2


def test_a_line_near_a_known_intent_is_dropped(expander: IntentExpander) -> None:
    assert accept(expander, " the night train to the sea with all its lamps lit and friends aboard") != []
    assert accept(expander, " night train to the sea with all its lamps lit and friends aboard") == []
    assert expander.reasons[LineProblem.NEAR_DUPLICATE] == 1


def test_a_line_near_a_held_out_intent_is_dropped_whatever_its_subject(tmp_path: Path) -> None:
    expander = make_expander(tmp_path, "")  # a source without subjects: only the similarity can reject the line
    assert accept(expander, " quiet card with one white feather on soft grey paper") == []
    assert expander.reasons[LineProblem.NEAR_HELD_OUT] == 1


def test_lines_beyond_the_target_are_counted_as_surplus(expander: IntentExpander) -> None:
    texts = accept(
        expander, " a boat race on a lake\n4. tickets to a magic show\n5. my brother baking bread\n6. rain over old roofs"
    )
    assert len(texts) == expander.n_new == 3
    assert expander.reasons[LineProblem.SURPLUS] == 1
    assert "3 new intents of 3" in expander.describe()


def test_a_failed_request_is_counted(expander: IntentExpander) -> None:
    assert accept(expander, "", error="boom") == []
    assert expander.reasons[LineProblem.ENGINE_ERROR] == 1


def test_requests_show_known_intents_and_are_deterministic(expander: IntentExpander) -> None:
    first, again = (expander.pass_requests(0, 300) for _ in range(2))
    rows = [row for s in range(first.shards) for row in first.rows(s)]
    assert rows == [row for s in range(again.shards) for row in again.rows(s)]
    assert len({row["episode_id"] for row in rows}) == first.total == 300
    assert [first.shard_size(s) for s in range(first.shards)] == [256, 44]
    shown = [row["intent"].split("\n") for row in rows]
    assert all(len(set(texts)) == 4 and set(texts) <= {t for t, _ in SEEDS} for texts in shown)
    assert accept(expander, " a boat race on a lake") == ["a boat race on a lake"]
    later = [row["intent"] for row in expander.pass_requests(1, 20).rows(0)]
    assert all(text.count("a boat race on a lake") == 1 for text in later)


def test_a_request_is_a_numbered_list_that_ends_before_the_first_new_line(expander: IntentExpander) -> None:
    row = next(expander.pass_requests(0, 1).rows(0))
    rendered = expander.policy.render(row)
    assert rendered["prompt"].endswith("\n5.")
    assert f"\n4. {row['intent'].split(chr(10))[3]}\n" in rendered["prompt"]
    assert rendered["sampling"]["stop"] == ["\n9.", "\n\n"]


def test_the_summary_of_an_older_version_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "expanded.json").write_text('{"mark": "0123456789abcdef", "intents": 3, "reasons": {"known": 2}}')
    summary = ExpansionSummary.load(str(tmp_path / "expanded.json"))
    assert (summary.fingerprint, summary.intents) == ("0123456789abcdef", 3)
