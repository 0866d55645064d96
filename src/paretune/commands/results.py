"""`paretune export`, `report`: what is made of a picked spec and of a study, for other engines and for people."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..output import Speaker, speaks
from .machine import OUTPUT
from .run_words import NOT_MEASURED
from .source_options import EXISTING
from .studies import storage_option

if TYPE_CHECKING:
    from ..runtime.model_shape import ModelShape
    from ..runtime.spec import Deployment


@click.command()
@click.argument("spec", type=EXISTING)
@click.option("--target", type=click.Choice(["vllm"]), default="vllm", show_default=True)
@click.option("--engine-version", help="Of the engine that will read it; default: the one we tested.")
@click.option("--allow-untested", is_flag=True, help="Accept a version that was not tested.")
@click.option(
    "-o",
    "--output",
    type=OUTPUT,
    help="Write the engine's YAML config here; a disaggregated spec's two beside it: x.prefill.yaml, x.decode.yaml.",
)
@speaks
def export(
    speaker: Speaker, spec: str, target: str, engine_version: str | None, allow_untested: bool, output: str | None
) -> None:
    """Translate a spec into another engine's arguments; what it cannot do is refused, not dropped.

    \b
    Example: paretune export out/spec.yaml --target vllm
    """
    from ..optimizer.export.vllm import export as to_vllm
    from ..profiler.hardware import as_cataloged
    from ..runtime.spec import load_deployment

    deployment = as_cataloged(load_deployment(spec))
    if deployment.is_disaggregated:
        _export_pools(speaker, deployment, engine_version, allow_untested, output)
        return
    exported = to_vllm(deployment, engine_version=engine_version, allow_untested=allow_untested)
    written = _written({} if output is None else {output: exported.config}, speaker)
    if deployment.provenance is not None and not deployment.provenance.measured:
        speaker.warn(f"{NOT_MEASURED}; no server was measured with these arguments")
    for each in exported.not_translated:
        speaker.warn(each)
    speaker.result({**vars(exported), "written": written}, shell_command(exported.env, exported.argv))


def _written(configs: dict[str, str], speaker: Speaker) -> list[str]:
    """Path -> content, each written and said on stderr: stdout has the command alone."""
    from ..traces.whole_file import write_whole

    for path, config in configs.items():
        write_whole(path, config)
        speaker.note(f"wrote {path}")
    return list(configs)


def _export_pools(
    speaker: Speaker, deployment: Deployment, engine_version: str | None, allow_untested: bool, output: str | None
) -> None:
    """A command for each pool, and what stands before them; YAML of both beside each other."""
    from ..optimizer.export.vllm_phases import export_phases

    shape = _shape_if_here(deployment.model)
    found = export_phases(deployment, engine_version=engine_version, allow_untested=allow_untested, shape=shape)
    servers = {"prefill": found.prefill, "decode": found.decode}
    configs = {}
    if output is not None:
        path = Path(output)
        configs = {
            str(path.with_name(f"{path.stem}.{role}{path.suffix}")): each.config for role, each in servers.items()
        }
    told = [*found.prefill.not_translated, *found.decode.not_translated, *found.notes]
    written = _written(configs, speaker)
    for each in dict.fromkeys(told):
        speaker.warn(each)
    text = [
        f"# {role} server, {found.servers[role]} of them\n{shell_command(server.env, server.argv)}"
        for role, server in servers.items()
    ]
    speaker.result({**vars(found), "written": written}, "\n\n".join(text))


def _shape_if_here(model: str) -> ModelShape | None:
    """None: its folder is on another machine, or of a kind that vLLM may know and we do not."""
    from ..runtime.config_fields import BadModel
    from ..runtime.model_shape import ModelShape, resolve_model

    try:
        return ModelShape.load(resolve_model(model))
    except BadModel:
        return None


def shell_command(env: dict[str, str], argv: Sequence[str]) -> str:
    """What to paste into a shell: one option a line, everything quoted that a shell would read otherwise."""
    words = [f"{name}={shlex.quote(value)}" for name, value in env.items()]
    lines = [" ".join(words)] if words else []
    for word in argv:
        if word.startswith("--") or not lines:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n  ".join(lines)


@click.command()
@click.argument("study", default="default")
@storage_option
@click.option("--spec", "spec_path", type=EXISTING, help="The spec that was picked; default: the knee.")
@click.option("--verification", "verification_path", type=EXISTING, help="What `verify` wrote about that spec.")
@click.option("-o", "--output", type=OUTPUT, default="out/report.html", show_default=True)
@click.option("--plots", is_flag=True, help="Also write the curve as PNG and SVG beside it.")
@speaks
def report(
    speaker: Speaker,
    study: str,
    storage: str,
    spec_path: str | None,
    verification_path: str | None,
    output: str,
    plots: bool,
) -> None:
    """Write the HTML report of a study: one file that opens anywhere.

    \b
    Example: paretune report default --spec out/spec.yaml -o out/report.html
    """
    from ..reports.gather import gather
    from ..reports.page import write_report
    from ..reports.plots import write_curve

    if verification_path is not None and spec_path is None:
        raise click.UsageError("--verification speaks of one spec: give it with --spec")
    data = gather(study, storage, spec_path=spec_path, verification_path=verification_path)
    write_report(data, output)
    written = [output]
    if plots:
        for suffix in (".png", ".svg"):
            written.append(str(Path(output).with_suffix(suffix)))
            write_curve(data, written[-1])
    speaker.result({"written": written}, "\n".join(f"wrote {path}" for path in written))


COMMANDS = (export, report)
