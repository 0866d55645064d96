"""The command line: parse, call one function below, print. Commands by what a user wants live in commands/."""

from __future__ import annotations

import errno
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from . import __version__
from .commands import explaining, machine, nightly, prices, results, serving, simulating, studies, traces
from .output import Speaker, StdoutClosed, drop_stdout, envelope, say

RESUMABLE = 75
INTERRUPTED = 130
# Typed again, they go on, or at least lose nothing.
RESUMED = ("tune", "retune", "demo")
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


for room in (traces, machine, simulating, studies, results, prices, explaining, serving, nightly):
    for command in room.COMMANDS:
        cli.add_command(command)


def _fail(speaker: Any, exit_code: int, message: str) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    if isinstance(speaker, Speaker) and speaker.json:
        with suppress(StdoutClosed):
            say(envelope(speaker.command, exit_code, None, speaker.warnings, error=message))
    sys.exit(exit_code)


def _on_sigterm(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _os_message(error: OSError) -> str:
    where = error.filename or type(error).__name__
    todo = "free some space, or choose another place" if error.errno in _FULL else "check the path and who may use it"
    return f"{where}: {error.strerror or error}; {todo}, and run again"


def main() -> None:
    """Entry point."""
    try:
        signal.signal(signal.SIGTERM, _on_sigterm)
        _run()
    except KeyboardInterrupt:  # before anything was begun, or after all was done: Python would end as "killed"
        sys.exit(INTERRUPTED)
    finally:
        # all is said and done; a signal while Python takes itself apart would still end it as "killed"
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def _run() -> None:
    """Every error that knows its exit code becomes one message on stderr; any other is a bug and shows."""
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
    except StdoutClosed as closed:
        if not closed.reader_left:
            click.echo(f"error: {closed}", err=True)
        sys.exit(closed.exit_code)
    except BrokenPipeError:
        drop_stdout()
        sys.exit(1)
    except Exception as error:
        speaker = context.obj if context else None
        exit_code = getattr(error, "exit_code", None)
        if debug or (exit_code is None and not isinstance(error, OSError | MemoryError)):
            raise
        if exit_code is not None:
            _fail(speaker, exit_code, str(error))
        if isinstance(error, OSError):
            _fail(speaker, 1, _os_message(error))
        _fail(speaker, 1, "out of memory; give it less to do, or more memory")
