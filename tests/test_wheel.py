"""What a user installs: the wheel, away from the checkout, in folders that cannot be written, without a home."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .cli_examples import TUNE, write_inputs

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCES = (".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "build", "dist", "out", "*.egg-info")
DATA = {
    "paretune/py.typed",
    "paretune/profiler/data/accelerators.csv",
    "paretune/profiler/data/prices.csv",
    "paretune/reports/templates/page.html.j2",
    "paretune/runtime/small_model/config.json",
    "paretune/runtime/small_model/heldout.txt",
    "paretune/runtime/small_model/quality.json",
    "paretune/runtime/small_model/ternary/config.json",
    "paretune/runtime/small_model/ternary/model.safetensors",
    "paretune/runtime/small_model/ternary/tokenizer.json",
    "paretune/runtime/small_model/model.safetensors",
    "paretune/runtime/small_model/tokenizer.json",
    "paretune/traces/samples/NOTICE.md",
    "paretune/traces/samples/azure_conv_sample.csv",
}
MATMUL = """
import json
import torch
import paretune
from paretune.kernels.cpu.build import load
from paretune.kernels.linear import linear, pack

generator = torch.Generator().manual_seed(0)
x, weight = torch.randn(5, 64, generator=generator), torch.randn(48, 64, generator=generator)
library = load()
error = (linear(x, pack(weight, "fp32")).double() - x.double() @ weight.double().T).abs().max()
print(json.dumps({"file": paretune.__file__, "compiled": library is not None, "error": float(error)}))
"""


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return str(done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves its build folder beside the sources, and takes what it finds there."""
    sources = tmp_path_factory.mktemp("sources") / "paretune"
    shutil.copytree(ROOT, sources, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    # without isolation where the backend of pyproject.toml is installed; pip would fetch it again
    major = int(importlib.metadata.version("setuptools").split(".")[0])
    isolation = ["--no-isolation"] if major >= 77 else []
    run(sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", sources.parent / "dist", sources)
    [built] = (sources.parent / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the installed wheel, which nobody may write."""
    folder = tmp_path_factory.mktemp("installed") / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    return folder


@pytest.fixture
def environment(installed: Path, tmp_path: Path) -> dict[str, str]:
    """As cron or a container may give it: no home, no cache folder."""
    kept = {name: os.environ[name] for name in ("PATH", "CXX", "LD_LIBRARY_PATH") if name in os.environ}
    return {**kept, "PYTHONPATH": str(installed), "HOME": "/dev/null", "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}


def test_the_wheel_holds_one_package_with_every_module_and_all_its_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
    tops = {name.split("/")[0] for name in names}
    [info] = tops - {"paretune"}
    assert info.endswith(".dist-info")
    assert names >= DATA
    rooms = ("kernels", "optimizer", "profiler", "reports", "runtime", "traces")
    sources = {f"paretune/{path.relative_to(ROOT)}" for room in rooms for path in (ROOT / room).rglob("*.py")}
    sources |= {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "paretune").glob("*.py")}
    sources |= {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/paretune/commands").glob("*.py")}
    sources |= {f"paretune/{path.relative_to(ROOT)}" for path in (ROOT / "kernels/cpu").glob("*.[ch]*")}
    sources |= {f"paretune/{path.relative_to(ROOT)}" for path in (ROOT / "reports/templates").iterdir()}
    assert sources <= names
    assert wheel.stat().st_size < 20 << 20


def test_the_wheel_carries_the_licenses_of_what_is_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        licenses = {name.split("/licenses/")[1] for name in content.namelist() if "/licenses/" in name}
    assert licenses == {"LICENSE", "traces/samples/NOTICE.md", "runtime/small_model/LICENSE-PSF.md"}


def test_an_operator_is_compiled_from_the_installed_sources(
    installed: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    found = json.loads(run(sys.executable, "-c", MATMUL, cwd=tmp_path, env=environment))
    assert Path(found["file"]).is_relative_to(installed)
    assert found["compiled"]
    assert found["error"] < 1e-4


def test_the_installed_commands_describe_a_log_and_tune_on_it(
    installed: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    before = sorted(installed.rglob("*"))
    write_inputs(tmp_path)
    script = installed / "bin" / "paretune"
    assert script.is_file()
    paretune = [sys.executable, "-m", "paretune"]
    shown = run(*paretune, "trace", "describe", "log.csv", cwd=tmp_path, env=environment)
    assert shown.startswith("log.csv: 60 requests")
    plain = environment | {"NUMBA_DISABLE_JIT": "1"}  # to compile the simulator once more takes minutes
    tuned = json.loads(run(*paretune, *TUNE, "--trials", "5", "--json", cwd=tmp_path, env=plain))
    assert tuned["data"]["complete"]
    assert tuned["data"]["points"]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"log.csv", "model", "space.yaml", "out"}
    assert sorted(installed.rglob("*")) == before
