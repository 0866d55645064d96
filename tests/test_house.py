"""The house: imports run one way, front doors are light, and what is installed is what lies in the folders."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "traces": set[str](),
    "kernels": set[str](),
    "runtime": {"kernels", "traces"},
    "profiler": {"runtime", "kernels", "traces"},
    "optimizer": {"profiler", "runtime", "kernels", "traces"},
    "reports": {"optimizer", "profiler", "runtime", "kernels", "traces"},
}
HEAVY = ("torch", "triton", "optuna", "matplotlib")


def sources() -> list[Path]:
    return [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_modules(text: str, package: tuple[str, ...], *, of_module_level_only: bool = False) -> Iterator[str]:
    """What a module of a package (below paretune) imports of ours: 'traces.trace', 'cli', '__version__'."""
    tree = ast.parse(text)
    for node in tree.body if of_module_level_only else ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = ["paretune", *package[: len(package) - (node.level - 1)]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            whole = [f"{module}.{alias.name}" for alias in node.names]
            # `from package import module` names the module only after the import
            names = whole if node.module is None or module == "paretune" else [module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("paretune.") for name in names if name.split(".")[0] == "paretune")


def arrows_up(text: str, package: tuple[str, ...]) -> list[str]:
    """Imports of ours that a module may not make: of a room above, or of the top floor, whose version all may know."""
    allowed = {package[0], *MAY_IMPORT[package[0]], "__version__"}
    return [module for module in imported_modules(text, package) if module.split(".")[0] not in allowed]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_down_the_house(path: Path) -> None:
    assert arrows_up(path.read_text(), path.relative_to(ROOT).parts[:-1]) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from ..cli import main", ["cli"]),
        ("from .. import demo", ["demo"]),
        ("from ..default_paths import LEDGER", ["default_paths"]),
        ("import paretune.cli", ["cli"]),
        ("from paretune import output", ["output"]),
        ("from paretune.reports import page", ["reports"]),
        ("def f():\n    from ..reports.page import html", ["reports.page"]),
        ("from .. import __version__\nfrom ..traces import read\nfrom .front import Front\nimport numpy", []),
    ],
)
def test_an_arrow_up_is_seen_however_it_is_written(text: str, found: list[str]) -> None:
    assert arrows_up(text, ("optimizer",)) == found
    deeper = text.replace("from ..", "from ...").replace("from .f", "from ..f")
    assert arrows_up(deeper, ("optimizer", "export")) == found


def test_no_two_rooms_import_each_other() -> None:
    arrows: dict[str, set[str]] = {}
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sources()}
    for name, path in names.items():
        package = path.relative_to(ROOT).parts[:-1]
        found = imported_modules(path.read_text(), package, of_module_level_only=True)
        arrows[name] = {module for module in found if module in names}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for other in sorted(arrows[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in arrows:
        visit(name, ())


def packages() -> list[str]:
    listed: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    return listed


def test_every_package_folder_is_installed() -> None:
    doors = [path.parent for path in sources() if path.name == "__init__.py"]
    found = {f"paretune.{'.'.join(door.relative_to(ROOT).parts)}" for door in doors}
    assert found | {"paretune", "paretune.commands"} == set(packages())


def test_every_folder_with_code_is_a_package() -> None:
    assert {path.parent for path in sources()} == {path.parent for path in sources() if path.name == "__init__.py"}


@pytest.mark.parametrize("module", [*packages(), "paretune.runtime.spec", "paretune.cli"])
def test_front_doors_load_nothing_heavy_and_need_no_triton(module: str) -> None:
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r})); import {module}; "
        f"loaded = [m for m in {HEAVY!r} if sys.modules.get(m) is not None]; assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_room_is_called_by_what_nobody_could_name() -> None:
    vague = {"utils", "util", "helpers", "common", "base", "manager", "misc"}
    assert [path for path in sources() if path.stem in vague] == []
