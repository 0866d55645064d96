"""Mixtures of experts from their folders: config.json, weights in every format and sharding, bytes, what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from paretune.kernels.cpu.build import load
from paretune.kernels.linear import linear
from paretune.kernels.moe import moe, route
from paretune.kernels.stored_weight import store
from paretune.kernels.tiles import TileTable
from paretune.kernels.weight_formats import WEIGHT_FORMATS
from paretune.runtime.adapters import BadAdapter, RankAdapters, read_adapter
from paretune.runtime.engine import Engine
from paretune.runtime.memory import memory_need, rank_weight_bytes
from paretune.runtime.model_shape import BadModel, Experts, ModelShape
from paretune.runtime.parallel import Layout, keeps_scales_whole, share_of, shares
from paretune.runtime.random_adapter import write_random_adapter
from paretune.runtime.random_model import SHAPES, BadRandomModel, write_random_model
from paretune.runtime.runnable import check_runnable
from paretune.runtime.spec import BadSpec, Deployment, Pool
from paretune.runtime.weights import LayerWeights, load_weights

from .moe_reference import forward
from .test_model_logits import run

FORMATS = tuple(name for name in WEIGHT_FORMATS if name != "ternary")
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32, "dtype": "float32", "max_position_embeddings": 256,
}  # fmt: skip
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "decoder_sparse_step": 2,
        "shared_expert_intermediate_size": 256, "norm_topk_prob": False,
    },
    "qwen3_moe": {
        "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 128, "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
}  # fmt: skip
CONFIG = {"model_type": "qwen2_moe", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 4,
          "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixtures")
    return {f: write_random_model(root / f, family=f, **SIZES, experts=e, seed=3) for f, e in EXPERTS.items()}


def read(**fields: object) -> ModelShape:
    return ModelShape.from_config({**CONFIG, **fields})


def test_what_config_json_says_of_experts_and_what_transformers_takes_where_it_is_silent() -> None:
    assert read().experts == Experts(60, 60, 4, 1408, False, 5632, (0, 1, 2, 3))
    assert read().qkv_bias
    assert not read(qkv_bias=False).qkv_bias
    third = read(decoder_sparse_step=2, mlp_only_layers=[3], norm_topk_prob=True).experts
    assert third is not None
    assert third.layers == (1,)
    assert third.renormalize
    assert read(model_type="qwen3_moe").experts == Experts(128, 128, 8, 768, False, 0, (0, 1, 2, 3))
    assert read(model_type="qwen3_moe").qk_norm
    # transformers 5 writes the number of Qwen3-MoE's experts under this name
    renamed = read(model_type="qwen3_moe", num_local_experts=16).experts
    assert renamed is not None
    assert renamed.num_experts == 16
    mixtral = read(model_type="mixtral")
    assert mixtral.experts == Experts(8, 8, 2, 8, True, 0, (0, 1, 2, 3))
    assert (mixtral.rope.theta, mixtral.rms_norm_eps) == (1e6, 1e-5)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": "8"}, "num_experts"),
        ({"num_experts": 3, "num_experts_per_tok": 4}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"moe_intermediate_size": -1}, "moe_intermediate_size"),
        ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size"),
        ({"norm_topk_prob": 1}, "norm_topk_prob"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"mlp_only_layers": [4]}, "mlp_only_layers"),
        ({"mlp_only_layers": 1}, "mlp_only_layers"),
        ({"model_type": "mixtral", "num_local_experts": True}, "num_local_experts"),
        ({"quantization_config": {"quant_method": "bitnet"}}, "quantization_config"),
        ({"model_type": "deepseek_v3"}, "kv_lora_rank"),
    ],
)
def test_a_bad_config_is_refused_by_its_field(fields: dict[str, object], field: str) -> None:
    with pytest.raises(BadModel) as refused:
        read(**fields)
    assert refused.value.where == f"config.json: {field}"


def test_the_published_mixtures_have_the_parameters_of_their_names() -> None:
    common = {"max_position_embeddings": 32768, "tie_word_embeddings": False}
    mixtral = ModelShape.from_config({
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, **common,
    })  # fmt: skip
    assert mixtral.num_parameters() == 46_702_792_704  # Mixtral-8x7B-v0.1, of its safetensors index
    qwen3 = ModelShape.from_config({
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, **common,
    })  # fmt: skip
    assert qwen3.num_parameters() == 30_532_122_624  # Qwen3-30B-A3B, of its safetensors index


def held(layer: LayerWeights) -> list[Any]:
    parts = (layer.input_norm, layer.qkv, layer.q_norm, layer.k_norm, layer.o, layer.post_norm)
    return [*parts, layer.gate_up, layer.down, layer.experts]


# of one family all formats, and the plainest and the most packed one of the others
FORMATS_OF = [("qwen2_moe", each) for each in FORMATS] + [
    (f, each) for f in ("mixtral", "qwen3_moe") for each in ("fp32", "int4")
]


@pytest.mark.parametrize("layout", [Layout(), Layout(shards=2), Layout(2, 1, 2, expert_parallel=True)])
@pytest.mark.parametrize(("family", "weight_dtype"), FORMATS_OF)
def test_a_rank_holds_the_bytes_that_were_reckoned(folders, family: str, weight_dtype: str, layout: Layout) -> None:
    shape, library = ModelShape.load(folders[family]), load()
    panel = 1 if library is None else library.panel
    for share in shares(shape, layout, WEIGHT_FORMATS[weight_dtype].sharded_by):
        weights = load_weights(shape, folders[family], share, weight_dtype, TileTable())
        parts = [weights.embedding, weights.norm, weights.head, *(p for layer in weights.layers for p in held(layer))]
        sparse = [layer.experts.router for layer in weights.layers if layer.experts is not None]
        # the padding of a router's only panel, which is not reckoned; all other matrices fill theirs
        padding = sum(-router.out_features % panel * shape.hidden_size * 4 for router in sparse)
        found = sum(part.nbytes for part in parts if part is not None) - padding
        assert found == rank_weight_bytes(shape, share, weight_dtype)
        assert all(router.precision == "fp32" for router in sparse)


@pytest.mark.parametrize("weight_dtype", FORMATS)
def test_the_router_and_the_gate_of_the_shared_expert_keep_every_bit(folders, weight_dtype: str) -> None:
    folder = folders["qwen2_moe"]
    shape, stored = ModelShape.load(folder), load_file(folder / "model.safetensors")
    layer = load_weights(shape, folder, share_of(shape, Layout(), 0), weight_dtype, TileTable()).layers[1]
    assert layer.experts is not None
    rows = ("model.layers.1.mlp.gate.weight", "model.layers.1.mlp.shared_expert_gate.weight")
    assert torch.equal(
        linear(torch.eye(shape.hidden_size), layer.experts.router).T, torch.cat([stored[r] for r in rows])
    )


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("weight_dtype", FORMATS)
def test_what_the_ranks_answer_adds_up_to_what_one_does(folders, weight_dtype: str, expert_parallel: bool) -> None:
    shape = ModelShape.load(folders["qwen3_moe"])
    assert shape.experts is not None
    group = WEIGHT_FORMATS[weight_dtype].sharded_by

    def answers(layout: Layout) -> torch.Tensor:
        total = torch.zeros(17, shape.hidden_size)
        for share in shares(shape, layout, group):
            experts = load_weights(shape, folders["qwen3_moe"], share, weight_dtype, TileTable()).layers[0].experts
            assert experts is not None
            routing = route(linear(x, experts.router), shape.experts.experts_per_token, shape.experts.renormalize)
            total += moe(x, routing, experts.packed)
        return total

    x = torch.randn(17, shape.hidden_size)
    one, two = answers(Layout()), answers(Layout(shards=2, expert_parallel=expert_parallel))
    # by channels, each rank rounds its own part of what lies between the two products
    tolerance = (
        1e-6 if expert_parallel else {"fp32": 1e-6, "bf16": 1e-2, "int8": 3e-2}[WEIGHT_FORMATS[weight_dtype].arithmetic]
    )
    assert (one - two).abs().max() <= tolerance * one.abs().max()


@pytest.mark.parametrize(("family", "weight_dtype"), FORMATS_OF)
def test_logits_in_every_format_are_those_of_the_rounded_model(folders, family: str, weight_dtype: str) -> None:
    def rounded(name: str, weight: torch.Tensor) -> torch.Tensor:
        if weight.ndim < 2 or name.endswith(("gate.weight", "shared_expert_gate.weight")):
            return weight
        if name == "model.embed_tokens.weight":
            return weight if weight_dtype == "fp32" else weight.bfloat16()
        return store(weight, weight_dtype).expanded()

    prompt = np.random.default_rng(1).integers(0, SIZES["vocab_size"], 23).astype(np.int32)
    pool = Pool(
        weight_dtype=weight_dtype, kv_cache_dtype="fp32", max_model_len=128, max_num_seqs=4, max_num_batched_tokens=128,
        block_size=8, num_kv_blocks=64,
    )  # fmt: skip
    with Engine(Deployment(pools=(pool,)), folders[family], keep_logits=True) as engine:
        run(engine, [prompt], max_tokens=1)
        found = torch.cat([kept.logits for kept in engine.kept_logits])
    expected = forward(folders[family], torch.from_numpy(prompt).long(), rounded)
    # a token that rounding takes to another expert differs more: the median is what a wrong weight would move
    error = (found - expected).abs().amax(dim=1) / expected.abs().max()
    assert error.median() < {"fp32": 1e-5, "bf16": 2e-2, "int8": 5e-2}[WEIGHT_FORMATS[weight_dtype].arithmetic]


@pytest.mark.parametrize(
    ("family", "changes", "field"),
    [
        ("llama", {"tensor_parallel_size": 2, "enable_expert_parallel": True}, "enable_expert_parallel"),
        ("mixtral", {"tensor_parallel_size": 8, "enable_expert_parallel": True}, "tensor_parallel_size"),
        ("mixtral", {"accelerator": "H100", "weight_dtype": "int8"}, "weight_dtype"),
        ("qwen3_moe", {"weight_dtype": "ternary"}, "weight_dtype"),
        ("qwen3_moe", {"weight_dtype": "int4", "tensor_parallel_size": 4}, "tensor_parallel_size"),
    ],
)
def test_what_the_experts_do_not_allow_is_refused_by_its_field(
    folders, family: str, changes: dict[str, Any], field: str, tmp_path: Path
) -> None:
    folder = folders.get(family) or write_random_model(tmp_path / "dense", family=family, **SIZES)
    pool = Pool(max_model_len=128, **changes)
    with pytest.raises(BadSpec) as refused:
        check_runnable(Deployment(pools=(pool,)), ModelShape.load(folder))
    assert refused.value.where == f"pools.0.{field}"


def test_whole_experts_may_have_more_ranks_than_an_expert_has_groups_of_channels(folders) -> None:
    shape = ModelShape.load(folders["qwen3_moe"])
    sparse_only = ModelShape(**{**vars(shape), "experts": Experts(8, 8, 3, 128, True, 0, (0, 1)), "head_dim": 64})
    assert not keeps_scales_whole(sparse_only, "int4", Layout(shards=4))
    assert keeps_scales_whole(sparse_only, "int4", Layout(shards=4, expert_parallel=True))


def test_expert_parallel_needs_ranks() -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size"):
        Pool(enable_expert_parallel=True)


@pytest.mark.parametrize(
    ("name", "found"), [("experts.0.w1.weight", "no such tensor"), ("gate.weight", "no such tensor")]
)
def test_a_missing_tensor_of_an_expert_is_named(folders, name: str, found: str, tmp_path: Path) -> None:
    tensors = load_file(folders["mixtral"] / "model.safetensors")
    missing = f"model.layers.1.block_sparse_moe.{name}"
    del tensors[missing]
    check_refused(folders["mixtral"], tensors, tmp_path, missing, found)


def test_an_expert_more_than_config_json_says_is_named(folders, tmp_path: Path) -> None:
    tensors = load_file(folders["mixtral"] / "model.safetensors")
    extra = "model.layers.0.block_sparse_moe.experts.4.w1.weight"
    tensors[extra] = tensors[extra.replace(".4.", ".3.")].clone()
    for layout in (Layout(), Layout(shards=2, expert_parallel=True)):
        check_refused(folders["mixtral"], tensors, tmp_path, extra, "an extra tensor", layout)


def check_refused(
    folder: Path, tensors: dict[str, torch.Tensor], to: Path, name: str, found: str, layout: Layout | None = None
) -> None:
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, to / "model.safetensors")
    shape = ModelShape.load(to)
    with pytest.raises(BadModel) as refused:
        load_weights(shape, to, share_of(shape, layout or Layout(), 0), "fp32", TileTable())
    assert refused.value.where.endswith(name)
    assert refused.value.found == found


def test_adapters_of_a_mixture_change_attention_alone(folders, tmp_path: Path) -> None:
    shape = ModelShape.load(folders["qwen3_moe"])
    share = share_of(shape, Layout(), 0)
    fine = write_random_adapter(tmp_path / "fine", shape, rank=8, target_modules=("q_proj", "o_proj"))
    assert len(read_adapter(fine, shape, share, 64)) == 2 * shape.num_layers
    pool = Pool(max_loras=2, max_lora_rank=64)
    adapters = RankAdapters(shape, share, pool)
    adapters.put(1, 7, fine)
    assert adapters.in_host_memory == (7,)
    of_mlp = write_random_adapter(tmp_path / "mlp", shape, rank=8, target_modules=("q_proj", "down_proj"))
    with pytest.raises(
        BadAdapter, match="q_proj, k_proj, v_proj, o_proj in 2 layers of a mixture of experts"
    ) as refused:
        read_adapter(of_mlp, shape, share, 64)
    assert "mlp.down_proj" in refused.value.where
    dense = ModelShape(**{**vars(shape), "experts": None})
    assert memory_need(shape, pool).adapter_bytes < memory_need(dense, pool).adapter_bytes


def test_a_random_mixture_is_what_its_config_says(tmp_path: Path) -> None:
    folder = write_random_model(tmp_path / "model", **SHAPES["moe2m"], shards=3)
    shape = ModelShape.load(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * shape.num_parameters()
    with pytest.raises(BadRandomModel, match="experts"):
        write_random_model(tmp_path / "dense", **SHAPES["llama2m"], experts={"num_experts": 3})
    with pytest.raises(BadModel, match="num_experts_per_tok"):
        write_random_model(tmp_path / "bad", **{**SHAPES["moe2m"], "experts": {"num_experts_per_tok": 99}})
    assert not (tmp_path / "bad").exists()
