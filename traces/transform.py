"""What-if: a part of a trace, or the same trace faster, slower, longer, shorter; each says in `notes` what it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .columns import MAX_TOKENS, BadTrace
from .metrics import BadTarget, Target
from .trace import Trace


def sample(trace: Trace, *, fraction: float | None = None, n: int | None = None, seed: int = 0) -> Trace:
    """A random part of the requests, without replacement, at their own times: the span stays, so the rate falls.

    Thinning makes arrivals less bursty and breaks up sessions; to keep both, take a `window`.

    Args:
        fraction: of the requests, 0 < fraction <= 1, rounded to at least one; or
        n: how many, 1 <= n <= len(trace). One of the two.
        seed: the same seed draws the same requests.
    Raises: BadTrace: neither, both, or out of range.
    """
    if (fraction is None) == (n is None):
        raise BadTrace("sample", (fraction, n), "fraction or n, one of them", "give one")
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise BadTrace("sample: fraction", fraction, "more than 0, at most 1", "give 0.1 for a tenth, say")
        n = max(1, round(fraction * len(trace)))
    if n is None or not 1 <= n <= len(trace):
        raise BadTrace("sample: n", n, f"an integer of 1 to {len(trace)}, the requests there are", "ask for fewer")
    rows = np.zeros(len(trace), dtype=np.bool_)
    rows[np.random.default_rng(seed).choice(len(trace), size=n, replace=False)] = True
    drawn = trace.select(rows)
    note = (
        f"{n} of {len(trace)} requests drawn at random (seed {seed}) at their own times: "
        f"{trace.rate_per_s:.4g} requests/s became {drawn.rate_per_s:.4g}"
    )
    return replace(drawn, notes=(*trace.notes, note))


def window(trace: Trace, start_s: float, end_s: float) -> Trace:
    """The requests that arrive in start_s <= t < end_s; start_s becomes time 0.

    Raises: BadTrace: no request arrives in it.
    """
    rows = (trace.arrival_s >= start_s) & (trace.arrival_s < end_s)
    if not rows.any():
        allowed = f"a window with requests; they arrive from {trace.arrival_s[0]:g} s to {trace.arrival_s[-1]:g} s"
        raise BadTrace("window", f"{start_s:g} s to {end_s:g} s", allowed, "choose another")
    part = trace.select(rows)
    note = f"{len(part)} of {len(trace)} requests: those arriving from {start_s:g} s to {end_s:g} s"
    return replace(part, arrival_s=part.arrival_s - max(start_s, 0.0), notes=(*trace.notes, note))


def scale(
    trace: Trace,
    *,
    rate: float = 1.0,
    input_length: float = 1.0,
    output_length: float = 1.0,
    max_tokens: int | None = None,
) -> Trace:
    """The same requests in the same order, at another rate and of other lengths.

    Args:
        rate: factor on the arrival rate (times are divided by it), > 0.
        input_length, output_length: factors on the token counts, > 0; rounded to the nearest, at least 1.
        max_tokens: then `clip` to it; None = no limit.
    Prefix hashes: where an input's length changes, those of whole blocks inside both lengths stay. So a shorter input
    loses the hashes past its end, and in a longer one the tokens that were added are nobody else's.
    Raises: BadTrace: a factor that is not positive, or lengths past 2**31 - 1 tokens.
    """
    for name, factor in (("rate", rate), ("input_length", input_length), ("output_length", output_length)):
        if not 0 < factor < np.inf:
            raise BadTrace(f"scale: {name}", factor, "a factor > 0", "give 0.5 for half, say")
    notes = [
        f"{name} times {factor:g}"
        for name, factor in (("arrival rate", rate), ("input lengths", input_length), ("output lengths", output_length))
        if factor != 1
    ]
    if rate != 1 and trace.pause_s is not None:
        notes.append("pauses within sessions as they were")
    scaled = _with_lengths(trace, _times(trace.input_tokens, input_length), _times(trace.output_tokens, output_length))
    scaled = replace(scaled, arrival_s=trace.arrival_s / rate, notes=(*scaled.notes, *notes))
    return scaled if max_tokens is None else clip(scaled, max_tokens)


def clip(trace: Trace, max_tokens: int) -> Trace:
    """No request of more than max_tokens tokens, in and out together: a model's context length.

    A longer one is shortened to exactly max_tokens, input and output in proportion, at least one token each. How many
    were, is in the notes. Prefix hashes: as in `scale`.
    Raises: BadTrace: max_tokens below 2.
    """
    if max_tokens < 2:
        raise BadTrace("max_tokens", max_tokens, "an integer >= 2: one token in, one out", "allow more")
    total = trace.input_tokens.astype(np.int64) + trace.output_tokens
    over = total > max_tokens
    if not over.any():
        return trace
    share = np.clip(trace.input_tokens.astype(np.int64) * max_tokens // total, 1, max_tokens - 1)
    input_tokens = np.where(over, share, trace.input_tokens)
    output_tokens = np.where(over, max_tokens - share, trace.output_tokens)
    note = f"{int(over.sum())} of {len(trace)} requests shortened to {max_tokens} tokens"
    clipped = _with_lengths(trace, input_tokens, output_tokens)
    return replace(clipped, notes=(*clipped.notes, note))


def with_targets(trace: Trace, targets: Sequence[Target]) -> Trace:
    """The trace with these targets in place of those that govern by application; requests keep their own.

    Raises: BadTarget: it names an application that the trace does not have, so that it would govern nothing.
    """
    names = trace.app.names if trace.app is not None else ()
    for target in targets:
        if target.app is not None and target.app not in names:
            allowed = f"one of {', '.join(sorted(names))[:200]}" if names else "no app: the trace names none"
            raise BadTarget(f"target {target}: app", target.app, allowed, "correct the name")
    if trace.target is None:
        return replace(trace, targets=tuple(dict.fromkeys(targets)))
    owned = sorted(set(trace.target.tolist()) - {-1})
    shared = tuple(dict.fromkeys(targets))
    position = np.full(len(trace.targets) + 1, -1, dtype=np.int32)
    position[owned] = np.arange(len(shared), len(shared) + len(owned), dtype=np.int32)
    own = tuple(trace.targets[i] for i in owned)
    return replace(trace, targets=(*shared, *own), target=position[trace.target])


def _times(tokens: np.ndarray, factor: float) -> np.ndarray:
    scaled = np.maximum(np.rint(tokens * factor), 1)
    if scaled.max() > MAX_TOKENS:
        raise BadTrace("scale", f"a length of {scaled.max():.0f} tokens", f"at most {MAX_TOKENS}", "scale by less")
    return scaled


def _with_lengths(trace: Trace, input_tokens: np.ndarray, output_tokens: np.ndarray) -> Trace:
    """Other lengths, and prefix hashes that fit them."""
    input_tokens = input_tokens.astype(np.int32)
    prefix, notes = trace.prefix, trace.notes
    if prefix is not None and (input_tokens != trace.input_tokens).any():
        whole = np.minimum(input_tokens, trace.input_tokens).astype(np.int64) // prefix.block_size
        kept = prefix.limited(np.where(input_tokens == trace.input_tokens, prefix.counts, whole))
        notes = (*notes, f"{len(kept.hashes)} of {len(prefix.hashes)} prefix hashes kept: whole blocks of both lengths")
        prefix = kept
    return replace(
        trace, input_tokens=input_tokens, output_tokens=output_tokens.astype(np.int32), prefix=prefix, notes=notes
    )
