"""Operators of every kind of model and sharding: against counts by hand, draws of routings and published sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.profiler.adapter_work import Adapters, adapter_work
from paretune.profiler.hardware import accelerator
from paretune.profiler.operator_work import OperatorWork
from paretune.profiler.operators import Composition, Routing, Rows, Sharding, rank_work
from paretune.profiler.rank_memory import activation_bytes, kv_bytes_of_request, num_kv_blocks, weight_bytes
from paretune.profiler.roofline import roofline_tables
from paretune.profiler.routing import ranks_chosen
from paretune.profiler.step_time import PromptPairs, row_pairs
from paretune.profiler.tables import step_tables
from paretune.runtime.model_shape import BadModel, Experts, ModelShape
from paretune.runtime.quantization import Storage
from paretune.runtime.runnable import check_runnable
from paretune.runtime.spec import Deployment, Pool

from .test_profiler_operators import LLAMA_8B

# deepseek-ai/DeepSeek-V3, config.json
DEEPSEEK_V3 = ModelShape.from_config({
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "topk_method": "noaux_tc", "norm_topk_prob": True, "max_position_embeddings": 163840,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
})  # fmt: skip
# openai/gpt-oss-20b, config.json
GPT_OSS = ModelShape.from_config({
    "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
    "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "max_position_embeddings": 131072,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
})  # fmt: skip
BF16 = Storage.bundled("bf16")


def named(found: tuple[OperatorWork, ...]) -> dict[str, OperatorWork]:
    return {one.name: one for one in found}


def test_the_published_parameters_and_bytes() -> None:
    # arXiv:2412.19437: 671 B, 37 B of them active with the embedding; gpt-oss-20b: 20.9 B, 3.6 B active (model card),
    # 13,761,264,768 bytes of tensors (model.safetensors.index.json)
    assert DEEPSEEK_V3.num_parameters() == pytest.approx(671e9, rel=1e-3)
    active = sum(one.flops for one in rank_work(DEEPSEEK_V3, Rows.of([0], [1]), Sharding(), BF16, "bf16")) / 2
    assert active == pytest.approx(37e9 - 129280 * 7168, rel=0.02)
    assert GPT_OSS.num_parameters() == pytest.approx(20.9e9, rel=1e-3)
    assert GPT_OSS.checkpoint_bytes() == 13_761_264_768


def test_a_latent_caches_70272_bytes_a_token_whatever_the_ranks() -> None:
    # 61 layers of 512 + 64 numbers in bf16 (arXiv:2412.19437)
    assert DEEPSEEK_V3.kv_bytes_per_token("bf16") == 70272
    found = rank_work(DEEPSEEK_V3, Rows.of([999], [1]), Sharding(8), BF16, "bf16")
    assert named(found)["decode_attention"].kv_bytes == 70272 * 1000


def test_latent_attention_costs_3_4_times_the_flops_a_pair_where_it_is_absorbed() -> None:
    prompt = named(rank_work(DEEPSEEK_V3, Rows.of([100], [50]), Sharding(), BF16, "bf16"))
    verified = named(rank_work(DEEPSEEK_V3, Rows.of([100], [50]), Sharding(), BF16, "bf16", decode_tokens=64))
    ratio = verified["decode_attention"].flops / prompt["prefill_attention"].flops
    assert ratio == pytest.approx((2 * 512 + 64) / (128 + 64 + 128))
    # kv_b for each of 150 cached tokens, or for 50 queries and answers
    assert prompt["kv_b"].flops / verified["kv_b"].flops == 3


@given(
    rows=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), min_size=1, max_size=5),
    limit=st.integers(1, 50),
    kind=st.sampled_from(["whole", "window", "chunk"]),
)
def test_what_rows_attend_to_is_what_a_mask_lets_through(rows: list[tuple[int, int]], limit: int, kind: str) -> None:
    found = Rows.of(*zip(*rows)).attended(**({} if kind == "whole" else {kind: limit}))
    pairs, keys = {True: 0, False: 0}, {True: 0, False: 0}
    for start, tokens in rows:
        query, key = np.arange(start, start + tokens)[:, None], np.arange(start + tokens)[None, :]
        seen = key <= query
        seen &= {"whole": key >= 0, "window": key > query - limit, "chunk": key // limit == query // limit}[kind]
        pairs[tokens == 1] += int(seen.sum())
        keys[tokens == 1] += int(seen.any(axis=0).sum())
    assert (found.decode_pairs, found.prefill_pairs) == (pairs[True], pairs[False])
    assert (found.decode_keys, found.prefill_keys) == (keys[True], keys[False])


def test_windows_read_no_more_than_the_window_and_free_what_lies_before() -> None:
    found = named(rank_work(GPT_OSS, Rows.of([4095, 4095], [1, 1]), Sharding(), BF16, "bf16"))
    layer = 2 * 8 * 64 * 2
    assert found["decode_attention"].kv_bytes == 12 * 2 * 4096 * layer
    assert found["window_128_decode_attention"].kv_bytes == 12 * 2 * 128 * layer
    assert kv_bytes_of_request(GPT_OSS, Sharding(), "bf16", 4096) == 24 * 4096 * layer
    assert kv_bytes_of_request(GPT_OSS, Sharding(), "bf16", 4096, frees_windows=True) == 12 * (4096 + 128) * layer


def test_many_steps_at_once_are_each_step_alone() -> None:
    start, tokens = np.array([[10, 0, 500], [0, 3, 90]]), np.array([[1, 7, 64], [1, 1, 1]])
    for shape in (LLAMA_8B, DEEPSEEK_V3, GPT_OSS):
        sharding = Sharding(4, expert_parallel=shape.experts is not None)
        both = named(rank_work(shape, Rows.of(start, tokens), sharding, BF16, "bf16"))
        for step in range(2):
            alone = named(rank_work(shape, Rows.of(start[step], tokens[step]), sharding, BF16, "bf16"))
            for name, work in both.items():
                for part in ("flops", "weight_bytes", "kv_bytes", "message_bytes"):
                    want = getattr(alone[name], part) if name in alone else 0.0
                    got = np.broadcast_to(getattr(work, part), (2,))[step]
                    assert got == pytest.approx(want), (name, part)


@settings(max_examples=20)
@given(count=st.sampled_from([8, 64, 128]), ranks=st.sampled_from([2, 4, 8]), k=st.integers(1, 8))
def test_ranks_that_a_token_chooses_are_the_mean_of_draws(count: int, ranks: int, k: int) -> None:
    draws = torch.rand(4000, count, generator=torch.Generator().manual_seed(k)).topk(k).indices * ranks // count
    counted = np.mean([len(set(row)) for row in draws.tolist()])
    assert ranks_chosen(Experts(count, count, k, 1, True, 0, (0,)), ranks) == pytest.approx(counted, rel=0.03)


def test_tokens_travel_to_experts_where_attention_is_data_parallel() -> None:
    sharding = Sharding(data_parallel_size=8, expert_parallel=True, expert_transport="all_to_all")
    found = named(
        rank_work(
            DEEPSEEK_V3, Rows.of([100] * 64, [1] * 64), sharding, BF16, "bf16", dispatch_bytes=1, routing=Routing(1.0)
        )
    )
    # 58 layers, 64 tokens, each to 5.3 of 8 ranks on average, of which its own is one eighth; fp8 there, bf16 back
    remote = ranks_chosen(DEEPSEEK_V3.experts, 8) * 7 / 8 if DEEPSEEK_V3.experts else 0.0
    assert found["dispatch.all_to_all"].message_bytes == pytest.approx(58 * 64 * remote * 7168)
    assert found["combine.all_to_all"].message_bytes == 2 * found["dispatch.all_to_all"].message_bytes
    assert not any(name.endswith("all_reduce") for name in found)
    # each rank multiplies an eighth of 8 * 64 tokens times 8 choices; routing that is twice as uneven, twice that
    assert found["expert_down"].flops == pytest.approx(58 * 64 * 8 * 2 * 7168 * 2048)
    uneven = rank_work(DEEPSEEK_V3, Rows.of([100] * 64, [1] * 64), sharding, BF16, "bf16", routing=Routing(2.0))
    assert named(uneven)["expert_down"].flops == pytest.approx(2 * found["expert_down"].flops)
    for impossible in (sharding._replace(expert_transport="all_reduce"), sharding._replace(expert_parallel=False)):
        with pytest.raises(ValueError, match="experts"):
            rank_work(DEEPSEEK_V3, Composition(1, 1, 1, 1.0, 0.0), impossible, BF16, "bf16")


def test_data_parallel_attention_repeats_attention_and_divides_experts() -> None:
    storage = Storage.of_checkpoint(DEEPSEEK_V3.quantization)
    shared = Sharding(data_parallel_size=8, expert_parallel=True, expert_transport="all_to_all")
    one, eight = (weight_bytes(DEEPSEEK_V3, sharding, storage) for sharding in (Sharding(), shared))
    expert = 3 * 7168 * 2048 + 4 * 3 * 56 * 16  # fp8, and a scale for each block of 128 x 128
    assert one - eight == 58 * (256 - 32) * expert


def test_quantized_checkpoints_leave_head_router_and_what_they_list() -> None:
    deepseek, gpt = (Storage.of_checkpoint(shape.quantization) for shape in (DEEPSEEK_V3, GPT_OSS))
    assert {name for name, *_ in DEEPSEEK_V3.matrices() if deepseek.dtype(name) == "bf16"} == {"router", "head"}
    assert {name for name, *_ in GPT_OSS.matrices() if gpt.dtype(name) == "mxfp4"} == {"expert_gate_up", "expert_down"}


def test_adapters_add_two_thin_products_to_each_matrix() -> None:
    for tp in (1, 4):
        a, b = adapter_work(LLAMA_8B, Adapters(rank=16, num_tokens=10, distinct=3), tensor_parallel_size=tp)
        whole, cut = 5 * 4096, 4096 + 14336  # inputs of q, k, v, gate, up; of o, down
        assert a.flops == 2 * 10 * 16 * 32 * (whole + cut // tp)
        assert b.flops == 2 * 10 * 16 * 32 * ((4096 + 2 * 1024 + 2 * 14336) // tp + 2 * 4096)
        assert a.weight_bytes == 3 * 2 * 16 * 32 * (whole + cut // tp)


def test_verifying_rows_read_their_context_once_for_all_proposals() -> None:
    rows = Rows.verifying([1000, 2000], 3)
    found = named(rank_work(LLAMA_8B, rows, Sharding(), BF16, "bf16", decode_tokens=4))
    assert found["decode_attention"].kv_bytes == (1004 + 2004) * 131072
    assert found["head"].flops == 8 * 2 * 128256 * 4096
    # the table counts by pairs: at least as many as take as long as reading the keys
    assert row_pairs(4, 1000, PromptPairs()) == 4 * 1000 + 10
    assert row_pairs(4, 1000, PromptPairs(per_key=70.0)) == 70 * 1004


def test_a_row_of_proposals_takes_no_less_than_to_read_its_context() -> None:
    pool = Pool(accelerator="H100", num_kv_blocks=9000, max_model_len=131072)
    tables = roofline_tables(accelerator("H100"), LLAMA_8B, pool)
    pairs = row_pairs(5, 100_000, tables.prompt_pairs)
    per_pair_s = 4 * 32 * 4096 / 989e12
    assert pairs * per_pair_s == pytest.approx(100_005 * 131072 / 3.35e12)


def test_activations_are_the_widest_moment_of_a_layer() -> None:
    # by hand, of a token: residual and its norm, gate and up in one, their product; logits of one row in fp32
    assert activation_bytes(LLAMA_8B, Sharding(), 100, 1) == 100 * 2 * (2 * 4096 + 3 * 14336) + 4 * 128256
    assert activation_bytes(LLAMA_8B, Sharding(2), 100, 1) == 100 * 2 * (2 * 4096 + 3 * 7168) + 4 * 64128


def test_blocks_of_a_pipeline_are_those_of_its_fullest_stage() -> None:
    stages = Sharding(pipeline_parallel_size=2)
    memory = 30e9
    fit = [int((memory - weight_bytes(LLAMA_8B, stages, BF16, stage)) // (16 * 131072 // 2)) for stage in range(2)]
    assert num_kv_blocks(LLAMA_8B, stages, BF16, "bf16", memory_bytes=memory) == min(fit)


def test_modeled_families_are_refused_by_name_when_served_and_say_what_is_not_modeled() -> None:
    for shape, field in (
        (DEEPSEEK_V3, "model_type"),
        (replace(LLAMA_8B, quantization=DEEPSEEK_V3.quantization), "quant"),
    ):
        with pytest.raises(BadModel, match=field):
            check_runnable(Deployment(), shape)
    pool = Pool(accelerator="H100", weight_dtype="mxfp4", max_model_len=8192, num_kv_blocks=4096)
    notes = " ".join(step_tables(accelerator("H100"), GPT_OSS, pool).not_modeled)
    assert "window" in notes


def test_every_published_configuration_has_a_shape_with_the_published_sizes(data_dir: Path) -> None:
    # billions of parameters, as the model cards have them
    published: dict[str, Any] = {
        "Qwen--Qwen3-235B-A22B": 235, "Qwen--Qwen3-30B-A3B": 30.5, "Qwen--Qwen3-Coder-480B-A35B-Instruct": 480,
        "Qwen--Qwen3.5-397B-A17B": 397, "google--gemma-4-26B-A4B": 25.2, "inference-sim--deepseek-v2-lite": 15.7,
        "meta-llama--Llama-4-Maverick-17B-128E-Instruct": 400, "meta-llama--Llama-4-Scout-17B-16E-Instruct": 108,
        "meta-llama--Meta-Llama-3.1-405B": 405.9, "microsoft--Phi-mini-MoE-instruct": 7.6, "zai-org--GLM-5": 744,
        "mistralai--Mixtral-8x22B-v0.1": 140.6, "openai--gpt-oss-120b": 116.8, "MiniMaxAI--MiniMax-M2.5": 229,
        "moonshotai--Kimi-K2-Instruct": 1026,
    }  # fmt: skip
    shapes = {
        file.stem: ModelShape.from_config(json.loads(file.read_text()))
        for file in (data_dir / "models/hf_configs").glob("*.json")
    }
    assert len(shapes) == 34
    for name, billions in published.items():
        assert shapes[name].num_parameters() / 1e9 == pytest.approx(billions, rel=0.01), name
    for shape in shapes.values():
        assert weight_bytes(shape, Sharding(), Storage.of_checkpoint(shape.quantization)) == shape.checkpoint_bytes()
