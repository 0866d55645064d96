"""What many LoRA adapters cost: a decode step of 16 requests with 16 adapters beside one whose requests share one.

    python benchmarks/lora.py [--rounds 15] [--threads 2]

A random Llama of 100 M parameters, bf16, served by the real engine; adapters of rank 16. All of them have a slot. One
engine takes turns: 16 requests with adapters all distinct (the next 16 of 100 each time), with one adapter, and with
none; each for 24 steps of pure decoding, of which the median counts. A ratio is the median over the rounds of the ratio
within one round. First the adapters change q and v; then, in an engine of their own, all seven linears, where the bar
is the ratio of the bytes that a step has to read.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bars import Bar, finish, spread

ROWS, RANK, STEPS, PROMPT_TOKENS = 16, 16, 24, 32
BASE = {
    "family": "llama", "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 4, "tie_word_embeddings": True, "max_position_embeddings": 512,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before torch is imported

    from paretune.runtime.model_shape import ModelShape
    from paretune.runtime.random_adapter import ALL_LINEAR, write_random_adapter
    from paretune.runtime.random_model import write_random_model

    bars: list[Bar] = []
    details: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = write_random_model(Path(scratch) / "base", **BASE)
        shape = ModelShape.load(model_dir)
        for name, modules, number in (("q and v", ("q_proj", "v_proj"), 100), ("all linears", ALL_LINEAR, 48)):
            print(f"{name}: writing {number} adapters", file=sys.stderr)
            folders = [
                write_random_adapter(
                    Path(scratch) / f"{len(modules)}-{seed}", shape, rank=RANK, target_modules=modules, seed=seed
                )
                for seed in range(number)
            ]
            found = measure(model_dir, folders, options.rounds, options.threads)
            details[name] = found
            ratios = {key: spread(found[key]) for key in ("distinct / one", "one / none")}
            bytes_ratio = found["bytes_distinct"] / found["bytes_one"]
            for key, value in ratios.items():
                print(f"{name}: {key}: {value['median']:.3f} ({value['min']:.3f} to {value['max']:.3f})")
            steps = ", ".join(f"{found[f'{side}_ms']:.2f} ms {side}" for side in ("distinct", "one", "none"))
            print(f"{name}: step {steps}; bytes distinct / one {bytes_ratio:.3f}")
            print(f"{name}: {found['read_ms']:.1f} ms to read an adapter, {found['fill_ms']:.2f} ms to fill a slot")
            measured = ratios["distinct / one"]["median"]
            if name == "q and v":
                bars.append(Bar("16 of 100 adapters on q and v: step over one adapter", measured, 1.15, False))
            else:
                title = "16 of 48 adapters on all linears: step over one adapter, over the ratio of the bytes"
                bars.append(Bar(title, measured / bytes_ratio, 1.15, False))
    finish(bars, details, "lora")


def measure(model_dir: Path, folders: list[Path], rounds: int, threads: int) -> dict[str, Any]:
    """Ratios by round; medians in ms; bytes of weights and adapters that a step reads; ms to read and to fill."""
    import numpy as np

    from paretune.runtime.adapters import RankAdapters
    from paretune.runtime.engine import Engine, Request, SamplingParams
    from paretune.runtime.model_shape import ModelShape
    from paretune.runtime.parallel import Layout, share_of
    from paretune.runtime.spec import Adapter, Deployment, Pool

    pool = Pool(
        num_threads=threads, max_model_len=256, max_num_seqs=ROWS, max_num_batched_tokens=ROWS * PROMPT_TOKENS,
        num_kv_blocks=ROWS * 16, enable_prefix_caching=False, max_loras=len(folders), max_lora_rank=RANK,
    )  # fmt: skip
    adapters = tuple(Adapter(name=folder.name, path=str(folder)) for folder in folders)
    rng = np.random.default_rng(0)
    with Engine(Deployment(pools=(pool,), adapters=adapters), model_dir) as engine:

        def median_step_s(names: list[str | None]) -> float:
            for request_id, name in enumerate(names):
                prompt = rng.integers(3, 32000, PROMPT_TOKENS).astype(np.int32)
                sampling = SamplingParams(max_tokens=STEPS + 1, temperature=0, ignore_eos=True)
                engine.add(Request(request_id, prompt, sampling, adapter=name))
            seconds = []
            while engine.has_work:
                engine.step()
                if engine.last_step is not None and engine.last_step.num_tokens == len(names):
                    seconds.append(engine.last_step.seconds)
            return statistics.median(seconds)

        names = [folder.name for folder in folders]
        taken: dict[str, list[float]] = {"distinct": [], "one": [], "none": []}
        for turn in range(-len(names) // ROWS - 1, rounds):  # the first turns fill every slot
            at = turn * ROWS
            sides: dict[str, list[str | None]] = {
                "distinct": [names[(at + row) % len(names)] for row in range(ROWS)],
                "one": [names[at % len(names)]] * ROWS,
                "none": [None] * ROWS,
            }
            for side in sorted(sides, reverse=turn % 2 == 1):
                seconds = median_step_s(sides[side])
                if turn >= 0:
                    taken[side].append(seconds)
    shape = ModelShape.load(model_dir)
    base_bytes = shape.weight_bytes("bf16")
    held = RankAdapters(shape, share_of(shape, Layout(1, 1, 1), 0), pool)
    begin = time.perf_counter()
    sizes = [held.read(number, folder).nbytes for number, folder in enumerate(folders, start=1)]
    read_s = time.perf_counter() - begin
    begin = time.perf_counter()
    for number, folder in enumerate(folders, start=1):
        held.put(number - 1, number, folder)
    fill_s = time.perf_counter() - begin
    return {
        "distinct / one": [a / b for a, b in zip(taken["distinct"], taken["one"])],
        "one / none": [a / b for a, b in zip(taken["one"], taken["none"])],
        **{f"{side}_ms": 1e3 * statistics.median(seconds) for side, seconds in taken.items()},
        **{f"{side}_fastest_ms": 1e3 * min(seconds) for side, seconds in taken.items()},
        "bytes_one": base_bytes + sizes[0],
        "bytes_distinct": base_bytes + ROWS * sizes[0],
        "read_ms": 1e3 * read_s / len(folders),
        "fill_ms": 1e3 * fill_s / len(folders),
    }


if __name__ == "__main__":
    main()
