"""Model folders: what is read from them, and what is refused with the file and the tensor that are wrong."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from paretune.kernels.linear import linear
from paretune.kernels.tiles import TileTable
from paretune.kernels.weight_formats import WEIGHT_FORMATS
from paretune.runtime.model_shape import BadModel, ModelShape, resolve_model
from paretune.runtime.parallel import Layout, share_of
from paretune.runtime.random_model import write_random_model
from paretune.runtime.runnable import check_runnable
from paretune.runtime.small_model import MODEL_DIR
from paretune.runtime.small_model.ternary_linear import pack_rows, ternarize
from paretune.runtime.spec import SMALL_MODEL, BadSpec, Deployment, Pool
from paretune.runtime.transformer import rope_frequencies
from paretune.runtime.weights import load_weights

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pristine")
    return {
        "single": write_random_model(root / "single", **SIZES),
        "sharded": write_random_model(root / "sharded", **SIZES, shards=3),
        "qwen2": write_random_model(root / "qwen2", family="qwen2", **SIZES),
        "qwen3": write_random_model(root / "qwen3", family="qwen3", **SIZES, tie_word_embeddings=True),
    }


def load(folder: Path, weight_dtype: str = "bf16", rank: int = 0, size: int = 1) -> Any:
    shape = ModelShape.load(folder)
    return load_weights(shape, folder, share_of(shape, Layout(shards=size), rank), weight_dtype, TileTable())


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def edit_weights(edit: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def index_points_outside(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../single/model.safetensors"
    path.write_text(json.dumps(index))


def index_names_a_tensor_that_is_not_there(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.7.mlp.up_proj.weight"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))


def make_ternary(folder: Path, linear_class: str = "bitlinear", mode: str = "offline") -> None:
    """What a model trained ternary keeps instead of its matrices, as transformers lays it out."""
    quantization = {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": mode}

    def pack_layers(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            values, scale = ternarize(tensors[name].float())
            tensors[name] = pack_rows(values)
            tensors[f"{name}_scale"] = (1 / scale if linear_class == "bitlinear" else scale).reshape(1)

    edit_config(quantization_config=quantization)(folder)
    if mode == "offline":
        edit_weights(pack_layers)(folder)


UP = "model.layers.1.mlp.up_proj.weight"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BAD = {
    "no weights": ("single", lambda folder: (folder / "model.safetensors").unlink(), ["model.safetensors", "copy"]),
    "pickles only": ("single", pickled, ["pytorch_model.bin", "safetensors", "save_pretrained"]),
    "truncated": ("single", truncated, ["model.safetensors"]),
    "missing shard": (
        "sharded",
        lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(),
        ["model-00002-of-00003.safetensors", "tensor model."],
    ),
    "shard outside": ("sharded", index_points_outside, ["index.json", "../single"]),
    "index beyond its shards": (
        "sharded",
        index_names_a_tensor_that_is_not_there,
        ["model-00001-of-00003.safetensors", "model.layers.7.mlp.up_proj.weight"],
    ),
    "missing tensor": ("single", edit_weights(lambda tensors: tensors.pop(UP)), ["model.safetensors", UP]),
    "missing bias": (
        "qwen2",
        edit_weights(lambda tensors: tensors.pop("model.layers.0.self_attn.k_proj.bias")),
        ["model.layers.0.self_attn.k_proj.bias"],
    ),
    "extra bias": (
        "single",
        edit_weights(lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})),
        ["model.layers.0.self_attn.q_proj.bias", "extra"],
    ),
    "more layers than the config says": ("single", edit_config(num_hidden_layers=1), ["model.layers.1.", "extra"]),
    "wrong shape": (
        "single",
        edit_weights(lambda tensors: tensors.update({UP: torch.zeros(47, 32)})),
        ["model.safetensors", UP, "(47, 32)", "(48, 32)"],
    ),
    "config of another size": ("single", edit_config(vocab_size=41), ["model.embed_tokens.weight", "(40, 32)"]),
    "integers": (
        "single",
        edit_weights(lambda tensors: tensors.update({UP: torch.zeros(48, 32, dtype=torch.int8)})),
        [UP, "I8"],
    ),
    "no config": ("single", lambda folder: (folder / "config.json").unlink(), ["config.json"]),
    "config is no JSON": ("single", lambda folder: (folder / "config.json").write_text("{"), ["config.json"]),
    "config is a list": ("single", lambda folder: (folder / "config.json").write_text("[]"), ["config.json", "list"]),
    "unknown family": ("single", edit_config(model_type="gpt2"), ["model_type", "gpt2", "qwen3"]),
    "modeled, and not whole": ("single", edit_config(model_type="deepseek_v3"), ["kv_lora_rank", "None"]),
    "quantized": ("single", edit_config(quantization_config={"quant_method": "gptq"}), ["quantization_config", "gptq"]),
    "activation": ("single", edit_config(hidden_act="gelu"), ["hidden_act", "gelu"]),
    "yarn": ("single", edit_config(rope_scaling={"type": "yarn", "factor": 2.0}), ["rope_scaling", "yarn", "llama3"]),
    "yarn, new layout": (
        "single",
        edit_config(rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}),
        ["rope_parameters", "yarn"],
    ),
    "half a llama3": ("single", edit_config(rope_scaling=LLAMA3), ["original_max_position_embeddings", "None"]),
    "rope per kind of layer": (
        "single",
        edit_config(rope_parameters={"full_attention": {"rope_type": "default"}}),
        ["rope_parameters"],
    ),
    "no sizes": ("single", edit_config(hidden_size=None), ["hidden_size", "None"]),
    "heads": ("single", edit_config(num_key_value_heads=3), ["num_key_value_heads", "3"]),
    "eos": ("single", edit_config(eos_token_id="</s>"), ["eos_token_id"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_model_is_refused_with_what_is_wrong_where(case: str, pristine: dict[str, Path], tmp_path: Path) -> None:
    kind, spoil, words = BAD[case]
    folder = tmp_path / "model"
    shutil.copytree(pristine[kind], folder)
    if case == "eos":
        (folder / "generation_config.json").unlink(missing_ok=True)
    spoil(folder)
    with pytest.raises(BadModel) as refused:
        load(folder)
    assert refused.value.exit_code == 2
    for word in words:
        assert word in str(refused.value)


def test_shards_hold_the_same_model_as_one_file(pristine: dict[str, Path]) -> None:
    whole, sharded = load(pristine["single"]), load(pristine["sharded"])
    assert torch.equal(whole.embedding, sharded.embedding)
    for one, other in zip(whole.layers, sharded.layers):
        assert torch.equal(one.post_norm, other.post_norm)
        assert one.down.in_features == other.down.in_features == SIZES["intermediate_size"]


def test_a_folder_of_torch_pickles_is_never_opened(tmp_path: Path, pristine: dict[str, Path]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pristine["single"], folder)
    pickled(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR.")
    with pytest.raises(BadModel, match="pickle"):
        load(folder)
    assert not (tmp_path / "owned").exists()


def test_shape_counts_the_parameters_that_the_files_have(pristine: dict[str, Path]) -> None:
    for folder in (*pristine.values(), MODEL_DIR):
        stored = sum(tensor.numel() for file in folder.glob("*.safetensors") for tensor in load_file(file).values())
        assert ModelShape.load(folder).num_parameters() == stored


@pytest.mark.parametrize("weight_dtype", WEIGHT_FORMATS)
def test_shape_foresees_the_bytes_of_the_weights(weight_dtype: str, tmp_path: Path) -> None:
    folder = write_random_model(
        tmp_path / "m", family="qwen2", vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    if weight_dtype == "ternary":
        make_ternary(folder)
    weights = load(folder, weight_dtype)
    packed = [weights.head] + [
        matrix for layer in weights.layers for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down)
    ]
    held = sum(matrix.nbytes for matrix in packed) + weights.norm.nbytes
    held += sum(layer.input_norm.nbytes + layer.post_norm.nbytes for layer in weights.layers)
    shape = ModelShape.load(folder)
    assert shape.weight_bytes(weight_dtype) == held
    assert shape.embedding_bytes(weight_dtype) == weights.embedding.nbytes


def test_every_layout_of_a_ternary_checkpoint_holds_the_same_model(pristine: dict[str, Path], tmp_path: Path) -> None:
    products = []
    for layout in (("bitlinear", "offline"), ("autobitlinear", "offline"), ("autobitlinear", "online")):
        folder = tmp_path / "-".join(layout)
        shutil.copytree(pristine["single"], folder)
        make_ternary(folder, *layout)
        weights = load(folder, "ternary")
        assert weights.layers[0].qkv.precision == "ternary"
        assert weights.head.precision == "bf16"
        products.append(linear(torch.linspace(-1, 1, SIZES["hidden_size"])[None], weights.layers[1].gate_up))
    for product in products[1:]:
        torch.testing.assert_close(product, products[0], rtol=1e-5, atol=1e-6)


def test_a_ternary_checkpoint_can_be_expanded_to_other_precisions(pristine: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(pristine["single"], folder)
    values, scale = ternarize(load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].float())
    make_ternary(folder)
    x = torch.randn(2, SIZES["intermediate_size"])
    torch.testing.assert_close(linear(x, load(folder, "fp32").layers[0].down), x @ (values * scale).t())


def test_only_models_trained_ternary_are_served_ternary(pristine: dict[str, Path]) -> None:
    deployment = Deployment(pools=(Pool(weight_dtype="ternary", max_model_len=64),))
    with pytest.raises(BadSpec) as refused:
        check_runnable(deployment, ModelShape.load(pristine["single"]))
    assert refused.value.where == "pools.0.weight_dtype"
    assert "trained ternary" in str(refused.value)


@pytest.mark.parametrize(
    ("weight_dtype", "size", "runs"),
    [("int8", 4, True), ("int4", 2, True), ("int4", 4, False), ("mxfp4", 4, True), ("nvfp4", 4, True)],
)
def test_ranks_that_would_split_a_scale_group_are_refused(weight_dtype: str, size: int, runs: bool) -> None:
    """The small model has 8 heads of 32 channels: four ranks cut o_proj at 64; with 4 KV heads that is the most."""
    shape = replace(ModelShape.load(MODEL_DIR), num_heads=4)
    deployment = Deployment(pools=(Pool(weight_dtype=weight_dtype, tensor_parallel_size=size),))
    if runs:
        return check_runnable(deployment, shape)
    with pytest.raises(BadSpec) as refused:
        check_runnable(deployment, shape)
    assert refused.value.where == "pools.0.tensor_parallel_size"
    assert "64" in str(refused.value)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer whose o_proj and down_proj have several groups of 64 input channels, the latter's ten."""
    return write_random_model(
        tmp_path_factory.mktemp("wide") / "m", vocab_size=64, hidden_size=64, intermediate_size=640,
        num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("weight_dtype", [name for name in WEIGHT_FORMATS if name != "ternary"])
def test_ranks_hold_the_numbers_of_one_rank_in_every_precision(weight_dtype: str, size: int, wide: Path) -> None:
    """Precision times sharding: the ranks' down_proj, whose input channels are cut, add up to that of one rank."""
    shape = ModelShape.load(wide)
    group = WEIGHT_FORMATS[weight_dtype].sharded_by
    shares = [share_of(shape, Layout(shards=size), rank, group) for rank in range(size)]
    cuts = [slice(share.intermediate.start, share.intermediate.stop) for share in shares]
    assert [cut.start for cut in cuts[1:]] == [cut.stop for cut in cuts[:-1]]
    assert cuts[-1].stop == shape.intermediate_size
    packed = []
    for share in (share_of(shape, Layout(), 0), *shares):
        # heads of 8 channels: o_proj keeps to one rank here
        whole_heads = replace(share, heads=range(8), kv_heads=range(4))
        packed.append(load_weights(shape, wide, whole_heads, weight_dtype, TileTable()).layers[0].down)
    # each rank rounds its part of a row to int8 by itself: with the same largest number all do it alike
    x = torch.randn(3, shape.intermediate_size).clamp(-1, 1)
    x[:, [cut.start for cut in cuts]] = 1
    total = sum(linear(x[:, cut], part) for cut, part in zip(cuts, packed[1:]))
    expected = linear(x, packed[0])
    tolerance = 1e-2 if WEIGHT_FORMATS[weight_dtype].arithmetic == "bf16" else 1e-5
    assert (total - expected).abs().max() < tolerance * expected.abs().max()


def test_the_ranks_shares_add_up_to_the_whole_weights(pristine: dict[str, Path]) -> None:
    whole = load(pristine["qwen2"])
    ranks = [load(pristine["qwen2"], rank=rank, size=2) for rank in range(2)]
    for name, features in (("qkv", "out_features"), ("gate_up", "out_features"), ("o", "in_features")):
        parts = [getattr(getattr(rank.layers[0], name), features) for rank in ranks]
        assert sum(parts) == getattr(getattr(whole.layers[0], name), features)


def test_eos_of_the_generation_config_has_the_last_word(pristine: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pristine["single"], folder)
    edit_config(eos_token_id=2)(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert ModelShape.load(folder).eos_token_ids == (2,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert ModelShape.load(folder).eos_token_ids == (5, 7)


def test_both_layouts_of_rope_say_the_same() -> None:
    config = {**json.loads((MODEL_DIR / "config.json").read_text()), "rope_theta": 5e5}
    scaling = {**LLAMA3, "original_max_position_embeddings": 64}
    old = ModelShape.from_config({**config, "rope_scaling": scaling})
    config.pop("rope_theta")
    new = ModelShape.from_config({**config, "rope_parameters": {**scaling, "rope_theta": 5e5}})
    assert old == new
    assert old.rope.kind == "llama3"
    assert old.rope.theta == 5e5


def test_llama3_keeps_short_waves_and_stretches_long_ones() -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text())
    scaling = {**LLAMA3, "original_max_position_embeddings": 64}
    plain = rope_frequencies(ModelShape.from_config(config).rope, 32)
    stretched = rope_frequencies(ModelShape.from_config({**config, "rope_scaling": scaling}).rope, 32)
    waves = 2 * math.pi / plain
    assert torch.equal(stretched[waves < 64 / 4], plain[waves < 64 / 4])
    assert torch.allclose(stretched[waves > 64], plain[waves > 64] / 8)
    between = (waves > 64 / 4) & (waves < 64)
    assert between.any()
    assert ((stretched < plain) & (stretched > plain / 8))[between].all()


def test_resolve_model_knows_the_shipped_model_and_refuses_what_is_no_folder(tmp_path: Path) -> None:
    assert resolve_model(SMALL_MODEL) == MODEL_DIR
    assert resolve_model(str(MODEL_DIR)) == MODEL_DIR
    with pytest.raises(BadModel, match="no such directory"):
        resolve_model("meta/llama")
    with pytest.raises(BadModel, match=r"config\.json"):
        resolve_model(str(tmp_path))
