"""Predicted against measured on this machine's own runtime: latencies, their intervals, and the order of costs.

Twelve configurations serve two windows of the Azure conversation sample that ships with the package (lengths cut to a
fifth), 300 requests each, at half the load that the simulator says they carry (or so that a replay takes two minutes,
if that is more), and then at rates that bracket the highest one at which they hold the target; all of it three times.
Nothing is fitted to these replays: the profile and its calibration come from random prompts. The passes alternate
(profile, every configuration, again), so that the run-to-run spread holds what the machine does from one quarter of an
hour to the next, and an error counts only beyond that spread: of the ranking, where all passes agree. The capacity is
the median of the passes: a minute in which others slow the machine down decides all five replays of a bracket.

    python benchmarks/prediction_local.py            scores the recorded replays with the code as it is now: those of
                                                     every machine that has a folder in results/prediction_local
    python benchmarks/prediction_local.py --fresh    measures all of it again, in place of what a machine with the same
                                                     instructions measured before: an hour and more on two quiet cores;
                                                     what was measured is kept after every pass, --resume goes on from
                                                     there, --one-pass stops after the next one

Cost at the SLO is money per token; on one machine all configurations have the same price, so it falls with capacity.

What is served is the very trace that was simulated, so the intervals that are scored hold the error of the step times
alone. A study's are wider: they also hold what another hour of like traffic may bring; their coverage stands beside.
Covered is what one replay shows, each of the three: that is what somebody sees who verifies a prediction. The median of
three lies inside more often.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bars import RESULTS, Bar, finish, machine
from paretune.kernels.cpu.build import load
from paretune.optimizer.intervals import Band, predicted, sampled
from paretune.optimizer.live_capacity import bracket
from paretune.profiler.calibration import calibrate_serving
from paretune.profiler.live import live_server, warm_server
from paretune.profiler.machine import live_configurations
from paretune.profiler.measure import measure
from paretune.profiler.merged_profile import merged
from paretune.profiler.profile import Key, Profile
from paretune.profiler.replay import prompt_token_ids, replay
from paretune.profiler.simulator import simulate
from paretune.profiler.step_time import ModeledStep, scaled
from paretune.profiler.tables import step_tables
from paretune.runtime.model_shape import ModelShape, resolve_model
from paretune.runtime.spec import SMALL_MODEL, Deployment, Pool
from paretune.traces import Target, Trace, read, sample_path, scale, window
from paretune.traces.metrics import RequestTimes, meets, summarize
from paretune.traces.whole_file import write_whole

RECORDS = RESULTS / "prediction_local"  # a folder for each set of instructions, as a profile names them
RAW = Path("out/prediction_local")
TARGET = Target.parse("ttf30:p95<=400ms")
LENGTHS = 0.2
MAX_TOKENS = 1024
REQUESTS = 300
LOAD = 0.5  # of the predicted capacity; more where a replay would take longer than this
MOST_SECONDS = 120.0
PASSES = 3
CAPACITY_S, CAPACITY_RUNS = 12.0, 5
WINDOWS = ("first half", "second half")
# used by others: wait for 2 s so often, then measure all the same (the profile says how busy it was)
QUIET_PERCENT = 10.0
QUIET_TRIES = 30
LATENCIES = (("tpot", 50), ("tpot", 95), ("ttft", 50), ("ttft", 95), ("ttf30", 95), ("e2e", 50))
MEDIAN_ERROR, P90_ERROR, TAU, CONFIDENCE = 0.05, 0.12, 0.9, 0.9
RESAMPLES = 2000
RANKED = "Kendall tau of cost at the SLO, beyond the spread"

# (ranks, threads of a rank, weights, max_num_seqs, max_num_batched_tokens)
Candidate = tuple[int, int, str, int, int]
CANDIDATES: tuple[Candidate, ...] = (
    (1, 1, "fp32", 32, 1024),
    (1, 1, "bf16", 32, 1024),
    (1, 1, "int8", 32, 1024),
    (1, 1, "int4", 32, 1024),
    (1, 2, "fp32", 32, 1024),
    (1, 2, "bf16", 32, 1024),
    (1, 2, "int8", 32, 1024),
    (1, 2, "int4", 32, 1024),
    (2, 1, "bf16", 32, 1024),
    (1, 1, "fp32", 4, 1024),
    (1, 2, "int8", 4, 1024),
    (1, 2, "bf16", 16, 128),
)


def deployment(candidate: Candidate) -> Deployment:
    ranks, threads, weights, seqs, tokens = candidate
    pool = Pool(
        tensor_parallel_size=ranks,
        num_threads=threads,
        weight_dtype=weights,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_model_len=MAX_TOKENS,
        num_kv_blocks=2048,
        enable_prefix_caching=False,
    )
    return Deployment(model=SMALL_MODEL, pools=(pool,))


def windows() -> dict[str, Trace]:
    """The two halves of the sample, by name."""
    whole = scale(read(sample_path()), input_length=LENGTHS, output_length=LENGTHS, max_tokens=MAX_TOKENS)
    middle = whole.duration_s / 2
    return dict(zip(WINDOWS, (window(whole, 0.0, middle), window(whole, middle, whole.duration_s + 1.0))))


def replayed_part(trace: Trace) -> Trace:
    return trace.select(slice(0, REQUESTS))


def name(metric: str, percentile: int) -> str:
    return f"{metric} p{percentile}"


def latencies(times: RequestTimes) -> dict[str, float]:
    summary = summarize(times)
    return {name(metric, p): summary.value(metric, p) for metric, p in LATENCIES}


def holds(times: RequestTimes) -> bool:
    return meets(times, TARGET, None)


def arriving(trace: Trace, rate: float, seconds: float) -> Trace:
    """What arrives in so many seconds at a multiple of the recorded rate."""
    return window(trace, 0.0, min(seconds * rate, trace.duration_s + 1.0))


# --- what is recorded ---


def record_of(folder: Path) -> Path:
    return folder / "record.json"


def profile_of(folder: Path, number: int | None = None) -> Path:
    """The profile merged from all passes, or that of one pass, from 1 on."""
    return folder / ("profile.json" if number is None else f"profile_{number}.json")


def my_folder() -> Path:
    library = load()
    return RECORDS / ("torch" if library is None else library.instructions).replace(" ", "_")


def why_not_scored(folder: Path, traces: dict[str, Trace]) -> str:
    kept = json.loads(record_of(folder).read_text())
    if len(kept["passes"]) < PASSES:
        return f"{len(kept['passes'])} of {PASSES} passes are recorded: --resume goes on; nothing is scored before"
    if profile_of(folder, PASSES).exists():
        return "the passes are recorded, but their profiles are not merged: --resume does that"
    if not profile_of(folder).exists() or kept["trace"] != {key: trace.digest() for key, trace in traces.items()}:
        return "the sample trace or the record's form has changed since: run with --fresh (over an hour, undisturbed)"
    return ""


# --- measuring ---


def profiled() -> Profile:
    for _ in range(QUIET_TRIES):
        if psutil.cpu_percent(interval=2.0) < QUIET_PERCENT:
            break
        print("waiting until the machine is quiet ...", file=sys.stderr)
    keys = tuple(dict.fromkeys(Key(ranks, threads, 1, weights, "bf16") for ranks, threads, weights, *_ in CANDIDATES))
    profile = measure(
        SMALL_MODEL,
        keys,
        seconds_per_configuration=5.0,
        max_model_len=MAX_TOKENS,
        progress=lambda what, share: print(f"  {share:.0%} {what}", file=sys.stderr),
        command=" ".join(["benchmarks/prediction_local.py", *sys.argv[1:]]),
    )
    for number, key in enumerate(live := live_configurations(keys)):
        print(f"  live server {number + 1} of {len(live)}, {key}", file=sys.stderr)
        candidate = (key.tensor_parallel_size, key.num_threads, key.weight_dtype, 32, 1024)
        profile = calibrate_serving(profile, deployment(candidate))
    return profile


def record(resume: bool, passes: int) -> None:
    """Measure so many more passes; what is done is on disk after each."""
    traces, begin, folder = windows(), time.monotonic(), my_folder()
    folder.mkdir(parents=True, exist_ok=True)
    digests = {key: trace.digest() for key, trace in traces.items()}
    kept: dict[str, Any] = {"trace": digests, "passes": [], "capacities": {}, "loads": {}}
    profiles: list[Profile] = []
    if resume and not profile_of(folder).exists() and record_of(folder).exists():
        kept = json.loads(record_of(folder).read_text())
        profiles = [Profile.load(profile_of(folder, number + 1)) for number in range(len(kept["passes"]))]
    elif resume:
        print("there is nothing to go on with: run with --fresh", file=sys.stderr)
        return
    else:  # what is there is not of these passes
        for path in (record_of(folder), profile_of(folder)):
            path.unlink(missing_ok=True)
    while len(kept["passes"]) < PASSES and passes > 0:
        passes -= 1
        profiles = [*profiles[: len(kept["passes"])], profiled()]
        profiles[-1].save(profile_of(folder, len(profiles)))
        if not kept["loads"]:  # of the first profile, and then the same in every pass
            least = max(replayed_part(trace).duration_s for trace in traces.values()) / MOST_SECONDS
            for each in CANDIDATES:
                rate = predicted_capacity(model_of(profiles[0], each), traces[WINDOWS[0]], each, 1.0, 12)
                kept["loads"][json.dumps(each)] = max(LOAD * rate, least)
                kept["capacities"][json.dumps(each)] = rate
        rows = []
        RAW.mkdir(parents=True, exist_ok=True)
        for i, each in enumerate(CANDIDATES):
            raw = RAW / f"pass{len(profiles)}_candidate{i}"
            load, guess = kept["loads"][json.dumps(each)], kept["capacities"][json.dumps(each)]
            rows.append({"candidate": each, **replayed(each, traces, load, guess, raw)})
            print(f"{time.monotonic() - begin:5.0f} s {json.dumps(rows[-1])}", file=sys.stderr)
        kept["passes"].append({"machine": machine(), "rows": rows})
        write_whole(record_of(folder), json.dumps(kept, indent=1) + "\n")
    if len(kept["passes"]) < PASSES:
        return
    merged(profiles).save(profile_of(folder))
    for number in range(len(profiles)):
        profile_of(folder, number + 1).unlink()


def replayed(candidate: Candidate, traces: dict[str, Trace], rate: float, guess: float, raw: Path) -> dict[str, Any]:
    """Latencies by window, and near a guess of the capacity whether the target was held, by rate; steps and requests go
    to files that begin as `raw`.

    They are for whoever wants to know where an error comes from, and are not committed.
    """
    asked = deployment(candidate)
    token_ids = prompt_token_ids(resolve_model(asked.model))
    held: dict[str, bool] = {}
    with live_server(asked, step_log=raw.with_suffix(".steps.jsonl")) as server:
        warm_server(server, traces[WINDOWS[0]], token_ids)

        def times(piece: Trace, rate: float) -> RequestTimes:
            return replay(piece, server.url, rate=rate, model=server.model, token_ids=token_ids).times

        found = {}
        for key, trace in traces.items():
            served = replay(replayed_part(trace), server.url, rate=rate, model=server.model, token_ids=token_ids)
            found[key] = latencies(served.times)
            times_of = {name: value for name, value in vars(served.times).items() if isinstance(value, np.ndarray)}
            np.savez(f"{raw}.{key.replace(' ', '_')}.npz", started_s=served.started_s, **times_of)
        trace = traces[WINDOWS[0]]

        def asks(rate: float) -> bool:
            held[repr(rate)] = holds(times(arriving(trace, rate, CAPACITY_S), rate))
            return held[repr(rate)]

        bracket(asks, guess=guess, runs=CAPACITY_RUNS)
    return {"latencies": found, "held": held}


# --- predicting ---


def model_of(profile: Profile, candidate: Candidate) -> ModeledStep:
    asked = deployment(candidate)
    return step_tables(profile, ModelShape.load(resolve_model(asked.model)), asked.pool)


def predicted_capacity(model: ModeledStep, trace: Trace, candidate: Candidate, start: float, runs: int) -> float:
    """By the protocol of the measurement, with the simulator in the server's place."""
    pool = deployment(candidate).pool
    found = bracket(
        lambda rate: holds(simulate(arriving(trace, rate, CAPACITY_S), pool, model.tables, rate=rate).times),
        guess=start,
        runs=runs,
    )
    return found.rate


