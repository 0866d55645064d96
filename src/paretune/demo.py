"""The main job in one command: a real request log becomes a curve, a chosen spec, a running server, and a verdict."""

from __future__ import annotations

import math
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import Speaker

if TYPE_CHECKING:
    from .optimizer.front import Evaluation
    from .optimizer.sources import Sources
    from .runtime.spec import Deployment
    from .traces import Target, Trace
    from .traces.metrics import RequestTimes

STUDY = "demo"
# The part of the shipped sample that is replayed: long enough for a p95, short enough for ten minutes in all.
WINDOW_S = 240.0
REPLAY_S = 30.0
# Lengths of a chat service, cut down to a model of five million parameters on two cores.
LENGTH_SHARE = 0.2
MAX_TOKENS = 1024
# What a listener accepts before half a minute of speech begins to play; the target of a voice service.
TARGET = "ttf30:p95<=600ms"
# The traffic is set so that the plain default is busy but well.
LOAD_OF_DEFAULT = 0.6
FINALISTS = 3
# Ways to share cores multiply: with more of them, profiling alone would take longer than ten minutes.
MOST_CORES = 2
SECONDS_PER_CONFIGURATION = 4.0
TILE_SECONDS = 20.0
CAPACITY_REPLAYS = 4


@dataclass(frozen=True)
class DemoResult:
    """What the demo prints last: `text` for people, `data` for --json."""

    data: dict[str, Any]
    text: str


def run(folder: Path, model: str, speaker: Speaker, *, fresh: bool) -> DemoResult:
    """Tiles, profile, tune, pick, serve, verify, report; everything it writes lies in `folder`."""
    from .commands.serving import schedule_kept
    from .commands.studies import price_words
    from .optimizer.sources import Sources
    from .optimizer.tuning import Ask, kept, pick_spec, tune_trace
    from .optimizer.verify import verify
    from .profiler.live import measure_live
    from .reports import as_text, compared, final_table, write_curve, write_report
    from .reports.gather import gather
    from .reports.report_data import Measured
    from .traces import Target, write
    from .traces.metrics import summarize

    began = time.monotonic()

    def stage(number: int, text: str) -> None:
        speaker.note(f"[{time.monotonic() - began:5.0f} s] {number}/7 {text}")

    folder.mkdir(parents=True, exist_ok=True)
    profile_path, tiles_path = folder / "profile.json", folder / "tiles.json"
    log, spec, page = folder / "trace.parquet", folder / "spec.yaml", folder / "report.html"
    storage = str(folder / "paretune.db")

    stage(1, f"searching kernel tiles for {model} on this machine")
    _tiles(tiles_path, model, speaker, fresh)
    stage(2, "measuring step times of every way to use this machine")
    _profile(profile_path, tiles_path, model, speaker, fresh)
    sources = Sources.of(model, profile_path=profile_path)

    stage(3, "reading a window of the Azure conversation trace and scaling it to this machine")
    target = Target.parse(TARGET)
    trace, scaling = _trace(sources, target)
    write(trace, log)
    speaker.note(scaling)

    stage(4, "tuning: all candidates simulated, the best served and measured")
    ask = Ask(
        log=str(log),
        model=model,
        metric="ttf30:p95",
        profile_path=str(profile_path),
        tiles_path=str(tiles_path),
        study=STUDY,
        storage=storage,
        finalists=FINALISTS,
        max_devices=_cores(),
        fresh=fresh,
        renew=True,
    )
    with speaker.progress("tuning") as report:
        tune_trace(ask, report)
    chosen, deployment = pick_spec(STUDY, storage, output=str(spec))

    stage(5, f"picked {_words(chosen)}; serving {spec} and replaying the trace against it")
    with speaker.progress("verifying") as report:
        replayed = measure_live(deployment, trace, progress=lambda done, of: report(done / of, f"{done} of {of}"))
    verdict = verify(deployment, trace, replayed.times, schedule_error_s=replayed.schedule_error_s)
    verdict.save(folder / "verification.json")

    stage(6, "measuring the capacity of the pick and of the plain default on the live server")
    study = kept(STUDY, storage).study
    costs = {
        name: _measured_cost(each, trace, target, sources, speaker)
        for name, each in (("pick", chosen), ("default", study.default))
    }

    stage(7, "measuring what the precision costs in quality, and writing the report")
    quality = _quality(deployment)
    data = gather(
        STUDY,
        storage,
        spec_path=str(spec),
        chosen_measured=Measured(summarize(replayed.times), costs["pick"]),
        default_measured=_default_measured(study.default, costs["default"]),
        commands=_commands(folder, model),
        quality=quality,
    )
    write_report(data, page)
    for suffix in (".png", ".svg"):
        write_curve(data, page.with_suffix(suffix))

    rows = compared(data)
    seconds = time.monotonic() - began
    text = "\n".join(
        [
            as_text(final_table(rows)),
            price_words(data.prices, data.prices_as_of),
            "",
            _sentence(deployment, replayed.times),
            *(f"{'met' if met else 'MISSED'}: {text}" for text, met in verdict.met.items()),
            schedule_kept(replayed.schedule_error_s),
            quality,
            "prefix cache: not varied, since the log carries no prefix hashes; the cores that HTTP and the client use "
            "are not priced",
            f"spec {spec}, report {page}; {seconds / 60:.1f} minutes",
        ]
    )
    plain = {
        "seconds": seconds,
        "spec": str(spec),
        "report": str(page),
        "met": verdict.met,
        "comparison": rows,
        "verification": verdict,
    }
    return DemoResult(plain, text)


