"""The engine on an NVIDIA GPU: whether it is right, then prefill and decode in tokens a second, with CUDA graphs and
without. On a machine without a GPU it says so, prints its bars without values, and exits with 1.

It is not called cuda.py: scripts come first in Python's path, and `cuda` is a package of NVIDIA's that torch imports.
It ends
within 8 minutes: the checks are tests/test_gpu.py, and what has no time is left out, and named.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bars import Bar, finish, spread
from paretune.runtime.device import Gpu, gpus
from paretune.runtime.random_model import write_random_model
from paretune.runtime.spec import Deployment, Pool

TESTS = Path(__file__).resolve().parent.parent / "tests" / "test_gpu.py"
CHECK_LIMIT_S = 240.0
LIMIT_S = 390.0  # nothing begins after it; what has begun by then takes a minute at the most
PROMPT, ANSWER, RUNS = 512, 64, 3
BATCHES = (1, 4, 16, 64)
PREFILL_PROMPTS = 8
PRECISIONS = ("bf16", "fp8", "int8", "int4")
TARGET = 1.0  # no figure is asked for yet: graphs are to be no slower than no graphs


def checks() -> tuple[bool, str]:
    """Whether the tests that need a GPU passed, and the end of what they said."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(TESTS)]
    environment = {**os.environ, "PARETUNE_NEED_GPU": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_LIMIT_S, env=environment)
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode(errors="replace")  # bytes, whatever `text` says
        return False, f"{said[-6000:]}\nnot over within {CHECK_LIMIT_S:.0f} s"
    return done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def rates(model: Path, gpu: Gpu, weight_dtype: str, deadline_s: float, *, eager: bool) -> dict[str, Any]:
    """Tokens a second of prefill, and of decode by batch; medians and spread of RUNS."""
    from paretune.runtime.engine import Engine, Request
    from paretune.runtime.sampler import SamplingParams

    blocks = max(BATCHES) * (PROMPT + ANSWER + 16) // 16
    pool = Pool(
        accelerator=gpu.name.removeprefix("NVIDIA "), weight_dtype=weight_dtype, max_model_len=1024,
        max_num_seqs=max(BATCHES), max_num_batched_tokens=PREFILL_PROMPTS * PROMPT, num_kv_blocks=blocks,
        enforce_eager=eager, enable_prefix_caching=False,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    with Engine(Deployment(model=str(model), pools=(pool,)), model) as engine:
        found["capture_s"] = engine.capture_s

        def steps(batch: int, answer: int) -> list[tuple[int, float]]:
            sampling = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
            for number in range(batch):
                engine.add(Request(number, rng.integers(0, 1000, PROMPT).astype(np.int32), sampling))
            seen = []
            while engine.has_work:
                engine.step()
                assert engine.last_step is not None
                seen.append((engine.last_step.num_tokens, engine.last_step.seconds))
            return seen

        steps(PREFILL_PROMPTS, 2)
        prefill = []
        for _ in range(RUNS):
            tokens, seconds = steps(PREFILL_PROMPTS, 1)[0]
            prefill.append(tokens / seconds)
        found["prefill_tokens_per_s"] = spread(prefill)
        for batch in BATCHES:
            if time.monotonic() > deadline_s:
                found[f"decode_{batch}"] = "left out: no time"
                continue
            decode = []
            for _ in range(RUNS):
                ones = [seconds for tokens, seconds in steps(batch, ANSWER) if tokens == batch]
                decode.append(batch * len(ones) / sum(ones))
            found[f"decode_{batch}"] = spread(decode)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-checks", action="store_true", help="speed alone; the first bar stays without a value")
    parser.add_argument("--seconds", type=float, default=LIMIT_S, help="nothing begins after it")
    asked = parser.parse_args()
    begun_s = time.monotonic()
    limit_s = asked.seconds
    here = gpus()
    names = ["GPU answers token by token as the CPU does (1 = yes)"]
    names += [f"decode tokens/s of batch {batch}, bf16: with CUDA graphs over without" for batch in BATCHES]
    if not here:
        print("no NVIDIA GPU that torch sees: nothing was measured", file=sys.stderr)
        finish([Bar(name, None, TARGET) for name in names], {})
        return 1
    print(f"{here[0].name}, capability {'.'.join(map(str, here[0].capability))}", file=sys.stderr)
    right, said = (None, "left out") if asked.no_checks else checks()
    print(said, file=sys.stderr)
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        model = write_random_model(
            Path(name) / "model", vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=8,
            num_attention_heads=32, num_key_value_heads=8,
        )  # fmt: skip
        for precision in PRECISIONS:
            for eager in (False, True):
                how = f"{precision}, {'kernel by kernel' if eager else 'CUDA graphs'}"
                if time.monotonic() - begun_s > limit_s:
                    measured[how] = "left out: no time"
                    continue
                measured[how] = rates(model, here[0], precision, begun_s + limit_s, eager=eager)
                gc.collect()  # the engine, and with it what it holds of the GPU, which the next one is told is taken
                torch.cuda.empty_cache()
                print(f"{how}: {measured[how]}", file=sys.stderr)
    bars = [Bar(names[0], None if right is None else float(right), TARGET)]
    for batch, bar in zip(BATCHES, names[1:]):
        both = [measured[f"bf16, {how}"] for how in ("CUDA graphs", "kernel by kernel")]
        figures = [each[f"decode_{batch}"] for each in both if isinstance(each, dict)]
        known = len(figures) == 2 and all(isinstance(each, dict) for each in figures)
        value = figures[0]["median"] / figures[1]["median"] if known else None
        bars.append(Bar(bar, value, TARGET))
    finish(bars, {"gpus": [str(gpu) for gpu in here], "checks": said, "measured": measured}, "gpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
