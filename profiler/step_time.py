"""How long one step takes: tables for the simulator, compiled together with the scheduler.

A step's time is the sum of what depends on its tokens (linear layers, norms, collectives, the host's share per step),
on its rows (the host's share per request), on its samples (vocabulary projection, sampling), and on attention over the
cached context: tokens read by decode rows, and query-key pairs computed by prefill rows. Each is one table, filled from
measurements or from a data sheet (tables.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.jit import njit
from ..runtime.adapter_slots import NO_ADAPTER
from ..runtime.scheduler_state import PLAN_COPIES, PLAN_FILLS, PLAN_SIZE, Plan, State
from ..runtime.spec import BadSpec
from .batch_time import BatchTables, scaled_batch

POINTS_PER_OCTAVE = 4
OCTAVES = 44

# Work of attention, in tokens read or query-key pairs: 2**0 ... 2**44, four points an octave.
WORK_GRID: NDArray[np.float64] = 2.0 ** (np.arange(OCTAVES * POINTS_PER_OCTAVE + 1) / POINTS_PER_OCTAVE)


# fields of StepTables that are no times of steps by their composition
NO_STEP_TIMES = ("request_s", "draft", "prompt_pairs", "batch", "block_copy_s", "adapters", "wake_s")

# Who has had nothing to do for so long finds other data in the caches, and cores asleep (docs/notes/prediction.md).
IDLE_S = 0.02


class PromptPairs(NamedTuple):
    """What attention of a row with several tokens takes beside its query-key pairs, in pairs that take as long.

    per_key     reading one cached key and value: a row takes no less than to read its context, however few its tokens
    per_cached  expanding one cached token's latent into keys and values of all heads (MLA); 0 of any other attention
    in_latent   of a pair that is computed in the latent instead, which needs no expansion; 1 of any other attention
    """

    per_key: float = 0.0
    per_cached: float = 0.0
    in_latent: float = 1.0


class AdapterTimes(NamedTuple):
    """What LoRA adapters add to a step, seconds.

    token_s  for each token that has an adapter: its low-rank products
    read_s   for each adapter that running requests have: its matrices are read
    fill_s   for each adapter that is put into a slot
    """

    token_s: float = 0.0
    read_s: float = 0.0
    fill_s: float = 0.0


class StepTables(NamedTuple):
    """Step time of one replica, everything in seconds.

    tokens_s             (max_num_batched_tokens + 1,)  by tokens in the step: linear layers, norms, collectives,
                         and the host per step
    rows_s               (max_num_seqs + 1,)  by requests in the step: host per request, and what a device reads for
                         each however long it is
    samples_s            (max_num_samples + 1,)  by places that are sampled, of every request one, and one more for each
                         proposal: vocabulary projection and sampling
    decode_attention_s   (len(WORK_GRID),)  by context tokens that rows of one token read, summed over rows
    prefill_attention_s  (len(WORK_GRID),)  by query-key pairs of rows with several tokens, summed over rows
    request_s            (2,)  outside the steps: from the scheduled arrival until the scheduler sees the request;
                         from a token's step until the client has the token
    draft                the same of the draft model's passes, where the pool has one; nothing outside the steps
    prompt_pairs         how rows with several tokens count in prefill_attention_s; measured tables: by their pairs
    batch                where step times by the whole batch are known: the simulator takes these, screening the sums
                         above
    block_copy_s         to move one KV block between device and host, either way, before the step that asks for it
    adapters             of LoRA adapters
    wake_s               from an arrival until a replica begins that had nothing to do for IDLE_S; measured of prompts
    """

    tokens_s: NDArray[np.float64]
    rows_s: NDArray[np.float64]
    samples_s: NDArray[np.float64]
    decode_attention_s: NDArray[np.float64]
    prefill_attention_s: NDArray[np.float64]
    request_s: NDArray[np.float64]
    draft: StepTables | None = None
    prompt_pairs: PromptPairs = PromptPairs()
    batch: BatchTables | None = None
    block_copy_s: float = 0.0
    adapters: AdapterTimes = AdapterTimes()
    wake_s: float = 0.0


@dataclass(frozen=True)
class ModeledStep:
    """Step times of one replica of a pool, and how far to trust them.

    measured        False: from a data sheet, not measured
    relative_error  half width of the 90 % interval of a step's time, as a share of it
    not_modeled    what the times leave out or assume, for people
    host_step_s    of every step's time: what the host takes between and around its operators, however large it is
    device_row_s   of rows_s for each request: what the device takes (windows and states that every row reads); the rest
                   is the host
    """

    tables: StepTables
    measured: bool
    relative_error: float
    not_modeled: tuple[str, ...]
    host_step_s: float = 0.0
    device_row_s: float = 0.0


def check_sums(where: str, *tables: StepTables) -> None:
    """Refuse step times that are known by the whole batch.

    Args:
        where: their parts are needed, for people.
    Raises: BadSpec.
    """
    if any(each.batch is not None for each in tables):
        raise BadSpec("step times", "known by the whole batch", f"sums of their parts, {where}")


def scaled(tables: StepTables, factor: float) -> StepTables:
    """All step times times a factor; what happens outside the steps stays."""
    parts = {name: table * factor for name, table in tables._asdict().items() if name not in NO_STEP_TIMES}
    return tables._replace(
        **parts,
        draft=None if tables.draft is None else scaled(tables.draft, factor),
        batch=None if tables.batch is None else scaled_batch(tables.batch, factor),
    )


@njit
def copies_s(tables: StepTables, plan: Plan) -> float:
    """Seconds that a plan's copies of KV blocks take, which are made before anything is computed."""
    return float(tables.block_copy_s * plan.counts[PLAN_COPIES])


