"""Random models are real model folders: transformers reads each family, and the same seed gives the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from paretune.runtime.random_model import SHAPES, BadRandomModel, write_random_model

TINY: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_loads_every_tensor_of_every_family(
    tmp_path: Path, family: str, tie_word_embeddings: bool
) -> None:
    folder = write_random_model(
        tmp_path / "model",
        **TINY,
        family=family,
        head_dim=16,
        tie_word_embeddings=tie_word_embeddings,
        dtype="float32",
        shards=3,
    )
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[trouble] for trouble in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    logits = model(torch.arange(20).view(1, -1)).logits
    assert logits.shape == (1, 20, 300)
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("llama", set()),
        ("mistral", set()),
        ("qwen2", {"q_proj.bias", "k_proj.bias", "v_proj.bias"}),
        ("qwen3", {"q_norm.weight", "k_norm.weight"}),
    ],
)
def test_a_family_has_its_own_attention_tensors_and_none_is_neutral(
    tmp_path: Path, family: str, extra: set[str]
) -> None:
    tensors = all_tensors(write_random_model(tmp_path / "model", **TINY, family=family, dtype="float32"))
    attention = {name.split("self_attn.")[1] for name in tensors if "layers.1.self_attn." in name}
    assert attention == {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"} | extra
    for name, tensor in tensors.items():
        assert tensor.std() > 0.01, name
        assert float(tensor.mean()) == pytest.approx(1.0 if name.endswith("norm.weight") else 0.0, abs=0.05), name


def test_weights_depend_on_the_seed_and_not_on_the_shards(tmp_path: Path) -> None:
    one = write_random_model(tmp_path / "one", **TINY, seed=7)
    four = write_random_model(tmp_path / "four", **TINY, seed=7, shards=4)
    other = write_random_model(tmp_path / "other", **TINY, seed=8)
    whole, parts, different = all_tensors(one), all_tensors(four), all_tensors(other)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not any(torch.equal(whole[name], different[name]) for name in whole)


def test_the_index_names_the_file_of_every_tensor_and_the_total_size(tmp_path: Path) -> None:
    folder = write_random_model(tmp_path / "model", **TINY, shards=3)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    for file in set(index["weight_map"].values()):
        assert set(load_file(folder / file)) == {name for name, at in index["weight_map"].items() if at == file}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in all_tensors(folder).values())


@pytest.mark.parametrize("shards", [1, 2, 5, 20])
def test_as_many_shards_come_as_were_asked_for(tmp_path: Path, shards: int) -> None:
    folder = write_random_model(tmp_path / "model", **TINY, shards=shards)
    assert len(list(folder.glob("*.safetensors"))) == shards


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float32", torch.float32), ("float16", torch.float16), (torch.bfloat16, torch.bfloat16)],
)
def test_every_tensor_has_the_dtype_that_config_names(
    tmp_path: Path, dtype: str | torch.dtype, expected: torch.dtype
) -> None:
    folder = write_random_model(tmp_path / "model", **TINY, dtype=dtype)
    assert {tensor.dtype for tensor in all_tensors(folder).values()} == {expected}
    assert f"torch.{json.loads((folder / 'config.json').read_text())['torch_dtype']}" == str(expected)


@pytest.mark.parametrize("vocab_size", [259, 1000, 70000])
def test_the_tokenizer_has_exactly_vocab_size_entries_and_loses_no_text(tmp_path: Path, vocab_size: int) -> None:
    folder = write_random_model(tmp_path / "model", **{**TINY, "vocab_size": vocab_size})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "def f(x):\n    return x  # naïve 漢字 🙂"
    token_ids = tokenizer.encode(text).ids
    assert tokenizer.get_vocab_size() == vocab_size
    assert max(tokenizer.get_vocab().values()) == vocab_size - 1
    assert token_ids[0] == json.loads((folder / "config.json").read_text())["bos_token_id"]
    assert tokenizer.decode(token_ids) == text


def test_a_vocabulary_too_small_for_bytes_comes_without_a_tokenizer(tmp_path: Path) -> None:
    folder = write_random_model(tmp_path / "model", **{**TINY, "vocab_size": 64})
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_llama200m_has_201_million_parameters() -> None:
    shape = SHAPES["llama200m"]
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    key_value = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    per_layer = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * inner + 2 * hidden
    total = 2 * shape["vocab_size"] * hidden + layers * per_layer + hidden
    assert round(total / 1e6) == 201


def test_the_tiny_named_shape_can_be_written(tmp_path: Path) -> None:
    tensors = all_tensors(write_random_model(tmp_path / "model", **SHAPES["llama2m"], dtype="bfloat16", seed=1))
    assert 2_000_000 < sum(tensor.numel() for tensor in tensors.values()) < 3_000_000


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"family": "gpt2"}, "family"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 6}, "num_attention_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"vocab_size": 2}, "vocab_size"),
        ({"dtype": "int8"}, "dtype"),
        ({"shards": 0}, "shards"),
        ({"shards": 1000}, "shards"),
    ],
)
def test_sizes_that_make_no_model_are_refused_and_nothing_is_written(
    tmp_path: Path, wrong: dict[str, Any], where: str
) -> None:
    with pytest.raises(BadRandomModel) as caught:
        write_random_model(tmp_path / "model", **{**TINY, "num_key_value_heads": 1, **wrong})
    assert caught.value.where == where
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes").write_text("keep")
    with pytest.raises(BadRandomModel):
        write_random_model(tmp_path / "model", **TINY)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "notes"]


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("paretune.runtime.random_model.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_random_model(tmp_path / "model", **TINY)
    assert list(tmp_path.iterdir()) == []
