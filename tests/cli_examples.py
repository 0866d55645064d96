"""Commands run in this process or in one of their own, and small inputs: what tests of the command line share."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from paretune.cli import main
from paretune.traces import sample_path

# Llama 3 8B: sizes only, which is all that step times from a data sheet need
CONFIG = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-05, "hidden_act": "silu", "eos_token_id": 128001,
}  # fmt: skip
SPACE = """\
fields:
  tensor_parallel_size: [1, 2]
  weight_dtype: [bf16, fp8]
  max_num_seqs: [2, 8, 32, 128]
  max_num_batched_tokens: [128, 512, 2048]
max_devices: 4
"""
TARGET = "ttf30:p95<=600ms"
TUNE = ("tune", "log.csv", "--model", "model", "--accelerator", "H100", "--space", "space.yaml", "--slo", TARGET)
QUICK = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout; strict: NaN and Infinity are no JSON."""

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is no JSON")

        found: dict[str, Any] = json.loads(self.stdout, parse_constant=refuse)
        return found


def paretune(*arguments: str | Path) -> Ended:
    """A command in this process: everything but signals and Python's own start and end."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    exit_code: Any = 0
    try:
        with (
            mock.patch.object(sys, "argv", ["paretune", *map(str, arguments)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as end:
        exit_code = end.code or 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Ended(exit_code, out.getvalue(), err.getvalue())


def start(*arguments: str | Path, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    """A command in a process of its own."""
    command = [sys.executable, "-m", "paretune", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": QUICK}
    return subprocess.Popen(command, cwd=cwd, text=True, **{**pipes, **options})


def ended(process: subprocess.Popen[str], limit_s: float = 120.0) -> Ended:
    stdout, stderr = process.communicate(timeout=limit_s)
    return Ended(process.returncode, stdout or "", stderr or "")


def write_inputs(folder: Path, requests: int = 60) -> None:
    """log.csv (a minute or less of the sample), model/ (sizes only) and space.yaml."""
    lines = sample_path().read_text().splitlines(keepends=True)
    (folder / "log.csv").write_text("".join(lines[: requests + 1]))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    (folder / "space.yaml").write_text(SPACE)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content, scratch files too; not what SQLite keeps beside an open ledger."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix not in (".db-shm", ".db-wal")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def tuned_folder(folder: Path) -> Path:
    """The inputs, a finished study of them in out/paretune.db, and the spec that was picked in out/spec.yaml."""
    write_inputs(folder)
    with in_folder(folder):
        assert paretune(*TUNE, "--trials", "20").exit_code == 0
        assert paretune("pick").exit_code == 0
    # all in the one file, so that a copy of it stays as it is when it is read
    with contextlib.closing(sqlite3.connect(folder / "out" / "paretune.db")) as ledger:
        ledger.execute("pragma wal_checkpoint(truncate)")
    return folder


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[Path]:
    with contextlib.chdir(folder):
        yield folder
