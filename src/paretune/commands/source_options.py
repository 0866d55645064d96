"""Where step times come from: the options that every command which needs them has, alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Any, TypeVar

import click

from ..default_paths import PROFILE

Command = TypeVar("Command", bound=Callable[..., Any])

EXISTING = click.Path(exists=True, dir_okay=False)
ENGINES = ("trtllm", "vllm", "sglang")

profile_option = click.option(
    "--profile", "profile_path", type=click.Path(dir_okay=False), default=PROFILE, show_default=True
)
calibration_option = click.option(
    "--calibration", "calibration_path", type=EXISTING, help="Step times as `calibrate` corrected them."
)
prices_option = click.option("--prices", "prices_path", type=EXISTING, help="Your price book (CSV) in place of ours.")


_TABLE_OPTIONS = (
    click.option("--operator-tables", metavar="FOLDER",
                 help="Measured operators for the accelerator's data sheet: a folder of aiconfigurator or Vidur, or "
                      "'aiconfigurator-core', the installed package."),
    click.option("--layer-times", type=click.Path(exists=True, file_okay=False),
                 help="Layer times of vLLM for the data sheet: a folder of LLMServingSim's profiler."),
    click.option("--step-times", type=EXISTING,
                 help="Whole steps for the data sheet: a file in the columns of `profile export`, or of Splitwise."),
    click.option("--tables-engine", type=click.Choice(ENGINES),
                 help="Whose kernels, of aiconfigurator's operator tables. Default: vllm."),
    click.option("--tables-version", help="Of that engine, there. Default: the newest of each table."),
)  # fmt: skip


def table_options(function: Command) -> Command:
    """Hands the command a `tables`: what takes the place of an accelerator's data sheet (profiler.TableChoice)."""

    def wrapped(
        *args: Any,
        operator_tables: str | None,
        layer_times: str | None,
        step_times: str | None,
        tables_engine: str | None,
        tables_version: str | None,
        **options: Any,
    ) -> Any:
        from ..profiler.table_choice import TableChoice

        tables = TableChoice(operator_tables, layer_times, step_times, tables_engine, tables_version)
        return function(*args, tables=tables, **options)

    found: Any = update_wrapper(wrapped, function)
    for option in reversed(_TABLE_OPTIONS):
        found = option(found)
    return found  # type: ignore[no-any-return]
