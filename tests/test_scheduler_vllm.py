"""Policy vllm_v1 decides, step by step, as a plain statement of vLLM's rules does (vllm_rules.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.runtime.scheduler import add_request, commit, schedule
from paretune.runtime.scheduler_state import (
    NUM_RUNNING,
    NUM_WAITING,
    PLAN_FINISHED,
    PLAN_PREEMPTED,
    PLAN_SIZE,
    WAITING_HEAD,
    grow,
    new_plan,
    new_state,
)
from paretune.runtime.spec import BadSpec, Pool, parse_deployment
from paretune.runtime.speculation import room_for_drafts

from .vllm_rules import Request, Rules

BLOCK = 4
LONGEST = 64


class Ours:
    """The scheduler as the engine drives it: hashes of all full blocks, known as soon as their tokens are."""

    def __init__(self, **changes: Any) -> None:
        self.pool = Pool.model_validate({"max_model_len": LONGEST, "block_size": BLOCK, **changes})
        self.hashes = np.zeros(1 << 14, np.int64)
        self.state = new_state(self.pool, policy="vllm_v1", hashes=self.hashes)
        self.plan = new_plan(self.pool)
        self.requests: dict[int, Request] = {}
        self.numbers: dict[tuple[int, ...], int] = {}
        self.added: set[int] = set()

    def add(self, request: Request) -> None:
        self.added.add(request.name)
        tokens = request.tokens + request.answer
        start = request.name * (LONGEST // BLOCK)
        for index in range(len(tokens) // BLOCK):
            content = tuple(tokens[: (index + 1) * BLOCK])
            self.hashes[start + index] = self.numbers.setdefault(content, len(self.numbers) + 1)
        hashed = len(request.tokens) // BLOCK if self.pool.enable_prefix_caching else 0
        if self.state.counts[NUM_WAITING] + self.state.counts[NUM_RUNNING] == len(self.state.request_id):
            self.state = grow(self.state)
        slot = add_request(self.state, request.name, len(request.tokens), len(tokens), start, hashed, request.priority)
        assert slot >= 0

    def propose(self, most: int) -> None:
        state = self.state
        for slot in state.running[: state.counts[NUM_RUNNING]]:
            wanted = int(state.request_id[slot] + state.num_tokens[slot]) % (most + 1)
            state.num_draft_tokens[slot] = room_for_drafts(state, slot, wanted)

    def step(self) -> tuple[list[tuple[int, int, int]], list[int]]:
        state, plan = self.state, self.plan
        schedule(state, plan)
        size = int(plan.counts[PLAN_SIZE])
        names = [int(state.request_id[slot]) for slot in plan.slot[:size]]
        rows = list(zip(names, plan.start[:size].tolist(), plan.num_tokens[:size].tolist()))
        gone = [int(state.request_id[slot]) for slot in plan.preempted[: plan.counts[PLAN_PREEMPTED]]]
        for row in range(size):
            agreed = int(3 * state.request_id[plan.slot[row]] + state.num_tokens[plan.slot[row]]) % 4
            plan.accepted[row] = 1 + min(int(plan.num_drafts[row]), agreed)
        plan.stopped[:] = False
        commit(state, plan)
        if self.pool.enable_prefix_caching:
            ended = set(plan.finished[: plan.counts[PLAN_FINISHED]].tolist())
            for slot in set(plan.slot[:size].tolist()) - ended:
                state.num_hashes[slot] = state.num_tokens[slot] // BLOCK
        return rows, gone


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[int, Request]]:
    """(step of arrival, request): few families of prompts, so that many begin alike, some wholly."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.integers(1, 40))
    gap = draw(st.sampled_from([0, 1, 4]))
    longest = draw(st.sampled_from([20, 48]))
    arrivals = np.sort(rng.integers(0, count * gap + 1, count))
    found = []
    for name in range(count):
        prompt, answer = int(rng.integers(1, longest)), int(rng.integers(1, LONGEST - longest))
        family, shared = int(rng.integers(0, 3)), int(rng.integers(0, prompt + 1))
        tokens = [1000 * family + i for i in range(shared)] + rng.integers(0, 3, prompt - shared).tolist()
        said = rng.integers(10, 12, answer).tolist()
        found.append((int(arrivals[name]), Request(name, tokens, said, priority=int(rng.integers(0, 3)))))
    return found


