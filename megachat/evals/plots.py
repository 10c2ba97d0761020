"""Plots as inline SVG, in the colours of the page, which follow the reader's light or dark mode.

One plot shows one metric of one stage; matplotlib draws it, and `_inline` makes a part of a page of its file.
"""

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megachat.evals.markup import Html

POINTS = 400
"""A line is drawn with at most this many points, each the mean of its neighbours."""

Numbers = Sequence[int | float]


@dataclass(frozen=True, slots=True)
class Line:
    """Values over the optimizer's steps."""

    label: str
    steps: list[float]
    values: list[float]

    @classmethod
    def of(cls, label: str, steps: Numbers, values: Numbers) -> "Line":
        """Thinned to `POINTS` points."""
        pieces = min(len(steps), POINTS)
        thin = [
            [float(np.mean(piece)) for piece in np.array_split(np.asarray(series, dtype=np.float64), pieces)]
            for series in (steps, values)
        ]
        return cls(label, *thin)


@dataclass(frozen=True, slots=True)
class Plot:
    """One metric of one stage: in training, held out, or both."""

    title: str
    unit: str
    lines: list[Line]


# Colours that cannot occur by chance stand for the style sheet's; `draw` puts its names in their place.
PAINT = {
    "#010203": "var(--ink)",
    "#010204": "var(--quiet)",
    "#010205": "var(--line)",
    "#010206": "var(--accent)",
    "#010207": "var(--other)",
}
INK, QUIET, LINE, ACCENT, OTHER = PAINT


SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": LINE,
    "grid.color": LINE,
}


def draw(plot: Plot, name: str) -> Html:
    """The plot as SVG. `name` must be unique on the page: SVG ids are shared by all of it."""
    with matplotlib.rc_context(SETTINGS | {"svg.hashsalt": name}):
        figure = Figure(figsize=(3.9, 2.4), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(plot.title, color=INK, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(plot.unit)
        axes.grid(axis="y", linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}".replace("-", "\u2212")))
        for line, colour in zip(plot.lines, (ACCENT, OTHER), strict=False):
            smooth = smoothed(line.values)
            if smooth is not None:
                axes.plot(line.steps, line.values, color=colour, alpha=0.3, linewidth=0.8)
            marker = "o" if len(line.steps) == 1 else ""
            axes.plot(
                line.steps,
                smooth or line.values,
                color=colour,
                linewidth=1.6,
                marker=marker,
                label=line.label,
            )
        if len(plot.lines) > 1:
            axes.legend(frameon=False, labelcolor="linecolor", handlelength=1.2, fontsize=9)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return Html(_inline(buffer.getvalue(), name, f"{plot.title}, {plot.unit}, over the optimizer's steps"))


def smoothed(values: Sequence[float]) -> list[float] | None:
    """A centred moving mean over a twentieth of the curve; None for a curve too short to need one."""
    reach = len(values) // 40
    if reach < 1:
        return None
    series = np.asarray(values)
    return [float(series[max(0, i - reach) : i + reach + 1].mean()) for i in range(len(series))]


def _inline(svg: str, name: str, label: str) -> str:
    """Matplotlib's file as part of a page: no prologue, ids of its own, the page's colours, any width."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r' (?:width|height)="[^"]*"', "", svg, count=2)  # the root's come first
    svg = re.sub(r"font-family: [^;]*; ", "", svg)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(href="|url\()#', rf"\g<1>#{name}-", svg)
    for colour, variable in PAINT.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg", f'<svg class="plot" role="img" aria-label="{html.escape(label)}"', 1)
