"""The scheduler's laws: blocks and requests are conserved, nobody is forgotten, prefixes are shared only when equal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from paretune.runtime import scheduler_state
from paretune.runtime.scheduler import abort, add_request, commit, schedule
from paretune.runtime.scheduler_state import (
    NUM_FREE_LANES,
    NUM_FREE_SLOTS,
    NUM_PREEMPTIONS,
    NUM_RUNNING,
    NUM_WAITING,
    PLAN_COPIES,
    PLAN_FINISHED,
    PLAN_PREEMPTED,
    PLAN_SIZE,
    PLAN_TOKENS,
    POLICIES,
    WAITING_HEAD,
    Plan,
    State,
    grow,
    new_plan,
    new_state,
)
from paretune.runtime.spec import Pool

from .pool_checks import check_pool


def pool(**changes: object) -> Pool:
    return Pool.model_validate(
        {
            "max_model_len": 64,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 32,
            "block_size": 4,
            "num_kv_blocks": 24,
            **changes,
        }
    )


def running(state: State) -> list[int]:
    return [int(slot) for slot in state.running[: state.counts[NUM_RUNNING]]]


def waiting(state: State) -> list[int]:
    head, size = int(state.counts[WAITING_HEAD]), len(state.waiting)
    return [int(state.waiting[(head + i) % size]) for i in range(int(state.counts[NUM_WAITING]))]


def check_conservation(state: State, in_flight: bool = False) -> None:
    """Every block is held, free or cached, and never two of them; every slot and lane is in one place."""
    blocks = state.blocks
    held = np.zeros(len(blocks.use), np.int64)
    on_host = np.zeros(len(state.host_blocks.use), np.int64)
    for slot in waiting(state):
        assert state.num_blocks[slot] == 0
        place = int(state.first_swapped[slot])
        for _ in range(state.num_swapped_blocks[slot]):
            on_host[place] += 1
            place = int(state.next_swapped[place])
    check_pool(state.host_blocks, on_host)
    for slot in running(state):
        assert state.num_swapped_blocks[slot] == 0
        row = state.block_table[state.lane[slot], : state.num_blocks[slot]]
        assert len(set(row.tolist())) == len(row)
        np.add.at(held, row, 1)
        needed = -(-state.num_computed_tokens[slot] // state.limits[scheduler_state.BLOCK_SIZE])
        assert state.num_blocks[slot] >= needed
        assert 0 <= state.num_computed_tokens[slot] <= state.num_tokens[slot]
    check_pool(blocks, held, unique=state.limits[scheduler_state.POLICY] == scheduler_state.PARETUNE)
    live = running(state) + waiting(state)
    assert len(set(live)) == len(live)
    assert len(live) + state.counts[NUM_FREE_SLOTS] == len(state.request_id)
    assert len(running(state)) + state.counts[NUM_FREE_LANES] == state.limits[scheduler_state.MAX_NUM_SEQS]
    assert not state.ends.any()


def run_step(state: State, plan: Plan) -> list[int]:
    schedule(state, plan)
    size = int(plan.counts[PLAN_SIZE])
    plan.accepted[:size] = 1
    plan.stopped[:size] = False
    commit(state, plan)
    return [int(state.request_id[slot]) for slot in plan.finished[: plan.counts[PLAN_FINISHED]]]


class Contents:
    """What the blocks of a cache hold, as an engine that makes a plan's copies and computes its tokens would fill them.

    A token's content is (its family, its place) within a shared prefix, else (its request, its place).
    """

    def __init__(self, state: State, shared: dict[int, tuple[int, int]]) -> None:
        blocks = len(state.blocks.use) + len(state.host_blocks.use)
        self.cells = [[None] * int(state.limits[scheduler_state.BLOCK_SIZE]) for _ in range(blocks)]
        self.shared = shared

    def token(self, request: int, place: int) -> tuple[str, int, int]:
        family, length = self.shared[request]
        return ("family", family, place) if place < length else ("own", request, place)

    def run(self, state: State, plan: Plan) -> None:
        """Make the copies, write the new tokens, and look whether each request reads its own context."""
        size = int(state.limits[scheduler_state.BLOCK_SIZE])
        for source, destination in plan.copies[: plan.counts[PLAN_COPIES]].tolist():
            self.cells[destination] = list(self.cells[source])
        rows = range(int(plan.counts[PLAN_SIZE]))
        for row in rows:
            slot, start = int(plan.slot[row]), int(plan.start[row])
            for place in range(start, start + int(plan.num_tokens[row])):
                block = int(state.block_table[state.lane[slot]][place // size])
                self.cells[block][place % size] = self.token(int(state.request_id[slot]), place)
        for row in rows:
            slot = int(plan.slot[row])
            for place in range(int(plan.start[row] + plan.num_tokens[row])):
                block = int(state.block_table[state.lane[slot]][place // size])
                assert self.cells[block][place % size] == self.token(int(state.request_id[slot]), place)


class AnyTraffic(RuleBasedStateMachine):
    """Requests come, are aborted, run, share prefixes and run out of blocks, with up to two plans in flight.

    Under every policy, scheduling, admission and preemption, with and without a second tier; and whatever is copied and
    shared, each request reads its own context.
    """

    stages = 1

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(7)
        self.shared: dict[int, tuple[int, int]] = {}
        self.start("paretune", "fcfs", "on_demand", "recompute", 0, 0, False, 1)

    @initialize(
        policy=st.sampled_from(POLICIES),
        scheduling=st.sampled_from(["fcfs", "priority"]),
        admission=st.sampled_from(["on_demand", "first_chunk", "watermark", "estimated_peak"]),
        preemption=st.sampled_from(["recompute", "swap"]),
        host=st.sampled_from([0, 5, 30]),
        threshold=st.sampled_from([0, 7]),
        own=st.booleans(),
        per_hash=st.sampled_from([1, 3]),
    )
    def start(
        self,
        policy: str,
        scheduling: str,
        admission: str,
        preemption: str,
        host: int,
        threshold: int,
        own: bool,
        per_hash: int,
    ) -> None:
        if policy == "vllm_v1":
            admission = "on_demand" if admission == "estimated_peak" else admission
            preemption, host = "recompute", 0
        if self.stages > 1:
            preemption, host = "recompute", 0
        self.pool = pool(
            num_kv_blocks=16,
            pipeline_parallel_size=self.stages,
            scheduling=scheduling,
            admission=admission,
            watermark=0.2 if admission == "watermark" else 0.0,
            preemption=preemption if host else "recompute",
            host_kv_blocks=host,
            long_prefill_token_threshold=threshold,
        )
        # eight families of prefixes, sixteen hashes each, of one block or of three
        hashes = np.arange(1, 129, dtype=np.int64) * 7919
        self.hashed = 4 * per_hash
        self.state = new_state(self.pool, policy=policy, hashes=hashes, blocks_per_hash=per_hash, own_content=own)
        self.contents = Contents(self.state, self.shared)
        self.flying: list[Plan] = []
        self.alive: dict[int, int] = {}
        self.ended: set[int] = set()
        self.number = 0

    @rule(prompt=st.integers(1, 60), answer=st.integers(1, 20), family=st.integers(0, 7), priority=st.integers(-1, 1))
    def arrive(self, prompt: int, answer: int, family: int, priority: int) -> None:
        total = min(prompt + answer, self.pool.max_model_len)
        prompt = min(prompt, total - 1)
        hashes = prompt // self.hashed
        self.shared[self.number] = (family, hashes * self.hashed)
        slot = add_request(self.state, self.number, prompt, total, 16 * family, hashes, priority)
        if slot < 0:
            self.state = grow(self.state)
            slot = add_request(self.state, self.number, prompt, total, 16 * family, hashes, priority)
        assert slot >= 0
        self.alive[self.number] = slot
        self.number += 1

    @rule()
    def launch(self) -> None:
        if len(self.flying) == 2:
            return
        plan = new_plan(self.pool)
        schedule(self.state, plan)
        size = int(plan.counts[PLAN_SIZE])
        assert plan.counts[PLAN_TOKENS] == plan.num_tokens[:size].sum() <= self.pool.max_num_batched_tokens
        assert (plan.num_tokens[:size] > 0).all()
        assert len(set(plan.slot[:size].tolist())) == size
        self.contents.run(self.state, plan)
        self.flying.append(plan)

    @rule(stop=st.integers(0, 9))
    def land(self, stop: int) -> None:
        if not self.flying:
            return
        plan = self.flying.pop(0)
        size = int(plan.counts[PLAN_SIZE])
        plan.accepted[:size] = 1
        plan.stopped[:size] = self.rng.random(size) < stop / 30
        commit(self.state, plan)
        for slot in plan.finished[: plan.counts[PLAN_FINISHED]]:
            request = int(self.state.request_id[slot])
            assert request not in self.ended
            self.ended.add(request)
            del self.alive[request]

    @rule(pick=st.integers(0, 1000))
    def give_up(self, pick: int) -> None:
        if not self.alive:
            return
        request = sorted(self.alive)[pick % len(self.alive)]
        if abort(self.state, self.alive[request]):
            self.ended.add(request)
            del self.alive[request]

    @invariant()
    def conserved(self) -> None:
        check_conservation(self.state)
        assert len(self.alive) + len(self.ended) == self.number

    def teardown(self) -> None:
        while self.flying:
            self.land(0)
        for _ in range(10_000):
            if not self.alive:
                break
            self.launch()
            self.land(0)
        assert not self.alive, "a request was forgotten"
        check_conservation(self.state)
        assert (self.state.blocks.use >= -1).all()
        assert (self.state.host_blocks.use >= -1).all()


AnyTraffic.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestAnyTraffic = AnyTraffic.TestCase


class PipelinedTraffic(AnyTraffic):
    """The same with plans that leave their share of the requests to the other stage."""

    stages = 2


PipelinedTraffic.TestCase.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)
TestPipelinedTraffic = PipelinedTraffic.TestCase


def test_the_plans_of_a_pipeline_share_the_running_requests() -> None:
    limits = pool(pipeline_parallel_size=2, max_num_seqs=5)
    state, plans = new_state(limits), [new_plan(limits), new_plan(limits)]
    slots = [add_request(state, number, 5, 30, 0, 0) for number in range(5)]
    run_step(state, plans[0])
    for plan in plans:
        schedule(state, plan)
    found = [plan.slot[: plan.counts[PLAN_SIZE]].tolist() for plan in plans]
    assert found == [slots[:3], slots[3:]]
    third = new_plan(limits)
    schedule(state, third)
    assert third.counts[PLAN_SIZE] == 0


def test_a_step_serves_running_requests_before_it_admits_waiting_ones() -> None:
    state, plan = new_state(pool()), new_plan(pool())
    first = add_request(state, 1, 20, 30, 0, 0)
    run_step(state, plan)
    add_request(state, 2, 40, 50, 0, 0)
    schedule(state, plan)
    assert plan.slot[0] == first
    assert plan.num_tokens[:2].tolist() == [1, 31]


def test_a_long_prompt_is_computed_in_chunks_and_samples_only_at_its_end() -> None:
    state, plan = new_state(pool(max_num_batched_tokens=10)), new_plan(pool())
    add_request(state, 1, 25, 26, 0, 0)
    chunks = []
    while True:
        schedule(state, plan)
        chunks.append((int(plan.num_tokens[0]), bool(plan.samples[0])))
        commit(state, plan)
        if plan.counts[PLAN_FINISHED]:
            break
    assert chunks == [(10, False), (10, False), (5, True)]


def test_without_chunked_prefill_a_prompt_waits_for_a_step_that_holds_it() -> None:
    limits = pool(enable_chunked_prefill=False, max_num_batched_tokens=64)
    state, plan = new_state(limits), new_plan(limits)
    add_request(state, 1, 40, 45, 0, 0)
    add_request(state, 2, 30, 35, 0, 0)
    schedule(state, plan)
    assert plan.num_tokens[: plan.counts[PLAN_SIZE]].tolist() == [40]
    commit(state, plan)
    schedule(state, plan)
    assert plan.num_tokens[: plan.counts[PLAN_SIZE]].tolist() == [1, 30]


def test_the_request_admitted_last_is_preempted_and_computed_again() -> None:
    limits = pool(num_kv_blocks=16, max_num_batched_tokens=64)
    state, plan = new_state(limits), new_plan(limits)
    add_request(state, 1, 30, 60, 0, 0)
    add_request(state, 2, 30, 60, 0, 0)
    finished: list[int] = []
    while len(finished) < 2:
        finished += run_step(state, plan)
        check_conservation(state)
    assert finished == [1, 2]
    assert state.counts[NUM_PREEMPTIONS] >= 1


def test_equal_prefixes_share_blocks_and_the_last_token_is_always_computed() -> None:
    state, plan = new_state(pool(), hashes=np.array([11, 22, 33, 44], np.int64)), new_plan(pool())
    add_request(state, 1, 16, 17, 0, 4)
    run_step(state, plan)
    second = add_request(state, 2, 16, 17, 0, 4)
    schedule(state, plan)
    assert state.num_cached_tokens[second] == 12
    assert plan.start[0] == 12
    assert plan.num_tokens[0] == 4


def test_the_lowest_priority_number_goes_first_and_of_equal_ones_who_came_first() -> None:
    limits = pool(scheduling="priority", max_num_seqs=1)
    state, plan = new_state(limits, slots=8), new_plan(limits)
    for number, priority in enumerate([2, 0, 1, 0, -1]):
        add_request(state, number, 4, 5, 0, 0, priority)
    finished = [request for _ in range(5) for request in run_step(state, plan)]
    assert finished == [4, 1, 3, 2, 0]


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), policy=st.sampled_from(POLICIES))
def test_by_priority_nobody_is_preempted_for_one_of_less_urgency(seed: int, policy: str) -> None:
    rng = np.random.default_rng(seed)
    limits = pool(scheduling="priority", num_kv_blocks=16)
    state, plan = new_state(limits, policy=policy, slots=40), new_plan(limits)
    for number in range(20):
        prompt = int(rng.integers(1, 40))
        add_request(state, number, prompt, prompt + int(rng.integers(1, 20)), 0, 0, int(rng.integers(0, 3)))
    finished = preempted = 0
    for _ in range(2000):
        schedule(state, plan)
        gone = plan.preempted[: plan.counts[PLAN_PREEMPTED]].tolist()
        stays = [(state.priority[slot], state.arrival[slot]) for slot in running(state)]
        assert all(max(stays, default=(-1, 0)) < (state.priority[slot], state.arrival[slot]) for slot in gone)
        commit(state, plan)
        check_conservation(state)
        finished += int(plan.counts[PLAN_FINISHED])
        preempted += len(gone)
    assert finished == 20, "somebody waits for ever"
    assert preempted == state.counts[NUM_PREEMPTIONS]


def test_growing_keeps_the_queue_in_order() -> None:
    state, plan = new_state(pool(max_num_seqs=1)), new_plan(pool(max_num_seqs=1))
    for number in range(2):
        add_request(state, number, 4, 5, 0, 0)
    run_step(state, plan)
    add_request(state, 2, 4, 5, 0, 0)
    assert add_request(state, 3, 4, 5, 0, 0) == -1
    state = grow(state)
    add_request(state, 3, 4, 5, 0, 0)
    finished: list[int] = []
    while state.counts[NUM_WAITING]:
        finished += run_step(state, plan)
    assert finished == [1, 2, 3]


@pytest.mark.parametrize("accepted", [1, 3])
def test_a_step_that_accepts_several_tokens_moves_on_by_that_many(accepted: int) -> None:
    state, plan = new_state(pool()), new_plan(pool())
    slot = add_request(state, 1, 8, 8 + 3 * accepted, 0, 0)
    schedule(state, plan)
    plan.accepted[0] = accepted
    commit(state, plan)
    assert state.num_tokens[slot] == 8 + accepted
    assert state.num_computed_tokens[slot] == 8 + accepted - 1
