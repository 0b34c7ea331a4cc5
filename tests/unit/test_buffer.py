"""What of a round's episodes is trained on."""

import numpy as np
import pytest

from udrl.train.replay_buffer import kept, scrambled

IDS = np.arange(50_000, dtype=np.int64)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9])
def test_the_share_that_is_kept_does_not_hang_on_how_ids_are_made(share: float) -> None:
    for ids in (IDS, 1000 * IDS, IDS << 40):
        assert kept(ids, share).mean() == pytest.approx(share, abs=0.01)


def test_a_larger_share_keeps_what_a_smaller_one_did() -> None:
    assert (kept(IDS, 0.3) <= kept(IDS, 0.5)).all()
    assert kept(IDS, 1.0).all()


def test_the_choice_is_the_same_on_every_machine() -> None:
    assert scrambled(np.array([0, 1], dtype=np.int64)).tolist() == [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1]
