"""The command line: parse, call one function below, print. Commands by what a user wants live in commands/."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from . import __version__
from .commands import machine, nightly, serving, studies, traces
from .output import Speaker, envelope

RESUMABLE = 75
INTERRUPTED = 130
# Typed again, they go on, or at least lose nothing.
RESUMED = ("tune", "retune")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "PARETUNE"})
@click.version_option(__version__, prog_name="paretune")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """The query optimizer for LLM serving.

    Observe the workload, work out the latency-cost curve, pick the point, write the deployment spec, check it on the
    running server, and re-tune by night when the workload moves.

    \b
    Example: paretune demo
    """
    if Path("paretune.yaml").is_file() and context.invoked_subcommand not in ("init", "trace"):
        from .project import defaults, load_project

        context.default_map = defaults(load_project())


for room in (traces, machine, studies, serving, nightly):
    for command in room.COMMANDS:
        cli.add_command(command)


def _fail(speaker: Any, exit_code: int, message: str) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    if isinstance(speaker, Speaker) and speaker.json:
        click.echo(envelope(speaker.command, exit_code, None, speaker.warnings, error=message))
    sys.exit(exit_code)


def _on_sigterm(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _drop_stdout() -> bool:
    """If nobody takes stdout any more, let what its buffer still holds go, or it fails again when Python exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _disk_message(error: OSError, where: str) -> str:
    todo = "free some space, or choose another place, and run again" if error.errno in _FULL else "nothing was changed"
    return f"{where}: {error.strerror or error}; {todo}"


def main() -> None:
    """Entry point: every error that knows its exit code becomes one message on stderr; any other is a bug and shows."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    debug = "--debug" in sys.argv[1:]
    context: click.Context | None = None
    speaker: Any = None
    try:
        with cli.make_context("paretune", sys.argv[1:]) as context:
            cli.invoke(context)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        # it ends now; a second Ctrl-C would only tear the message apart
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        speaker = context.obj if context else None
        if isinstance(speaker, Speaker) and speaker.command in RESUMED:
            _fail(speaker, RESUMABLE, "interrupted; type the same command again to go on")
        _fail(speaker, INTERRUPTED, "interrupted")
    except Exception as error:
        speaker = context.obj if context else None
        exit_code = getattr(error, "exit_code", None)
        if debug or (exit_code is None and not isinstance(error, OSError | MemoryError)):
            raise
        if exit_code is not None:
            _fail(speaker, exit_code, str(error))
        if isinstance(error, MemoryError):
            _fail(speaker, 1, f"out of memory: {error}")
        if not _drop_stdout():
            _fail(speaker, 1, _disk_message(error, str(error.filename or type(error).__name__)))
        if not isinstance(error, BrokenPipeError):
            _fail(None, 1, _disk_message(error, "standard output"))
        sys.exit(1)
