"""Runs of decode steps: they leave behind what `schedule` and `commit` for each step would have left."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from paretune.runtime import kv_cache
from paretune.runtime.decode_runs import (
    NEXT_END,
    ROWS,
    STEP,
    begin_run,
    end_rows,
    lacks_last_token,
    leave_run,
    name_passes_on,
    new_decode_run,
    prepare_step,
    take_blocks,
)
from paretune.runtime.scheduler import add_request, commit, schedule
from paretune.runtime.scheduler_state import (
    NUM_WAITING,
    PLAN_FINISHED,
    PLAN_PREEMPTED,
    POLICIES,
    Plan,
    State,
    new_plan,
    new_state,
)

from .pool_checks import cached_blocks
from .test_scheduler import check_conservation, pool, run_step, running


def decoding(seed: int, blocks: int, policy: str, alike: bool = False) -> tuple[State, Plan]:
    """Requests that have computed their prompts; some have hashes that reach beyond these, alike: all the same."""
    rng = np.random.default_rng(seed)
    limits = pool(num_kv_blocks=blocks, max_num_batched_tokens=64)
    hashes = np.arange(1, 65, dtype=np.int64) * 7919
    state = new_state(limits, policy=policy, hashes=hashes, blocks_per_hash=2, own_content=True)
    plan = new_plan(limits)
    for number in range(4):
        prompt = int(rng.integers(1, 30))
        longest = int(rng.integers(2, 25))
        add_request(state, number, prompt, prompt + longest, 0 if alike else 16 * number, int(rng.integers(0, 6)))
    while not running(state) or not all(lacks_last_token(state, slot) for slot in running(state)):
        run_step(state, plan)
    return state, plan


def contents(state: State) -> list[tuple[int, int]]:
    return [kv_cache.name_of(state.blocks, block) for block in cached_blocks(state.blocks)]


def who_has_names(state: State) -> list[list[bool]]:
    """Of each running request's blocks, whether others find it."""
    tables = [state.block_table[state.lane[slot], : state.num_blocks[slot]] for slot in running(state)]
    return [(state.blocks.content[blocks] != 0).tolist() for blocks in tables]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    blocks=st.sampled_from([20, 28, 60]),
    policy=st.sampled_from(POLICIES),
    stride=st.integers(1, 9),
    alike=st.booleans(),
)
def test_a_run_leaves_what_single_steps_leave(seed: int, blocks: int, policy: str, stride: int, alike: bool) -> None:
    state, plan = decoding(seed, blocks, policy, alike)
    assume(state.counts[NUM_WAITING] == 0)
    other, other_plan = decoding(seed, blocks, policy, alike)
    run = new_decode_run(pool(num_kv_blocks=blocks))
    context = begin_run(state, run)
    assert context == sum(state.num_tokens[slot] for slot in running(state))
    ended: list[int] = []
    while run.counts[ROWS] > 0 and prepare_step(state, plan, run, False):
        until = name_passes_on(state, run, min(run.counts[STEP] + stride, run.counts[NEXT_END]))
        run.counts[STEP] = take_blocks(state, plan, run, until)
        if run.counts[STEP] == run.counts[NEXT_END]:
            plan.counts[PLAN_FINISHED] = 0
            end_rows(state, plan, run)
            ended += [int(state.request_id[slot]) for slot in plan.finished[: plan.counts[PLAN_FINISHED]]]
    steps = int(run.counts[STEP])
    leave_run(state, run)
    check_conservation(state)
    ended_singly: list[int] = []
    for _ in range(steps):
        schedule(other, other_plan)
        assert other_plan.counts[PLAN_PREEMPTED] == 0, "a run took a step for which there were no blocks"
        commit(other, other_plan)
        ended_singly += [
            int(other.request_id[slot]) for slot in other_plan.finished[: other_plan.counts[PLAN_FINISHED]]
        ]
    assert ended == ended_singly
    assert [state.request_id[slot] for slot in running(state)] == [other.request_id[slot] for slot in running(other)]
    for name in ("num_tokens", "num_computed_tokens", "num_blocks"):
        mine, theirs = getattr(state, name)[running(state)], getattr(other, name)[running(other)]
        assert mine.tolist() == theirs.tolist(), name
    assert kv_cache.num_available(state.blocks) == kv_cache.num_available(other.blocks)
    assert contents(state) == contents(other)
    assert who_has_names(state) == who_has_names(other)


def test_what_a_run_has_computed_is_named_before_others_look_for_it() -> None:
    state = new_state(pool(), hashes=np.array([11, 22], np.int64), blocks_per_hash=2)
    plan, run = new_plan(pool()), new_decode_run(pool())
    slot = add_request(state, 1, 5, 30, 0, 2)
    run_step(state, plan)
    add_request(state, 2, 16, 20, 0, 2)
    begin_run(state, run)
    for computed in (7, 8, 13, 15, 16, 20):
        assert prepare_step(state, plan, run, True)
        run.counts[STEP] = take_blocks(state, plan, run, computed - 5)
        assert prepare_step(state, plan, run, True)
        held = state.block_table[state.lane[slot], : state.num_blocks[slot]]
        assert (state.blocks.content[held] != 0).sum() == min(computed // 4, 4), "the hashes cover four blocks"
    leave_run(state, run)
    check_conservation(state)
