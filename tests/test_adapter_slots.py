"""The scheduler with adapters: never more distinct ones than slots, nobody forgotten, engine and simulator alike."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.profiler.simulator import simulate
from paretune.profiler.step_parts import PARTS
from paretune.profiler.step_record import Recorder
from paretune.profiler.step_time import WORK_GRID, AdapterTimes, StepTables
from paretune.runtime.adapter_slots import NUM_FILLS, has_slot, hold_slot, new_adapter_slots, release_slot
from paretune.runtime.scheduler import abort, add_request, commit, schedule
from paretune.runtime.scheduler_state import (
    NUM_RUNNING,
    NUM_WAITING,
    PLAN_FINISHED,
    PLAN_SIZE,
    POLICIES,
    WAITING_HEAD,
    State,
    grow,
    new_plan,
    new_state,
)
from paretune.runtime.spec import Pool
from paretune.traces.trace import Labels, PrefixHashes, Trace

from .test_explain import limits_of


def pool(**changes: object) -> Pool:
    limits = {
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "block_size": 4,
        "num_kv_blocks": 24,
    }
    return Pool.model_validate({**limits, "max_loras": 2, **changes})


def add(state: State, request_id: int, adapter: int, prompt: int = 4, answer: int = 3, priority: int = 0) -> int:
    return int(add_request(state, request_id, prompt, prompt + answer, 0, 0, priority, adapter))


def running(state: State) -> list[int]:
    return state.request_id[state.running[: state.counts[NUM_RUNNING]]].tolist()


def waiting(state: State) -> list[int]:
    head, size = int(state.counts[WAITING_HEAD]), len(state.waiting)
    slots = [int(state.waiting[(head + i) % size]) for i in range(int(state.counts[NUM_WAITING]))]
    return state.request_id[slots].tolist()


def test_the_idle_slot_used_least_recently_is_taken() -> None:
    slots = new_adapter_slots(2)
    assert hold_slot(slots, 7) == 0
    assert hold_slot(slots, 8) == 1
    assert not has_slot(slots, 9)
    assert has_slot(slots, 7)
    assert has_slot(slots, 0)
    release_slot(slots, 0)
    release_slot(slots, 1)
    assert hold_slot(slots, 7) == 0  # still there: nothing is filled
    assert slots.counts[NUM_FILLS] == 2
    release_slot(slots, 0)
    assert hold_slot(slots, 9) == 1
    assert slots.number.tolist() == [7, 9]
    assert slots.counts[NUM_FILLS] == 3
    assert hold_slot(slots, 0) == -1


def test_a_request_whose_adapter_finds_no_slot_waits_and_others_pass_in_their_order() -> None:
    state, plan = new_state(pool()), new_plan(pool())
    for request_id, adapter in enumerate([1, 2, 3, 0, 4, 2]):
        add(state, request_id, adapter)
    schedule(state, plan)
    assert running(state) == [0, 1, 3, 5]
    assert waiting(state) == [2, 4]
    assert state.adapter_slot[state.running[:4]].tolist() == [0, 1, -1, 1]
    for _ in range(3):
        commit(state, plan)
        schedule(state, plan)
    assert running(state) == [2, 4]  # adapters 1 and 2 are idle now
    assert waiting(state) == []


def test_without_slots_and_adapters_the_queue_is_first_come_first_served() -> None:
    state, plan = new_state(pool(max_loras=0)), new_plan(pool(max_loras=0))
    for request_id in range(6):
        add(state, request_id, 0)
    schedule(state, plan)
    assert running(state) == [0, 1, 2, 3]
    assert waiting(state) == [4, 5]


@pytest.mark.parametrize("policy", POLICIES)
def test_who_was_passed_keeps_its_place_by_priority_too(policy: str) -> None:
    its = pool(max_loras=1, scheduling="priority")
    state, plan = new_state(its, policy=policy), new_plan(its)
    for request_id, (adapter, priority) in enumerate([(1, 0), (2, -1), (1, 2), (0, 1), (2, 0)]):
        add(state, request_id, adapter, priority=priority)
    schedule(state, plan)
    # request 1 goes first and takes the only slot; 0 and 2 wait for it, and those behind them pass
    assert running(state) == [1, 4, 3]
    assert waiting(state) == [0, 2]
    add(state, 5, 1, priority=-2)
    assert waiting(state) == [5, 0, 2]
    while state.counts[NUM_RUNNING] > 0 and running(state)[0] in (1, 4, 3):
        commit(state, plan)
        schedule(state, plan)
    assert running(state) == [5, 0, 2]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_step_has_more_adapters_than_slots_and_everybody_ends(data: st.DataObject) -> None:
    max_loras = data.draw(st.integers(1, 3))
    policy = data.draw(st.sampled_from(POLICIES))
    kinds = [{}, {"admission": "first_chunk"}]
    kinds += [{"preemption": "swap", "host_kv_blocks": 16}] if policy == "paretune" else []
    its = pool(
        max_loras=max_loras,
        max_num_seqs=data.draw(st.integers(1, 6)),
        num_kv_blocks=data.draw(st.integers(16, 24)),
        scheduling=data.draw(st.sampled_from(["fcfs", "priority"])),
        **data.draw(st.sampled_from(kinds)),
    )
    state, plan = new_state(its, policy=policy), new_plan(its)
    live: dict[int, int] = {}  # request id -> slot
    wanted: dict[int, int] = {}
    request = st.tuples(st.integers(0, 5), st.integers(1, 40), st.integers(1, 20), st.integers(-1, 1))
    asked = data.draw(st.lists(request, max_size=25))
    ended = 0
    for step in range(3000):
        if step < len(asked):
            adapter, prompt, answer, priority = asked[step]
            slot = add(state, step, adapter, prompt, answer, priority)
            if slot < 0:
                state = grow(state)
                slot = add(state, step, adapter, prompt, answer, priority)
            live[step], wanted[step] = slot, adapter
            if step % 7 == 6:
                victim = min(live)
                abort(state, live.pop(victim))
                ended += 1
        schedule(state, plan)
        slots = plan.slot[: plan.counts[PLAN_SIZE]]
        for slot in slots.tolist():
            adapter = wanted[int(state.request_id[slot])]
            place = int(state.adapter_slot[slot])
            assert (place == -1) if adapter == 0 else (state.adapter_slots.number[place] == adapter)
        assert len({int(state.adapter[slot]) for slot in slots} - {0}) <= max_loras
        users = np.zeros(max_loras, np.int64)
        for slot in state.running[: state.counts[NUM_RUNNING]]:
            if state.adapter_slot[slot] >= 0:
                users[state.adapter_slot[slot]] += 1
        assert users.tolist() == state.adapter_slots.num_running.tolist()
        commit(state, plan)
        for slot in plan.finished[: plan.counts[PLAN_FINISHED]].tolist():
            del live[int(state.request_id[slot])]
            ended += 1
        if step >= len(asked) and not live:
            break
    assert ended == len(asked)
    assert state.adapter_slots.num_running.tolist() == [0] * max_loras


def tables(step_s: float) -> StepTables:
    """Every step takes as long, whatever it computes."""
    free = np.zeros(len(WORK_GRID))
    return StepTables(np.full(65, step_s), np.zeros(5), np.zeros(5), free, free, np.zeros(2))


def trace(adapters: list[str | None], hashes: list[int] | None = None) -> Trace:
    n = len(adapters)
    return Trace(
        arrival_s=np.arange(n) * 1.0,
        input_tokens=np.full(n, 32),
        output_tokens=np.full(n, 16),
        adapter=Labels.of(adapters),
        prefix=None if hashes is None else PrefixHashes.of([hashes] * n, 16),
    )


def test_the_simulator_lets_adapters_wait_for_their_slots() -> None:
    its = pool(max_loras=1, max_num_batched_tokens=64, num_kv_blocks=99)
    alike = simulate(trace(["a"] * 4), its, tables(1.0))
    apart = simulate(trace(["a", "b", "c", "d"]), its, tables(1.0))
    assert np.all(np.diff(alike.times.first_token_s) < 4)
    assert np.diff(apart.times.first_token_s).tolist() == [16.0] * 3  # one after the other, 16 tokens of 1 s each


TOKEN_S, READ_S, FILL_S = 1e-3, 0.05, 0.4


@pytest.mark.parametrize(("adapters", "distinct"), [(["a"], 1), (["a", "a"], 1), (["a", "b"], 2), ([None, "a"], 1)])
def test_adapters_take_their_time_by_token_by_adapter_and_by_slot_filled(
    adapters: list[str | None], distinct: int
) -> None:
    """All at once: one step of 32 prompt tokens each, then 15 of one token each; every step takes 1 s besides."""
    its = pool(max_loras=2, max_num_batched_tokens=64, num_kv_blocks=99, enable_prefix_caching=False)
    times = tables(1.0)._replace(adapters=AdapterTimes(TOKEN_S, READ_S, FILL_S))
    asked = replace(trace(adapters), arrival_s=np.zeros(len(adapters)))
    adapted = sum(name is not None for name in adapters)
    first_s = 1.0 + distinct * (READ_S + FILL_S) + 32 * adapted * TOKEN_S
    later_s = 1.0 + distinct * READ_S + adapted * TOKEN_S
    for jump in (True, False):
        found = simulate(asked, its, times, jump=jump).times
        assert found.first_token_s.tolist() == pytest.approx([first_s] * len(adapters))
        assert found.end_s.tolist() == pytest.approx([first_s + 15 * later_s] * len(adapters))


def test_jumps_and_recordings_see_what_adapters_take() -> None:
    its = pool(max_loras=2, max_num_seqs=4, max_num_batched_tokens=64, num_kv_blocks=40)
    times = tables(1.0)._replace(adapters=AdapterTimes(TOKEN_S, READ_S, FILL_S))
    names = [("a", "b", "c", None)[i] for i in np.random.default_rng(0).integers(0, 4, 60)]
    asked = trace(names)
    fast, slow = (simulate(asked, its, times, jump=jump) for jump in (True, False))
    np.testing.assert_allclose(fast.times.end_s, slow.times.end_s, rtol=1e-12)
    recorder = Recorder(limits_of(times))
    seen = simulate(asked, its, times, recorder=recorder)
    np.testing.assert_allclose(seen.times.end_s, slow.times.end_s, rtol=1e-12)
    assert recorder.record is not None
    parts = recorder.record.parts[:, PARTS.index("adapters")].sum(axis=1)
    assert (parts[[name is not None for name in names]] > 0).all()


def test_the_simulator_shares_prefixes_under_one_adapter_only() -> None:
    its = pool(max_loras=2, max_num_batched_tokens=64, num_kv_blocks=99)
    alike = simulate(trace(["a", "a", None, None], [11, 12]), its, tables(0.01))
    apart = simulate(trace(["a", "b", None, "a"], [11, 12]), its, tables(0.01))
    base = simulate(trace(["a", "b", None, "a"], [11, 12]), its.model_copy(update={"max_loras": 0}), tables(0.01))
    one_hit = alike.prefix_hit_tokens // 2
    assert one_hit > 0
    assert (apart.prefix_hit_tokens, base.prefix_hit_tokens) == (one_hit, 3 * one_hit)
