"""Prefix reuse on Mooncake's synthetic trace: what its publishers count, and more of it in a larger cache."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from paretune.profiler.simulator import simulate
from paretune.profiler.step_time import WORK_GRID, StepTables
from paretune.runtime.spec import Pool
from paretune.traces import Trace, read

LONGEST = 196_608


@cache
def mooncake(data_dir: Path) -> Trace:
    return read(data_dir / "traces" / "mooncake" / "synthetic_trace.jsonl")


def reused_share(trace: Trace, cache_tokens: int, block_size: int) -> float:
    """Of the input tokens, served one request after the other (then nothing in use crowds out what could be reused)."""
    limits = Pool(
        max_model_len=LONGEST,
        max_num_seqs=1,
        max_num_batched_tokens=8192,
        block_size=block_size,
        num_kv_blocks=cache_tokens // block_size,
        enable_prefix_caching=True,
    )
    nothing = np.zeros(len(WORK_GRID))
    tables = StepTables(
        tokens_s=np.full(8193, 1e-3),
        rows_s=np.zeros(2),
        samples_s=np.zeros(limits.max_num_samples + 1),
        decode_attention_s=nothing,
        prefill_attention_s=nothing.copy(),
        request_s=np.zeros(2),
    )
    found = simulate(trace, limits, tables)
    assert found.rejected == found.preemptions == 0
    assert found.times.finished.all()
    return found.prefix_hit_tokens / int(trace.input_tokens.sum(dtype=np.int64))


def test_an_unbounded_cache_reuses_what_the_trace_repeats(data_dir: Path) -> None:
    # 65.1 %: the count of repeated 512-token blocks, by the trace's description (data/README.md)
    trace = mooncake(data_dir)
    everything = 2 * int((trace.input_tokens + trace.output_tokens).sum(dtype=np.int64))
    for block_size in (16, 512):
        # a prompt that is cached to its last token computes one block again, which is small where blocks are
        assert abs(reused_share(trace, everything, block_size) - 0.651) < 0.001


def test_a_larger_cache_never_reuses_less(data_dir: Path) -> None:
    trace = mooncake(data_dir)
    shares = [reused_share(trace, LONGEST + (512 << step), 512) for step in range(17)]
    assert all(larger >= smaller for smaller, larger in pairwise(shares))
    # from next to nothing to nearly all
    assert shares[0] < 0.05 < 0.6 < shares[-1]
