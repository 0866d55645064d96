"""KV on its way: bytes of every sharding against counts by hand and a published one, links from the catalog, and time
that is never less than bytes over bandwidth."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.profiler.hardware import accelerator
from paretune.profiler.kv_transfer import TransferLink, transfer_link, transfer_time, transferred_bytes
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.spec import BadSpec, Deployment, KvTransfer, Pool

from .test_profiler_kinds import DEEPSEEK_V3
from .test_profiler_operators import LLAMA_8B

# OPT-66B: 64 layers, 72 heads of 128, as wide as a Llama of these sizes as far as KV goes
OPT_66B = ModelShape.from_config({
    "model_type": "llama", "vocab_size": 50272, "hidden_size": 9216, "intermediate_size": 36864,
    "num_hidden_layers": 64, "num_attention_heads": 72, "num_key_value_heads": 72, "max_position_embeddings": 2048,
})  # fmt: skip
SOURCE = "a test, 2026-11-27"


def pools(prefill: dict[str, object] | None = None, decode: dict[str, object] | None = None) -> tuple[Pool, Pool]:
    return (
        Pool.model_validate({"role": "prefill", "accelerator": "H100", **(prefill or {})}),
        Pool.model_validate({"role": "decode", "accelerator": "H100", **(decode or {})}),
    )


def deployment(prefill: dict[str, object], decode: dict[str, object], **transfer: object) -> Deployment:
    return Deployment(pools=pools(prefill, decode), kv_transfer=KvTransfer.model_validate(transfer))


def per_token(shape: ModelShape, prefill_tp: int, decode_tp: int) -> tuple[int, int, int]:
    found = transferred_bytes(shape, *pools({"tensor_parallel_size": prefill_tp}, {"tensor_parallel_size": decode_tp}))
    return found.sent_per_token, found.received_per_token, found.all_per_token


def test_512_tokens_of_opt_66b_are_1_13_gb() -> None:
    # "the KV cache size of a single 512-token request on OPT-66B is approximately 1.13GB ... 10 rps ... 90Gbps":
    # DistServe (Zhong et al., OSDI 2024), section 3.3; its GB are GiB: 2 x 64 layers x 9216 x 2 bytes x 512
    prefill, decode = pools()
    time = transfer_time(OPT_66B, prefill, decode, TransferLink("x", 90e9 / 8, 90e9 / 8, 0.0, True, SOURCE))
    assert 512 * time.bytes_per_token / 2**30 == pytest.approx(1.13, abs=0.01)
    # so that ten of them take the whole of a second, or with real GiB 7 % more
    assert 10 * time.seconds(512) == pytest.approx(1.07, abs=0.01)


def test_tensor_parallel_ranks_send_their_heads_at_the_same_time() -> None:
    # Llama 3 8B: 131,072 bytes a token, 8 KV heads
    assert per_token(LLAMA_8B, 1, 1) == (131072, 131072, 131072)
    assert per_token(LLAMA_8B, 4, 4) == (32768, 32768, 131072)
    assert per_token(LLAMA_8B, 2, 8) == (65536, 16384, 131072)
    assert per_token(LLAMA_8B, 8, 2) == (16384, 65536, 131072)
    # 16 ranks hold each head twice, and each of them gets its copy
    assert per_token(LLAMA_8B, 8, 16) == (32768, 16384, 262144)
    assert per_token(LLAMA_8B, 16, 8) == (16384, 16384, 131072)


def test_a_latent_goes_whole_to_every_rank_that_decodes() -> None:
    # DeepSeek-V3 in bf16: 61 layers x 576 numbers x 2 bytes
    latent = 61 * 576 * 2
    assert per_token(DEEPSEEK_V3, 1, 1) == (latent, latent, latent)
    assert per_token(DEEPSEEK_V3, 8, 8) == (latent, latent, 8 * latent)
    assert per_token(DEEPSEEK_V3, 1, 8) == (8 * latent, latent, 8 * latent)
    assert per_token(DEEPSEEK_V3, 8, 1) == (latent, latent, latent)


def test_pipeline_stages_send_their_own_layers() -> None:
    prefill, decode = pools({"pipeline_parallel_size": 4})
    found = transferred_bytes(LLAMA_8B, prefill, decode)
    assert (found.sent_per_token, found.received_per_token) == (32768, 131072)
    prefill, decode = pools({}, {"pipeline_parallel_size": 2, "tensor_parallel_size": 2})
    found = transferred_bytes(LLAMA_8B, prefill, decode)
    assert (found.sent_per_token, found.received_per_token, found.all_per_token) == (131072, 32768, 131072)


def test_states_of_linear_attention_travel_once_a_request() -> None:
    qwen = ModelShape.from_config({
        "model_type": "qwen3_5_moe_text", "vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096,
        "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4, "layer_types": [*["linear_attention"] * 3, "full_attention"],
    })  # fmt: skip
    prefill, decode = pools()
    found = transferred_bytes(qwen, prefill, decode)
    assert qwen.linear_attention is not None
    states = 3 * qwen.linear_attention.state_bytes()
    assert (found.sent_states, found.received_states, found.all_states) == (states, states, states)
    time = transfer_time(qwen, prefill, decode, TransferLink("x", 1e9, 1e9, 0.5, True, SOURCE))
    assert time.seconds(16) == pytest.approx(0.5 + (states + 16 * found.sent_per_token) / 1e9)


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.integers(1, 8192),
    prefill_tp=st.sampled_from([1, 2, 4, 8, 16]),
    decode_tp=st.sampled_from([1, 2, 4, 8, 16]),
    stages=st.sampled_from([1, 2, 4]),
    send=st.floats(1e6, 1e12),
    receive=st.floats(1e6, 1e12),
    latency_s=st.floats(0, 0.1),
    shape=st.sampled_from([LLAMA_8B, DEEPSEEK_V3, OPT_66B]),
)
def test_no_transfer_is_faster_than_its_bytes_over_the_bandwidth_of_all_devices_together(
    tokens: int, prefill_tp: int, decode_tp: int, stages: int, send: float, receive: float, latency_s: float,
    shape: ModelShape,
) -> None:  # fmt: skip
    prefill, decode = pools(
        {"tensor_parallel_size": prefill_tp, "pipeline_parallel_size": stages}, {"tensor_parallel_size": decode_tp}
    )
    time = transfer_time(shape, prefill, decode, TransferLink("x", send, receive, latency_s, True, SOURCE))
    sent_bytes = tokens * time.bytes_per_token
    assert time.tokens(tokens) >= tokens
    assert time.seconds(tokens) >= latency_s
    for rate in (send * prefill_tp * stages, receive * decode_tp):
        assert time.seconds(tokens) * rate >= sent_bytes * (1 - 1e-12)


def test_the_nearest_link_is_taken_that_joins_all_devices() -> None:
    h100 = accelerator("H100")
    near = transfer_link(deployment({"tensor_parallel_size": 4}, {"tensor_parallel_size": 4}))
    assert (near.name, near.send_bytes_per_s, near.latency_s) == ("NVLink 4", 450e9, pytest.approx(2.4e-6))
    far = transfer_link(deployment({"tensor_parallel_size": 4, "replicas": 2}, {"tensor_parallel_size": 4}))
    assert (far.name, far.receive_bytes_per_s, far.latency_s) == ("InfiniBand 400 Gb/s", 50e9, pytest.approx(5e-6))
    assert h100.levels[1].as_of in far.source
    named = transfer_link(deployment({}, {}, link="infiniband 400 gb/s"))
    assert named.send_bytes_per_s == 50e9
    bus = transfer_link(deployment({"accelerator": "L40S"}, {"accelerator": "L40S"}, link="PCIe 4 x16"))
    assert bus.send_bytes_per_s == 32e9
    fabric = transfer_link(deployment({"accelerator": "MI300X"}, {"accelerator": "MI300X"}))
    assert fabric.name == "Infinity Fabric"
    assert not fabric.latency_known
    assert any("latency" in each for each in fabric.not_modeled)


def test_two_kinds_of_devices_meet_over_the_network_and_the_slower_end_counts() -> None:
    found = transfer_link(deployment({}, {"accelerator": "A100"}))
    assert found.name == "InfiniBand 400 Gb/s to InfiniBand 200 Gb/s"
    assert (found.send_bytes_per_s, found.receive_bytes_per_s) == (50e9, 25e9)
    prefill, decode = pools({}, {"accelerator": "A100"})
    assert transfer_time(LLAMA_8B, prefill, decode, found).s_per_token == pytest.approx(131072 / 25e9)


def test_figures_of_the_specs_own_need_a_source() -> None:
    own = deployment({"accelerator": "cpu"}, {"accelerator": "cpu"}, bytes_per_s=1e9, latency_s=1e-3, source=SOURCE)
    found = transfer_link(own)
    assert (found.send_bytes_per_s, found.latency_s, found.source) == (1e9, 1e-3, SOURCE)


@pytest.mark.parametrize(
    ("prefill", "decode", "transfer", "where"),
    [
        ({"accelerator": "cpu"}, {"accelerator": "cpu"}, {}, "kv_transfer.bytes_per_s"),
        ({}, {}, {"link": "carrier pigeon"}, "kv_transfer.link"),
        ({"replicas": 8}, {}, {"link": "NVLink 4"}, "kv_transfer.link"),
        ({}, {"accelerator": "H200"}, {"link": "NVLink 4"}, "kv_transfer.link"),
        ({}, {"accelerator": "A100"}, {"link": "InfiniBand 400 Gb/s"}, "kv_transfer.link"),
        ({"accelerator": "A10G"}, {"accelerator": "H100"}, {}, "kv_transfer.bytes_per_s"),
        # the bus of an H100 ends at its host; that of an L40S joins the eight of one server, all of them L40S
        ({"replicas": 16}, {"replicas": 16}, {"link": "PCIe 5 x16"}, "kv_transfer.link"),
        ({}, {}, {"link": "PCIe 5 x16"}, "kv_transfer.link"),
        ({"accelerator": "A100"}, {"accelerator": "L40S"}, {"link": "PCIe 4 x16"}, "kv_transfer.link"),
        ({"accelerator": "L40S"}, {"accelerator": "A100"}, {"link": "PCIe 4 x16"}, "kv_transfer.link"),
        ({"accelerator": "L40S"}, {"accelerator": "L4"}, {"link": "PCIe 4 x16"}, "kv_transfer.link"),
        ({"accelerator": "L40S", "replicas": 8}, {"accelerator": "L40S"}, {"link": "PCIe 4 x16"}, "kv_transfer.link"),
    ],
)
def test_a_link_that_does_not_reach_is_refused_by_the_fields_name(
    prefill: dict[str, object], decode: dict[str, object], transfer: dict[str, object], where: str
) -> None:
    with pytest.raises(BadSpec) as caught:
        transfer_link(deployment(prefill, decode, **transfer))
    assert (caught.value.where, caught.value.exit_code) == (where, 2)
