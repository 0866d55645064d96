"""Predicted against measured on this machine's own runtime: latencies of each candidate, and the order of capacities.

--fresh profiles this machine, serves every candidate and replays a window of the Azure conversation trace (the sample
that ships with the package, lengths cut down) at one common rate and at rates that bracket its capacity; it records all
of it in results/. Without --fresh the recorded replays are scored with the profile that was recorded with them, by the
code as it is now. --profile measures only the profile again, where the recorded one was taken on a busy machine (its
`busy_before` says so), and keeps the replays; --latencies measures only the replays at the common rate again (about 6
minutes), for a profile that was taken at another hour of a shared machine.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bars import RESULTS, Bar, finish, machine
from paretune.optimizer.live_capacity import bracket
from paretune.profiler.calibration import calibrate_serving
from paretune.profiler.live import live_server, warm_server
from paretune.profiler.measure import measure
from paretune.profiler.profile import Key, Profile
from paretune.profiler.replay import prompt_token_ids, replay
from paretune.profiler.simulator import simulate
from paretune.profiler.tables import step_tables
from paretune.runtime.model_shape import ModelShape, resolve_model
from paretune.runtime.spec import SMALL_MODEL, Deployment, Pool
from paretune.traces import Target, Trace, read, sample_path, scale, window
from paretune.traces.metrics import RequestTimes, meets, summarize
from paretune.traces.whole_file import write_whole

RECORD = RESULTS / "prediction_local_record.json"
PROFILE = RESULTS / "prediction_local_profile.json"
TARGET = Target.parse("ttf30:p95<=400ms")
LENGTHS = 0.2
MAX_TOKENS = 1024
# a replay lasts so long whatever its rate: the faster it is, the more of the trace it takes
REPLAY_S = 15.0
COMMON_S = 25.0
CAPACITY_RUNS = 5
# used by others: wait for 2 s so often, then measure all the same (the profile says how busy it was)
QUIET_PERCENT = 10.0
QUIET_TRIES = 30
LATENCIES = (("tpot", 50), ("ttft", 50), ("e2e", 50), ("ttf30", 95), ("tpot", 95), ("ttft", 95))
JUDGED = (("tpot", 50), ("ttft", 50), ("e2e", 50))

# (ranks, threads of a rank, weights, max_num_seqs): what moves capacity on two cores
CANDIDATES = (
    (1, 1, "fp32", 32),
    (1, 1, "bf16", 32),
    (1, 1, "int8", 32),
    (1, 2, "fp32", 32),
    (1, 2, "bf16", 32),
    (1, 2, "int8", 32),
    (1, 1, "fp32", 4),
    (1, 1, "int8", 2),
    (1, 2, "int8", 4),
)


@dataclass(frozen=True)
class Measured:
    """A candidate's replays: latencies at the common rate, and whether the target held at each rate that was asked."""

    latencies: dict[str, float]
    held: dict[str, bool]


def deployment(candidate: tuple[int, int, str, int]) -> Deployment:
    ranks, threads, weights, seqs = candidate
    pool = Pool(
        tensor_parallel_size=ranks,
        num_threads=threads,
        weight_dtype=weights,
        max_num_seqs=seqs,
        max_num_batched_tokens=1024,
        max_model_len=MAX_TOKENS,
        num_kv_blocks=2048,
        enable_prefix_caching=False,
    )
    return Deployment(model=SMALL_MODEL, pools=(pool,))


def whole_trace() -> Trace:
    return scale(read(sample_path()), input_length=LENGTHS, output_length=LENGTHS, max_tokens=MAX_TOKENS)


def part(trace: Trace, rate: float, seconds: float) -> Trace:
    """What arrives in so many seconds at a multiple of the recorded rate."""
    return window(trace, 0.0, min(seconds * rate, trace.duration_s + 1.0))


def name(metric: str, percentile: int) -> str:
    return f"{metric} p{percentile}"


def latencies(times: RequestTimes) -> dict[str, float]:
    summary = summarize(times)
    return {name(metric, p): summary.value(metric, p) for metric, p in LATENCIES}


def holds(times: RequestTimes) -> bool:
    return meets(times, TARGET, None)


