"""Operator tables made up for tests: every operator of a Llama 8B on an H100 at twice its bound, and 5 µs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

LAUNCH_S = 5e-6


def bandwidth_s(bytes_moved: float) -> float:
    return bytes_moved / 3.35e12


def write_operators(folder: Path) -> Path:
    """As aiconfigurator lays them out, of vLLM 1.0."""

    def write(family: str, stem: str, rows: list[dict[str, float | str]]) -> None:
        path = folder / "h100_sxm" / family / "vllm" / "1.0"
        path.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_parquet(path / f"{stem}.parquet")

    gemms: list[dict[str, float | str]] = []
    for m in (1, 64, 512, 4096, 32768):
        for n in (32, 4096, 28672, 128256):
            for k in (4096, 14336):
                bound = max(2.0 * m * n * k / 989e12, bandwidth_s(2.0 * (n * k + m * k + m * n)))
                latency = 1e3 * (2 * bound + LAUNCH_S)
                gemms.append({"gemm_dtype": "bfloat16", "m": m, "n": n, "k": k, "latency": latency})
    write("gemm", "gemm_perf", gemms)
    same = {"num_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "attn_dtype": "bfloat16",
            "kv_cache_dtype": "bfloat16", "window_size": 0}  # fmt: skip
    prefill: list[dict[str, float | str]] = []
    decode: list[dict[str, float | str]] = []
    for b in (1, 8, 64, 1024):
        for t in (16, 256, 4096, 131072):
            moved = bandwidth_s(b * t * (4.0 * 8 * 128 + 4.0 * 32 * 128))
            pairs = max(2.0 * b * 32 * 128 * t * (t + 1) / 989e12, moved)
            prefill.append({**same, "batch_size": b, "isl": t, "step": 0, "latency": 1e3 * (2 * pairs + LAUNCH_S)})
            read = bandwidth_s(b * (t * 4.0 * 8 * 128 + 4.0 * 32 * 128))
            decode.append({**same, "batch_size": b, "isl": 1, "step": t - 1, "latency": 1e3 * (2 * read + LAUNCH_S)})
    write("attention", "context_attention_perf", prefill)
    write("attention", "generation_attention_perf", decode)
    return folder
