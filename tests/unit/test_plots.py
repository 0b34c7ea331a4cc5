"""Plots draw every number that exists, in a way that a black and white print keeps apart."""

import io

import numpy as np
import pytest
from fakes import fake_evaluation as made_up

from udrl.evaluate.report import plots


def _grey(png: bytes) -> np.ndarray:
    from matplotlib.image import imread

    return imread(io.BytesIO(png))[..., :3].mean(axis=-1).round(3)


@pytest.fixture(scope="module")
def drawn() -> dict[str, bytes]:
    return plots.draw(made_up.document(), ["gated"])


def test_a_full_document_has_every_plot_each_with_a_line_on_how_to_read_it(drawn: dict[str, bytes]) -> None:
    assert list(drawn) == ["length_control", "reward_control"]
    assert drawn.keys() == plots.CAPTIONS.keys() == plots.ALTS.keys()
    assert all(text.startswith("Read: ") for text in plots.CAPTIONS.values())
    for png in drawn.values():
        assert len(np.unique(_grey(png))) > 20  # an empty canvas has one


def test_the_same_numbers_draw_the_same_picture(drawn: dict[str, bytes]) -> None:
    assert plots.draw(made_up.document(), ["gated"]) == drawn


def test_plots_without_numbers_are_not_drawn() -> None:
    assert plots.draw(made_up.bare()) == {}
    document = made_up.document(("one",))
    for task in document.tasks.values():
        task.length.levels = []  # commands outside the usual range still make a plot
    assert list(plots.draw(document)) == ["length_control", "reward_control"]
    for task in document.tasks.values():
        task.reach.levels, task.reward.bins = [], []
    assert plots.draw(document) == {}


def test_a_validated_judge_gets_panels_next_to_relevance(drawn: dict[str, bytes]) -> None:
    alone = plots.draw(made_up.document())["reward_control"]
    assert _grey(drawn["reward_control"]).shape[0] > _grey(alone).shape[0]


def test_a_name_with_mathematics_in_it_is_drawn_as_it_is() -> None:
    assert plots.draw(made_up.document(("$x_y$",)), ["gated"]).keys() == plots.CAPTIONS.keys()
