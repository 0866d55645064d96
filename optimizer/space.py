"""What the search may propose: for each field of a pool the values to try, and the deployments these make."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError

from ..kernels.tiles import TileTable
from ..runtime.runnable import USUAL_WEIGHT_DTYPES
from ..runtime.safe_yaml import load_yaml
from ..runtime.spec import CPU, Deployment, Pool, parse_deployment
from ..traces.trace import Trace

Value = str | int | bool

# More points than these are not walked one by one: narrow the space, or search parts of it.
MAX_POINTS = 200_000

# What is searched where nobody says otherwise: powers of two around vLLM's defaults of 128 and 2,048 (research.md, 6).
MAX_NUM_SEQS = (4, 8, 16, 32, 64, 128, 256)
MAX_NUM_BATCHED_TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)

_FIELDS = tuple(name for name in Pool.model_fields if name not in ("role", "tiles", "cuda_graph_sizes"))
_SETTINGS = ("fields", "default", "max_devices")


class BadSpace(Exception):
    """A search space that will not be used: where, what was found, what is allowed, what to do."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str = "correct the space and run again") -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {str(self.found)[:80]}; allowed: {self.allowed}; {self.todo}"


@dataclass(frozen=True)
class TileKey:
    """What the best tiles depend on beside the shapes of a step."""

    accelerator: str
    tensor_parallel_size: int
    num_threads: int
    weight_dtype: str

    @classmethod
    def of(cls, pool: Pool) -> TileKey:
        return cls(pool.accelerator, pool.tensor_parallel_size, pool.num_threads, pool.weight_dtype)


@dataclass(frozen=True)
class Candidates:
    """The valid points of a space.

    deployments  in the order of the space's values, the last field fastest
    points       for each of them the index of its value in every field
    left_out     reason -> number of points that are no valid deployment
    """

    deployments: tuple[Deployment, ...]
    points: tuple[tuple[int, ...], ...]
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class SearchSpace:
    """For each field of a pool the values to try; what is not named stays as in `default`.

    fields       (name of a Pool field, values), in the order that was given
    default      what runs today, or the plain default: trial 0 of every study, whether it lies in the space or not
    max_devices  most devices that a deployment may hold, all replicas together (on CPU: cores); None = no limit
    tiles        tile tables found for a sharding and precision: an inner problem, not searched by the study

    Raises: BadSpace: an unknown field, no values, a value twice, or one that the field does not allow.
    """

    fields: tuple[tuple[str, tuple[Value, ...]], ...]
    default: Deployment = field(default_factory=Deployment)
    max_devices: int | None = None
    tiles: tuple[tuple[TileKey, TileTable], ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.fields]
        for name, values in self.fields:
            if name not in _FIELDS:
                raise BadSpace(f"space: {name}", "an unknown field", ", ".join(_FIELDS))
            if names.count(name) > 1:
                raise BadSpace(f"space: {name}", "twice", "each field once")
            if not values:
                raise BadSpace(f"space: {name}", "no values", "at least one value")
            if len({(type(value), value) for value in values}) < len(values):
                raise BadSpace(f"space: {name}", values, "each value once")
            for value in values:
                _check_value(name, value)
        if self.size > MAX_POINTS:
            raise BadSpace("space", f"{self.size:,} points", f"at most {MAX_POINTS:,}", "give fewer values")

    @property
    def size(self) -> int:
        """Points, valid or not."""
        size = 1
        for _, values in self.fields:
            size *= len(values)
        return size

    def candidates(self) -> Candidates:
        """Every point that is a valid deployment; the others are counted by reason."""
        tiles = dict(self.tiles)
        base = self.default.pool.model_dump(exclude={"tiles"})
        names = [name for name, _ in self.fields]
        deployments, points = [], []
        left_out: Counter[str] = Counter()
        for point in itertools.product(*(range(len(values)) for _, values in self.fields)):
            chosen = {name: values[i] for name, (_, values), i in zip(names, self.fields, point)}
            try:
                pool = Pool.model_validate({**base, **chosen})
            except ValidationError as error:
                left_out[_reason(error)] += 1
                continue
            if self.max_devices is not None and pool.devices_per_replica * pool.replicas > self.max_devices:
                left_out[f"holds more than {self.max_devices} devices"] += 1
                continue
            if self.tiles or self.default.pool.tiles:
                pool = pool.model_copy(update={"tiles": tiles.get(TileKey.of(pool), TileTable.default())})
            deployments.append(self.with_pool(pool))
            points.append(point)
        return Candidates(tuple(deployments), tuple(points), dict(sorted(left_out.items())))

    def with_pool(self, pool: Pool) -> Deployment:
        """The default deployment with another pool, without what belongs to a picked one."""
        update = {"pools": (pool,), "targets": (), "predicted": (), "provenance": None}
        return self.default.model_copy(update=update)

    def with_tiles(self, tiles: Mapping[TileKey, TileTable]) -> SearchSpace:
        return replace(self, tiles=tuple(sorted(tiles.items(), key=lambda item: repr(item[0]))))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in the YAML file; tiles only where there are some."""
        data: dict[str, Any] = {
            "fields": {name: list(values) for name, values in self.fields},
            "default": self.default.signature(),
            "max_devices": self.max_devices,
        }
        if self.tiles:
            data["tiles"] = [{**vars(key), "table": table.to_dict()} for key, table in self.tiles]
        return data

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, Any],
        name: str = "space",
        *,
        default: Deployment | None = None,
        max_devices: int | None = None,
    ) -> SearchSpace:
        """What `to_dict` made, or what a user wrote; `default` and `max_devices` hold where it says nothing of them.

        Raises: BadSpace, or BadSpec for its default.
        """
        for key in data:
            if key not in (*_SETTINGS, "tiles"):
                raise BadSpace(f"{name}: {key}", "an unknown setting", ", ".join(_SETTINGS))
        fields = data.get("fields")
        if not isinstance(fields, Mapping):
            raise BadSpace(f"{name}: fields", type(fields).__name__, "a mapping of Pool fields to lists of values")
        for key, values in fields.items():
            if not isinstance(values, list | tuple):
                raise BadSpace(f"{name}: fields.{key}", values, "a list of values")
        max_devices = data.get("max_devices", max_devices)
        if max_devices is not None and (type(max_devices) is not int or max_devices < 1):
            raise BadSpace(f"{name}: max_devices", max_devices, "an integer >= 1, or null")
        given = data.get("default") or {}
        if not isinstance(given, Mapping):
            raise BadSpace(f"{name}: default", given, "a deployment")
        if given or default is None:
            default = parse_deployment(dict(given), f"{name}: default")
        space = cls(tuple((key, tuple(values)) for key, values in fields.items()), default, max_devices)
        return space.with_tiles(
            {
                TileKey(**{key: row[key] for key in TileKey.__dataclass_fields__}): TileTable.from_dict(row["table"])
                for row in data.get("tiles", ())
            }
        )

    def digest(self) -> str:
        """Sixteen hex digits of everything that decides what is proposed."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_space(path: str | Path, *, default: Deployment | None = None, max_devices: int | None = None) -> SearchSpace:
    """Read a space from YAML; `default` and `max_devices` hold where it says nothing of them.

    Raises: BadYaml, BadSpace, BadSpec (exit code 2), OSError.
    """
    return SearchSpace.from_dict(load_yaml(path), Path(path).name, default=default, max_devices=max_devices)


