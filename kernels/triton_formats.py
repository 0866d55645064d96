# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Numbers of fewer than 16 bits inside Triton kernels: to fp32 and back. Import it only where it runs.

Written with integer arithmetic, so that e4m3 is the same on GPUs that have no instruction for it (sm_80) and under the
interpreter; with NATIVE, the same numbers by the instructions of capability 8.9 on (placement.converts_e4m3).
"""

from __future__ import annotations

import triton
import triton.language as tl

FORMAT_CODES = {"fp8": 0, "int8": 1, "int4": 2, "ternary": 3, "nvfp4": 4, "mxfp4": 5}
"""FORMAT of the kernels that read stored weights."""


@triton.jit
def round_half_even(x):
    """fp32 to the nearest integer, as fp32; |x| < 2**22, where adding 1.5 * 2**23 leaves no bit below 1."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def e4m3_value(code, NATIVE: tl.constexpr = False):
    """The fp32 value of e4m3 codes (uint8). They are an fp16 with exponents 8 lower, three mantissa bits further up."""
    if NATIVE:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        bits = code.to(tl.int32)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.uint16).to(tl.float16, bitcast=True)
        value = tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    return value


@triton.jit
def e4m3_code(x, NATIVE: tl.constexpr = False):
    """The e4m3 code (uint8) nearest to x (fp32), halfway to the even one; what lies beyond +-448 becomes +-448."""
    x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))
    if NATIVE:
        code = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # 960: the exponents' bias, 127 - 7, shifted
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
        small = (tl.abs(x) * 512.0 + 12582912.0).to(tl.int32, bitcast=True) & 0xF  # steps of 2**-9 below 2**-6
        code = tl.where(magnitude < 0x3C800000, small, normal)
        code = tl.where(x != x, 0x7F, code)
        code = (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    return code


@triton.jit
def e2m1_value(code):
    """The fp32 value of e2m1 codes (0 .. 15, int32): 0, 0.5, 1, 1.5, 2, 3, 4, 6 and, with bit 8, their negatives.

    They are an fp16 with exponents 14 lower, one mantissa bit.
    """
    half = (((code & 8) << 12) | ((code & 7) << 9)).to(tl.uint16).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 16384.0


@triton.jit
def code_in_mantissa(word, PLACE: tl.constexpr, BITS: tl.constexpr):
    """2**(23 - PLACE) plus the code of BITS bits at PLACE of a word (int32), as fp32: bits set, where a conversion is
    slow."""
    MASK: tl.constexpr = ((1 << BITS) - 1) << PLACE
    EXPONENT: tl.constexpr = (150 - PLACE) << 23
    return ((word & MASK) | EXPONENT).to(tl.float32, bitcast=True)


@triton.jit
def expanded_weights(
    stored, scale, FORMAT: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NATIVE_E4M3: tl.constexpr,
):  # fmt: skip
    """What a tile of a stored weight stands for, without the scales of its channels: (BLOCK_N, BLOCK_K) fp32.

    stored: (BLOCK_N, bytes of BLOCK_K weights), the first input channel of a byte in its low bits. scale: (BLOCK_N,
    groups of BLOCK_K weights, at least one); fp8 and ternary have none.
    """
    word = stored.to(tl.int32) << 12  # every code from bit 12 on: with 2**11 before it and times a scale still exact
    if FORMAT == 0:  # fp8
        weight = e4m3_value(stored, NATIVE_E4M3)
    elif FORMAT == 3:  # ternary
        even = tl.interleave(code_in_mantissa(word, 12, 2) - 2049.0, code_in_mantissa(word, 16, 2) - 129.0)
        odd = tl.interleave(code_in_mantissa(word, 14, 2) - 513.0, code_in_mantissa(word, 18, 2) - 33.0)
        weight = tl.interleave(even, odd)
    else:
        SPAN: tl.constexpr = (GROUP if BLOCK_K > GROUP else BLOCK_K) // 2
        word = tl.reshape(word, (BLOCK_N, BLOCK_K // 2 // SPAN, SPAN))
        if FORMAT == 2:  # int4
            factor = scale.to(tl.float32)[:, :, None]
            low = code_in_mantissa(word, 12, 4) * factor - 2056.0 * factor
            high = code_in_mantissa(word, 16, 4) * factor - 136.0 * factor
        else:
            if FORMAT == 4:  # nvfp4
                factor = e4m3_value(scale, NATIVE_E4M3)[:, :, None]
            else:
                # mxfp4: a power of two whose exponent + 127 is the code: the bits of an fp32; code 0 is 2**-127
                bits = tl.where(scale == 0, 0x00400000, scale.to(tl.int32) << 23)
                factor = bits.to(tl.float32, bitcast=True)[:, :, None]
            low, high = e2m1_value((word >> 12) & 15) * factor, e2m1_value(word >> 16) * factor
        weight = tl.reshape(tl.interleave(low, high), (BLOCK_N, BLOCK_K))
    return weight
