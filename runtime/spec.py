"""The deployment spec: what the search proposes, the simulator runs, the engine starts and the exporters translate.

One type for all of them, `Deployment`, so that nothing is translated on the way and nothing is lost. A candidate of the
search is a Deployment without provenance; picking a point adds where it came from, the targets and what was predicted.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from ..traces.metrics import Target
from ..traces.whole_file import write_whole
from .phases import KvTransfer, by_role, check_phases, is_disaggregated
from .pool import CPU, Part, Pool
from .safe_yaml import load_yaml

__all__ = [
    "CPU",
    "SCHEMA_VERSION",
    "SMALL_MODEL",
    "SMALL_TERNARY_MODEL",
    "Adapter",
    "BadSpec",
    "Deployment",
    "KvTransfer",
    "Pool",
    "Prediction",
    "Provenance",
    "load_deployment",
    "parse_deployment",
    "save_deployment",
]

SCHEMA_VERSION = 1
SMALL_MODEL = "paretune/small"
SMALL_TERNARY_MODEL = "paretune/small-ternary"
_VLLM_ADMISSIONS = ("on_demand", "first_chunk", "watermark")


class BadSpec(Exception):
    """A deployment spec that will not be used: where (file and field), what was found, what is allowed, what to do."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str = "correct the spec and run again") -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {str(self.found)[:80]}; allowed: {self.allowed}; {self.todo}"


class Adapter(Part):
    """A LoRA adapter of the model, in the format of PEFT."""

    name: str = Field(min_length=1, max_length=200, description="what clients ask for as `model`")
    path: str = Field(min_length=1, description="folder with adapter_config.json and adapter_model.safetensors")


class Prediction(Part):
    """One predicted number and the interval in which the measured one should lie, where it has one."""

    metric: str = Field(
        description="ttft, ttf30, tpot, e2e (seconds), usd_per_hour, usd_per_million_tokens, requests_per_s, ..."
    )
    percentile: float | None = Field(None, gt=0, lt=100, description="null where the metric is one number for the run")
    value: float
    low: float | None = Field(
        None, description="lower end of its interval; null without one, as for what devices cost, which is known"
    )
    high: float | None = Field(None, description="upper end of its interval; null without one")
    confidence: float | None = Field(
        0.9, gt=0, lt=1, description="share of measured values that the interval should hold; null without one"
    )


class Provenance(Part):
    """Where a picked deployment came from: enough to reproduce the choice and to notice when it no longer holds."""

    paretune_version: str
    created_at: str = Field(description="ISO 8601, UTC")
    trace_source: str
    trace_digest: str
    trace_fingerprint: dict[str, Any] = Field(description="what `retune` compares tonight's log with")
    profile: str = Field(description="the profile's name, or the accelerator's data sheet")
    profile_digest: str
    measured: bool = Field(description="false: step times are roofline bounds of a data sheet, not measured")
    prices: str = Field(description="source of the price book")
    prices_as_of: str
    study: str
    seed: int
    rate: float = Field(1.0, gt=0, description="multiple of the recorded rate that the predicted latencies speak of")


