"""`paretune doctor`, `profile ...`, `kernels ...`: what this machine can do, measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..default_paths import PROFILE
from ..kernels.weight_formats import WEIGHT_FORMATS
from ..output import Speaker, speaks, table
from .numbers import POSITIVE
from .source_options import EXISTING, profile_option, table_options

if TYPE_CHECKING:
    from ..profiler.table_choice import TableChoice

TILES_PATH = "out/tiles.json"
KV_CACHE_DTYPES = ("fp32", "bf16", "fp8", "int8")
MODEL = "paretune/small"
OUTPUT = click.Path(dir_okay=False)

model_option = click.option("--model", default=MODEL, show_default=True, help="Model directory, or paretune/small.")
_MARK = {"ok": "ok     ", "limited": "limited", "missing": "missing"}


@click.command()
@click.option("--profile", "profile_path", type=OUTPUT, help="Also check this profile.")
@speaks
def doctor(speaker: Speaker, profile_path: str | None) -> None:
    """Say what this machine can do, what is missing, what that costs and how to get it.

    \b
    Example: paretune doctor
    """
    from ..profiler.doctor import examine

    findings = examine(profile_path)
    lines = []
    for finding in findings:
        lines.append(f"{_MARK[finding.state]}  {finding.name}: {finding.text}")
        if finding.todo:
            lines.append(f"         -> {finding.todo}")
    speaker.result(findings, "\n".join(lines))


SEVERAL = click.IntRange(min=2)


@click.group()
def profile() -> None:
    """Measure how long this runtime's steps take on this machine."""


@profile.command("run")
@model_option
@click.option("-o", "--output", type=OUTPUT, default=PROFILE, show_default=True)
@click.option("--weight-dtype", "weight_dtypes", multiple=True, type=click.Choice(list(WEIGHT_FORMATS)))
@click.option("--kv-cache-dtype", "kv_dtypes", multiple=True, type=click.Choice(KV_CACHE_DTYPES), help="Default: bf16.")
@click.option("--pipeline", "stages", multiple=True, type=SEVERAL, help="Also with so many pipeline stages.")
@click.option("--context", "parts", multiple=True, type=SEVERAL, help="Also with long prompts divided among so many.")
@click.option("--seconds", type=POSITIVE, default=8.0, show_default=True,
              help="Per configuration, for whole steps; live loads last 1.5 times that, at least 12 s.")  # fmt: skip
@click.option("--tiles", "tiles_path", type=EXISTING, help="Measure with the tiles of this file.")
@click.option("--max-model-len", type=click.IntRange(min=32), default=2048, show_default=True)
@click.option("--serving/--no-serving", default=True, show_default=True,
              help="Also replay against live servers: what their load lasts and some 8 s, each.")  # fmt: skip
@speaks
def profile_run(
    speaker: Speaker,
    model: str,
    output: str,
    weight_dtypes: tuple[str, ...],
    kv_dtypes: tuple[str, ...],
    stages: tuple[int, ...],
    parts: tuple[int, ...],
    seconds: float,
    tiles_path: str | None,
    max_model_len: int,
    serving: bool,
) -> None:
    """Measure operators and whole steps for every way to share this machine's cores, and what serving adds to them.

    About seven minutes on two cores, two of them for each precision: a live server is measured with each, too.

    \b
    Example: paretune profile run --weight-dtype bf16
    """
    from ..profiler.machine import profile_machine
    from ..profiler.tile_file import TileFile

    tiles = None if tiles_path is None else TileFile.load(tiles_path)
    with speaker.progress("measuring this machine") as report:
        found = profile_machine(
            model,
            weight_dtypes=weight_dtypes or ("fp32", "bf16", "int8"),
            kv_cache_dtypes=kv_dtypes or ("bf16",),
            pipeline_parallel_sizes=(1, *stages),
            context_parallel_sizes=(1, *parts),
            seconds_per_configuration=seconds,
            tiles=tiles,
            max_model_len=max_model_len,
            serving=serving,
            progress=report,
            command=" ".join(["paretune", *sys.argv[1:]]),
        )
    found.save(output)
    speaker.result({"written": output, "digest": found.digest()}, f"wrote {output}\n{_profile_text(found)}")


