"""Where tables lie in a folder of Vidur's profiles, and which device each is of."""

from __future__ import annotations

from pathlib import Path

from ..facts import same_name
from ..hardware import accelerators


def devices(folder: Path) -> tuple[str, ...]:
    """Devices that a folder has tables of, as it calls them."""
    network = {device_of(folder, path.name) for path in (folder / "network").glob("*") if path.is_dir()}
    return tuple(sorted(network.union(_measured(folder))))


def device_of(folder: Path, node: str) -> str:
    """Whose a node of network/ is: its name begins with the device's, as compute/ or the catalog has it; else with one
    word for it."""
    words, measured = node.split("_"), _measured(folder)
    for count in range(len(words), 0, -1):
        start = "_".join(words[:count])
        named = [name for name in measured if same_name(name, start)]
        if named or any(same_name(name, start) for name in accelerators()):
            return named[0] if named else start
    return words[0]


def _measured(folder: Path) -> tuple[str, ...]:
    """Devices whose operators were measured."""
    return tuple(sorted(path.name for path in (folder / "compute").glob("*") if path.is_dir()))


def files_of(folder: Path, stem: str) -> list[Path]:
    """Tables of a name in or below a folder, one a place: .parquet before .csv."""
    found = {path.parent: path for suffix in (".csv", ".parquet") for path in sorted(folder.rglob(f"{stem}{suffix}"))}
    return [found[place] for place in sorted(found)]
