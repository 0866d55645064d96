"""What an engine's step takes beyond its operators: planning, wire, Python between the calls, commit.

Steps of one kind (decode at batch 1 and 16, a prefill of 512 tokens) on the 201 M-parameter random Llama, bf16, two
threads. The operators of a step are two C++ calls, all layers with the head and the best token, timed where the engine
makes them; an operator's time is the median over the steps. A shared machine pauses steps as a whole: the 99th
percentile shows it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bars import Bar, finish
from paretune.kernels.cpu.build import load, why_missing
from paretune.kernels.jit import user_cache_dir
from paretune.runtime.engine import Engine, Request, SamplingParams
from paretune.runtime.random_model import SHAPES, write_random_model
from paretune.runtime.spec import Deployment, Pool

MEDIAN, P99 = 1.1, 1.5
OPERATORS = ("decoder", "argmax")
# name: requests, prompt tokens, new tokens
KINDS = {"decode, batch 1": (1, 128, 400), "decode, batch 16": (16, 128, 200), "prefill, 512 tokens": (1, 512, 1)}
PREFILLS = 40

_calls: list[float] = []


def timed(operator: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        result = operator(*arguments, **named)
        _calls.append(time.perf_counter() - begin)
        return result

    return call


def steps_of(engine: Engine, requests: int, prompt: int, new_tokens: int) -> list[tuple[float, list[float]]]:
    """Seconds of each step, and of each operator call in it, the prompts' step first."""
    rng = np.random.default_rng(requests)
    asked = SamplingParams(max_tokens=new_tokens, min_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    for number in range(requests):
        engine.add(Request(number, rng.integers(300, 32000, prompt).astype(np.int32), asked))
    steps = []
    while engine.has_work:
        _calls.clear()
        begin = time.perf_counter()
        engine.step()
        steps.append((time.perf_counter() - begin, list(_calls)))
    return steps


def measured(engine: Engine, requests: int, prompt: int, new_tokens: int) -> dict[str, float]:
    if new_tokens == 1:
        steps = [steps_of(engine, requests, prompt, 1)[0] for _ in range(PREFILLS)][2:]
    else:
        steps = [step for step in steps_of(engine, requests, prompt, new_tokens) if len(step[1])][10:]
    # every step of a kind makes the same calls in the same order
    if len({len(calls) for _, calls in steps}) != 1:
        raise SystemExit("steps of one kind differ in their operators: the sum of medians would mean nothing")
    operators = sum(statistics.median(place) for place in zip(*(calls for _, calls in steps)))
    seconds = [taken for taken, _ in steps]
    return {
        "steps": len(steps),
        "operators_ms": 1e3 * operators,
        "median_ms": 1e3 * statistics.median(seconds),
        "p99_ms": 1e3 * float(np.percentile(seconds, 99)),
    }


def main() -> int:
    root = user_cache_dir()
    if root is None:
        print("no cache folder that can be written: set PARETUNE_CACHE_DIR", file=sys.stderr)
        return 1
    library = load()
    if library is None:
        print(why_missing(), file=sys.stderr)
        return 1
    model = root / "peers" / "llama200m-bf16"
    model.parent.mkdir(exist_ok=True)
    if not model.exists():
        write_random_model(model, **SHAPES["llama200m"], dtype="bfloat16", seed=1234)
    for name in OPERATORS:
        setattr(library, name, timed(getattr(library, name)))
    pool = Pool(num_threads=2, max_model_len=1024, max_num_seqs=16, max_num_batched_tokens=2048, num_kv_blocks=512)
    deployment = Deployment(model=str(model), pools=(pool,))
    bars, details = [], {}
    with Engine(deployment.with_pool(enable_prefix_caching=False), Path(model)) as engine:
        for kind, (requests, prompt, new_tokens) in KINDS.items():
            found = details[kind] = measured(engine, requests, prompt, new_tokens)
            print(f"{kind}: {found}", file=sys.stderr)
            for name, limit in (("median", MEDIAN), ("p99", P99)):
                ratio = found[f"{name}_ms"] / found["operators_ms"]
                bars.append(Bar(f"{kind}: {name} step / sum of its operators' medians", ratio, limit, at_least=False))
    finish(bars, details, "step_overhead")
    return 0


if __name__ == "__main__":
    sys.exit(main())
