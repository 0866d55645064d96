"""Parts of a step from tables of an engine and of others beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from paretune.profiler.accelerator_step import TOKEN_GRID, Precision, engine_fusion, gpu_step
from paretune.profiler.decoder_layout import decoder_layout
from paretune.profiler.hardware import accelerator
from paretune.profiler.importers import OperatorTables, read_tables
from paretune.profiler.importers.bounds import gemm as gemm_bound

LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}  # fmt: skip
# by engine: times of matrices over their bound, and milliseconds of an all-reduce of any size that matters here
OVER_BOUND = {"trtllm": 4.0, "vllm": 3.0, "sglang": 2.0}
REDUCE_MS = {"trtllm": 0.5, "vllm": 0.6, "sglang": 0.4}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OperatorTables]:
    folder = tmp_path_factory.mktemp("tables")
    for engine in OVER_BOUND:
        write(folder, engine)
    return {engine: read_tables(folder, "b200_sxm", engine) for engine in OVER_BOUND}


def write(folder: Path, engine: str) -> None:
    rows = np.array([(m, n, k) for m in (1, 32768) for n in (128, 262144) for k in (128, 65536)], np.float64)
    gemms = [
        {"gemm_dtype": dtype, "m": m, "n": n, "k": k, "latency": 1e3 * OVER_BOUND[engine] * bound_s}
        for dtype in ("bfloat16", "nvfp4")
        for (m, n, k), bound_s in zip(rows, gemm_bound(accelerator("B200"), dtype)(rows), strict=True)
    ]
    reduced = [
        {"num_gpus": 2, "message_size": size, "latency": REDUCE_MS[engine] if size < 1e6 else 1e2}
        for size in (128, 500_000, 10**9)
    ]
    attention = [
        {"num_heads": 32, "num_key_value_heads": heads, "head_dim": 128, "attn_dtype": "bfloat16", "window_size": 0,
         "kv_cache_dtype": "bfloat16", "batch_size": batch, "isl": tokens, "step": 0, "latency": 1e3}
        for heads in (4, 8) for batch in (1, 1024) for tokens in (1, 131072)
    ]  # fmt: skip
    for row in attention:
        row["num_heads"] = 4 * int(row["num_key_value_heads"])
    for family, stem, found in (
        ("gemm", "gemm_perf", gemms),
        ("comm", "custom_allreduce_perf", reduced),
        ("attention", "context_attention_perf", attention),
        ("attention", "generation_attention_perf", attention),
    ):
        path = folder / "b200_sxm" / family / engine / "1.0"
        path.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(found).to_parquet(path / f"{stem}.parquet")


def one_token_s(tables: dict[str, OperatorTables], engine: str, dtype: str, asked: bool = False) -> float:
    layout = decoder_layout(LLAMA, 2, 1, dtype, engine_fusion(engine, "llama", asked))
    beside = [each for name, each in tables.items() if name != engine]
    step = gpu_step(tables[engine], layout, Precision("bfloat16", "bfloat16"), "balanced", beside)
    assert TOKEN_GRID[0] == 1.0
    return float(step.decode_s[0])


def test_a_bf16_matrix_takes_what_the_fastest_engine_has_and_a_quantized_one_what_others_like_it_have(
    tables: dict[str, OperatorTables],
) -> None:
    bound_s = gemm_bound(accelerator("B200"), "nvfp4")
    gemms = [g for g in decoder_layout(LLAMA, 2, 1, "nvfp4").gemms if g.rows == "tokens"]
    all_s = sum(g.count * float(bound_s(np.array([[1.0, g.n, g.k]]))[0]) for g in gemms)

    def more_than_sglang_s(dtype: str) -> float:
        return one_token_s(tables, "vllm", dtype) - one_token_s(tables, "sglang", dtype)

    # the difference of bf16 is that of the all-reduces; SGLang's nvfp4 stands for itself only
    assert more_than_sglang_s("bfloat16") == pytest.approx(2 * 32 * (0.6e-3 - 0.4e-3), rel=1e-3)
    assert more_than_sglang_s("nvfp4") - more_than_sglang_s("bfloat16") == pytest.approx((3.0 - 2.0) * all_s, rel=1e-3)


def test_an_engine_asked_to_norm_inside_the_all_reduce_runs_that_of_tensorrt_llm(
    tables: dict[str, OperatorTables],
) -> None:
    reduces = 2 * 32
    saved = one_token_s(tables, "vllm", "bfloat16") - one_token_s(tables, "vllm", "bfloat16", asked=True)
    assert saved == pytest.approx(reduces * (0.6e-3 - 0.5e-3 + 3e-6), rel=1e-3)
    # where its own is faster it stays with it, and only the launches of the norms fall away
    saved = one_token_s(tables, "sglang", "bfloat16") - one_token_s(tables, "sglang", "bfloat16", asked=True)
    assert saved == pytest.approx(reduces * 3e-6, rel=1e-3)


def test_tensorrt_llm_norms_inside_the_all_reduce_of_some_models_and_quantizes_there() -> None:
    llama, qwen = (engine_fusion("trtllm", model) for model in ("llama", "qwen3"))
    assert (llama.norms, qwen.norms) == (True, False)
    assert llama.quantization - qwen.quantization == {"qkv", "gate_up"}
    assert not engine_fusion("vllm", "llama").norms
    assert engine_fusion("vllm", "llama", asked=True).norms