def predicted_latencies(
    model: ModeledStep, trace: Trace, candidate: Candidate, rate: float
) -> tuple[dict[str, float], dict[str, Band], dict[str, Band]]:
    """Values; their 90 % intervals for this very trace; and a study's (optimizer/evaluate.py: refine)."""
    piece, pool = replayed_part(trace), deployment(candidate).pool

    def run(factor: float) -> RequestTimes:
        return simulate(piece, pool, scaled(model.tables, factor), rate=rate).times

    central = run(1.0)
    ends = [
        {f"{metric}:{p}": value for metric, by in summarize(run(factor)).values.items() for p, value in by.items()}
        for factor in (1 - model.relative_error, 1 + model.relative_error)
    ]
    found = sampled(central, piece, (), np.random.default_rng(0))
    flat = [{key: each[key] for key in found} for each in ends]
    same_trace = predicted({key: (value, (value, value)) for key, (value, _) in found.items()}, *flat)
    studies = predicted(found, *flat)
    of_this, of_study = (
        {name(metric, p): bands[f"{metric}:p{p}"] for metric, p in LATENCIES} for bands in (same_trace, studies)
    )
    return latencies(central), of_this, of_study


# --- scoring ---


def measured_capacity(held: dict[str, bool]) -> tuple[float, float]:
    """(highest rate that held below the lowest that failed, that lowest)."""
    high = min((float(rate) for rate, ok in held.items() if not ok), default=float("inf"))
    return max((float(rate) for rate, ok in held.items() if ok and float(rate) < high), default=0.0), high


