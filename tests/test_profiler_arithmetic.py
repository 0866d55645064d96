"""Arithmetic that holds whatever is measured, from the catalog of accelerators and the shapes of models alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.profiler.hardware import accelerator, accelerators
from paretune.profiler.operators import (
    Composition,
    OperatorWork,
    Rows,
    Sharding,
    kv_bytes_per_token,
    linears,
    rank_work,
    stage_shape,
)
from paretune.profiler.rank_memory import num_kv_blocks, weight_bytes
from paretune.profiler.roofline import operator_bound_s
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.quantization import Storage

from .test_profiler_operators import LLAMA_8B

H100 = accelerator("H100")
BF16 = Storage.bundled("bf16")
LLAMA_70B = ModelShape.from_config({
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 131072,
})  # fmt: skip


def prompt(tokens: int) -> Rows:
    return Rows.of([0], [tokens])


def decoding(rows: int, context: int) -> Rows:
    return Rows.of([context - 1] * rows, [1] * rows)


def work(shape: ModelShape, step: Rows | Composition, sharding: Sharding, stage: int = 0) -> tuple[OperatorWork, ...]:
    return rank_work(shape, step, sharding, BF16, "bf16", stage=stage)


def step_s(shape: ModelShape, step: Rows | Composition, sharding: Sharding | None = None) -> float:
    """Least time of a step on H100s, all stages one after the other."""
    shared = sharding or Sharding()
    return sum(
        operator_bound_s(one, H100, "bf16")
        for stage in range(shared.pipeline_parallel_size)
        for one in work(shape, step, shared, stage)
    )


def flops(shape: ModelShape, step: Rows) -> tuple[float, float]:
    """Of attention, and of all operators."""
    found = work(shape, step, Sharding())
    return sum(one.flops for one in found if "attention" in one.name), sum(one.flops for one in found)


@pytest.mark.parametrize(("tokens", "percent"), [(1_000, 1.6), (10_000, 14.0)])
def test_attention_has_1_6_percent_of_an_8b_prefill_at_1k_tokens_and_14_percent_at_10k(
    tokens: int, percent: float
) -> None:
    # by hand: 4 * 32 layers * 4096 * n (n + 1) / 2 of attention, and two FLOPs for each parameter of the layers; the
    # vocabulary projection is of the last token alone
    attention, total = flops(LLAMA_8B, prompt(tokens))
    pairs = tokens * (tokens + 1) // 2
    assert attention == 4 * 32 * 4096 * pairs
    layers = 8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096
    assert total == attention + 2 * (layers * tokens + 128256 * 4096)
    # the usual figure counts two FLOPs a token for all 8.03e9 parameters, embedding and head too; of what a server
    # computes the shares are 1.8 % and 15.8 %
    assert 100 * attention / (attention + 2 * 8.03e9 * tokens) == pytest.approx(percent, abs=0.1)


@given(st.integers(2, 100_000))
def test_attention_of_a_prompt_grows_with_half_its_square_and_of_a_decode_step_with_its_context(tokens: int) -> None:
    per_pair = 4 * 32 * 4096
    assert flops(LLAMA_8B, prompt(tokens))[0] == per_pair * tokens * (tokens + 1) // 2
    assert flops(LLAMA_8B, decoding(1, tokens))[0] == per_pair * tokens
    # a prompt in chunks computes what the whole does
    first = tokens // 3
    if 1 < first < tokens - 1:
        chunks = [Rows.of([0], [first]), Rows.of([first], [tokens - first])]
        assert sum(flops(LLAMA_8B, chunk)[0] for chunk in chunks) == per_pair * tokens * (tokens + 1) // 2


def test_dense_layers_cross_from_bandwidth_to_compute_bound_at_295_tokens_on_an_h100() -> None:
    assert H100.flops_per_s("bf16") / H100.peak_bytes_per_s == pytest.approx(295, abs=0.5)
    weights_alone = [replace(one, activation_bytes=0.0) for one in work(LLAMA_8B, decoding(1, 1), Sharding())]
    bandwidth_s = {one.name: one.weight_bytes / H100.peak_bytes_per_s for one in weights_alone if one.weight_bytes}
    for tokens, compute_bound in ((295, False), (296, True)):
        step = Rows.of([0] * tokens, [1] * tokens)
        for one in work(LLAMA_8B, step, Sharding()):
            if one.weight_bytes:
                found_s = operator_bound_s(replace(one, activation_bytes=0.0), H100, "bf16")
                assert bool(found_s > bandwidth_s[one.name]) is compute_bound


@pytest.mark.parametrize("group", [4, 8])
def test_grouped_queries_cut_kv_bytes_by_their_group(group: int) -> None:
    every_head = replace(LLAMA_8B, num_kv_heads=32)
    grouped = replace(LLAMA_8B, num_kv_heads=32 // group)
    assert every_head.kv_bytes_per_token("bf16") == group * grouped.kv_bytes_per_token("bf16")
    read = [sum(one.kv_bytes for one in work(shape, decoding(4, 1000), Sharding())) for shape in (every_head, grouped)]
    assert read[0] == group * read[1]


def test_llama_3_8b_caches_131072_bytes_a_token_in_bf16_and_ranks_divide_them_up_to_its_8_kv_heads() -> None:
    assert LLAMA_8B.kv_bytes_per_token("bf16") == 131072
    assert LLAMA_8B.kv_bytes_per_token("fp8") == 65536
    for tp in (1, 2, 4, 8):
        assert kv_bytes_per_token(LLAMA_8B, tp, "bf16") * tp == 131072
    for tp in (16, 32):
        assert kv_bytes_per_token(LLAMA_8B, tp, "bf16") == 131072 // 8


@settings(deadline=None, max_examples=25)
@given(stages=st.sampled_from([2, 4, 5, 8]), tokens=st.integers(1, 20_000), context=st.integers(1, 100_000))
def test_pipeline_stages_never_lower_the_unloaded_latency_of_a_model_that_fits(
    stages: int, tokens: int, context: int
) -> None:
    for step in (prompt(tokens), decoding(1, context)):
        assert step_s(LLAMA_8B, step, Sharding(pipeline_parallel_size=stages)) >= step_s(LLAMA_8B, step) * (1 - 1e-12)


def test_stages_hold_every_layer_once() -> None:
    layers = [stage_shape(LLAMA_70B, 7, stage).num_layers for stage in range(7)]
    assert sum(layers) == 80
    assert max(layers) - min(layers) <= 1


@pytest.mark.parametrize("shape", [LLAMA_8B, LLAMA_70B], ids=["8b", "70b"])
def test_tensor_parallelism_lowers_the_ttft_of_a_long_prompt_and_the_throughput_of_a_device(shape: ModelShape) -> None:
    ttft_s = [step_s(shape, prompt(8192), Sharding(tp)) for tp in (1, 2, 4, 8)]
    assert ttft_s == sorted(ttft_s, reverse=True)
    # while KV does not bind, a replica may batch as much on one device as on several
    for step in (prompt(8192), decoding(32, 1024), decoding(512, 1024)):
        tokens = float(step.num_tokens.sum())
        rates = [tokens / step_s(shape, step, Sharding(tp)) / tp for tp in (1, 2, 4, 8)]
        assert rates == sorted(rates, reverse=True)


def test_tensor_parallelism_decodes_fewer_tokens_a_device_where_the_batch_is_compute_bound() -> None:
    # as many requests in flight for each device; weights are read once for more of them, but sums cross the links
    rates = [512 * tp / step_s(LLAMA_8B, decoding(512 * tp, 128), Sharding(tp)) / tp for tp in (1, 2, 4, 8)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("shape", [LLAMA_8B, LLAMA_70B], ids=["8b", "70b"])
def test_input_sharding_leaves_the_weight_bytes_of_a_device_as_they_are(shape: ModelShape) -> None:
    whole = weight_bytes(shape, Sharding(), BF16)
    assert weight_bytes(shape, Sharding(context_parallel_size=4), BF16) == whole
    assert weight_bytes(shape, Sharding(data_parallel_size=4), BF16) == whole
    read = [
        sum(one.weight_bytes for one in work(shape, prompt(4096), Sharding(context_parallel_size=parts)))
        for parts in (1, 4)
    ]
    assert read[0] == read[1]
    assert linears(shape, 1, data_parallel_size=4) == linears(shape, 1)
    for tp in (2, 4, 8):
        vectors = 2 * (tp - 1) * 2 * shape.vector_parameters()  # whole on every rank, in fp32
        assert weight_bytes(shape, Sharding(tp), BF16) * tp == whole + vectors


def test_kv_blocks_are_what_the_weights_leave() -> None:
    # by hand: 73.6 GB less 16,061,054,976 bytes with norms in fp32, over 16 tokens of 131,072 bytes
    weights = 2 * (8_030_261_248 - 65 * 4096) + 4 * 65 * 4096
    assert weight_bytes(LLAMA_8B, Sharding(), BF16) == weights
    blocks = num_kv_blocks(LLAMA_8B, Sharding(), BF16, "bf16", memory_bytes=73.6e9)
    assert blocks == (73_600_000_000 - weights) // (16 * 131072)


def test_fp8_peaks_are_twice_bf16_and_fp4_twice_fp8() -> None:
    # the matrix engines of Gaudi 3 run fp8 no faster than bf16 (its white paper)
    rates = [known.peak_flops_per_s for name, known in accelerators().items() if name != "Gaudi 3"]
    for narrow, wide in (("fp8", "bf16"), ("fp4", "fp8")):
        ratios = [rate[narrow] / rate[wide] for rate in rates if narrow in rate and wide in rate]
        # data sheets round: 1979 is 2 x 989.5; L40S: 733 and 362.05
        assert all(ratio == pytest.approx(2, rel=0.025) for ratio in ratios), ratios
    assert sum("fp8" in rate for rate in rates) >= 5
