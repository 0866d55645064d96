"""Step times by the whole batch, and the engine that composes steps ahead: closed forms, and plays told by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paretune.profiler.batch_time import AttentionTimes, BatchTables, attention_s, skew_share, step_time_s
from paretune.profiler.simulator import SimulationResult, simulate
from paretune.profiler.step_time import WORK_GRID, StepTables
from paretune.runtime.scheduler_state import PLAN_SIZE, PLAN_TOKENS, Plan, new_plan
from paretune.runtime.spec import BadSpec, Pool
from paretune.traces.trace import Trace

POOL = Pool(max_model_len=512, max_num_seqs=8, max_num_batched_tokens=128, num_kv_blocks=256, block_size=16)


def attention(share: float = 0.0, split_rows: float = 0.0) -> AttentionTimes:
    """1 us a chunk's token, 2 us a cached token, 10 us a decode row, 3 us a token of mean context."""
    chunk, cached = np.array([16.0, 64.0, 128.0]), np.array([0.0, 16.0, 512.0])
    rows, context = np.array([1.0, 4.0, 8.0]), np.array([16.0, 128.0, 512.0])
    prefill = 1e-6 * chunk[:, None] + 2e-6 * cached
    decode = 1e-5 * rows[:, None] + 3e-6 * context
    return AttentionTimes(
        prompt=chunk,
        cached=cached,
        rows=rows,
        context=context,
        prefill_s=prefill[:, :, None, None].copy(),
        decode_s=decode[None, None].copy(),
        mixed_s=prefill[:, :, None, None] + decode[None, None],
        skew_prompt=np.array([0.0, 16.0]),
        skew_rows=np.array([2.0, 8.0]),
        longest=np.array([64.0, 512.0]),
        spread=np.array([1 / 64, 0.5]),
        skew=np.full((2, 2, 2, 2), share) * np.array([1.0, 3.0])[None, :, None, None],
        split_rows=split_rows,
    )


def batch(ranks: int = 1, ahead: bool = False, seconds: float = 0.0, **changes: Any) -> BatchTables:
    """Steps of so many seconds, whatever stands in them, unless `changes` say more."""
    size = POOL.max_num_batched_tokens
    nothing = attention()
    silent = nothing._replace(
        **{name: np.zeros_like(getattr(nothing, name)) for name in ("prefill_s", "decode_s", "mixed_s")}
    )
    plain = BatchTables(
        tokens_s=np.full(size + 1, seconds),
        samples_s=np.zeros(POOL.max_num_seqs + 1),
        experts_s=np.zeros(ranks * size + 1),
        exchange_s=np.zeros(ranks * size + 1),
        captured_tokens=0,
        padded=np.zeros(1, np.int64),
        attention=silent,
        request_s=np.zeros(2),
        ranks=ranks,
        ahead=ahead,
    )
    return plain._replace(**changes)


def plan(*rows: tuple[int, int]) -> Plan:
    """Rows of (tokens, tokens before them), each of which samples."""
    made = new_plan(POOL)
    for row, (tokens, before) in enumerate(rows):
        made.num_tokens[row], made.start[row], made.samples[row] = tokens, before, True
    made.counts[PLAN_SIZE], made.counts[PLAN_TOKENS] = len(rows), sum(tokens for tokens, _ in rows)
    return made


def serve(
    tables: BatchTables, arrivals: list[float], inputs: list[int], outputs: list[int], **pool: Any
) -> SimulationResult:
    sums = StepTables(*(np.zeros(n) for n in (129, 9, 9, len(WORK_GRID), len(WORK_GRID), 2)), batch=tables)
    limits = POOL.model_copy(update={"replicas": tables.ranks, **pool})
    return simulate(Trace(np.array(arrivals), np.array(inputs), np.array(outputs)), limits, sums, policy="vllm_v1", k=2)


@pytest.mark.parametrize(("rows", "context"), [(1, 16.0), (2, 100.0), (6, 300.0), (8, 700.0), (12, 512.0)])
def test_attention_of_equal_rows_is_the_table_between_its_points_and_beyond_their_end(
    rows: int, context: float
) -> None:
    times = attention()
    assert attention_s(times, 0.0, 0.0, rows, context, context, 0.0) == pytest.approx(1e-5 * rows + 3e-6 * context)
    assert attention_s(times, 40.0, 200.0, rows, context, context, 0.0) == pytest.approx(
        40e-6 + 400e-6 + 1e-5 * rows + 3e-6 * context
    )


def test_one_long_row_takes_its_share_of_the_way_to_a_batch_of_such_rows() -> None:
    times = attention(share=0.1)
    mean, longest, variance = 100.0, 400.0, 10_000.0
    even, worst = (attention_s(attention(), 0.0, 0.0, 2, c, c, 0.0) for c in (mean, longest))
    assert attention_s(times, 0.0, 0.0, 2, mean, longest, variance) == pytest.approx(even + 0.1 * (worst - even))
    assert skew_share(times, 0.0, 8, mean, longest, variance) == pytest.approx(0.3)
    assert skew_share(times, 0.0, 5, mean, longest, variance) == pytest.approx(0.2)  # half way
    assert skew_share(times, 0.0, 5, mean, mean, 0.0) == 0.0


