"""FLOPs, bytes and messages of mixtures of experts: against the published models, a draw of routings, and a count."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.kernels.moe import route
from paretune.optimizer.export.vllm import CannotExport, export
from paretune.optimizer.space import default_space
from paretune.profiler.hardware import BadHardware, accelerator
from paretune.profiler.measure import possible_configurations
from paretune.profiler.measured_step import bound_tables, linear_count
from paretune.profiler.operators import (
    Composition,
    OperatorWork,
    linears,
    load_imbalance,
    rank_weight_bytes,
    step_work,
    touched,
)
from paretune.profiler.profile import Peaks, shape_data
from paretune.profiler.roofline import roofline_tables
from paretune.profiler.tables import step_tables
from paretune.runtime.model_shape import Experts, ModelShape
from paretune.runtime.spec import Deployment, Pool

from .optimizer_examples import poisson_trace
from .test_profiler_operators import LLAMA_8B

# mistralai/Mixtral-8x7B-v0.1 and Qwen/Qwen3-30B-A3B, config.json
MIXTRAL = ModelShape.from_config({
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
})  # fmt: skip
QWEN3 = ModelShape.from_config({
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "max_position_embeddings": 40960, "norm_topk_prob": True,
})  # fmt: skip
QWEN2 = ModelShape.from_config({
    "model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 24, "num_attention_heads": 16, "max_position_embeddings": 8192, "decoder_sparse_step": 2,
})  # fmt: skip


def work(shape: ModelShape, tokens: int, tp: int = 1, expert_parallel: bool = False) -> dict[str, OperatorWork]:
    found = step_work(
        shape, Composition(tokens, tokens, tokens, 0.0, 0.0), tensor_parallel_size=tp, weight_dtype="bf16",
        kv_dtype="bf16", expert_parallel=expert_parallel,
    )  # fmt: skip
    return {one.name: one for one in found}


@pytest.mark.parametrize(("shape", "active"), [(MIXTRAL, 12.88e9), (QWEN3, 3.35e9)])
def test_a_token_costs_two_flops_for_each_parameter_that_it_takes(shape: ModelShape, active: float) -> None:
    # the model cards' 12.9 B, and 3.3 B with the embedding, which is looked up and not multiplied
    embedding = shape.vocab_size * shape.hidden_size
    flops = sum(one.flops for one in work(shape, 1).values())
    assert flops == pytest.approx(2 * (active - embedding), rel=0.01)


@pytest.mark.parametrize("shape", [LLAMA_8B, MIXTRAL, QWEN2, QWEN3])
def test_one_rank_multiplies_the_matrices_of_the_model(shape: ModelShape) -> None:
    assert [(x.name, x.out_features, x.in_features, x.count) for x in linears(shape, 1)] == list(shape.matrices())
    assert sum(x.in_last for x in linears(shape, 1) if x.name in ("gate_up", "down")) == (2 if shape is LLAMA_8B else 0)
    dense_last = replace(QWEN2, experts=replace(QWEN2.experts, layers=(1, 3)))
    for each in (shape, dense_last):
        for layer in linears(each, 1):
            assert linear_count(layer, True) + linear_count(layer, False) == layer.count
            assert min(linear_count(layer, True), linear_count(layer, False)) >= 0
    assert {x.name for x in linears(dense_last, 1) if x.in_last} == {"qkv", "o", "gate_up", "down"}


def test_one_token_reads_its_experts_and_many_read_all() -> None:
    one, many = work(QWEN3, 1), work(QWEN3, 4096)
    expert = 2 * 3 * 2048 * 768
    read = one["expert_gate_up"].weight_bytes + one["expert_down"].weight_bytes
    assert read == pytest.approx(48 * 8 * expert)
    read = many["expert_gate_up"].weight_bytes + many["expert_down"].weight_bytes
    assert read == pytest.approx(48 * 128 * expert)
    assert many["router"].weight_bytes == 48 * 128 * 2048 * 4  # fp32 in every format


@settings(max_examples=25)
@given(count=st.integers(2, 64), share=st.floats(0.05, 1), tokens=st.integers(1, 64))
def test_touched_is_the_mean_of_drawn_routings(count: int, share: float, tokens: int) -> None:
    k = max(1, round(count * share))
    logits = torch.randn(200 * tokens, count, generator=torch.Generator().manual_seed(count))
    chosen = route(logits, k, True).experts.view(200, -1).numpy()
    counted = np.array([len(np.unique(step)) for step in chosen]) / count
    spread = 4 * counted.std() / 200**0.5 + 0.01
    assert touched(k / count, tokens) == pytest.approx(counted.mean(), abs=spread)


@pytest.mark.parametrize(("count", "k"), [(8, 2), (60, 4), (128, 8)])
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 4, 64, 512])
def test_the_fullest_rank_has_the_load_of_drawn_routings(count: int, k: int, ranks: int, tokens: int) -> None:
    logits = torch.randn(150 * tokens, count, generator=torch.Generator().manual_seed(tokens))
    chosen = route(logits, k, True).experts.view(150, -1).numpy()
    owner = np.repeat(np.arange(ranks), [(r + 1) * count // ranks - r * count // ranks for r in range(ranks)])
    loads = np.array([np.bincount(owner[step], minlength=ranks) for step in chosen])
    counted = loads.max(axis=1).mean() / (tokens * k / ranks)
    experts = Experts(count, count, k, 1, True, 0, (0,))
    # discrete loads of a single token are no normal numbers; ranks of 60 experts hold 7 or 8
    assert load_imbalance(experts, tokens, ranks) == pytest.approx(counted, rel=0.25 if tokens == 1 else 0.1)


@pytest.mark.parametrize("shape", [MIXTRAL, QWEN2, QWEN3])
@pytest.mark.parametrize("expert_parallel", [False, True])
def test_ranks_hold_the_experts_once_and_all_reduce_twice_a_layer(shape: ModelShape, expert_parallel: bool) -> None:
    one, four = work(shape, 512), work(shape, 512, 4, expert_parallel)
    for name in ("expert_gate_up", "expert_down"):
        slack = load_imbalance(shape.experts, 512, 4) if expert_parallel and shape.experts else 1.0
        assert 4 * four[name].flops == pytest.approx(one[name].flops * slack)
        assert (
            one[name].weight_bytes <= 4 * four[name].weight_bytes * (1 + 1e-9) <= one[name].weight_bytes * slack * 1.01
        )
    reduced = sum(each.messages for name, each in four.items() if name.endswith("all_reduce"))
    assert reduced == 2 * shape.num_layers + 1  # and the embedding's
    held = rank_weight_bytes(shape, 4, "bf16", expert_parallel)
    routers = sum(
        x.count * x.out_features * x.in_features * 4 for x in linears(shape, 1) if x.name in ("router", "shared_gate")
    )
    assert 4 * (held - routers) == pytest.approx(rank_weight_bytes(shape, 1, "bf16") - routers)


def test_experts_that_do_not_divide_burden_the_rank_with_the_most() -> None:
    held = {x.name: x.count for x in linears(QWEN2, 8, True)}
    assert held["expert_down"] == 12 * 8  # of 60 experts one of 8 ranks has 8
    assert held["shared_down"] == 12


POOL = Pool(accelerator="H100", weight_dtype="bf16", tensor_parallel_size=4, num_kv_blocks=4096)


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_the_roofline_of_a_mixture_rises_with_the_experts_that_are_touched(expert_parallel: bool) -> None:
    pool = POOL.model_copy(update={"enable_expert_parallel": expert_parallel})
    tables = roofline_tables(accelerator("H100"), QWEN3, pool)
    seconds = tables.tokens_s
    assert (np.diff(seconds) > -1e-12).all()
    # sixteen tokens touch 10 times the experts of one, and the layer overhead is the same
    one, sixteen, many = (work(QWEN3, n, 4, expert_parallel)["expert_down"].weight_bytes for n in (1, 16, 2048))
    assert 4 < sixteen / one < 10.5
    assert seconds[16] - seconds[1] > 0.5 * 3 * (sixteen - one) / accelerator("H100").peak_bytes_per_s
    assert many > sixteen
    modeled = step_tables(accelerator("H100"), QWEN3, pool).not_modeled
    assert any("uniform" in text for text in modeled)
    assert any("all-to-all" in text for text in modeled) == expert_parallel
    assert not any("uniform" in text for text in step_tables(accelerator("H100"), LLAMA_8B, POOL).not_modeled)


@pytest.mark.parametrize(("shape", "tp"), [(LLAMA_8B, 4), (MIXTRAL, 16)])
def test_experts_that_cannot_be_divided_so_are_refused(shape: ModelShape, tp: int) -> None:
    pool = POOL.model_copy(update={"enable_expert_parallel": True, "tensor_parallel_size": tp})
    with pytest.raises(BadHardware, match="enable_expert_parallel"):
        step_tables(accelerator("H100"), shape, pool)


def test_measured_peaks_bound_a_step_by_the_fewest_experts_that_could_be_touched() -> None:
    peaks = Peaks(num_threads=1, flops_per_s={"fp32": 1e18, "bf16": 1e18, "int8": 1e18}, read_bytes=((1 << 20, 1e10),))
    pool = Pool(weight_dtype="bf16", max_num_batched_tokens=2048)
    bound = bound_tables(QWEN3, pool, peaks).tokens_s
    read = sum(x.count * x.chosen * x.out_features * x.in_features * (4 if x.name == "router" else 2)
               for x in linears(QWEN3, 1) if x.name != "head")  # fmt: skip
    assert bound[1] * 1e10 == pytest.approx(read, rel=0.03)  # the last layer's rows count as samples
    assert bound[2048] == bound[1]


def test_profiles_know_experts_and_those_of_dense_models_do_not_change() -> None:
    assert "experts" not in shape_data(LLAMA_8B)
    assert shape_data(QWEN2)["experts"]["layers"] == list(range(1, 24, 2))
    both = possible_configurations(4, weight_dtypes=("bf16",), shape=MIXTRAL)
    assert {(key.tensor_parallel_size, key.enable_expert_parallel) for key in both} == {
        (1, False), (2, False), (2, True), (4, False), (4, True)
    }  # fmt: skip
    assert not any(key.enable_expert_parallel for key in possible_configurations(4, shape=LLAMA_8B))
    assert str(both[-1]).count("EP") == both[-1].enable_expert_parallel


def test_the_search_tries_both_ways_to_share_experts_and_vllm_is_told() -> None:
    default = Deployment(pools=(Pool(num_threads=2),))
    fields = dict(default_space(poisson_trace(20), default, cores=2, has_experts=True).fields)
    assert fields["enable_expert_parallel"] == (False, True)
    assert "enable_expert_parallel" not in dict(default_space(poisson_trace(20), default, cores=2).fields)
    shared = default.with_pool(tensor_parallel_size=2, enable_expert_parallel=True, num_threads=1)
    assert "--enable-expert-parallel" in export(shared).argv
    assert "--enable-expert-parallel" not in export(shared.with_pool(enable_expert_parallel=False)).argv
    with pytest.raises(CannotExport, match="replicas"):
        export(shared.with_pool(replicas=2))
