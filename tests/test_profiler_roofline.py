"""Roofline tables: a bound from the data sheet, an estimate above it, memory to the byte, and the label."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.profiler.hardware import BadHardware, accelerator
from paretune.profiler.operators import Composition, OperatorWork
from paretune.profiler.roofline import (
    EFFICIENCY,
    LAYER_OVERHEAD_S,
    arithmetic_of,
    kv_blocks,
    operator_bound_s,
    roofline_bounds,
    roofline_tables,
    step_bound_s,
    step_estimate_s,
)
from paretune.profiler.step_time import composed_time_s
from paretune.profiler.tables import step_tables
from paretune.runtime.model_parts import Experts
from paretune.runtime.quantization import Storage
from paretune.runtime.spec import Pool

from .test_profiler_operators import LLAMA_8B

H100 = accelerator("H100")


def pool(**changes: object) -> Pool:
    plain = {"accelerator": "H100", "max_num_batched_tokens": 4096, "max_num_seqs": 64, "max_model_len": 4096}
    return Pool(**{**plain, **changes})


def test_one_token_through_a_square_matmul_takes_its_weights_over_the_bandwidth() -> None:
    matmul = OperatorWork("matmul", flops=2 * 4096**2, weight_bytes=2 * 4096**2)
    assert operator_bound_s(matmul, H100, "bf16") == 2 * 4096**2 / 3.35e12


def test_an_8k_prompt_of_8b_needs_133_ms_of_an_h100() -> None:
    # research: peak FLOP/s need 133 ms for 8k tokens of 8B, which one public simulator undercuts by almost three times
    step = Composition(8192, 1, 8192, 0.0, 8192 * 8193 / 2)
    bound = step_bound_s(H100, LLAMA_8B, step, pool())
    linear_s = sum(bound[name] for name in ("qkv", "o", "gate_up", "down", "head"))
    assert linear_s == pytest.approx(2 * 7.5e9 * 8192 / 989e12, rel=0.01)
    assert sum(bound.values()) > 0.133


def test_a_block_moves_to_the_host_at_the_pace_of_the_link_and_each_rank_moves_its_part() -> None:
    # 16 tokens x 131,072 bytes of KV a token (Llama-3-8B, bf16) over PCIe 5 x16, 64 GB/s in one direction
    for ranks in (1, 2):
        modeled = step_tables(H100, LLAMA_8B, pool(host_kv_blocks=100, tensor_parallel_size=ranks))
        assert modeled.tables.block_copy_s == pytest.approx(16 * 131_072 / ranks / 64e9)
        assert any("to and from the host" in note for note in modeled.not_modeled)
    assert step_tables(H100, LLAMA_8B, pool()).tables.block_copy_s == 0.0


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 4096),
    rows=st.integers(1, 64),
    samples=st.integers(0, 64),
    context=st.floats(0, 2e5),
    starts=st.floats(0, 1e5),
    tp=st.sampled_from([1, 2, 8]),
)
def test_no_composed_step_is_faster_than_its_bound(
    tokens: int, rows: int, samples: int, context: float, starts: float, tp: int
) -> None:
    here = pool(tensor_parallel_size=tp)
    tables = roofline_tables(H100, LLAMA_8B, here)
    pairs = tokens * starts + tokens * (tokens + 1) / 2
    step = Composition(tokens, min(rows, tokens), min(samples, rows, tokens), context, pairs)
    weights_and_flops = {
        name: s for name, s in step_bound_s(H100, LLAMA_8B, step, here).items() if name != "prefill_attention"
    }
    # attention of a chunk: its FLOPs alone, as the tables know pairs, not how many tokens they belong to
    attention_s = 4 * 32 / tp * 128 * 32 * pairs / 989e12
    assert composed_time_s(tables, *step) >= (sum(weights_and_flops.values()) + attention_s) * (1 - 1e-9)


def test_the_least_of_a_step_with_windows_is_no_more_than_the_windows_that_contexts_fill() -> None:
    """64 rows of 200 tokens each, of models with a short and a wide window: nobody reads a whole window."""
    bound = 64 * 200 * 131_072 / 3.35e12
    for window in (256, 3000):
        found = roofline_bounds(H100, replace(LLAMA_8B, sliding_window=window), pool())
        plain = roofline_bounds(H100, LLAMA_8B, pool())
        step = Composition(64, 64, 64, 64 * 200.0, 0.0)
        # attention itself counts for nothing there, all else for what it does
        assert composed_time_s(found, *step) == pytest.approx(composed_time_s(plain, *step) - bound, rel=1e-6)


def test_the_least_of_experts_is_that_all_tokens_share_them() -> None:
    experts = Experts(8, 8, 2, 14336, True, 0, tuple(range(32)))
    mixtral = replace(LLAMA_8B, experts=experts)
    found = roofline_bounds(accelerator("H200"), mixtral, pool(accelerator="H200"))
    weights = 32 * (4096 * 6144 + 4096 * 4096 + 8 * 4096 + 2 * 3 * 4096 * 14336) * 2
    assert found.tokens_s[64] == pytest.approx(weights / 4.8e12, rel=1e-3)


def test_mxfp4_is_estimated_at_the_rate_of_activations_of_eight_bits_and_bounded_at_that_of_four() -> None:
    b200, step = accelerator("B200"), Composition(8192, 1, 0, 0.0, 0.0)
    for weight_dtype, slower in (("mxfp4", 2.0), ("nvfp4", 1.0)):
        here = pool(accelerator="B200", weight_dtype=weight_dtype)
        estimated = step_estimate_s(b200, LLAMA_8B, step, here) - 32 * LAYER_OVERHEAD_S
        bound = step_bound_s(b200, LLAMA_8B, step, here)
        # all of a long prompt's matrices are bound by arithmetic, and norms and the like by memory
        rest_s = bound["elementwise"]
        assert estimated * EFFICIENCY - rest_s == pytest.approx(slower * (sum(bound.values()) - rest_s), rel=0.01)


def test_an_indexer_scores_in_fp8_where_there_is_fp8() -> None:
    storage = Storage.bundled("bf16")
    assert [arithmetic_of("indexer", storage, accelerator(name)) for name in ("H100", "A100")] == ["fp8", "bf16"]


def test_an_all_reduce_over_two_domains_is_bound_by_the_network_between_them() -> None:
    step = Composition(4096, 1, 1, 0.0, 4096 * 4097 / 2)
    within, across = (
        step_bound_s(H100, LLAMA_8B, step, pool(tensor_parallel_size=tp))["o.all_reduce"] for tp in (8, 16)
    )
    # by hand: 32 layers of 4096 x 4096 bf16 numbers, an eighth of them over 50 GB/s; NVLink sends each once over 450
    message = 32 * 2.0 * 4096 * 4096
    assert within == pytest.approx(message / 450e9 + 32 * 2.4e-6)
    assert across == pytest.approx(message / 8 / 50e9 + 32 * 7.4e-6)


def test_tables_hold_what_the_estimate_says() -> None:
    here = pool()
    tables = roofline_tables(H100, LLAMA_8B, here)
    for step in (Composition(16, 16, 16, 16 * 1024.0, 0.0), Composition(2048, 1, 1, 0.0, 2048 * 2049 / 2)):
        assert composed_time_s(tables, *step) == pytest.approx(step_estimate_s(H100, LLAMA_8B, step, here), rel=0.03)


def test_tables_rise_with_tokens_context_and_pairs() -> None:
    tables = roofline_tables(H100, LLAMA_8B, pool())
    for name in ("tokens_s", "samples_s", "decode_attention_s", "prefill_attention_s"):
        table = getattr(tables, name)
        assert (table[1:] >= table[:-1]).all(), name
    assert tables.tokens_s[0] == tables.samples_s[0] == 0


def test_an_estimate_says_that_it_was_not_measured_and_how_wide_it_is() -> None:
    modeled = step_tables(H100, LLAMA_8B, pool())
    assert not modeled.measured
    assert modeled.relative_error >= 0.5
    assert any("not measured" in note for note in modeled.not_modeled)
    assert 0.5 < EFFICIENCY < 1


def test_kv_blocks_are_what_is_left_of_92_percent_of_the_memory() -> None:
    # by hand: (0.92 * 81559 MiB - 2 * 8.03e9 bytes of weights, norms in fp32) / (16 tokens * 131072 bytes)
    weights = 2 * (8_030_261_248 - 65 * 4096) + 4 * 65 * 4096
    assert kv_blocks(H100, LLAMA_8B, pool()) == int((0.92 * 81559 * 2**20 - weights) // (16 * 131072))


def test_more_kv_blocks_than_memory_are_refused_with_what_fits() -> None:
    with pytest.raises(BadHardware) as raised:
        roofline_tables(accelerator("L4"), LLAMA_8B, pool(accelerator="L4", num_kv_blocks=100_000))
    assert raised.value.where == "num_kv_blocks"
    assert "at most" in raised.value.allowed


def test_a_model_that_does_not_fit_is_refused() -> None:
    huge = replace(LLAMA_8B, num_layers=320)
    with pytest.raises(BadHardware):
        roofline_tables(H100, huge, pool())


def test_a_precision_without_a_rate_is_refused() -> None:
    with pytest.raises(BadHardware) as raised:
        step_tables(accelerator("A100"), LLAMA_8B, pool(accelerator="A100", weight_dtype="fp8"))
    assert "fp8" in str(raised.value.found)


def test_a_data_sheet_speaks_for_its_own_accelerator_only() -> None:
    with pytest.raises(BadHardware):
        step_tables(H100, LLAMA_8B, pool(accelerator="H200"))
    with pytest.raises(BadHardware):
        step_tables(accelerator("cpu"), LLAMA_8B, pool(accelerator="cpu"))


def test_sharding_and_precision_move_the_step_time() -> None:
    decode = Composition(16, 16, 16, 16 * 1024.0, 0.0)
    one, two = (step_estimate_s(H100, LLAMA_8B, decode, pool(tensor_parallel_size=tp)) for tp in (1, 2))
    assert two < one
    assert step_estimate_s(H100, LLAMA_8B, decode, pool(weight_dtype="fp8")) < one
