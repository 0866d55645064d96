"""Accelerators and what joins them: facts from files, each figure with its source and date."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from typing import Literal, get_args

from ..runtime.spec import CPU, Deployment
from .facts import DATA_FOLDER, choice, day, number, positive, rows, same_name
from .facts import BadHardware as BadHardware
from .prices import Price as Price
from .prices import PriceBook as PriceBook

Topology = Literal["switch", "mesh", "torus", "bus", "network"]
SCALE_UP, SCALE_OUT, HOST = "scale-up", "scale-out", "host"

# By precision of the arithmetic, the figure that holds its peak, in units of 10^12 a second.
_PEAKS = {
    "fp32": "fp32_tflops",
    "bf16": "bf16_tflops",
    "fp8": "fp8_tflops",
    "int8": "int8_tops",
    "fp4": "fp4_tflops",
}
_NEEDED = ("memory_bytes", "memory_gbps")
_FIGURES = (*_PEAKS.values(), *_NEEDED, "power_w")


@dataclass(frozen=True)
class Link:
    """One level of what joins devices.

    name                  as its vendor calls it
    topology              of a mesh each pair has wires of its own; of the others a device may use all its wires for any
    devices               that the level joins at most; None: any number
    bytes_per_s           of one device in one direction, all its ports together
    latency_s             the least that a message was measured to take; None: no source
    in_network_reduction  the switch adds up, so that an all-reduce sends a message once instead of almost twice
    """

    name: str
    topology: Topology
    devices: int | None
    bytes_per_s: float
    latency_s: float | None
    in_network_reduction: bool
    source: str
    as_of: str

    def bytes_per_s_among(self, devices: int) -> float:
        """Of one device in one direction, in a group of so many."""
        if self.topology == "mesh" and self.devices is not None:
            return self.bytes_per_s * (devices - 1) / (self.devices - 1)
        return self.bytes_per_s


@dataclass(frozen=True)
class Accelerator:
    """One device, as its data sheet has it; dense rates, without structured sparsity.

    peak_flops_per_s   by precision of the arithmetic ("fp32", "bf16", "fp8", "int8", "fp4"); only what a source gives
    peak_bytes_per_s   device memory; 0 for "cpu", whose rates are measured into a profile and stand in no catalog
    memory_bytes       device memory, as the device reports it where that is known; for "cpu" of this machine
    power_w            at most, or None
    levels             what joins it to others of its kind, the nearest first; none for "cpu"
    host_link          to the memory of its server, or None
    source, as_of      of all figures together; as_of is the oldest date
    sources            figure, as in accelerators.csv -> (source, date)
    """

    name: str
    peak_flops_per_s: dict[str, float]
    peak_bytes_per_s: float
    memory_bytes: float
    power_w: float | None
    levels: tuple[Link, ...]
    host_link: Link | None
    source: str
    as_of: str
    sources: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.name, self.as_of))

    @property
    def link_bytes_per_s(self) -> float:
        """To the other devices of its domain, one direction; 0 for "cpu"."""
        return self.levels[0].bytes_per_s if self.levels else 0.0

    @property
    def link_latency_s(self) -> float:
        """The least of one message between two devices of a domain; 0 where no source gives one."""
        return (self.levels[0].latency_s or 0.0) if self.levels else 0.0

    def spans(self, devices: int) -> tuple[tuple[Link, int], ...]:
        """The levels that a group of so many devices spans, the nearest first, each with the group's size at it.

        A group fills a level before it goes over the next one: 16 of H100 are 8 by NVLink, 2 by the network.

        Raises: BadHardware: no level joins so many.

        >>> [(link.name, size) for link, size in accelerator("H100").spans(16)]
        [('NVLink 4', 8), ('InfiniBand 400 Gb/s', 2)]
        """
        left, found = devices, []
        for link in self.levels:
            if left == 1:
                break
            size = left if link.devices is None else min(left, link.devices)
            found.append((link, size))
            left = -(-left // size)
        if left > 1:
            most = 1
            for link in self.levels:
                most *= link.devices or 1
            todo = "make the group smaller, or add the link that joins them to links.csv with its source"
            raise BadHardware(f"{self.name}: devices of a group", devices, f"at most {most}", todo)
        return tuple(found)

    def flops_per_s(self, precision: str) -> float:
        """Peak rate of arithmetic in `precision`. Raises: BadHardware: no source gives one; none takes its place."""
        rate = self.peak_flops_per_s.get(precision)
        if rate is None:
            known = ", ".join(self.peak_flops_per_s) or "none: no source gives one for this accelerator"
            todo = "run `paretune profile`" if self.name == CPU else f"choose another precision, or of {_with_rates()}"
            raise BadHardware(f"{self.name}: peak rate", precision, known, todo)
        return rate


@cache
def accelerators() -> dict[str, Accelerator]:
    """The catalog by name, and "cpu": this machine."""
    figures: dict[str, dict[str, float]] = {}
    sources: dict[str, dict[str, tuple[str, str]]] = {}
    for where, row in rows(DATA_FOLDER / "accelerators.csv", ("accelerator", "figure", "value", "source", "as_of")):
        name, figure = row["accelerator"], choice(where, row, "figure", _FIGURES)
        if figure in figures.setdefault(name, {}):
            raise BadHardware(f"{where}: figure", figure, "each figure of an accelerator once", "correct the row")
        figures[name][figure] = positive(where, row, "value")
        sources.setdefault(name, {})[figure] = (row["source"], day(where, row))
    links = _links(tuple(figures))
    known = {CPU: _this_machine()}
    for name, values in figures.items():
        missing = [figure for figure in _NEEDED if figure not in values]
        if missing:
            raise BadHardware(f"accelerators.csv: {name}", f"no {missing[0]}", ", ".join(_NEEDED), "add the line")
        known[name] = Accelerator(
            name=name,
            peak_flops_per_s={p: 1e12 * values[figure] for p, figure in _PEAKS.items() if figure in values},
            peak_bytes_per_s=1e9 * values["memory_gbps"],
            memory_bytes=values["memory_bytes"],
            power_w=values.get("power_w"),
            levels=tuple(link for scope in (SCALE_UP, SCALE_OUT) for link in links[name].get(scope, ())),
            host_link=next(iter(links[name].get(HOST, ())), None),
            source="; ".join(dict.fromkeys(source for source, _ in sources[name].values())),
            as_of=min(date for _, date in sources[name].values()),
            sources=sources[name],
        )
    return known


def _links(names: tuple[str, ...]) -> dict[str, dict[str, list[Link]]]:
    """Accelerator -> scope -> links."""
    columns = ("accelerator", "link", "scope", "topology", "devices", "gbps", "latency_us", "in_network_reduction",
               "source", "as_of")  # fmt: skip
    found: dict[str, dict[str, list[Link]]] = {name: {} for name in names}
    topologies: tuple[Topology, ...] = get_args(Topology)
    for where, row in rows(DATA_FOLDER / "links.csv", columns):
        name = choice(where, row, "accelerator", names)
        scope = choice(where, row, "scope", (SCALE_UP, SCALE_OUT, HOST))
        topology = topologies[topologies.index(choice(where, row, "topology", topologies))]
        link = Link(
            name=row["link"],
            topology=topology,
            devices=int(positive(where, row, "devices")) if row["devices"] else None,
            bytes_per_s=1e9 * positive(where, row, "gbps"),
            latency_s=1e-6 * number(where, row, "latency_us") if row["latency_us"] else None,
            in_network_reduction=choice(where, row, "in_network_reduction", ("yes", "no")) == "yes",
            source=row["source"],
            as_of=day(where, row),
        )
        found[name].setdefault(scope, []).append(link)
    return found


def accelerator(name: str) -> Accelerator:
    """One accelerator; upper and lower case, blanks, hyphens and underscores do not matter. Raises: BadHardware."""
    for known in accelerators().values():
        if same_name(known.name, name):
            return known
    raise BadHardware("accelerator", name, f"{CPU}, {_with_rates()}", "correct the name")


def _with_rates() -> str:
    """The accelerators that step times can be estimated for."""
    return ", ".join(name for name, known in accelerators().items() if known.peak_flops_per_s)


def as_cataloged(deployment: Deployment) -> Deployment:
    """The deployment with each accelerator called as the catalog calls it. Raises: BadHardware: it knows none such."""
    pools = (pool.model_copy(update={"accelerator": accelerator(pool.accelerator).name}) for pool in deployment.pools)
    return deployment.model_copy(update={"pools": tuple(pools)})


def _this_machine() -> Accelerator:
    return Accelerator(
        name=CPU,
        peak_flops_per_s={},
        peak_bytes_per_s=0.0,
        memory_bytes=float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES"),
        power_w=None,
        levels=(),
        host_link=None,
        source="this machine; rates are measured into a profile",
        as_of=date.today().isoformat(),
    )
