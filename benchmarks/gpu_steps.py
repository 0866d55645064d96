"""Steps of the engine on an NVIDIA GPU and what each took: for whoever fits or checks a step-time model.

A random model of 1.1 B parameters, bf16, with CUDA graphs and without: decode at batches of 1 to 128 with contexts up
to 2,048, prompts of 64 to 3,000 tokens, and mixed steps as chunked prefill composes them. Every step becomes a row of
results/gpu_steps.json. It takes 20 s on an H200. Without a GPU it says so and exits with 1.
"""

from __future__ import annotations

import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from bars import RESULTS, finish
from paretune.runtime.device import Gpu, gpus
from paretune.runtime.engine import Engine, Request
from paretune.runtime.random_model import write_random_model
from paretune.runtime.sampler import SamplingParams
from paretune.runtime.spec import Deployment, Pool
from paretune.traces.whole_file import write_whole

SHAPE = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
MOST_CONTEXT = 140_000  # tokens of all requests of a decode step
PROMPTS = ((1, 64), (1, 256), (1, 1024), (1, 3000), (8, 128), (8, 400), (16, 200), (4, 1000))
COLUMNS = ("eager", "num_tokens", "num_rows", "num_samples", "decode_context", "prefill_pairs", "seconds")

Row = tuple[int, int, int, int, float, float, float]


class Recorder:
    """Requests for one engine, and the steps that it then takes."""

    def __init__(self, engine: Engine, *, eager: bool) -> None:
        self._engine, self._eager = engine, eager
        self._rng = np.random.default_rng(0)
        self._asked = 0
        self.rows: list[Row] = []

    def add(self, requests: int, prompt: int, answer: int) -> None:
        sampling = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
        for _ in range(requests):
            tokens = self._rng.integers(0, 1000, prompt).astype(np.int32)
            self._engine.add(Request(self._asked, tokens, sampling))
            self._asked += 1

    def step(self) -> None:
        self._engine.step()
        taken = self._engine.last_step
        assert taken is not None
        counts = (taken.num_tokens, taken.num_rows, taken.num_samples)
        work = (float(taken.decode_context), float(taken.prefill_pairs), round(taken.seconds, 7))
        self.rows.append((int(self._eager), *counts, *work))

    def drain(self) -> None:
        while self._engine.has_work:
            self.step()

    def record(self) -> None:
        self.add(4, 512, 3)
        self.drain()
        self.rows.clear()  # the first steps compile
        for batch in BATCHES:
            for context in (128, 1024) if self._eager else (64, 512, 2048):
                if batch * context <= MOST_CONTEXT:
                    self.add(batch, context, 6 if self._eager else 24)
                    self.drain()
        for requests, prompt in PROMPTS:
            self.add(requests, prompt, 1)
            self.drain()
        for _ in range(6 if self._eager else 20):
            for _ in range(int(self._rng.integers(1, 24))):
                self.add(1, int(self._rng.integers(16, 2500)), int(self._rng.integers(2, 24)))
            for _ in range(int(self._rng.integers(2, 14))):
                if self._engine.has_work:
                    self.step()
        self.drain()


def steps_of(model: Path, gpu: Gpu, *, eager: bool) -> list[Row]:
    pool = Pool(
        accelerator=gpu.name.removeprefix("NVIDIA "), weight_dtype="bf16", max_model_len=4096, max_num_seqs=128,
        max_num_batched_tokens=4096, num_kv_blocks=128 * 130, enforce_eager=eager, enable_prefix_caching=False,
    )  # fmt: skip
    with Engine(Deployment(model=str(model), pools=(pool,)), model) as engine:
        recorder = Recorder(engine, eager=eager)
        recorder.record()
        return recorder.rows


def main() -> int:
    here = gpus()
    if not here:
        print("no NVIDIA GPU that torch sees: nothing was measured", file=sys.stderr)
        finish([], {})
        return 1
    with tempfile.TemporaryDirectory() as folder:
        model = write_random_model(Path(folder) / "model", **SHAPE)
        rows = [row for eager in (False, True) for row in steps_of(model, here[0], eager=eager)]
    found = {
        "gpu": here[0].name,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "model": SHAPE,
        "columns": COLUMNS,
        "steps": rows,
    }
    write_whole(RESULTS / "gpu_steps.json", json.dumps(found) + "\n")
    finish([], {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
