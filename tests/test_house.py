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


def imported_modules(path: Path, *, of_module_level_only: bool = False) -> Iterator[str]:
    """Absolute names, below paretune without that prefix: 'traces.trace', 'numpy'."""
    package = path.relative_to(ROOT).parts[:-1]
    tree = ast.parse(path.read_text())
    nodes = tree.body if of_module_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - (node.level - 1)]
                module = ".".join([*base, *([node.module] if node.module else [])])
                yield from [module] if node.module else [".".join([*base, alias.name]) for alias in node.names]
            else:
                yield (node.module or "").removeprefix("paretune.")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.removeprefix("paretune.")


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_down_the_house(path: Path) -> None:
    floor = path.relative_to(ROOT).parts[0]
    for module in imported_modules(path):
        room = module.split(".")[0]
        if room in MAY_IMPORT and room != floor:
            assert room in MAY_IMPORT[floor], f"{path.relative_to(ROOT)} imports {module}"


def test_no_two_rooms_import_each_other() -> None:
    arrows: dict[str, set[str]] = {}
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sources()}
    for name, path in names.items():
        arrows[name] = {module for module in imported_modules(path, of_module_level_only=True) if module in names}
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
