"""What stands in one step, whatever requests it belongs to: as sums, or row by row."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Composition(NamedTuple):
    """What stands in one step, whatever requests it belongs to. Arrays of one shape stand for as many steps.

    num_tokens      tokens computed
    num_rows        requests that compute some
    num_samples     rows whose last token gets a successor
    decode_context  tokens whose KV the one-token rows read, their own included, summed over these rows
    prefill_pairs   query-key pairs of the other rows: n * start + n * (n + 1) / 2 for n tokens after `start` others
    """

    num_tokens: int
    num_rows: int
    num_samples: int
    decode_context: float
    prefill_pairs: float

    @classmethod
    def of_many(cls, num_tokens: Any, num_rows: Any, num_samples: Any, decode_context: Any, prefill_pairs: Any) -> Self:
        """Of as many steps as the arrays are long."""
        return cls(num_tokens, num_rows, num_samples, decode_context, prefill_pairs)


class Attended(NamedTuple):
    """What one kind of attention reads and computes in a step.

    decode_keys      keys that the rows of few tokens read, each once for each row
    decode_pairs     their query-key pairs, as many where each row has one token
    decode_queries   their tokens
    prefill_pairs    query-key pairs of the other rows
    prefill_keys     keys that the other rows read, each once for each row
    prefill_queries  tokens of the other rows
    """

    decode_keys: float
    decode_pairs: float
    decode_queries: float
    prefill_pairs: float
    prefill_keys: float
    prefill_queries: float


class Rows(NamedTuple):
    """The rows of a step, or (arrays of two dimensions) of many steps; a row of no tokens is none.

    start        (..., rows) tokens of each request that are in the cache already
    num_tokens   (..., rows) that the step computes of it; several where a prompt, or proposals, are computed
    num_samples  (..., rows) places that are sampled: 1 at the end of a prompt and in decoding, 1 + proposals
    """

    start: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    num_samples: NDArray[np.int64]

    @classmethod
    def of(cls, start: ArrayLike, num_tokens: ArrayLike, num_samples: ArrayLike | None = None) -> Rows:
        """Left out: every row samples one place."""
        first, tokens = np.asarray(start, np.int64), np.asarray(num_tokens, np.int64)
        samples = np.minimum(tokens, 1) if num_samples is None else np.asarray(num_samples, np.int64)
        return cls(first, tokens, samples)

    @classmethod
    def verifying(cls, start: ArrayLike, num_speculative_tokens: int) -> Rows:
        """Rows of requests with `start` tokens in the cache that verify as many proposals each."""
        first = np.asarray(start, np.int64)
        tokens = np.full_like(first, 1 + num_speculative_tokens)
        return cls(first, tokens, tokens)

    def composition(self) -> Composition:
        whole = self.attended()
        return Composition(
            num_tokens=_number(self.num_tokens.sum(-1)),
            num_rows=_number((self.num_tokens > 0).sum(-1)),
            num_samples=_number(self.num_samples.sum(-1)),
            decode_context=whole.decode_keys,
            prefill_pairs=whole.prefill_pairs,
        )

    def attended(
        self, window: int | None = None, chunk: int | None = None, topk: int | None = None, decode_tokens: int = 1
    ) -> Attended:
        """Of attention to the whole context, to the last `window` tokens, to those of a query's own chunk, or to
        `topk` that each query chooses (of which the queries of a row read at least as many, together, and at most all:
        the least counts). Rows of up to `decode_tokens` count as decoding."""
        start, tokens = self.start, self.num_tokens
        end, limit = start + tokens, window or topk
        pairs, keys = tokens * start + tokens * (tokens + 1) // 2, end
        if limit is not None:
            below = np.clip(limit - start, 0, tokens)  # tokens that see fewer than the limit
            pairs = below * start + below * (below + 1) // 2 + (tokens - below) * limit
            keys = np.minimum(end, limit if window is None else tokens + limit - 1)
        elif chunk is not None:
            pairs, keys = _chunked(end, chunk) - _chunked(start, chunk), end - start // chunk * chunk
        few, many = (tokens > 0) & (tokens <= decode_tokens), tokens > decode_tokens
        return Attended(
            decode_keys=_number((keys * few).sum(-1)),
            decode_pairs=_number((pairs * few).sum(-1)),
            decode_queries=_number((tokens * few).sum(-1)),
            prefill_pairs=_number((pairs * many).sum(-1)),
            prefill_keys=_number((keys * many).sum(-1)),
            prefill_queries=_number((tokens * many).sum(-1)),
        )


def attended(
    step: Composition | Rows,
    window: int | None = None,
    chunk: int | None = None,
    topk: int | None = None,
    decode_tokens: int = 1,
) -> Attended:
    """As `Rows.attended`; from sums only: contexts taken as alike, so of a window at most what is read, and prompts
    as starting alike, so that they read at least the mean context of their tokens."""
    if isinstance(step, Rows):
        return step.attended(window, chunk, topk, decode_tokens)
    tokens, limit = step.num_tokens, window or chunk or topk
    context, pairs = step.decode_context, step.prefill_pairs
    keys = pairs / np.maximum(tokens, 1)
    if limit is not None:
        context = np.minimum(context, step.num_rows * limit)
        pairs, keys = np.minimum(pairs, tokens * limit), np.minimum(keys, tokens + limit)
    context = _number(context)
    queries = _number(np.where(np.greater(pairs, 0), tokens, 0))
    return Attended(context, context, step.num_rows, _number(pairs), _number(keys), queries)


def _chunked(position: NDArray[np.int64], chunk: int) -> NDArray[np.int64]:
    """Query-key pairs of the first tokens of a request up to a position, where chunks begin anew."""
    whole, rest = position // chunk, position % chunk
    return np.asarray(whole * (chunk * (chunk + 1) // 2) + rest * (rest + 1) // 2)


def _number(value: Any) -> Any:
    """A Python number where there is one step, an array of floats where there are many."""
    if np.ndim(value):
        return np.asarray(value, np.float64)
    return value.item() if isinstance(value, np.generic) else value
