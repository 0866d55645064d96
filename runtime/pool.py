"""A pool of a deployment: identical replicas of the model, and how each is sharded, stored, batched and cached.

The fields stand here with what they may be, alone and together; what a deployment adds stands in spec.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from ..kernels.tiles import TileTable

CPU = "cpu"


def _tile_table(value: Any) -> TileTable:
    if isinstance(value, TileTable):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"a tile table is a mapping with schema_version and tiles, not {value!r:.60}")
    return TileTable.from_dict(value)


# kernels/ knows nothing of pydantic, so the table's own plain form is what a spec holds
Tiles = Annotated[
    TileTable,
    PlainValidator(_tile_table),
    PlainSerializer(TileTable.to_dict),
    WithJsonSchema({"type": "object", "description": "what `paretune kernels tune` writes"}),
]


class Part(BaseModel):
    """A part of a spec: immutable, and without fields that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Pool(Part):
    """Identical replicas of the model, and how each of them is sharded, stored, batched and cached."""

    role: Literal["mixed", "prefill", "decode"] = Field(
        "mixed", description="which half of a request the pool computes"
    )
    replicas: int = Field(1, ge=1, le=65536, description="copies of the model, each with its own queue and KV cache")
    router: Literal["round_robin", "least_outstanding_tokens", "prefix_affinity"] = Field(
        "round_robin", description="which replica a request goes to"
    )
    accelerator: str = Field(CPU, min_length=1, description="name in the accelerator catalog; 'cpu' is this machine")
    tensor_parallel_size: int = Field(1, ge=1, le=1024, description="ranks that share every layer's weights")
    pipeline_parallel_size: int = Field(
        1, ge=1, le=1024, description="stages of consecutive layers, each on ranks of its own, that work on other steps"
    )
    context_parallel_size: int = Field(
        1, ge=1, le=1024, description="ranks that divide the tokens of a long prompt; each holds all weights and KV"
    )
    enable_expert_parallel: bool = Field(
        False,
        description="the ranks that share a layer divide a mixture's experts among them, not the channels of each",
    )
    num_threads: int = Field(
        1, ge=1, le=1024, description="CPU threads that each rank computes with; 1 on accelerators"
    )
    weight_dtype: Literal["fp32", "bf16", "fp16", "fp8", "int8", "int4", "nvfp4", "mxfp4", "ternary"] = Field(
        "bf16", description="storage of the weights; ternary for models that were trained so"
    )
    kv_cache_dtype: Literal["fp32", "bf16", "fp8", "int8"] = Field("bf16", description="storage of the KV cache")
    max_model_len: int = Field(2048, ge=2, description="most tokens, prompt and answer together, of one request")
    max_num_seqs: int = Field(128, ge=1, le=65536, description="most requests in one step")
    max_num_batched_tokens: int = Field(
        2048, ge=1, description="most tokens that one step computes, all requests together"
    )
    block_size: int = Field(16, ge=1, le=1024, description="tokens in one block of the KV cache")
    num_kv_blocks: int = Field(2048, ge=1, description="blocks in each replica's KV cache")
    enable_chunked_prefill: bool = Field(True, description="a prompt may be computed over several steps")
    enable_prefix_caching: bool = Field(True, description="blocks of equal prefixes are computed once")
    max_queued_requests: int = Field(
        0, ge=0, description="most requests that wait for a replica; the server answers more with 429; 0 = no limit"
    )
    scheduling: Literal["fcfs", "priority"] = Field(
        "fcfs", description="who goes first: who came first, or the lowest `priority` of a request"
    )
    admission: Literal["on_demand", "first_chunk", "watermark", "estimated_peak"] = Field(
        "on_demand", description="which blocks must be there before a waiting request may start"
    )
    watermark: float = Field(
        0.0, ge=0, lt=1, description="share of the blocks that admission 'watermark' keeps free for those that run"
    )
    preemption: Literal["recompute", "swap"] = Field(
        "recompute",
        description="a request that had to give its blocks back computes them again, or fetches them",
    )
    host_kv_blocks: int = Field(
        0, ge=0, description="blocks in host memory, of each replica: a second tier of the KV cache; 0: none"
    )
    long_prefill_token_threshold: int = Field(
        0, ge=0, description="most tokens of one prompt in a step that others wait for, too; 0: no such limit"
    )
    speculation: Literal["none", "ngram", "draft_model"] = Field(
        "none", description="who proposes tokens that one step then verifies: nobody, the request's own text, a model"
    )
    num_speculative_tokens: int = Field(
        0, ge=0, le=64, description="most tokens proposed for a request in a step; 0 with speculation 'none'"
    )
    prompt_lookup_max: int = Field(
        0, ge=0, le=64, description="longest run of last tokens that 'ngram' looks for in the text before; else 0"
    )
    prompt_lookup_min: int = Field(
        0, ge=0, le=64, description="shortest run that 'ngram' takes for a match; 0 with any other speculation"
    )
    draft_model: str = Field(
        "", description="model directory of 'draft_model', of the same vocabulary; empty with any other speculation"
    )
    max_loras: int = Field(0, ge=0, le=65536, description="most LoRA adapters in one step; 0 takes none")
    max_cpu_loras: int = Field(
        0, ge=0, description="adapters kept in host memory, those of live requests besides; 0 = max_loras"
    )
    max_lora_rank: int = Field(16, ge=1, le=512, description="highest rank of an adapter")
    enforce_eager: bool = Field(
        False, description="launch decode steps kernel by kernel, not as CUDA graphs; false on cpu, which has none"
    )
    cuda_graph_sizes: tuple[int, ...] = Field(
        (), description="rows of the decode steps captured as CUDA graphs, ascending; empty: 1, 2, 4, 8, 16, 24, ..."
    )
    tiles: Tiles = Field(default_factory=TileTable, description="tile of each operator by precision and row bucket")

    @field_validator("block_size")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("block_size must be a power of two")
        return value

    @field_validator("cuda_graph_sizes")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(size < 1 for size in value) or list(value) != sorted(set(value)):
            raise ValueError("cuda_graph_sizes must be integers >= 1, ascending, each once")
        return value

    @model_validator(mode="after")
    def _graphs_fit(self) -> Self:
        if self.accelerator == CPU and (self.enforce_eager or self.cuda_graph_sizes):
            name = "enforce_eager" if self.enforce_eager else "cuda_graph_sizes"
            raise ValueError(f"{name} is for accelerators with CUDA graphs, and accelerator is 'cpu'")
        if self.enforce_eager and self.cuda_graph_sizes:
            raise ValueError("enforce_eager is true, so cuda_graph_sizes must be empty: nothing is captured")
        if self.cuda_graph_sizes and self.cuda_graph_sizes[-1] > self.max_num_seqs:
            raise ValueError(
                f"cuda_graph_sizes go up to {self.cuda_graph_sizes[-1]}, and no decode step has more rows than "
                f"max_num_seqs ({self.max_num_seqs})"
            )
        return self

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ValueError(
                f"enable_chunked_prefill is false, so max_num_batched_tokens ({self.max_num_batched_tokens}) must be "
                f"at least max_model_len ({self.max_model_len}): a prompt must fit into one step"
            )
        if not self.enable_chunked_prefill and self.long_prefill_token_threshold:
            raise ValueError(
                f"enable_chunked_prefill is false, so long_prefill_token_threshold "
                f"({self.long_prefill_token_threshold}) must be 0: a prompt must fit into one step"
            )
        if self.num_kv_blocks * self.block_size < self.max_model_len:
            raise ValueError(
                f"num_kv_blocks ({self.num_kv_blocks}) x block_size ({self.block_size}) holds fewer tokens than one "
                f"request of max_model_len ({self.max_model_len}) needs"
            )
        if self.enable_expert_parallel and self.tensor_parallel_size == 1:
            raise ValueError(
                "enable_expert_parallel is true, so tensor_parallel_size (1) must be at least 2: it is these ranks "
                "that divide the experts"
            )
        if (self.admission == "watermark") != (self.watermark > 0):
            raise ValueError(
                f"watermark ({self.watermark:g}) must be above 0 with admission 'watermark', and 0 with any other "
                f"(found {self.admission!r})"
            )
        if self.preemption == "swap" and self.host_kv_blocks == 0:
            raise ValueError("host_kv_blocks (0) must be at least 1 with preemption 'swap': it is where blocks go")
        if self.host_kv_blocks and self.preemption == "recompute" and not self.enable_prefix_caching:
            raise ValueError(
                f"host_kv_blocks ({self.host_kv_blocks}) would hold nothing: enable_prefix_caching is false, and "
                "preemption is not 'swap'"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): each running request computes one token a step"
            )
        _check_speculation(self)
        if self.max_cpu_loras and not self.max_loras:
            raise ValueError(f"max_cpu_loras ({self.max_cpu_loras}) needs max_loras: with 0 no adapter is taken")
        if self.max_cpu_loras and self.max_cpu_loras < self.max_loras:
            raise ValueError(
                f"max_cpu_loras ({self.max_cpu_loras}) must be at least max_loras ({self.max_loras}), or 0 for as "
                "many: what takes part in a step comes from host memory"
            )
        if self.accelerator != CPU and self.num_threads != 1:
            raise ValueError(f"num_threads ({self.num_threads}) is for accelerator 'cpu', not {self.accelerator!r}")
        return self

    @property
    def max_num_samples(self) -> int:
        """Most tokens that one step samples: each request's next one, and one for every proposal of its."""
        return self.max_num_seqs * (1 + self.num_speculative_tokens)

    @property
    def devices_per_replica(self) -> int:
        """Accelerators that one replica holds: one a rank; on CPU the threads of all its ranks."""
        ranks = self.pipeline_parallel_size * self.context_parallel_size * self.tensor_parallel_size
        return ranks * (self.num_threads if self.accelerator == CPU else 1)


