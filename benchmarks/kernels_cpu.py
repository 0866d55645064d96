"""CPU operators: C++ against torch per row count, attention bandwidth, and the cost of one call from Python.

    python benchmarks/kernels_cpu.py [--seconds 60] [--threads 2]

Shapes are those of a 201 M parameter Llama (hidden 1024, intermediate 2816, 16 query and 4 KV heads of 64). Weights
rotate through more memory than the caches hold; the two sides of a ratio take turns in one loop. Medians, with the
fastest run in brackets: on a shared machine the two tell how busy it was. The last line is one JSON object with the
bars.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from paretune.kernels import Tile, fused
from paretune.kernels.cpu.build import load, why_missing
from paretune.kernels.cpu.huge_pages import zeros_on_huge_pages
from paretune.kernels.decode_attention import decode_attention
from paretune.kernels.linear import PackedLinear, linear, pack
from paretune.kernels.paged_cache import PagedCache, block_bytes
from paretune.kernels.prefill_attention import prefill_attention
from paretune.kernels.stored_weight import quantize_int8
from paretune.kernels.weight_formats import WEIGHT_FORMATS

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, BLOCK = 1024, 2816, 16, 4, 64, 16
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def last_level_cache_bytes() -> int:
    """Of the largest cache that Linux names; 32 MB where it names none."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=32 << 20)


ROTATED_BYTES = 4 * last_level_cache_bytes()
SETTLE_S, CALLS = 0.008, 3  # of a turn
READ_WIDTH = 1024  # columns of the matrix that measures the read bandwidth


def take_turns(sides: Sequence[Callable[[], object]], seconds: float, least: int = 5) -> list[tuple[float, float]]:
    """(median, fastest) seconds of each side.

    OpenMP's threads spin for some milliseconds after a library's call, on cores that the next side needs: it is called
    untimed for so long.
    """
    times: list[list[float]] = [[] for _ in sides]
    until = time.perf_counter() + seconds
    while len(times[0]) < least or time.perf_counter() < until:
        for side, seconds_taken in zip(sides, times):
            settled = time.perf_counter() + SETTLE_S
            while time.perf_counter() < settled:
                side()
            for _ in range(CALLS):
                begin = time.perf_counter()
                side()
                seconds_taken.append(time.perf_counter() - begin)
    return [(statistics.median(taken), min(taken)) for taken in times]


def bench_linear(share_s: float) -> list[dict[str, object]]:
    """Our own C++ against the fastest library that computes in the same precision, by rows.

    Weights of every side rotate through ROTATED_BYTES of its own. int4 is compared with torch's weight-only int4 and,
    since no library here has w4a8, with the int8 ones too.
    """
    out_features, in_features = 2 * INTERMEDIATE, HIDDEN
    print(f"\nlinear, {out_features} x {in_features}: fastest us (median) of each side")
    bars: list[dict[str, object]] = []
    for precision in ("bf16", "int8", "int4", "ternary", "fp32"):
        libraries = library_linears(precision, out_features, in_features)
        ours = rotating(
            lambda precision=precision: pack(torch.randn(out_features, in_features), precision, backends=("cpp",)),
            packed_bytes=WEIGHT_FORMATS[precision].nbytes(out_features, in_features),
        )
        ratios = {}
        for rows in ROWS:
            x = torch.randn(rows, in_features)
            sides = [
                partial(rotated, x, ours, Tile("linear", "cpp")),
                *(partial(call, x) for call in libraries.values()),
            ]
            found = dict(zip(("cpp", *libraries), take_turns(sides, share_s)))
            others = [fastest for name, (_, fastest) in found.items() if name != "cpp"]
            if others:
                ratios[rows] = min(others) / found["cpp"][1]
            rate = 2 * rows * out_features * in_features / found["cpp"][1] / 1e9
            each = "   ".join(f"{name} {low * 1e6:.0f} ({median * 1e6:.0f})" for name, (median, low) in found.items())
            factor = f"   x {ratios[rows]:.2f}" if others else ""
            print(f"  {precision} M={rows:<4} {rate:4.0f} G/s   {each}{factor}", flush=True)
        if libraries and precision != "fp32":
            few = [ratio for rows, ratio in ratios.items() if rows <= 32]
            worst = min(ratios, key=lambda rows: ratios[rows])
            bars.append(
                bar(f"linear {precision}: best library's time over ours, worst M ({worst})", ratios[worst], 0.8)
            )
            bars.append(
                bar(f"linear {precision}: the same, geometric mean of M <= 32", statistics.geometric_mean(few), 1.0)
            )
    return bars


