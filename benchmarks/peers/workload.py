"""What every engine is timed on: a 512-token prefill, and decode of 32 tokens for a batch of 128-token prompts."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable

Generate = Callable[[list[list[int]], int], list[list[int]]]

VOCAB_SIZE = 32000
PREFILL_TOKENS = 512
PROMPT_TOKENS = 128
NEW_TOKENS = 33
BATCHES = (1, 16)


def prompts(batch: int, length: int) -> list[list[int]]:
    rng = random.Random(batch)
    return [[rng.randrange(300, VOCAB_SIZE) for _ in range(length)] for _ in range(batch)]


def best_s(generate: Generate, batch: list[list[int]], new_tokens: int, repeats: int) -> float:
    """Least seconds of several runs after one warm-up: what the engine can do when its neighbors leave it alone."""
    seconds = []
    for run in range(repeats + 1):
        begin = time.perf_counter()
        out = generate(batch, new_tokens)
        if run:
            seconds.append(time.perf_counter() - begin)
        if [len(tokens) for tokens in out] != [new_tokens] * len(batch):
            raise SystemExit(f"asked for {new_tokens} tokens each, got {[len(tokens) for tokens in out]}")
    return min(seconds)


def report(engine: str, version: str, generate: Generate, repeats: int = 3) -> None:
    """Time `generate(prompts, number of new tokens)`, greedy and never stopping early; print one JSON object."""
    figures = {"prefill_tokens_per_s": PREFILL_TOKENS / best_s(generate, prompts(1, PREFILL_TOKENS), 1, repeats)}
    for batch in BATCHES:
        asked = prompts(batch, PROMPT_TOKENS)
        first = best_s(generate, asked, 1, repeats)
        whole = best_s(generate, asked, NEW_TOKENS, repeats)
        figures[f"decode_batch{batch}_tokens_per_s"] = batch * (NEW_TOKENS - 1) / (whole - first)
    print(json.dumps({"engine": engine, "version": version, **figures}), flush=True)
