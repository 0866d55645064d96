"""What a published serving point says (clients, lengths, engine, sharding), and its TTFT and TPOT from operator tables.

GPU time from the tables of the engine's own kernels, the mixture of prompts and decoding from the engine's way to
compose steps (closed_loop.py), the host from constants that were published elsewhere, unless they were fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .accelerator_step import GpuStep, Precision, engine_fusion, gpu_step
from .closed_loop import Host, Scheduler, serve
from .decoder_layout import DecoderLayout, decoder_layout
from .importers import OperatorTables
from .operator_tables import BadTable

# vLLM's loop takes about 0.54 ms a step, a request 15.6 ms beside its steps (BLIS), half of it before; measured by
# others on other machines, and taken for every engine. A prompt's turn at the front end: a tokenizer's milliseconds.
PUBLISHED_HOST = Host(step_s=0.54e-3, row_s=0.0, prompt_s=0.0, launch_s=0.0, request_s=7.8e-3, door_s=2e-3)

# What preparing a step's inputs (attention metadata, block tables, copies) takes where it waits for the tokens of the
# step before: 1 to 5 ms in vLLM (inference-sim issue 482), of which the least is taken. TensorRT-LLM and SGLang prepare
# while the step before computes, vLLM since #23569 (0.11), where it composes ahead.
PREPARE_S = 1.0e-3

# The engines' own defaults: TensorRT-LLM 1.0 (trtllm-serve: 8,192 tokens, no chunks, GUARANTEED_NO_EVICT, overlap
# scheduler), vLLM 0.11 (V1 on 80 GB or more: 8,192 tokens, chunked; composes ahead by itself since 0.14), SGLang 0.5
# (chunks of 8,192 on 80 GB, prompts before decoding, overlap schedule since 0.4).
DEFAULTS = {
    "trtllm": Scheduler(8192, 2048, chunked=False, prefill_first=False, reserves_output=True, ahead=True),
    "vllm": Scheduler(8192, 1024, chunked=True, prefill_first=False, reserves_output=False),
    "sglang": Scheduler(8192, 4096, chunked=True, prefill_first=True, reserves_output=False, ahead=True),
}
# Share of the memory that the engine uses, or (TensorRT-LLM) that its cache takes of what the weights leave.
_MEMORY_SHARE = {"trtllm": 0.9, "vllm": 0.9, "sglang": 0.85}
# Beside weights and cache: activations, graphs, communication buffers. aiconfigurator's systems/*.yaml has 3.5 GiB
# other_mem and 0.4 GB for NCCL (2026-07-25).
_OTHER_BYTES = 4.2e9


@dataclass(frozen=True)
class Load:
    """A closed loop: clients, the longest prompt and answer, and how short they may be as a share of it.

    rounds  requests a client sends
    """

    clients: int
    input_tokens: int
    output_tokens: int
    shortest_input: float = 1.0
    shortest_output: float = 1.0
    rounds: int = 10


@dataclass(frozen=True)
class Deployed:
    """One replica: model, engine and sharding.

    dtype            of the linear layers, as aiconfigurator names it
    expert_parallel  parts that whole experts are divided into
    memory_bytes     of one device
    fused_norms      the engine was asked to norm inside the all-reduce
    inputs_after     inputs of a step are prepared after the step before
    """

    config: Mapping[str, Any]
    ranks: int
    expert_parallel: int
    dtype: str
    precision: Precision
    memory_bytes: float
    scheduler: Scheduler
    fused_norms: bool = False
    inputs_after: bool = False

    def layout(self, engine: str) -> DecoderLayout:
        fusion = engine_fusion(engine, str(self.config.get("model_type")), self.fused_norms)
        return decoder_layout(self.config, self.ranks, self.expert_parallel, self.dtype, fusion)


@dataclass(frozen=True)
class Predicted:
    """Means over all requests, seconds; and what the cache holds."""

    ttft_s: float
    tpot_s: float
    kv_tokens: float


class ServingModel:
    """Predictions for one system and engine; steps of a deployment are worked out once."""

    def __init__(self, tables: OperatorTables, beside: Sequence[OperatorTables] = (), routing: str = "power_law_1.01"):
        self.tables, self.beside, self.routing = tables, beside, routing
        self._steps: dict[tuple[object, ...], tuple[DecoderLayout, GpuStep]] = {}

    def predict(self, deployed: Deployed, load: Load, host: Host = PUBLISHED_HOST, seed: int = 0) -> Predicted:
        """TTFT and TPOT under a load.

        Raises: BadTable: an operator that was not measured, or a memory that does not hold the model and one request.
        """
        sharding = deployed.ranks, deployed.expert_parallel
        key = (id(deployed.config), *sharding, deployed.dtype, deployed.precision, deployed.fused_norms)
        if key not in self._steps:
            layout = deployed.layout(self.tables.engine)
            step = gpu_step(self.tables, layout, deployed.precision, self.routing, self.beside)
            self._steps[key] = (layout, step)
        layout, step = self._steps[key]
        kv_tokens = self.kv_tokens(deployed, layout)
        longest = load.input_tokens + load.output_tokens
        if kv_tokens < longest:
            found = f"{layout.weight_bytes / 1e9:.0f} GB of weights, cache for {max(0, kv_tokens):.0f} tokens"
            raise BadTable("memory of one rank", found, f"a cache of {longest} tokens", "use more ranks")
        rng = np.random.default_rng(seed)
        n = load.clients * load.rounds
        inputs = rng.integers(int(load.shortest_input * load.input_tokens), load.input_tokens + 1, n)
        outputs = rng.integers(max(1, int(load.shortest_output * load.output_tokens)), load.output_tokens + 1, n)
        scheduler = deployed.scheduler
        if not scheduler.chunked and load.input_tokens > scheduler.max_num_batched_tokens:
            scheduler = replace(scheduler, max_num_batched_tokens=load.input_tokens)
        if deployed.inputs_after:
            host = host._replace(step_s=host.step_s + PREPARE_S)
        served = serve(step, scheduler, host, kv_tokens, load.clients, inputs, outputs)
        return Predicted(float(served.ttft_s.mean()), float(served.tpot_s.mean()), kv_tokens)

    def kv_tokens(self, deployed: Deployed, layout: DecoderLayout) -> float:
        """Tokens that the cache of a rank holds."""
        share, memory = _MEMORY_SHARE[self.tables.engine], deployed.memory_bytes
        if self.tables.engine == "trtllm":
            free = share * (memory - layout.weight_bytes - _OTHER_BYTES)
        else:
            free = share * memory - layout.weight_bytes - _OTHER_BYTES
            if free < 0.5 * (memory - layout.weight_bytes - _OTHER_BYTES):
                free = share * (memory - layout.weight_bytes - _OTHER_BYTES)  # whoever runs it has raised the share
        return free / (layout.cached_numbers_per_token * deployed.precision.kv_bytes)