def library_linears(precision: str, out_features: int, in_features: int) -> dict[str, Callable[[torch.Tensor], object]]:
    """What torch, oneDNN and FBGEMM have for a precision, each with weights that rotate; x is fp32, as for ours."""
    size = out_features * in_features

    def weight() -> torch.Tensor:
        return torch.randn(out_features, in_features)

    calls: dict[str, Callable[[torch.Tensor], object]] = {}
    if precision == "fp32":
        plain = rotating(weight, 4 * size)
        return {"torch": lambda x: functional.linear(x, next(plain))}
    if precision == "bf16":
        halves = rotating(lambda: weight().bfloat16(), 2 * size)
        calls = {"torch": lambda x: functional.linear(x.bfloat16(), next(halves)).float()}
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            print("  oneDNN takes no bf16 on this processor")
            return calls
        prepacked = rotating(lambda: torch.ops.mkldnn._reorder_linear_weight(weight().bfloat16()), 2 * size)
        calls["oneDNN"] = lambda x: torch.ops.mkldnn._linear_pointwise(
            x.bfloat16(), next(prepacked), None, "none", [], ""
        ).float()
        return calls
    if precision in ("int8", "int4"):
        for engine, name in (("fbgemm", "FBGEMM"), ("onednn", "oneDNN")):
            if engine in torch.backends.quantized.supported_engines:
                calls[f"{name} int8"] = dynamic_int8(engine, rotating(partial(packed_int8, engine, weight), size))
    if precision == "int8":
        integers = rotating(lambda: torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8), size)
        calls["torch._int_mm"] = lambda x: int_mm(x, next(integers))
    if precision == "int4":
        scales = torch.rand(in_features // 64, out_features, 2).bfloat16()
        nibbles = rotating(partial(packed_int4, out_features, in_features), size // 2)
        calls["torch int4"] = lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.bfloat16(), next(nibbles), 64, scales
        ).float()
    return calls


def packed_int8(engine: str, weight: Callable[[], torch.Tensor]) -> object:
    torch.backends.quantized.engine = engine
    quantized = torch.quantize_per_tensor(weight(), 0.02, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(quantized, None)


def dynamic_int8(engine: str, turns: Iterator[object]) -> Callable[[torch.Tensor], object]:
    def call(x: torch.Tensor) -> object:
        torch.backends.quantized.engine = engine
        return torch.ops.quantized.linear_dynamic(x, next(turns), reduce_range=engine == "fbgemm" and not has_vnni())

    return call


def has_vnni() -> bool:
    library = load()
    return library is not None and "vnni" in library.instructions


def int_mm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    quantized, scale = quantize_int8(x)
    return torch._int_mm(quantized, weight.t()).float() * scale[:, None]


def packed_int4(out_features: int, in_features: int) -> torch.Tensor:
    codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.int32)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)


