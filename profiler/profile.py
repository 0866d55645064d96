"""Measured times of this runtime on one machine, as a versioned file: whole or refused.

What is in it says where it comes from: processor, memory, versions, date, command; every point has its median, spread
and count. The file is JSON in one canonical form with a digest, and is taken only if it is byte for byte what we wrote.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..runtime.model_shape import ModelShape
from ..runtime.parallel import usable_cores
from ..runtime.pool import Tiles
from ..runtime.spec import Pool
from ..traces.whole_file import write_whole

SCHEMA_VERSION = 2
_FLAGS_THAT_MATTER = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "amx_tile",
    "asimd",
    "sve",
    "bf16",
)


class BadProfile(Exception):
    """A profile that will not be used: where, what was found, what is allowed, what to do."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str) -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {str(self.found)[:100]}; allowed: {self.allowed}; {self.todo}"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Key(NamedTuple):
    """What step times depend on and a profile has to have measured; replicas run side by side on the one machine."""

    tensor_parallel_size: int
    num_threads: int
    replicas: int
    weight_dtype: str
    kv_cache_dtype: str
    pipeline_parallel_size: int = 1
    context_parallel_size: int = 1
    enable_expert_parallel: bool = False

    def __str__(self) -> str:
        replicas = "" if self.replicas == 1 else f"{self.replicas} x "
        stages = "" if self.pipeline_parallel_size == 1 else f"PP {self.pipeline_parallel_size} x "
        parts = "" if self.context_parallel_size == 1 else f"CP {self.context_parallel_size} x "
        dtypes = f"{self.weight_dtype}/{self.kv_cache_dtype}"
        shards = f"{'TP + EP' if self.enable_expert_parallel else 'TP'} {self.tensor_parallel_size}"
        return f"{replicas}{stages}{parts}{shards} x {self.num_threads} threads {dtypes}"

    @property
    def cores(self) -> int:
        """That it computes on, all replicas together."""
        return self.ranks * self.num_threads * self.replicas

    @property
    def ranks(self) -> int:
        """Of one replica."""
        return self.pipeline_parallel_size * self.context_parallel_size * self.tensor_parallel_size

    @property
    def served_as(self) -> tuple[int, int, str]:
        """Cores, ranks of a replica, and weight dtype: of all three at most one live server is measured."""
        return self.cores, self.ranks, self.weight_dtype


class Peaks(_Part):
    """The best that so many threads have shown.

    flops_per_s  by precision ("fp32", "bf16", "int8"), over all linear layers measured
    read_bytes   (size, bytes/s) of reading an array of that size again and again: from cache, or from memory
    """

    num_threads: int = Field(ge=1)
    flops_per_s: dict[str, float]
    read_bytes: tuple[tuple[int, float], ...]

    def bytes_per_s(self, size: float) -> float:
        """No data of `size` bytes come faster: the best of the largest array that is no larger, and of all above."""
        below = max((measured for measured, _ in self.read_bytes if measured <= size), default=0)
        return max(rate for measured, rate in self.read_bytes if measured >= below)


class Machine(_Part):
    """Where it was measured. cpu: model name with family and model number; flags: all of the CPU's, sorted."""

    cpu: str
    flags: tuple[str, ...]
    cores: int
    memory_bytes: int
    instructions: str = Field(description="instruction set of the compiled operators, or 'torch' where no compiler was")

    def fits(self, other: Machine) -> bool:
        """Whether times of one hold on the other: processor, the instruction sets that matter, and cores."""
        mine, its = (set(m.flags) & set(_FLAGS_THAT_MATTER) for m in (self, other))
        return (self.cpu, mine, self.cores) == (other.cpu, its, other.cores)


class StepPoint(_Part):
    """Whole steps of one composition (see operators.Composition), as the engine ran them; seconds with a core."""

    num_tokens: int = Field(ge=1)
    num_rows: int = Field(ge=1)
    num_samples: int = Field(ge=0)
    decode_context: float = Field(ge=0)
    prefill_pairs: float = Field(ge=0)
    median_s: float = Field(gt=0)
    iqr_s: float = Field(ge=0)
    count: int = Field(ge=1)


class OperatorPoint(_Part):
    """One operator by itself, one call; seconds.

    name      ModelShape.matrices' name for a linear layer ("qkv", ...), else the operator's
    rows      M of a linear layer; query tokens of an attention
    default   its tile is what the engine takes where a table names none
    backend, parameters  of its tile
    """

    operator: str
    name: str
    precision: str
    tensor_parallel_size: int
    rows: int
    context: int = 0
    default: bool = False
    backend: str
    parameters: dict[str, int]
    median_s: float = Field(gt=0)
    iqr_s: float = Field(ge=0)
    count: int = Field(ge=1)


