"""Swapped copies carry new subjects through both intent and prompt."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from udrl.intents.content_words import singular_and_plural
from udrl.train.augment import frequent_words, shared_words, subject_words, swap_words, whole_words

NOTHING: frozenset[str] = frozenset()
POOL = tuple(f"word{chr(97 + i)}" for i in range(8))
WORDS = ["owl", "kettle", "mouse", "bush", "ferry", "kites", "foxes", "octopus"]


def swap(intent: str, prompt: str, *pool: str, frequent: frozenset[str] = NOTHING) -> tuple[str, str]:
    return swap_words(intent, prompt, shared_words(intent, prompt, frequent), pool, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("intent", "expected"),
    [
        ("poster of a red panda in glass, gold light", ["red", "panda"]),  # of the composer: the whole subject, no style
        ("three kites over the harbor", ["kites", "harbor"]),  # written by a person: all content words, no numbers
        ("a kettle's picture", ["kettle"]),
        ("2024 plan", ["plan"]),
        ("with a poster", []),
    ],
)
def test_the_words_that_name_what_an_intent_is_about_are_selected(intent: str, expected: list[str]) -> None:
    assert subject_words(intent) == expected


def test_words_of_many_intents_frame_requests_and_are_not_swapped() -> None:
    frequent = frequent_words([f"gazette about thing{i}" for i in range(60)])
    assert frequent == {"gazette", "about"}
    assert subject_words("gazette about kites", frequent) == ["kites"]


def test_only_words_that_the_prompt_names_too_are_swapped() -> None:
    assert shared_words("a kettle and a teapot", "two kettles, steam", NOTHING) == ["kettle"]
    assert shared_words("a kettle", "steam at night", NOTHING) == []


@settings(deadline=None)
@given(st.sampled_from(WORDS), st.sampled_from(POOL), st.integers(0, 99))
def test_a_swapped_word_is_replaced_in_both_texts_and_their_lengths_do_not_change(word: str, other: str, seed: int) -> None:
    intent, prompt = f"poster of a {word}", f"{word.capitalize()} under a lamp, the {word}'s shadow, {other} and un{word}ed"
    shared = shared_words(intent, prompt, NOTHING)
    new_intent, new_prompt = swap_words(intent, prompt, shared, POOL, np.random.default_rng(seed))
    assert len(new_intent.split()) == len(intent.split())
    assert len(new_prompt.split()) == len(prompt.split())
    new = new_intent.split()[-1]
    assert singular_and_plural(new)[0] in POOL
    assert new_prompt.startswith(f"{new.capitalize()} under a lamp, the {new}'s shadow")
    assert new_prompt.endswith(f"{other} and un{word}ed")


@pytest.mark.parametrize(
    ("intent", "prompt", "new", "expected"),
    [
        ("a kettle", "Kettles and a kettle", "emu", ("an emu", "Emus and an emu")),
        ("An owl", "an owl, two owls", "tiger", ("A tiger", "a tiger, two tigers")),
        ("three mice", "a mouse with mice", "kettle", ("three kettles", "a kettle with kettles")),
        ("a bush", "two bushes", "library", ("a library", "two libraries")),
        ("some ferries", "a ferry", "billions", ("some billions", "a billion")),
        ("a brass kettle", "an old kettle", "emu", ("a brass emu", "an old emu")),
    ],
)
def test_number_and_article_follow_the_new_word(intent: str, prompt: str, new: str, expected: tuple[str, str]) -> None:
    assert swap(intent, prompt, new, frequent=frozenset({"brass"})) == expected


def test_a_subject_of_several_words_is_replaced_word_by_word() -> None:
    intent, prompt = swap("menu with a treacle tart", "Treacle tarts on a plate", "kettle", "emu")
    new = intent.split()[-2:]
    assert prompt == f"{new[0].capitalize()} {singular_and_plural(new[1])[1]} on a plate"


def test_letters_that_only_the_regular_expression_equates_are_not_replaced() -> None:
    assert swap("postcard of istanbul", "istanbul and \u0130stanbul", "ankara")[1] == "ankara and \u0130stanbul"


def test_the_pool_has_whole_lower_case_words_of_a_vocabulary_but_no_unseen_subject() -> None:
    pieces = ["Ġkettle", "▁teapot", "Ġmice", "ing", "ĠParis", "Ġwith", "Ġcat", "Ġx2yz", "Ġfoxes", "Ġwolves"]
    assert whole_words(pieces) == ("foxes", "kettle", "mice", "teapot", "wolves")
    assert whole_words(pieces, excluded=["mouse", "grey wolf"]) == ("foxes", "kettle", "teapot")


def test_swaps_are_those_of_earlier_versions() -> None:
    """Rows of existing students' training data depend on them; computed with the version of 2026-11-25."""
    texts = "poster of a Wordb and worda", "worda under wordb's lamp"
    copies = swap_words(*texts, ["worda", "wordb"], POOL, np.random.default_rng(5))
    assert copies == ("poster of a Wordg and wordf", "wordf under wordg's lamp")