def _cores() -> int:
    from .runtime.parallel import usable_cores

    return min(usable_cores(), MOST_CORES)


def _tiles(path: Path, model: str, speaker: Speaker, fresh: bool) -> None:
    from .profiler.tile_file import TileFile, tune_tiles

    if path.exists() and not fresh:
        TileFile.load(path)
        speaker.note(f"{path} is there already (--fresh searches again)")
        return
    cores = _cores()
    with speaker.progress("searching tiles") as report:
        found = tune_tiles(
            model,
            precisions=("fp32", "bf16", "int8"),
            num_threads=tuple(2**i for i in range(cores.bit_length()) if 2**i <= cores),
            buckets=(4, 16, 64, 256),
            seconds=TILE_SECONDS,
            progress=report,
        )
    found.save(path)


def _profile(path: Path, tiles_path: Path, model: str, speaker: Speaker, fresh: bool) -> None:
    from .profiler.machine import profile_machine
    from .profiler.profile import Profile
    from .profiler.tile_file import TileFile

    if path.exists() and not fresh:
        Profile.load(path)
        speaker.note(f"{path} is there already (--fresh measures again)")
        return
    with speaker.progress("measuring this machine") as report:
        found = profile_machine(
            model,
            weight_dtypes=("fp32", "bf16", "int8"),
            seconds_per_configuration=SECONDS_PER_CONFIGURATION,
            tiles=TileFile.load(tiles_path),
            max_model_len=MAX_TOKENS,
            serving=True,
            cores=_cores(),
            progress=report,
            command="paretune demo",
        )
    found.save(path)


def _trace(sources: Sources, target: Target) -> tuple[Trace, str]:
    """The sample, cut and scaled so that the plain default of this machine is busy but well; and that in words."""
    from .optimizer.capacity import capacity
    from .optimizer.screen import estimate, means_of
    from .traces import read, sample_path, scale, window, with_targets

    whole = window(read(sample_path()), 0.0, WINDOW_S)
    short = scale(whole, input_length=LENGTH_SHARE, output_length=LENGTH_SHARE, max_tokens=MAX_TOKENS)
    short = with_targets(short, [target])
    pool = sources.plain_default(short, cores=_cores()).pool
    tables = sources.step_model(pool).tables
    mean = estimate(means_of(short, [target], pool.enable_prefix_caching), pool, tables, target.metric.k)
    most = capacity(short, pool, tables, [target], saturation=mean.saturation_per_s / short.rate_per_s)
    rate = LOAD_OF_DEFAULT * (most.rate or 1.0)
    trace = scale(short, rate=rate)
    if trace.duration_s > REPLAY_S:
        trace = window(trace, 0.0, REPLAY_S)
    trace = replace(trace, source="Azure LLM inference trace 2023, conversation (CC-BY-4.0)")
    words = (
        f"          {len(trace):,} requests in {trace.duration_s:.0f} s: {rate:.2f} x the recorded rate, lengths x "
        f"{LENGTH_SHARE:g} (at most {MAX_TOKENS} tokens); target {target}"
    )
    return trace, words


