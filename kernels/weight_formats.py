"""The precisions of weights: what is stored for each, and how many bytes that is. No torch.

    fp32, bf16, fp16   as they are
    fp8                e4m3, one fp32 scale per output channel
    int8               one fp32 scale per output channel; multiplied with rows of x rounded to int8 (w8a8)
    int4               symmetric, one bf16 scale per 64 input channels of an output channel; int8 rows of x (w4a8)
    nvfp4              e2m1, one e4m3 scale per 16 input channels, and an fp32 scale of the tensor
    mxfp4              e2m1, one power of two (e8m0) per 32 input channels (OCP Microscaling Formats 1.0, 2023)
    ternary            {-1, 0, 1} in two bits, one fp32 scale of the tensor; int8 rows of x (BitNet, arXiv:2402.17764)

A scale of the tensor is kept once per output channel: q, k and v lie in one matrix and each has its own.
"""

from __future__ import annotations

from dataclasses import dataclass

# From which compute capability on an NVIDIA GPU's tensor cores multiply bf16, and e4m3 (CUDA C++ Programming Guide)
BF16_CAPABILITY = (8, 0)
FP8_CAPABILITY = (8, 9)

GPU_EXPANDED_BYTES = 64 << 20
"""At most so much of a weight of fewer bits is expanded at a time on a GPU, for many rows (kernels/gpu_linear.py)."""


@dataclass(frozen=True)
class WeightFormat:
    """How the weights of a linear layer are stored and multiplied.

    bits           of one weight
    group          input channels that are stored together, and scaled if there are group_bytes; 1 = each by itself
    group_bytes    of the scale of one group of one output channel
    channel_bytes  of what is kept per output channel beside: scale and, for int8, a sum
    tensor_scale   a scale that all channels of a tensor share: to be rounded, the tensor must be whole
    arithmetic     of the products: "fp32", "bf16" or "int8" (rows of x are rounded to it at run time)
    """

    bits: int
    group: int = 1
    group_bytes: int = 0
    channel_bytes: int = 0
    tensor_scale: bool = False
    arithmetic: str = "bf16"

    @property
    def sharded_by(self) -> int:
        """Input channels that one scale belongs to, and that therefore stay on one rank."""
        return self.group if self.group_bytes else 1

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a matrix in memory; the C++ layout pads out_features to whole panels (32 or 16) on top."""
        groups = -(-in_features // self.group)
        per_channel = groups * (self.group * self.bits // 8 + self.group_bytes) + self.channel_bytes
        return out_features * per_channel

    def bytes_per_weight(self) -> float:
        """Of a large matrix, group scales included."""
        return self.bits / 8 + self.group_bytes / self.group


WEIGHT_FORMATS = {
    "fp32": WeightFormat(32, arithmetic="fp32"),
    "bf16": WeightFormat(16),
    "int8": WeightFormat(8, channel_bytes=8, arithmetic="int8"),
    "int4": WeightFormat(4, 64, group_bytes=2, arithmetic="int8"),
    "ternary": WeightFormat(2, 16, channel_bytes=4, tensor_scale=True, arithmetic="int8"),
    "fp16": WeightFormat(16, arithmetic="fp32"),
    "fp8": WeightFormat(8, channel_bytes=4),
    "nvfp4": WeightFormat(4, 16, group_bytes=1, channel_bytes=4, tensor_scale=True),
    "mxfp4": WeightFormat(4, 32, group_bytes=1),
}
"""In the order that kernels/cpu/linear.cpp counts them."""
