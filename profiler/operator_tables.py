"""Measured times of one operator over the axes of its shape, and lookup between and beyond the measured points.

A table keeps, for each measured point, the ratio of its time to the physical bound there, and interpolates that ratio:
linear in logarithms, so what takes constant time stays constant and what grows as a power keeps its power, while the
bound brings the shape between two points (the n² of attention, the corner of a roofline).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bound = Callable[[Floats], Floats]
"""(n, axes) coordinates -> (n,) the least seconds that physics allows there, > 0."""

_MOST_CELLS = 20_000_000


class BadTable(Exception):
    """A table of operator times that will not be used."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str) -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {str(self.found)[:80]}; allowed: {self.allowed}; {self.todo}"


@dataclass(frozen=True)
class Origin:
    """Where times were measured: device, engine (or library) and its version, and the file they were read from."""

    system: str
    engine: str
    version: str
    file: str

    def __str__(self) -> str:
        return f"{self.system}/{self.engine} {self.version}"


@dataclass(frozen=True, eq=False)
class OperatorTable:
    """Measured times of one operator with everything fixed but `axes`.

    operator  "gemm", "decode_attention", "all_reduce", …
    keys      what is fixed: {"dtype": "fp8", "num_kv_heads": 8}
    axes      names of the columns of `points`, such as ("m", "n", "k"); numbers >= 0
    points    (n, len(axes)) measured coordinates, each once, in any order
    seconds   (n,) measured times, none below bound_s(points)
    bound_s   the physical bound; it also gives the shape between points and beyond them

    Raises: BadTable: no point, a point twice, or a time below the bound.
    """

    operator: str
    keys: Mapping[str, object]
    axes: tuple[str, ...]
    points: Floats
    seconds: Floats
    bound_s: Bound
    origin: Origin

    def __post_init__(self) -> None:
        if self.points.shape != (len(self.seconds), len(self.axes)) or not len(self.seconds):
            raise BadTable(self._name, self.points.shape, f"(n > 0, {len(self.axes)}) points", "correct the importer")
        if len(np.unique(self.points, axis=0)) < len(self.points):
            raise BadTable(self._name, "a point more than once", "each once", "reduce repeated rows first")
        too_fast = np.flatnonzero(self.seconds < self.bound_s(self.points))
        if len(too_fast):
            found = f"{len(too_fast)} times below the bound, first at {self.points[too_fast[0]]}"
            raise BadTable(self._name, found, "times that physics allows", "refuse these rows first")

    @property
    def _name(self) -> str:
        return f"{self.origin.file}: {self.operator} {dict(self.keys)}"

    @cached_property
    def _grid(self) -> tuple[tuple[Floats, ...], Floats, NDArray[np.bool_]]:
        """Per axis its values in logarithms; on their grid the logarithm of time over bound, and what was measured.

        A cell that was not measured takes the mean of its neighbors, the nearest measured first.
        """
        values, places = zip(*(np.unique(column, return_inverse=True) for column in self.points.T), strict=True)
        shape = tuple(len(each) for each in values)
        if np.prod([float(n) for n in shape]) > _MOST_CELLS:
            raise BadTable(self._name, f"a grid of {shape}", f"{_MOST_CELLS} cells", "make an axis a key")
        ratio = np.full(shape, np.nan)
        ratio[places] = np.log(self.seconds / self.bound_s(self.points))
        measured = np.isfinite(ratio)
        while not np.isfinite(ratio).all():
            total, count = np.zeros(shape), np.zeros(shape)
            known = np.isfinite(ratio)
            for axis in range(len(shape)):
                for to, of in ((slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None))):
                    target = tuple(to if a == axis else slice(None) for a in range(len(shape)))
                    source = tuple(of if a == axis else slice(None) for a in range(len(shape)))
                    total[target] += np.where(known[source], ratio[source], 0.0)
                    count[target] += known[source]
            fill = ~known & (count > 0)
            ratio[fill] = total[fill] / count[fill]
        return tuple(_log(each) for each in values), ratio, measured

    def lookup(self, points: Floats) -> Floats:
        """Seconds at many points at once.

        Inside the measured range the ratio to the bound is interpolated; beyond its end the ratio of the edge holds, so
        time grows as the bound does; before its start the time of the edge holds, because small operators take what
        their launch takes. Never below the bound.

        Args:
            points: (n, len(axes)).
        Returns: (n,).
        """
        points = np.atleast_2d(np.asarray(points, np.float64))
        low, high = self.points.min(axis=0), self.points.max(axis=0)
        clipped = np.clip(points, low, high)
        at_edge = self.bound_s(clipped)
        here = self.bound_s(points)
        seconds = at_edge * np.exp(self._weighted(clipped, self._grid[1]))
        return np.asarray(np.maximum(seconds * np.maximum(1.0, here / at_edge), here), np.float64)

    def measured(self, points: Floats) -> NDArray[np.bool_]:
        """(n,) whether all points that a lookup interpolates between were measured, and none lies beyond them."""
        points = np.atleast_2d(np.asarray(points, np.float64))
        clipped = np.clip(points, self.points.min(axis=0), self.points.max(axis=0))
        inside = (clipped == points).all(axis=1)
        return np.asarray(inside & (self._weighted(clipped, self._grid[2].astype(np.float64)) > 1.0 - 1e-9), np.bool_)

    def _weighted(self, points: Floats, of: Floats) -> Floats:
        """Multilinear interpolation of a grid at points within its range."""
        axes = self._grid[0]
        places, shares = [], []
        for axis, column in zip(axes, points.T, strict=True):
            at = _log(column)
            place = np.clip(np.searchsorted(axis, at, side="right") - 1, 0, max(0, len(axis) - 2))
            nextone = np.minimum(place + 1, len(axis) - 1)
            width = np.where(nextone > place, axis[nextone] - axis[place], 1.0)
            places.append((place, nextone))
            shares.append(np.clip((at - axis[place]) / width, 0.0, 1.0))
        total = np.zeros(len(points))
        for corner in itertools.product((0, 1), repeat=len(axes)):
            share = np.ones(len(points))
            for side, each in zip(corner, shares, strict=True):
                share *= each if side else 1.0 - each
            total += share * of[tuple(place[side] for side, place in zip(corner, places, strict=True))]
        return total


def _log(values: Floats) -> Floats:
    """Logarithm to base 2 from 1 on, continued by a line below, so that 0 (no cached token, say) has a place."""
    return np.where(values >= 1.0, np.log2(np.maximum(values, 1.0)), values - 1.0)