def copy_of(request: Request) -> Request:
    return Request(request.name, list(request.tokens), list(request.answer), request.priority)


def steps_of(scheduler: Ours | Rules, workload: list[tuple[int, Request]], proposed: int = 0) -> list[Any]:
    steps = []
    arrivals = [(step, copy_of(request)) for step, request in workload]
    left = {request.name: len(request.answer) for _, request in arrivals}
    while left:
        while arrivals and arrivals[0][0] <= len(steps):
            scheduler.add(arrivals.pop(0)[1])
        scheduler.propose(proposed)
        rows, preempted = scheduler.step()
        steps.append((rows, preempted))
        for _, request in workload:
            if request.name in left and _ended(scheduler, request.name):
                del left[request.name]
        assert len(steps) < 20_000, "somebody waits for ever"
    return steps


def _ended(scheduler: Ours | Rules, name: int) -> bool:
    """It has been added, and is neither running nor waiting any more."""
    if isinstance(scheduler, Rules):
        return name in scheduler.added and all(r.name != name for r in (*scheduler.running, *scheduler.waiting))
    state = scheduler.state
    waiting = (int(state.counts[WAITING_HEAD]) + np.arange(state.counts[NUM_WAITING])) % len(state.waiting)
    live = {*state.running[: state.counts[NUM_RUNNING]].tolist(), *state.waiting[waiting].tolist()}
    return name in scheduler.added and name not in {int(state.request_id[slot]) for slot in live}


@settings(max_examples=150, deadline=None)
@given(
    workload=workloads(),
    seqs=st.sampled_from([1, 3, 8]),
    tokens=st.sampled_from([8, 17, 64]),
    blocks=st.sampled_from([16, 19, 40]),
    chunked=st.booleans(),
    caching=st.booleans(),
    threshold=st.sampled_from([0, 5]),
    scheduling=st.sampled_from(["fcfs", "priority"]),
    proposed=st.sampled_from([0, 0, 1, 4]),
)
def test_every_decision_is_the_one_that_vllms_rules_make(
    workload: list[tuple[int, Request]],
    seqs: int,
    tokens: int,
    blocks: int,
    chunked: bool,
    caching: bool,
    threshold: int,
    scheduling: str,
    proposed: int,
) -> None:
    tokens, threshold = (tokens, threshold) if chunked else (LONGEST, 0)
    rules = Rules(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        block_size=BLOCK,
        num_blocks=blocks,
        chunked=chunked,
        caching=caching,
        threshold=threshold,
        by_priority=scheduling == "priority",
    )
    ours = Ours(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        num_kv_blocks=blocks,
        enable_chunked_prefill=chunked,
        enable_prefix_caching=caching,
        long_prefill_token_threshold=threshold,
        scheduling=scheduling,
    )
    assert steps_of(ours, workload, proposed) == steps_of(rules, workload, proposed)


def test_a_request_finds_the_blocks_that_another_computes_in_the_same_step() -> None:
    prompt = list(range(13))
    ours = Ours(max_num_seqs=4, max_num_batched_tokens=64, num_kv_blocks=16)
    for name in range(2):
        ours.add(Request(name, list(prompt), [7, 7]))
    assert ours.step()[0] == [(0, 0, 13), (1, 12, 1)]


def test_a_long_prompt_takes_the_whole_step_only_when_it_is_alone() -> None:
    ours = Ours(max_num_seqs=4, max_num_batched_tokens=64, num_kv_blocks=16, long_prefill_token_threshold=6)
    ours.add(Request(0, [1] * 20, [7]))
    assert ours.step()[0] == [(0, 0, 20)]
    ours.add(Request(1, [2] * 20, [7]))
    ours.add(Request(2, [3] * 20, [7]))
    assert ours.step()[0] == [(1, 0, 6), (2, 0, 6)]


def test_a_threshold_without_chunked_prefill_is_refused() -> None:
    limits = {"enable_chunked_prefill": False, "max_num_batched_tokens": 4096, "long_prefill_token_threshold": 8}
    with pytest.raises(BadSpec, match="long_prefill_token_threshold"):
        parse_deployment({"pools": [limits]})
