"""What `paretune simulate` says of a prefill and a decode pool."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from ..output import Speaker, table
from .arrival_words import arrival_words
from .run_words import milliseconds, missed_words, note_words, samples_text, worst_text

if TYPE_CHECKING:
    from ..optimizer.bill import RunCost
    from ..optimizer.phase_sizing import PhaseSizing
    from ..optimizer.sources import Sources
    from ..profiler.disaggregated import DisaggregatedResult
    from ..profiler.kv_transfer import TransferLink
    from ..runtime.spec import Deployment, Pool
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
    from ..optimizer.capacity import Owed
    from ..optimizer.sources import Sources
    from ..profiler.disaggregated import NOT_MODELED, simulate_disaggregated
    from ..profiler.kv_transfer import transfer_link, transferred_bytes
    from ..traces.confidence import estimates, plain
    from ..traces.metrics import summarize, violations
    from ..traces.worst_window import worst_windows
    from .studies import NOT_MEASURED, goodput_of, summary_table

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
    result = run.result
    counted = protocol.counted(result.times)
    summary = summarize(result.times, counted)
    owed = Owed(trace, targets, counted)
    goodput_per_s, missed = goodput_of(result.times, owed), violations(result.times, owed)
    measured = all(each.measured for each in modeled)
    error = max(each.relative_error for each in modeled)
    not_modeled = [*modeled[0].not_modeled, *modeled[1].not_modeled, *link.not_modeled, *NOT_MODELED]
    if deployment.engine != "paretune":
        not_modeled.insert(0, f"the scheduler of {deployment.engine}: {deployment.scheduler_policy} ran in its place")
    not_modeled = list(dict.fromkeys(not_modeled))
    samples, worst = estimates(result.times, rows=counted), worst_windows(result.times, rows=counted)
    costs = _costs(run, deployment, sources)
    each_token = transferred_bytes(shape, prefill, decode).all_per_token
    text = [
        summary_table(summary, goodput_per_s),
        samples_text(samples),
        worst_text(worst),
        protocol.words(result.times),
        arrival_words(None, rate),
        *note_words(trace),
        f"{result.steps:,} steps, {result.preemptions:,} preemptions, {result.rejected:,} rejected, "
        f"step times +-{error:.0%}",
        _speculation_text(run, decode),
        _parts_text(run, counted),
        _transfer_text(run, link, each_token),
        *_cost_words(costs),
        *(() if measured else (NOT_MEASURED,)),
        *missed_words(missed),
    ]
    sized = _sized(trace, deployment, sources, targets, k, rate) if size else None
    text += [] if sized is None else [sized.words]
    text += [f"not modeled: {each}" for each in not_modeled]
    data = {
        "summary": summary.to_dict(),
        "goodput_per_s": goodput_per_s,
        "targets": list(map(str, targets)),
        "missed": {str(target): value for target, value in missed},
        "samples": plain(samples),
        "worst_window": worst,
        "protocol": vars(protocol),
        "arrivals": arrival_words(None, rate).split("\n"),
        "notes": trace.notes,
        "steps": result.steps,
        "preemptions": result.preemptions,
        "rejected": result.rejected,
        "prefix_hit_tokens": result.prefix_hit_tokens,
        "draft_tokens": result.draft_tokens,
        "accepted_tokens": result.accepted_tokens,
        "measured_step_times": measured,
        "relative_error": error,
        "not_modeled": not_modeled,
        "transfer": {"link": vars(link), "bytes_per_token": each_token, **_transferred(run)},
        "parts": {name: _distribution(seconds[counted]) for name, seconds in run.parts.items()},
        "cost": {role: cost.to_dict() for role, cost in costs.items()},
        "size": sized,
    }
    speaker.result(data, "\n".join(filter(None, text)))


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


def _speculation_text(run: DisaggregatedResult, decode: Pool) -> str:
    if decode.speculation == "none":
        return ""
    drafts, kept = run.result.draft_tokens, run.result.accepted_tokens
    return f"{drafts:,} tokens proposed, {kept / max(1, drafts):.0%} of them kept, as often as the log recorded"


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
