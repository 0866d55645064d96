"""The scheduler of a decode pool: requests come with the KV of their prompts, and blocks and tokens are conserved."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.runtime import kv_cache
from paretune.runtime.scheduler import abort, add_request, commit, schedule
from paretune.runtime.scheduler_state import (
    NUM_PREEMPTIONS,
    NUM_PREFIX_QUERY_TOKENS,
    NUM_RUNNING,
    NUM_WAITING,
    PLAN_SIZE,
    POLICIES,
    Plan,
    State,
    new_plan,
    new_state,
)

from .test_scheduler import check_conservation, pool, run_step


def test_the_prompt_is_not_computed_and_its_blocks_are_held() -> None:
    limits = pool(role="decode", max_num_batched_tokens=4)
    state, plan = new_state(limits), new_plan(limits)
    slot = add_request(state, 7, 30, 33, 0, 0)
    schedule(state, plan)
    assert plan.counts[PLAN_SIZE] == 1
    assert (plan.start[0], plan.num_tokens[0], bool(plan.samples[0])) == (29, 1, True)
    assert state.num_blocks[slot] == 8  # 30 tokens in blocks of 4
    assert state.counts[NUM_PREFIX_QUERY_TOKENS] == 0


def test_a_mixed_pool_computes_it() -> None:
    limits = pool()
    state, plan = new_state(limits), new_plan(limits)
    add_request(state, 7, 30, 33, 0, 0)
    schedule(state, plan)
    assert (plan.start[0], plan.num_tokens[0]) == (0, 30)


def test_who_finds_no_blocks_waits_for_all_of_its_prompt() -> None:
    limits = pool(role="decode", num_kv_blocks=16)
    state, plan = new_state(limits), new_plan(limits)
    add_request(state, 0, 40, 42, 0, 0)
    add_request(state, 1, 40, 42, 0, 0)
    run_step(state, plan)
    assert (state.counts[NUM_RUNNING], state.counts[NUM_WAITING]) == (1, 1)
    check_conservation(state)
    ended = [run_step(state, plan) for _ in range(4)]
    assert [request for step in ended for request in step] == [0, 1]


def tokens_computed(state: State, plan: Plan) -> Counter[int]:
    """By request, of all steps until nobody is left."""
    computed: Counter[int] = Counter()
    while state.counts[NUM_RUNNING] + state.counts[NUM_WAITING] > 0:
        schedule(state, plan)
        size = int(plan.counts[PLAN_SIZE])
        for row in range(size):
            computed[int(state.request_id[plan.slot[row]])] += int(plan.num_tokens[row])
        plan.accepted[:size], plan.stopped[:size] = 1, False
        commit(state, plan)
        check_conservation(state)
    return computed


@pytest.mark.parametrize(("caching", "computed"), [(False, 1 + 33 + 6), (True, 1 + 33 - 24 + 6)])
def test_once_preempted_it_computes_its_prompt_itself_but_for_blocks_that_are_still_cached(
    caching: bool, computed: int
) -> None:
    limits = pool(role="decode", num_kv_blocks=16, enable_prefix_caching=caching)
    state, plan = new_state(limits, own_content=True), new_plan(limits)
    add_request(state, 0, 31, 40, 0, 0)
    add_request(state, 1, 32, 40, 0, 0)
    # both hold 8 of 16 blocks; with its second token the later one would need a ninth. The other one ends with 10, so
    # that 6 of the 8 are left
    found = tokens_computed(state, plan)
    assert state.counts[NUM_PREEMPTIONS] == 1
    assert (found[0], found[1]) == (9, computed)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    blocks=st.sampled_from([16, 24, 200]),
    policy=st.sampled_from(POLICIES),
    changes=st.sampled_from(
        [
            {},
            {"enable_prefix_caching": False},
            {"preemption": "swap", "host_kv_blocks": 12},
            {"admission": "estimated_peak"},
            {"admission": "watermark", "watermark": 0.1},
        ]
    ),
)
def test_blocks_and_requests_are_conserved_and_all_are_free_at_the_end(
    seed: int, blocks: int, policy: str, changes: dict[str, object]
) -> None:
    if policy == "vllm_v1" and ("host_kv_blocks" in changes or changes.get("admission") == "estimated_peak"):
        return
    rng = np.random.default_rng(seed)
    limits = pool(role="decode", num_kv_blocks=blocks, **changes)
    state, plan = new_state(limits, policy=policy, own_content=True, slots=64), new_plan(limits)
    answers, ended = {}, []
    for request in range(24):
        prompt = int(rng.integers(1, 60))
        answers[request] = int(rng.integers(1, 64 - prompt + 1))
        slot = add_request(state, request, prompt, prompt + answers[request], 0, 0)
        if rng.random() < 0.1:
            abort(state, slot)
            del answers[request]
        for _ in range(int(rng.integers(0, 4))):
            ended += run_step(state, plan)
            check_conservation(state)
    for _ in range(4000):
        if state.counts[NUM_RUNNING] + state.counts[NUM_WAITING] == 0:
            break
        ended += run_step(state, plan)
        check_conservation(state)
    assert sorted(ended) == sorted(answers)
    assert kv_cache.num_available(state.blocks) == blocks
    assert kv_cache.num_available(state.host_blocks) == limits.host_kv_blocks


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_with_room_for_all_each_request_computes_as_many_tokens_as_it_answers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    limits = pool(role="decode", num_kv_blocks=400)
    state, plan = new_state(limits, slots=64), new_plan(limits)
    prompts = rng.integers(1, 50, 20)
    answers = rng.integers(1, 14, 20)
    for request in range(20):
        add_request(state, request, int(prompts[request]), int(prompts[request] + answers[request]), 0, 0)
    computed = tokens_computed(state, plan)
    assert [computed[request] for request in range(20)] == answers.tolist()