def default_space(
    trace: Trace,
    default: Deployment,
    *,
    cores: int,
    prefix_caching: Iterable[bool] | None = None,
    has_experts: bool = False,
) -> SearchSpace:
    """What is worth trying for a trace where nobody says otherwise: ranks, threads and replicas by powers of two.

    Args:
        trace: with prefix hashes, prefix caching on and off are both tried; without, it would change nothing.
        default: what runs today; accelerator, model length and KV cache are its own.
        cores: of this machine (accelerator "cpu"); else most devices of a deployment.
        prefix_caching: settings to try whatever the trace holds.
        has_experts: the model is a mixture of experts, which ranks can divide in two ways: both are tried.
    """
    pool = default.pool
    powers = tuple(2**i for i in range(cores.bit_length()) if 2**i <= cores)
    on_cpu = pool.accelerator == CPU
    if prefix_caching is None:
        prefix_caching = (True, False) if trace.prefix is not None else (pool.enable_prefix_caching,)
    fields: list[tuple[str, tuple[Value, ...]]] = [
        ("tensor_parallel_size", powers),
        *([("enable_expert_parallel", (False, True))] if has_experts and cores > 1 else []),
        *([("num_threads", powers)] if on_cpu else []),
        ("replicas", powers if on_cpu else (1,)),
        ("weight_dtype", USUAL_WEIGHT_DTYPES if on_cpu else (pool.weight_dtype,)),
        ("max_num_seqs", MAX_NUM_SEQS),
        ("max_num_batched_tokens", tuple(sorted({*MAX_NUM_BATCHED_TOKENS, pool.max_model_len}))),
        ("enable_chunked_prefill", (True, False)),
        ("enable_prefix_caching", tuple(prefix_caching)),
    ]
    return SearchSpace(tuple(fields), default, cores)


def _check_value(name: str, value: object) -> None:
    annotation = Pool.model_fields[name].annotation
    if annotation in (int, bool) and type(value) is not annotation:
        assert annotation is not None
        raise BadSpace(f"space: {name}", value, f"values of type {annotation.__name__}")
    try:
        Pool.model_validate({name: value})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] != "value_error" or first["loc"]:
            raise BadSpace(f"space: {name}", value, first["msg"]) from None


def _reason(error: ValidationError) -> str:
    """What makes a combination impossible, without its numbers: the same words for the same rule."""
    first = error.errors(include_url=False)[0]
    return re.sub(r" \([^)]*\)", "", first["msg"].removeprefix("Value error, "))