def _check_speculation(pool: Pool) -> None:
    """Raises: ValueError: the fields of speculation do not fit each other, or the batch limits."""
    method, tokens = pool.speculation, pool.num_speculative_tokens
    low, high = pool.prompt_lookup_min, pool.prompt_lookup_max
    if (method != "none") != (tokens > 0):
        raise ValueError(
            f"num_speculative_tokens ({tokens}) must be at least 1 with speculation 'ngram' or 'draft_model', and 0 "
            f"without (found {method!r})"
        )
    if method == "ngram" and not 1 <= low <= high:
        raise ValueError(
            f"prompt_lookup_min ({low}) and prompt_lookup_max ({high}) must be at least 1, the first at most the "
            "second, with speculation 'ngram'"
        )
    if method != "ngram" and (low or high):
        raise ValueError(f"prompt_lookup_min ({low}) and prompt_lookup_max ({high}) need speculation 'ngram'")
    if (method == "draft_model") != bool(pool.draft_model):
        raise ValueError(
            f"draft_model ({pool.draft_model!r}) must name a model directory with speculation 'draft_model', and be "
            f"empty with any other (found {method!r})"
        )
    if pool.max_num_batched_tokens < pool.max_num_samples:
        raise ValueError(
            f"max_num_batched_tokens ({pool.max_num_batched_tokens}) must be at least max_num_seqs times one more than "
            f"num_speculative_tokens ({pool.max_num_samples}): each running request verifies so many in a step"
        )
