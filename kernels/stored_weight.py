"""A weight rounded to its precision, before it is laid out: cut among ranks, stacked, and expanded again.

Rounding comes first and the cut after it, so that the ranks together hold the very numbers that one rank would; a cut
between two input channels that share a scale is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .tiles import BadTile
from .weight_formats import WEIGHT_FORMATS, WeightFormat

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MOST_E2M1, _MOST_E4M3, _MOST_FP16 = 6.0, 448.0, 65504.0
_INT4_SCALES = (1.0, 0.9, 0.8)
_BLOCK_NUMBERS = 1 << 16


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight matrix (out, in) in one precision.

    values         (out, in): fp32, bf16, fp16 or float8_e4m3fn; int8 for int8, int4 (-8 .. 7) and ternary (-1, 0, 1);
                   uint8 for nvfp4 and mxfp4, the e2m1 code, sign bit 8
    group_scale    (out, groups): bf16 (int4), float8_e4m3fn (nvfp4), uint8 exponent + 127 (mxfp4), or None
    channel_scale  (out,) fp32 (int8, fp8, ternary, nvfp4), or None
    """

    precision: str
    values: Tensor
    group_scale: Tensor | None = None
    channel_scale: Tensor | None = None

    @property
    def format(self) -> WeightFormat:
        return WEIGHT_FORMATS[self.precision]

    def rows(self, part: range) -> StoredWeight:
        """Only these output channels."""
        cut = slice(part.start, part.stop)
        return replace(
            self,
            values=self.values[cut],
            group_scale=None if self.group_scale is None else self.group_scale[cut],
            channel_scale=None if self.channel_scale is None else self.channel_scale[cut],
        )

    def columns(self, part: range) -> StoredWeight:
        """Only these input channels. Raises BadTile: the cut splits a group with a common scale."""
        if self.group_scale is None:
            return replace(self, values=self.values[:, part.start : part.stop])
        group, width = self.format.group, self.values.shape[1]
        if part.start % group or (part.stop % group and part.stop != width):
            found = f"input channels {part.start} to {part.stop} of {width}"
            allowed = f"cuts at multiples of {group}, which share a scale in {self.precision}"
            raise BadTile("linear: shard", found, allowed, "use fewer ranks or another weight_dtype")
        groups = slice(part.start // group, -(-part.stop // group))
        return replace(self, values=self.values[:, part.start : part.stop], group_scale=self.group_scale[:, groups])

    def expanded(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The numbers that it stands for, (out, in); exact in float64."""
        values = e2m1_values(self.values) if self.precision in ("nvfp4", "mxfp4") else self.values
        numbers = values.to(dtype)
        if self.group_scale is not None:
            scale = self.group_scale.to(dtype)
            wide = torch.exp2(scale - 127) if self.precision == "mxfp4" else scale
            numbers = numbers * wide.repeat_interleave(self.format.group, dim=1)[:, : numbers.shape[1]]
        return numbers if self.channel_scale is None else numbers * self.channel_scale[:, None].to(dtype)


def stack(parts: Sequence[StoredWeight]) -> StoredWeight:
    """Matrices of one precision and width on top of one another."""

    def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
        return torch.cat([tensor for tensor in tensors if tensor is not None]) if tensors[0] is not None else None

    return StoredWeight(
        parts[0].precision,
        torch.cat([part.values for part in parts]),
        joined([part.group_scale for part in parts]),
        joined([part.channel_scale for part in parts]),
    )


def store(weight: Tensor, precision: str) -> StoredWeight:
    """A float matrix (out, in), whole, rounded to `precision`.

    Raises BadTile: unknown precision, no float matrix, numbers that the precision cannot hold.
    """
    if precision not in WEIGHT_FORMATS:
        raise BadTile("linear: precision", precision, ", ".join(WEIGHT_FORMATS), "correct the precision")
    if weight.ndim != 2 or 0 in weight.shape or not weight.is_floating_point():
        found = f"{tuple(weight.shape)} {weight.dtype}"
        raise BadTile("linear: weight", found, "a non-empty (out, in) float tensor", "pass the weight matrix")
    weight = weight.detach()
    if precision in ("fp32", "bf16"):
        return StoredWeight(precision, weight.to(torch.float32 if precision == "fp32" else torch.bfloat16))
    if precision == "fp16":
        most = float(weight.abs().max())
        if most > _MOST_FP16:
            raise BadTile("linear: weight", most, f"at most {_MOST_FP16:.0f} in fp16", "use bf16")
        return StoredWeight(precision, weight.to(torch.float16))
    weight = weight.float()
    if not bool(weight.isfinite().all()):
        raise BadTile("linear: weight", "NaN or infinity", f"finite numbers for {precision}", "use bf16")
    if precision == "int8":
        values, scale = quantize_int8(weight)
        return StoredWeight(precision, values, channel_scale=scale)
    if precision == "fp8":
        scale = weight.abs().amax(dim=1) / _MOST_E4M3
        scaled = (weight * _inverse(scale)[:, None]).clamp(-_MOST_E4M3, _MOST_E4M3)
        return StoredWeight(precision, scaled.to(torch.float8_e4m3fn), channel_scale=scale)
    if precision == "ternary":
        return _store_ternary(weight)
    return {"int4": _store_int4, "nvfp4": _store_nvfp4, "mxfp4": _store_mxfp4}[precision](weight)


def stored_ternary(values: Tensor, scale: float) -> StoredWeight:
    """From {-1, 0, 1} (out, in) and the scale of the tensor, as a checkpoint that was trained ternary holds them."""
    return StoredWeight("ternary", values.to(torch.int8), channel_scale=torch.full((values.shape[0],), scale))


def quantize_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows rounded to int8 in [-127, 127], and the scale of each row: values ~ int8 * scale[:, None]."""
    values = values.float()
    scale = values.abs().amax(dim=1) / 127
    return (values * _inverse(scale)[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def e2m1_values(codes: Tensor) -> Tensor:
    """The numbers of e2m1 codes 0 .. 15 (uint8), fp32."""
    table = torch.tensor((*E2M1, *(-value for value in E2M1)))
    return table[codes.int()]


def _store_ternary(weight: Tensor) -> StoredWeight:
    """Mean magnitude as the scale, then the nearest of -1, 0, 1 (BitNet b1.58, arXiv:2402.17764, equation 1)."""
    scale = weight.abs().mean().clamp(min=1e-5)
    return stored_ternary((weight / scale).round().clamp(-1, 1), float(scale))


def _store_int4(weight: Tensor) -> StoredWeight:
    """Of three scales for each group the one with the least squared error.

    The number furthest from 0 becomes -8, which leaves 15 of the 16 codes for the others (as llama.cpp's q4_0); shorter
    scales round the rest finer and clip that one. Root mean square error of the small model's weights: 9.4 %; 11.0 %
    with codes -7 to 7, 9.7 % with one scale, 9.2 % with seven.
    """

    def rounded(grouped: Tensor) -> tuple[Tensor, Tensor]:
        least, most = grouped.amin(dim=2), grouped.amax(dim=2)  # argmax and gather take five times as long
        furthest = torch.where(most >= -least, most, least)
        best = torch.full(furthest.shape, torch.inf)
        scale = torch.zeros_like(furthest, dtype=torch.bfloat16)
        codes = torch.zeros(grouped.shape, dtype=torch.int8)
        for share in _INT4_SCALES:
            tried = (furthest * (share / -8)).to(torch.bfloat16)
            nearest = (grouped * _inverse(tried.float())[:, :, None]).round_().clamp_(-8, 7)
            error = (nearest * tried.float()[:, :, None]).sub_(grouped).square_().sum(dim=2)
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, tried, scale)
            codes = torch.where(better[:, :, None], nearest.to(torch.int8), codes)
        return codes, scale

    return StoredWeight("int4", *_by_blocks(weight, "int4", rounded))


def _store_nvfp4(weight: Tensor) -> StoredWeight:
    """The tensor's scale brings the largest block scale to 448, the most that e4m3 holds."""
    tensor_scale = (weight.abs().max() / (_MOST_E2M1 * _MOST_E4M3)).clamp(min=torch.finfo(torch.float32).tiny)

    def rounded(grouped: Tensor) -> tuple[Tensor, Tensor]:
        relative = grouped / tensor_scale
        scale = (relative.abs().amax(dim=2) / _MOST_E2M1).clamp(max=_MOST_E4M3).to(torch.float8_e4m3fn)
        return _e2m1_codes(relative * _inverse(scale.float())[:, :, None]), scale

    channel_scale = tensor_scale.expand(weight.shape[0]).contiguous()
    return StoredWeight("nvfp4", *_by_blocks(weight, "nvfp4", rounded), channel_scale)


def _store_mxfp4(weight: Tensor) -> StoredWeight:
    """Block exponents as in the OCP specification 1.0, section 6.3: that of the largest number, less e2m1's 2."""

    def rounded(grouped: Tensor) -> tuple[Tensor, Tensor]:
        exponent = torch.frexp(grouped.abs().amax(dim=2)).exponent.clamp(-123, 127) - 1 - 2
        codes = _e2m1_codes(grouped * torch.exp2(-exponent.float())[:, :, None])
        return codes, (exponent + 127).to(torch.uint8)

    return StoredWeight("mxfp4", *_by_blocks(weight, "mxfp4", rounded))


def _e2m1_codes(scaled: Tensor) -> Tensor:
    """The nearest e2m1 code (uint8), halfway to the even one; beyond 6 saturates.

    Below 2 the codes are 0.5 apart, below 4 they are 1 apart, and then 2; in these units rounding to even is e2m1's.
    """
    magnitude = scaled.abs().clamp_(max=_MOST_E2M1)
    beyond = (magnitude >= 2).to(torch.uint8) + (magnitude >= 4).to(torch.uint8)
    units = (magnitude * torch.exp2(1 - beyond.float())).round_().to(torch.uint8)
    return units + 2 * beyond + 8 * (scaled < 0).to(torch.uint8)


def _by_blocks(
    weight: Tensor, precision: str, rounded: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Codes (out, in) and group scales (out, groups); a few rows at a time, so that the rest stays in a cache."""
    rows = max(1, _BLOCK_NUMBERS // weight.shape[1])
    blocks = [rounded(_grouped(block, WEIGHT_FORMATS[precision].group)) for block in torch.split(weight, rows)]
    codes = torch.cat([block_codes for block_codes, _ in blocks])
    return codes.flatten(1)[:, : weight.shape[1]], torch.cat([scale for _, scale in blocks])


def _grouped(weight: Tensor, group: int) -> Tensor:
    """(out, in) -> (out, groups, group), zeros where the last group is not full."""
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % group)).view(weight.shape[0], -1, group)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale != 0, 1 / scale, torch.zeros_like(scale))
