# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Numbers of fewer than 16 bits inside Triton kernels: to fp32 and back. Import it only where it runs.

Written with integer arithmetic, so that e4m3 is the same on GPUs that have no instruction for it (sm_80) and on those
that have, and under the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_half_even(x):
    """fp32 to the nearest integer, as fp32; |x| < 2**22, where adding 1.5 * 2**23 leaves no bit below 1."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def e4m3_value(code):
    """The fp32 value of e4m3 codes (uint8). They are an fp16 with exponents 8 lower, three mantissa bits further up."""
    bits = code.to(tl.int32)
    half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def e4m3_code(x):
    """The e4m3 code (uint8) nearest to x (fp32), halfway to the even one; what lies beyond +-448 becomes +-448."""
    x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960  # 960: the exponents' bias, 127 - 7, shifted
    small = (tl.abs(x) * 512.0 + 12582912.0).to(tl.int32, bitcast=True) & 0xF  # steps of 2**-9 below 2**-6
    code = tl.where(magnitude < 0x3C800000, small, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def e2m1_value(code):
    """The fp32 value of e2m1 codes (0 .. 15, int32): 0, 0.5, 1, 1.5, 2, 3, 4, 6 and, with bit 8, their negatives."""
    exponent, fraction = (code >> 1) & 3, code & 1
    halves = tl.where(exponent == 0, fraction, (2 + fraction) << tl.maximum(exponent - 1, 0))
    return halves.to(tl.float32) * tl.where((code & 8) == 0, 0.5, -0.5)