class Configuration(_Part):
    """What was measured of one key. tiles: of the whole steps; operators beside them."""

    tensor_parallel_size: int = Field(ge=1)
    num_threads: int = Field(ge=1)
    replicas: int = Field(ge=1)
    weight_dtype: str
    kv_cache_dtype: str
    pipeline_parallel_size: int = Field(1, ge=1)
    context_parallel_size: int = Field(1, ge=1)
    enable_expert_parallel: bool = False
    tiles: Tiles
    steps: tuple[StepPoint, ...]
    disturbed: float = Field(
        0.0, ge=0, le=1, description="share of steps during which others took the core; CPU time counts there"
    )
    operators: tuple[OperatorPoint, ...] = ()

    @property
    def key(self) -> Key:
        return Key(*(getattr(self, name) for name in Key._fields))


class LivePoint(_Part):
    """Steps of one composition, or nearly, that a live server computed.

    mean_s   seconds of the step
    pause_s  mean seconds from its end to the next step, where there was work; None: not known
    """

    num_tokens: int = Field(ge=1)
    num_rows: int = Field(ge=1)
    num_samples: int = Field(ge=0)
    decode_context: float = Field(ge=0)
    prefill_pairs: float = Field(ge=0)
    mean_s: float = Field(gt=0)
    pause_s: float | None = Field(None, ge=0)
    count: int = Field(ge=1)


class Serving(_Part):
    """What serving over HTTP adds to the steps, from one replay (calibration.calibrate_serving).

    A profile has one at most for each number of cores, of ranks, and each weight dtype (Key.served_as).

    cores               that the replicas computed on; what is left of the machine is the server's and the client's
    ranks               of a replica: processes that wait for each other, so that all lose what one of them does
    points              what steps took there that followed others: beside what the configuration's own steps took it
                        tells how much the server and its clients slow them down
    spread              half of the 90 % range, over blocks of time, of step time to modeled step time; relative
    between_steps_s     from the end of a step to the start of the next while there is work, median
    after_idle_s        what a prompt's step takes longer that found the server idle for IDLE_S (step_time.py), median
    to_scheduler_s      from the scheduled arrival until the scheduler sees the request, median
    to_client_s         from the end of a token's step until the client has the token, median
    steps, requests     how many it was taken from
    measured_on         the configuration that served, in words; its weights are in them (Profile.served_by)
    """

    cores: int = Field(ge=1)
    ranks: int = Field(ge=1)
    points: tuple[LivePoint, ...] = Field(min_length=1)
    spread: float = Field(ge=0)
    between_steps_s: float = Field(ge=0)
    after_idle_s: float = Field(ge=0)
    to_scheduler_s: float = Field(ge=0)
    to_client_s: float = Field(ge=0)
    steps: int
    requests: int
    measured_on: str