def rotating(make: Callable[[], Any], packed_bytes: int) -> Iterator[Any]:
    """Weights in turn, enough that each comes from memory."""
    return cycle([make() for _ in range(-(-ROTATED_BYTES // packed_bytes))])


def rotated(x: torch.Tensor, turns: Iterator[PackedLinear], tile: Tile) -> torch.Tensor:
    return linear(x, next(turns), tile)


def layers_step(layers: list[list[PackedLinear]], inputs: list[torch.Tensor]) -> None:
    for layer in layers:
        for x, packed in zip(inputs, layer):
            linear(x, packed)


def repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def bench_layers(share_s: float) -> None:
    """All linear layers of one transformer layer in turn: what a step of the engine does."""
    shapes = (
        (HIDDEN + 2 * KV_HEADS * HEAD_DIM, HIDDEN),
        (HIDDEN, HIDDEN),
        (2 * INTERMEDIATE, HIDDEN),
        (HIDDEN, INTERMEDIATE),
    )
    parameters = sum(n * k for n, k in shapes)
    print(f"\nthe four linear layers of a layer ({parameters / 1e6:.1f} M parameters), x 12, nothing else: tokens/s")
    for precision in ("bf16", "int8", "int4"):
        layers = [[pack(torch.randn(n, k), precision) for n, k in shapes] for _ in range(12)]
        for rows in (1, 16, 512):
            inputs = [torch.randn(rows, k) for _, k in shapes]
            ((median, fastest),) = take_turns([partial(layers_step, layers, inputs)], share_s, least=2)
            print(f"  {precision} M={rows:<4} {rows / median:8.0f} tok/s (fastest {rows / fastest:.0f})")


def bench_attention(share_s: float) -> list[dict[str, object]]:
    print("\npaged attention, GQA 16/4, head 64, block 16; GB/s of cache, median (fastest)")
    bars: list[dict[str, object]] = []
    for dtype, sequences, context in (
        ("bf16", 1, 1024),
        ("bf16", 16, 1024),
        ("fp32", 16, 1024),
        ("fp8", 16, 1024),
        ("int8", 16, 1024),
    ):
        caches, tables = paged(sequences, context, dtype)
        nbytes = caches[0].blocks.nbytes
        q, lengths = torch.randn(sequences, HEADS, HEAD_DIM), torch.full((sequences,), context, dtype=torch.int32)
        rotation, gathered, memory = cycle(caches), cycle(caches), cycle(readable(nbytes))
        sides: list[Callable[[], object]] = [
            lambda q=q, tables=tables, lengths=lengths, turns=rotation: decode_attention(
                q, next(turns), tables, lengths, HEAD_DIM**-0.5
            ),
            lambda turns=memory: linear(torch.ones(1, READ_WIDTH), next(turns)),
        ]
        if dtype in ("bf16", "fp32"):
            sides.append(lambda q=q, tables=tables, turns=gathered: gather_and_sdpa(q, next(turns), tables))
        (ours, ours_best), (read, read_best), *other = take_turns(sides, share_s, least=40)
        name = f"decode {dtype} B={sequences} L={context}"
        print(
            f"  {name}: {nbytes / ours / 1e9:.1f} ({nbytes / ours_best / 1e9:.1f}), {ours_best * 1e6:.0f} us"
            f"; reading as much {nbytes / read / 1e9:.1f} ({nbytes / read_best / 1e9:.1f})"
            + "".join(f"; gather + SDPA ({nbytes / best / 1e9:.1f})" for _, best in other)
        )
        if dtype == "bf16" and sequences == 16:
            bars.append(bar(f"{name}: of the read bandwidth", read_best / ours_best, 0.7))
        if other and sequences == 16:
            bars.append(bar(f"{name}: times faster than gather + SDPA", other[0][1] / ours_best, 4.0))
    for context, rows in ((0, 512), (0, 2048), (1536, 512)):
        for dtype in ("bf16", "int8"):
            (cache, *_), tables = paged(1, context + rows, dtype)
            q = torch.randn(rows, HEADS, HEAD_DIM)
            starts, before = torch.tensor([0, rows], dtype=torch.int32), torch.tensor([context], dtype=torch.int32)
            dense = torch.randn(1, HEADS, rows, HEAD_DIM)
            sides = [
                partial(prefill_attention, q, cache, tables, starts, before, HEAD_DIM**-0.5),
                partial(functional.scaled_dot_product_attention, dense, dense, dense, is_causal=True),
            ]
            (ours, ours_best), (_, dense_best) = take_turns(sides, share_s / 2)
            work = 4 * HEADS * HEAD_DIM * (rows * context + rows * (rows + 1) / 2)
            print(
                f"  prefill {dtype} {rows} rows after {context}: {ours * 1e3:.2f} ms ({ours_best * 1e3:.2f},"
                f" {work / ours_best / 1e9:.0f} GFLOP/s)"
                f"; torch's dense fp32 attention over the {rows} alone {dense_best * 1e3:.2f} ms"
            )
            if context == 0 and dtype == "bf16":
                name = f"prefill attention bf16 {rows} rows: times faster than dense SDPA"
                bars.append(bar(name, dense_best / ours_best, 1.0))
    return bars


def gather_and_sdpa(q: torch.Tensor, cache: PagedCache, tables: torch.Tensor) -> torch.Tensor:
    """What an engine without a paged kernel does: copy each sequence's blocks side by side, then torch's attention."""
    k, v = (part[tables.long()].transpose(1, 2).flatten(2, 3) for part in (cache.keys, cache.values))
    return functional.scaled_dot_product_attention(q[:, :, None].to(k.dtype), k, v, enable_gqa=True)


def readable(nbytes: int) -> list[PackedLinear]:
    """Memory of so many bytes, times as many as it takes to find none in a cache; a vector times it reads it all."""
    rows = max(1, nbytes // (4 * READ_WIDTH))
    copies = -(-ROTATED_BYTES // nbytes)
    return [pack(torch.ones(rows, READ_WIDTH), "fp32", backends=("cpp",)) for _ in range(copies)]


def bench_calls(share_s: float) -> list[dict[str, object]]:
    print("\none call from Python on a tiny model (hidden 256, one row)")
    x, weight, residual = torch.randn(1, 256), torch.ones(256), torch.randn(1, 256)
    packed, gate_up = pack(torch.randn(16, 256), "bf16"), torch.randn(1, 1024)
    calls: dict[str, Callable[[], object]] = {
        "linear 16 x 256": lambda: linear(x, packed),
        "add_rms_norm": lambda: fused.add_rms_norm(x, residual, weight, 1e-5),
        "swiglu": lambda: fused.swiglu(gate_up),
    }
    bars = []
    for name, call in calls.items():
        ((_, fastest),) = take_turns([partial(repeat, call, 100)], share_s / 4)
        print(f"  {name}: {fastest * 1e4:.1f} us")
        bars.append(
            {"name": f"call of {name}, us", "value": round(fastest * 1e4, 2), "target": 8.0, "ok": fastest * 1e4 <= 8}
        )
    return bars


def paged(sequences: int, context: int, dtype: str) -> tuple[list[PagedCache], torch.Tensor]:
    """Caches that hold so many sequences, as many as it takes to find none in a cache; blocks in random order."""
    blocks = sequences * -(-context // BLOCK)
    width = block_bytes(dtype, BLOCK, KV_HEADS, HEAD_DIM)
    copies = max(1, -(-ROTATED_BYTES // (blocks * width)))
    memory = zeros_on_huge_pages((copies, blocks, width), torch.uint8)
    caches = [PagedCache(part, dtype, BLOCK, KV_HEADS, HEAD_DIM) for part in memory]
    caches[0].write(torch.arange(blocks * BLOCK), *torch.randn(2, blocks * BLOCK, KV_HEADS, HEAD_DIM))
    for cache in caches[1:]:
        cache.blocks.copy_(caches[0].blocks)
    return caches, torch.randperm(blocks).int().view(sequences, -1).contiguous()


def bar(name: str, value: float, target: float) -> dict[str, object]:
    return {"name": name, "value": round(value, 3), "target": target, "ok": value >= target}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="about so long in all")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    library = load()
    if library is None:
        print(why_missing())
        print(json.dumps({"bars": []}))
        return 0
    print(f"C++: {library.instructions}; torch {torch.__version__}; {arguments.threads} threads")
    print(f"load average {os.getloadavg()[0]:.1f}")
    share_s = arguments.seconds / 30
    bars = bench_linear(share_s / 3)
    bench_layers(share_s)
    bars += bench_attention(share_s) + bench_calls(share_s)
    print(json.dumps({"bars": bars}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
