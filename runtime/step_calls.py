"""The compiled functions of an engine's step, bound to the arrays they work on.

Called through Numba's dispatcher each would take 15 us longer (kernels/jit.py: bind).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..kernels.jit import bind
from .batch import append_tokens, step_work, write_wire
from .scheduler import commit, schedule
from .scheduler_state import Plan, State
from .speculation import keep_agreed


class StepCalls:
    """What happens to one plan, in this order. Arrays that grow are replaced: then it takes a new one of these.

    Args:
        tokens: arena of token ids, as in write_wire; wire: of the batch that goes with the plan.
        num_cached, full: as append_tokens fills them.
        speculated, by_position: as keep_agreed counts in them.
    """

    schedule: Callable[[], None]
    # what the head computes, which model -> places of the wire that are used
    write_wire: Callable[[int, int], int]
    # sampled tokens (places,) int64, whether each would end its request (places,) bool; both contiguous
    keep_agreed: Callable[[NDArray[np.int64], NDArray[np.bool_]], None]
    # sampled tokens (places,) int64, contiguous -> rows of `full`
    append_tokens: Callable[[NDArray[np.int64]], int]
    commit: Callable[[], None]
    # -> as batch.step_work
    work: Callable[[], tuple[float, float]]

    def __init__(
        self,
        state: State,
        plan: Plan,
        tokens: NDArray[np.int32],
        wire: NDArray[np.int32],
        num_cached: NDArray[np.int64],
        full: NDArray[np.int64],
        speculated: NDArray[np.int64],
        by_position: NDArray[np.int64],
    ) -> None:
        sampled, ends = np.zeros(1, np.int64), np.zeros(1, np.bool_)
        self.schedule = bind(schedule, state, plan)
        self.write_wire = bind(write_wire, state, plan, tokens, wire, then=(0, 0))
        self.keep_agreed = bind(keep_agreed, state, plan, tokens, speculated, by_position, then=(sampled, ends))
        self.append_tokens = bind(append_tokens, state, plan, tokens, num_cached, full, then=(sampled,))
        self.commit = bind(commit, state, plan)
        self.work = bind(step_work, plan)