class Profile(_Part):
    """Everything measured of one model on one machine."""

    schema_version: int = SCHEMA_VERSION
    created_at: str
    command: str
    machine: Machine
    versions: dict[str, str]
    model: str
    shape: dict[str, Any]
    peaks: tuple[Peaks, ...]
    configurations: tuple[Configuration, ...]
    busy_before: float = Field(0.0, description="share of the cores that others used before measuring began")
    serving: tuple[Serving, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.machine.cpu}, {self.created_at[:10]}"

    def digest(self) -> str:
        """Sixteen hex digits that name the content."""
        return _digest(self.model_dump(mode="json"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all. Raises: OSError."""
        plain = self.model_dump(mode="json")
        write_whole(path, _text({"digest": _digest(plain), **plain}))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, any_machine: bool = False) -> Profile:
        """Read a file that `save` wrote.

        Args:
            any_machine: take a profile of another processor; by default it is refused, because its times say nothing
                here.
        Raises: BadProfile: no such file, another version, changed content, another machine; OSError.
        """
        name = Path(path).name
        again = "measure again: `paretune profile run`"
        if not Path(path).exists():
            raise BadProfile(os.fspath(path), "no such file", "a profile of this machine", "`paretune profile run`")
        raw = Path(path).read_bytes()
        try:
            plain = json.loads(raw)
            version, digest = plain["schema_version"], plain.pop("digest")
        except (ValueError, KeyError, TypeError, RecursionError):
            raise BadProfile(
                name, "no JSON with a schema_version and a digest", "a profile as paretune wrote it", again
            ) from None
        if version != SCHEMA_VERSION:
            raise BadProfile(f"{name}: schema_version", version, str(SCHEMA_VERSION), again)
        try:
            profile = cls.model_validate(plain)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = f"{name}: {'.'.join(map(str, first['loc']))}"
            raise BadProfile(where, first["msg"], "a profile as paretune wrote it", again) from None
        if digest != _digest(plain) or _text({"digest": digest, **plain}).encode() != raw:
            raise BadProfile(name, "changed content", "a profile as paretune wrote it, byte for byte", again)
        if not any_machine:
            profile.check_machine()
        return profile

    def check_machine(self) -> None:
        """Raises: BadProfile: it was measured on another processor than this one."""
        here = this_machine(self.machine.instructions)
        if not self.machine.fits(here):
            found = f"{self.machine.cpu}, {self.machine.cores} cores"
            raise BadProfile(
                "profile: machine", found, f"{here.cpu}, {here.cores} cores", "measure here, or ask for any machine"
            )

    def check_shape(self, shape: ModelShape) -> None:
        """Raises: BadProfile: it was measured with a model of another shape."""
        mine = shape_data(shape)
        if self.shape != mine:
            fields = sorted(mine.keys() | self.shape.keys())
            differing = next(field for field in fields if self.shape.get(field) != mine.get(field))
            raise BadProfile(
                f"profile of {self.model}: {differing}", self.shape.get(differing), str(mine.get(differing)),
                "measure this model: `paretune profile`",
            )  # fmt: skip

    def configuration(self, pool: Pool) -> Configuration:
        """The measured configuration that a pool runs as on this machine.

        So many of its replicas as fit on the cores share the machine; further ones stand on further machines like it.
        Where so many side by side were not measured the next larger number that was is taken: more of them disturb each
        other more, so it errs on the slow side.
        Raises: BadProfile: neither was measured.
        """
        beside = self.replicas_beside(pool)
        wanted = Key(*(getattr(pool, name) for name in Key._fields))._replace(replicas=beside)
        same = [each for each in self.configurations if each.key._replace(replicas=beside) == wanted]
        enough = [each for each in same if each.replicas >= beside]
        if enough:
            return min(enough, key=lambda each: each.replicas)
        known = "; ".join(str(configuration.key) for configuration in self.configurations)
        raise BadProfile("profile", f"no {wanted}", known, "measure it: `paretune profile`")

    def served_by(self, serving: Serving) -> Key:
        """The configuration that served. Raises: BadProfile: the profile lacks it."""
        for each in self.configurations:
            if str(each.key) == serving.measured_on:
                return each.key
        known = "; ".join(str(each.key) for each in self.configurations)
        raise BadProfile(
            "profile: serving.measured_on", serving.measured_on, known, "measure again: `paretune profile`"
        )

    def replicas_beside(self, pool: Pool) -> int:
        """How many replicas of a pool share one machine like the measured one."""
        return max(1, min(pool.replicas, self.machine.cores // pool.devices_per_replica))

    def peaks_of(self, num_threads: int) -> Peaks:
        """Raises: BadProfile: not measured with so many threads."""
        for peaks in self.peaks:
            if peaks.num_threads == num_threads:
                return peaks
        known = ", ".join(str(p.num_threads) for p in self.peaks)
        raise BadProfile("profile: peaks", f"none of {num_threads} threads", known, "measure it: `paretune profile`")


# Fields that models which the bundled engine serves, and so measures, have at their defaults
_NEVER_SERVED = (
    "latent", "attention", "linear_attention", "quantization", "norms_per_layer", "norm_bias", "qk_norm_of_all_heads",
    "sinks", "layer_scalar", "head_bias",
)  # fmt: skip
_NEVER_SERVED_EXPERTS = ("shared_gated", "router_bias", "expert_bias", "router_scales")


def shape_data(shape: ModelShape) -> dict[str, Any]:
    """The sizes of a model that its step times depend on, as plain JSON data."""
    skipped = ("eos_token_ids", "rms_norm_eps", "rope", "experts", *_NEVER_SERVED)
    data = {name: value for name, value in dataclasses.asdict(shape).items() if name not in skipped}
    if shape.experts is not None:  # absent otherwise: profiles of dense models are older than experts
        experts = dataclasses.asdict(shape.experts)
        data["experts"] = {name: value for name, value in experts.items() if name not in _NEVER_SERVED_EXPERTS}
        data["experts"]["layers"] = list(shape.experts.layers)
    return data


def this_machine(instructions: str) -> Machine:
    """This machine as the operating system describes it."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().split("\n\n")[0].splitlines():
            field, _, value = line.partition(":")
            fields[field.strip()] = value.strip()
    model = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields:
        model += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    return Machine(
        cpu=model,
        flags=tuple(sorted((fields.get("flags") or fields.get("Features") or "").split())),
        cores=usable_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        instructions=instructions,
    )


def versions() -> dict[str, str]:
    """What ran: Python and the libraries that step times depend on."""
    packages = ("paretune", "torch", "numba", "numpy")
    return {"python": platform.python_version()} | {package: metadata.version(package) for package in packages}


def now() -> str:
    """ISO 8601, UTC, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _text(plain: dict[str, Any]) -> str:
    return json.dumps(plain, sort_keys=True, indent=1, allow_nan=False) + "\n"


def _digest(plain: dict[str, Any]) -> str:
    return hashlib.sha256(_text(plain).encode()).hexdigest()[:16]
