"""A prefill and a decode pool for vLLM: two commands, and what its connector does not do is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from paretune.optimizer.export.vllm import CannotExport, export
from paretune.optimizer.export.vllm_flags import FLAGS
from paretune.optimizer.export.vllm_phases import export_phases
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.spec import Deployment, KvTransfer, Pool

from .optimizer_examples import NGRAM, deployment
from .test_profiler_kinds import DEEPSEEK_V3
from .test_profiler_operators import LLAMA_8B

LIMITS = {"accelerator": "H100", "max_model_len": 512, "num_kv_blocks": 1024}
QWEN_3_5 = ModelShape.from_config({
    "model_type": "qwen3_5_moe_text", "vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4, "layer_types": [*["linear_attention"] * 3, "full_attention"],
})  # fmt: skip


def two_pools(
    prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None, **transfer: Any
) -> Deployment:
    pools = (
        Pool.model_validate({**LIMITS, "role": "prefill", **(prefill or {})}),
        Pool.model_validate({**LIMITS, "role": "decode", **(decode or {})}),
    )
    return Deployment(model="/models/llama", pools=pools, kv_transfer=KvTransfer.model_validate(transfer))


def flag(argv: tuple[str, ...], name: str) -> str:
    return argv[argv.index(name) + 1]


def test_each_pool_is_a_command_and_says_which_way_kv_goes() -> None:
    found = export_phases(
        two_pools(
            {"tensor_parallel_size": 2, "max_num_seqs": 4, "replicas": 3},
            {"tensor_parallel_size": 4, "max_num_seqs": 256, "enable_prefix_caching": False},
        )
    )
    assert json.loads(flag(found.prefill.argv, "--kv-transfer-config")) == {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_producer",
    }
    assert json.loads(flag(found.decode.argv, "--kv-transfer-config"))["kv_role"] == "kv_consumer"
    assert (flag(found.prefill.argv, "--max-num-seqs"), flag(found.decode.argv, "--max-num-seqs")) == ("4", "256")
    assert flag(found.decode.argv, "--tensor-parallel-size") == "4"
    assert found.servers == {"prefill": 3, "decode": 1}
    # replicas are servers of their own, behind the proxy
    assert "--data-parallel-size" not in found.prefill.argv
    assert any("3 prefill servers" in note for note in found.notes)
    assert any("proxy" in note for note in found.notes)
    ports = [server.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] for server in (found.prefill, found.decode)]
    assert len(set(ports)) == 2
    config = yaml.safe_load(found.decode.config)
    assert json.loads(config["kv-transfer-config"])["kv_connector"] == "NixlConnector"
    assert config["enable-prefix-caching"] is False


def test_every_flag_is_one_of_vllms_and_the_rest_is_that_of_one_pool() -> None:
    found = export_phases(two_pools())
    for server in (found.prefill, found.decode):
        names = {word.replace("--no-", "--") for word in server.argv if word.startswith("--")}
        assert names <= FLAGS[server.engine_version]
    alone = export(Deployment(model="/models/llama", pools=(Pool.model_validate(LIMITS),)))
    assert found.prefill.argv[: len(alone.argv)] == alone.argv


@pytest.mark.parametrize(
    ("prefill", "decode", "transfer", "where"),
    [
        ({}, {}, {"first_token": "prefill"}, "kv_transfer.first_token"),
        ({}, {}, {"overlap": "layers"}, "kv_transfer.overlap"),
        ({"pipeline_parallel_size": 2}, {}, {}, "pools.0.pipeline_parallel_size"),
        ({"context_parallel_size": 2}, {}, {}, "pools.0.context_parallel_size"),
        ({"max_loras": 1}, {"max_loras": 1}, {}, "pools.0.max_loras"),
        ({}, NGRAM, {}, "pools.1.speculation"),
        ({}, {"accelerator": "cpu"}, {}, "pools.1.accelerator"),
        ({}, {"weight_dtype": "int4"}, {}, "pools.1.weight_dtype"),
        ({"weight_dtype": "fp16"}, {}, {}, "weight_dtype"),
        ({"tensor_parallel_size": 2}, {"tensor_parallel_size": 3}, {}, "tensor_parallel_size"),
        ({}, {"preemption": "swap", "host_kv_blocks": 8}, {}, "pools.1.preemption"),
    ],
)
def test_what_the_connector_does_not_do_is_refused_by_the_fields_name(
    prefill: dict[str, Any], decode: dict[str, Any], transfer: dict[str, Any], where: str
) -> None:
    with pytest.raises(CannotExport) as caught:
        export_phases(two_pools(prefill, decode, **transfer))
    assert (caught.value.where, caught.value.exit_code) == (where, 2)


def test_weights_in_fp8_and_bf16_are_computed_with_in_one_type() -> None:
    found = export_phases(two_pools({"weight_dtype": "fp8"}))
    assert flag(found.prefill.argv, "--quantization") == "fp8"
    assert flag(found.prefill.argv, "--dtype") == flag(found.decode.argv, "--dtype")


def test_servers_of_two_accelerators_are_told_one_attention_backend() -> None:
    # docs/design/attention_backends.md of vLLM: FLASH_ATTN comes first on 8.x and 9.x, FLASHINFER on 10.x; fp8 KV in
    # FLASH_ATTN is for 9.x alone; FLASHINFER has it on 7.x to 10.0
    for kv, accelerators, backend in (
        ("bf16", ("H100", "A100"), "FLASH_ATTN"),
        ("bf16", ("B200", "H100"), "FLASH_ATTN"),
        ("fp8", ("H100", "A100"), "FLASHINFER"),
        ("fp8", ("h100", "B200"), "FLASHINFER"),
    ):
        prefill, decode = ({"accelerator": name, "kv_cache_dtype": kv} for name in accelerators)
        found = export_phases(two_pools(prefill, decode))
        for server in (found.prefill, found.decode):
            assert flag(server.argv, "--attention-backend") == backend
            assert yaml.safe_load(server.config)["attention-backend"] == backend
            assert {word for word in server.argv if word.startswith("--attention")} <= FLAGS[server.engine_version]
        assert any(backend in note and "same" in note for note in found.notes)
        assert any("TRITON_MLA" in note for note in found.notes)
    alike = export_phases(two_pools({"tensor_parallel_size": 2}))
    assert "--attention-backend" not in alike.prefill.argv
    assert any("attention backend of both must be the same" in note for note in alike.notes)


def test_latent_attention_has_a_backend_of_its_own() -> None:
    found = export_phases(two_pools({}, {"accelerator": "A100"}), shape=DEEPSEEK_V3)
    assert flag(found.decode.argv, "--attention-backend") == "TRITON_MLA"
    assert not any("config is not here" in note for note in found.notes)


@pytest.mark.parametrize(
    ("prefill", "decode", "where"),
    [
        ({}, {"accelerator": "MI300X"}, "accelerator"),
        ({"block_size": 8}, {"accelerator": "A100"}, "pools.0.block_size"),
        ({"kv_cache_dtype": "fp8"}, {"accelerator": "A100", "kv_cache_dtype": "fp8", "block_size": 128},
         "pools.1.block_size"),
    ],
)  # fmt: skip
def test_accelerators_without_an_attention_backend_in_common_are_refused(
    prefill: dict[str, Any], decode: dict[str, Any], where: str
) -> None:
    with pytest.raises(CannotExport) as caught:
        export_phases(two_pools(prefill, decode))
    assert caught.value.where == where


def test_layers_of_linear_attention_need_equal_ranks_and_blocks() -> None:
    for where, values in (("tensor_parallel_size", (1, 2)), ("block_size", (16, 32))):
        spec = two_pools({where: values[0]}, {where: values[1]})
        with pytest.raises(CannotExport) as caught:
            export_phases(spec, shape=QWEN_3_5)
        assert caught.value.where == where
        assert any("linear attention" in note for note in export_phases(spec).notes)
        assert not any("linear attention" in note for note in export_phases(spec, shape=LLAMA_8B).notes)
    export_phases(two_pools(), shape=QWEN_3_5)


def test_what_the_proxy_decides_is_named() -> None:
    found = export_phases(two_pools({"router": "prefix_affinity"}, link="InfiniBand 400 Gb/s"))
    assert any("prefix_affinity" in note for note in found.notes)
    assert any("InfiniBand" in note for note in found.notes)


def test_one_command_is_not_made_of_two_pools() -> None:
    with pytest.raises(CannotExport) as caught:
        export(two_pools())
    assert caught.value.where == "pools"
    assert "--kv-transfer-config" not in export(deployment()).argv
