"""The engine: requests in, tokens out, one step at a time.

    engine = Engine(deployment, model_dir)
    engine.add(Request(0, prompt_token_ids, SamplingParams(max_tokens=32)))
    while engine.has_work:
        for output in engine.step(): ...

A step is the scheduler's plan, computed by the ranks, sampled, and committed. Not thread-safe: one thread drives it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .adapters import BadAdapter
from .batch import ALL_LOGITS, ARGMAX, LOGITS, TARGET
from .device import check_gpus
from .draft_shape import check_same_tokens
from .engine_adapters import EngineAdapters
from .engine_stats import EngineStats, StepRecord
from .launch import Launch
from .memory import check_memory, give_back_compiler, give_back_freed_memory
from .model_shape import ModelShape, resolve_model
from .parallel import Layout, RankFailed
from .peers import Peers
from .proposals import Proposals
from .rank import OtherRanks, Rank, RanksOfOthers, file_store
from .request import FinishReason, KeptLogits, Output, Request, checked_prompt
from .runnable import check_runnable, fields_that_need_new_replicas
from .sampler import BadRequest, Sampler, SamplingParams, TokenLogprobs
from .scheduler import abort, add_request
from .scheduler_state import (
    NUM_RUNNING,
    NUM_WAITING,
    PLAN_ADMITTED,
    PLAN_COPIES,
    PLAN_FINISHED,
    PLAN_SIZE,
    PLAN_TOKENS,
    Plan,
    change_limits,
    grow,
    new_plan,
    new_state,
)
from .scheduler_totals import stats_of
from .spec import CPU, BadSpec, Deployment, Pool
from .speculation import sampled_places
from .step_calls import StepCalls
from .token_store import TokenStore

__all__ = [
    "BadAdapter",
    "BadRequest",
    "Engine",
    "EngineStats",
    "FinishReason",
    "KeptLogits",
    "Output",
    "Request",
    "SamplingParams",
    "StepRecord",
    "TokenLogprobs",
]


class _Flight(NamedTuple):
    """A step that has begun and is not committed.

    number     of the plan and of the rank's batch, which are its own meanwhile
    each       (sampling rows,) tokens that each of the plan's samples: 1, and 1 for each of its proposals
    slots      (places,) request of each token that is sampled
    generated  (places,) tokens of the answer before it
    """

    number: int
    each: NDArray[np.int64]
    slots: NDArray[np.int64]
    generated: NDArray[np.int64]
    head: int
    started_s: float


class Engine:
    """One replica of a deployment on this machine. It sets torch's threads for the whole process.

    Args:
        deployment: one mixed pool, on the CPU or on GPUs; `replicas` is the business of whoever starts engines.
        model_dir: what `resolve_model(deployment.model)` gives.
        launch: the ranks that were started from outside, of which this is rank 0; left out: the engine starts its own.
        keep_logits: put the logits of every computed token into `kept_logits`, for tests and for perplexity.

    Raises: BadSpec: a field that this engine cannot honor, or more memory than there is; BadModel; BadAdapter; BadTile;
        RankFailed.
    """

    def __init__(
        self, deployment: Deployment, model_dir: Path, *, launch: Launch | None = None, keep_logits: bool = False
    ) -> None:
        self.shape = ModelShape.load(model_dir)
        check_runnable(deployment, self.shape)
        self.pool = self._built = deployment.pool
        self._policy = deployment.scheduler_policy
        if launch is not None:
            launch.check(self.pool)
        if self.pool.draft_model:
            check_same_tokens(resolve_model(self.pool.draft_model), model_dir)
        ranks = None if launch is None else launch.local
        check_gpus(self.pool, ranks)
        check_memory(self.shape, self.pool, replicas=1, ranks=ranks)
        self.kept_logits: list[KeptLogits] = []
        self._keep_logits = keep_logits
        self.log_rows = False
        self._others: OtherRanks | RanksOfOthers | None = None
        self._failed: RankFailed | None = None
        peers = None
        try:
            layout = Layout.of(self.pool)
            if launch is not None and layout.size > 1:
                self._others = RanksOfOthers(launch)
                peers = Peers(self._others.store, 0, layout, launch.address(), nccl=self.pool.accelerator != CPU)
            elif layout.size > 1:
                self._others = OtherRanks(self.pool, model_dir, self.shape)
                store = file_store(self._others.folder, self.pool)
                peers = Peers(store, 0, layout, nccl=self.pool.accelerator != CPU)
            self._rank = Rank(self.pool, self.shape, model_dir, peers)
            if self._others is not None:
                self._others.wait_until_loaded()
            self._rank.capture()
            self._adapters = EngineAdapters(self._rank, self.pool.max_loras)
            self._reset()
            self._warm_up()
            give_back_freed_memory()  # what Numba's compiler took, where its cache was empty: about 280 MB
            give_back_compiler()
            for adapter in deployment.adapters:
                self.load_adapter(adapter.name, Path(adapter.path))
        except BaseException:
            self.close()
            raise

    def _reset(self) -> None:
        self._store = TokenStore(self.pool.block_size)
        self._state = new_state(self.pool, policy=self._policy, hashes=self._store.hashes)
        self._plans = [new_plan(self.pool) for _ in self._rank.batches]
        self._flights: deque[_Flight] = deque()
        self._begun = 0
        slots = len(self._state.request_id)
        races = bool(self.pool.draft_model)
        self._sampler = Sampler(slots, self.shape.vocab_size, self.shape.eos_token_ids, races=races)
        self._num_cached = np.zeros(slots, np.int64)
        self._full = np.zeros((self.pool.max_num_seqs, 2), np.int64)
        self._proposals = Proposals(self.pool, self._rank, slots)
        self._bind()
        self._slot_of: dict[int, int] = {}
        self._aborted: list[Output] = []
        self._leaving: set[int] = set()  # slots of requests that were aborted while a step computed them
        self._steps = 0
        self.last_step: StepRecord | None = None
        self.last_admitted: list[int] = []

    def _bind(self) -> None:
        """Every time that an array of a step was replaced by a longer one."""
        proposals = self._proposals
        self._calls = [
            StepCalls(
                self._state, plan, self._store.tokens, batch.wire, self._num_cached, self._full, proposals.counts,
                proposals.by_position,
            )
            for plan, batch in zip(self._plans, self._rank.batches)
        ]  # fmt: skip

    def _warm_up(self) -> None:
        """Prefill and decode once, then forget it: the first request shall not wait for Numba, threads and memory."""
        keep, self._keep_logits = self._keep_logits, False
        tokens = np.zeros(max(1, min(4, self.pool.max_model_len - 2)), np.int32)
        answer = 2 + self.pool.num_speculative_tokens
        self.add(Request(0, tokens, SamplingParams(max_tokens=answer, ignore_eos=True, temperature=0)))
        while self.has_work:
            self.step()
        self._reset()
        self._keep_logits = keep

    def add(self, request: Request) -> None:
        """Queue a request. Its answer ends at max_model_len if max_tokens would go beyond.

        Raises: BadRequest: an id in use, an empty prompt or one of max_model_len tokens or more, an unknown token.
            BadAdapter: it is not loaded, or its files are no longer what they were when it was.
        """
        prompt = checked_prompt(request, self._slot_of, self.pool.max_model_len, self.shape.vocab_size)
        adapter = self._adapters.number(request.adapter)
        max_num_tokens = min(len(prompt) + request.sampling.max_tokens, self.pool.max_model_len)
        unit = self._store.hold(max_num_tokens)
        if self._store.hashes is not self._state.hashes:
            self._state = self._state._replace(hashes=self._store.hashes)
            self._bind()
        first = unit * self.pool.block_size
        self._store.tokens[first : first + len(prompt)] = prompt
        num_hashes = len(prompt) // self.pool.block_size if self.pool.enable_prefix_caching else 0
        self._store.hash_blocks(unit, 0, num_hashes)
        row = (request.request_id, len(prompt), max_num_tokens, unit, num_hashes, request.priority, adapter)
        slot = add_request(self._state, *row)
        if slot < 0:
            self._grow()
            slot = add_request(self._state, *row)
        self._adapters.begin(adapter)
        self._sampler.put(slot, request.sampling)
        self._slot_of[request.request_id] = slot

    def load_adapter(self, name: str, folder: Path) -> None:
        """Let requests name an adapter.

        Raises: BadAdapter: it does not fit this base, the name is taken, or the deployment takes no adapters.
        """
        self._adapters.load(name, folder)

    def unload_adapter(self, name: str) -> bool:
        """Let no more requests name it; those that do go on. False: there is no such adapter."""
        return self._adapters.unload(name)

    def _grow(self) -> None:
        self._state = grow(self._state)
        slots = len(self._state.request_id)
        self._sampler.grow(slots)
        more = slots - len(self._num_cached)
        self._num_cached = np.concatenate([self._num_cached, np.zeros(more, np.int64)])
        self._proposals.grow(slots)
        self._bind()

    def abort(self, request_id: int) -> bool:
        """End a request whose answer nobody wants; the next step reports it as "abort". False: no such request."""
        slot = self._slot_of.get(request_id)
        if slot is None:
            return False
        cached = int(self._num_cached[slot])
        self._aborted.append(Output(request_id, (), None, "abort", cached, self._proposals.of(slot)))
        del self._slot_of[request_id]
        if abort(self._state, slot):
            self._free(slot)
        else:
            self._leaving.add(slot)
        return True

    def change(self, pool: Pool) -> None:
        """Go on with other limits and tiles, from the next step on; requests that run stay.

        Raises: BadSpec, BadTile, and nothing changed: what only a new engine can do.
        """
        fields = fields_that_need_new_replicas(self._built, pool)
        if fields:
            raise BadSpec(fields[0], getattr(pool, fields[0]), "what this engine was built with", "start another")
        if pool.tiles != self.pool.tiles:
            self._rank.use_tiles(pool.tiles)
        change_limits(self._state, pool)
        self.pool = pool

    @property
    def capture_s(self) -> float:
        """Seconds that capturing decode steps as CUDA graphs took at the start; 0 where none are."""
        return self._rank.capture_s

    @property
    def num_waiting(self) -> int:
        """Requests that are queued, and not admitted."""
        return int(self._state.counts[NUM_WAITING])

    @property
    def has_work(self) -> bool:
        """Whether a step would bring something."""
        counts = self._state.counts
        return bool(counts[NUM_RUNNING] + counts[NUM_WAITING] > 0 or self._aborted)

    def step(self) -> list[Output]:
        """Plan, compute and commit one step; what it brought, one Output for each request that got a token or ended.

        With several pipeline stages as many steps as there are stages are under way, and the oldest of them is ended.

        Raises: RankFailed: a rank is gone; every later step raises it, too.
        """
        if self._failed is not None:
            raise self._failed
        outputs, self._aborted = self._aborted, []
        self.last_admitted = []
        try:
            while len(self._flights) < len(self._plans) and self._begin():
                pass
            if not self._flights:
                return outputs
            flight = self._flights.popleft()
            result = self._rank.result(flight.number)
        except RuntimeError as error:
            if self._others is None:
                raise
            self._failed = error if isinstance(error, RankFailed) else self._others.explain(error)
            raise self._failed from error
        state, plan, slots = self._state, self._plans[flight.number], flight.slots
        calls = self._calls[flight.number]
        rows = int(plan.counts[PLAN_SIZE])
        tokens, logprobs = self._sampled(result, flight, plan)
        calls.keep_agreed(tokens, self._sampler.ends(slots, tokens))
        if flight.head == ALL_LOGITS:
            self._keep(result, plan)
        for slot, last in self._full[: calls.append_tokens(tokens)].tolist():
            self._store.hash_blocks(int(state.hash_start[slot]), int(state.num_hashes[slot]), last)
            state.num_hashes[slot] = last
        calls.commit()
        ended = set(plan.finished[: plan.counts[PLAN_FINISHED]].tolist())
        outputs += self._outputs(flight, plan, tokens.tolist(), logprobs, ended)
        for slot in ended:
            if slot in self._leaving:
                self._leaving.remove(slot)
            else:
                del self._slot_of[int(state.request_id[slot])]
            self._free(slot)
        self._steps += 1
        seconds = time.perf_counter() - flight.started_s
        decode_context, prefill_pairs = calls.work()
        num_tokens = int(plan.counts[PLAN_TOKENS])
        self.last_step = StepRecord(
            num_tokens, rows, len(slots), decode_context, prefill_pairs, seconds, flight.started_s, *self._rows_of(plan)
        )
        return outputs

    def _rows_of(self, plan: Plan) -> tuple[tuple[int, ...], ...]:
        if not self.log_rows:
            return ()
        rows = int(plan.counts[PLAN_SIZE])
        of_rows = (self._state.request_id[plan.slot[:rows]], plan.start[:rows], plan.num_tokens[:rows])
        return tuple(tuple(each.tolist()) for each in of_rows)

    def _outputs(
        self, flight: _Flight, plan: Plan, tokens: list[int], logprobs: list[TokenLogprobs | None], ended: set[int]
    ) -> Iterator[Output]:
        """What a committed step brought the requests that sampled; of each row's places the first ones were kept."""
        rows = np.flatnonzero(plan.samples[: plan.counts[PLAN_SIZE]])
        kept, stopped = plan.accepted[rows].tolist(), plan.stopped[rows].tolist()
        firsts = np.cumsum(flight.each) - flight.each
        slots = flight.slots[firsts]
        ids, cached = self._state.request_id[slots].tolist(), self._num_cached[slots].tolist()
        for row, (slot, first) in enumerate(zip(slots.tolist(), firsts.tolist())):
            if slot in self._leaving:
                continue
            reason: FinishReason | None = None
            if slot in ended:
                reason = "stop" if stopped[row] else "length"
            last = first + kept[row]
            told = tuple(each for each in logprobs[first:last] if each is not None) or None
            token_ids = tuple(tokens[first:last])
            yield Output(ids[row], token_ids, told, reason, cached[row], self._proposals.of(slot))

    def _begin(self) -> bool:
        """Plan the next step and have it computed; False where there is nothing to compute."""
        started_s = time.perf_counter()
        index = self._begun % len(self._plans)
        state, plan = self._state, self._plans[index]
        self._proposals.ask(state, self._store.tokens)
        self._calls[index].schedule()
        rows = int(plan.counts[PLAN_SIZE])
        if rows == 0:
            assert plan.counts[PLAN_COPIES] == 0, "copies are made by the step that they belong to"
            return False
        # those admitted stand last in the plan
        first_admitted = rows - int(plan.counts[PLAN_ADMITTED])
        self.last_admitted += state.request_id[plan.slot[first_admitted:rows]].tolist()
        each, slots, generated = sampled_places(state, plan)
        head = ARGMAX if self._sampler.argmax_will_do(slots, generated) else LOGITS
        head = ALL_LOGITS if self._keep_logits else head
        if self._others is not None:
            self._others.check()
        if plan.counts[PLAN_ADMITTED]:
            self._adapters.fill_slots(state)
        self._proposals.draft(state, plan, self._store.tokens, self._sampler)
        used = self._calls[index].write_wire(head, TARGET)
        self._rank.begin(index, used)
        self._flights.append(_Flight(index, each, slots, generated, head, started_s))
        self._begun += 1
        return True

    def _sampled(
        self, result: Tensor, flight: _Flight, plan: Plan
    ) -> tuple[NDArray[np.int64], list[TokenLogprobs | None]]:
        """Tokens (and log-probabilities, where any are wanted) at the places of a step that are sampled."""
        if flight.head == ARGMAX:
            return np.ascontiguousarray(result.numpy()), []
        if flight.head == ALL_LOGITS:
            ends = np.cumsum(plan.num_tokens[: plan.counts[PLAN_SIZE]])[plan.samples[: plan.counts[PLAN_SIZE]]]
            before = np.cumsum(flight.each) - flight.each
            places = np.repeat(ends - flight.each - before, flight.each) + np.arange(len(flight.slots))
            result = result[torch.from_numpy(places)]
        with torch.inference_mode():
            return self._sampler.sample(result, flight.slots, flight.generated)

    def _keep(self, logits: Tensor, plan: Plan) -> None:
        """Keep the logits of every token of the step but rejected proposals."""
        rows = int(plan.counts[PLAN_SIZE])
        ends = np.cumsum(plan.num_tokens[:rows])
        for row, end in enumerate(ends.tolist()):
            start, count = int(plan.start[row]), int(plan.num_tokens[row])
            request_id = int(self._state.request_id[plan.slot[row]])
            rejected = int(plan.num_drafts[row] + 1 - plan.accepted[row])
            self.kept_logits.append(KeptLogits(request_id, start, logits[end - count : end - rejected]))

    def _free(self, slot: int) -> None:
        self._proposals.end(slot)
        self._adapters.end(int(self._state.adapter[slot]))
        self._store.give_back(int(self._state.hash_start[slot]), int(self._state.max_num_tokens[slot]))

    def stats(self) -> EngineStats:
        """Counts since the engine began, and what it holds now. Cached blocks that nobody holds are not in use."""
        proposals = self._proposals
        return stats_of(self._state, self._steps, proposals.total(), proposals.accepted_by_position())

    def close(self) -> None:
        """End the other ranks. The engine is of no more use."""
        if self._others is not None:
            self._others.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