class Deployment(Part):
    """A deployment of one model: what to run, on what, with which limits.

    Digest and equality of a candidate look at what runs (`engine` to `adapters`), not at where it came from.
    """

    schema_version: Literal[1] = 1
    model: str = Field(
        SMALL_MODEL, min_length=1, description="model directory; 'paretune/small' ships with the package"
    )
    engine: Literal["paretune", "vllm", "sglang", "trtllm"] = Field("paretune", description="the server that runs it")
    scheduler_policy: Literal["paretune", "vllm_v1"] = Field(
        "paretune", description="how steps are composed: our way, or as vLLM's V1 scheduler decides"
    )
    pools: tuple[Pool, ...] = Field((Pool(),), min_length=1, max_length=16)
    kv_transfer: KvTransfer | None = Field(
        None, description="how KV goes from the prefill to the decode pool; null: its defaults; mixed pools have none"
    )
    adapters: tuple[Adapter, ...] = Field((), description="LoRA adapters of the model, loaded at the start")
    targets: tuple[str, ...] = Field((), description="what must hold, such as ttf30:p95<=600ms")
    predicted: tuple[Prediction, ...] = ()
    provenance: Provenance | None = None

    @field_validator("targets")
    @classmethod
    def _canonical_targets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(Target.parse(text)) for text in value)

    @model_validator(mode="after")
    def _vllm_can(self) -> Self:
        for pool in self.pools if self.scheduler_policy == "vllm_v1" else ():
            for name, allowed in (
                ("preemption", ("recompute",)),
                ("admission", _VLLM_ADMISSIONS),
                ("host_kv_blocks", (0,)),
                ("speculation", ("none", "ngram")),  # it reserves blocks for a draft model's next proposals
            ):
                found = getattr(pool, name)
                if found not in allowed:
                    raise ValueError(f"{name} ({found}) must be one of {allowed} with scheduler_policy 'vllm_v1'")
        return self

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        check_phases(self.pools)
        if self.kv_transfer is not None and not self.is_disaggregated:
            raise ValueError("kv_transfer is for a prefill and a decode pool, and all pools are mixed")
        return self

    @model_validator(mode="after")
    def _adapters_fit(self) -> Self:
        names = [adapter.name for adapter in self.adapters]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"adapters: the name {twice[0]!r} stands there more than once")
        if self.model in names:
            raise ValueError(f"adapters: {self.model!r} is the name of the model itself")
        if names and any(pool.max_loras == 0 for pool in self.pools):
            raise ValueError(f"adapters names {len(names)}, and max_loras is 0: set it to the most in one step")
        return self

    @property
    def pool(self) -> Pool:
        """The only pool. Raises: BadSpec: the deployment has several (disaggregated)."""
        if self.is_disaggregated:
            allowed = "one of role 'mixed'; `simulate`, `explain` and `export` also take a prefill and a decode pool"
            raise BadSpec("pools", f"{len(self.pools)} pools: {self._roles}", allowed)
        if len(self.pools) != 1:
            raise BadSpec("pools", f"{len(self.pools)} pools", "one pool of role 'mixed'")
        return self.pools[0]

    @property
    def _roles(self) -> str:
        return ", ".join(pool.role for pool in self.pools)

    @property
    def is_disaggregated(self) -> bool:
        """Whether a prefill and a decode pool share the work."""
        return is_disaggregated(self.pools)

    @property
    def phases(self) -> tuple[Pool, Pool]:
        """The prefill and the decode pool. Raises: BadSpec: pools are mixed."""
        if not self.is_disaggregated:
            raise BadSpec("pools", f"{len(self.pools)} pools: {self._roles}", "one of role 'prefill', one of 'decode'")
        return by_role(self.pools)

    def signature(self) -> dict[str, Any]:
        """What runs, as plain data; two candidates with equal signatures behave alike."""
        found = self.model_dump(mode="json", include={"model", "engine", "scheduler_policy", "pools", "adapters"})
        if self.is_disaggregated:
            found["kv_transfer"] = (self.kv_transfer or KvTransfer()).model_dump(mode="json")
        return found

    def digest(self) -> str:
        """Sixteen hex digits that name what runs; stable over processes and machines."""
        text = json.dumps(self.signature(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def with_pool(self, **changes: Any) -> Deployment:
        """This deployment with fields of its only pool changed, validated again."""
        pool = Pool.model_validate({**self.pool.model_dump(), **changes})
        return self.model_copy(update={"pools": (pool,), "predicted": (), "provenance": None})

    def with_replicas(self, prefill: int, decode: int) -> Deployment:
        """This disaggregated deployment with so many replicas in either pool."""
        counts = {"prefill": prefill, "decode": decode}
        pools = tuple(pool.model_copy(update={"replicas": counts[pool.role]}) for pool in self.pools)
        return self.model_copy(update={"pools": pools, "predicted": (), "provenance": None})

    def prediction(self, metric: str, percentile: float | None) -> Prediction | None:
        """What was predicted for a metric, or None."""
        return next((p for p in self.predicted if p.metric == metric and p.percentile == percentile), None)


def _first_error(name: str, error: ValidationError) -> BadSpec:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "the spec"
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return BadSpec(f"{name}: {field}", f"an unknown field{more}", "the fields in docs/spec.md")
    if first["type"] == "value_error":
        found = first["msg"].removeprefix("Value error, ") + more
        return BadSpec(f"{name}: {field}", found, "a combination that can run")
    return BadSpec(f"{name}: {field}", f"{first['input']!r}{more}", first["msg"])


def parse_deployment(data: dict[str, Any], name: str = "spec") -> Deployment:
    """A Deployment from plain data. Raises: BadSpec, naming the field."""
    version = data.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        todo = "update paretune" if isinstance(version, int) and version > SCHEMA_VERSION else "write the spec anew"
        raise BadSpec(f"{name}: schema_version", version, str(SCHEMA_VERSION), todo)
    try:
        return Deployment.model_validate(data)
    except ValidationError as error:
        raise _first_error(name, error) from None


def load_deployment(path: str | Path) -> Deployment:
    """Read a spec from a YAML file. Raises: BadYaml or BadSpec (exit code 2), OSError."""
    return parse_deployment(load_yaml(path), Path(path).name)


def save_deployment(deployment: Deployment, path: str | Path) -> None:
    """Write a spec as YAML, whole or not at all."""
    data = deployment.model_dump(mode="json", exclude_defaults=False)
    write_whole(path, yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110))
