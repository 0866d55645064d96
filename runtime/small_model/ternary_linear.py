"""Linear layers that are trained ternary, and the checkpoint they are kept in.

BitNet b1.58 (Ma et al., arXiv:2402.17764): weights are {-1, 0, 1} times one scale a matrix, the mean magnitude; rows of
activations are rounded to int8; embedding and head stay as they are. In training the rounding is passed over by the
gradient (straight-through; Bengio et al., arXiv:1308.3432) and comes in step by step, so that a trained model is bent
rather than broken. The file is laid out as transformers' BitLinear reads it (quant_method "bitnet"): four rows of a
matrix in a byte, and `weight_scale` the reciprocal of the scale.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from ...traces.whole_file import write_whole
from .llama import Llama

QUANTIZATION_CONFIG = {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"}
RAMP_STEPS = 50


class TernaryLinear(nn.Linear):
    """A linear layer whose master weights are floats and whose products are ternary x int8.

    `seen` counts training steps; over the first RAMP_STEPS the weights go from the masters to the rounded ones.
    """

    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features)."""
        share = 1.0
        if self.training:
            share = min(1.0, self.seen / RAMP_STEPS)
            self.seen += 1
        values, scale = ternarize(self.weight.detach())
        weight = self.weight + share * (values * scale - self.weight).detach()
        step = x.detach().abs().amax(dim=-1, keepdim=True).clamp(min=1e-5) / 127
        rounded = x + share * ((x / step).round() * step - x).detach()
        return functional.linear(rounded, weight, self.bias)


def ternarize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """{-1, 0, 1} in the dtype of `weight`, and the mean magnitude that they are multiples of, () fp32."""
    scale = weight.float().abs().mean().clamp(min=1e-5)
    return (weight / scale).round().clamp(-1, 1), scale


def make_ternary(model: Llama) -> None:
    """Make every matrix of the layers a TernaryLinear, in place, with the same parameters."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                ternary = TernaryLinear(child.in_features, child.out_features, bias=False)
                ternary.weight = child.weight
                setattr(module, name, ternary)


def save_ternary(model: Llama, out: Path) -> None:
    """Write model.safetensors, whole: matrices of the layers in two bits a weight, the rest in bf16."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("_proj.weight"):
            values, scale = ternarize(tensor)
            tensors[name] = pack_rows(values)
            tensors[f"{name}_scale"] = (1 / scale).reshape(1)
        else:
            tensors[name] = tensor.to(torch.bfloat16).contiguous()
    write_whole(out / "model.safetensors", save(tensors, metadata={"format": "pt"}))


def pack_rows(values: Tensor) -> Tensor:
    """(out, in) of {-1, 0, 1} -> (out / 4, in) uint8: rows r, r + out / 4, ... as value + 1 in bits 0-1, 2-3, ..."""
    quarters = (values + 1).to(torch.uint8).chunk(4)
    return (quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6).contiguous()
