"""Logs with one JSON object a line: Mooncake, and OpenAI-style request logs, our own server's among them.

Mooncake: https://github.com/kvcache-ai/Mooncake (Qin et al., FAST 2025). OpenAI-style: the response objects of
https://platform.openai.com/docs/api-reference/chat/object, as gateways and servers log them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, TypeGuard

import numpy as np

from .acceptance import COUNTS, Acceptance, merged
from .columns import MAX_SECONDS, MAX_TOKENS, BadTrace, Labels, PrefixHashes, is_text
from .sessions import turns_before
from .text_file import COUNT, bad_line, lines_of
from .trace import Trace, join_targets, parse_target

MOONCAKE_BLOCK_SIZE = 512

# Above these an epoch time is no longer one of seconds, of ms, of µs: 1e11 s is the year 5138, 1e11 ms is 1973.
_EPOCH_UNITS = ((1e17, 1e-9), (1e14, 1e-6), (1e11, 1e-3))
_ISO = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d.*", re.ASCII)
_TIME_ALLOWED = "epoch seconds or milliseconds >= 0, or ISO 8601"
_INT64 = range(-(2**63), 2**63)


def read_mooncake(data: bytes, name: str) -> Trace:
    """timestamp (ms), input_length, output_length, hash_ids (one per 512 tokens, the last may be partial, chained).

    Sessions as NVIDIA's AIPerf adds them (docs/benchmark-modes/trace-replay.md): `session_id`, and `delay`, the ms from
    the end of the session's line before until this one is sent. Lines of sessions may lack hash_ids, and a time: then
    they come `delay` after the session's line before, as if that had taken no time, and the first at second 0. With
    sessions the lines are sorted by time.
    """
    arrival_ms: list[float] = []
    inputs, outputs, hashes = [], [], []
    names: list[str | None] = []
    pauses_ms: list[float] = []
    last_ms: dict[str, float] = {}
    timeless = 0
    chain = _Chain(name, "hash_ids")
    failed = 0
    objects, notes = _objects(data, name)
    for number, row in objects:
        session = _text(row, "session_id", name, number)
        delay_ms = _milliseconds(row, "delay", name, number) if row.get("delay") is not None else math.nan
        if session is not None and row.get("timestamp") is None:
            time_ms = last_ms[session] + np.nan_to_num(delay_ms) if session in last_ms else 0.0
            timeless += 1
        else:
            time_ms = _milliseconds(row, "timestamp", name, number)
        if session is not None:
            last_ms[session] = time_ms
        elif arrival_ms and not last_ms and time_ms < arrival_ms[-1]:
            allowed = f"not before {arrival_ms[-1]}, the line above"
            raise bad_line(name, number, "timestamp", time_ms, allowed, "sort the log by arrival and run again")
        if session is not None and "hash_ids" not in row:
            row = {**row, "hash_ids": []}
        input_tokens = _count(row, "input_length", name, number)
        output_tokens = _count(row, "output_length", name, number)
        row_hashes = chain.checked(row.get("hash_ids"), number, input_tokens, MOONCAKE_BLOCK_SIZE)
        if not (input_tokens and output_tokens):
            failed += 1
            continue
        arrival_ms.append(time_ms)
        inputs.append(input_tokens)
        outputs.append(output_tokens)
        hashes.append(row_hashes)
        names.append(session)
        pauses_ms.append(delay_ms)
    _refuse_none(name, inputs)
    times_ms, pause_s = np.array(arrival_ms), np.array(pauses_ms) / 1e3
    order = np.argsort(times_ms, kind="stable")
    if timeless:
        notes = (*notes, f"{timeless} requests of sessions have no time: placed as if the answers before took none")
    return Trace(
        arrival_s=(times_ms[order] - times_ms[order[0]]) / 1e3,
        input_tokens=np.array(inputs)[order],
        output_tokens=np.array(outputs)[order],
        session=Labels.of(names[i] for i in order),
        pause_s=None if np.isnan(pause_s).all() else pause_s[order],
        prefix=PrefixHashes.of([hashes[i] for i in order], MOONCAKE_BLOCK_SIZE),
        source=name,
        notes=(*notes, *_left_out(failed, len(inputs))),
    )


def read_openai(data: bytes, name: str) -> Trace:
    """Objects with `created` or `timestamp`, `model`, `usage.prompt_tokens`, `usage.completion_tokens`.

    The response may stand under `response`, or under `response.body` as in the output of the Batch API. The time is
    `timestamp`, else `created`, of the object or else of the response. Beside them, optional, in the object:
    `app` or `metadata.app` (else the model is the application), `session` or `metadata.session`, `adapter`,
    `prefix_hashes` with `prefix_block_size`, `target`, the request's own, and `speculation`, what was proposed for it
    and kept (traces/acceptance.py). Where `timings.e2e_s` says how long the session's request before took, the time
    from its end is the pause, 0 for a request that came before that end. Prompts, answers and the end user's name
    (`user`) are not read. Failed requests (an `error`, a status of 400 or more, a null response or usage, 0 tokens) are
    left out and counted. Logs are written at completion: lines are sorted by time, ties in file order.
    """
    requests: list[_Request] = []
    failed = 0
    chain = _Chain(name, "prefix_hashes")
    objects, notes = _objects(data, name)
    for number, row in objects:
        request = _request(row, name, number, chain)
        if request is None:
            failed += 1
        else:
            requests.append(request)
    _refuse_none(name, requests)
    times = np.array([request["time_s"] for request in requests])
    order = np.argsort(times, kind="stable")
    if (np.diff(times) < 0).any():
        notes = (*notes, "lines were not in order of arrival and were sorted")
    if len(times) > 1 and (times == np.floor(times)).all():
        notes = (*notes, "times are whole seconds: arrivals within one second coincide")
    ordered = [requests[i] for i in order]
    session = Labels.of(request["session"] for request in ordered)
    ends = times[order] + np.array([request["took_s"] for request in ordered])
    pause_s, overlapping = _pauses_after(session, times[order], ends)
    if overlapping:
        notes = (*notes, f"{overlapping} requests came before the end of their session's request before: pause 0")
    hashes = [request["hashes"] for request in ordered]
    targets, target = join_targets(
        [], [request["target"] for request in ordered], lambda i: f"{name}:{ordered[i]['line']}: target"
    )
    return Trace(
        arrival_s=times[order] - times[order[0]],
        input_tokens=np.array([request["input_tokens"] for request in ordered]),
        output_tokens=np.array([request["output_tokens"] for request in ordered]),
        app=Labels.of(request["app"] for request in ordered),
        adapter=Labels.of(request["adapter"] for request in ordered),
        session=session,
        pause_s=pause_s,
        prefix=PrefixHashes.of(hashes, chain.block_size) if chain.block_size else None,
        targets=targets,
        target=target,
        acceptance=merged(each for request in ordered if (each := request["acceptance"]) is not None),
        source=name,
        notes=(*notes, *_left_out(failed, len(requests))),
    )


_Request = dict[str, Any]


def _request(row: dict[str, Any], name: str, number: int, chain: _Chain) -> _Request | None:
    """One line of an OpenAI-style log; None where the request failed."""
    response = row.get("response", row)
    if response is None or row.get("error") is not None:
        return None
    response = _object(response, "response", name, number)
    status = response.get("status_code")
    if isinstance(status, int) and status >= 400:
        return None
    if "body" in response:
        response = _object(response["body"], "response.body", name, number)
    if response.get("error") is not None or ("usage" in response and response["usage"] is None):
        return None
    usage = _object(response.get("usage"), "usage", name, number)
    input_tokens = _count(usage, "prompt_tokens", name, number, "usage.")
    output_tokens = _count(usage, "completion_tokens", name, number, "usage.")
    time_s = _time_s(row, response, name, number)
    metadata = _object(row.get("metadata") or {}, "metadata", name, number)
    model = _text(response, "model", name, number) or _text(row, "model", name, number)
    if model is None:
        raise bad_line(name, number, "model", None, "the name of a model")
    hashes: list[int] = []
    if row.get("prefix_hashes"):
        block_size = _count(row, "prefix_block_size", name, number)
        hashes = chain.checked(row["prefix_hashes"], number, input_tokens, block_size)
    if not (input_tokens and output_tokens):
        return None
    target = _text(row, "target", name, number)
    if target is not None:
        parse_target(f"{name}:{number}: target", target)
    app = _text(row, "app", name, number) or _text(metadata, "app", name, number, "metadata.") or model
    return {
        "line": number,
        "time_s": time_s,
        "took_s": _took_s(row, name, number),
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "app": app,
        "acceptance": _acceptance(row, app, name, number),
        "session": _text(row, "session", name, number) or _text(metadata, "session", name, number, "metadata."),
        "adapter": _text(row, "adapter", name, number),
        "hashes": hashes,
        "target": target,
    }


def _took_s(row: dict[str, Any], name: str, number: int) -> float:
    """From the request's time to its end, as our server logs it; NaN where nobody says."""
    timings = row.get("timings")
    if not isinstance(timings, dict) or timings.get("e2e_s") is None:
        return math.nan
    value = timings["e2e_s"]
    if not _is_number(value) or not 0 <= value < MAX_SECONDS:
        raise bad_line(name, number, "timings.e2e_s", value, f"seconds from 0 to {MAX_SECONDS:g}")
    return float(value)


