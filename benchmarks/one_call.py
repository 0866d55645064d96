"""A decode step whose layers are one C++ call (kernels/decoder.py) beside the same operators called from Python.

Both take turns of five steps in one engine, the first of which is left out: it finds its code in no cache. The 201 M
random Llama, two threads, batches of 1 and 16 at bf16, int8 and int4; medians.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import numpy as np

from bars import Bar, finish
from paretune.kernels.cpu.build import load, why_missing
from paretune.kernels.jit import user_cache_dir
from paretune.runtime.engine import Engine, Request, SamplingParams
from paretune.runtime.random_model import SHAPES, write_random_model
from paretune.runtime.spec import Deployment, Pool

PROMPT, NEW_TOKENS, TURN = 128, 160, 5


def step_ms(model: Path, precision: str, batch: int) -> tuple[float, float]:
    """Medians: operators from Python, one call."""
    pool = Pool(
        num_threads=2, weight_dtype=precision, max_model_len=1024, max_num_seqs=16, max_num_batched_tokens=2048,
        num_kv_blocks=512, enable_prefix_caching=False,
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    rng = np.random.default_rng(0)
    seconds: tuple[list[float], list[float]] = ([], [])
    with Engine(Deployment(model=str(model), pools=(pool,)), model) as engine:
        transformer = engine._rank._transformer
        whole = transformer._decoder
        for number in range(batch):
            engine.add(Request(number, rng.integers(300, 32000, PROMPT).astype(np.int32), sampling))
        while engine.has_work and engine.num_waiting:
            engine.step()
        number = 0
        while engine.has_work:
            together = number // TURN % 2
            transformer._decoder = whole if together else None
            engine.step()
            assert engine.last_step is not None
            if number % TURN and engine.last_step.num_tokens == batch:
                seconds[together].append(engine.last_step.seconds)
            number += 1
    return 1e3 * statistics.median(seconds[0]), 1e3 * statistics.median(seconds[1])


def main() -> int:
    root = user_cache_dir()
    if root is None or load() is None:
        print(why_missing() or "no cache folder that can be written: set PARETUNE_CACHE_DIR", file=sys.stderr)
        return 1
    model = root / "peers" / "llama200m-bf16"
    model.parent.mkdir(exist_ok=True)
    if not model.exists():
        write_random_model(model, **SHAPES["llama200m"], dtype="bfloat16", seed=1234)
    bars, details = [], {}
    for precision in ("bf16", "int8", "int4"):
        for batch in (1, 16):
            apart, together = step_ms(model, precision, batch)
            print(f"{precision} batch {batch}: {apart:.1f} to {together:.1f} ms", file=sys.stderr)
            details[f"{precision} batch {batch}"] = {"operators_ms": apart, "one_call_ms": together}
            bars.append(Bar(f"{precision}, batch {batch}: operators from Python / one call", apart / together, 1.0))
    finish(bars, details, "one_call")
    return 0


if __name__ == "__main__":
    sys.exit(main())
