"""Stored weights in the two layouts of memory, panels for C++ and rows for torch: each as small as the format says."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .stored_weight import StoredWeight

_STEP = {"fp32": 1, "bf16": 2, "int8": 4, "fp16": 1, "fp8": 2}  # input channels side by side in a panel
_SHIFT = {"int4": 8, "ternary": 1}  # what makes the values of these formats codes >= 0


def panels_of(stored: StoredWeight, panel: int) -> Tensor:
    """(out / panel, steps, bytes of a step) uint8, padded with weights of zero; steps as linear.cpp reads them."""
    out_features, in_features = stored.values.shape
    missing = -out_features % panel
    if stored.precision in _STEP:
        step = _STEP[stored.precision]
        # float8 has no pad: its bytes have
        values = stored.values.view(torch.uint8) if stored.precision == "fp8" else stored.values
        blocks = pad(values, (0, -in_features % step, 0, missing)).view(-1, panel, -(-in_features // step), step)
        return _as_bytes(blocks.permute(0, 2, 1, 3))
    group = stored.format.group
    codes = pad(_codes(stored), (0, -in_features % group, 0, missing), value=_SHIFT.get(stored.precision, 0))
    codes = codes.view(-1, panel, codes.shape[1] // group, group)
    if stored.precision == "ternary":
        return _as_bytes(_merged(torch.unflatten(codes, 3, (4, 4)), 2).permute(0, 2, 1, 3))
    if stored.precision == "int4":
        weights = _merged(torch.unflatten(codes, 3, (8, 2, 4)), 4).permute(0, 2, 3, 1, 4)
    else:
        weights = _merged(torch.unflatten(codes, 3, (group // 2, 2, 1)), 4).squeeze(4).permute(0, 2, 3, 1)
    assert stored.group_scale is not None
    scale = pad(stored.group_scale.view(torch.int16 if stored.precision == "int4" else torch.uint8), (0, 0, 0, missing))
    scales = scale.view(-1, panel, scale.shape[1]).permute(0, 2, 1)
    return torch.cat([_as_bytes(scales), _as_bytes(weights)], dim=2)


def rows_of(stored: StoredWeight) -> Tensor:
    """(out, in) of the format's own dtype; below eight bits (out, bytes), the first input channel in the low bits."""
    if stored.format.bits >= 8:
        return stored.values.contiguous()
    each = 8 // stored.format.bits
    codes = pad(_codes(stored), (0, -stored.values.shape[1] % stored.format.group))
    return _merged(torch.unflatten(codes, 1, (-1, each, 1)), stored.format.bits).squeeze(2).contiguous()


def stored_rows(precision: str, rows: Tensor, group_scale: Tensor | None, in_features: int) -> StoredWeight:
    """What `rows_of` laid out, without the scales of the channels."""
    stored = StoredWeight(precision, rows, group_scale)
    bits = stored.format.bits
    if bits >= 8:
        return stored
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes = (rows[:, :, None] >> shifts & (1 << bits) - 1).flatten(1)[:, :in_features]
    shift = _SHIFT.get(precision, 0)
    return StoredWeight(precision, codes.to(torch.int8) - shift if shift else codes, group_scale)


def _codes(stored: StoredWeight) -> Tensor:
    return (stored.values + _SHIFT.get(stored.precision, 0)).to(torch.uint8)


def _merged(codes: Tensor, bits: int) -> Tensor:
    """(..., n, last) -> (..., last): n codes in a byte, the first in the low bits."""
    merged = codes[..., 0, :].clone()
    for index in range(1, codes.shape[-2]):
        merged |= codes[..., index, :] << bits * index
    return merged


def _as_bytes(blocks: Tensor) -> Tensor:
    """(panels, steps, ...) -> (panels, steps, bytes)."""
    return blocks.contiguous().view(torch.uint8).flatten(2)
