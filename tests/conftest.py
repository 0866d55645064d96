"""What all tests share: no deadlines on noisy machines, where the data lie, what to do about a missing component."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import settings

# Two busy cores: how long an example took says nothing about the code.
settings.register_profile("paretune", deadline=None)
settings.load_profile("paretune")


# A shell that runs the suite in the background lets it ignore Ctrl-C, and so would all that a test interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def missing(component: str, how_to_get_it: str) -> NoReturn:
    """Skip a test whose component this machine lacks; with CI=true fail, since CI installs all it needs."""
    message = f"{component} is missing: {how_to_get_it}"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws from torch is the same in every run, however many numbers the tests before it took."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of public traces and measurements; benchmarks/README.md says where each set comes from."""
    named = os.environ.get("PARETUNE_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("set PARETUNE_DATA to the folder with the public data sets (benchmarks/README.md)")
    return folder
