"""FLOPs and bytes of a step, against closed forms, a count by hand, and the bytes of a real checkpoint."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from paretune.profiler.operators import Composition, kv_bytes_per_token, linears, rank_weight_bytes, step_work
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.random_model import write_random_model

# meta-llama/Llama-3.1-8B, config.json
LLAMA_8B_CONFIG = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
LLAMA_8B = ModelShape.from_config(LLAMA_8B_CONFIG)
PARAMETERS_8B = 8_030_261_248  # the model card's 8.03 B, as transformers counts them
EMBEDDING_8B = 128256 * 4096


def work(shape: ModelShape, step: Composition, tp: int = 1, weight: str = "bf16", kv: str = "bf16") -> dict:
    found = step_work(shape, step, tensor_parallel_size=tp, weight_dtype=weight, kv_dtype=kv)
    return {one.name: one for one in found}


def test_the_shape_used_here_has_the_published_number_of_parameters() -> None:
    assert LLAMA_8B.num_parameters() == PARAMETERS_8B


def test_a_long_prompt_costs_two_flops_a_parameter_and_token() -> None:
    tokens = 4096
    step = Composition(tokens, 1, tokens, 0.0, 0.0)
    flops = sum(one.flops for one in work(LLAMA_8B, step).values())
    # the embedding is looked up, not multiplied; norms are not counted
    assert flops == pytest.approx(2 * (PARAMETERS_8B - EMBEDDING_8B) * tokens, rel=0.01)


def test_attention_of_a_prompt_is_four_flops_a_pair_head_and_dim() -> None:
    tokens = 1000
    step = Composition(tokens, 1, 1, 0.0, tokens * (tokens + 1) / 2)
    # by hand: 32 layers x 32 heads x 128 dims x (1000 * 1001 / 2) pairs x 4
    assert work(LLAMA_8B, step)["prefill_attention"].flops == 32 * 32 * 128 * 500500 * 4


def test_decoding_reads_every_weight_once_and_the_whole_cache() -> None:
    found = work(LLAMA_8B, Composition(16, 16, 16, 16 * 2048.0, 0.0))
    # by hand, in elements of one layer: q 4096², o 4096², k and v 4096 x 1024, three of 4096 x 14336
    layer = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert sum(one.weight_bytes for one in found.values()) == 2 * (32 * layer + EMBEDDING_8B)
    # 2 x 32 layers x 8 heads x 128 x 2 bytes = 131072 bytes a token
    assert kv_bytes_per_token(LLAMA_8B, 1, "bf16") == 131072
    assert kv_bytes_per_token(LLAMA_8B, 2, "int8") == (65536 + 2 * 32 * 8 * 4) // 2  # a scale of 4 bytes a head
    assert found["decode_attention"].kv_bytes == 16 * 2048 * 131072


def test_weight_bytes_are_the_bytes_of_the_safetensors(tmp_path: Path) -> None:
    folder = write_random_model(
        tmp_path / "model", vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=2,
    )  # fmt: skip
    shape = ModelShape.load(folder)
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        sizes = {name: tensors.get_tensor(name).nbytes for name in tensors.keys()}  # noqa: SIM118
    matrices = sum(size for name, size in sizes.items() if "norm" not in name and "embed" not in name)
    found = work(shape, Composition(1, 1, 1, 1.0, 0.0))
    assert sum(one.weight_bytes for one in found.values()) == matrices
    norms = sum(size for name, size in sizes.items() if "norm" in name)
    assert rank_weight_bytes(shape, 1, "bf16") == sum(sizes.values()) - norms


def test_two_ranks_all_reduce_the_hidden_state_twice_a_layer() -> None:
    tokens = 128
    found = work(LLAMA_8B, Composition(tokens, 1, 1, 0.0, 8256.0), tp=2)
    reduced = [found["o.all_reduce"], found["down.all_reduce"]]
    assert sum(one.messages for one in reduced) == 2 * 32
    assert sum(one.message_bytes for one in reduced) == 2 * 32 * tokens * 4096 * 2
    assert not any("all_reduce" in name for name in work(LLAMA_8B, Composition(tokens, 1, 1, 0.0, 8256.0)))


@given(
    tp=st.sampled_from([1, 2, 4, 8]),
    tokens=st.integers(1, 4096),
    rows=st.integers(1, 64),
    context=st.floats(0, 1e6),
    pairs=st.floats(0, 1e8),
    weight=st.sampled_from(["fp32", "bf16", "fp8", "int8"]),
)
def test_the_ranks_together_do_the_work_of_one(
    tp: int, tokens: int, rows: int, context: float, pairs: float, weight: str
) -> None:
    step = Composition(tokens, rows, rows, context, pairs)
    one, each = work(LLAMA_8B, step, 1, weight), work(LLAMA_8B, step, tp, weight)
    for name in one:
        if name != "elementwise":
            assert tp * each[name].flops == pytest.approx(one[name].flops)
            assert tp * each[name].weight_bytes == pytest.approx(one[name].weight_bytes)
            assert tp * each[name].kv_bytes == pytest.approx(one[name].kv_bytes)


def test_more_ranks_than_kv_heads_hold_one_head_each() -> None:
    assert kv_bytes_per_token(LLAMA_8B, 16, "bf16") == kv_bytes_per_token(LLAMA_8B, 8, "bf16")
    qkv = next(layer for layer in linears(LLAMA_8B, 16) if layer.name == "qkv")
    assert qkv.out_features == (2 + 2) * 128


@pytest.mark.parametrize(
    ("dtype", "item"),
    [("fp32", 4), ("bf16", 2), ("fp8", 1), ("int8", 1), ("int4", 0.5 + 2 / 64), ("nvfp4", 0.5 + 1 / 16)],
)
def test_a_narrower_dtype_moves_as_many_bytes_less(dtype: str, item: float) -> None:
    step = Composition(1, 1, 1, 100.0, 0.0)
    wide = sum(one.weight_bytes for one in work(LLAMA_8B, step, weight="bf16").values())
    assert sum(one.weight_bytes for one in work(LLAMA_8B, step, weight=dtype).values()) == wide * item / 2


def test_an_empty_step_has_no_work() -> None:
    assert (
        step_work(
            LLAMA_8B, Composition(0, 0, 0, 0.0, 0.0), tensor_parallel_size=1, weight_dtype="bf16", kv_dtype="bf16"
        )
        == ()
    )


def test_the_published_config_is_the_shape_used_here(data_dir: Path) -> None:
    path = data_dir / "models/hf_configs/meta-llama--Meta-Llama-3.1-8B.json"
    published = ModelShape.from_config(json.loads(path.read_text()))
    assert linears(published, 1) == linears(LLAMA_8B, 1)


def test_the_head_of_a_ternary_model_moves_bf16() -> None:
    step = Composition(1, 1, 1, 100.0, 0.0)
    ternary, bf16 = (work(LLAMA_8B, step, weight=dtype) for dtype in ("ternary", "bf16"))
    assert ternary["head"].weight_bytes == bf16["head"].weight_bytes
    assert ternary["down"].weight_bytes == bf16["down"].weight_bytes / 8
