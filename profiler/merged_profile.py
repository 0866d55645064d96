"""Several profiles of one machine as one, so that it knows how the machine's speed moves over hours."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence

from .calibration import kind_of_step
from .profile import BadProfile, Configuration, LivePoint, OperatorPoint, Peaks, Profile, Serving


def merged(profiles: Sequence[Profile]) -> Profile:
    """Profiles of the same configurations as one.

    Steps of all of them stand side by side, so that what a fit leaves includes how far they lie apart; of peaks the
    best counts, of operators and of what serving adds the median. The spread of its steps grows by their distance.

    Raises: BadProfile: of different machines, models or configurations.
    """
    first = profiles[0]
    for other in profiles[1:]:
        mine, its = (
            (
                p.machine,
                p.shape,
                [(c.key, c.tiles) for c in p.configurations],
                [(s.cores, s.ranks, s.measured_on) for s in p.serving],
            )
            for p in (first, other)
        )
        if mine != its:
            todo = "merge profiles of one command on one machine"
            raise BadProfile("profiles to merge", "different machines, models or configurations", "the same", todo)
    return first.model_copy(
        update={
            "peaks": tuple(_best(same) for same in zip(*(p.peaks for p in profiles))),
            "configurations": tuple(_together(same) for same in zip(*(p.configurations for p in profiles))),
            "serving": tuple(_middle(same) for same in zip(*(p.serving for p in profiles))),
            "busy_before": max(p.busy_before for p in profiles),
        }
    )


def _best(same: Sequence[Peaks]) -> Peaks:
    reads: dict[int, float] = {}
    for size, rate in (pair for peaks in same for pair in peaks.read_bytes):
        reads[size] = max(rate, reads.get(size, 0.0))
    names = sorted({name for peaks in same for name in peaks.flops_per_s})
    flops = {name: max(peaks.flops_per_s.get(name, 0.0) for peaks in same) for name in names}
    return Peaks(num_threads=same[0].num_threads, flops_per_s=flops, read_bytes=tuple(sorted(reads.items())))


def _together(same: Sequence[Configuration]) -> Configuration:
    points: dict[str, list[OperatorPoint]] = {}
    for point in (point for each in same for point in each.operators):
        kind = json.dumps(point.model_dump(exclude={"median_s", "iqr_s", "count"}), sort_keys=True)
        points.setdefault(kind, []).append(point)
    operators = tuple(
        found[0].model_copy(
            update={
                "median_s": statistics.median(p.median_s for p in found),
                "iqr_s": max(p.iqr_s for p in found),
                "count": sum(p.count for p in found),
            }
        )
        for found in points.values()
    )
    steps = tuple(step for each in same for step in each.steps)
    disturbed = statistics.fmean(each.disturbed for each in same)
    return same[0].model_copy(update={"steps": steps, "operators": operators, "disturbed": disturbed})


def _middle(same: Sequence[Serving]) -> Serving:
    names = ("between_steps_s", "after_idle_s", "to_scheduler_s", "to_client_s")
    middle = {name: statistics.median(getattr(each, name) for each in same) for name in names}
    within = statistics.median(each.spread for each in same)
    counts = {name: sum(getattr(each, name) for each in same) for name in ("steps", "requests")}
    points = tuple(point for each in same for point in each.points)
    return same[0].model_copy(update={**middle, **counts, "points": points, "spread": math.hypot(_apart(same), within)})


def _apart(same: Sequence[Serving]) -> float:
    """Half the range of step times, relative, of the compositions that all of them have; 0 where there are none."""
    times = []
    for each in same:
        found: dict[tuple[int, ...], list[LivePoint]] = {}
        for point in each.points:
            found.setdefault(kind_of_step(point), []).append(point)
        times.append({kind: _count_and_mean_s(points) for kind, points in found.items()})
    common = set.intersection(*map(set, times))
    weight = {kind: sum(each[kind][0] for each in times) for kind in common}
    sums = [sum(weight[kind] * each[kind][1] for kind in common) for each in times]
    return (max(sums) - min(sums)) / 2 / statistics.median(sums) if common else 0.0


def _count_and_mean_s(points: Sequence[LivePoint]) -> tuple[int, float]:
    count = sum(point.count for point in points)
    return count, sum(point.count * point.mean_s for point in points) / count
