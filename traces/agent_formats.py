"""Logs of agents: LMCache's traces, which count characters and record neither ends nor pauses.

https://github.com/LMCache/lmcache-agent-trace (Apache-2.0).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .columns import BadTrace, Labels, PrefixHashes
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