def configurations() -> tuple[Key, ...]:
    """What the candidates run as."""
    return tuple(dict.fromkeys(Key(ranks, threads, 1, weights, "bf16") for ranks, threads, weights, _ in CANDIDATES))


def profiled(keys: tuple[Key, ...]) -> Profile:
    for _ in range(QUIET_TRIES):
        if psutil.cpu_percent(interval=2.0) < QUIET_PERCENT:
            break
        print("waiting until the machine is quiet ...", file=sys.stderr)
    print("profiling ...", file=sys.stderr)
    profile = measure(
        SMALL_MODEL,
        keys,
        seconds_per_configuration=6.0,
        max_model_len=MAX_TOKENS,
        progress=lambda what, share: print(f"  {share:.0%} {what}", file=sys.stderr),
        command=" ".join(["benchmarks/prediction_local.py", *sys.argv[1:]]),
    )
    for threads in (1, 2):
        profile = calibrate_serving(profile, deployment((1, threads, "bf16", 32)))
    return profile


def record() -> None:
    """Measure everything afresh and keep it."""
    begin = time.monotonic()
    profile = profiled(configurations())
    profile.save(PROFILE)
    trace = whole_trace()
    predicted = [predicted_capacity(profile, trace, deployment(each), 1.0, 12) for each in CANDIDATES]
    common = 0.5 * min(predicted)
    # one starting point for all, so that where the search ends says nothing of what was predicted
    start = statistics.geometric_mean(predicted)
    rows = []
    for candidate in CANDIDATES:
        found = measured(trace, deployment(candidate), common, start)
        rows.append({"candidate": list(candidate), "latencies": found.latencies, "held": found.held})
        print(f"{time.monotonic() - begin:5.0f} s {candidate} {found}", file=sys.stderr)
    whole = {"machine": machine(), "common_rate": common, "start_rate": start, "trace": trace.digest(), "rows": rows}
    write_whole(RECORD, json.dumps(whole, indent=1) + "\n")


def record_latencies() -> None:
    """Measure the latencies at the common rate again; capacities stay as recorded."""
    kept = json.loads(RECORD.read_text())
    trace, rate = whole_trace(), kept["common_rate"]
    for row in kept["rows"]:
        asked = deployment(tuple(row["candidate"]))
        token_ids = prompt_token_ids(resolve_model(asked.model))
        with live_server(asked) as server:
            warm_server(server, trace, token_ids)
            piece = part(trace, rate, COMMON_S)
            found = replay(piece, server.url, rate=rate, model=server.model, token_ids=token_ids)
        row["latencies"] = latencies(found.times)
        print(row["candidate"], row["latencies"], file=sys.stderr)
    kept["latencies_measured_on"] = machine()
    write_whole(RECORD, json.dumps(kept, indent=1) + "\n")


def measured(trace: Trace, asked: Deployment, common: float, start: float) -> Measured:
    token_ids = prompt_token_ids(resolve_model(asked.model))
    held: dict[str, bool] = {}
    with live_server(asked) as server:
        warm_server(server, trace, token_ids)

        def times(rate: float, seconds: float) -> RequestTimes:
            piece = part(trace, rate, seconds)
            return replay(piece, server.url, rate=rate, model=server.model, token_ids=token_ids).times

        at_common = latencies(times(common, COMMON_S))

        def asks(rate: float) -> bool:
            held[repr(rate)] = holds(times(rate, REPLAY_S))
            return held[repr(rate)]

        bracket(asks, guess=start, runs=CAPACITY_RUNS)
    return Measured(at_common, held)


def tables_of(profile: Profile, asked: Deployment) -> Any:
    return step_tables(profile, ModelShape.load(resolve_model(asked.model)), asked.pool).tables


def predicted_capacity(profile: Profile, trace: Trace, asked: Deployment, start: float, runs: int) -> float:
    """By the protocol of the measurement, with the simulator in the server's place."""
    tables = tables_of(profile, asked)
    found = bracket(
        lambda rate: holds(simulate(part(trace, rate, REPLAY_S), asked.pool, tables, rate=rate).times),
        guess=start,
        runs=runs,
    )
    return found.rate


