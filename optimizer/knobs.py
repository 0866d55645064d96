"""Which knob of a deployment would help: every change that speaks to a part of the time is simulated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from ..profiler.explain import Explained, token_gaps
from ..profiler.hardware import BadHardware
from ..profiler.profile import BadProfile
from ..profiler.simulator import simulate
from ..runtime.spec import BadSpec, Deployment, Pool
from ..traces.metrics import Metric, percentile
from ..traces.trace import BadTrace, Trace
from .capacity import StepModel

# a part of the time -> the knobs that speak to it, by the name of the change in _changes
_SPEAKS_TO = {
    "queue_seats": ("more seats", "one replica more", "half the weight bytes"),
    "queue_tokens": ("more tokens a step", "chunked prefill", "one replica more", "twice the ranks"),
    "queue_blocks": ("more KV blocks", "half the KV bytes", "fewer seats", "one replica more"),
    "queue_adapters": ("more adapter slots", "one replica more"),
    "queue_step": ("fewer tokens a step", "long prompts in pieces", "twice the ranks"),
    "prefill": ("twice the ranks", "half the weight bytes", "prefix caching", "more tokens a step"),
    "decode": ("half the weight bytes", "half the KV bytes", "twice the ranks"),
    "others_prefill": ("fewer tokens a step", "long prompts in pieces", "one replica more", "twice the ranks"),
    "others_decode": ("fewer seats", "half the weight bytes", "half the KV bytes", "one replica more"),
    "recompute": ("more KV blocks", "half the KV bytes", "fewer seats", "prefix caching"),
    "preempted": ("more KV blocks", "half the KV bytes", "fewer seats", "one replica more"),
    "draft": ("fewer proposals",),
    "adapters": ("more adapter slots", "one replica more"),
    "copies": ("more KV blocks", "half the KV bytes", "fewer seats"),
    "pipeline": ("one stage",),
}

_SMALLER_WEIGHTS = {"fp32": "bf16", "bf16": "int8", "fp16": "int8", "fp8": "int4", "int8": "int4"}
_SMALLER_WEIGHTS_ON_DEVICES = {**_SMALLER_WEIGHTS, "bf16": "fp8", "fp16": "fp8"}
_SMALLER_KV = {"fp32": "bf16", "bf16": "fp8"}
_CHANGES_ANSWERS = ("weight_dtype", "kv_cache_dtype")


@dataclass(frozen=True)
class Effect:
    """What a change of the spec would do.

    change   field -> value
    relieves the part that it was tried for
    before, after  the percentile of the metric, seconds; NaN where it could not be predicted
    devices  more of them than now
    note     why it could not be predicted, or what else changes; empty where nothing does
    """

    change: dict[str, object]
    relieves: str
    before: float
    after: float
    devices: int
    note: str

    @property
    def gain(self) -> float:
        """Share of the metric that it takes away; negative where it adds to it."""
        return (self.before - self.after) / self.before if self.before > 0 else math.nan

    @property
    def words(self) -> str:
        return ", ".join(f"{field}: {value}" for field, value in self.change.items())


def relieving(
    explained: Explained,
    trace: Trace,
    deployment: Deployment,
    step_model: StepModel,
    *,
    k: int = 30,
    rate: float = 1.0,
    parts: int = 2,
) -> tuple[Effect, ...]:
    """What relieves the largest parts of a metric, each change simulated on the whole trace, the best first.

    Changes that cannot run or cannot be predicted (a configuration that was not measured, memory that does not hold
    it) stand last with the reason.

    Args:
        parts: how many of the largest parts are to be relieved.
    """
    metric = Metric.parse(explained.metric)
    wanted: dict[str, str] = {}
    for part in explained.parts[:parts]:
        for name in _SPEAKS_TO.get(part.name, ()):
            wanted.setdefault(name, part.name)
    changes = _changes(deployment.pool)
    found = []
    for name, part_name in wanted.items():
        change = changes.get(name)
        if change is not None:
            found.append(_effect(change, part_name, explained, metric, trace, deployment, step_model, k, rate))
    return tuple(sorted(found, key=lambda effect: (math.isnan(effect.after), effect.after)))


def _effect(
    change: dict[str, object],
    relieves: str,
    explained: Explained,
    metric: Metric,
    trace: Trace,
    deployment: Deployment,
    step_model: StepModel,
    k: int,
    rate: float,
) -> Effect:
    before, pool = explained.value, deployment.pool
    note = "answers change: measure their quality" if set(change) & set(_CHANGES_ANSWERS) else ""
    try:
        changed = deployment.with_pool(**change).pool
        devices = changed.devices_per_replica * changed.replicas - pool.devices_per_replica * pool.replicas
        tables = step_model(changed).tables
        if metric.name == "itl":
            gaps = token_gaps(trace, changed, tables, policy=deployment.scheduler_policy, k=k, rate=rate)
            return Effect(change, relieves, before, percentile(gaps, explained.percentile), devices, note)
        result = simulate(trace, changed, tables, policy=deployment.scheduler_policy, k=k, rate=rate)
    except (BadProfile, BadHardware, BadSpec, BadTrace, ValidationError) as error:
        return Effect(change, relieves, before, math.nan, 0, f"not predicted: {_first_line(error)}")
    after = percentile(result.times.values(metric), explained.percentile)
    return Effect(change, relieves, before, after, devices, note)


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return str(error.errors(include_url=False)[0]["msg"])
    return str(error).splitlines()[0]


def _changes(pool: Pool) -> dict[str, dict[str, object]]:
    """The changes that are tried, by name; those that this pool has no room for are left out."""
    weights = _SMALLER_WEIGHTS if pool.accelerator == "cpu" else _SMALLER_WEIGHTS_ON_DEVICES
    least_tokens = pool.max_num_seqs * (1 + pool.num_speculative_tokens)
    found: dict[str, dict[str, object]] = {
        "more seats": {"max_num_seqs": 2 * pool.max_num_seqs},
        "more tokens a step": {"max_num_batched_tokens": 2 * pool.max_num_batched_tokens},
        "more KV blocks": {"num_kv_blocks": 2 * pool.num_kv_blocks},
        "one replica more": {"replicas": pool.replicas + 1},
        "twice the ranks": {"tensor_parallel_size": 2 * pool.tensor_parallel_size},
    }
    if 2 * pool.max_num_seqs > pool.max_num_batched_tokens:
        found["more seats"]["max_num_batched_tokens"] = 2 * pool.max_num_batched_tokens
    if pool.max_num_seqs > 1:
        found["fewer seats"] = {"max_num_seqs": pool.max_num_seqs // 2}
    if pool.enable_chunked_prefill and pool.max_num_batched_tokens // 2 >= least_tokens:
        found["fewer tokens a step"] = {"max_num_batched_tokens": pool.max_num_batched_tokens // 2}
    if pool.enable_chunked_prefill:
        now = pool.long_prefill_token_threshold or pool.max_num_batched_tokens
        found["long prompts in pieces"] = {"long_prefill_token_threshold": max(1, now // 4)}
    else:
        found["chunked prefill"] = {"enable_chunked_prefill": True}
    if not pool.enable_prefix_caching:
        found["prefix caching"] = {"enable_prefix_caching": True}
    if pool.weight_dtype in weights:
        found["half the weight bytes"] = {"weight_dtype": weights[pool.weight_dtype]}
    if pool.kv_cache_dtype in _SMALLER_KV:
        # the same memory holds twice the blocks
        found["half the KV bytes"] = {
            "kv_cache_dtype": _SMALLER_KV[pool.kv_cache_dtype],
            "num_kv_blocks": 2 * pool.num_kv_blocks,
        }
    if pool.max_loras:
        found["more adapter slots"] = {"max_loras": 2 * pool.max_loras}
    if pool.num_speculative_tokens > 1:
        found["fewer proposals"] = {"num_speculative_tokens": pool.num_speculative_tokens // 2}
    if pool.pipeline_parallel_size > 1:
        found["one stage"] = {"pipeline_parallel_size": 1}
    return found


def best(effects: Sequence[Effect]) -> Effect | None:
    """The change that takes the most away without more devices, else with them; None where nothing helps."""
    for group in ([e for e in effects if e.devices <= 0], list(effects)):
        helping = [effect for effect in group if effect.gain > 0]
        if helping:
            return max(helping, key=lambda effect: effect.gain)
    return None
