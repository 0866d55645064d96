"""Per-request truth: a run of vLLM predicted from a profile of its layers, request by request.

    python benchmarks/per_request.py                       the runs and profiles of the public data
    python benchmarks/per_request.py --run DIR --profile DIR

DIR as LLMServingSim lays them out: a run holds vllm/requests.jsonl and vllm/meta.json (and config.json, whose link
joins the GPUs), a profile meta.yaml and tpN/. Arrivals, prompts and answer lengths are the run's. Where its dataset is
among the public data (`--trace FILE` for others) the tokens of its prompts say what the prefix cache holds. One
constant is fitted to the two runs of dense models (profiler/engine_tables.py: time between kernels), and how ranks with
experts share a link was chosen by the only run that has them (docs/notes/per-request.md); else nothing is.

Arrivals are stamped by the client's clock, all else by the server's. They are laid over each other so that the request
that came to the scheduler fastest took no time: what every request needs before, some 2 ms, is in no TTFT here.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bars import Bar, data_dir, finish, needed_data
from paretune.profiler.engine_tables import Link, engine_step
from paretune.profiler.hardware import BadHardware, accelerator
from paretune.profiler.importers.llmservingsim import find_profile, read_profile
from paretune.profiler.operators import kv_bytes_per_token, linears, rank_weight_bytes
from paretune.profiler.simulator import simulate
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.spec import Pool
from paretune.traces.columns import PrefixHashes
from paretune.traces.trace import Trace

RUNS = ("Llama-3.1-8B", "Qwen3-32B", "Qwen3-30B-A3B-Instruct-2507")
METRICS = ("TTFT", "TPOT", "E2E")
BLOCK_SIZE = 16  # vLLM's, where the run does not say
NO_LIMIT_BLOCKS = 1 << 20

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """A measured run.

    memory_bytes          of a device, as far as the engine uses it
    arrival_s             (n,) when each request was sent, from the first on, on the server's clock
    first_s, last_s       (n,) its first and last token, on the same
    """

    name: str
    model: str
    engine: dict[str, Any]
    meta: dict[str, Any]
    link: Link | None
    memory_bytes: float | None
    arrival_s: Floats
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    first_s: Floats
    last_s: Floats


def read_run(folder: Path) -> Run:
    files = folder / "vllm" if (folder / "vllm").is_dir() else folder
    meta = json.loads((files / "meta.json").read_text())
    rows = pd.DataFrame([json.loads(line) for line in (files / "requests.jsonl").read_text().splitlines()])
    rows = rows.sort_values("arrival_time", kind="stable")
    clocks_s = (rows.queued_ts - rows.arrival_time).min()
    arrival = rows.arrival_time.to_numpy() + clocks_s
    config = next((p for p in (folder / "config.json", files / "config.json") if p.exists()), None)
    link = memory_bytes = None
    if config is not None:
        described = json.loads(config.read_text())
        if "link_bw" in described:  # GB/s and nanoseconds
            link = Link(described["link_latency"] * 1e-9, described["link_bw"] * 1e9)
        memory = described["nodes"][0]["instances"][0]["npu_mem"]
        memory_bytes = memory["mem_size"] * 2.0**30 * memory.get("mem_util", 0.9)
    return Run(
        name=folder.name,
        model=meta["model"],
        engine=meta["engine_kwargs"],
        meta=meta,
        link=link,
        memory_bytes=memory_bytes,
        arrival_s=arrival - arrival[0],
        input_tokens=rows.input_toks.to_numpy(np.int64),
        output_tokens=rows.output_toks.to_numpy(np.int64),
        first_s=rows.first_token_ts.to_numpy() - arrival[0],
        last_s=rows.last_token_ts.to_numpy() - arrival[0],
    )


def read_prefixes(run: Run, given: Path | None) -> PrefixHashes | None:
    """Chained hashes of the whole blocks of each prompt; None: the prompts' tokens are not there."""
    folder = data_dir()
    stem = Path(run.meta.get("dataset_path", "")).stem
    path = given or (folder / "traces" / "llmservingsim" / f"{stem}.parquet" if folder and stem else None)
    if path is None or not path.exists():
        return None
    rows = pd.read_json(path, lines=True) if path.suffix == ".jsonl" else pd.read_parquet(path)
    rows = rows.sort_values("arrival_time_ns", kind="stable")
    if rows.input_toks.tolist() != run.input_tokens.tolist():
        sys.exit(f"{path}: its prompts are not those of {run.name}")
    names: dict[tuple[int, bytes], int] = {}
    hashes = []
    for tokens in rows.input_tok_ids:
        prompt = np.asarray(tokens, np.int64)
        chain, chained = -1, []
        for start in range(0, len(prompt) - BLOCK_SIZE + 1, BLOCK_SIZE):
            block = prompt[start : start + BLOCK_SIZE].tobytes()
            chain = names.setdefault((chain, block), len(names))
            chained.append(chain)
        hashes.append(chained)
    return PrefixHashes.of(hashes, BLOCK_SIZE)


def read_shape(model: str, given: Path | None) -> ModelShape:
    """From its config.json; among the public data the one of the longest common name."""
    if given is not None:
        return ModelShape.from_config(json.loads(given.read_text()), str(given))

    def plain(name: str) -> str:
        own = re.split("/|--", name.lower())[-1].removeprefix("meta-")
        return re.sub("[^a-z0-9]", "", own)

    found = [p for p in needed_data("models", "hf_configs").glob("*.json") if plain(model).startswith(plain(p.stem))]
    if not found:
        sys.exit(f"no config.json of {model} among the public data: name it with --config")
    path = max(found, key=lambda p: len(p.stem))
    return ModelShape.from_config(json.loads(path.read_text()), path.name)


