"""The report as one HTML file that loads nothing from elsewhere: from one sentence down to every trial."""

from __future__ import annotations

import base64
import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .. import __version__
from ..optimizer.front import Evaluation
from ..traces.metrics import usd_per_month
from ..traces.whole_file import write_whole
from .changes import changes, diff, short, spec_yaml
from .chart import Axis, Chart, Place, chart
from .comparison import compared, side_by_side
from .report_data import ReportData, is_same
from .summary import (
    Option,
    cards,
    confidence,
    cost_unit,
    headline,
    money,
    money_range,
    not_tested,
    options,
    verified_sentence,
    wait_range,
    workload,
)
from .words import UNKNOWN, dollars, metric_words, seconds, share_of_requests, significant, times

TEMPLATES = Path(__file__).parent / "templates"

# The picture, in CSS pixels at full width.
WIDTH, HEIGHT = 960, 480
LEFT, RIGHT, TOP, BOTTOM = 84, 28, 24, 64

# Numbers on points closer than this would cover each other.
LABEL_APART = 22
# Room for "default" or "pick (12)" beside a mark.
NAME_WIDTH = 90


@dataclass(frozen=True)
class _Point:
    """A point of the front on the page. d: path of its shape; label: what a screen reader says."""

    number: int
    x: str
    y: str
    chosen: bool
    numbered: bool
    label: str


def write_report(data: ReportData, path: str | os.PathLike[str]) -> None:
    """Write the report, whole or not at all. Raises: OSError: the folder cannot be written, or the disk is full."""
    write_whole(path, html(data))


def html(data: ReportData) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (environment.get_template(name).render() for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src '{_source_hash(style)}'; script-src '{_source_hash(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    front, found = data.front, changes(data.default.deployment, data.chosen.deployment)
    chosen = _number(data)
    return environment.get_template("page.html.j2").render(
        policy=policy,
        version=__version__,
        data=data,
        headline=headline(data),
        verified=verified_sentence(data),
        cards=cards(data),
        chart=_picture(data, chart(data)),
        cost_unit=cost_unit(front.cost),
        options=tuple(_option_row(data, option) for option in options(front)),
        changes=found,
        diff=diff(found),
        comparison=side_by_side(compared(data)),
        workload=workload(data.statistics),
        confidence=confidence(data),
        not_tested=not_tested(data),
        front_rows=tuple(_front_row(data, i) for i in range(len(front.points))),
        trials=tuple(_trial_row(data, each) for each in front.evaluations),
        chosen=chosen,
        spec=spec_yaml(data.chosen.deployment),
        tile_gains=tuple(
            (gain.operator, gain.precision, gain.rows, *_gain(gain.default_s, gain.tuned_s), gain.tile)
            for gain in data.tile_gains
        ),
        wait_words=f"how long {share_of_requests(front.percentile)} wait at most for {metric_words(front.metric)}",
        targets=tuple(str(target) for target in data.targets),
    )


def _gain(default_s: float, tuned_s: float) -> tuple[str, str, str]:
    return seconds(default_s, 3), seconds(tuned_s, 3), times(default_s / tuned_s)


def _source_hash(text: str) -> str:
    """What a Content-Security-Policy names an inline source by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _number(data: ReportData) -> int:
    """The pick's place on the front, from 1; 0 where it is not on it."""
    places = (i for i, point in enumerate(data.front.points, start=1) if is_same(point, data.chosen))
    return next(places, 0)


def _picture(data: ReportData, picture: Chart) -> dict[str, Any]:
    """The chart in pixels, as the template draws it."""

    def pixel(place: Place) -> tuple[float, float]:
        x = LEFT + picture.x.share(place[0]) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - picture.y.share(place[1]) * (HEIGHT - TOP - BOTTOM)
        return x, y

    def at(place: Place | None) -> tuple[str, str] | None:
        return None if place is None else _text(pixel(place))

    def line(places: tuple[Place, ...]) -> str:
        return " ".join(",".join(_text(pixel(place))) for place in places)

    chosen = _number(data)
    points: list[_Point] = []
    last_numbered = (-LABEL_APART * 2.0, 0.0)
    for i, (place, point) in enumerate(zip(picture.front, data.front.points, strict=True), start=1):
        x, y = pixel(place)
        numbered = i == chosen or abs(x - last_numbered[0]) + abs(y - last_numbered[1]) >= LABEL_APART
        last_numbered = (x, y) if numbered else last_numbered
        wait = seconds(data.front.latency_s(point), 3)
        said = f"Option {i}: {wait}, {money(point, data.front.cost)}{'; the pick' if i == chosen else ''}"
        points.append(_Point(i, *_text((x, y)), i == chosen, numbered, said))
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "top": TOP,
        "right": WIDTH - RIGHT,
        "bottom": HEIGHT - BOTTOM,
        "x_ticks": _ticks(picture.x, seconds, lambda value: pixel((value, picture.y.low))[0]),
        "y_ticks": _ticks(picture.y, dollars, lambda value: pixel((picture.x.low, value))[1]),
        "x_log": picture.x.log,
        "y_log": picture.y.log,
        "line": line(picture.line),
        "band": line(picture.band),
        "others": [(mark.kind, *_text(pixel((mark.x, mark.y)))) for mark in picture.others],
        "left_out": picture.left_out,
        "points": points,
        # names stand to the right of their marks, but inside the picture and not on each other
        "chosen_left": pixel(picture.chosen)[0] > WIDTH - RIGHT - NAME_WIDTH,
        "default_left": picture.default is not None
        and (
            pixel(picture.default)[0] > WIDTH - RIGHT - NAME_WIDTH
            or math.dist(pixel(picture.default), pixel(picture.chosen)) < NAME_WIDTH
        ),
        "chosen": at(picture.chosen),
        "default": at(picture.default),
        "chosen_measured": at(picture.chosen_measured),
        "default_measured": at(picture.default_measured),
        "limit_x": None if picture.limit_s is None else _text(pixel((picture.limit_s, picture.y.low)))[0],
        "limit": None if picture.limit_s is None else seconds(picture.limit_s),
        "wait_words": f"{share_of_requests(data.front.percentile)} wait at most this long for "
        f"{metric_words(data.front.metric)}",
    }


