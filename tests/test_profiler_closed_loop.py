"""A closed loop of clients on made-up step times whose outcome has a closed form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from paretune.profiler.accelerator_step import BATCH_GRID, CONTEXT_GRID, TOKEN_GRID, GpuStep
from paretune.profiler.closed_loop import Host, Scheduler, Served, serve

NO_HOST = Host(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
MIXED = Scheduler(8192, 1024, chunked=True, prefill_first=False, reserves_output=False)
DECODE_S, PROMPT_S = 0.01, 0.1


def constant_steps() -> GpuStep:
    """A step without prompts takes 10 ms, one with prompts 100 ms, whatever is in it."""
    tokens, attention = np.zeros(len(TOKEN_GRID)), np.zeros((len(BATCH_GRID), len(CONTEXT_GRID)))
    return GpuStep(tokens + DECODE_S, tokens + PROMPT_S, tokens, attention, attention)


def served(
    clients: int, prompts: list[int], answers: list[int], scheduler: Scheduler = MIXED, kv_tokens: float = 1e9,
    host: Host = NO_HOST,
) -> Served:  # fmt: skip
    return serve(constant_steps(), scheduler, host, kv_tokens, clients, np.array(prompts), np.array(answers))


def test_one_client_waits_for_its_prompt_and_then_for_each_token() -> None:
    found = served(1, [100] * 5, [11] * 5)
    np.testing.assert_allclose(found.ttft_s, PROMPT_S)
    np.testing.assert_allclose(found.tpot_s, DECODE_S)


def test_the_host_adds_to_steps_and_to_requests() -> None:
    host = NO_HOST._replace(step_s=0.002, row_s=0.001, request_s=0.03)
    found = served(1, [100] * 3, [11] * 3, host=host)
    np.testing.assert_allclose(found.ttft_s, PROMPT_S + 0.003 + 0.06)
    np.testing.assert_allclose(found.tpot_s, DECODE_S + 0.003)


def test_prompts_of_one_length_run_in_step_for_ever() -> None:
    found = served(4, [100] * 12, [11] * 12)
    np.testing.assert_allclose(found.tpot_s, DECODE_S)  # nobody's prompt falls into another's answer


def test_prompts_of_others_stretch_the_steps_of_those_that_decode() -> None:
    found = served(2, [100, 100, 100], [21, 11, 1])
    # the second ends after 10 steps; the prompt of the third takes one of the first's other ten
    assert found.tpot_s[0] == pytest.approx((19 * DECODE_S + PROMPT_S) / 20)


def test_prompts_beyond_the_budget_wait_for_the_next_step() -> None:
    whole = Scheduler(150, 1024, chunked=False, prefill_first=False, reserves_output=True)
    np.testing.assert_allclose(np.sort(served(3, [100] * 3, [5] * 3, whole).ttft_s), PROMPT_S * np.array([1, 2, 3]))
    chunked = served(3, [100] * 3, [5] * 3, Scheduler(150, 1024, True, False, False))
    np.testing.assert_allclose(np.sort(chunked.ttft_s), PROMPT_S * np.array([1, 2, 3]))


def test_prompts_first_stop_all_decoding() -> None:
    first = Scheduler(100, 1024, chunked=True, prefill_first=True, reserves_output=False)
    found = served(2, [100, 100], [11, 11], first)
    # the second's prompt has a step of its own before the first decodes
    np.testing.assert_allclose(found.tpot_s, [(PROMPT_S + 10 * DECODE_S) / 10, DECODE_S])


def test_a_full_cache_admits_one_after_the_other() -> None:
    reserving = Scheduler(8192, 1024, chunked=False, prefill_first=False, reserves_output=True)
    found = served(2, [100, 100], [11, 11], reserving, kv_tokens=150)
    assert found.ttft_s[1] == pytest.approx(2 * PROMPT_S + 10 * DECODE_S)


def test_what_does_not_fit_later_is_computed_again_and_still_ends() -> None:
    found = served(2, [100, 100], [101, 101], kv_tokens=300)
    assert (found.tpot_s > 0).all()
    assert found.tpot_s[1] > 1.5 * found.tpot_s[0]  # the later one gave way


def test_the_door_is_looked_at_every_so_many_steps() -> None:
    seldom = Scheduler(8192, 1024, True, False, False, receive_every=10)
    host = NO_HOST._replace(door_s=0.001)
    late = served(2, [100, 100], [101, 101], seldom, host=host)
    assert late.ttft_s[1] > PROMPT_S + 5 * DECODE_S


def test_who_arrives_while_a_step_is_composed_ahead_waits_for_one_more() -> None:
    ahead = replace(MIXED, ahead=True)
    # the second ends after 10 steps, and the third arrives as the eleventh begins, which was composed before
    assert served(2, [100, 100, 100], [21, 11, 1]).ttft_s[2] == pytest.approx(PROMPT_S)
    assert served(2, [100, 100, 100], [21, 11, 1], ahead).ttft_s[2] == pytest.approx(DECODE_S + PROMPT_S)
    # 24 ms after the second ended, within a step: it joins the next one, or the one after
    late = NO_HOST._replace(request_s=0.012)
    joins_s = [served(2, [100] * 3, [101, 11, 1], each, host=late).ttft_s[2] for each in (MIXED, ahead)]
    np.testing.assert_allclose(joins_s, [3 * DECODE_S + PROMPT_S, 4 * DECODE_S + PROMPT_S])
    # into an empty engine nobody is late
    np.testing.assert_allclose(served(1, [100] * 3, [11] * 3, ahead).ttft_s, PROMPT_S)


def test_prompts_wait_for_company_while_others_decode() -> None:
    waiting = Scheduler(8192, 1024, chunked=False, prefill_first=False, reserves_output=True, wait_steps=5)
    alone, crowd = replace(waiting, wait_tokens=1000), replace(waiting, wait_tokens=101)
    assert served(2, [100, 100, 100], [21, 11, 1], alone).ttft_s[2] == pytest.approx(5 * DECODE_S + PROMPT_S)
    assert served(2, [100, 100, 100], [21, 11, 1], crowd).ttft_s[2] == pytest.approx(PROMPT_S)  # 100 tokens and a row
    np.testing.assert_allclose(served(1, [100] * 3, [11] * 3, alone).ttft_s, PROMPT_S)  # nobody decodes
    # who comes later waits with the first, not anew
    three = served(3, [100] * 5, [41, 11, 13, 1, 1], alone)
    np.testing.assert_allclose(three.ttft_s[3:], [5 * DECODE_S + PROMPT_S, 3 * DECODE_S + PROMPT_S])


def test_prompts_in_chunks_do_not_wait() -> None:
    with pytest.raises(ValueError, match="wait_steps"):
        replace(MIXED, wait_steps=5)


@pytest.mark.parametrize(
    "scheduler",
    [
        MIXED,
        Scheduler(500, 16, False, False, True),
        Scheduler(300, 64, True, True, False),
        Scheduler(300, 64, True, True, False, receive_every=7, ahead=True),
        Scheduler(500, 16, False, False, True, ahead=True, wait_steps=9, wait_tokens=450),
    ],
)
def test_every_request_ends(scheduler: Scheduler) -> None:
    rng = np.random.default_rng(0)
    found = served(16, list(rng.integers(50, 400, 160)), list(rng.integers(1, 60, 160)), scheduler, kv_tokens=3000)
    assert (found.ttft_s > 0).all()
    assert np.isfinite(found.tpot_s).all()