def predict(run: Run, profile_folder: Path, shape: ModelShape, prefix: PrefixHashes | None) -> dict[str, Floats]:
    """TTFT, TPOT and E2E of every request, seconds."""
    tp, dp = run.engine["tensor_parallel_size"], run.engine["data_parallel_size"]
    ranks = dp if run.engine.get("enable_expert_parallel") else 1
    profile = read_profile(find_profile(profile_folder, run.model), shape, tp)
    for finding in profile.findings:
        print(f"  {finding}")
    try:
        device = accelerator(profile.meta["hardware"])
    except BadHardware:
        device = None
    pool = Pool(
        accelerator=device.name if device else profile.meta["hardware"],
        replicas=dp,
        tensor_parallel_size=tp,
        max_model_len=int((run.input_tokens + run.output_tokens).max()) + 1,
        max_num_seqs=run.engine["max_num_seqs"],
        max_num_batched_tokens=run.engine["max_num_batched_tokens"],
        block_size=run.meta.get("kv_cache", {}).get("block_size", BLOCK_SIZE),
        num_kv_blocks=NO_LIMIT_BLOCKS,
    )
    blocks = run.meta.get("kv_cache", {}).get("num_gpu_blocks")
    if blocks is None and run.memory_bytes is not None:
        free = run.memory_bytes - held_weights_bytes(shape, tp, ranks)
        blocks = int(free / (pool.block_size * kv_bytes_per_token(shape, tp, "bf16")))
        print("  KV blocks: what the weights leave of the memory; activations and the engine's buffers are not known")
    pool = pool.model_copy(update={"num_kv_blocks": blocks or NO_LIMIT_BLOCKS})
    step = engine_step(profile, shape, pool, link=run.link, ranks=ranks)
    for note in step.not_modeled:
        print(f"  not modeled: {note}")
    print(f"  {pool.num_kv_blocks} KV blocks of {pool.block_size} tokens" + ("" if blocks else ": not known, no limit"))
    if not run.engine.get("enable_prefix_caching", True):
        prefix = None
    elif prefix is None:
        print("  prefix cache: the prompts' tokens are not known, nothing is found in it")
    trace = Trace(run.arrival_s, run.input_tokens, run.output_tokens, prefix=prefix, source=run.name)
    result = simulate(trace, pool, step.tables, policy="vllm_v1")
    print(f"  {result.steps} steps, {result.prefix_hit_tokens} tokens found in the prefix cache, "
          f"{result.preemptions} preemptions")  # fmt: skip
    return latencies(run, result.times.first_token_s, result.times.end_s)


def held_weights_bytes(shape: ModelShape, tp: int, ranks: int) -> float:
    """Weights of one device: all of a rank of tensor parallelism, less the experts that other ranks hold."""
    experts = sum(
        2.0 * x.count * x.out_features * x.in_features for x in linears(shape, tp) if x.name.startswith("expert_")
    )
    return rank_weight_bytes(shape, tp, "bf16") - experts * (1 - 1 / ranks)


def latencies(run: Run, first_s: Floats, last_s: Floats) -> dict[str, Floats]:
    several = run.output_tokens > 1
    tpot = (last_s - first_s)[several] / (run.output_tokens[several] - 1)
    return {"TTFT": first_s - run.arrival_s, "TPOT": tpot, "E2E": last_s - run.arrival_s}


def compare(run: Run, predicted: dict[str, Floats]) -> list[Bar]:
    measured = latencies(run, run.first_s, run.last_s)
    statistics = {"mean": np.mean, "p5": lambda x: np.percentile(x, 5), "median": np.median}
    statistics |= {"p95": lambda x: np.percentile(x, 95)}
    errors = {}
    print(f"  {'':6}" + "".join(f"{name:>32}" for name in statistics))
    for metric in METRICS:
        cells = ""
        for name, of in statistics.items():
            truth, value = float(of(measured[metric])), float(of(predicted[metric]))
            errors[metric, name] = value / truth - 1
            cells += f"{1e3 * truth:12.1f} {1e3 * value:10.1f} ms {value / truth - 1:+6.1%}"
        print(f"  {metric:6}{cells}")
    bars = [Bar(f"{run.name}: {m} mean, relative error", abs(errors[m, "mean"]), 0.03, at_least=False) for m in METRICS]
    bars += [Bar(f"{run.name}: {m} p95, relative error", abs(errors[m, "p95"]), 0.05, at_least=False) for m in METRICS]
    return [*bars, Bar(f"{run.name}: TTFT median, relative error", abs(errors["TTFT", "median"]), 0.10, at_least=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", type=Path, help="folder of a run")
    parser.add_argument("--profile", type=Path, help="folder that holds its profile")
    parser.add_argument("--trace", type=Path, help="the run's dataset, with the tokens of its prompts")
    parser.add_argument("--config", type=Path, help="the model's config.json")
    parser.add_argument("--data", type=Path, help="folder of the public data sets")
    given = parser.parse_args()
    if (given.run is None) != (given.profile is None):
        parser.error("--run and --profile go together")
    runs = [given.run] if given.run else [needed_data("e2e", "llmservingsim", "RTXPRO6000", name) for name in RUNS]
    profiles = given.profile or needed_data("ops", "llmservingsim", "perf", "RTXPRO6000")
    bars = []
    for folder in runs:
        run = read_run(folder)
        engine = ", ".join(f"{name} {value}" for name, value in run.engine.items() if name != "model")
        print(f"{run.name}: {len(run.arrival_s)} requests, vLLM {run.meta['vllm_version']}, {engine}")
        shape = read_shape(run.model, given.config)
        bars += compare(run, predict(run, profiles, shape, read_prefixes(run, given.trace)))
    finish(bars, {}, None)


if __name__ == "__main__":
    main()