@profile.command("import")
@click.argument("what", nargs=-1, required=True, metavar="[KIND] SOURCE")
@click.option("--system", help="A device, as the folder calls it (h100_sxm, a100) or the catalog (H100).")
@click.option("--engine", help="Of aiconfigurator: whose kernels, trtllm, vllm or sglang.")
@click.option("--version", help="Of that engine. Default: the newest of each table.")
@click.option("--model", "model_path", type=click.Path(exists=True, file_okay=False),
              help="Of LLMServingSim: a folder with the profiled model's config.json.")  # fmt: skip
@click.option("-o", "--output", type=OUTPUT,
              help="Write the rows that passed the checks here (Parquet; whole steps also as CSV).")  # fmt: skip
@speaks
def profile_import(
    speaker: Speaker,
    what: tuple[str, ...],
    system: str | None,
    engine: str | None,
    version: str | None,
    model_path: str | None,
    output: str | None,
) -> None:
    """Read other people's measurements, and list the rows that cannot be true.

    SOURCE lies as its project lays it out; KIND is seen from that, or one of: aiconfigurator (a folder with
    SYSTEM/FAMILY/ENGINE/VERSION/*.parquet, or "aiconfigurator-core", the installed package), vidur (compute/ and
    network/), llmservingsim (meta.yaml with tpN/), splitwise (a CSV of prompt and token times), steps (a file of
    `profile export`). Rows that need more than peak FLOP/s or bandwidth are refused; what is odd is flagged.

    \b
    Example: paretune profile import aiconfigurator-core --system H100 --engine vllm
    """
    from ..profiler.importers import by_file, write_steps, write_tables
    from ..profiler.importers.kinds import KINDS, ImportAsk, imported
    from ..runtime.model_shape import ModelShape, resolve_model

    if len(what) > 2 or (len(what) == 2 and what[0] not in KINDS):
        raise click.UsageError(f"[KIND] SOURCE: {' '.join(what)}; allowed: one source, after one of {', '.join(KINDS)}")
    source = what[-1]
    kind = what[0] if len(what) == 2 else None
    shape = None if model_path is None else ModelShape.load(resolve_model(model_path))
    with speaker.progress("reading and checking"):
        read = imported(source, kind, ImportAsk(system, engine, version, shape))
    rows = [[name, read.versions.get(name, "-"), f"{count:,}"] for name, count in read.points.items()]
    findings = by_file(read.findings)
    lines = [table([read.kind, "version", "points"], rows), "", *(str(finding) for finding in findings)]
    refused = sum(finding.rows for finding in read.findings if finding.refused)
    flagged = sum(finding.rows for finding in read.findings if not finding.refused)
    lines.append(f"{refused} rows refused, {flagged} flagged")
    if read.not_read:
        lines.append(f"not read: {', '.join(read.not_read)}")
    if output is not None:
        path = Path(output)
        count = write_tables(path, read.operators) if read.operators else write_steps(path, read.steps)
        lines.append(f"wrote {output}: {count:,} points")
    found = {"kind": read.kind, "points": read.points, "findings": read.findings, "not_read": read.not_read}
    speaker.result({**found, "refused": refused, "flagged": flagged, "written": output}, "\n".join(lines))


@profile.command("export")
@click.argument("path", type=EXISTING, default=PROFILE)
@click.option("-o", "--output", type=OUTPUT, default="out/steps.csv", show_default=True, help="CSV or .parquet.")
@click.option("--model", "model_path", type=click.Path(exists=True, file_okay=False),
              help="Folder of the profiled model, where it has moved.")  # fmt: skip
@speaks
def profile_export(speaker: Speaker, path: str, output: str, model_path: str | None) -> None:
    """Write a profile's whole steps as a plain table, for others to read; `profile import` reads it back.

    The columns are in docs/operator-tables.md. Such a table, of any engine on any accelerator of the catalog, is what
    `--step-times` takes.

    \b
    Example: paretune profile export out/profile.json -o out/steps.csv
    """
    from ..profiler.importers import write_steps
    from ..profiler.importers.step_rows import of_profile
    from ..profiler.profile import Profile
    from ..runtime.model_shape import ModelShape, resolve_model

    found = Profile.load(path, any_machine=True)
    shape = ModelShape.load(resolve_model(model_path or found.model))
    rows = write_steps(Path(output), of_profile(found, shape))
    speaker.result({"written": output, "rows": rows, "digest": found.digest()}, f"wrote {output}: {rows:,} steps")


