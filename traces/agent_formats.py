"""Logs of agents: LMCache's, which count characters and record neither ends nor pauses; LLMServingSim's sessions.

https://github.com/LMCache/lmcache-agent-trace (Apache-2.0); https://github.com/casys-kaist/LLMServingSim (MIT),
workloads/README.md.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .columns import MAX_SECONDS, MAX_TOKENS, BadTrace, Labels, PrefixHashes
from .jsonl_formats import object_of
from .prefix import prefix_hashes
from .text_file import COUNT, bad_line, lines_of
from .trace import Trace

LMCACHE_COLUMNS = ("family", "session", "timestamp_us", "input_chars", "output_chars", "hash_ids_2048chars")

# "1 token ~= 4 chars in English", help.openai.com, What are tokens and how to count them (2026-11)
CHARACTERS_PER_TOKEN = 4
_HASHED_CHARACTERS = 2048


def lmcache_trace(table: Any, name: str) -> Trace:
    """Calls of agents, in order of their times, with tokens estimated from characters.

    The time is that of the call: the gap to the session's next call grows with the length of this one's answer (their
    correlation is 0.89 and 0.80 in the two families), not with that one's own. `step` numbers calls in another order,
    and is not read.
    """
    columns: dict[str, list[Any]] = {column: table.column(column).to_pylist() for column in LMCACHE_COLUMNS}
    for column in ("timestamp_us", "input_chars", "output_chars"):
        for row, value in enumerate(columns[column]):
            if type(value) is not int or value < 0:
                raise BadTrace(f"{name}: row {row}: {column}", value, "an integer >= 0", "correct it")
    inputs, outputs = (np.array(columns[column], np.int64) for column in ("input_chars", "output_chars"))
    served = np.flatnonzero((inputs > 0) & (outputs > 0))
    if not len(served):
        raise BadTrace(name, "no call with characters in and out", "at least one", "check how it was written")
    times_us = np.array(columns["timestamp_us"], np.int64)[served]
    order = np.argsort(times_us, kind="stable")
    rows = served[order].tolist()
    notes = [f"tokens are estimated: {CHARACTERS_PER_TOKEN} characters each (OpenAI's rule of thumb)"]
    if len(served) < len(inputs):
        notes.append(
            f"{len(inputs) - len(served)} of {len(inputs)} calls left out: no characters in or out (calls of tools)"
        )
    return Trace(
        arrival_s=(times_us[order] - times_us[order[0]]) / 1e6,
        input_tokens=-(-inputs[rows] // CHARACTERS_PER_TOKEN),
        output_tokens=-(-outputs[rows] // CHARACTERS_PER_TOKEN),
        app=Labels.of(columns["family"][row] for row in rows),
        session=Labels.of(columns["session"][row] for row in rows),
        prefix=PrefixHashes.of(
            [columns["hash_ids_2048chars"][row] or [] for row in rows], _HASHED_CHARACTERS // CHARACTERS_PER_TOKEN
        ),
        source=name,
        notes=tuple(notes),
    )


# Token ids stand in the file itself, so their hashes need no secret; vLLM's default block.
_NO_SECRET = bytes(16)
_BLOCK_SIZE = 16


def read_llmservingsim(data: bytes, name: str) -> Trace:
    """Lines of single requests (input_toks, output_toks, arrival_time_ns), or of sessions: session_id, arrival_time_ns
    and sub_requests, each sent tool_duration_ns after the end of the one before. input_tok_ids become prefix hashes.

    A session's later requests have no time of their own: they are placed as if the answers before took none.
    """
    found: list[tuple[float, int, int, str | None, float, Any]] = []
    failed = timeless = 0
    lines, notes = lines_of(data, name)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = object_of(line, name, number)
        at_s = _nanoseconds(row, "arrival_time_ns", name, number)
        session = row.get("session_id")
        calls = row.get("sub_requests") if session is not None else [row]
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise bad_line(name, number, "sub_requests", calls, "a list of JSON objects")
        pause_s = math.nan
        for call in calls:
            inputs, outputs = (_tokens(call, key, name, number) for key in ("input_toks", "output_toks"))
            waited_s = _nanoseconds(call, "tool_duration_ns", name, number) if "tool_duration_ns" in call else 0.0
            ids = _token_ids(call, inputs, name, number)
            if inputs and outputs:
                timeless += not math.isnan(pause_s)
                found.append((at_s, inputs, outputs, None if session is None else str(session), pause_s, ids))
                pause_s = waited_s
            else:  # its tool still has run
                failed, pause_s = failed + 1, float(np.nan_to_num(pause_s)) + waited_s
            at_s += waited_s
    if not found:
        raise BadTrace(name, "no request with tokens in and out", "at least one", "check how it was written")
    if failed:
        notes = (*notes, f"{failed} of {failed + len(found)} requests left out: no tokens in or out")
    if timeless:
        notes = (*notes, f"{timeless} requests of sessions have no time: placed as if the answers before took none")
    found.sort(key=lambda each: each[0])
    arrival_s, inputs_, outputs_, names, pauses_s, ids_ = zip(*found)
    pauses = np.array(pauses_s)
    hashes = [prefix_hashes(ids, _BLOCK_SIZE, _NO_SECRET) for ids in ids_]
    return Trace(
        arrival_s=np.array(arrival_s) - arrival_s[0],
        input_tokens=np.array(inputs_, np.int32),
        output_tokens=np.array(outputs_, np.int32),
        session=Labels.of(names),
        pause_s=None if np.isnan(pauses).all() else pauses,
        prefix=PrefixHashes.of(hashes, _BLOCK_SIZE) if any(map(len, hashes)) else None,
        source=name,
        notes=notes,
    )


def _tokens(call: dict[str, Any], key: str, name: str, number: int) -> int:
    value = call.get(key)
    if type(value) is not int or not 0 <= value <= MAX_TOKENS:
        raise bad_line(name, number, key, value, COUNT)
    return value


def _nanoseconds(call: dict[str, Any], key: str, name: str, number: int) -> float:
    value = call.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < MAX_SECONDS * 1e9:
        raise bad_line(name, number, key, value, f"nanoseconds from 0 to {MAX_SECONDS * 1e9:g}")
    return float(value) / 1e9


def _token_ids(call: dict[str, Any], inputs: int, name: str, number: int) -> list[int]:
    ids = call.get("input_tok_ids") or []
    if not isinstance(ids, list) or not all(type(each) is int and 0 <= each <= MAX_TOKENS for each in ids):
        raise bad_line(name, number, "input_tok_ids", ids, "a list of integers >= 0")
    if ids and len(ids) != inputs:
        raise bad_line(name, number, "input_tok_ids", f"{len(ids)} ids", f"{inputs}, as many as input_toks")
    return ids
