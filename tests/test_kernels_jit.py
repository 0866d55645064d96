"""The compile cache is keyed by all that compiled code comes from."""

from pathlib import Path

import numpy as np

from paretune.kernels import jit
from paretune.runtime import scheduler, scheduler_state
from paretune.runtime.batch import LOGITS, TARGET, new_wire, write_wire
from paretune.runtime.scheduler_state import new_plan, new_state
from paretune.runtime.spec import Pool


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


def test_a_bound_function_does_what_it_does_unbound() -> None:
    pool = Pool(max_num_seqs=4, num_kv_blocks=64, max_model_len=256)
    tokens = np.zeros(4096, np.int32)
    wires = []
    for bound in (False, True):
        state, plan, wire = new_state(pool), new_plan(pool), new_wire(pool)
        for number in range(3):
            scheduler.add_request(state, number, 20 + number, 40, 16 * number, 0)
        if bound:
            jit.bind(scheduler.schedule, state, plan)()
            used = jit.bind(write_wire, state, plan, tokens, wire, then=(0, 0))(LOGITS, TARGET)
        else:
            scheduler.schedule(state, plan)
            used = write_wire(state, plan, tokens, wire, LOGITS, TARGET)
        wires.append(wire[:used])
    assert (wires[0] == wires[1]).all()
    assert wires[0][:6].tolist() == [3, 63, 2, LOGITS, 0, TARGET]


def test_binding_takes_a_plain_function_as_well() -> None:
    """What NUMBA_DISABLE_JIT leaves of a jitted one."""
    assert jit.bind(divmod, 17, then=(0,))(5) == (3, 2)
