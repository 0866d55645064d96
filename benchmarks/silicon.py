"""Public silicon: TTFT and TPOT of measured serving points, predicted from operator tables of other people's GPUs.

    python benchmarks/silicon.py --mix-versions [--points FILE] [--tables FOLDER] [--pairs]

1. From operator tables alone: nothing is fitted; the host's share are constants published elsewhere.
2. Calibrated: residuals learned from every second point of each curve over concurrency, scored on the others; then the
   halves change places, so that each point is predicted once, by a fit that has not seen it.
3. Transfer: the host's share and residuals learned without B200, B200 predicted.

Bands are conformal: of (1) by points of other groups (GPU, engine, model, precision), of (2) and (3) by points left out
of the fit. Tables and points come from different versions of the engines (the versions are printed); comparing them
takes --mix-versions.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from silicon_points import Point, read_points
from silicon_ranking import pairs_at_equal_load, print_ranking, tau
from silicon_spread import Figure, print_spread, weighted_median, weighted_share

from bars import Bar, finish, needed_data
from paretune.profiler.closed_loop import Host
from paretune.profiler.importers import UNDERSTOOD, by_file, installed_folder, read_tables
from paretune.profiler.operator_tables import BadTable
from paretune.profiler.residuals import Alike, Features, conformal_quantile, learn, left_out_scores
from paretune.profiler.serving_point import PUBLISHED_HOST, ServingModel

Floats = NDArray[np.float64]
COVERAGE = 0.9

# Deviations of a residual by what points share (who measured; engine; GPU; model, precision and version; sharding;
# lengths), chosen for the order of magnitude of what engines and load generators differ by, not fitted.
ALIKE = {
    "TPOT": Alike((0.04, 0.06, 0.05, 0.06, 0.05, 0.05), length=2.5, noise=0.02),
    "TTFT": Alike((0.15, 0.10, 0.10, 0.15, 0.10, 0.20), length=2.5, noise=0.08),
}


class Scorer:
    """Predictions of all points under a host; tables are read once for each system and engine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models: dict[tuple[str, str], ServingModel] = {}

    def model(self, system: str, engine: str) -> ServingModel:
        if (system, engine) not in self.models:
            beside = []
            for other in ("trtllm", "vllm", "sglang"):
                if other != engine:
                    try:
                        beside.append(read_tables(self.folder, system, other))
                    except BadTable:
                        continue  # an engine that was not measured there
            self.models[system, engine] = ServingModel(read_tables(self.folder, system, engine), beside)
        return self.models[system, engine]

    def predict(self, points: Sequence[Point], host_of: Callable[[Point], Host]) -> tuple[Floats, Counter[str]]:
        """(n, 2) TTFT and TPOT in seconds, NaN where the tables do not reach, and why."""
        found = np.full((len(points), 2), np.nan)
        missing: Counter[str] = Counter()
        for place, point in enumerate(points):
            try:
                predicted = self.model(point.system, point.engine).predict(point.deployed, point.load, host_of(point))
            except BadTable as error:
                missing[f"{error.where}: {error.found}"] += 1
                continue
            found[place] = predicted.ttft_s, predicted.tpot_s
        return found, missing


def features(points: Sequence[Point]) -> Features:
    levels = [
        [p.origin for p in points],
        [f"{p.origin} {p.engine}" for p in points],
        [f"{p.engine} {p.system}" for p in points],
        [f"{p.engine} {p.system} {p.model} {p.precision} {p.version}" for p in points],
        [f"{(*p.group, p.deployed.expert_parallel, p.version)}" for p in points],
        [f"{p.curve}" for p in points],
    ]
    load = [[p.load.clients, p.load.input_tokens, p.load.output_tokens, p.deployed.ranks] for p in points]
    return Features(np.array(levels, dtype=object), np.log2(np.array(load, np.float64)))


