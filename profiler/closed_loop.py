"""An engine that batches in flight, under a closed loop of clients, step by step on a virtual clock.

What published serving points are measured with: so many clients, each sending its next prompt when it has its answer.
Prompts that arrive together queue behind each other, and their prefills stretch the steps of those that decode; both
come out of the steps, not of a formula.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.jit import njit
from .accelerator_step import BATCH_GRID, CONTEXT_GRID, POINTS_PER_OCTAVE, TOKEN_GRID, GpuStep

Floats = NDArray[np.float64]
_LONGEST_JUMP = 32


@dataclass(frozen=True)
class Scheduler:
    """How an engine composes steps.

    max_num_batched_tokens  of a step
    max_num_seqs            rows of a step
    chunked                 a prompt may be cut where the budget ends; else it waits for a step that takes it whole
    prefill_first           prompts have steps of their own, before any decoding (SGLang); else they share steps
    reserves_output         a request is admitted where its longest answer fits too (TensorRT-LLM); else what does not
                            fit later is preempted and computed anew (vLLM)
    receive_every           steps between two looks at the door
    ahead                   a step is composed while the one before computes: who arrives in between waits for a step
                            more (ahead_loop.py)
    wait_steps, wait_tokens beside decoding, whole prompts wait for so many steps, or until a step has so many tokens
                            (TensorRT-LLM: batch_wait_timeout_iters, batch_wait_max_tokens_ratio of its budget)
    """

    max_num_batched_tokens: int
    max_num_seqs: int
    chunked: bool
    prefill_first: bool
    reserves_output: bool
    receive_every: int = 1
    ahead: bool = False
    wait_steps: int = 0
    wait_tokens: int = 0

    def __post_init__(self) -> None:
        if self.wait_steps and self.chunked:
            raise ValueError("wait_steps: prompts that wait are whole ones; allowed: 0 where they are chunked")


class Host(NamedTuple):
    """Seconds that the host adds.

    step_s     to each step, of its own time what the GPU does not hide
    row_s      to each step by its rows
    prompt_s   to a step with prompts, which is launched kernel by kernel
    launch_s   the least time of a step with prompts: launching all its kernels
    request_s  from the client until the scheduler has the request, and from its first token back
    door_s     of each request at the front end, one after the other (tokenizer, HTTP)
    """

    step_s: float
    row_s: float
    prompt_s: float
    launch_s: float
    request_s: float
    door_s: float


class Served(NamedTuple):
    """Per request, in the order sent: time to first token, and time per output token after it; seconds."""

    ttft_s: Floats
    tpot_s: Floats


class _Dense(NamedTuple):
    decode_s: Floats
    prefill_s: Floats
    samples_s: Floats
    decode_attention_s: Floats
    prefill_attention_s: Floats


def serve(
    step: GpuStep,
    scheduler: Scheduler,
    host: Host,
    kv_tokens: float,
    clients: int,
    input_tokens: NDArray[np.int64],
    output_tokens: NDArray[np.int64],
) -> Served:
    """Requests, in order, served to so many clients.

    Args:
        kv_tokens: that the cache holds; more than the longest request.
        input_tokens, output_tokens: (n,) of each request, >= 1.
    """
    most = max(scheduler.max_num_batched_tokens, int(input_tokens.max() + output_tokens.max())) + clients
    tokens = np.arange(most + 1, dtype=np.float64)
    rows = np.arange(clients + 1, dtype=np.float64)

    def by_rows(table: Floats) -> Floats:
        return np.stack([np.interp(rows, BATCH_GRID, column) for column in table.T], axis=1)

    def padded(table: Floats) -> Floats:
        beyond = np.maximum(1.0, tokens / TOKEN_GRID[-1])
        return np.asarray(np.interp(tokens, TOKEN_GRID, table) * beyond, np.float64)

    dense = _Dense(
        padded(step.decode_s),
        padded(step.prefill_s),
        padded(step.samples_s),
        by_rows(step.decode_attention_s),
        by_rows(step.prefill_attention_s),
    )
    flags = (scheduler.chunked, scheduler.prefill_first, scheduler.reserves_output, scheduler.ahead)
    seats = min(scheduler.max_num_seqs, clients)
    waits = (scheduler.receive_every, scheduler.wait_steps, scheduler.wait_tokens)
    limits = (scheduler.max_num_batched_tokens, seats, *waits)
    scratch = _scratch(input_tokens, clients)
    _serve(dense, limits, flags, host, float(kv_tokens), clients, input_tokens, output_tokens, scratch)
    ttft = scratch.first_s - scratch.sent_s + host.request_s
    return Served(ttft, (scratch.last_s - scratch.first_s) / np.maximum(output_tokens - 1, 1))


class _Scratch(NamedTuple):
    """By request unless said.

    goal       tokens to compute before the next answer token: the prompt, and what a preempted one had answered
    coming     requests on their way, in order of arrival at arrives_s
    running    (clients + 1,) rows of the step; chunk: tokens that each computes of its prompt
    queue      (2 n + 2,) requests at the door, from the middle on: preempted ones go before
    """

    sent_s: Floats
    first_s: Floats
    last_s: Floats
    arrives_s: Floats
    goal: NDArray[np.int64]
    computed: NDArray[np.int64]
    made: NDArray[np.int64]
    coming: NDArray[np.int64]
    running: NDArray[np.int64]
    chunk: NDArray[np.int64]
    queue: NDArray[np.int64]


def _scratch(input_tokens: NDArray[np.int64], clients: int) -> _Scratch:
    n = len(input_tokens)

    def counts(size: int = n) -> NDArray[np.int64]:
        return np.zeros(size, np.int64)

    rows = clients + 1
    return _Scratch(
        sent_s=np.zeros(n),
        first_s=np.zeros(n),
        last_s=np.zeros(n),
        arrives_s=np.zeros(n),
        goal=input_tokens.copy(),
        computed=counts(),
        made=counts(),
        coming=counts(),
        running=counts(rows),
        chunk=counts(rows),
        queue=counts(2 * n + 2),
    )


@njit
def _at(table: Floats, rows: int, context: float) -> float:
    place = min(max(math.log2(max(context, 1.0)) * POINTS_PER_OCTAVE, 0.0), table.shape[1] - 1.000001)
    low = int(place)
    left, right = CONTEXT_GRID[low], CONTEXT_GRID[low + 1]
    share = (context - left) / (right - left)
    return float(table[rows, low] + (table[rows, low + 1] - table[rows, low]) * share)


@njit
def _step_s(
    dense: _Dense,
    host: Host,
    new_tokens: int,
    prompts: int,
    pairs: float,
    decodes: int,
    context: float,
    samples: int,
) -> float:
    seconds = dense.samples_s[samples] if samples > 0 else 0.0
    if decodes > 0:
        seconds += _at(dense.decode_attention_s, decodes, context / decodes)
    of_host = host.step_s + host.row_s * (decodes + prompts)
    if prompts == 0:
        seconds += dense.decode_s[decodes]
    else:
        # prompts of as many query-key pairs, from their start
        seconds += _at(dense.prefill_attention_s, prompts, math.sqrt(2.0 * pairs / prompts))
        seconds = max(seconds + dense.prefill_s[new_tokens + decodes], host.launch_s)
        of_host += host.prompt_s
    return float(seconds + of_host)


@njit
def _serve(
    dense: _Dense,
    limits: tuple[int, int, int, int, int],
    flags: tuple[bool, bool, bool, bool],
    host: Host,
    kv_tokens: float,
    clients: int,
    input_tokens: NDArray[np.int64],
    output_tokens: NDArray[np.int64],
    scratch: _Scratch,
) -> None:
    budget_tokens, max_rows, receive_every, wait_steps, wait_tokens = limits
    chunked, prefill_first, reserves_output, ahead = flags
    total = input_tokens.shape[0]
    sent, first, last, arrives = scratch.sent_s, scratch.first_s, scratch.last_s, scratch.arrives_s
    goal, computed, made = scratch.goal, scratch.computed, scratch.made
    coming, running, chunk, queue = scratch.coming, scratch.running, scratch.chunk, scratch.queue
    head = 0
    tail = 0
    door = 0.0
    for client in range(min(clients, total)):
        coming[tail] = client
        door = max(door, host.request_s) + host.door_s
        arrives[tail] = door
        tail += 1
    following = tail
    queue_head = total
    queue_tail = total
    num_running = 0
    used = 0.0
    now = 0.0
    done = 0
    since = 0
    waited = 0
    began = 0.0  # the step before; the one composed while it computes saw who had arrived by then
    while done < total:
        if since >= receive_every or (num_running == 0 and queue_head == queue_tail):
            since = 0
            looked = began if ahead else now
            if num_running == 0 and queue_head == queue_tail and head < tail:
                now = max(now, arrives[head])
                looked = now
            while head < tail and arrives[head] <= looked:
                queue[queue_tail] = coming[head]
                queue_tail += 1
                head += 1
        # rows that decode come first, unless prompts have steps of their own
        decodes = 0
        context = 0.0
        open_prompts = 0
        for row in range(num_running):
            request = int(running[row])
            if computed[request] >= goal[request]:
                decodes += 1
                context += computed[request] + 1
            else:
                open_prompts += 1
        while not reserves_output and used + decodes > kv_tokens and num_running > 1:
            request = int(running[num_running - 1])
            num_running -= 1
            if computed[request] >= goal[request]:
                decodes -= 1
                context -= computed[request] + 1
            else:
                open_prompts -= 1
            used -= computed[request]
            goal[request] = input_tokens[request] + made[request]
            computed[request] = 0
            queue_head -= 1
            queue[queue_head] = request
        budget = budget_tokens if prefill_first else budget_tokens - decodes
        prompts = 0
        new_tokens = 0
        pairs = 0.0
        samples = 0
        for row in range(num_running):
            request = int(running[row])
            chunk[row] = 0
            left = int(goal[request] - computed[request])
            if left > 0 and budget > 0:
                take = min(left, budget)
                chunk[row] = take
                budget -= take
                prompts += 1
                new_tokens += take
                pairs += take * (computed[request] + 0.5 * (take + 1))
                samples += take == left
        was_running, was_head = num_running, queue_head
        claimed = used + new_tokens + decodes
        if reserves_output:
            claimed = 0.0
            for row in range(num_running):
                claimed += input_tokens[running[row]] + output_tokens[running[row]]
        while queue_head < queue_tail and num_running < max_rows and budget > 0:
            request = int(queue[queue_head])
            left = int(goal[request])
            needs = left + (output_tokens[request] if reserves_output else 0)
            if claimed + needs > kv_tokens and num_running > 0:
                break
            if not chunked and left > budget and (new_tokens > 0 or left <= budget_tokens - decodes):
                break
            take = min(left, budget) if chunked else left
            claimed += needs if reserves_output else take
            queue_head += 1
            running[num_running] = request
            chunk[num_running] = take
            num_running += 1
            budget -= take
            prompts += 1
            new_tokens += take
            pairs += take * 0.5 * (take + 1)
            samples += take == left
        if num_running == 0:
            if head < tail:
                now = max(now, arrives[head])
            began = now
            since = receive_every
            continue
        waits = prompts > 0 and decodes > 0 and waited < wait_steps and new_tokens + decodes < wait_tokens
        if waits:
            num_running, queue_head = was_running, was_head
            prompts = new_tokens = samples = 0
            pairs = 0.0
        elif prompts > 0:
            waited = 0
        decoding = decodes
        if prefill_first and prompts > 0:
            decoding = 0
        if not (prefill_first and prompts > 0):
            samples += decodes
        jump = 1
        context_read = context if decoding > 0 else 0.0
        seconds = _step_s(dense, host, new_tokens, prompts, pairs, decoding, context_read, samples)
        if prompts == 0:
            jump = _LONGEST_JUMP
            for row in range(num_running):
                jump = min(jump, int(output_tokens[running[row]] - made[running[row]]))
            if head < tail:
                # until somebody is at the door, and the door is looked at
                until = max(math.ceil((arrives[head] - now) / seconds) + int(ahead), receive_every - since, 1)
                jump = min(jump, until)
            if waits:
                jump = min(jump, wait_steps - waited)
            if not reserves_output:
                jump = min(jump, max(1, int((kv_tokens - used) // max(decodes, 1))))
            if jump > 1:
                seconds += _step_s(dense, host, 0, 0, 0.0, decodes, context + decodes * (jump - 1.0), samples)
                seconds *= 0.5 * jump
        if waits:
            waited += jump
        began = now + seconds * (1.0 - 1.0 / jump)
        now += seconds
        since += jump
        kept = 0
        for row in range(num_running):
            request = int(running[row])
            ended = False
            if computed[request] >= goal[request]:
                if decoding > 0:
                    computed[request] += jump
                    goal[request] = computed[request]
                    used += jump
                    made[request] += jump
                    ended = made[request] >= output_tokens[request]
            elif chunk[row] > 0:
                computed[request] += chunk[row]
                used += chunk[row]
                if computed[request] >= goal[request]:
                    if made[request] == 0:
                        first[request] = now
                    made[request] += 1
                    ended = made[request] >= output_tokens[request]
            chunk[row] = 0
            if ended:
                last[request] = now
                used -= computed[request]
                done += 1
                if following < total:
                    sent[following] = now + host.request_s
                    door = max(door, now + 2.0 * host.request_s) + host.door_s
                    arrives[tail] = door
                    coming[tail] = following
                    tail += 1
                    following += 1
            else:
                running[kept] = request
                kept += 1
        num_running = kept
