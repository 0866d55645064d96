"""`paretune init | retune | demo`: a project, its nightly job, and the whole loop in one command."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path

import click

from ..output import Speaker, speaks
from .machine import OUTPUT
from .source_options import EXISTING

# Of the shipped sample: enough requests for a p95, and short enough to be replayed against several finalists.
INIT_WINDOW_S = 120.0


@click.command()
@click.argument("directory", type=click.Path(file_okay=False), default=".")
@speaks
def init(speaker: Speaker, directory: str) -> None:
    """Write paretune.yaml and a small sample log, to begin with.

    The log is two minutes of the Azure conversation trace, cut down to what the small model that ships can take.

    \b
    Example: paretune init my-service
    """
    from ..demo import LENGTH_SHARE, MAX_TOKENS
    from ..project import FILE_NAME, TEMPLATE
    from ..traces import read, sample_path, scale, window, write
    from ..traces.whole_file import write_whole

    folder = Path(directory)
    settings, log = folder / FILE_NAME, folder / "trace.parquet"
    for path in (settings, log):
        if path.exists():
            raise click.UsageError(f"{path} exists already; it is left as it is")
    sample = window(read(sample_path()), 0.0, INIT_WINDOW_S)
    trace = scale(sample, input_length=LENGTH_SHARE, output_length=LENGTH_SHARE, max_tokens=MAX_TOKENS)
    trace = replace(trace, source="Azure LLM inference trace 2023, conversation (CC-BY-4.0)")
    write(trace, log)
    write_whole(settings, TEMPLATE.format(log=log.name))
    steps = ["paretune profile run", f"paretune tune {log.name}", "paretune pick"]
    if folder.resolve() != Path.cwd():
        steps = [f"cd {shlex.quote(str(folder))}", *steps]
    text = (
        f"wrote {settings} and {log}\n"
        f"{log.name}: {len(trace):,} requests of the Azure conversation trace in {trace.duration_s:.0f} s, "
        f"lengths x {LENGTH_SHARE:g}, at most {MAX_TOKENS:,} tokens a request\nnext: {' && '.join(steps)}"
    )
    speaker.result({"written": [str(settings), str(log)], "notes": trace.notes}, text)


@click.command()
@click.option("-c", "--config", "config_path", type=EXISTING, default="paretune.yaml", show_default=True)
@click.option("--log", type=EXISTING, help="Tonight's request log, in place of the one in the settings.")
@click.option("--dry-run", is_flag=True, help="Decide and record, but leave the spec as it is.")
@click.option("--decisions", type=click.Path(file_okay=False),
              help="Folder for the record of each decision, in place of the one in the settings.")  # fmt: skip
@speaks
def retune(speaker: Speaker, config_path: str, log: str | None, dry_run: bool, decisions: str | None) -> None:
    """The nightly job: if the workload moved, tune again, and replace the spec if the gain exceeds the noise.

    Relative paths in the settings start from the folder that they lie in. A run that was interrupted goes on when the
    same command is typed again.

    Exits with 0 (unchanged and still the best, or replaced), 5 (something else looks better, but not surely: the old
    spec stays), 6 (another run holds the lock).

    \b
    Example: paretune retune -c paretune.yaml --dry-run
    """
    from ..optimizer.retune import retune as run
    from ..optimizer.tuning import Ask, tonight
    from ..project import load_project
    from ..traces import read

    project = load_project(config_path)
    path = log or project.log
    trace = read(path)
    ask = Ask(
        log=path,
        model=project.model,
        metric=project.metric,
        cost=project.cost,
        survive=project.survive,
        space_path=project.space,
        baseline_path=project.spec,
        accelerator=project.accelerator,
        profile_path=project.profile,
        tiles_path=project.tiles,
        prices_path=project.prices,
        calibration_path=project.calibration,
        tables=project.tables,
        study=f"{project.study}-nightly",
        storage=project.storage,
        trials=project.trials,
        finalists=project.measure,
    )
    with speaker.progress("re-tuning") as report:
        decision = run(
            project.spec, trace, tonight(ask, report), decisions=decisions or project.decisions, dry_run=dry_run
        )
    words = {"unchanged": "unchanged", "kept": "kept the old spec", "replaced": f"replaced {project.spec}"}
    lines = [words[decision.action] + (" (dry run)" if dry_run else ""), *(f"- {why}" for why in decision.why)]
    speaker.result(decision.to_dict(), "\n".join(lines), decision.exit_code)
    sys.exit(decision.exit_code)


@click.command()
@click.option(
    "-o", "--output", type=OUTPUT, default="out/demo", show_default=True, help="Folder for everything it writes."
)
@click.option("--model", default="paretune/small", show_default=True, help="Model directory, or paretune/small.")
@click.option("--fresh", is_flag=True, help="Measure this machine again, even if an earlier demo did.")
@speaks
def demo(speaker: Speaker, output: str, model: str, fresh: bool) -> None:
    """From a real request log to a served, verified deployment on this machine, in about ten minutes.

    \b
    Example: paretune demo
    """
    from ..demo import run

    result = run(Path(output), model, speaker, fresh=fresh)
    speaker.result(result.data, result.text)


COMMANDS = (init, retune, demo)
