"""Charts of a run as inline SVG in the page's colours, for light and dark mode.

matplotlib draws each chart in placeholder colours, one for each name in ``COLOURS``. The placeholders become CSS
variables in the SVG, so that one picture serves both colour schemes. The page draws the legend from
:attr:`Chart.legend`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_REWARD_COLOURS = ("precision", "recall", "linguistic", "score")
_PART_COLOURS = ("c0", "c1", "c2", "c3", "c4", "c5")
COLOURS = (*_REWARD_COLOURS, *_PART_COLOURS, "ink", "muted", "line", "band")
"""Names of the page's CSS variables that a series may take its colour from."""
MAX_POINTS = 1000
"""Largest number of points drawn for one series. Longer series are averaged down to it, because a chart is at most this
many pixels wide."""

_STAND_IN = {name: f"#0a0b{16 + i:02x}" for i, name in enumerate(COLOURS)}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # keeps text as text, in the page's font
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _STAND_IN["muted"],
    "axes.labelcolor": _STAND_IN["muted"],
    "axes.titlecolor": _STAND_IN["ink"],
    "xtick.color": _STAND_IN["muted"],
    "ytick.color": _STAND_IN["muted"],
    "text.color": _STAND_IN["ink"],
    "grid.color": _STAND_IN["line"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "font.size": 9.0,
    "axes.formatter.useoffset": False,
}


@dataclass(frozen=True)
class Series:
    """One line or one set of marks over the steps. NaN leaves a gap."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    colour: str
    kind: str = "line"
    """``line``: a solid line. ``raw``: a thin, pale line. ``filled`` or ``hollow``: marks, joined by a dotted line if
    there are at least three."""


@dataclass(frozen=True)
class Chart:
    """A drawn chart: its SVG text and what its colours mean."""

    title: str
    svg: str
    legend: list[tuple[str, str, str]] = field(default_factory=list)
    """One (label, colour name, kind) tuple for each entry of the legend."""
    note: str = ""


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """At each position, the mean of the finite values among the last ``window`` values; NaN if none is finite."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    num = counts[ends] - counts[starts]
    return np.where(num > 0, (sums[ends] - sums[starts]) / np.maximum(num, 1), np.nan)


def thin(steps: np.ndarray, values: np.ndarray, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Average runs of neighbouring points until at most ``limit`` points remain."""
    size = -(-len(steps) // limit)
    if size <= 1:
        return steps, values
    steps_out, values_out = [], []
    for start in range(0, len(steps), size):
        part = values[start : start + size]
        finite = part[np.isfinite(part)]
        steps_out.append(steps[start : start + size].mean())
        values_out.append(finite.mean() if len(finite) else np.nan)
    return np.array(steps_out), np.array(values_out)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    y_range: tuple[float, float | None] | None = None,
    band: tuple[float, float] | None = None,
    note: str = "",
) -> Chart:
    """Draw lines and marks over steps.

    ``band`` shades the range of allowed values. If the upper bound of ``y_range`` is None, matplotlib chooses it.
    """
    with matplotlib.style.context(_STYLE, after_reset=True):
        figure, axes = _figure()
        if band is not None:
            axes.axhspan(*band, color=_STAND_IN["band"], alpha=0.12, linewidth=0)
            for bound in band:
                axes.axhline(bound, color=_STAND_IN["band"], linewidth=1.0, linestyle=(0, (4, 3)))
        for one in series:
            _draw(axes, one)
        if y_range is not None:
            axes.set_ylim(*y_range)
        legend = [(one.label, one.colour, one.kind) for one in series]
        if band is not None:
            legend.append((f"allowed: {band[0]:g} to {band[1]:g}", "band", "raw"))
        return Chart(title, _svg(figure, title), legend, note)


def stacked_chart(title: str, steps: np.ndarray, parts: dict[str, np.ndarray], *, note: str = "") -> Chart:
    """Draw the parts of a whole over steps, stacked in the order given. NaN counts as 0."""
    colours = [_PART_COLOURS[i % len(_PART_COLOURS)] for i in range(len(parts))]
    with matplotlib.style.context(_STYLE, after_reset=True):
        figure, axes = _figure()
        thinned = [thin(steps, values) for values in parts.values()]
        stack = [np.nan_to_num(values) for _, values in thinned]
        if len(steps) == 1:  # an area over a single step would have no width
            heights = [float(values[0]) for values in stack]
            bottoms = np.concatenate([[0.0], np.cumsum(heights)[:-1]])
            axes.bar([steps[0]] * len(stack), heights, 0.5, bottom=bottoms, color=[_STAND_IN[c] for c in colours])
        else:
            axes.stackplot(thinned[0][0], stack, colors=[_STAND_IN[c] for c in colours], alpha=0.8, linewidth=0)
        axes.set_ylim(bottom=0.0)
        legend = [(label, colour, "filled") for label, colour in zip(parts, colours, strict=True)]
        return Chart(title, _svg(figure, title), legend, note)


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 2.5), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
    axes.margins(x=0.02)
    return figure, axes


def _draw(axes: Axes, series: Series) -> None:
    colour = _STAND_IN[series.colour]
    steps, values = thin(series.steps, series.values)
    if series.kind == "raw":
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
    elif series.kind == "line":
        marker = "o" if np.isfinite(values).sum() == 1 else None
        axes.plot(steps, values, color=colour, linewidth=1.8, marker=marker)
    else:
        # Two marks alone (such as evaluations before and after training) say nothing about the steps between them, so
        # no line joins them.
        joint = ":" if len(values) > 2 else "none"
        shape: dict[str, Any] = {"marker": "o", "markersize": 6}
        if series.kind == "hollow":
            shape = {"marker": "D", "markersize": 5, "markerfacecolor": "none"}
        axes.plot(steps, values, color=colour, linewidth=0.8, linestyle=joint, clip_on=False, **shape)


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):  # makes the ids, and so the bytes, the same for the same run
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-z0-9]+_[\d_]+"', "", svg)  # ids such as figure_1 are unused, and not unique on a page
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r'\1 role="img"', svg, count=1)
    for name, colour in _STAND_IN.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg
