"""What is asked of an engine, and what it answers, step by step."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .sampler import BadRequest, SamplingParams, TokenLogprobs
from .speculated import NOTHING, Speculated

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to continue.

    request_id        the caller's, unique among live requests
    prompt_token_ids  (n,) int32, n >= 1
    priority          lower goes first, where the spec schedules by priority; else it is not looked at
    adapter           name of a loaded adapter; None: the base alone
    """

    request_id: int
    prompt_token_ids: NDArray[np.int32]
    sampling: SamplingParams
    priority: int = 0
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """What a step brought for one request.

    token_ids          new tokens, in order; a token that ends the answer is among them
    logprobs           of each new token, if the request asked for them
    finish_reason      None while the answer goes on
    num_cached_tokens  of the prompt, found in the prefix cache when the request was first admitted
    speculated         what was proposed for the request so far, and kept
    """

    request_id: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None
    num_cached_tokens: int
    speculated: Speculated = NOTHING


class KeptLogits(NamedTuple):
    """Logits (n, vocab_size) fp32 of places start .. start + n - 1 of a request's tokens."""

    request_id: int
    start: int
    logits: Tensor


def checked_prompt(request: Request, live: Container[int], max_model_len: int, vocab_size: int) -> NDArray[np.int32]:
    """The prompt of a request that an engine can take.

    Args:
        live: ids of the requests that it has.
    Raises: BadRequest: an id in use, an empty prompt or one of max_model_len tokens or more, an unknown token.
    """
    prompt = np.asarray(request.prompt_token_ids)
    if request.request_id in live:
        raise BadRequest("request_id", request.request_id, "an id that no live request has")
    if prompt.ndim != 1 or not 1 <= len(prompt) < max_model_len:
        allowed = f"1 to {max_model_len - 1} tokens (max_model_len - 1)"
        raise BadRequest("prompt_token_ids", f"{prompt.size} tokens", allowed)
    if not np.issubdtype(prompt.dtype, np.integer):
        raise BadRequest("prompt_token_ids", prompt.dtype, "integers")
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        found = f"ids from {prompt.min()} to {prompt.max()}"
        raise BadRequest("prompt_token_ids", found, f"0 to {vocab_size - 1} (vocab_size - 1)")
    return prompt.astype(np.int32, copy=False)
