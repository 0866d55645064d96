"""`paretune simulate`: a request log on a virtual clock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..output import Speaker, speaks
from . import two_pools
from .arrival_words import Waiting, arrival_options
from .numbers import POSITIVE
from .run_words import (
    NOT_MEASURED,
    check_k,
    protocol_options,
    room_text,
    scheduler_not_modeled,
    simulated_run,
    speculation_words,
)
from .scaling_words import Scaling, autoscale_options, autoscaler_words, elastic_text
from .source_options import EXISTING, calibration_option, prices_option, profile_option, table_options
from .traces import LOG

if TYPE_CHECKING:
    from ..profiler.table_choice import TableChoice


@click.command()
@click.argument("log", type=LOG)
@click.option("--spec", "spec_path", type=EXISTING, required=True, help="The deployment.")
@profile_option
@calibration_option
@table_options
@prices_option
@click.option("--rate", type=POSITIVE, default=1.0, show_default=True, help="Arrivals that many times as fast.")
@click.option("-k", type=click.IntRange(min=1), help="Of TTF-k; default: that of the log's targets, else 30.")
@click.option("--slo", "slos", multiple=True, help="What must hold; default: the spec's targets, else the log's.")
@click.option("--survive", type=click.IntRange(min=0), default=0, help="Also with so many replicas lost.")
@click.option("--head-room", "ask_head_room", is_flag=True, help="Also the most traffic at which the targets hold.")
@click.option(
    "--size", is_flag=True, help="Of a disaggregated spec: also the replicas, up to 256, that hold at least cost."
)
@arrival_options
@autoscale_options
@protocol_options
@speaks
def simulate(
    speaker: Speaker,
    log: str,
    spec_path: str,
    profile_path: str,
    calibration_path: str | None,
    tables: TableChoice,
    prices_path: str | None,
    rate: float,
    k: int | None,
    slos: tuple[str, ...],
    survive: int,
    ask_head_room: bool,
    size: bool,
    warm_up_s: float,
    ramp_s: float,
    length_jitter: float,
    waiting: Waiting,
    scaling: Scaling,
) -> None:
    """Serve a request log on a virtual clock with one deployment.

    \b
    Example: paretune simulate log.parquet --spec out/spec.yaml
    """
    from ..optimizer.bill import run_cost
    from ..optimizer.capacity import check_governed, k_of
    from ..optimizer.elastic_fleet import ELASTIC_LEAVES_OUT, compared
    from ..optimizer.head_room import head_room, survivors
    from ..optimizer.sources import Sources
    from ..profiler.hardware import as_cataloged
    from ..profiler.simulator import simulate as run
    from ..reports.bill import run_words
    from ..runtime.spec import load_deployment
    from ..traces import Target, read
    from ..traces.run_protocol import RunProtocol

    deployment = as_cataloged(load_deployment(spec_path))
    protocol = RunProtocol(warm_up_s, ramp_s, length_jitter)
    recorded = read(log)
    trace = protocol.applied(recorded)
    targets = tuple(map(Target.parse, slos or deployment.targets)) or trace.targets
    check_governed(trace, targets)
    if (survive or ask_head_room or size) and not targets:
        raise click.UsageError("--survive, --head-room and --size ask whether targets hold: give --slo")
    k = k or k_of(target.metric for target in targets)
    check_k(k, targets)
    if size and warm_up_s:
        raise click.UsageError("--size: its runs count every request: leave out --warm-up")
    if warm_up_s and (survive or ask_head_room):
        speaker.warn("--survive and --head-room count every request: --warm-up leaves none out there")
    if deployment.is_disaggregated:
        two_pools.check_options(
            {"--calibration": calibration_path, **tables.flags(), "--survive": survive, "--head-room": ask_head_room,
             **waiting.given, **scaling.given}
        )  # fmt: skip
        two_pools.simulate_pools(
            speaker, deployment, trace, protocol, profile_path=profile_path, prices_path=prices_path, targets=targets,
            k=k, rate=rate, size=size,
        )  # fmt: skip
        return
    if size:
        raise click.UsageError("--size: for a disaggregated spec; `tune --cost sizing` is for one pool")
    arrivals = waiting.arrivals(recorded, rate, ramp_s)
    pool = deployment.pool
    sources = Sources.of(
        deployment.model,
        accelerator_name=pool.accelerator,
        profile_path=profile_path,
        prices_path=prices_path,
        calibration_path=calibration_path,
        tables=tables,
    )
    modeled = sources.step_model(pool)
    autoscaler = scaling.autoscaler(sources.shape, pool)
    if (survive or ask_head_room) and (waiting.asked or autoscaler is not None):
        raise click.UsageError("--survive and --head-room ask about recorded arrivals and the spec's replicas alone")
    room = head_room(trace, deployment, modeled, targets, k=k) if ask_head_room else None
    asked: dict[str, Any] = {"policy": deployment.scheduler_policy, "k": k, "rate": rate, "arrivals": arrivals}
    result = run(trace, pool, modeled.tables, autoscaler=autoscaler, **asked)
    elastic = None
    if autoscaler is not None:
        pool = pool.model_copy(update={"replicas": autoscaler.max_replicas})
        fixed = run(trace, pool, modeled.tables, **asked)
        elastic = compared(
            result, fixed, pool, sources, autoscaler=autoscaler, cold_start_inferred=scaling.inferred, protocol=protocol
        )
    told = simulated_run(
        result, trace, targets, protocol, arrivals, rate=rate, measured=modeled.measured,
        relative_error=modeled.relative_error,
    )  # fmt: skip
    other = scheduler_not_modeled(deployment)
    not_modeled = (*other, *modeled.not_modeled)
    lines = [*told.lines, *(() if modeled.measured else (NOT_MEASURED,)), *(f"not modeled: {each}" for each in other)]
    if pool.speculation != "none":
        lines.append(speculation_words(result))
    cost = None
    if autoscaler is not None and elastic is not None:
        not_modeled = (*not_modeled, *ELASTIC_LEAVES_OUT)
        lines += [autoscaler_words(autoscaler, scaling.inferred), elastic_text(elastic)]
        lines += [f"not modeled: {each}" for each in ELASTIC_LEAVES_OUT]
    else:
        cost = run_cost(result, pool, sources)
        lines += run_words(cost)
    lines += told.missed
    lost = survivors(trace, deployment, sources.step_model, targets, lost=survive, k=k, rate=rate) if survive else None
    if lost is not None:
        lines.append(lost.words)
        not_modeled = (*not_modeled, *lost.not_modeled)
    if room is not None:
        lines.append(room_text(room))
    data = {
        **told.data,
        "autoscaler": autoscaler,
        "elastic": elastic and elastic.to_dict(),
        "survive": lost,
        "head_room": room,
        "not_modeled": not_modeled,
        "cost": cost and cost.to_dict(),
    }
    speaker.result(data, "\n".join(lines))


COMMANDS = (simulate,)
