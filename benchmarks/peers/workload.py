"""What every engine is timed on: a 512-token prefill, and decode of 32 tokens for a batch of short prompts.

Decoding is the time of 33 new tokens less that of one: a prompt that took longer than the decoding would hide it in its
own noise.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

Generate = Callable[[list[list[int]], int], list[list[int]]]

VOCAB_SIZE = 32000
PREFILL_TOKENS = 512
PROMPT_TOKENS = 32
NEW_TOKENS = 33
BATCHES = (1, 16)
REPEATS = {1: 4, 16: 3}  # timed runs of each kind, of which the least counts: the first warms up


def prompts(batch: int, length: int) -> list[list[int]]:
    rng = random.Random(batch)
    return [[rng.randrange(300, VOCAB_SIZE) for _ in range(length)] for _ in range(batch)]


def seconds(generate: Generate, batch: list[list[int]], new_tokens: int) -> float:
    begin = time.perf_counter()
    out = generate(batch, new_tokens)
    taken = time.perf_counter() - begin
    if [len(tokens) for tokens in out] != [new_tokens] * len(batch):
        raise SystemExit(f"asked for {new_tokens} tokens each, got {[len(tokens) for tokens in out]}")
    return taken


def best_s(generate: Generate, batch: list[list[int]], new_tokens: int) -> float:
    """Least seconds of several runs: what the engine can do when its neighbors leave it alone."""
    return min(seconds(generate, batch, new_tokens) for _ in range(REPEATS[len(batch)]))


def resident_mb(field: str = "VmRSS") -> float:
    """Memory of this process, now (VmRSS) or at its peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def report(engine: str, version: str, generate: Generate, **more: float) -> None:
    """Time `generate(prompts, number of new tokens)`, greedy and never stopping early; print one JSON object."""
    long_prompt = prompts(1, PREFILL_TOKENS)
    figures = {"prefill": PREFILL_TOKENS / best_s(generate, long_prompt, 1)}
    for batch in BATCHES:
        asked = prompts(batch, PROMPT_TOKENS)
        first = best_s(generate, asked, 1)
        whole = best_s(generate, asked, NEW_TOKENS)
        if whole <= first:
            raise SystemExit(
                f"batch {batch}: {whole:.3f} s with {NEW_TOKENS} new tokens, {first:.3f} s with one: too busy"
            )
        figures[f"decode_{batch}"] = batch * (NEW_TOKENS - 1) / (whole - first)
    memory = {"resident_mb": resident_mb(), "peak_mb": resident_mb("VmHWM")}
    print(json.dumps({"engine": engine, "version": version, **figures, **memory, **more}), flush=True)
