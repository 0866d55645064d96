"""How commands speak: results on stdout, everything else on stderr, one JSON object with --json, one line per error."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any, ClassVar, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

SCHEMA_VERSION = 1


class StdoutClosed(Exception):
    """Standard output takes nothing any more: its reader has left, or its disk is full."""

    exit_code: ClassVar[int] = 1

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.reader_left = error.errno == errno.EPIPE
        self.reason = error.strerror or str(error)

    def __str__(self) -> str:
        return f"standard output: {self.reason}; write it elsewhere"


def drop_stdout() -> None:
    """Let go what stdout's buffer still holds: it would fail once more when Python exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    """Lines on stdout. Raises: StdoutClosed; whatever is said after that is lost in silence."""
    try:
        click.echo(text)
    except OSError as error:
        drop_stdout()
        raise StdoutClosed(error) from None


@dataclasses.dataclass
class Speaker:
    """What one command says. `json` and `quiet` are the user's wish; warnings go into the JSON as well as to stderr."""

    command: str
    json: bool = False
    quiet: bool = False
    warnings: list[str] = dataclasses.field(default_factory=list)

    def result(self, data: Any, text: str, exit_code: int = 0) -> None:
        """The command's result: `text` for people, or `data` as one JSON object that names the exit code."""
        if self.json:
            say(envelope(self.command, exit_code, data, self.warnings))
        elif text:
            say(text)

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        click.echo(f"warning: {message}", err=True)

    def note(self, message: str) -> None:
        """A line on what is being done, for people who wait."""
        if not self.quiet:
            click.echo(message, err=True)

    @contextmanager
    def progress(self, description: str) -> Iterator[Callable[[float, str], None]]:
        """A bar on stderr, or where stderr is no terminal a plain line every 30 s. Yields report(share done, what)."""
        if self.quiet:
            yield lambda share, what: None
        elif sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"))
            with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bars:
                task = bars.add_task(description, total=1.0, what="")
                yield lambda share, what: bars.update(task, completed=share, what=what)
        else:
            last = time.monotonic()

            def plain(share: float, what: str) -> None:
                nonlocal last
                if time.monotonic() - last >= 30:
                    last = time.monotonic()
                    click.echo(f"{description}: {share:.0%} {what}", err=True)

            click.echo(f"{description} ...", err=True)
            yield plain


def envelope(command: str, exit_code: int, data: Any, warnings: Sequence[str], error: str | None = None) -> str:
    """The object that every command prints with --json: strict JSON, NaN and infinity as null."""
    body: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "command": command, "exit_code": exit_code, "data": data}
    body["warnings"] = list(warnings)
    if error is not None:
        body["error"] = error
    return json.dumps(plain_data(body), allow_nan=False)


def plain_data(value: Any) -> Any:
    """Dataclasses, tuples, NumPy numbers and non-finite floats as what JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_data(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str | bytes):
        return plain_data(value.item() if getattr(value, "ndim", 0) == 0 else value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    lines = []
    for row in [headers, *rows]:
        cells = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def speaks(function: Command) -> Command:
    """Give a command `--json` and `--quiet`, and hand it the Speaker as its first argument."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    @click.option("--quiet", is_flag=True, help="No progress on stderr.")
    @click.pass_context
    def wrapped(context: click.Context, /, *args: Any, as_json: bool, quiet: bool, **options: Any) -> Any:
        command = context.command_path.removeprefix("paretune ").strip()
        speaker = Speaker(command, as_json, quiet)
        context.find_root().obj = speaker
        return function(speaker, *args, **options)

    return update_wrapper(wrapped, function)  # type: ignore[return-value]
