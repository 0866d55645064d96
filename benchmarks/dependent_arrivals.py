"""Closed loops and sessions, predicted against measured on this machine's own runtime: throughput and latencies.

In an open loop a server that is slower than predicted only answers later; where clients wait for answers it is asked
less as well, so errors of step times and of waiting feed back into the arrivals. The simulator and the replay send by
the same rules (traces/sessions.py); this holds one against the other: so many clients that each send when their last
answer has come, and sessions whose next turn follows half a second after the answer before. Lengths are those of the
Azure conversation sample, cut to a fifth. Nothing is fitted to these runs: the profile and its calibration, measured
first, come from random prompts. About eight minutes.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from bars import Bar, finish
from paretune.profiler.calibration import calibrate_serving
from paretune.profiler.live import live_server, warm_server
from paretune.profiler.measure import measure
from paretune.profiler.profile import Key
from paretune.profiler.replay import prompt_token_ids, replay
from paretune.profiler.simulator import simulate
from paretune.profiler.tables import step_tables
from paretune.runtime.model_shape import ModelShape, resolve_model
from paretune.runtime.spec import SMALL_MODEL, Deployment, Pool
from paretune.traces import Trace, read, sample_path, scale
from paretune.traces.metrics import RequestTimes, summarize
from paretune.traces.sessions import NOBODY, DependentArrivals, closed_loop

REQUESTS, RUNS = 200, 3
MAX_TOKENS = 1024
KEYS = (Key(1, 1, 1, "bf16", "bf16"), Key(1, 2, 1, "bf16", "bf16"))
SESSIONS, PAUSE_S = 12, 0.5
VALUES = ("output tokens/s", "ttft p50", "ttft p95", "tpot p50", "e2e p50", "e2e p95")
MEDIAN_ERROR, THROUGHPUT_ERROR = 0.1, 0.1


def deployment(key: Key) -> Deployment:
    pool = Pool(
        **key._asdict(),
        max_num_seqs=32,
        max_num_batched_tokens=1024,
        max_model_len=MAX_TOKENS,
        num_kv_blocks=2048,
        enable_prefix_caching=False,
    )
    return Deployment(model=SMALL_MODEL, pools=(pool,))


def turns(trace: Trace) -> DependentArrivals:
    """SESSIONS at once, to which the requests of the log are dealt in turn."""
    rows = np.arange(len(trace))
    follows = rows >= SESSIONS
    return DependentArrivals(np.where(follows, rows - SESSIONS, NOBODY), np.where(follows, PAUSE_S, 0.0))


LOOPS: dict[str, Callable[[Trace], DependentArrivals]] = {
    "1 client": lambda trace: closed_loop(trace, 1),
    "4 clients": lambda trace: closed_loop(trace, 4),
    "16 clients": lambda trace: closed_loop(trace, 16),
    f"{SESSIONS} sessions": turns,
}


def values(times: RequestTimes) -> dict[str, float]:
    summary = summarize(times)
    split = {name: name.split(" p") for name in VALUES[1:]}
    latencies = {name: summary.value(metric, int(p)) for name, (metric, p) in split.items()}
    return {VALUES[0]: summary.output_tokens_per_s, **latencies}


def main() -> int:
    whole = scale(read(sample_path()), input_length=0.2, output_length=0.2, max_tokens=MAX_TOKENS)
    trace = whole.select(slice(0, REQUESTS))
    shape = ModelShape.load(resolve_model(SMALL_MODEL))
    token_ids = prompt_token_ids(resolve_model(SMALL_MODEL))
    profile = measure(SMALL_MODEL, KEYS, seconds_per_configuration=5.0, max_model_len=MAX_TOKENS)
    for key in KEYS:
        profile = calibrate_serving(profile, deployment(key))
    rows: list[dict[str, Any]] = []
    for key in KEYS:
        asked = deployment(key)
        tables = step_tables(profile, shape, asked.pool).tables
        with live_server(asked) as server:
            warm_server(server, trace, token_ids)
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in LOOPS}
            for _ in range(RUNS):  # in turn, so that the spread holds what the machine does in between
                for name, loop in LOOPS.items():
                    found = replay(trace, server.url, arrivals=loop(trace), model=server.model, token_ids=token_ids)
                    assert not found.errors, found.errors[:3]
                    runs[name].append(values(found.times))
        for name, loop in LOOPS.items():
            predicted = values(simulate(trace, asked.pool, tables, arrivals=loop(trace)).times)
            for value in VALUES:
                measured = sorted(run[value] for run in runs[name])
                truth = statistics.median(measured)
                error = predicted[value] / truth - 1
                spread = (measured[-1] - measured[0]) / 2 / truth
                rows.append(
                    {"configuration": str(key), "loop": name, "value": value, "predicted": predicted[value],
                     "measured": measured, "error": error, "spread": spread}
                )  # fmt: skip
                print(f"{key}, {name}: {value} {error:+.1%}, run to run +-{spread:.1%}", file=sys.stderr)
    throughput = [abs(row["error"]) for row in rows if row["value"] == VALUES[0]]
    latencies = [abs(row["error"]) for row in rows if row["value"] != VALUES[0]]
    bars = [
        Bar("output tokens per second: median error", statistics.median(throughput), THROUGHPUT_ERROR, at_least=False),
        Bar("TTFT, TPOT and E2E: median error", statistics.median(latencies), MEDIAN_ERROR, at_least=False),
    ]
    spread = statistics.median(row["spread"] for row in rows)
    print(f"median spread from run to run: +-{spread:.1%}", file=sys.stderr)
    finish(bars, rows, "dependent_arrivals")
    return 0


if __name__ == "__main__":
    sys.exit(main())