def _measured_cost(evaluation: Evaluation, trace: Trace, target: Target, sources: Sources, speaker: Speaker) -> float:
    """$ per million output tokens at the highest rate that held the target on the live server; NaN if none did."""
    from .optimizer.live_capacity import live_capacity
    from .traces.metrics import sizing_cost_usd_per_hour, usd_per_million_tokens

    pool = evaluation.deployment.pool
    guess = pool.replicas * (evaluation.capacity_rate or 1.0)
    with speaker.progress("measuring capacity") as report:
        found = live_capacity(
            evaluation.deployment, trace, [target], guess=guess, replays=CAPACITY_REPLAYS, progress=report
        )
    if math.isnan(found.output_tokens_per_s):
        return math.nan
    price = sources.price(pool).usd_per_hour
    usd_per_hour = sizing_cost_usd_per_hour(pool.devices_per_replica, pool.replicas, price)
    return usd_per_million_tokens(usd_per_hour, found.output_tokens_per_s)


def _default_measured(default: Evaluation, usd_per_million_tokens: float) -> Any:
    from .reports.report_data import Measured

    return None if default.measured is None else Measured(default.measured, usd_per_million_tokens)


def _words(evaluation: Evaluation) -> str:
    from .commands.studies import deployment_words

    return deployment_words(evaluation)


def _sentence(deployment: Deployment, times: RequestTimes) -> str:
    """The line that the whole project is about."""
    from .traces.metrics import Metric, percentile

    promised = deployment.prediction("ttf30", 95.0)
    measured = percentile(times.values(Metric.parse("ttf30")), 95.0)
    if promised is None or promised.low is None or promised.high is None:
        return f"measured TTF-30 p95 {measured * 1e3:.0f} ms"
    return (
        f"TTF-30 p95: predicted {promised.value * 1e3:.0f} ms ({promised.low * 1e3:.0f} to {promised.high * 1e3:.0f}), "
        f"measured {measured * 1e3:.0f} ms"
    )


def _quality(deployment: Deployment) -> str:
    """What the chosen precision costs against fp32, on the held-out text that ships with the small model."""
    from .runtime.model_shape import resolve_model
    from .runtime.quality import measure_quality

    pool = deployment.pool
    found = measure_quality(resolve_model(deployment.model), pool.weight_dtype, pool.kv_cache_dtype)
    return (
        f"quality of {pool.weight_dtype} weights: perplexity {found.perplexity:.2f} instead of "
        f"{found.reference_perplexity:.2f} with fp32 ({found.perplexity_increase:+.2%}), the same most probable "
        f"token in {found.top1_agreement:.1%} of {found.num_tokens:,} places"
    )


def _commands(folder: Path, model: str) -> tuple[str, ...]:
    cores = _cores()
    threads = [word for i in range(cores.bit_length()) if 2**i <= cores for word in ("--threads", str(2**i))]
    profile, tiles, ledger = (str(folder / name) for name in ("profile.json", "tiles.json", "paretune.db"))
    log, spec, page = (str(folder / name) for name in ("trace.parquet", "spec.yaml", "report.html"))
    verification = str(folder / "verification.json")
    lines = (
        ["kernels", "tune", "--model", model, *threads, "--seconds", f"{TILE_SECONDS:g}", "-o", tiles],
        ["profile", "run", "--model", model, "--tiles", tiles, "--max-model-len", f"{MAX_TOKENS}", "--seconds",
         f"{SECONDS_PER_CONFIGURATION:g}", "-o", profile],
        ["tune", log, "--model", model, "--profile", profile, "--tiles", tiles, "--storage", ledger, "--study", STUDY,
         "--max-devices", f"{cores}", "--measure", f"{FINALISTS}"],
        ["pick", STUDY, "--storage", ledger, "-o", spec],
        ["verify", spec, log, "-o", verification],
        ["report", STUDY, "--storage", ledger, "--spec", spec, "--verification", verification, "-o", page],
    )  # fmt: skip
    return tuple(shlex.join(["paretune", *line]) for line in lines)
