"""On what an operator computes: the one place that says which tensors the GPU's kernels take, and what that GPU is."""

from __future__ import annotations

import torch
from torch import Tensor


def on_gpu(where: Tensor | torch.device) -> bool:
    """Whether the operators on a tensor, or on a device, are those of an NVIDIA GPU."""
    return where.type == "cuda" if isinstance(where, torch.device) else where.is_cuda


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU, such as (9, 0) for an H100."""
    return torch.cuda.get_device_capability(device)


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU: as many programs run at once at the least."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
