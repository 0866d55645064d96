"""The curve, and predicted against measured, as PNG or SVG: for papers, mail and pages without scripts.

matplotlib is imported where it is used, with the Agg back end: it takes half a second and needs no screen.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..traces.whole_file import whole_file
from .chart import Axis, Chart, chart
from .comparison import Comparison
from .report_data import ReportData
from .summary import cost_unit
from .words import dollars, metric_words, seconds, share_of_requests

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")

# Okabe and Ito, "Color Universal Design", 2008: told apart with every kind of color vision; shapes differ as well.
BLUE, VERMILION, GREEN, ORANGE, GREY = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#8b949e"

_SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#d5d9dd",
    "grid.linewidth": 0.6,
    "svg.hashsalt": "paretune",
    "text.parse_math": False,
}


class BadPlot(Exception):
    """A plot that was asked for in a format we do not write."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str) -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {self.found!r:.60}; allowed: {self.allowed}; {self.todo}"


def write_curve(data: ReportData, path: str | os.PathLike[str]) -> None:
    """Draw the latency-cost curve with its band, the default, the pick and the target; whole or not at all.

    Raises: BadPlot: the name does not end in .png or .svg. OSError: it cannot be written.
    """
    suffix = _suffix(path)
    import matplotlib

    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _figure(7.2, 5.0)
        _draw_curve(axes, chart(data), data)
        figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=4)
        axes.set_title(f"{data.study}: what waiting less costs", loc="left", fontsize=10)
        _save(figure, path, suffix)


def write_predicted_measured(rows: Sequence[Comparison], path: str | os.PathLike[str]) -> None:
    """Draw every wait that was both predicted and measured, with its interval, around the diagonal.

    Raises: BadPlot: the name does not end in .png or .svg. OSError: it cannot be written.
    """
    suffix = _suffix(path)
    import matplotlib

    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _figure(5.0, 4.6)
        _draw_scatter(axes, [row for row in rows if row.unit == "s" and row.measured > 0 and row.predicted > 0])
        _save(figure, path, suffix)


def _draw_curve(axes: Axes, picture: Chart, data: ReportData) -> None:
    front = data.front
    _set_axis(axes, "x", picture.x, seconds)
    _set_axis(axes, "y", picture.y, dollars)
    axes.set_xlabel(f"{share_of_requests(front.percentile)} wait at most this long for\n{metric_words(front.metric)}")
    axes.set_ylabel(f"dollars {cost_unit(front.cost)}")
    if picture.limit_s is not None:
        late: dict[str, Any] = {"color": VERMILION, "alpha": 0.1, "linewidth": 0}
        axes.axvspan(picture.limit_s, picture.x.high, label="slower than the target", **late)
        axes.axvline(picture.limit_s, color=VERMILION, linewidth=1, linestyle=(0, (4, 3)))
    if picture.band:
        xs, ys = zip(*picture.band)
        axes.fill(xs, ys, color=BLUE, alpha=0.16, linewidth=0, label="90 % interval")
    for kind, marker in (("simulated", "o"), ("measured", "s"), ("infeasible", "x")):
        marks = [mark for mark in picture.others if mark.kind == kind]
        if marks:
            look: dict[str, Any] = {"marker": marker, "s": 9, "color": GREY, "alpha": 0.6, "linewidths": 0.8}
            axes.scatter([mark.x for mark in marks], [mark.y for mark in marks], label=f"{kind} trial", **look)
    if picture.line:
        axes.plot(*zip(*picture.line), color=BLUE, linewidth=1.5)
        axes.plot(*zip(*picture.front), "o", color=BLUE, markersize=5, markeredgecolor="white", label="on the curve")
    for place, color, who in (
        (picture.default_measured, VERMILION, "default"),
        (picture.chosen_measured, GREEN, "pick"),
    ):
        if place is not None:
            hollow: dict[str, Any] = {"markerfacecolor": "none", "markersize": 8, "markeredgewidth": 1.6}
            axes.plot(*place, "s", color=color, label=f"the {who}, measured", **hollow)
    if picture.default is not None:
        axes.plot(*picture.default, "*", color=VERMILION, markersize=14, markeredgecolor="white", label="the default")
    axes.plot(*picture.chosen, "D", color=GREEN, markersize=9, markeredgecolor="white", label="the pick")


def _draw_scatter(axes: Axes, rows: Sequence[Comparison]) -> None:
    axes.set_xlabel("measured")
    axes.set_ylabel("predicted")
    ends = [end for row in rows for end in (row.predicted, row.measured, row.low, row.high) if end > 0]
    if not ends:
        axes.text(0.5, 0.5, "nothing was both predicted and measured", transform=axes.transAxes, ha="center")
        return
    both = Axis(min(ends) / 1.5, max(ends) * 1.5, True)
    _set_axis(axes, "x", both, seconds)
    _set_axis(axes, "y", both, seconds)
    axes.plot([both.low, both.high], [both.low, both.high], color=GREY, linewidth=1)
    names = tuple(dict.fromkeys(row.name.split()[0] for row in rows))
    for who, marker, size in (("pick", "D", 6), ("default", "*", 10)):
        for name, color in zip(names, (BLUE, GREEN, ORANGE, VERMILION, GREY)):
            some = [row for row in rows if row.who == who and row.name.split()[0] == name]
            if some:
                xs, ys = [row.measured for row in some], [row.predicted for row in some]
                for row in some:
                    axes.plot([row.measured] * 2, [row.low, row.high], color=color, linewidth=1, alpha=0.6)
                look: dict[str, Any] = {"markersize": size, "markeredgecolor": "white", "label": f"{name}, {who}"}
                axes.plot(xs, ys, marker, color=color, **look)
    axes.legend(fontsize=7.5, frameon=False, loc="upper left")


def _set_axis(axes: Axes, which: str, axis: Axis, words: Any) -> None:
    low_high = (axis.low, axis.high)
    ticks = axis.ticks()
    if which == "x":
        axes.set_xscale("log" if axis.log else "linear")
        axes.set_xlim(*low_high)
        axes.set_xticks(ticks, [words(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
    else:
        axes.set_yscale("log" if axis.log else "linear")
        axes.set_ylim(*low_high)
        axes.set_yticks(ticks, [words(tick) for tick in ticks])
        axes.set_yticks([], minor=True)


def _figure(width_in: float, height_in: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise BadPlot("plot", str(path), "a name that ends in .png or .svg", "name it so")
    return suffix


def _save(figure: Figure, path: str | os.PathLike[str], suffix: str) -> None:
    undated = {"Date": None} if suffix == ".svg" else {"Software": "paretune"}
    with whole_file(path) as scratch:
        figure.savefig(scratch, format=suffix[1:], dpi=160, metadata=undated)
