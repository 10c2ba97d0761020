"""Curves as inline SVG."""

import re
from xml.etree import ElementTree

import pytest

from megachat.evals.plots import POINTS, Curve, plot, smoothed


def curve(points: int = 100) -> Curve:
    return Curve.of("Loss", "nats per token", range(points), [3.0 - i / points for i in range(points)])


def test_a_long_curve_is_thinned_to_means_of_neighbours():
    thin = Curve.of("x", "y", range(2 * POINTS), [float(i % 2) for i in range(2 * POINTS)])
    assert thin.steps[:2] == [0.5, 2.5]
    assert thin.values == [0.5] * POINTS


def test_a_short_curve_is_kept_as_it_is():
    assert Curve.of("x", "y", [10, 20], [1.0, 2.0]) == Curve("x", "y", [10.0, 20.0], [1.0, 2.0])


def test_smoothing_keeps_a_constant_and_leaves_short_curves_alone():
    assert smoothed([2.0] * 80) == [2.0] * 80
    assert smoothed([1.0] * 39) is None


def test_a_plot_names_its_axes_and_their_unit():
    svg = plot(curve(), "pretrain-loss")
    for text in ("Loss", "nats per token", "optimizer step"):
        assert f">{text}</text>" in svg


def test_a_plot_is_well_formed_takes_any_width_and_fetches_nothing():
    svg = plot(curve(), "pretrain-loss")
    root = ElementTree.fromstring(svg)
    assert "viewBox" in root.attrib
    assert not {"width", "height"} & set(root.attrib)
    assert "http" not in svg
    assert "<style" not in svg  # it would apply to the whole page


def test_a_plot_has_no_colour_of_its_own():
    svg = plot(curve(), "pretrain-loss")
    assert "var(--accent)" in svg
    assert "var(--quiet)" in svg
    assert not re.search(r"#[0-9a-f]{6}\b", svg)


def test_ids_of_two_plots_differ_and_every_reference_has_its_id():
    first, second = (plot(curve(), name) for name in ("sft-loss", "rm-loss"))
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', first)) == ids[0]


@pytest.mark.parametrize("points", [1, 2])
def test_one_or_two_points_can_be_drawn(points: int):
    assert "<svg" in plot(curve(points), "x")
