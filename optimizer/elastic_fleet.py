"""A fleet that an autoscaler changes, beside a fixed one of its largest size: costs, and how long answers take."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..profiler.autoscale import Autoscaler, replica_hours, replicas_over_time
from ..profiler.hardware import BadHardware
from ..profiler.operators import Sharding
from ..profiler.prices import Price
from ..profiler.rank_memory import weight_bytes
from ..profiler.roofline import storage_of
from ..profiler.simulator import SimulationResult
from ..runtime.model_shape import ModelShape
from ..runtime.spec import Pool
from ..traces.metrics import Summary, summarize
from ..traces.run_protocol import RunProtocol
from .sources import Sources

# What a run of an elastic fleet leaves out.
ELASTIC_LEAVES_OUT = (
    "autoscaling: the metric is read at the instant of a sync, without the delays of scraping and averaging; devices "
    "are there when they are asked for; who leaves finishes its requests, however long a grace period would be; a new "
    "replica's prefix cache is empty; step times are those of the spec's own number of replicas",
)


def inferred_cold_start_s(shape: ModelShape, pool: Pool, bytes_per_s: float, start_s: float = 0.0) -> float:
    """Seconds until a new replica of a pool takes requests: inferred, not measured.

    The bytes are those of the weights as the pool stores them (`weight_dtype`), each once: not those of a checkpoint in
    another precision, nor of what several ranks hold twice.

    Args:
        bytes_per_s: at which a replica, all its ranks together, loads the weights.
        start_s: what it takes besides: container, process, captured graphs.
    """
    whole = weight_bytes(shape, Sharding(), storage_of(shape, pool.weight_dtype))
    return whole / bytes_per_s + start_s


@dataclass(frozen=True)
class FleetRun:
    """One of the two runs. usd: None where the book has no price for the device."""

    replica_hours: float
    most_replicas: int
    usd: float | None
    summary: Summary


@dataclass(frozen=True)
class ElasticComparison:
    """An elastic fleet beside the fixed one of the most replicas that it may have, from first request to last token.

    over_time     (second, replicas held, replicas that take requests) at every change
    price         of a device; None: the book has none, and why stands in unpriced
    cold_start_s  of a replica, and whether it was inferred
    """

    elastic: FleetRun
    fixed: FleetRun
    over_time: tuple[tuple[float, int, int], ...]
    price: Price | None
    unpriced: str
    cold_start_s: float
    cold_start_inferred: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        runs = {
            name: {**asdict(run), "summary": run.summary.to_dict()}
            for name, run in (("elastic", self.elastic), ("fixed", self.fixed))
        }
        about = {"cold_start_s": self.cold_start_s, "cold_start_inferred": self.cold_start_inferred}
        price = None if self.price is None else asdict(self.price)
        return {**runs, **about, "over_time": self.over_time, "price": price, "unpriced": self.unpriced}


def compared(
    elastic: SimulationResult,
    fixed: SimulationResult,
    pool: Pool,
    sources: Sources,
    *,
    autoscaler: Autoscaler,
    cold_start_inferred: bool,
    protocol: RunProtocol,
) -> ElasticComparison:
    """Both runs of one log.

    Args:
        pool: one replica's devices.
        protocol: which requests the latencies count. Hours and money are those of the whole runs.
    """
    price, unpriced = None, ""
    try:
        price = sources.price(pool)
    except BadHardware as error:
        unpriced = str(error)

    def run(result: SimulationResult, hours: float, most: int) -> FleetRun:
        usd = None if price is None else hours * pool.devices_per_replica * price.usd_per_hour
        return FleetRun(hours, most, usd, summarize(result.times, protocol.counted(result.times)))

    end_s = _last_s(elastic)
    over_time = tuple(replicas_over_time(elastic.held, end_s))
    span_s = max(0.0, _last_s(fixed) - float(np.nanmin(fixed.times.sent_s)))
    return ElasticComparison(
        elastic=run(elastic, replica_hours(elastic.held, end_s), max(held for _, held, _ in over_time)),
        fixed=run(fixed, autoscaler.max_replicas * span_s / 3600.0, autoscaler.max_replicas),
        over_time=over_time,
        price=price,
        unpriced=unpriced,
        cold_start_s=autoscaler.cold_start_s,
        cold_start_inferred=cold_start_inferred,
    )


def _last_s(result: SimulationResult) -> float:
    """When the last token came, or where none did the last request was sent."""
    times = result.times
    return float(np.nanmax(times.end_s)) if times.finished.any() else float(np.nanmax(times.sent_s))
