"""The compile cache is keyed by all that compiled code comes from."""

from pathlib import Path

from paretune.kernels import jit
from paretune.runtime import scheduler_state


def test_the_key_holds_jitted_files_and_the_constants_that_they_import(tmp_path: Path) -> None:
    files = {
        "a/loop.py": "from ..b.names import PLACE\nfrom . import rules, missing\n@njit\ndef f(): ...",
        "a/rules.py": "LIMIT = 1",
        "a/other.py": "from .loop import f",
        "b/names.py": "PLACE = 3",
        "b/unused.py": "PLACE = 4",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    found = {path.relative_to(tmp_path).as_posix() for path in jit.compiled_sources(tmp_path)}
    assert found == {"a/loop.py", "a/rules.py", "b/names.py"}


def test_the_places_in_the_schedulers_arrays_are_part_of_the_key() -> None:
    package = Path(jit.__file__).absolute().parent.parent
    names = {path.resolve() for path in jit.compiled_sources(package)}
    assert Path(scheduler_state.__file__).resolve() in names