def middle(low: float, high: float) -> float:
    if low == 0.0:
        return high
    return low if high == float("inf") else float(np.sqrt(low * high))


def kendall_tau(first: Sequence[float], second: Sequence[float], pairs: Sequence[tuple[int, int]]) -> float:
    """Kendall's tau-a: concordant less discordant pairs, over all of `pairs` (ties count as neither)."""
    signs = [np.sign(first[i] - first[j]) * np.sign(second[i] - second[j]) for i, j in pairs]
    return float(sum(signs) / len(pairs))


def report_of_ranking(predicted: Sequence[float], measured: Sequence[Sequence[float]]) -> tuple[float, dict[str, Any]]:
    """Kendall's tau over the pairs that the machine itself tells apart (all passes order them alike), as errors count
    beyond the spread; and what stands beside it.

    Args:
        measured: capacities by pass.
    """
    medians = [statistics.median(each) for each in zip(*measured)]
    pairs = list(itertools.combinations(range(len(predicted)), 2))
    told = [(i, j) for i, j in pairs if len({np.sign(each[i] - each[j]) for each in measured}) == 1]
    tau = kendall_tau(predicted, medians, told) if told else 0.0
    beside = {
        "pairs": len(pairs),
        "pairs_that_all_passes_order_alike": len(told),
        "tau_of_all_pairs": kendall_tau(predicted, medians, pairs),
        "tau_from_pass_to_pass": [kendall_tau(*both, pairs) for both in itertools.combinations(measured, 2)],
    }
    passes = ", ".join(f"{each:.2f}" for each in beside["tau_from_pass_to_pass"])
    print(
        f"Kendall tau {tau:.2f} over the {len(told)} of {len(pairs)} pairs of configurations that all passes order "
        f"alike; over all pairs {beside['tau_of_all_pairs']:.2f}, from pass to pass {passes}",
        file=sys.stderr,
    )
    return tau, beside


