"""What the host takes of the time to first token, by the length of the prompt: it is most of a short prompt's, and
vanishes in a long one's.

The request is alone in the server, so that nothing waits: its TTFT is the host before and after its steps (HTTP,
tokenizer), and its steps, of whose time the host has a part of its own (launching, composing, sampling), whatever their
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..runtime.model_shape import ModelShape
from ..runtime.spec import CPU, Pool
from ..traces.trace import Trace
from .profile import Profile
from .simulator import simulate
from .step_time import ModeledStep
from .tables import step_tables

PROMPTS = (16, 64, 256, 1024, 4096, 16384)


@dataclass(frozen=True)
class HostShare:
    """Of a prompt of so many tokens, alone; seconds.

    ttft_s          time to first token
    steps           that the prompt takes
    host_steps_s    the host in these steps: its part of each step, and its part of each request in a step
    host_request_s  beside them: before the scheduler sees the request, and after the token's step until the client has
                    the token
    """

    prompt_tokens: int
    ttft_s: float
    steps: int
    host_steps_s: float
    host_request_s: float

    @property
    def share(self) -> float:
        """Of the time to first token."""
        return (self.host_steps_s + self.host_request_s) / self.ttft_s


def host_shares(
    pool: Pool, modeled: ModeledStep, prompts: Sequence[int] = PROMPTS, *, policy: str = "paretune"
) -> tuple[HostShare, ...]:
    """By prompt length, the shortest first; prompts that the pool does not take, with one token more, are left out.

    Speculation is, too: proposals come after the first token.

    Args:
        modeled: the step times of the pool.
    """
    plain = {"replicas": 1, "enable_prefix_caching": False, "speculation": "none", "num_speculative_tokens": 0}
    alone = pool.model_copy(update=plain)
    tables = modeled.tables._replace(draft=None)
    in_a_step_s = modeled.host_step_s + float(tables.rows_s[1]) - modeled.device_row_s
    beside_s = float(tables.request_s.sum())
    found = []
    for tokens in sorted(prompts):
        if tokens + 1 > min(pool.max_model_len, pool.num_kv_blocks * pool.block_size):
            continue
        one = Trace(np.zeros(1), np.array([tokens]), np.array([1]))
        result = simulate(one, alone, tables, policy=policy, k=1)
        if result.times.finished.all():
            ttft_s = float(result.times.first_token_s[0] - result.times.scheduled_s[0])
            found.append(HostShare(tokens, ttft_s, result.steps, result.steps * in_a_step_s, beside_s))
    return tuple(found)


def shares_of_profile(profile: Profile, shape: ModelShape) -> dict[str, tuple[HostShare, ...]]:
    """Of every measured configuration by its name, with the pool's plain limits and prompts as long as the model takes.

    Args:
        shape: of the profiled model.
    Raises: BadProfile: it is of another model.
    """
    longest = min(shape.max_position_embeddings, PROMPTS[-1] + 1)
    found = {}
    for each in profile.configurations:
        pool = Pool(
            accelerator=CPU,
            tiles=each.tiles,
            max_model_len=longest,
            num_kv_blocks=-(-longest // 16),
            block_size=16,
            **each.key._asdict(),
        )
        found[str(each.key)] = host_shares(pool, step_tables(profile, shape, pool))
    return found
