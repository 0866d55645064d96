"""Has the workload moved? A fingerprint kept from the trace a deployment was tuned on, against a new trace."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .columns import BadTrace
from .describe import (
    FINGERPRINT_PERCENTILES,
    FINGERPRINT_VERSION,
    app_shares,
    fingerprint,
    window_counts,
)
from .metrics import percentiles
from .trace import Trace

# How far a figure must move to matter. Below a tenth of rate or length another deployment hardly wins by more than the
# predictions' own error.
RATE_MOVED = 0.10
LENGTH_MOVED = 0.10
# Waiting time grows with burstiness only in proportion to 1 + dispersion (Kingman), and its estimate is noisy.
DISPERSION_MOVED = 0.50
# Of all requests, and of all input tokens: an application that becomes 5 % of the traffic shifts every percentile above
# p95, and 5 % more reuse saves as much prefill as RATE_MOVED adds to a log that reuses half.
SHARE_MOVED = 0.05

# Standard errors that a move must exceed besides. About twenty figures are compared: at 4 their normal tails together
# hold 0.13 %; the margin is for errors that are themselves estimated, from BLOCKS stretches.
NOISE_ERRORS = 4.0

# A rate is compared where both traces have this many independent arrivals, and a percentile where they have as many
# requests beyond it; with fewer the noise is not normal.
LEAST_INDEPENDENT = 10


@dataclass(frozen=True)
class Drift:
    """Whether the workload moved, in which figures (`reasons`), and what was looked at and did not (`steady`)."""

    moved: bool
    reasons: tuple[str, ...]
    steady: tuple[str, ...]


def drift(old: Mapping[str, Any], trace: Trace) -> Drift:
    """Compare a fingerprint with a new trace: rate, lengths, burstiness, prefix reuse, mix of applications.

    A figure has moved where the change both matters (the *_MOVED above) and exceeds NOISE_ERRORS of its sampling
    noise, so a small trace does not cry wolf: it can only show large moves.

    Args:
        old: from describe.fingerprint.
    Raises: BadTrace: not a fingerprint of this version.
    """
    _check(old)
    new = fingerprint(trace)
    findings = [
        _rate(old, new),
        *_lengths("input", old["input_tokens"], new["input_tokens"], trace.input_tokens, old["requests"]),
        *_lengths("output", old["output_tokens"], new["output_tokens"], trace.output_tokens, old["requests"]),
        *_burstiness(old, trace),
        *_reuse(old.get("prefix_reuse"), new["prefix_reuse"]),
        *_mix(old, trace),
    ]
    reasons = tuple(text for moved, text in findings if moved)
    return Drift(bool(reasons), reasons, tuple(text for moved, text in findings if not moved))


_Finding = tuple[bool, str]


def _check(old: Mapping[str, Any]) -> None:
    if old.get("version") != FINGERPRINT_VERSION:
        todo = "tune again to take a new one"
        raise BadTrace("fingerprint: version", old.get("version"), str(FINGERPRINT_VERSION), todo)
    for key in ("requests", "rate_per_s", "count_design_effect", "dispersion_window_s"):
        _check_number(old, key, "fingerprint: ")
    for key in ("dispersion", "dispersion_relative_error"):
        if key not in old or old[key] is not None:
            _check_number(old, key, "fingerprint: ")
    for key in ("input_tokens", "output_tokens", "apps"):
        if not isinstance(old.get(key), Mapping):
            raise _bad(f"fingerprint: {key}", old.get(key))
    for key in ("input_tokens", "output_tokens"):
        _check_number(old[key], "design_effect", f"fingerprint: {key}: ")
        if not isinstance(old[key].get("percentiles"), Mapping):
            raise _bad(f"fingerprint: {key}: percentiles", old[key].get("percentiles"))
        for p in FINGERPRINT_PERCENTILES:
            _check_number(old[key]["percentiles"], f"p{p:g}", f"fingerprint: {key}: percentiles: ")
    for name, share in old["apps"].items():
        for key in ("share", "design_effect"):
            _check_number(share if isinstance(share, Mapping) else {}, key, f"fingerprint: apps: {name}: ")
    for point in old.get("prefix_reuse") or ():
        if not isinstance(point, list) or len(point) != 3 or not all(map(_is_number, point)):
            raise _bad("fingerprint: prefix_reuse", point)


def _check_number(values: Mapping[str, Any], key: str, where: str) -> None:
    if not _is_number(values.get(key)):
        raise _bad(where + key, values.get(key))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _bad(where: str, found: object) -> BadTrace:
    return BadTrace(where, found, "what describe.fingerprint wrote", "tune again to take a new one")


def _rate(old: Mapping[str, Any], new: Mapping[str, Any]) -> _Finding:
    """n arrivals vary by n * design effect; of its two estimates the larger, as few requests easily miss the bursts."""
    before, after = old["rate_per_s"], new["rate_per_s"]
    text = f"rate {before:.3g} -> {after:.3g} requests/s"
    effect = max(old["count_design_effect"], new["count_design_effect"])
    if min(old["requests"], new["requests"]) < LEAST_INDEPENDENT * effect or not (before > 0 and after > 0):
        return False, f"{text} (too few requests to tell)"
    error = math.sqrt(effect / old["requests"] + effect / new["requests"])
    return _verdict(math.log(after / before), math.log1p(RATE_MOVED), error, text)


def _lengths(
    name: str, old: Mapping[str, Any], new: Mapping[str, Any], tokens: npt.NDArray[np.int32], old_requests: int
) -> list[_Finding]:
    """Percentiles, with noise free of any distribution: p varies by sqrt(p (1 - p) / n), so the old percentile must lie
    outside those of the new trace NOISE_ERRORS to both sides of p.
    """
    findings: list[_Finding] = []
    unit = math.sqrt(old["design_effect"] / old_requests + new["design_effect"] / len(tokens))
    independent = min(old_requests / old["design_effect"], len(tokens) / new["design_effect"])
    for p in FINGERPRINT_PERCENTILES:
        if independent * min(p, 100 - p) / 100 < LEAST_INDEPENDENT:
            continue
        before, after = old["percentiles"][f"p{p:g}"], new["percentiles"][f"p{p:g}"]
        half = NOISE_ERRORS * unit * math.sqrt(p / 100 * (1 - p / 100))
        low, high = (p / 100 - half) * 100, (p / 100 + half) * 100
        least, most = percentiles(tokens, (max(low, 0), min(high, 100)))
        outside = (low > 0 and before < least) or (high < 100 and before > most)
        # lengths are whole tokens: a percentile of 3 that becomes 4 has moved by a token, not by a third
        matters = abs(after / before - 1) > LENGTH_MOVED and abs(after - before) > 1
        findings.append((matters and outside, f"{name} p{p:g} {before:.0f} -> {after:.0f} tokens"))
    return findings or [(False, f"{name} lengths (too few requests to tell)")]


def _burstiness(old: Mapping[str, Any], trace: Trace) -> list[_Finding]:
    window_s = old["dispersion_window_s"]
    counts = window_counts(trace, np.ones(len(trace), dtype=np.bool_), window_s)
    after, error = counts.dispersion, counts.dispersion_relative_error
    before, before_error = old["dispersion"], old["dispersion_relative_error"]
    if before is None or before_error is None or math.isnan(after) or math.isnan(error) or not before:
        return [(False, "burstiness: too few arrivals to tell")]
    text = f"index of dispersion {before:.2f} -> {after:.2f} in windows of {window_s:g} s"
    both = math.sqrt(2) * max(before_error, error)
    return [_verdict(math.log(after / before), math.log1p(DISPERSION_MOVED), both, text)]


def _reuse(old: list[list[float]] | None, new: list[list[float]] | None) -> list[_Finding]:
    """At the largest number of requests that both have."""
    if old is None and new is None:
        return []
    if old is None or new is None:
        return [(False, "prefix reuse: one of the traces has no prefix hashes")]
    after_at = {head: (share, error) for head, share, error in new}
    both = [(head, share, error) for head, share, error in old if head in after_at]
    if not both:
        return [(False, "prefix reuse: too few requests to tell")]
    head, before, before_error = both[-1]
    after, error = after_at[head]
    text = f"prefix reuse {before:.1%} -> {after:.1%} of the first {head} requests' input tokens"
    return [_verdict(after - before, SHARE_MOVED, math.hypot(before_error, error), text)]


def _mix(old: Mapping[str, Any], trace: Trace) -> list[_Finding]:
    findings = []
    before, after = old["apps"], app_shares(trace)
    absent = {"share": 0.0, "design_effect": 1.0}
    n_old, n_new = old["requests"], len(trace)
    for name in sorted({*before, *after}):
        was, now = before.get(name, absent), after.get(name, absent)
        pooled = (was["share"] * n_old + now["share"] * n_new) / (n_old + n_new)
        scatter = was["design_effect"] / n_old + now["design_effect"] / n_new
        text = f"share of {name} {was['share']:.1%} -> {now['share']:.1%} of the requests"
        error = math.sqrt(pooled * (1 - pooled) * scatter)
        findings.append(_verdict(now["share"] - was["share"], SHARE_MOVED, error, text))
    return findings


def _verdict(change: float, matters: float, error: float, text: str) -> _Finding:
    return abs(change) > max(matters, NOISE_ERRORS * error), text