def _pauses_after(
    session: Labels | None, times_s: np.ndarray[Any, Any], ends_s: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any] | None, int]:
    """(n,) seconds from the end of the session's request before, NaN where it is not known, or None; and how many of
    them came before that end."""
    if session is None:
        return None, 0
    after = turns_before(session.codes)
    pause_s = np.where(after >= 0, times_s - ends_s[after], np.nan)
    return None if np.isnan(pause_s).all() else np.maximum(pause_s, 0.0), int((pause_s < 0).sum())


def _acceptance(row: dict[str, Any], app: str, name: str, number: int) -> Acceptance | None:
    if row.get("speculation") is None:
        return None
    speculation = _object(row["speculation"], "speculation", name, number)
    counts = [_count(speculation, key, name, number, "speculation.") for key in COUNTS]
    try:
        return Acceptance(app, *counts)
    except BadTrace as error:
        raise bad_line(name, number, "speculation", speculation, error.allowed) from None


class _Chain:
    """Holds the prefix hashes of a log to their rules while its lines go by.

    One block size; no more hashes than blocks; and chained: a hash always follows the same one.
    """

    def __init__(self, name: str, field: str) -> None:
        self.name, self.field = name, field
        self.block_size = 0
        self.previous: dict[int, int | None] = {}

    def checked(self, hashes: object, number: int, input_tokens: int, block_size: int) -> list[int]:
        if not isinstance(hashes, list):
            raise bad_line(self.name, number, self.field, hashes, "a list of integers")
        if block_size < 1 or (self.block_size and block_size != self.block_size):
            allowed = f"{self.block_size}, as above" if self.block_size else "an integer >= 1"
            raise bad_line(self.name, number, "prefix_block_size", block_size, allowed)
        self.block_size = block_size
        most = -(-input_tokens // block_size)
        if len(hashes) > most:
            allowed = f"at most {most}, one per {block_size} of {input_tokens} input tokens"
            raise bad_line(self.name, number, self.field, f"{len(hashes)} hashes", allowed)
        before = None
        for value in hashes:
            if type(value) is not int or value not in _INT64:
                raise bad_line(self.name, number, self.field, value, "integers of 64 bits")
            if self.previous.setdefault(value, before) != before:
                raise bad_line(self.name, number, self.field, value, "chained hashes: one hash, one whole prefix")
            before = value
        return hashes


def object_of(line: str, name: str, number: int) -> dict[str, Any]:
    """The JSON object of one line; stricter than `json`: no NaN or Infinity, no key twice, no endless nesting.

    Raises: BadTrace.
    """
    try:
        row = json.loads(line, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except RecursionError:
        raise bad_line(name, number, "", "values nested too deeply", "one JSON object a line") from None
    except ValueError as error:
        reason = str(error).split(": line ")[0]
        todo = "correct the line (is the file cut off?) and run again"
        raise bad_line(name, number, "", line, f"one whole JSON object a line ({reason:.80})", todo) from None
    return _object(row, "", name, number)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r:.40} stands twice")
    return out


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _objects(data: bytes, name: str) -> tuple[Iterator[tuple[int, dict[str, Any]]], tuple[str, ...]]:
    """(line number, object) of every line that is not blank; and notes."""
    lines, notes = lines_of(data, name)
    return ((n, object_of(line, name, n)) for n, line in enumerate(lines, start=1) if line.strip()), notes


def _object(value: object, field: str, name: str, number: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad_line(name, number, field, value, "a JSON object")
    return value


def _count(row: dict[str, Any], key: str, name: str, number: int, within: str = "") -> int:
    value = row.get(key)
    if type(value) is not int or not 0 <= value <= MAX_TOKENS:
        raise bad_line(name, number, within + key, value, COUNT)
    return value


def _text(row: dict[str, Any], key: str, name: str, number: int, within: str = "") -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise bad_line(name, number, within + key, value, "a text")
    if value and not is_text(value):
        raise bad_line(name, number, within + key, value, "a text of whole Unicode characters")
    return value.strip() or None if value else None


def _milliseconds(row: dict[str, Any], key: str, name: str, number: int) -> float:
    value = row.get(key)
    if not _is_number(value) or not 0 <= value < MAX_SECONDS * 1e3:
        raise bad_line(name, number, key, value, f"milliseconds from 0 to {MAX_SECONDS * 1e3:g}")
    return float(value)


def _is_number(value: object) -> TypeGuard[int | float]:
    return type(value) in (int, float)


def _time_s(row: dict[str, Any], response: dict[str, Any], name: str, number: int) -> float:
    key = "timestamp" if "timestamp" in row or "timestamp" in response else "created"
    value = row[key] if key in row else response.get(key)
    if isinstance(value, str):
        return _iso_s(value, key, name, number)
    if not _is_number(value) or not 0 <= value < 1e20:
        raise bad_line(name, number, key, value, _TIME_ALLOWED)
    return next((value * unit for least, unit in _EPOCH_UNITS if value >= least), float(value))


def _iso_s(text: str, key: str, name: str, number: int) -> float:
    """Epoch seconds; a time without a zone is taken as UTC."""
    try:
        stamp = datetime.fromisoformat(text.strip()) if _ISO.fullmatch(text.strip()) else None
    except ValueError:
        stamp = None
    if stamp is None or stamp.year < 1970:
        raise bad_line(name, number, key, text, _TIME_ALLOWED)
    return (stamp if stamp.tzinfo else stamp.replace(tzinfo=UTC)).timestamp()


def _refuse_none(name: str, requests: list[Any]) -> None:
    if not requests:
        raise BadTrace(name, "no request with tokens in and out", "at least one", "check how it was written")


def _left_out(failed: int, kept: int) -> tuple[str, ...]:
    return (f"{failed} of {failed + kept} requests left out: they failed or have no tokens",) if failed else ()
