"""Published serving points of aiconfigurator's accuracy set, as the step-time model sees them.

What the file does not say is here, with its source: how each origin loads a server, and the flags it starts one with.
InferenceX (formerly InferenceMAX): github.com/InferenceMAX/InferenceMAX, benchmarks/*_b200*, benchmark_lib.sh and
process_result.py (October 2025 to March 2026): prompts and answers of 0.8 to 1 times the length, 10 requests a client,
all clients at once. NVIDIA's gap analysis states no protocol: assumed are fixed prompts and answers of 0.9 to 1 times
the length, since at fixed lengths clients would run in step, and the measured TTFT says that they do not.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bars import needed_data
from paretune.profiler.accelerator_step import Precision
from paretune.profiler.closed_loop import Scheduler
from paretune.profiler.hardware import accelerator
from paretune.profiler.serving_point import DEFAULTS, Deployed, Load

ACCELERATORS = {
    "a100_sxm": "A100",
    "h100_sxm": "H100",
    "h200_sxm": "H200",
    "b200_sxm": "B200",
    "l40s": "L40S",
    "rtx_pro_6000_server": "RTX PRO 6000",
}
GPUS_OF_A_NODE = 8


@dataclass(frozen=True)
class Point:
    """One measured point. `version` is "" where the file has none."""

    identifier: str
    system: str
    engine: str
    version: str
    origin: str
    model: str
    precision: str
    deployed: Deployed
    load: Load
    ttft_s: float
    tpot_s: float

    @property
    def group(self) -> tuple[str, str, str, str, int]:
        return self.system, self.engine, self.model, self.precision, self.deployed.ranks

    @property
    def curve(self) -> tuple[object, ...]:
        """What is the same along a curve over the number of clients."""
        lengths = self.load.input_tokens, self.load.output_tokens
        return (*self.group, self.deployed.expert_parallel, self.version, *lengths)


def read_points(path: Path) -> tuple[list[Point], Counter[str]]:
    """The points that can be modeled, each measurement once, and why the others cannot."""
    left_out: Counter[str] = Counter()
    points: list[Point] = []
    seen: set[tuple[object, ...]] = set()
    configs: dict[str, dict[str, Any] | None] = {}
    with open(path, newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            model = row["model_path"]
            if model not in configs:
                configs[model] = _config(model)
            point = _point(row, configs[model])
            if isinstance(point, str):
                left_out[point] += 1
                continue
            key = (*point.group, point.load, f"{point.ttft_s:.6g} {point.tpot_s:.6g}")
            if key in seen:
                left_out["the same measurement under another name"] += 1
                continue
            seen.add(key)
            points.append(point)
    return points, left_out


def _config(model: str) -> dict[str, Any] | None:
    """config.json of a model, or of the one that its name says it was made of."""
    owner, _, name = model.partition("/")
    plain = name.replace("-Instruct", "").replace("-FP8", "").replace("-FP4", "").replace("-NVFP4", "")
    folder = needed_data("models", "hf_configs")
    for candidate in (f"{owner}--{name}", f"{owner}--{plain}", f"{owner}--Meta-{plain}", f"meta-llama--Meta-{plain}"):
        if (folder / f"{candidate}.json").exists():
            config: dict[str, Any] = json.loads((folder / f"{candidate}.json").read_text())
            return config
    return None


def _point(row: dict[str, str], config: dict[str, Any] | None) -> Point | str:
    if row.get("mode", "agg") not in ("agg", ""):
        return f"mode {row['mode']}"
    if config is None:
        return f"no config.json of {row['model_path']}"
    if row["system"] not in ACCELERATORS:
        return f"system {row['system']}"
    if row["backend"] not in DEFAULTS:
        return f"engine {row['backend']}"
    for column in ("pp_size", "attention_dp_size"):
        if _number(row[column], 1) > 1:
            return f"{column} > 1"
    clients = int(_number(row["concurrency"] or row["batch_size"], 0))
    ttft, tpot = _number(row["silicon_ttft_ms"], 0), _number(row["silicon_tpot_ms"], 0)
    if not (clients and ttft and tpot):
        return "no concurrency, TTFT or TPOT"
    ranks, experts = _sharding(row, config)
    if ranks > GPUS_OF_A_NODE:
        return "more than one node"
    engine, precision = row["backend"], row["precision"] or "bf16"
    sparse = any(key in config for key in ("n_routed_experts", "num_experts", "num_local_experts"))
    dtype = {"bf16": "bfloat16", "fp8": "fp8_block" if sparse else "fp8", "fp4": "nvfp4"}.get(precision)
    if dtype is None:
        return f"precision {precision}"
    inferencex = row.get("origin", "").startswith("InferenceX")
    lengths = int(_number(row["isl"], 0)), int(_number(row["osl"], 0))
    # InferenceX starts all of these with fp8 caches; TensorRT-LLM takes fp8 with fp8 and fp4 checkpoints
    asked = engine == "trtllm" or sparse or inferencex
    small_cache = precision != "bf16" and asked
    cache = "fp8" if small_cache else "bfloat16"
    over_prompts = "fp8" if cache == "fp8" and engine == "trtllm" else "bfloat16"
    release = _release(row["backend_version"])
    if inferencex:
        scheduler = _inferencex_scheduler(engine, row["system"], precision, sparse, clients, lengths, ranks)
    else:
        scheduler = _scheduler(engine, release)
    deployed = Deployed(
        config,
        ranks,
        experts,
        dtype,
        Precision(over_prompts, cache),
        accelerator(ACCELERATORS[row["system"]]).memory_bytes,
        scheduler,
        # enable_fi_allreduce_fusion, --enable-flashinfer-allreduce-fusion: in the scripts of B200
        inferencex and row["system"] == "b200_sxm",
        # where no version stands InferenceX ran vLLM 0.10.2 (.github/configs/master.yaml, October 2025)
        engine == "vllm" and not (scheduler.ahead and release >= (0, 11)),
    )
    shortest = (0.8, 0.8) if inferencex else (1.0, 0.9)
    return Point(
        row["id"],
        row["system"],
        engine,
        row["backend_version"],
        row.get("origin", ""),
        row["model_path"],
        precision,
        deployed,
        Load(clients, *lengths, *shortest),
        1e-3 * ttft,
        1e-3 * tpot,
    )


def _sharding(row: dict[str, str], config: dict[str, Any]) -> tuple[int, int]:
    """(ranks, parts that experts are divided into).

    Some rows multiply: 16 GPUs as 4 x 4, 64 as 8 x 8, whose measurements stand in other rows as 4 and 8 GPUs that
    divide the experts among all of them. An engine does either with a rank, not both. DeepSeek-R1 in fp4 on SGLang was
    run by InferenceX with as many parts as ranks (its configurations of October and December 2025 and later), also
    where a row of November 2025 has left the parts out and names 1.
    """
    ranks, tensor, experts = (int(_number(row[c], 1)) or 1 for c in ("tp_size", "moe_tp_size", "moe_ep_size"))
    if tensor == experts and tensor * experts == ranks and ranks > 1:
        ranks = experts
    inferencex = row.get("origin", "").startswith("InferenceX")
    named = row["backend"], row["precision"], row["model_path"].split("/")[-1]
    if inferencex and named == ("sglang", "fp4", "DeepSeek-R1"):
        experts = ranks
    return ranks, min(experts, ranks) if "n_routed_experts" in config or "num_experts" in config else 1


def _scheduler(engine: str, release: tuple[int, int]) -> Scheduler:
    """An engine's own; vLLM composes ahead by itself since 0.14 (#27614)."""
    return replace(DEFAULTS[engine], ahead=DEFAULTS[engine].ahead or release >= (0, 14))


