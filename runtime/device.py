"""The device that a rank computes on: the CPU, or one GPU of this machine. No torch until a GPU is asked for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..kernels.weight_formats import BF16_CAPABILITY
from .parallel import Layout
from .spec import CPU, BadSpec, Pool

if TYPE_CHECKING:
    import torch

_LOOK_LIMIT_S = 120.0  # for a process to import torch and look
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU that torch sees.

    capability   compute capability, such as (9, 0)
    free_bytes   of its memory, now; total_bytes: all of it
    """

    name: str
    capability: tuple[int, int]
    free_bytes: int
    total_bytes: int


def gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs of this machine, in CUDA's order; none where torch has no CUDA.

    A process that has torch looks itself. Any other asks one that ends: looking takes hundreds of MB of each GPU for as
    long as the process that looked lives.
    """
    if "torch" in sys.modules:
        return _seen()
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__], capture_output=True, text=True, timeout=_LOOK_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        raise BadSpec("accelerator", f"no answer within {_LOOK_LIMIT_S:.0f} s", "GPUs that answer", _INSTEAD) from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BadSpec("accelerator", last, "a torch that can be imported", _INSTEAD)
    return tuple(Gpu(**{**row, "capability": tuple(row["capability"])}) for row in json.loads(done.stdout))


_INSTEAD = "run `paretune doctor`, or export the spec and start that server"


def _seen() -> tuple[Gpu, ...]:
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        found.append(Gpu(name, capability, free, total))
    return tuple(found)


def is_called(accelerator: str, name: str) -> bool:
    """Whether a GPU that CUDA calls `name` is what a spec calls `accelerator`: all its words stand in the name.

    >>> is_called("H100", "NVIDIA H100 80GB HBM3"), is_called("L4", "NVIDIA L40S")
    (True, False)
    """
    words = re.findall(r"[a-z0-9]+", name.casefold())
    return all(word in words for word in re.findall(r"[a-z0-9]+", accelerator.casefold()))


def check_gpus(pool: Pool, ranks: Sequence[int] | None = None, replicas: int = 1) -> None:
    """Refuse a pool on GPUs that this machine does not have.

    Args:
        ranks: of each replica, that are on this machine; left out: all.
        replicas: on this machine.
    Raises: BadSpec, naming the field.
    """
    if pool.accelerator == CPU:
        return
    found = gpus()
    if not found:
        where = "a machine with that GPU, a driver and a CUDA build of torch; 'cpu' here"
        raise BadSpec("pools.0.accelerator", f"{pool.accelerator}, and torch sees no NVIDIA GPU", where, _INSTEAD)
    needed = replicas * (Layout.of(pool).size if ranks is None else len(ranks))
    if needed > len(found):
        allowed = f"at most {len(found)}, the GPUs here: each rank has one of its own"
        raise BadSpec("pools.0: replicas x tensor_parallel_size", needed, allowed, "use fewer ranks")
    for gpu in found[:needed]:
        if not is_called(pool.accelerator, gpu.name):
            named = "the GPU that is here, by its name in the catalog"
            raise BadSpec("pools.0.accelerator", f"{pool.accelerator}, and CUDA says {gpu.name}", named, _INSTEAD)
        if gpu.capability < BF16_CAPABILITY:
            shown = ".".join(map(str, gpu.capability))
            raise BadSpec("pools.0.accelerator", f"{gpu.name} of compute capability {shown}", "8.0 and up", _INSTEAD)


def rank_device(pool: Pool, local_rank: int) -> torch.device:
    """Where rank `local_rank` of this machine's ranks computes."""
    import torch

    if pool.accelerator == CPU:
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def visible_to_replica(pool: Pool, replica: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of one of several replicas on this machine, which share no GPU; None: as it is."""
    if pool.accelerator == CPU or pool.replicas == 1:
        return None
    size = Layout.of(pool).size
    named = os.environ.get(VISIBLE)
    everything = named.split(",") if named else [str(number) for number in range(pool.replicas * size)]
    return ",".join(everything[replica * size : (replica + 1) * size])


if __name__ == "__main__":
    sys.stdout.write(json.dumps([asdict(gpu) for gpu in _seen()]))
