"""A prefill and a decode pool as two commands of vLLM's, whose servers pass KV on by its NixlConnector.

After vLLM's docs/features/nixl_connector_usage.md (commit 026c83f) and nixl_connector_compatibility.md (0a5110e): each
server gets --kv-transfer-config, and a proxy before them sends a prompt to a prefill server with max_tokens 1, then the
request to a decode server, which pulls the KV and streams the answer. What that connector is not documented for is
refused. When two servers meet they compare, among other things, their attention backends; which one a server chooses
by itself, and what each can do, is of docs/design/attention_backends.md (commit 0013943).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import yaml

from ...profiler.hardware import accelerator
from ...runtime.model_shape import ModelShape
from ...runtime.spec import CPU, Deployment, KvTransfer, Pool
from .vllm import CannotExport, Export, Value, export

_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}
# vLLM's own default is 5600; servers on one host each need another
_SIDE_CHANNEL_PORTS = {"prefill": "5600", "decode": "5700"}

# NVIDIA's devices of compute capability 8.0 to 10.0, for which vLLM's page says what each backend can do. Two of them
# may choose differently: FLASHINFER comes first on 10, FLASH_ATTN before it, and FLASH_ATTN takes fp8 KV on 9 alone.
_COMPARED = ("A100", "A10G", "L4", "L40S", "H100", "H200", "B200", "GB200")
_FLASHINFER_BLOCK_SIZES = (16, 32, 64)

PROXY = (
    "clients talk to a proxy, which vLLM's package does not hold: its repository has a plain one, which takes servers "
    "in turn (tests/v1/kv_connector/nixl_integration/toy_proxy_server.py with --prefiller-hosts, --prefiller-ports, "
    "--decoder-hosts and --decoder-ports); give each server a --port"
)


@dataclass(frozen=True)
class PhaseExport:
    """What to start: the command of a prefill server and of a decode server, so many of each, and a proxy.

    prefill, decode  one server each; `not_translated` of each pool
    servers          how many of each to start
    notes            what is needed beside them, in words
    """

    prefill: Export
    decode: Export
    servers: dict[str, int]
    notes: tuple[str, ...]


def export_phases(
    deployment: Deployment,
    *,
    engine_version: str | None = None,
    allow_untested: bool = False,
    shape: ModelShape | None = None,
) -> PhaseExport:
    """Translate a disaggregated deployment for `vllm serve`. Arguments and errors as `export` of one pool.

    Args:
        shape: of the model, where its config is there; else what depends on it is named in the notes.
    """
    _check(deployment, shape)
    backend = _attention_backend(deployment, shape)
    servers = {
        pool.role: _server(deployment, index, engine_version, allow_untested, backend)
        for index, pool in enumerate(deployment.pools)
    }
    notes = [PROXY, "install nixl beside vLLM on every host, the same versions in both pools"]
    notes += _backend_notes(backend, shape)
    prefill, decode = deployment.phases
    for name in ("tensor_parallel_size", "block_size"):
        if shape is None and getattr(prefill, name) != getattr(decode, name):
            notes.append(f"the model's config is not here: with linear attention {name} must be the same in both")
    for pool in deployment.phases:
        if pool.replicas > 1:
            port = "each with a VLLM_NIXL_SIDE_CHANNEL_PORT that no other on its host has"
            notes.append(f"start {pool.replicas} {pool.role} servers, {port}")
        if pool.router != "round_robin":
            notes.append(f"router {pool.router} of the {pool.role} pool: that is up to the proxy")
    notes.append(
        "set VLLM_NIXL_SIDE_CHANNEL_HOST to a server's own address where prefill and decode are on other hosts"
    )
    if deployment.kv_transfer is not None and deployment.kv_transfer.link:
        notes.append(
            f"kv_transfer.link {deployment.kv_transfer.link}: UCX chooses the way itself (UCX_TLS, UCX_NET_DEVICES)"
        )
    counts: dict[str, int] = {pool.role: pool.replicas for pool in deployment.pools}
    return PhaseExport(servers["prefill"], servers["decode"], counts, tuple(notes))


def _server(
    deployment: Deployment, index: int, engine_version: str | None, allow_untested: bool, backend: str
) -> Export:
    """One server of a pool: as a pool by itself, and how it passes KV on."""
    pool = deployment.pools[index]
    alone = pool.model_copy(update={"role": "mixed", "replicas": 1, "router": "round_robin"})
    single = deployment.model_copy(update={"pools": (alone,), "kv_transfer": None})
    try:
        found = export(single, engine_version=engine_version, allow_untested=allow_untested)
    except CannotExport as refused:
        where = refused.where.replace("pools.0.", f"pools.{index}.")
        raise CannotExport(where, refused.found, refused.allowed, refused.todo) from None
    transfer = json.dumps({"kv_connector": "NixlConnector", "kv_role": _ROLES[pool.role]})
    added: dict[str, Value] = {"kv-transfer-config": transfer}
    if backend:
        added["attention-backend"] = backend
    config = {**yaml.safe_load(found.config), **added}
    return replace(
        found,
        argv=(*found.argv, *(word for name, value in added.items() for word in (f"--{name}", str(value)))),
        env={**found.env, "VLLM_NIXL_SIDE_CHANNEL_PORT": _SIDE_CHANNEL_PORTS[pool.role]},
        config=yaml.safe_dump(config, sort_keys=False),
    )


def _attention_backend(deployment: Deployment, shape: ModelShape | None) -> str:
    """The one that both servers are told to take; empty where their accelerators are the same, and so is their choice.

    Raises: CannotExport: accelerators, or a block size, that no backend is documented to have in common.
    """
    names = [accelerator(pool.accelerator).name for pool in deployment.phases]
    if names[0] == names[1]:
        return ""
    found = f"prefill {names[0]}, decode {names[1]}"
    todo = "pick one accelerator for both pools"
    if not set(names) <= set(_COMPARED):
        allowed = f"the same in both pools, or of {', '.join(_COMPARED)}: others have no attention backend in common"
        raise CannotExport("accelerator", found, allowed, todo)
    latent = None if shape is None else shape.latent
    if latent is not None and latent.indexer is not None:
        allowed = "the same in both pools: sparse latent attention has no backend for all accelerators"
        raise CannotExport("accelerator", found, allowed, todo)
    prefill = deployment.phases[0]
    if latent is not None:
        backend = "TRITON_MLA"
    elif prefill.weight_dtype == "fp32":
        backend = "TRITON_ATTN"
    else:
        backend = "FLASHINFER" if prefill.kv_cache_dtype == "fp8" else "FLASH_ATTN"
    for index, pool in enumerate(deployment.pools):
        size = pool.block_size
        if size % 16 or (backend == "FLASHINFER" and size not in _FLASHINFER_BLOCK_SIZES):
            sizes = "16, 32, 64" if backend == "FLASHINFER" else "multiples of 16"
            allowed = f"{sizes} with {backend}, the attention backend that {names[0]} and {names[1]} have in common"
            raise CannotExport(f"pools.{index}.block_size", size, allowed, "pick one of these")
    return backend


def _backend_notes(backend: str, shape: ModelShape | None) -> list[str]:
    met = "the attention backend of both must be the same, the servers compare it when they meet"
    if not backend:
        return [f"{met}: change it in both commands or in none"]
    notes = [f"{met}: both are told --attention-backend {backend}, since their accelerators may choose differently"]
    if shape is None:
        notes.append(f"the model's config is not here: latent attention (MLA) needs TRITON_MLA in place of {backend}")
    return notes


def _check(deployment: Deployment, shape: ModelShape | None) -> None:
    """Raises: CannotExport: what vLLM's connector does otherwise, or is not documented to do."""
    transfer = deployment.kv_transfer or KvTransfer()
    if transfer.first_token != "decode":
        todo = "set it to decode and simulate again"
        raise CannotExport(
            "kv_transfer.first_token", transfer.first_token, "decode: vLLM's proxies stream its answer", todo
        )
    if transfer.overlap != "none":
        todo = "set it to none and simulate again"
        raise CannotExport("kv_transfer.overlap", transfer.overlap, "none: NixlConnector pulls whole prompts", todo)
    for index, pool in enumerate(deployment.pools):
        for name, allowed in (("pipeline_parallel_size", 1), ("context_parallel_size", 1), ("max_loras", 0)):
            if getattr(pool, name) != allowed:
                todo = "tune without"
                limit = f"{allowed}: not documented with NixlConnector"
                raise CannotExport(f"pools.{index}.{name}", getattr(pool, name), limit, todo)
        if pool.speculation != "none":
            limit = "none: both servers need the same, and a prefill pool has none"
            raise CannotExport(f"pools.{index}.speculation", pool.speculation, limit, "tune without")
        if pool.accelerator == CPU:
            limit = "an accelerator: NixlConnector is for device memory, or other connectors"
            raise CannotExport(f"pools.{index}.accelerator", CPU, limit, "export a deployment of accelerators")
    _check_pair(*deployment.phases)
    if shape is not None:
        _check_layers(*deployment.phases, shape)