def _inferencex_scheduler(
    engine: str, system: str, precision: str, sparse: bool, clients: int, lengths: tuple[int, int], ranks: int
) -> Scheduler:
    """As InferenceX starts an engine: its scripts, by model, precision, GPU and engine."""
    default = DEFAULTS[engine]
    if engine == "vllm":  # 70b_fp8_h100_slurm.sh, 70b_*_b200_docker.sh: async-scheduling, 8,192 tokens
        return replace(default, ahead=True)
    if engine == "trtllm" and sparse:  # dsr1_fp8_b200_trt_slurm.sh: MAX_NUM_TOKENS
        return replace(default, max_num_batched_tokens=(clients + lengths[0] + 127) // 64 * 64)
    if engine == "trtllm":  # 70b_fp8_b200_trt_slurm.sh, 70b_fp4_b200_trt_docker.sh: for 1k/1k on less than 8 ranks
        budget, waits = 16384, lengths == (1024, 1024) and ranks < 8
        waiting = replace(default, wait_steps=20, wait_tokens=round(0.9 * budget)) if waits else default
        return replace(waiting, max_num_batched_tokens=budget)
    if system != "b200_sxm":  # dsr1_fp8_h200_slurm.sh
        return replace(default, max_num_batched_tokens=32768, max_num_seqs=512)
    # dsr1_fp4_b200.sh, dsr1_fp8_b200.sh: --chunked-prefill-size, --scheduler-recv-interval, --max-running-requests
    if precision == "fp8" and ranks < 8:
        return replace(default, max_num_seqs=32, receive_every=10)
    chunk = 16384 if precision == "fp4" else 32768
    return replace(default, max_num_batched_tokens=chunk, max_num_seqs=512, receive_every=30 if clients >= 16 else 10)


def _release(version: str) -> tuple[int, int]:
    """Major and minor number; (0, 0) where none is stated."""
    parts = version.split(".")
    return (int(parts[0]), int(parts[1])) if len(parts) > 1 and parts[0].isdigit() and parts[1].isdigit() else (0, 0)


def _number(text: str, missing: float) -> float:
    value = float(text) if text else math.nan
    return missing if math.isnan(value) else value
