"""On what an operator computes: the one place that says which tensors the GPU's kernels take, and what that GPU is."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .weight_formats import FP8_CAPABILITY


def on_gpu(where: Tensor | torch.device) -> bool:
    """Whether the operators on a tensor, or on a device, are those of an NVIDIA GPU."""
    return where.type == "cuda" if isinstance(where, torch.device) else where.is_cuda


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU, such as (9, 0) for an H100."""
    return torch.cuda.get_device_capability(device)


@cache
def converts_e4m3(device: torch.device) -> bool:
    """Whether kernels there convert e4m3 by an instruction: not on the CPU, where an interpreter runs them."""
    return device.type == "cuda" and capability(device) >= FP8_CAPABILITY


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU: as many programs run at once at the least. Of the CPU's interpreter, one."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def has_wide_shared_memory(device: torch.device) -> bool:
    """Whether a program there may have 227 KB of shared memory, where other GPUs leave it 163 KB or 99 KB."""
    return device.type == "cuda" and capability(device)[0] in (9, 10)