def _text(place: tuple[float, float]) -> tuple[str, str]:
    return f"{place[0]:.1f}", f"{place[1]:.1f}"


def _ticks(axis: Axis, words: Any, pixel: Any) -> list[tuple[str, str]]:
    return [(f"{pixel(value):.1f}", words(value)) for value in axis.ticks()]


def _option_row(data: ReportData, option: Option) -> dict[str, Any]:
    point, front = option.evaluation, data.front
    return {
        "name": option.name,
        "number": option.number,
        "chosen": option.number == _number(data),
        "wait": seconds(front.latency_s(point)),
        "money": money(point, front.cost),
        "likely": ", ".join(filter(None, (wait_range(front, point), money_range(point, front.cost)))),
        "month": dollars(usd_per_month(point.usd_per_hour)),
        "settings": _settings(point),
    }


def _settings(evaluation: Evaluation) -> str:
    """The pools, and the load where it is not the recorded one."""
    load = [] if evaluation.load == 1 else [f"at {significant(evaluation.load, 3)} × the recorded rate"]
    return "; ".join([*(short(pool) for pool in evaluation.deployment.pools), *load])


def _front_row(data: ReportData, place: int) -> tuple[str, ...]:
    """Option, wait, its interval, cost, its interval, hardware a month, traffic carried, settings, differences."""
    point, front = data.front.points[place], data.front
    differences = "; ".join(
        f"{each.field} {each.before} → {each.after}" for each in changes(data.default.deployment, point.deployment)
    )
    return (
        str(place + 1),
        seconds(front.latency_s(point), 3),
        wait_range(front, point) or UNKNOWN,
        money(point, front.cost).partition(" ")[0],
        money_range(point, front.cost) or UNKNOWN,
        dollars(usd_per_month(point.usd_per_hour)),
        _carried(point),
        _settings(point),
        differences or "nothing",
    )


def _trial_row(data: ReportData, each: Evaluation) -> tuple[str, ...]:
    """Trial, how it is known, whether it holds the targets, settings, wait, cost, dollars a month, traffic carried."""
    front = data.front
    return (
        str(each.trial),
        each.fidelity,
        "yes" if each.feasible else each.reason or "no",
        _settings(each),
        seconds(front.latency_s(each), 3),
        dollars(each.cost(front.cost) if front.cost == "capacity" else usd_per_month(each.usd_per_hour)),
        dollars(usd_per_month(each.usd_per_hour)),
        _carried(each),
    )


def _carried(each: Evaluation) -> str:
    return f"{significant(each.capacity_rate, 3)}" if each.capacity_rate > 0 else UNKNOWN