def halves(points: Sequence[Point]) -> NDArray[np.bool_]:
    """True for every second point of each curve, by clients; curves begin with either half in turn."""
    first = np.zeros(len(points), np.bool_)
    curves = defaultdict(list)
    for place, point in enumerate(points):
        curves[point.curve].append(place)
    for number, curve in enumerate(curves.values()):
        for order, place in enumerate(sorted(curve, key=lambda i: points[i].load.clients)):
            first[place] = (order + number) % 2 == 0
    return first


def calibrated(
    metric: str, of: Features, residual: Floats, fitted: NDArray[np.bool_], groups: Sequence[object] = ()
) -> tuple[Floats, Floats]:
    """Residuals of the points not fitted, in logarithms: what is left of them, and the half width of their band.

    Args:
        groups: of all points, where those not fitted belong to others than those fitted; none where they lie among
            them. Bands come from errors of points predicted without their group, else without themselves.
    """
    inside = of.take(fitted)
    own = [group for group, in_it in zip(groups, fitted, strict=False) if in_it]
    learned = learn(inside, residual[fitted], ALIKE[metric], groups=own)
    mean, deviation = learned.at(of.take(~fitted))
    scores = left_out_scores(learned, own or range(int(fitted.sum())))
    return residual[~fitted] - mean, conformal_quantile(scores, COVERAGE) * deviation


def fit_host(scorer: Scorer, points: Sequence[Point], at_start: Floats) -> Host:
    """One host for all engines, from points: the least mean over groups of the median error of the logarithms, on a
    grid of multiples of the constants, along which times are taken as linear."""
    step = {
        "step_s": PUBLISHED_HOST._replace(step_s=PUBLISHED_HOST.step_s + 0.5e-3),
        "row_s": PUBLISHED_HOST._replace(row_s=PUBLISHED_HOST.row_s + 10e-6),
        "request_s": PUBLISHED_HOST._replace(request_s=PUBLISHED_HOST.request_s + 10e-3),
    }
    slopes = {name: scorer.predict(points, lambda _, host=host: host)[0] - at_start for name, host in step.items()}
    groups = [np.array([p.group == group for p in points]) for group in sorted({p.group for p in points})]
    ttft, tpot = (np.array([getattr(p, n) for p in points]) for n in ("ttft_s", "tpot_s"))

    def error(column: int, measured: Floats, steps: dict[str, float]) -> float:
        total = at_start[:, column] + sum(n * slopes[k][:, column] for k, n in steps.items())
        each = np.abs(np.log(np.maximum(total, 1e-6) / measured))
        return float(np.mean([np.median(each[group]) for group in groups]))

    _, steps, rows = min(
        (error(1, tpot, {"step_s": s, "row_s": r}), s, r)
        for s in np.arange(-1.0, 5.01, 0.25)
        for r in np.arange(0.0, 6.01, 0.25)
    )
    _, requests = min(
        (error(0, ttft, {"step_s": steps, "row_s": rows, "request_s": q}), q) for q in np.arange(-0.75, 6.01, 0.25)
    )
    return PUBLISHED_HOST._replace(
        step_s=max(0.0, PUBLISHED_HOST.step_s + 0.5e-3 * float(steps)),
        row_s=10e-6 * float(rows),
        request_s=PUBLISHED_HOST.request_s + 10e-3 * float(requests),
    )


def off(log_error: Floats) -> Floats:
    """Relative errors from logarithms of measured over predicted: |predicted - measured| / measured."""
    return np.asarray(np.abs(np.expm1(-log_error)))


def print_groups(points: Sequence[Point], columns: dict[str, Floats]) -> None:
    print(
        f"\n{'GPU':20}{'engine':8}{'model':34}{'precision':>10}{'TP':>4}{'n':>5}" + "".join(f"{c:>18}" for c in columns)
    )
    for group in sorted({p.group for p in points}):
        at = np.array([p.group == group for p in points])
        figures = "".join(f"{np.median(v[at]):18.1%}" for v in columns.values())
        print(f"{group[0]:20}{group[1]:8}{group[2]:34}{group[3]:>10}{group[4]:4d}{at.sum():5d}{figures}")


