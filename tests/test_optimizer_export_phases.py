"""A prefill and a decode pool for vLLM: two commands, and what its connector does not do is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from paretune.optimizer.export.vllm import CannotExport, export
from paretune.optimizer.export.vllm_flags import FLAGS
from paretune.optimizer.export.vllm_phases import export_phases
from paretune.runtime.spec import Deployment, KvTransfer, Pool

from .optimizer_examples import NGRAM, deployment

LIMITS = {"accelerator": "H100", "max_model_len": 512, "num_kv_blocks": 1024}


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


def test_what_the_proxy_decides_is_named() -> None:
    found = export_phases(two_pools({"router": "prefix_affinity"}, link="InfiniBand 400 Gb/s"))
    assert any("prefix_affinity" in note for note in found.notes)
    assert any("InfiniBand" in note for note in found.notes)


def test_one_command_is_not_made_of_two_pools() -> None:
    with pytest.raises(CannotExport) as caught:
        export(two_pools())
    assert caught.value.where == "pools"
    assert "--kv-transfer-config" not in export(deployment()).argv
