"""Replicas that come and go: the options of `simulate --autoscale`, and what it prints of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import update_wrapper
from typing import TYPE_CHECKING, Any

import click

from ..output import table
from .numbers import NOT_NEGATIVE, POSITIVE
from .run_words import milliseconds

if TYPE_CHECKING:
    from ..optimizer.elastic_fleet import ElasticComparison
    from ..profiler.autoscale import Autoscaler
    from ..runtime.model_shape import ModelShape
    from ..runtime.spec import Pool

METRICS = click.Choice(["num_requests", "num_requests_waiting", "outstanding_tokens"])
# changes of the fleet that are printed; --json has all
_MOST_CHANGES = 12

_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "--autoscale": ("limits", {"metavar": "MIN:MAX", "help": "So many replicas, by load; in place of the spec's."}),
    "--cold-start": ("cold_start_s", {"type": NOT_NEGATIVE, "help": "Seconds until a new replica takes requests."}),
    "--load-rate": ("load_gb_per_s", {"type": POSITIVE, "help":
        "Or infer them: GB/s at which a replica, all ranks together, loads weights (bytes of weight_dtype)."}),
    "--start-time": ("start_s", {"type": NOT_NEGATIVE, "help": "With --load-rate: seconds besides."}),
    "--autoscale-metric": ("metric", {"type": METRICS, "help": "Of the replicas together; default: num_requests."}),
    "--autoscale-target": ("target", {"type": POSITIVE, "help":
        "Of it per replica; default: of num_requests 70 % of max_num_seqs, of num_requests_waiting 5, else none."}),
    "--sync-period": ("sync_period_s", {"type": POSITIVE, "help": "Seconds between two looks at it; default: 15."}),
    "--scale-down-window": ("window_s", {"type": NOT_NEGATIVE, "help": "The most wanted in it stay; default: 300 s."}),
}  # fmt: skip


def autoscale_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What an autoscaler does; off unless asked for. The options are handed on as one `scaling`."""

    def gathered(**options: Any) -> Any:
        own = {name: options.pop(name) for name, _ in _OPTIONS.values()}
        return command(**options, scaling=Scaling(**own))

    update_wrapper(gathered, command)
    for option, (name, settings) in reversed(_OPTIONS.items()):
        gathered = click.option(option, name, **settings)(gathered)
    return gathered


@dataclass(frozen=True)
class Scaling:
    """What was asked for; None: it was not."""

    limits: str | None
    cold_start_s: float | None
    load_gb_per_s: float | None
    start_s: float | None
    metric: str | None
    target: float | None
    sync_period_s: float | None
    window_s: float | None

    @property
    def given(self) -> dict[str, bool]:
        """Each option, and whether it was given."""
        return {option: getattr(self, name) is not None for option, (name, _) in _OPTIONS.items()}

    @property
    def inferred(self) -> bool:
        return self.cold_start_s is None

    def autoscaler(self, shape: ModelShape, pool: Pool) -> Autoscaler | None:
        """None: the fleet is fixed. Raises: click.UsageError, BadAutoscaler (exit code 2)."""
        from ..optimizer.elastic_fleet import inferred_cold_start_s
        from ..profiler.autoscale import Autoscaler, default_target

        if self.limits is None:
            for option in (option for option, given in self.given.items() if given):
                raise click.UsageError(f"{option} speaks of an autoscaler: give --autoscale MIN:MAX")
            return None
        found = re.fullmatch(r"(\d{1,6}):(\d{1,6})", self.limits)
        if found is None:
            raise click.UsageError(f"--autoscale: found {self.limits!r}; allowed: MIN:MAX, such as 1:8")
        if self.cold_start_s is not None and (self.load_gb_per_s is not None or self.start_s is not None):
            raise click.UsageError("--cold-start is the whole of it: leave out --load-rate and --start-time")
        if self.cold_start_s is not None:
            cold_start_s = self.cold_start_s
        elif self.load_gb_per_s is not None:
            cold_start_s = inferred_cold_start_s(shape, pool, self.load_gb_per_s * 1e9, self.start_s or 0.0)
        else:
            raise click.UsageError("--autoscale: how long a new replica takes: give --cold-start, or --load-rate")
        metric = self.metric or "num_requests"
        asked = Autoscaler(
            min_replicas=int(found[1]),
            max_replicas=int(found[2]),
            target=default_target(metric, pool) if self.target is None else self.target,
            metric=metric,
            cold_start_s=cold_start_s,
        )
        if self.sync_period_s is not None:
            asked = replace(asked, sync_period_s=self.sync_period_s)
        return asked if self.window_s is None else replace(asked, scale_down_stabilization_s=self.window_s)


def autoscaler_words(autoscaler: Autoscaler, inferred: bool) -> str:
    """What it does, in one line."""
    label = ", inferred from the weights" if inferred else ""
    return (
        f"autoscaling: {autoscaler.min_replicas} to {autoscaler.max_replicas} replicas, {autoscaler.metric} at "
        f"{autoscaler.target:g} each, seen every {autoscaler.sync_period_s:g} s, fewer after "
        f"{autoscaler.scale_down_stabilization_s:g} s; cold start {autoscaler.cold_start_s:,.1f} s{label}"
    )


def elastic_text(found: ElasticComparison) -> str:
    """Latencies and costs of both fleets, and the replicas over time."""
    from ..reports.words import dollars

    both = (found.elastic, found.fixed)
    head = ["", "autoscaled", f"fixed {found.fixed.most_replicas}"]
    rows = [
        ["replicas at most", *(f"{run.most_replicas}" for run in both)],
        ["replica-hours", *(f"{run.replica_hours:,.3f}" for run in both)],
    ]
    if found.price is not None:
        rows.append(["cost of the run", *(dollars(run.usd) for run in both if run.usd is not None)])
    for metric in found.elastic.summary.values:
        if metric != "ttft_from_send":
            values = [milliseconds(run.summary.value(metric, 95.0)) for run in both]
            rows.append([f"{metric} p95, ms", *values])
    changes = [f"{at_s:,.0f} s: {held} held, {ready} ready" for at_s, held, ready in found.over_time]
    more = len(changes) - _MOST_CHANGES
    shown = "; ".join(changes[:_MOST_CHANGES]) + (f"; and {more} more changes (--json has all)" if more > 0 else "")
    prices = f"not priced: {found.unpriced}"
    if found.price is not None:
        prices = f"prices: {found.price.source}, as of {found.price.as_of}"
    return "\n".join([table(head, rows), f"replicas over time: {shown}", prices])