def test_the_share_jumps_where_the_kernel_stops_dividing_contexts() -> None:
    times = attention(share=0.1, split_rows=5.5)
    shares = [skew_share(times, 0.0, rows, 100.0, 400.0, 1e4) for rows in (2, 5, 6, 8)]
    assert shares == pytest.approx([0.1, 0.1, 0.3, 0.3])
    assert skew_share(times, 16.0, 5, 100.0, 400.0, 1e4) == pytest.approx(0.2)  # beside a chunk nothing is divided


def test_a_step_is_its_tokens_samples_and_attention_and_each_further_chunk_by_itself() -> None:
    tables = batch(attention=attention(), samples_s=1e-3 * np.arange(9), tokens_s=1e-2 * np.arange(129))
    step = plan((1, 99), (40, 0), (1, 99), (20, 16))
    together = attention_s(attention(), 40.0, 0.0, 2, 100.0, 100.0, 0.0)
    alone = attention_s(attention(), 20.0, 16.0, 0, 0.0, 0.0, 0.0)
    assert step_time_s(tables, (step,)) == pytest.approx(0.62 + 4e-3 + together + alone)


def test_ranks_wait_for_the_slowest_and_a_captured_step_is_padded_on_all() -> None:
    tables = batch(
        ranks=2,
        tokens_s=1e-3 * np.arange(129),
        experts_s=1e-4 * np.arange(257),
        captured_tokens=4,
        padded=np.array([0, 1, 2, 4, 4]),
    )
    idle = plan()
    assert step_time_s(tables, (plan((1, 9), (1, 9), (1, 9)), idle)) == pytest.approx(4e-3 + 8e-4)
    assert step_time_s(tables, (plan((50, 0)), idle)) == pytest.approx(50e-3 + 51e-4)  # an idle rank computes a token


def test_a_request_waits_for_the_rest_of_a_step_and_where_steps_are_composed_ahead_for_a_whole_one() -> None:
    arrivals, inputs, outputs = [0.0, 2.5], [10, 10], [10, 1]
    by_turns = serve(batch(seconds=1.0), arrivals, inputs, outputs)
    ahead = serve(batch(seconds=1.0, ahead=True), arrivals, inputs, outputs)
    assert by_turns.times.first_token_s.tolist() == [1.0, 4.0]
    assert ahead.times.first_token_s.tolist() == [1.0, 5.0]
    assert by_turns.times.end_s[0] == ahead.times.end_s[0] == 10.0
    assert ahead.times.kth_token_s[0] == 2.0


def test_a_seat_is_free_a_step_later_where_steps_are_composed_ahead() -> None:
    found = [
        serve(batch(seconds=1.0, ahead=ahead), [0.0] * 3, [10] * 3, [9, 3, 1], max_num_seqs=2).times.first_token_s[2]
        for ahead in (False, True)
    ]
    assert found == [4.0, 5.0]


def test_ranks_step_together_and_a_request_goes_where_fewest_are() -> None:
    tables = batch(ranks=2, seconds=1.0, experts_s=np.concatenate([np.zeros(22), np.full(235, 9.0)]))
    both = serve(tables, [0.0, 0.0], [10, 10], [1, 1])  # one on each rank: 20 tokens together
    assert both.times.first_token_s.tolist() == [1.0, 1.0]
    assert both.steps == 1
    assert serve(batch(seconds=1.0), [0.0, 0.0], [100, 100], [1, 1]).times.first_token_s.tolist() == [1.0, 2.0]
    assert serve(batch(ranks=2, seconds=1.0), [0.0, 0.0], [100, 100], [1, 1]).times.first_token_s.tolist() == [1.0, 1.0]


def test_an_idle_engine_starts_when_the_next_request_comes_and_all_are_served() -> None:
    rng = np.random.default_rng(0)
    n = 60
    arrivals, inputs, outputs = np.cumsum(rng.exponential(2.0, n)), rng.integers(1, 200, n), rng.integers(1, 30, n)
    for ahead in (False, True):
        tables = batch(seconds=0.1, ahead=ahead)
        result = serve(tables, arrivals.tolist(), inputs.tolist(), outputs.tolist())
        assert result.times.finished.all()
        ttft = result.times.first_token_s - arrivals
        steps = -(-inputs // POOL.max_num_batched_tokens)
        assert (ttft >= 0.1 * steps - 1e-9).all()
        assert result.busy_s == pytest.approx(0.1 * result.steps)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"replicas": 3}, "replicas"),
        ({"router": "prefix_affinity"}, "router"),
        ({"pipeline_parallel_size": 2}, "pipeline"),
    ],
)
def test_a_pool_that_such_tables_do_not_describe_is_refused(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(BadSpec) as error:
        serve(batch(ranks=2, seconds=1.0), [0.0], [4], [1], **changes)
    assert where in error.value.where
