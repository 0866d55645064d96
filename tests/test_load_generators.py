"""A public load generator, unchanged, against the server as users run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from paretune.kernels.jit import user_cache_dir

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "load_generators.py"


def test_aiperf_finishes_every_request() -> None:
    cache = user_cache_dir()
    if cache is None or not (cache / "peers" / "venv" / "aiperf" / "bin" / "aiperf").exists():
        pytest.skip(f"aiperf is not installed: python {SCRIPT.parent.name}/{SCRIPT.name} aiperf does that")
    command = [sys.executable, SCRIPT, "aiperf", "--no-install"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    bars = json.loads(done.stdout.splitlines()[-1])["bars"]
    assert [bar["value"] for bar in bars] == [1.0], done.stderr
