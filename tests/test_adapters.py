"""Adapter folders: what is read, how it is cut for ranks, what is refused; and the engine's names for them."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from paretune.runtime.adapters import QKV, BadAdapter, RankAdapters, read_adapter, read_config
from paretune.runtime.engine import Engine, Request
from paretune.runtime.memory import memory_need
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.parallel import Layout, share_of, shares
from paretune.runtime.random_adapter import ALL_LINEAR, write_random_adapter
from paretune.runtime.random_model import write_random_model
from paretune.runtime.runnable import check_runnable
from paretune.runtime.sampler import SamplingParams
from paretune.runtime.spec import Adapter, BadSpec, Deployment, Pool, parse_deployment

POOL = Pool(
    weight_dtype="fp32", kv_cache_dtype="fp32", max_model_len=64, max_num_seqs=4, max_num_batched_tokens=64,
    block_size=4, num_kv_blocks=64, max_loras=2, max_lora_rank=8,
)  # fmt: skip
WHOLE = Layout(1, 1, 1)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(
        tmp_path_factory.mktemp("model") / "tiny",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=49,  # odd: the ranks' parts differ
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        dtype="float32",
    )


@pytest.fixture
def shape(model_dir: Path) -> ModelShape:
    return ModelShape.load(model_dir)


def engine_with(model_dir: Path, folders: list[Path], **changes: object) -> Engine:
    adapters = tuple(Adapter(name=folder.name, path=str(folder)) for folder in folders)
    pool = Pool.model_validate({**POOL.model_dump(), **changes})
    return Engine(Deployment(pools=(pool,), adapters=adapters), model_dir)


def ask(engine: Engine, adapter: str | None, request_id: int = 0, length: int = 9) -> None:
    prompt = np.random.default_rng(length).integers(0, 64, length).astype(np.int32)
    engine.add(
        Request(request_id, prompt, SamplingParams(max_tokens=6, temperature=0, ignore_eos=True), adapter=adapter)
    )


def drain(engine: Engine) -> dict[int, list[int]]:
    answers: dict[int, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            answers.setdefault(output.request_id, []).extend(output.token_ids)
    return answers


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_the_ranks_add_is_what_the_whole_adapter_adds(tmp_path: Path, shape: ModelShape, size: int) -> None:
    folder = write_random_adapter(tmp_path, shape, rank=3, target_modules=ALL_LINEAR)
    whole = read_adapter(folder, shape, share_of(shape, WHOLE, 0), 8)
    ranks = [read_adapter(folder, shape, share, 8) for share in shares(shape, Layout(1, 1, size))]
    assert len(whole) == 2 * 7
    for (matrix, part), delta in whole.items():
        product = delta.b @ delta.a
        if matrix % 4 in (1, 3):  # o, down: rows of x are cut, and the products are added up
            x = torch.randn(5, product.shape[1])
            parts = x.split([its[matrix, part].a.shape[1] for its in ranks], dim=1)
            added = sum(x_part @ (its[matrix, part].b @ its[matrix, part].a).T for x_part, its in zip(parts, ranks))
            torch.testing.assert_close(added, x @ product.T)
        else:
            stacked = torch.cat([its[matrix, part].b @ its[matrix, part].a for its in ranks])
            torch.testing.assert_close(stacked, product)


def test_patterns_give_modules_ranks_and_alphas_of_their_own(tmp_path: Path, shape: ModelShape) -> None:
    folder = write_random_adapter(
        tmp_path, shape, rank=4, alpha=12, target_modules=("q_proj", "k_proj", "v_proj"), rank_pattern={"k_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 20, "proj": 99}, use_rslora=True,
    )  # fmt: skip
    deltas = read_adapter(folder, shape, share_of(shape, WHOLE, 0), 8)
    scales = [deltas[layer * 4 + QKV, part].scale for layer in (0, 1) for part in (0, 1, 2)]
    assert scales == pytest.approx([12 / 2, 12 / math.sqrt(2), 12 / 2, 20 / 2, 12 / math.sqrt(2), 12 / 2])
    assert deltas[QKV, 1].a.shape[0] == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("peft_type", "IA3"),
        ("peft_type", None),
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("trainable_token_indices", [1, 2]),
        ("lora_bias", True),
        ("use_something_of_next_year", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", 1),
        ("r", 0),
        ("r", "8"),
        ("r", True),
        ("lora_alpha", None),
        ("lora_alpha", float("inf")),
        ("use_rslora", "yes"),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"(a+)+b": 4}),
        ("alpha_pattern", ["q_proj"]),
        ("target_modules", ["q_proj", "lm_head"]),
        ("target_modules", ["embed_tokens"]),
    ],
)
def test_a_field_that_cannot_be_honored_is_refused_by_name(
    tmp_path: Path, shape: ModelShape, field: str, value: object
) -> None:
    folder = write_random_adapter(tmp_path, shape, rank=4)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(BadAdapter) as refused:
        read_adapter(folder, shape, share_of(shape, WHOLE, 0), 8)
    assert refused.value.where.endswith(f"adapter_config.json: {field}")
    assert refused.value.exit_code == 2


def test_a_config_as_peft_writes_it_is_taken(tmp_path: Path) -> None:
    """What LoraConfig(r=8, lora_alpha=16, target_modules=[...]) of PEFT 0.17 saves, whole."""
    config = {
        "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "meta-llama/Llama-3.1-8B", "bias": "none",
        "corda_config": None, "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "layer_replication": None, "layers_pattern": None,
        "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 16, "lora_bias": False, "lora_dropout": 0.05,
        "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA",
        "qalora_group_size": 16, "r": 8, "rank_pattern": {}, "revision": None, "target_modules": ["v_proj", "q_proj"],
        "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False,
        "use_qalora": False, "use_rslora": False,
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    read = read_config(tmp_path)
    assert (read.r, read.scale("model.layers.0.self_attn.q_proj")) == (8, 2.0)


def test_tensors_that_do_not_fit_the_base_are_refused_by_name(tmp_path: Path, shape: ModelShape) -> None:
    share = share_of(shape, WHOLE, 0)
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    head = "base_model.model.lm_head"
    changes = {
        f"{q}.lora_A.weight": torch.zeros(4, 33),
        f"{q}.lora_B.weight": torch.zeros(32, 5),
        f"{head}.lora_A.weight": torch.zeros(4, 32),
        f"{q}.lora_magnitude_vector": torch.zeros(32),
        f"{q.replace('layers.0', 'layers.2')}.lora_A.weight": torch.zeros(4, 32),
        f"{q.replace('q_proj', 'qkv_proj')}.lora_A.weight": torch.zeros(4, 32),
        f"{q.replace('q_proj', 'k_proj')}.lora_A.weight": torch.zeros(4, 32),  # without its B
    }
    for name, tensor in changes.items():
        folder = write_random_adapter(tmp_path, shape, rank=4)
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file({**tensors, name: tensor}, folder / "adapter_model.safetensors")
        with pytest.raises(BadAdapter) as refused:
            read_adapter(folder, shape, share, 8)
        assert name.rsplit(".lora_", 1)[0] in refused.value.where
    folder = write_random_adapter(tmp_path, shape, rank=9)
    with pytest.raises(BadAdapter, match="max_lora_rank, 8"):
        read_adapter(folder, shape, share, 8)
    integers = {name: tensor.to(torch.int32) for name, tensor in tensors.items()}
    write_random_adapter(tmp_path, shape, rank=4)
    save_file(integers, folder / "adapter_model.safetensors")
    with pytest.raises(BadAdapter, match="I32"):
        read_adapter(folder, shape, share, 8)
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(BadAdapter, match="no tensors"):
        read_adapter(folder, shape, share, 8)


def test_what_is_no_whole_adapter_folder_is_refused(tmp_path: Path, shape: ModelShape) -> None:
    share = share_of(shape, WHOLE, 0)

    def refusal(folder: Path) -> str:
        with pytest.raises(BadAdapter) as refused:
            read_adapter(folder, shape, share, 8)
        return str(refused.value)

    assert "no adapter_config.json" in refusal(tmp_path / "nowhere")
    folder = write_random_adapter(tmp_path / "a", shape, rank=4)
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-100])
    assert "whole safetensors" in refusal(folder)
    weights.rename(folder / "adapter_model.bin")
    assert "pickles run code" in refusal(folder)
    (folder / "adapter_model.bin").unlink()
    assert "no adapter_model.safetensors" in refusal(folder)
    (folder / "adapter_config.json").write_text("[]")
    assert "an object" in refusal(folder)
    (folder / "adapter_config.json").write_bytes(b"\xff{")
    assert "JSON" in refusal(folder)


def test_host_memory_keeps_the_adapters_used_last_and_those_it_is_told_to(tmp_path: Path, shape: ModelShape) -> None:
    pool = POOL.model_copy(update={"max_cpu_loras": 2})
    held = RankAdapters(shape, share_of(shape, WHOLE, 0), pool)
    folder = write_random_adapter(tmp_path, shape, rank=4)
    for number in (1, 2, 1, 3):
        held.read(number, folder)
    assert held.in_host_memory == (1, 3)
    held.read(4, folder, keep=[1, 3])
    assert held.in_host_memory == (1, 3, 4)
    held.put(0, 5, folder)
    assert held.in_host_memory == (4, 5)


def test_a_name_that_is_not_loaded_is_refused_and_costs_nothing(tmp_path: Path, model_dir: Path) -> None:
    shape = ModelShape.load(model_dir)
    folder = write_random_adapter(tmp_path / "a", shape, rank=4)
    engine = engine_with(model_dir, [folder])
    with pytest.raises(BadAdapter, match="adapter: "):
        ask(engine, "b")
    assert not engine.has_work
    assert not engine.unload_adapter("b")
    with pytest.raises(BadAdapter, match="a name that no adapter has"):
        engine.load_adapter("a", folder)
    without = engine_with(model_dir, [], max_loras=0)
    with pytest.raises(BadAdapter, match="no adapter is loaded"):
        ask(without, "a")
    with pytest.raises(BadAdapter, match="max_loras"):
        without.load_adapter("a", folder)


def test_requests_that_name_an_adapter_outlive_its_name_and_its_folder(tmp_path: Path, model_dir: Path) -> None:
    """With one slot the two take turns, so the adapter comes from host memory after it was unloaded."""
    shape = ModelShape.load(model_dir)
    folders = [write_random_adapter(tmp_path / name, shape, rank=4, std=0.5, seed=i) for i, name in enumerate("ab")]
    expected = []
    for name in ("a", "b"):
        engine = engine_with(model_dir, folders)
        ask(engine, name)
        expected.append(drain(engine)[0])
    assert expected[0] != expected[1]
    engine = engine_with(model_dir, folders, max_loras=1)
    for request_id, name in enumerate("ab"):
        ask(engine, name, request_id)
    for folder in folders:
        assert engine.unload_adapter(folder.name)
        shutil.rmtree(folder)
    assert drain(engine) == {0: expected[0], 1: expected[1]}
    with pytest.raises(BadAdapter, match="adapter: "):
        ask(engine, "a")
    with pytest.raises(BadAdapter, match="no adapter_config"):
        engine.load_adapter("a", folders[0])
    ask(engine, None)
    drain(engine)
    assert not engine._adapters._names._folders


def test_a_draft_model_without_the_adapter_changes_no_answer_of_it(tmp_path: Path, model_dir: Path) -> None:
    """The base drafts for itself and for an adapter in one batch: it is right about itself alone."""
    folder = write_random_adapter(tmp_path / "a", ModelShape.load(model_dir), rank=4, std=0.5)
    drafted = {"speculation": "draft_model", "num_speculative_tokens": 3, "draft_model": str(model_dir)}
    answers, kept = [], {}
    for changes in ({}, drafted):
        engine = engine_with(model_dir, [folder], **changes)
        ask(engine, "a", 0)
        ask(engine, None, 1)
        answers.append({0: [], 1: []})
        while engine.has_work:
            for output in engine.step():
                answers[-1][output.request_id] += output.token_ids
                kept[output.request_id] = output.speculated
    assert answers[0] == answers[1]
    assert answers[0][0] != answers[0][1]
    assert kept[0].accepted_tokens < kept[0].draft_tokens
    assert kept[1].accepted_tokens == kept[1].draft_tokens > 0


def test_an_adapter_that_does_not_fit_ends_the_start_with_its_reason(tmp_path: Path, model_dir: Path) -> None:
    shape = ModelShape.load(model_dir)
    folder = write_random_adapter(tmp_path / "a", shape, rank=9)
    with pytest.raises(BadAdapter, match="max_lora_rank"):
        engine_with(model_dir, [folder])


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({"adapters": [{"name": "a", "path": "x"}]}, "max_loras"),
        ({"adapters": [{"name": "a", "path": "x"}] * 2, "pools": [{"max_loras": 1}]}, "more than once"),
        ({"adapters": [{"name": "m", "path": "x"}], "model": "m", "pools": [{"max_loras": 1}]}, "the model itself"),
        ({"adapters": [{"name": "", "path": "x"}], "pools": [{"max_loras": 1}]}, "adapters.0.name"),
        ({"pools": [{"max_loras": 4, "max_cpu_loras": 3}]}, "max_cpu_loras"),
        ({"pools": [{"max_cpu_loras": 3}]}, "needs max_loras"),
        ({"pools": [{"max_lora_rank": 513}]}, "max_lora_rank"),
    ],
)
def test_a_spec_whose_adapters_cannot_be_is_refused(spec: dict[str, object], word: str) -> None:
    with pytest.raises(BadSpec, match=word):
        parse_deployment(spec)


def test_memory_for_adapters_is_reckoned_at_their_highest_rank(shape: ModelShape) -> None:
    pool = POOL.model_copy(update={"max_cpu_loras": 5})
    # hidden 32, 8 heads and 4 KV heads of 4, intermediate 49, 2 layers, fp32; in + out of each of the seven
    layer = (32 + 32) + 2 * (32 + 16) + (32 + 32) + 2 * (32 + 49) + (49 + 32)
    assert memory_need(shape, pool).adapter_bytes == (2 + 5) * 2 * layer * 8 * 4
    assert memory_need(shape, pool.model_copy(update={"max_loras": 0, "max_cpu_loras": 0})).adapter_bytes == 0


def test_adapters_over_pipeline_stages_are_refused_by_the_fields_name(shape: ModelShape) -> None:
    check_runnable(Deployment(pools=(POOL,)), shape)
    check_runnable(Deployment(pools=(POOL.model_copy(update={"context_parallel_size": 2}),)), shape)
    with pytest.raises(BadSpec) as refused:
        check_runnable(Deployment(pools=(POOL.model_copy(update={"pipeline_parallel_size": 2}),)), shape)
    assert refused.value.where == "pools.0.max_loras"
