"""Which episodes of the replay buffer are trained and validated on."""

import numpy as np
import pytest

from udrl.intents.composer import compose, subject_of
from udrl.train.replay_buffer import hash_ids, select_share, select_validation

IDS = np.arange(50_000, dtype=np.int64)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9])
def test_the_selected_share_does_not_depend_on_the_pattern_of_the_ids(share: float) -> None:
    for ids in (IDS, 1000 * IDS, IDS << 40):
        assert select_share(ids, share).mean() == pytest.approx(share, abs=0.01)


def test_a_larger_share_includes_a_smaller_one() -> None:
    assert (select_share(IDS, 0.3) <= select_share(IDS, 0.5)).all()
    assert select_share(IDS, 1.0).all()


def test_the_selections_are_those_of_earlier_versions() -> None:
    """Another selection would train on validation intents of earlier rounds; computed with the version of 2026-11-24."""
    assert hash_ids(np.array([0, 1], dtype=np.int64)).tolist() == [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1]
    assert np.flatnonzero(select_share(np.arange(40), 0.3)).tolist() == [3, 10, 18, 20, 21, 33]
    intents = [f"request {i}" for i in range(60)]
    assert np.flatnonzero(select_validation(intents, 0.2)).tolist() == [4, 5, 8, 10, 19, 26, 30, 33, 42, 49, 52, 54, 58]


def test_all_intents_of_a_subject_are_validated_on_or_none() -> None:
    intents = [intent.text for intent in compose(2000, seed=1)]
    selected = select_validation(intents, 0.1)
    subjects = {
        chosen: {subject_of(i) for i, s in zip(intents, selected, strict=True) if s == chosen} for chosen in (True, False)
    }
    assert not subjects[True] & subjects[False]
    assert selected.mean() == pytest.approx(0.1, abs=0.03)
