"""Traces drawn from ServeGen's client pools: what production clients of one model sent, as rates and histograms.

https://github.com/alibaba/ServeGen (Apache-2.0; Xiang et al., arXiv:2505.09999). A pool is two Parquet files:
POOL_client_rates.parquet with each client's rate, coefficient of variation and arrival pattern for every ten minutes,
and POOL_length_histograms.parquet with its token counts for every six hours.

Images (audio, video) of a request count as prompt tokens: its number of images times tokens drawn for each.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .columns import BadTrace, Labels
from .trace import Trace

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

RATE_COLUMNS = ("pool", "client", "t", "rate", "cv", "pat", "p1")
_LENGTH_COLUMNS = ("pool", "client", "window", "field", "value", "prob")
_RATES, _LENGTHS = "_client_rates.parquet", "_length_histograms.parquet"
_STEP_S, _WINDOW_S = 600, 21600
_KINDS = ("image", "audio", "video")
# A pool may have a thousand million requests in two weeks: so many are drawn, from its begin.
MOST_REQUESTS = 1_000_000

# (client, window) -> field -> (values, their chances)
_Histograms = dict[tuple[int, int], dict[str, tuple[Floats, Floats]]]


def draw_servegen(rates: Any, path: Path, seed: int = 0) -> Trace:
    """A trace of a pool, the same for the same seed.

    Each client's arrivals are a renewal process in the time in which its rate is one (Gerhardt and Nelson, INFORMS
    Journal on Computing 21(4), 2009), with the shape of its pattern: Gamma or Weibull, where none was fitted Gamma of
    its coefficient of variation. Lengths are drawn independently of each other, as the pool has them.

    Args:
        rates: the Arrow table of POOL_client_rates.parquet.
        path: of that file; the histograms lie beside it.
    Raises: BadTrace: the histograms are not there or damaged.
    """
    name = path.name
    columns = {column: np.array(rates.column(column).to_pylist(), object) for column in RATE_COLUMNS}
    histograms = _histograms(path)
    client, at_s = columns["client"].astype(np.int64), columns["t"].astype(np.float64)
    rate = columns["rate"].astype(np.float64)
    if not (np.isfinite(rate) & (rate >= 0)).all():
        raise BadTrace(f"{name}: rate", float(rate.min()), "requests per second >= 0", "correct it")
    known = np.isin(client, [each for each, _ in histograms])
    upto = np.cumsum(np.bincount((at_s[known] // _STEP_S).astype(np.int64), rate[known] * _STEP_S))
    if not len(upto) or not upto[-1]:
        raise BadTrace(name, "no client with requests and lengths", "at least one", "check how it was written")
    end_s = float(_STEP_S * max(1, int(np.searchsorted(upto, MOST_REQUESTS, "right"))))
    arrivals, senders = [], []
    for each in np.unique(client[known]).tolist():
        rows = np.flatnonzero((client == each) & (at_s < end_s))
        shapes = [_shape(columns["pat"][i], columns["p1"][i], columns["cv"][i]) for i in rows]
        found = _arrivals(at_s[rows], rate[rows], shapes, np.random.default_rng((seed, each)))
        arrivals.append(found)
        senders.append(np.full(len(found), each, np.int64))
    arrival_s, sender = np.concatenate(arrivals), np.concatenate(senders)
    if not len(arrival_s):
        raise BadTrace(name, "no request in its first windows", "at least one", "check how it was written")
    order = np.argsort(arrival_s, kind="stable")
    arrival_s, sender = arrival_s[order], sender[order]
    inputs, outputs, counted = _lengths(arrival_s, sender, histograms, np.random.default_rng((seed, 1 << 20)))
    left_out = len(np.unique(client)) - len(np.unique(client[known]))
    notes = [
        f"drawn (seed {seed}) from the rates and length histograms of {len(np.unique(sender))} clients of "
        f"{columns['pool'][0]}: the first {end_s:,.0f} of {float(at_s.max()) + _STEP_S:,.0f} s"
    ]
    notes += [f"{left_out} clients left out: no length histograms"] if left_out else []
    for kind in _KINDS:
        count, tokens = counted[kind]
        if tokens.any():
            notes.append(
                f"{kind}s: {int(count.sum()):,} in {(count > 0).mean():.0%} of the requests; their "
                f"{int(tokens.sum()):,} tokens count as prompt tokens, {tokens.sum() / inputs.sum():.0%} of all; "
                f"encoding them is not modeled"
            )
    return Trace(
        arrival_s=arrival_s - arrival_s[0],
        input_tokens=inputs.astype(np.int32),
        output_tokens=outputs.astype(np.int32),
        app=Labels.of(f"client {each}" for each in sender.tolist()),
        source=name,
        notes=tuple(notes),
    )


def _shape(pattern: str | None, p1: float, cv: float) -> tuple[str, float]:
    """Of the times between arrivals, whatever their mean."""
    if pattern in ("Gamma", "Weibull") and p1 > 0:
        return pattern, float(p1)
    return "Gamma", 1.0 / float(cv) ** 2 if cv and math.isfinite(cv) and cv > 0 else 1.0


def _unit_gaps(shape: tuple[str, float], count: int, rng: np.random.Generator) -> Floats:
    """Times between arrivals of mean 1."""
    pattern, value = shape
    if pattern == "Weibull":
        return np.asarray(rng.weibull(value, count) / math.gamma(1 + 1 / value), np.float64)
    return np.asarray(rng.gamma(value, 1 / value, count), np.float64)


def _arrivals(at_s: Floats, rate: Floats, shapes: list[tuple[str, float]], rng: np.random.Generator) -> Floats:
    """Of one client, ascending within each of its windows."""
    found = []
    left = 0.0  # of the time, at rate one, until its next arrival
    for begin_s, per_s, shape in zip(at_s.tolist(), rate.tolist(), shapes):
        here = per_s * _STEP_S
        while here > left:
            gaps = np.append(left, _unit_gaps(shape, int(here) + 16, rng))
            times = np.cumsum(gaps)
            inside = times[:-1][times[:-1] < here]
            found.append(begin_s + inside / per_s)
            if times[len(inside)] >= here:
                left = float(times[len(inside)])
                break
            # the gaps did not suffice: go on behind the last of them
            begin_s, here, left = begin_s + float(times[-1]) / per_s, here - float(times[-1]), 0.0
        left -= here
    return np.concatenate(found) if found else np.zeros(0)


def _histograms(path: Path) -> _Histograms:
    import pyarrow as pa
    import pyarrow.parquet as pq

    beside = path.with_name(path.name.removesuffix(_RATES) + _LENGTHS)
    todo = f"put it beside {path.name}"
    if not path.name.endswith(_RATES) or not beside.is_file():
        raise BadTrace(beside.name, "no such file", "the length histograms of the pool", todo)
    try:
        table = pq.read_table(beside)
        client, window, field, value, prob = (table.column(each).to_pylist() for each in _LENGTH_COLUMNS[1:])
    except (pa.ArrowException, OSError, KeyError) as error:
        raise BadTrace(beside.name, str(error).split("\n")[0], f"columns {', '.join(_LENGTH_COLUMNS)}", todo) from None
    rows: dict[tuple[int, int], dict[str, list[tuple[float, float]]]] = {}
    for each, at, kind, size, chance in zip(client, window, field, value, prob):
        rows.setdefault((int(each), int(at)), {}).setdefault(str(kind), []).append((float(size), float(chance)))
    found: _Histograms = {}
    for key, fields in rows.items():
        found[key] = {}
        for kind, pairs in fields.items():
            values, chances = np.array(pairs).T
            found[key][kind] = values, chances / chances.sum()
    return found


def _lengths(
    arrival_s: Floats, sender: Ints, histograms: _Histograms, rng: np.random.Generator
) -> tuple[Ints, Ints, dict[str, tuple[Ints, Ints]]]:
    """Input and output tokens of every request; and by kind how many it has, and their tokens."""
    n = len(arrival_s)
    inputs, outputs = np.zeros(n, np.int64), np.zeros(n, np.int64)
    counted = {kind: (np.zeros(n, np.int64), np.zeros(n, np.int64)) for kind in _KINDS}
    windows = (arrival_s // _WINDOW_S).astype(np.int64) * _WINDOW_S
    for each in np.unique(sender).tolist():
        mine = sender == each
        for window in np.unique(windows[mine]).tolist():
            rows = np.flatnonzero(mine & (windows == window))
            # a window without histograms has those of the one before it, or of the first that there is
            there = [at for client, at in histograms if client == each]
            fields = histograms[each, max((at for at in there if at <= window), default=min(there))]

            def draw(field: str, size: int, fields: dict[str, tuple[Floats, Floats]] = fields) -> Ints:
                if field not in fields:
                    return np.zeros(size, np.int64)
                drawn = rng.choice(fields[field][0], size, p=fields[field][1])
                return np.asarray(np.rint(drawn), np.int64)

            inputs[rows] = draw("input_tokens", len(rows)) + draw("text_tokens", len(rows))
            outputs[rows] = draw("output_tokens", len(rows))
            for kind, (count, tokens) in counted.items():
                count[rows] = draw(f"{kind}_count", len(rows))
                of_each = draw(f"{kind}_tokens", int(count[rows].sum()))
                tokens[rows] = np.bincount(np.repeat(np.arange(len(rows)), count[rows]), of_each, len(rows))
                inputs[rows] += tokens[rows]
    return np.maximum(inputs, 1), np.maximum(outputs, 1), counted