def _check_layers(prefill: Pool, decode: Pool, shape: ModelShape) -> None:
    """Raises: CannotExport: sizes that layers of several kinds must have in common (its matrix, notes 3, 5 and 6)."""
    same = []
    if shape.linear_attention is not None:
        same.append(("tensor_parallel_size", "states of linear attention go between equal ranks alone"))
    if shape.linear_attention is not None or len({(kind.window, kind.chunk) for kind in shape.attention_kinds()}) > 1:
        same.append(("block_size", "with layers of several kinds blocks are not put together"))
    for name, why in same:
        first, second = getattr(prefill, name), getattr(decode, name)
        if first != second:
            raise CannotExport(name, f"prefill {first}, decode {second}", f"the same in both pools: {why}", "pick one")


def _check_pair(prefill: Pool, decode: Pool) -> None:
    sizes = sorted((prefill.tensor_parallel_size, decode.tensor_parallel_size))
    if sizes[1] % sizes[0]:
        found = f"prefill {prefill.tensor_parallel_size}, decode {decode.tensor_parallel_size}"
        raise CannotExport("tensor_parallel_size", found, "one a multiple of the other", "pick other sizes")
    computing = [pool.weight_dtype if pool.weight_dtype in ("fp32", "fp16") else "bf16" for pool in (prefill, decode)]
    if computing[0] != computing[1]:
        found = f"prefill {prefill.weight_dtype}, decode {decode.weight_dtype}"
        allowed = "weights that are computed with in one type: the servers compare it when they meet"
        raise CannotExport("weight_dtype", found, allowed, "pick the same type")
