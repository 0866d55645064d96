"""The helper threads of the C++ operators: no item lost or done twice, from several callers, and after a fork."""

import os
import threading

import pytest
import torch

from paretune.kernels import Tile
from paretune.kernels.cpu.build import load
from paretune.kernels.linear import linear, pack

pytestmark = pytest.mark.skipif(load() is None, reason="no C++ compiler")
SERIAL = Tile("linear", "cpp", (("serial_below_kmacs", 1 << 20),))
PARALLEL = Tile("linear", "cpp", (("serial_below_kmacs", 0),))


@pytest.fixture(params=[2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def disagreements(calls):
    """Calls whose result differs from what one thread computes; the work of a row does not depend on who does it."""
    generator = torch.Generator().manual_seed(0)
    packed = pack(torch.randn(500, 24, generator=generator), "fp32")
    wrong = 0
    for call in range(calls):
        x = torch.randn(1 + call % 7, 24, generator=generator)
        wrong += not torch.equal(linear(x, packed, PARALLEL), linear(x, packed, SERIAL))
    return wrong


def test_thousands_of_small_jobs_lose_nothing(threads):
    assert disagreements(3000) == 0


def test_callers_at_the_same_time_do_not_disturb_each_other(threads):
    wrong = []
    callers = [threading.Thread(target=lambda: wrong.append(disagreements(500))) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=120)
    assert wrong == [0, 0, 0]


def test_a_forked_child_computes_too(threads):
    assert disagreements(10) == 0
    child = os.fork()
    if child == 0:
        os._exit(min(disagreements(10), 100))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
