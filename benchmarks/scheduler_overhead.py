"""What the scheduler adds to an engine's step at 256 running sequences: plan, wire, new tokens, commit; microseconds.

Each of 256 requests of 512 prompt tokens decodes; a step in sixteen takes a new block for each. What the engine does
between two forward passes for each request, less sampling and hashing, is timed as the engine calls it.
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np

from bars import Bar, finish, spread
from paretune.runtime.batch import ARGMAX, TARGET, Batch
from paretune.runtime.scheduler import add_request
from paretune.runtime.scheduler_state import PLAN_SIZE, new_plan, new_state
from paretune.runtime.spec import Pool
from paretune.runtime.step_calls import StepCalls

SEQS = 256
PROMPT = 512
STEPS = 400
RUNS = 7
TARGET_US = 100.0
SETTINGS = {
    "paretune": ("paretune", {}),
    "vllm_v1": ("vllm_v1", {}),
    "priority, estimated peak, swap": (
        "paretune",
        {"scheduling": "priority", "admission": "estimated_peak", "preemption": "swap", "host_kv_blocks": 4096},
    ),
}


def step_times_us(policy: str, changes: dict[str, object]) -> list[float]:
    """Of each decode step of one run."""
    limits = {"max_model_len": 2048, "max_num_seqs": SEQS, "max_num_batched_tokens": 8192, "num_kv_blocks": 32_768}
    pool = Pool.model_validate({**limits, **changes})
    blocks = pool.max_model_len // pool.block_size
    hashes = np.arange(1, SEQS * blocks + 1, dtype=np.int64)
    tokens = np.zeros(SEQS * pool.max_model_len, np.int32)
    state, plan = new_state(pool, policy=policy, hashes=hashes), new_plan(pool)
    batch = Batch(pool)
    new_tokens, ends = np.zeros(SEQS, np.int64), np.zeros(SEQS, np.bool_)
    num_cached, full = np.zeros(len(state.request_id), np.int64), np.zeros((SEQS, 2), np.int64)
    for number in range(SEQS):
        add_request(state, number, PROMPT, pool.max_model_len, number * blocks, PROMPT // pool.block_size, number % 3)
    counts = np.zeros((len(state.request_id), 3), np.int64), np.zeros(0, np.int64)
    calls = StepCalls(state, plan, tokens, batch.wire, num_cached, full, *counts)
    times_us: list[float] = []
    while len(times_us) < STEPS:
        begin = time.perf_counter()
        calls.schedule()
        calls.write_wire(ARGMAX, TARGET)
        batch.read()
        calls.keep_agreed(new_tokens, ends)
        for slot, blocks in full[: calls.append_tokens(new_tokens)].tolist():
            state.num_hashes[slot] = blocks
        calls.commit()
        calls.work()
        end = time.perf_counter()
        if plan.counts[PLAN_SIZE] == SEQS and plan.num_tokens[:SEQS].max() == 1:
            times_us.append((end - begin) * 1e6)
    return times_us


def main() -> int:
    details = {}
    for name, (policy, changes) in SETTINGS.items():
        step_times_us(policy, changes)  # compiles, or loads what was compiled
        runs = [step_times_us(policy, changes) for _ in range(RUNS)]
        details[name] = {
            "median_us": spread([statistics.median(run) for run in runs]),
            "p99_us": spread([float(np.percentile(run, 99)) for run in runs]),
        }
        print(f"{name:>30}: {details[name]['median_us']['median']:6.1f} us a step", file=sys.stderr)
    median = details["paretune"]["median_us"]["median"]
    finish(
        [Bar("scheduler, us a step at 256 running sequences", median, TARGET_US, at_least=False)],
        details,
        "scheduler_overhead",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
