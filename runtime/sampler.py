"""From logits to tokens: greedy, temperature, top-k, top-p, per-request seeds, banned tokens, log-probabilities.

A sampled token is a function of its own logits, seed and place in the answer: what is random comes of a counter-based
generator, row by row. So an answer does not depend on what else is in the batch.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.sampling import argmax, draw, mix, race

_MASK = (1 << 64) - 1


class BadRequest(ValueError):
    """A request that cannot be served: the field, what was found, what is allowed."""

    def __init__(self, field: str, found: object, allowed: str) -> None:
        super().__init__(field, found, allowed)
        self.field, self.found, self.allowed = field, found, allowed

    def __str__(self) -> str:
        return f"{self.field}: found {str(self.found)[:80]}; allowed: {self.allowed}"


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one answer are chosen, and when it ends. Raises: BadRequest, naming the field.

    max_tokens      most tokens of the answer
    min_tokens      before so many tokens neither an end-of-sequence nor a stop token is chosen
    temperature     logits are divided by it; 0 = the best token always
    top_p           of the fewest tokens that have at least this probability (Holtzman et al., arXiv:1904.09751)
    top_k           of the k best tokens, 0 = all; applied before top_p
    seed            equal seeds give equal answers; None = a random one
    stop_token_ids  end the answer, beside the model's end-of-sequence tokens
    ignore_eos      end-of-sequence tokens are tokens like others
    logprobs        report the log-probability of each token and of this many best ones; None = report nothing
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise BadRequest("max_tokens", self.max_tokens, "an integer >= 1")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise BadRequest("min_tokens", self.min_tokens, f"0 to max_tokens ({self.max_tokens})")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise BadRequest("temperature", self.temperature, "a number >= 0")
        if not 0 < self.top_p <= 1:
            raise BadRequest("top_p", self.top_p, "a number above 0, up to 1")
        if self.top_k < 0:
            raise BadRequest("top_k", self.top_k, "an integer >= 0 (0 = all)")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise BadRequest("logprobs", self.logprobs, "0 to 20")
        if self.seed is not None and not -(1 << 63) <= self.seed <= _MASK:
            raise BadRequest("seed", self.seed, "a 64-bit integer")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities (before temperature, top-k, top-p) at a place of an answer.

    logprob  of the token that was chosen
    top      the best tokens and theirs, best first
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """The parameters of all live requests, by scheduler slot, and how a step's rows are sampled with them.

    races  tokens are drawn by races, so that a draft model, which draws with the same seeds, mostly draws the same
           (speculation.py); else by one uniform number, which takes less time
    """

    def __init__(self, slots: int, vocab_size: int, eos_token_ids: tuple[int, ...], *, races: bool = False) -> None:
        self._races = races
        self._vocab_size = vocab_size
        self._eos = eos_token_ids
        self._temperature = np.zeros(slots, np.float32)
        self._top_p = np.ones(slots, np.float64)
        self._top_k = np.zeros(slots, np.int64)
        self._seed = np.zeros(slots, np.uint64)
        self._logprobs = np.full(slots, -1, np.int64)
        self._min_tokens = np.zeros(slots, np.int64)
        self._needs_logits = np.zeros(slots, np.bool_)
        self._ends: list[tuple[int, ...]] = [()] * slots
        self._has_ends = np.zeros(slots, np.bool_)

    def grow(self, slots: int) -> None:
        """Room for so many slots; those there stay what they are."""
        for name, array in vars(self).items():
            if isinstance(array, np.ndarray):
                setattr(self, name, np.concatenate([array, np.zeros(slots - len(array), array.dtype)]))
        self._ends += [()] * (slots - len(self._ends))

    def put(self, slot: int, params: SamplingParams) -> None:
        """A slot's request is sampled with `params` from now on."""
        ends = params.stop_token_ids + (() if params.ignore_eos else self._eos)
        ends = tuple(sorted({token for token in ends if 0 <= token < self._vocab_size}))
        self._temperature[slot] = params.temperature
        self._top_p[slot] = params.top_p
        self._top_k[slot] = params.top_k if params.top_k < self._vocab_size else 0
        self._seed[slot] = (secrets.randbits(64) if params.seed is None else params.seed) & _MASK
        self._logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self._min_tokens[slot] = params.min_tokens if ends else 0
        self._needs_logits[slot] = params.temperature > 0 or params.logprobs is not None
        self._ends[slot] = ends
        self._has_ends[slot] = bool(ends)

    def argmax_will_do(self, slots: NDArray[np.int64], generated: NDArray[np.int64]) -> bool:
        """Whether the best token of each row is all that a step must find."""
        return not (self._needs_logits[slots] | (generated < self._min_tokens[slots])).any()

    def ends(self, slots: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these tokens end their request."""
        ended = np.zeros(len(slots), np.bool_)
        for row in np.flatnonzero(self._has_ends[slots]):
            ended[row] = tokens[row] in self._ends[slots[row]]
        return ended

    def sample(
        self, logits: Tensor, slots: NDArray[np.int64], generated: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], list[TokenLogprobs | None]]:
        """One token per row.

        Args:
            logits: (rows, vocab_size) fp32, on any device; changed in place where tokens are banned.
            slots, generated: (rows,) the request of each row, and how many tokens of its answer stand before the place.
        Returns: the tokens (rows,), and what each row asked to be told about its token.
        """
        raw = None
        wanted = self._logprobs[slots]
        if (wanted >= 0).any():
            raw = torch.log_softmax(logits, dim=1)
        tokens = self.draw(logits, slots, generated)
        told: list[TokenLogprobs | None] = [None] * len(slots)
        if raw is not None:
            for row in np.flatnonzero(wanted >= 0):
                told[row] = _token_logprobs(raw[row], int(tokens[row]), int(wanted[row]))
        return tokens, told

    def draw(self, logits: Tensor, slots: NDArray[np.int64], generated: NDArray[np.int64]) -> NDArray[np.int64]:
        """`sample` without what it tells of the tokens."""
        for row in np.flatnonzero(generated < self._min_tokens[slots]):
            logits[row, list(self._ends[slots[row]])] = -math.inf
        tokens = argmax(logits)
        temperature = self._temperature[slots]
        sampled = np.flatnonzero(temperature > 0)
        if len(sampled):
            divisor = torch.from_numpy(temperature[sampled]).to(logits.device)
            scaled = logits[torch.from_numpy(sampled).to(logits.device)] / divisor[:, None]
            seed, place = self._seed[slots[sampled]], generated[sampled]
            top_k, top_p = self._top_k[slots[sampled]], self._top_p[slots[sampled]]
            if self._races:
                tokens[sampled] = race(scaled, bits(seed, place), top_k, top_p)
            else:
                tokens[sampled] = draw(scaled, uniforms(seed, place), top_k, top_p)
        return tokens


def uniforms(seed: NDArray[np.uint64], index: NDArray[np.int64]) -> NDArray[np.float64]:
    """The index-th number in [0, 1) of each seed's stream."""
    return (bits(seed, index) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def bits(seed: NDArray[np.uint64], index: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The index-th 64 bits of each seed's stream: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) used as a
    counter-based generator, the seed mixed once so that neighboring seeds do not share a stream."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    state = mix(seed + golden) + (index.astype(np.uint64) + np.uint64(1)) * golden
    return mix(state)


def _token_logprobs(logprobs: Tensor, token: int, count: int) -> TokenLogprobs:
    best, order = torch.topk(logprobs, count)
    return TokenLogprobs(token, float(logprobs[token]), tuple(zip(order.tolist(), best.tolist())))
