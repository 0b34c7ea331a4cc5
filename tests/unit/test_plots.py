"""Plots draw every number that exists, in a way that a black and white print keeps apart."""

import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from fakes import fake_evaluation as made_up
from hypothesis import given
from hypothesis import strategies as st

from udrl.evaluate.report import plots


def _grey(png: bytes) -> np.ndarray:
    from matplotlib.image import imread

    return imread(io.BytesIO(png))[..., :3].mean(axis=-1).round(3)


@pytest.fixture(scope="module")
def drawn() -> dict[str, plots.Drawing]:
    return plots.draw(made_up.document(), ["likelihood"])


def test_a_full_document_has_every_plot_each_with_a_line_on_how_to_read_it(drawn: dict[str, plots.Drawing]) -> None:
    assert list(drawn) == ["relevance", "length_control", "reward_control", "quality_cost", "training_loss"]
    assert drawn.keys() == plots.CAPTIONS.keys() == plots.ALTS.keys()
    assert all(text.startswith("Read: ") for text in plots.CAPTIONS.values())
    for drawing in drawn.values():
        assert len(np.unique(_grey(drawing.png))) > 20  # an empty canvas has one


def test_an_svg_is_one_element_with_ids_of_its_own_and_nothing_to_load(drawn: dict[str, plots.Drawing]) -> None:
    seen: set[str] = set()
    for name, drawing in drawn.items():
        root = ElementTree.fromstring(drawing.svg)
        assert root.tag.endswith("svg")
        assert root.get("viewBox")
        ids = [one for node in root.iter() if (one := node.get("id"))]
        assert len(ids) == len(set(ids))
        assert not seen & set(ids)
        seen |= set(ids)
        used = re.findall(r'href="#([^"]+)"', drawing.svg) + re.findall(r"url\(#([^)]+)\)", drawing.svg)
        assert used
        assert set(used) <= set(ids)
        assert all(one.startswith(f"{name}-") for one in ids)
        assert not re.search(r"<style|<metadata|<script|<image", drawing.svg)
        assert not re.search(r'(href|src)="(?!#)', drawing.svg)


def test_the_same_numbers_draw_the_same_picture() -> None:
    document = made_up.document(("one",), losses=[(1, 2.0), (2, 1.5)])
    first, second = (plots.draw(document) for _ in range(2))
    assert {name: one.svg for name, one in first.items()} == {name: one.svg for name, one in second.items()}


def test_plots_without_numbers_are_not_drawn() -> None:
    assert list(plots.draw(made_up.bare())) == ["relevance"]
    document = made_up.document(("one",), losses=[(1, 2.0)])
    for task in document.tasks.values():
        task.length.levels = []  # commands outside the usual range still make a plot
    for profile in document.policies.values():
        for name, _ in plots.COSTS:
            setattr(profile, name, None)
    assert list(plots.draw(document)) == ["relevance", "length_control", "reward_control"]


def test_cost_is_dollars_else_core_seconds_else_time() -> None:
    profiles = made_up.document().policies
    for name, unit in (("dollars_per_1000", "dollars"), ("core_seconds_per_1000", "core-seconds")):
        selected = plots.select_costs(profiles)
        assert selected is not None
        assert selected[0] == f"{unit} per 1,000 prompts"
        for profile in profiles.values():
            setattr(profile, name, None)
    selected = plots.select_costs(profiles)
    assert selected is not None
    label, costs = selected
    assert label == "seconds per 1,000 prompts"
    assert costs["student"] == pytest.approx(1000 / 210)
    assert "echo" not in costs


def test_a_name_with_mathematics_in_it_is_drawn_as_it_is() -> None:
    assert plots.draw(made_up.document(("$x_y$",)), ["likelihood"]).keys() == plots.CAPTIONS.keys()


def test_a_long_history_of_losses_is_thinned_and_keeps_its_ends() -> None:
    document = made_up.document(("one",), losses=[(step, 1 / (1 + step)) for step in range(20_000)])
    assert len(plots.draw(document)["training_loss"].svg) < 60_000


def test_the_front_against_points_by_hand() -> None:
    costs, values = [5, 1, 3, 3, 9], [0.7, 0.5, 0.6, 0.4, 0.65]
    assert plots.pareto_front(costs, values) == [1, 2, 0]  # 3 costs as much as 2 and is worse; 4 costs more than 0 and is worse


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_nothing_on_the_front_is_beaten_and_everything_off_it_is(points: list[tuple[int, int]]) -> None:
    costs, values = zip(*points, strict=True)
    front = plots.pareto_front(costs, values)
    assert front
    for i in range(len(points)):
        beaten = any(costs[k] <= costs[i] and values[k] >= values[i] and points[k] != points[i] for k in range(len(points)))
        assert beaten == (points[i] not in [points[k] for k in front])