def _profile_text(found: object) -> str:
    from ..profiler.profile import Profile
    from ..profiler.step_fit import fit_steps

    assert isinstance(found, Profile)
    rows = []
    for each in found.configurations:
        fit = fit_steps(each.steps)
        rows.append(
            [
                str(each.key),
                str(len(each.steps)),
                f"{fit.step_s * 1e3:.2f} ms",
                f"{fit.relative_error:.0%}",
            ]
        )
    lines = [found.name, table(["configuration", "points", "constant per step", "held-out error (90 %)"], rows)]
    for live in found.serving:
        lines.append(
            f"live server, {live.measured_on}, {live.cores} cores computing: {live.steps} steps "
            f"(+- {live.spread:.0%}), {live.between_steps_s * 1e3:.2f} ms between them, "
            f"{live.to_scheduler_s * 1e3:.1f} ms to the scheduler, {live.to_client_s * 1e3:.1f} ms back"
        )
    return "\n".join(lines)


@profile.command("show")
@click.argument("path", type=EXISTING, default=PROFILE)
@speaks
def profile_show(speaker: Speaker, path: str) -> None:
    """Show what a profile holds, and what the host takes of the time to first token by prompt length.

    "Constant per step" is what every step takes, whatever stands in it: the host, and reading the weights. The host's
    share counts it without the linear layers, which were measured by themselves.

    \b
    Example: paretune profile show out/profile.json
    """
    from ..profiler.host_share import PROMPTS, shares_of_profile
    from ..profiler.profile import Profile
    from ..runtime.model_shape import BadModel, ModelShape, resolve_model

    found = Profile.load(path, any_machine=True)
    lines, shares = [_profile_text(found)], {}
    try:
        shares = shares_of_profile(found, ModelShape.load(resolve_model(found.model)))
    except BadModel as error:
        lines.append(f"the host's share by prompt length needs the model's sizes: {error}")
    if shares:
        rows = [
            [name, *(next((f"{s.share:.0%}" for s in each if s.prompt_tokens == n), "-") for n in PROMPTS)]
            for name, each in shares.items()
        ]
        heads = ["host's share of the TTFT of a prompt alone; tokens", *(f"{n:,}" for n in PROMPTS)]
        lines.append(table(heads, rows))
    by_configuration = {name: [{**vars(s), "share": s.share} for s in each] for name, each in shares.items()}
    speaker.result({**found.model_dump(mode="json"), "host_share": by_configuration}, "\n".join(lines))


@profile.command("check")
@click.argument("path", type=EXISTING, default=PROFILE)
@speaks
def profile_check(speaker: Speaker, path: str) -> None:
    """Say whether a profile is whole and was measured on this machine.

    \b
    Example: paretune profile check out/profile.json
    """
    from ..profiler.profile import Profile

    found = Profile.load(path)
    speaker.result({"digest": found.digest()}, f"{path}: valid here, {found.name}")


@click.command()
@click.option("--from", "recording", type=EXISTING, required=True,
              help="Step log, or request log with timings, of the server.")  # fmt: skip
