"""Swapped copies carry new words through both intent and prompt."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from udrl.text import words
from udrl.train.augment import rare_words, shared_words, swap_words

INTENTS = [f"poster of a {w}" for w in ["owl", "fox", "lynx", "otter", "heron", "newt"]] * 5 + ["poster of a dog"] * 40
POOL = rare_words(INTENTS)
RARE = frozenset(POOL)


def test_the_words_that_frame_a_request_are_not_swapped() -> None:
    assert "poster" not in POOL
    assert "dog" not in POOL
    many = [f"poster of a {w}{i}" for i in range(50) for w in ("owl", "fox")]
    assert "owl7" in rare_words(many)
    assert "poster" not in rare_words(many)


MANY = [f"poster of a thing{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(200)]
NAMES = rare_words(MANY)


@settings(deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 99))
def test_a_shared_rare_word_is_swapped_in_both_texts_and_their_lengths_do_not_change(name: str, seed: int) -> None:
    intent, prompt = f"poster of a {name}", f"{name.capitalize()} under a lamp, the {name}'s shadow"
    shared = shared_words(intent, prompt, frozenset(NAMES))
    assert shared == [name]
    new_intent, new_prompt = swap_words(intent, prompt, shared, NAMES, np.random.default_rng(seed))
    assert len(new_intent.split()) == len(intent.split())
    assert len(new_prompt.split()) == len(prompt.split())
    new = new_intent.split()[-1]
    assert new in NAMES
    assert new_prompt.startswith(new.capitalize() + " under a lamp")


def test_only_rare_words_that_occur_in_both_texts_are_shared() -> None:
    assert shared_words(MANY[0], "owl at night", frozenset(NAMES)) == []
    assert shared_words("Fox and owl", "owl, fox, lynx", frozenset({"fox", "lynx", "and"})) == ["fox"]


def test_only_whole_words_are_swapped() -> None:
    name = NAMES[0]
    _, prompt = swap_words(f"a {name}", f"{name} and un{name}ed", [name], NAMES, np.random.default_rng(0))
    assert f"un{name}ed" in prompt
    assert words(prompt)[0] in NAMES


def test_letters_that_only_the_regular_expression_equates_are_not_replaced() -> None:
    texts = "postcard of istanbul", "istanbul and \u0130stanbul"
    _, prompt = swap_words(*texts, ["istanbul"], ["ankara"], np.random.default_rng(0))
    assert prompt == "ankara and \u0130stanbul"


def test_swaps_are_those_of_earlier_versions() -> None:
    """Rows of existing students' training data depend on them; computed with the version of 2026-11-24."""
    pool = [f"word{chr(97 + i)}" for i in range(26)]
    texts = "poster of a Wordb and worda", "worda under wordb's lamp"
    copies = swap_words(*texts, ["worda", "wordb"], pool, np.random.default_rng(5))
    assert copies == ("poster of a Wordu and wordr", "wordr under wordu's lamp")
