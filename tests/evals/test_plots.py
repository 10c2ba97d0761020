"""Curves as inline SVG."""

import re
from xml.etree import ElementTree

import pytest

from megachat.evals.plots import POINTS, Line, Plot, draw, smoothed


def loss(points: int = 100) -> Plot:
    line = Line.of("training", range(points), [3.0 - i / points for i in range(points)])
    return Plot("Loss", "nats per token", [line])


def test_a_long_curve_is_thinned_to_means_of_neighbours():
    thin = Line.of("x", range(2 * POINTS), [float(i % 2) for i in range(2 * POINTS)])
    assert thin.steps[:2] == [0.5, 2.5]
    assert thin.values == [0.5] * POINTS


def test_a_short_curve_is_kept_as_it_is():
    assert Line.of("x", [10, 20], [1.0, 2.0]) == Line("x", [10.0, 20.0], [1.0, 2.0])


def test_smoothing_keeps_a_constant_and_leaves_short_curves_alone():
    assert smoothed([2.0] * 80) == [2.0] * 80
    assert smoothed([1.0] * 39) is None


def test_a_plot_names_its_axes_and_their_unit():
    svg = draw(loss(), "pretrain-loss")
    for text in ("Loss", "nats per token", "optimizer step"):
        assert f">{text}</text>" in svg


def test_two_lines_have_colours_and_names_of_their_own():
    one = loss()
    svg = draw(Plot("Loss", "nats", [*one.lines, Line.of("held out", [10, 90], [3.0, 2.5])]), "sft-loss")
    assert "var(--other)" in svg
    assert ">training</text>" in svg
    assert ">held out</text>" in svg
    assert ">training</text>" not in draw(one, "sft-loss")  # one line needs no name


def test_a_plot_is_well_formed_takes_any_width_and_fetches_nothing():
    svg = draw(loss(), "pretrain-loss")
    root = ElementTree.fromstring(svg)
    assert "viewBox" in root.attrib
    assert not {"width", "height"} & set(root.attrib)
    assert "http" not in svg
    assert "<style" not in svg  # it would apply to the whole page


def test_a_plot_has_no_colour_of_its_own():
    svg = draw(loss(), "pretrain-loss")
    assert "var(--accent)" in svg
    assert "var(--quiet)" in svg
    assert not re.search(r"#[0-9a-f]{6}\b", svg)


def test_ids_of_two_plots_differ_and_every_reference_has_its_id():
    first, second = (draw(loss(), name) for name in ("sft-loss", "rm-loss"))
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', first)) == ids[0]


@pytest.mark.parametrize("points", [1, 2])
def test_one_or_two_points_can_be_drawn(points: int):
    assert "<svg" in draw(loss(points), "x")