@click.option("--spec", "spec_path", type=EXISTING, required=True, help="The deployment that it served.")
@profile_option
@table_options
@click.option("-o", "--output", type=OUTPUT, default="out/calibration.json", show_default=True)
@speaks
def calibrate(
    speaker: Speaker, recording: str, spec_path: str, profile_path: str, tables: TableChoice, output: str
) -> None:
    """Correct the modeled step times by what your own server recorded, and say how wrong they were and are.

    A step log has a factor for every part of a step in it; a request log with timings one factor for all steps, and the
    time before them. What is written is for `--calibration` of simulate and tune.

    \b
    Example: paretune calibrate --from out/steps.jsonl --spec out/spec.yaml
    """
    from ..optimizer.sources import Sources
    from ..profiler.hardware import as_cataloged
    from ..profiler.recalibration import calibrate as fit
    from ..profiler.recalibration import read_recorded
    from ..runtime.spec import load_deployment

    deployment = as_cataloged(load_deployment(spec_path))
    pool = deployment.pool
    sources = Sources.of(deployment.model, accelerator_name=pool.accelerator, profile_path=profile_path, tables=tables)
    found = fit(
        read_recorded(recording),
        sources.step_model(pool),
        deployment,
        recorded_in=Path(recording).name,
        source=sources.uncalibrated_digest,
        source_name=sources.uncalibrated_name,
    )
    found.save(output)
    rows = [
        [what, *(f"{error:.1%}" for errors in (found.before[what], after) for error in (errors.median, errors.p90))]
        for what, after in found.after.items()
    ]
    kinds = {"steps": "steps", "run": "requests"}
    shown = ", ".join(f"{part.removesuffix('_s')} x {factor:.2f}" for part, factor in found.factors.items())
    lines = [
        f"{sources.uncalibrated_name}, fitted to {found.points:,} {kinds[found.kind]} of {found.recorded_in}",
        f"{shown}, {found.step_s * 1e3:.2f} ms a step, {found.before_scheduler_s * 1e3:.1f} ms before the scheduler",
        f"errors on {found.held_out:,} {kinds[found.kind]} that were not fitted:",
        table(["", "before: median", "90 %", "after: median", "90 %"], rows),
        f"wrote {output}",
    ]
    speaker.result({"written": output, **found.model_dump(mode="json")}, "\n".join(lines))


@click.group()
def kernels() -> None:
    """Search and show the tiles of the operators."""


@kernels.command("tune")
@model_option
@click.option("-o", "--output", type=OUTPUT, default=TILES_PATH, show_default=True)
@click.option("--weight-dtype", "weight_dtypes", multiple=True, type=click.Choice(list(WEIGHT_FORMATS)))
@click.option("--kv-cache-dtype", "kv_dtypes", multiple=True, type=click.Choice(KV_CACHE_DTYPES), help="Default: bf16.")
@click.option("--threads", "threads", multiple=True, type=click.IntRange(min=1), help="Thread counts of a rank.")
@click.option("--seconds", type=POSITIVE, default=60.0, show_default=True, help="For all of it.")
@speaks
def kernels_tune(
    speaker: Speaker,
    model: str,
    output: str,
    weight_dtypes: tuple[str, ...],
    kv_dtypes: tuple[str, ...],
    threads: tuple[int, ...],
    seconds: float,
) -> None:
    """Search the best tile of a model's linear layers and attention for each precision and number of rows.

    \b
    Example: paretune kernels tune --seconds 30
    """
    from ..profiler.tile_file import tune_tiles
    from ..runtime.parallel import usable_cores

    cores = usable_cores()
    with speaker.progress("searching tiles") as report:
        found = tune_tiles(
            model,
            precisions=weight_dtypes or ("fp32", "bf16", "int8"),
            kv_cache_dtypes=kv_dtypes or ("bf16",),
            num_threads=threads or tuple(2**i for i in range(cores.bit_length()) if 2**i <= cores),
            buckets=(1, 4, 16, 64, 256),
            seconds=seconds,
            progress=report,
        )
    found.save(output)
    gains = [gain for each in found.of_threads for gain in each.gains]
    speaker.result({"written": output, "gains": gains}, f"wrote {output}\n{_tiles_text(found)}")


def _tiles_text(found: object) -> str:
    from ..profiler.tile_file import TileFile

    assert isinstance(found, TileFile)
    rows = []
    for each in found.of_threads:
        for gain in each.gains:
            tile = each.table[gain.operator, gain.precision, gain.bucket]
            rows.append(
                [
                    f"{gain.operator} {gain.precision}",
                    str(each.num_threads),
                    str(gain.bucket),
                    f"{gain.default_s * 1e6:,.0f} us",
                    f"{gain.best_s * 1e6:,.0f} us",
                    f"{gain.speedup:.2f}x",
                    tile.backend + "".join(f" {name}={value}" for name, value in tile.parameters),
                ]
            )
    return table(["operator", "threads", "rows", "default", "tuned", "gain", "tile"], rows)


@kernels.command("show")
@click.argument("path", type=EXISTING, default=TILES_PATH)
@speaks
def kernels_show(speaker: Speaker, path: str) -> None:
    """Show searched tiles and what each brought.

    \b
    Example: paretune kernels show out/tiles.json
    """
    from ..profiler.tile_file import TileFile

    found = TileFile.load(path)
    speaker.result(found, _tiles_text(found))


COMMANDS = (doctor, profile, calibrate, kernels)