def figures(
    points: Sequence[Point], tpot_s: Floats, predicted_s: Floats, errors: dict[str, Floats], inside: dict[str, Floats]
) -> dict[str, tuple[Figure, float, bool]]:
    """The bars' figures as functions of the points' weights."""
    pairs = pairs_at_equal_load(points)
    targets = {"alone": (0.10, 0.30), "calibrated": (0.05, 0.15), "transfer": (0.15, 0.30)}
    found: dict[str, tuple[Figure, float, bool]] = {}
    for name, error in errors.items():
        of, metric = name.split()
        found[f"{name} median error"] = partial(weighted_median, error), targets[of][metric == "TTFT"], False
    found["tau"] = lambda w: tau(pairs, tpot_s, predicted_s, w[pairs.left] * w[pairs.right]), 0.9, True
    for name, each in inside.items():
        found[f"{name} coverage"] = partial(weighted_share, each), 0.85, True
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--points", type=Path, help="points with the columns of silicon_dev.csv")
    arguments.add_argument("--tables", help="folder of operator tables, or 'installed': aiconfigurator-core")
    arguments.add_argument("--mix-versions", action="store_true", help="compare points and tables of other versions")
    arguments.add_argument("--pairs", action="store_true", help="print the pairs of configurations in wrong order")
    arguments.add_argument("--data", type=Path)
    options = arguments.parse_args()
    started = time.perf_counter()
    path = options.points or needed_data("e2e", "aiconfigurator_silicon", "silicon_dev.csv")
    if options.tables == "installed":
        folder = installed_folder()
    else:
        folder = Path(options.tables) if options.tables else needed_data("ops", "aiconfigurator")
    points, left_out = read_points(path)
    scorer = Scorer(folder)

    print("versions: points | tables")
    known: dict[tuple[str, str], set[str]] = {}
    for system, engine in sorted({(p.system, p.engine) for p in points}):
        try:
            found = scorer.model(system, engine).tables.versions
        except BadTable as error:
            print(f"  {system} {engine}: {error}")
            continue
        versions = {stem: found[stem] for stem in UNDERSTOOD if stem in found}
        known[system, engine] = set(versions.values())
        own = Counter(p.version or "not stated" for p in points if (p.system, p.engine) == (system, engine))
        print(f"  {system} {engine}: {dict(own)} | {', '.join(f'{s} {v}' for s, v in versions.items())}")
    if not options.mix_versions:
        same = [p for p in points if p.version in known.get((p.system, p.engine), set())]
        left_out["engine version is not the tables' (--mix-versions takes it)"] += len(points) - len(same)
        points = same
    if not points:
        print("no point of the tables' versions: --mix-versions scores those of others too", file=sys.stderr)
        sys.exit(1)

    alone, missing = scorer.predict(points, lambda _: PUBLISHED_HOST)
    reached = np.isfinite(alone).all(axis=1)
    points = [p for p, ok in zip(points, reached) if ok]
    alone = alone[reached]
    for reason, count in (left_out + missing).items():
        print(f"left out: {count} points: {reason}")
    print(f"scored: {len(points)} points, each measurement once ({time.perf_counter() - started:.0f} s so far)")

    measured = {"TTFT": np.array([p.ttft_s for p in points]), "TPOT": np.array([p.tpot_s for p in points])}
    residual = {m: np.log(measured[m] / alone[:, i]) for i, m in enumerate(("TTFT", "TPOT"))}
    ranked, pairs = print_ranking(points, measured["TPOT"], alone[:, 1], options.pairs)
    of = features(points)
    bars = [
        Bar("tables_alone_tpot_median_error", float(np.median(off(residual["TPOT"]))), 0.10, False),
        Bar("tables_alone_kendall_tau", ranked if pairs else None, 0.9),
        Bar("tables_alone_ttft_median_error", float(np.median(off(residual["TTFT"]))), 0.30, False),
    ]
    columns = {f"alone {m}": off(residual[m]) for m in ("TPOT", "TTFT")}
    inside_band: dict[str, Floats] = {}
    widths: dict[str, float] = {}

    # bands of (1): of a group by the errors of all other groups
    for metric, error in residual.items():
        inside = np.full(len(points), np.nan)  # where there is no other group
        for group in {p.group[:4] for p in points}:
            out = np.array([p.group[:4] == group for p in points])
            if not out.all():
                inside[out] = np.abs(error[out]) <= conformal_quantile(np.abs(error[~out]), COVERAGE)
        inside_band[f"tables_alone_{metric.lower()}"] = inside

    half = halves(points)
    for metric, target in (("TPOT", 0.05), ("TTFT", 0.15)) if half.any() and not half.all() else ():
        error, width = np.zeros(len(points)), np.zeros(len(points))
        for fitted in (half, ~half):
            error[~fitted], width[~fitted] = calibrated(metric, of, residual[metric], fitted)
        columns[f"calibrated {metric}"] = off(error)
        inside_band[f"calibrated_{metric.lower()}"] = (np.abs(error) <= width).astype(np.float64)
        widths[f"calibrated_{metric.lower()}"] = float(np.median(width))
        bars.append(Bar(f"calibrated_{metric.lower()}_median_error", float(np.median(off(error))), target, False))

    new = np.array([p.system == "b200_sxm" for p in points])
    if new.any() and not new.all():
        old = [p for p, is_new in zip(points, new) if not is_new]
        host = fit_host(scorer, old, alone[~new])
        print("host without B200:", {k: round(1e3 * x, 3) for k, x in host._asdict().items()}, "ms")
        moved, _ = scorer.predict(points, lambda _: host)
        for column, metric, target in ((1, "TPOT", 0.15), (0, "TTFT", 0.30)):
            again = np.log(measured[metric] / moved[:, column])
            groups = [p.group[:4] for p in points]
            error, width = calibrated(metric, of, again, ~new, groups)
            columns[f"transfer {metric}"] = np.full(len(points), np.nan)
            columns[f"transfer {metric}"][new] = off(error)
            inside_band[f"transfer_{metric.lower()}"] = np.full(len(points), np.nan)
            inside_band[f"transfer_{metric.lower()}"][new] = np.abs(error) <= width
            widths[f"transfer_{metric.lower()}"] = float(np.median(width))
            bars.append(
                Bar(f"b200_transfer_{metric.lower()}_median_error", float(np.median(off(error))), target, False)
            )
    covered = {name: weighted_share(inside, np.ones(len(points))) for name, inside in inside_band.items()}
    for name, found in covered.items():
        share = None if math.isnan(found) else found
        bars += [Bar(f"{name}_band_coverage", share, 0.85), Bar(f"{name}_band_coverage_most", share, 0.95, False)]

    print_groups(points, columns)
    print("coverage of 90 % bands:", {k: round(v, 3) for k, v in covered.items()})
    spread = {m: float(np.quantile(np.abs(error), COVERAGE)) for m, error in residual.items()}
    print("tables alone, 90 % of errors in logarithms below:", {m: round(v, 3) for m, v in spread.items()})
    print("median half width, logarithms:", {k: round(v, 3) for k, v in widths.items()})
    findings = [f for m in scorer.models.values() for t in (m.tables, *m.beside) for f in t.findings]
    print("rows refused or flagged:", *(f"\n  {finding}" for finding in by_file(list(dict.fromkeys(findings)))))
    spread_of_bars = print_spread(points, figures(points, measured["TPOT"], alone[:, 1], columns, inside_band))
    print(f"{time.perf_counter() - started:.0f} s")
    details = {"points": len(points), "pairs": pairs, "coverage": covered, "half_widths": widths}
    # the record is of the public set that all can have
    known_set = options.points is None and options.tables is None and options.mix_versions
    finish(bars, details | {"spread_over_groups": spread_of_bars}, "silicon" if known_set else None)


if __name__ == "__main__":
    main()