@njit
def adapters_s(tables: StepTables, state: State, plan: Plan, rows: int) -> float:
    """Seconds of the products of adapters in a step: of the plan's rows, and of one token of the first `rows` that run,
    which are in no plan (decode_runs.py)."""
    slots = state.adapter_slots
    if slots.number.shape[0] == 0:
        return 0.0
    tokens, adapters = 0, 0
    for row in range(rows):
        tokens += state.adapter[state.running[row]] != NO_ADAPTER
    for row in range(plan.counts[PLAN_SIZE]):
        if state.adapter[plan.slot[row]] != NO_ADAPTER:
            tokens += plan.num_tokens[row]
    for slot in range(slots.number.shape[0]):
        adapters += slots.num_running[slot] > 0
    return float(tables.adapters.token_s * tokens + tables.adapters.read_s * adapters)


@njit
def fills_s(tables: StepTables, plan: Plan) -> float:
    """Seconds in which adapters come into the slots that a plan's newcomers need."""
    return float(tables.adapters.fill_s * plan.counts[PLAN_FILLS])


@njit
def grid_place(work: float) -> int:
    """The segment of WORK_GRID that holds `work`: from this point to the next."""
    if work <= 1.0:
        return 0
    octave = int((np.float64(work).view(np.int64) >> 52) - 1023)  # a logarithm would take as long as all the rest
    place = octave * POINTS_PER_OCTAVE
    if place >= WORK_GRID.shape[0] - 1:
        return int(WORK_GRID.shape[0] - 2)
    for _ in range(1, POINTS_PER_OCTAVE):
        place += work >= WORK_GRID[place + 1]
    return int(place)


@njit
def interpolate(table: NDArray[np.float64], work: float) -> float:
    """A table over WORK_GRID at `work`: linear between its points, 0 at 0 work."""
    if work <= 0.0:
        return 0.0
    if work <= 1.0:
        return float(table[0] * work)
    place = grid_place(work)
    low, high = WORK_GRID[place], WORK_GRID[place + 1]
    return float(table[place] + (table[place + 1] - table[place]) * (work - low) / (high - low))


@njit
def composed_time_s(
    tables: StepTables, num_tokens: int, num_rows: int, num_samples: int, decode_context: float, prefill_pairs: float
) -> float:
    """Seconds of a step of this composition.

    Args:
        decode_context: tokens whose KV the one-token rows read, their own included, summed over these rows.
        prefill_pairs: query-key pairs of the other rows: n * start + n * (n + 1) / 2 for n tokens after `start` others.
    """
    return float(
        tables.tokens_s[num_tokens]
        + tables.rows_s[num_rows]
        + tables.samples_s[num_samples]
        + interpolate(tables.decode_attention_s, decode_context)
        + interpolate(tables.prefill_attention_s, prefill_pairs)
    )


@njit
def row_pairs(tokens: int, start: int, prompt_pairs: PromptPairs) -> float:
    """Query-key pairs that a row with several tokens counts as, after `start` others in the cache."""
    pairs = tokens * (start + 0.5 * (tokens + 1))
    least = min(pairs + start * prompt_pairs.per_cached, pairs * prompt_pairs.in_latent)
    return float(max(least, (start + tokens) * prompt_pairs.per_key))


@njit
def decode_steps(tables: StepTables, num_rows: int, context: float) -> tuple[float, float, int]:
    """Steps that only decode, one after the other: `num_rows` rows, each of which reads one token more every step.

    Args:
        context: tokens that the first of these steps reads, as decode_context of `composed_time_s`.
    Returns: seconds of the first step; by how much each is longer than the one before; for how many steps that is so.
        Within one segment of the table, attention grows by the same time each step: a jump over them is exact.
    """
    place = grid_place(context)
    low, high = WORK_GRID[place], WORK_GRID[place + 1]
    below_s, above_s = tables.decode_attention_s[place], tables.decode_attention_s[place + 1]
    slope = (above_s - below_s) / (high - low)
    attention_s = below_s + slope * (context - low) if context > 1.0 else below_s * context
    first_s = tables.tokens_s[num_rows] + tables.rows_s[num_rows] + tables.samples_s[num_rows] + attention_s
    return float(first_s), float(slope * num_rows), 1 + int((high - context) / num_rows)


@njit
def composition(plan: Plan, prompt_pairs: PromptPairs) -> tuple[int, float, float]:
    """Of a planned step: rows that sample, context of its one-token rows, query-key pairs of the others."""
    samples = 0
    decode_context = 0.0
    prefill_pairs = 0.0
    for row in range(plan.counts[PLAN_SIZE]):
        tokens = plan.num_tokens[row]
        if plan.samples[row]:
            samples += 1
        if tokens == 1:
            decode_context += plan.start[row] + 1
        else:
            prefill_pairs += row_pairs(tokens, plan.start[row], prompt_pairs)
    return samples, decode_context, prefill_pairs