def coverage(inside: Sequence[Sequence[bool]]) -> tuple[float, float, float]:
    """(share, low, high): of intervals that hold a measured value; 90 % by drawing rows anew, each all values of one
    configuration and window."""
    rows = np.array([[statistics.fmean(row), len(row)] for row in inside])
    rng = np.random.default_rng(0)
    drawn = rows[rng.integers(0, len(rows), (RESAMPLES, len(rows)))]
    shares = (drawn[..., 0] * drawn[..., 1]).sum(1) / drawn[..., 1].sum(1)
    low, high = np.quantile(shares, (0.05, 0.95))
    return float((rows[:, 0] * rows[:, 1]).sum() / rows[:, 1].sum()), float(low), float(high)


def score(folder: Path, traces: dict[str, Trace]) -> tuple[list[Bar], dict[str, Any]]:
    """The bars of one machine's replays, and what they were taken of."""
    kept, profile = json.loads(record_of(folder).read_text()), Profile.load(profile_of(folder), any_machine=True)
    where = folder.name.replace("_", " ")
    print(f"--- {where}: {kept['passes'][0]['machine']['cpu']}", file=sys.stderr)
    raw: dict[str, list[float]] = {name(*each): [] for each in LATENCIES}
    beyond: dict[str, list[float]] = {key: [] for key in raw}
    spreads: dict[str, list[float]] = {key: [] for key in raw}
    inside: list[list[bool]] = []
    in_study: list[bool] = []
    rows = []
    capacities: list[float] = []
    held: list[list[float]] = []
    passes = [{json.dumps(row["candidate"]): row for row in each["rows"]} for each in kept["passes"]]
    for candidate in CANDIDATES:
        key = json.dumps(candidate)
        model, rate = model_of(profile, candidate), kept["loads"][key]
        for part, trace in traces.items():
            values, bands, wider = predicted_latencies(model, trace, candidate, rate)
            inside.append([])
            for metric in raw:
                runs = [each[key]["latencies"][part][metric] for each in passes]
                truth = statistics.median(runs)
                noise = max(abs(run - truth) for run in runs)
                raw[metric].append(abs(values[metric] - truth) / truth)
                beyond[metric].append(max(0.0, abs(values[metric] - truth) - noise) / truth)
                spreads[metric].append(noise / truth)
                inside[-1] += [bands[metric][0] <= run <= bands[metric][1] for run in runs]
                in_study += [wider[metric][0] <= run <= wider[metric][1] for run in runs]
                rows.append([candidate, part, metric, values[metric], runs, bands[metric]])
        brackets = [measured_capacity(each[key]["held"]) for each in passes]
        if any(low == 0.0 for low, _ in brackets):
            print(f"{candidate}: at no rate that was asked the target was held", file=sys.stderr)
        capacities.append(predicted_capacity(model, traces[WINDOWS[0]], candidate, 2 * rate, 12))
        held.append([middle(*each) for each in brackets])
        said = ", ".join(f"{low:.2f} to {high:.2f}" for low, high in brackets)
        ours, its = capacities[-1], statistics.median(held[-1])
        print(f"{candidate}: capacity predicted {ours:.2f}, measured {its:.2f} ({said})", file=sys.stderr)
    share, low, high = coverage(inside)
    bars = []
    for metric in raw:
        print(
            f"{metric}: error median {statistics.median(raw[metric]):.1%}, p90 {np.quantile(raw[metric], 0.9):.1%};"
            f" run to run {statistics.median(spreads[metric]):.1%};"
            f" beyond it {statistics.median(beyond[metric]):.1%}, p90 {np.quantile(beyond[metric], 0.9):.1%}",
            file=sys.stderr,
        )
        error = statistics.median(beyond[metric])
        bars.append(Bar(f"{where}: {metric}: median error beyond the spread", error, MEDIAN_ERROR, at_least=False))
        error = float(np.quantile(beyond[metric], 0.9))
        bars.append(Bar(f"{where}: {metric}: p90 error beyond the spread", error, P90_ERROR, at_least=False))
    print(
        f"coverage of 90 % intervals: {share:.1%} ({low:.1%} to {high:.1%}), of a study's for like traffic "
        f"{statistics.fmean(in_study):.1%}",
        file=sys.stderr,
    )
    tau, ranking = report_of_ranking(capacities, list(zip(*held)))
    covered = f"{where}: coverage of 90 % intervals"
    bars.append(Bar(f"{covered}, upper end of its own interval", high, CONFIDENCE))
    bars.append(Bar(f"{covered}, lower end of its own interval", low, CONFIDENCE, at_least=False))
    bars.append(Bar(f"{where}: {RANKED}", tau, TAU))
    details = {
        "measured_on": {"replays": [each["machine"] for each in kept["passes"]], "profile": profile.created_at},
        "errors": raw,
        "errors_beyond_spread": beyond,
        "run_to_run_spread": spreads,
        "coverage": [share, low, high],
        "coverage_of_study_intervals": statistics.fmean(in_study),
        "capacities": list(zip(map(json.dumps, CANDIDATES), capacities, held)),
        "ranking": ranking,
        "rows": rows,
    }
    return bars, details


def main() -> int:
    if "--fresh" in sys.argv or "--resume" in sys.argv:
        record("--resume" in sys.argv, 1 if "--one-pass" in sys.argv else PASSES)
    traces = windows()
    bars: list[Bar] = []
    details: dict[str, Any] = {}
    for folder in sorted(path.parent for path in RECORDS.glob("*/record.json")):
        if why := why_not_scored(folder, traces):
            print(f"{folder.name}: {why}", file=sys.stderr)
            continue
        more, details[folder.name] = score(folder, traces)
        bars += more
    if not bars:
        print("nothing to score: run with --fresh (over an hour, undisturbed)", file=sys.stderr)
        finish([Bar(RANKED, None, TAU)], {})
        return 1
    finish(bars, details, "prediction_local")
    measuring = "--fresh" in sys.argv or "--resume" in sys.argv
    return 1 if measuring and my_folder().name not in details else 0


if __name__ == "__main__":
    sys.exit(main())