def measured_capacity(row: dict[str, Any]) -> float:
    """Middle of the bracket that the replays of a record left."""
    held = {float(rate): ok for rate, ok in row["held"].items()}
    high = min((rate for rate, ok in held.items() if not ok), default=float("inf"))
    low = max((rate for rate, ok in held.items() if ok and rate < high), default=0.0)
    if low == 0.0:
        return high
    return low if high == float("inf") else float(np.sqrt(low * high))


def kendall_tau(first: list[float], second: list[float]) -> float:
    """Kendall's tau-a: concordant less discordant pairs, over all pairs (ties count as neither)."""
    pairs = list(itertools.combinations(range(len(first)), 2))
    signs = [np.sign(first[i] - first[j]) * np.sign(second[i] - second[j]) for i, j in pairs]
    return float(sum(signs) / len(pairs))


def measured_on(kept: dict[str, Any], profile: Profile) -> dict[str, Any]:
    """Where and when each of the three parts of a score was measured: they need not be of one run."""
    return {
        "capacities": kept["machine"],
        "latencies": kept.get("latencies_measured_on", kept["machine"]),
        "profile": {
            "date": profile.created_at,
            "command": profile.command,
            "cpu": profile.machine.cpu,
            "cores": profile.machine.cores,
            "busy_before": profile.busy_before,
            "digest": profile.digest(),
        },
    }


def bars_of(medians: dict[str, float], tau: float | None, candidates: int) -> list[Bar]:
    """What is asked, beside what was found; where nothing was, without a value."""
    errors = [
        Bar(f"median relative error, {name(metric, p)}", medians.get(name(metric, p)), 0.15, at_least=False)
        for metric, p in JUDGED
    ]
    return [*errors, Bar(f"Kendall tau of capacity, {candidates} candidates", tau, 0.6)]


def without_record(why: str) -> int:
    print(f"{why}: run with --fresh (about 20 minutes on a quiet machine)", file=sys.stderr)
    finish(bars_of({}, None, len(CANDIDATES)), {})
    return 1


def main() -> int:
    if "--fresh" in sys.argv:
        record()
    elif "--profile" in sys.argv:
        profiled(configurations()).save(PROFILE)
    elif "--latencies" in sys.argv:
        record_latencies()
    if not (RECORD.exists() and PROFILE.exists()):
        return without_record("nothing is recorded yet")
    kept = json.loads(Path(RECORD).read_text())
    profile = Profile.load(PROFILE, any_machine=True)
    trace = whole_trace()
    if trace.digest() != kept["trace"]:
        return without_record("the sample trace has changed since the replays were recorded")
    errors: dict[str, list[float]] = {name(metric, p): [] for metric, p in LATENCIES}
    capacities: tuple[list[float], list[float]] = ([], [])
    rows = []
    for row in kept["rows"]:
        asked = deployment(tuple(row["candidate"]))
        rate = kept["common_rate"]
        run = simulate(part(trace, rate, COMMON_S), asked.pool, tables_of(profile, asked), rate=rate)
        predicted = latencies(run.times)
        for metric, value in row["latencies"].items():
            errors[metric].append(abs(predicted[metric] / value - 1))
        capacities[0].append(predicted_capacity(profile, trace, asked, kept["start_rate"], 12))
        capacities[1].append(measured_capacity(row))
        both = {
            metric: [round(predicted[metric] * 1e3, 2), round(row["latencies"][metric] * 1e3, 2)] for metric in errors
        }
        rows.append(
            {
                "candidate": row["candidate"],
                "predicted_and_measured_ms": both,
                "predicted_capacity": capacities[0][-1],
                "measured_capacity": capacities[1][-1],
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr)
    tau = kendall_tau(*capacities)
    spread = {metric: {"median": statistics.median(each), "max": max(each)} for metric, each in errors.items()}
    bars = bars_of({metric: each["median"] for metric, each in spread.items()}, tau, len(rows))
    details = {"measured_on": measured_on(kept, profile), "errors": spread, "rows": rows}
    finish(bars, details, "prediction_local")
    return 0


if __name__ == "__main__":
    sys.exit(main())
