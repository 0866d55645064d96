"""What `paretune simulate` says of a prefill and a decode pool."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from ..output import Speaker, table
from .run_words import NOT_MEASURED, milliseconds, scheduler_not_modeled, simulated_run, speculation_words

if TYPE_CHECKING:
    from ..optimizer.bill import RunCost
    from ..optimizer.phase_sizing import PhaseSizing
    from ..optimizer.sources import Sources
    from ..profiler.disaggregated import DisaggregatedResult
    from ..profiler.kv_transfer import TransferLink
    from ..runtime.spec import Deployment
    from ..traces.metrics import Target
    from ..traces.run_protocol import RunProtocol
    from ..traces.trace import Trace


def simulate_pools(
    speaker: Speaker,
    deployment: Deployment,
    trace: Trace,
    protocol: RunProtocol,
    *,
    profile_path: str,
    prices_path: str | None,
    targets: tuple[Target, ...],
    k: int,
    rate: float,
    size: bool,
) -> None:
    """Serve a trace with both pools on one virtual clock, and print it as `simulate` prints a run of one pool."""
    from ..optimizer.sources import Sources
    from ..profiler.disaggregated import NOT_MODELED, simulate_disaggregated
    from ..profiler.kv_transfer import transfer_link, transferred_bytes

    prefill, decode = deployment.phases
    sources: dict[str, Sources] = {
        pool.role: Sources.of(
            deployment.model, accelerator_name=pool.accelerator, profile_path=profile_path, prices_path=prices_path
        )
        for pool in (prefill, decode)
    }
    shape = sources["prefill"].shape
    modeled = [sources[pool.role].step_model(pool) for pool in (prefill, decode)]
    link = transfer_link(deployment)
    run = simulate_disaggregated(trace, deployment, shape, link, modeled[0].tables, modeled[1].tables, k=k, rate=rate)
    measured = all(each.measured for each in modeled)
    told = simulated_run(
        run.result, trace, targets, protocol, None, rate=rate, measured=measured,
        relative_error=max(each.relative_error for each in modeled),
    )  # fmt: skip
    reasons = (*modeled[0].not_modeled, *modeled[1].not_modeled, *link.not_modeled, *NOT_MODELED)
    not_modeled = list(dict.fromkeys((*scheduler_not_modeled(deployment), *reasons)))
    costs = _costs(run, deployment, sources)
    each_token = transferred_bytes(shape, prefill, decode).all_per_token
    sized = _sized(trace, deployment, sources, targets, k, rate) if size else None
    text = [
        *told.lines,
        *(() if decode.speculation == "none" else (speculation_words(run.result),)),
        _parts_text(run, told.counted),
        _transfer_text(run, link, each_token),
        *_cost_words(costs),
        *(() if measured else (NOT_MEASURED,)),
        *told.missed,
        *(() if sized is None else (sized.words,)),
        *(f"not modeled: {each}" for each in not_modeled),
    ]
    data = {
        **told.data,
        "not_modeled": not_modeled,
        "transfer": {"link": vars(link), "bytes_per_token": each_token, **_transferred(run)},
        "parts": {name: _distribution(seconds[told.counted]) for name, seconds in run.parts.items()},
        "cost": {role: cost.to_dict() for role, cost in costs.items()},
        "size": sized,
    }
    speaker.result(data, "\n".join(text))


def check_options(options: dict[str, Any]) -> None:
    """Raises: UsageError: what a spec of one pool alone can be asked."""
    given = [name for name, value in options.items() if value]
    if given:
        raise click.UsageError(f"{', '.join(given)}: for a spec of one pool; this one is disaggregated")


def _sized(
    trace: Trace, deployment: Deployment, sources: dict[str, Sources], targets: tuple[Target, ...], k: int, rate: float
) -> PhaseSizing:
    from ..optimizer.phase_sizing import size_phases

    usd = [sources[pool.role].price(pool).usd_per_hour * pool.devices_per_replica for pool in deployment.phases]
    return size_phases(
        trace, deployment, sources["prefill"].shape, lambda pool: sources[pool.role].step_model(pool),
        (usd[0], usd[1]), targets, k=k, rate=rate,
    )  # fmt: skip


def _costs(run: DisaggregatedResult, deployment: Deployment, sources: dict[str, Sources]) -> dict[str, RunCost]:
    """Of each pool, for all output tokens of the run."""
    from ..optimizer.bill import run_cost

    busy_s = {"prefill": run.prefill_busy_s, "decode": run.decode_busy_s}
    return {
        pool.role: run_cost(replace(run.result, busy_s=busy_s[pool.role]), pool, sources[pool.role])
        for pool in deployment.phases
    }


def _cost_words(costs: dict[str, RunCost]) -> list[str]:
    from ..reports.bill import run_words
    from ..reports.words import dollars

    words = [f"{role} pool: {'; '.join(run_words(cost))}" for role, cost in costs.items()]
    hours = [cost.usd_per_hour for cost in costs.values()]
    tokens = [cost.usd_per_million_tokens for cost in costs.values()]
    if None not in hours and None not in tokens:
        words.append(
            f"both pools: {dollars(math.fsum(x for x in hours if x))} an hour, "
            f"{dollars(math.fsum(x for x in tokens if x))} per million output tokens at this load"
        )
    return words


def _parts_text(run: DisaggregatedResult, counted: Any) -> str:
    from ..profiler.disaggregated import WORDS

    rows = []
    for name, seconds in run.parts.items():
        values = _distribution(seconds[counted])
        rows.append([WORDS[name], *(milliseconds(values[each]) for each in ("mean", "p50", "p95"))])
    return table(["until the decode pool's first token, ms", "mean", "p50", "p95"], rows)


def _transferred(run: DisaggregatedResult) -> dict[str, Any]:
    moved = run.transfers
    sent = moved.here_s == moved.here_s  # NaN where nothing travels
    return {
        "transfers": int(sent.sum()),
        "bytes": float(moved.sent_bytes[sent].sum()),
        "seconds": _distribution(moved.here_s - moved.began_s),
    }


def _transfer_text(run: DisaggregatedResult, link: TransferLink, bytes_per_token: int) -> str:
    found = _transferred(run)
    mean = found["bytes"] / max(1, found["transfers"])
    return (
        f"{found['transfers']:,} transfers of KV over {link.name}, {bytes_per_token:,} bytes a token, "
        f"{mean / 1e6:,.1f} MB each on average"
    )


def _distribution(seconds: Any) -> dict[str, float]:
    from ..traces.metrics import percentiles

    known = seconds[seconds == seconds]  # NaN is none
    mean = float(known.mean()) if len(known) else math.nan
    return {"mean": mean, **dict(zip(("p50", "p95", "p99"), percentiles(known, (50, 95, 99))))}
