"""The operators on an NVIDIA GPU against what the GPU can do: time, and the part of its roofline, measured in the same
run. On a machine without a GPU it says so, prints its bars without values, and exits with 1.

    kernels_gpu.py [--seconds N]

The roofline of a call is the larger of bytes / bandwidth and operations / rate of a large matrix product, both measured
first: the bandwidth of a kernel that reads a gigabyte and writes another, not of the copy engine, which is slower. What
reads alone can go beyond it by some percent.
Calls are captured in one CUDA graph over inputs in turn, more of them than the L2 cache holds, so that a figure has
neither the host's launches in it nor the cache's help. Operators are timed with their default tile and with a few
others; the fastest is named: that is how the defaults are chosen. Shapes are those of Llama-3-8B.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bars import Bar, finish
from paretune.kernels import triton_decode_attention
from paretune.kernels.decode_attention import decode_attention
from paretune.kernels.fused import add_rms_norm, rope_and_cache, swiglu
from paretune.kernels.gpu_linear import default_tile
from paretune.kernels.linear import PackedLinear, linear, pack
from paretune.kernels.paged_cache import PagedCache, block_bytes
from paretune.kernels.prefill_attention import prefill_attention
from paretune.kernels.tiles import Tile
from paretune.runtime.device import gpus

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTER = 32, 8, 128, 4096, 14336
WEIGHTS = {"qkv": (HIDDEN + 2 * KV_HEADS * HEAD_DIM, HIDDEN), "gate_up": (2 * INTER, HIDDEN), "down": (HIDDEN, INTER)}
ROWS = (1, 16, 64, 128, 256, 2048)
DECODE = ((1, 1024), (1, 16384), (16, 1024), (64, 1024), (64, 4096))
PREFILL = ((1, 2048, 0), (4, 512, 0), (1, 512, 4096), (8, 64, 1024))  # sequences, new tokens, context
BLOCK_SIZE = 16
BEYOND_CACHE = 3  # times the L2 cache that the inputs in turn are
REPLAYS = 5
SCALE = HEAD_DIM**-0.5
ITEMSIZE = {"bf16": 2, "fp8": 1}  # of the KV cache
BAR_BANDWIDTH, BAR_PREFILL = 0.7, 0.5


def seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Of one of `calls`, captured one after the other: the median of REPLAYS replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    taken = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(taken)


class Card:
    """The ceilings of this GPU, measured: bytes moved (read and written) and bf16 operations a second."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        self.name, self.l2_bytes = properties.name, properties.L2_cache_size
        source = torch.randn(1 << 28, device="cuda")
        target = torch.empty_like(source)
        self.bytes_per_s = 2 * source.nbytes / seconds([lambda: torch.neg(source, out=target)] * 3)
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self.flops = 2 * 8192**3 / seconds([lambda: a @ b] * 5)

    def copies(self, nbytes: int) -> int:
        return max(4, min(200, -(-BEYOND_CACHE * self.l2_bytes // nbytes)))

    def row(self, taken_s: float, nbytes: float, flops: float = 0.0, rate: float = 1.0) -> dict[str, Any]:
        """rate: of the operations, over that of bf16."""
        bound_s = max(nbytes / self.bytes_per_s, flops / (rate * self.flops))
        return {"us": round(taken_s * 1e6, 2), "roofline": round(bound_s / taken_s, 3)}


def fastest(
    card: Card, tiles: dict[str, Tile | None], run: Callable[[Tile | None], float], bound: Sequence[float], until: float
) -> dict[str, Any]:
    """The row of the default tile, which comes first, and the fastest of all, with the time of each."""
    times: dict[str, float] = {}
    for name, tile in tiles.items():
        if times and time.monotonic() > until:
            break
        try:
            times[name] = run(tile)
        except Exception as error:  # a tile that this GPU has no room for: said in its place
            print(f"  {name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    best = min(times, key=lambda name: times[name])
    default = next(iter(times))
    found = card.row(times[default], *bound)
    found |= {"best": best, "best_us": round(times[best] * 1e6, 2)}
    return found | {"tried": {name: round(taken * 1e6, 2) for name, taken in times.items()}}


def stored_on_gpu(precision: str, out: int, inside: int) -> PackedLinear:
    """A weight of random numbers as it is stored: to round real ones on the host would take longer than to time it."""
    cuda = torch.device("cuda")
    small = pack(torch.randn(64, 128), precision, device=cuda)
    assert small.weight is not None
    columns = inside * small.weight.shape[1] // 128
    if small.weight.dtype == torch.uint8:
        weight = torch.randint(0, 256, (out, columns), dtype=torch.uint8, device=cuda)
    else:
        weight = (16 * torch.randn(out, columns, device=cuda)).to(small.weight.dtype)
    group = small.group_scale
    if group is not None:
        shape = (out, inside * group.shape[1] // 128)
        group = torch.rand(shape, device=cuda).to(group.dtype)
        if group.dtype == torch.uint8:
            group = torch.randint(100, 130, shape, dtype=torch.uint8, device=cuda)
    channel = None if small.channel_scale is None else torch.rand(out, device=cuda)
    return replace(small, out_features=out, in_features=inside, weight=weight, group_scale=group, channel_scale=channel)


def linears(card: Card, until: float) -> dict[str, Any]:
    """Of each precision with its default tiles, and for a while with others."""
    found: dict[str, Any] = {}
    for precision, bits, rate in (
        ("bf16", 16, 1.0), ("int4", 4.25, 1.0), ("fp8", 8, 2.0), ("int8", 8, 2.0), ("nvfp4", 4.5, 1.0),
    ):  # fmt: skip
        for name, (out, inside) in WEIGHTS.items():
            nbytes = out * inside * bits / 8
            first = stored_on_gpu(precision, out, inside)
            packed = [first]
            packed += [_copy(first) for _ in range(card.copies(int(nbytes)) - 1)]
            for rows in ROWS:
                if time.monotonic() > until:
                    return found
                x = torch.randn(rows, inside, device="cuda").to(torch.bfloat16)
                bound = (nbytes + 2 * rows * (inside + out), 2.0 * rows * out * inside, rate)

                def run(tile: Tile | None, x: Tensor = x, packed: list[PackedLinear] = packed) -> float:
                    return seconds([partial(linear, x, each, tile) for each in packed])

                tiles: dict[str, Tile | None] = {"default": None}
                if precision != "bf16":
                    tiles |= {_name(tile): tile for tile in _other_tiles(precision, rows)}
                found[f"linear {precision} {name} {rows}"] = fastest(card, tiles, run, bound, until)
            del packed, first
            torch.cuda.empty_cache()
    return found


def _copy(packed: PackedLinear) -> PackedLinear:
    assert packed.weight is not None
    group_scale = None if packed.group_scale is None else packed.group_scale.clone()
    return replace(packed, weight=packed.weight.clone(), group_scale=group_scale)


def _name(tile: Tile) -> str:
    return " ".join([tile.backend, *(f"{key}={value}" for key, value in tile.parameters)])


def _other_tiles(precision: str, rows: int) -> list[Tile]:
    """Beside the default: the other backend where it may be better, and for int4, which others follow, other tiles."""
    found = []
    if 16 < rows < 2048:
        backend = "triton" if default_tile(precision, rows).backend == "torch" else "torch"
        found.append(default_tile(precision, rows, backend))
    shapes: tuple[tuple[int, ...], ...] = ()
    if precision == "int4" and rows in (1, 64):
        shapes = ((16, 64, 256, 4, 3), (16, 32, 256, 4, 4)) if rows == 1 else ((64, 128, 128, 8, 2),)
    keys = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
    return found + [Tile("linear", "triton", tuple(zip(keys, shape))) for shape in shapes]


def filled_cache(precision: str, blocks: int) -> PagedCache:
    sizes = (precision, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    cache = PagedCache(torch.zeros((blocks, block_bytes(*sizes)), dtype=torch.uint8, device="cuda"), *sizes)
    k = torch.randn(BLOCK_SIZE, KV_HEADS, HEAD_DIM, device="cuda")
    cache.write(torch.arange(BLOCK_SIZE, device="cuda"), k, k)
    cache.blocks.copy_(cache.blocks[:1].clone().expand_as(cache.blocks))
    return cache


def decode_row(card: Card, precision: str, sequences: int, context: int, until: float) -> dict[str, Any]:
    per_call = -(-context // BLOCK_SIZE) * sequences
    nbytes = 2 * sequences * context * KV_HEADS * HEAD_DIM * ITEMSIZE[precision]
    calls = card.copies(nbytes)
    cache = filled_cache(precision, per_call * calls)
    tables = torch.randperm(per_call * calls, device="cuda").int().view(calls, sequences, -1)
    q = torch.randn(sequences, HEADS, HEAD_DIM, device="cuda").to(torch.bfloat16)
    lengths = torch.full((sequences,), context, dtype=torch.int32, device="cuda")

    def run(tile: Tile | None) -> float:
        return seconds([partial(decode_attention, q, cache, t, lengths, SCALE, tile) for t in tables])

    default = triton_decode_attention.default_tile(
        sequences * KV_HEADS, torch.cuda.get_device_properties(0).multi_processor_count, False, precision == "fp8"
    )
    splits = default.get("splits")
    tiles: dict[str, Tile | None] = {"default": None}
    for block_n, parts in ((64, 2 * splits), (64, splits), (64, splits // 2), (128, splits)):
        if 1 <= parts <= 64 and parts * block_n <= context:
            parameters = (("block_n", block_n), ("splits", parts), ("num_warps", 4), ("num_stages", 2))
            tile = Tile("decode_attention", "triton", parameters)
            if tile != default:
                tiles[_name(tile)] = tile
    return fastest(card, tiles, run, (nbytes, 4.0 * sequences * context * HEADS * HEAD_DIM), until)


def prefill_row(card: Card, precision: str, sequences: int, rows: int, context: int, until: float) -> dict[str, Any]:
    blocks, calls = -(-(rows + context) // BLOCK_SIZE), 8
    cache = filled_cache(precision, blocks * sequences * calls)
    tables = torch.randperm(blocks * sequences * calls, device="cuda").int().view(calls, sequences, -1)
    q = torch.randn(sequences * rows, HEADS, HEAD_DIM, device="cuda").to(torch.bfloat16)
    starts = torch.arange(0, (sequences + 1) * rows, rows, dtype=torch.int32, device="cuda")
    before = torch.full((sequences,), context, dtype=torch.int32, device="cuda")

    def run(tile: Tile | None) -> float:
        return seconds(
            [partial(prefill_attention, q, cache, t, starts, before, SCALE, tile, max_query_rows=rows) for t in tables]
        )

    tiles: dict[str, Tile | None] = {"default": None}
    for shape in ((64, 64, 4, 2), (128, 64, 8, 2), (128, 128, 8, 2)) if rows > 64 else ((32, 64, 4, 2),):
        tile = Tile("prefill_attention", "triton", tuple(zip(("block_m", "block_n", "num_warps", "num_stages"), shape)))
        tiles[_name(tile)] = tile
    pairs = rows * context + rows * (rows + 1) / 2
    cached = 2 * sequences * (rows + context) * KV_HEADS * HEAD_DIM * ITEMSIZE[precision]
    row = fastest(card, tiles, run, (cached + 2 * q.nbytes, 4.0 * sequences * pairs * HEADS * HEAD_DIM), until)
    if context == 0 and precision == "bf16":
        dense = [torch.randn(sequences, HEADS, rows, HEAD_DIM, device="cuda").to(torch.bfloat16) for _ in range(3)]
        attend = partial(functional.scaled_dot_product_attention, *dense, is_causal=True)
        row["torch_dense_us"] = round(1e6 * seconds([attend] * 8), 2)
    return row


def attentions(card: Card, until: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for precision in ITEMSIZE:
        for sequences, context in DECODE:
            if time.monotonic() > until:
                return found
            found[f"decode {precision} {sequences}x{context}"] = decode_row(card, precision, sequences, context, until)
            torch.cuda.empty_cache()
        for sequences, rows, context in PREFILL:
            if time.monotonic() > until:
                return found
            found[f"prefill {precision} {sequences}x{rows} after {context}"] = prefill_row(
                card, precision, sequences, rows, context, until
            )
            torch.cuda.empty_cache()
    return found


def elementwise(card: Card) -> dict[str, Any]:
    found: dict[str, Any] = {}
    weight = torch.ones(HIDDEN, device="cuda")
    cache = filled_cache("bf16", 256)
    angles = torch.randn(4096, HEAD_DIM // 2, device="cuda")

    def many(*shape: int) -> list[Tensor]:
        one = torch.randn(shape, device="cuda").to(torch.bfloat16)
        return [one.clone() for _ in range(min(40, card.copies(one.nbytes)))]

    for rows in (1, 64, 2048):
        xs, residuals = many(rows, HIDDEN), many(rows, HIDDEN)
        taken = seconds([partial(add_rms_norm, x, r, weight, 1e-5) for x, r in zip(xs, residuals)])
        found[f"add_rms_norm {rows}"] = card.row(taken, 4 * xs[0].nbytes)
        gates = many(rows, 2 * INTER)
        found[f"swiglu {rows}"] = card.row(seconds([partial(swiglu, g) for g in gates]), 1.5 * gates[0].nbytes)
        qkvs = many(rows, HEADS + 2 * KV_HEADS, HEAD_DIM)
        places = torch.arange(rows, device="cuda", dtype=torch.int32)
        taken = seconds(
            [
                partial(
                    rope_and_cache, *qkv.split_with_sizes((HEADS, KV_HEADS, KV_HEADS), 1), places, angles, angles,
                    cache, places,
                )
                for qkv in qkvs
            ]
        )  # fmt: skip
        found[f"rope_and_cache {rows}"] = card.row(taken, 2 * qkvs[0].nbytes)
    return found


def launches() -> dict[str, float]:
    """Microseconds that the host takes to launch one call, the GPU never waiting: what a step without graphs pays."""
    device = torch.device("cuda")
    x = torch.randn(1, HIDDEN, device=device).to(torch.bfloat16)
    packed = {p: pack(torch.randn(512, HIDDEN), p, device=device) for p in ("bf16", "fp8", "int8", "int4")}
    residual, weight = x.clone(), torch.ones(HIDDEN, device=device)
    calls: dict[str, Callable[[], object]] = {f"linear {p}": partial(linear, x, w) for p, w in packed.items()}
    calls["add_rms_norm"] = partial(add_rms_norm, x, residual, weight, 1e-5)
    found = {}
    for name, call in calls.items():
        for _ in range(20):
            call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(200):
            call()
        found[name] = round((time.perf_counter() - begin) / 200 * 1e6, 2)
        torch.cuda.synchronize()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240.0, help="for all of it; what has no time is left out")
    begun_s = time.monotonic()
    until = begun_s + parser.parse_args().seconds
    asked = {
        "decode attention, bf16, 64 sequences of 4,096 tokens: part of the bandwidth": BAR_BANDWIDTH,
        "prefill attention, bf16, one prompt of 2,048: part of the measured matrix rate": BAR_PREFILL,
        "linear, bf16, 1 row, geometric mean over the weights: part of the bandwidth": BAR_BANDWIDTH,
        "linear, int4, 1 row, geometric mean over the weights: part of the bandwidth": BAR_BANDWIDTH,
    }
    if not gpus():
        print("no NVIDIA GPU that torch sees: nothing was measured", file=sys.stderr)
        finish([Bar(name, None, target) for name, target in asked.items()], {})
        return 1
    card = Card()
    print(f"{card.name}: {card.bytes_per_s / 1e12:.2f} TB/s, {card.flops / 1e12:.0f} TFLOP/s bf16", file=sys.stderr)
    found: dict[str, Any] = {"launch_us": launches()}
    print(found["launch_us"], file=sys.stderr)
    found |= elementwise(card)
    now = time.monotonic()
    found |= linears(card, now + 0.65 * (until - now))
    found |= attentions(card, until)
    for name, row in found.items():
        if name != "launch_us":
            print(f"{name:34} { ({key: value for key, value in row.items() if key != 'tried'}) }", file=sys.stderr)

    def part(*names: str) -> float | None:
        rows = [found[name]["roofline"] for name in names if name in found]
        return statistics.geometric_mean(rows) if len(rows) == len(names) else None

    values = [part("decode bf16 64x4096"), part("prefill bf16 1x2048 after 0")]
    values += [part(*(f"linear {precision} {name} 1" for name in WEIGHTS)) for precision in ("bf16", "int4")]
    bars = [Bar(name, value, target) for (name, target), value in zip(asked.items(), values)]
    ceilings = {"bytes_per_s": card.bytes_per_s, "bf16_flops": card.flops, "l2_bytes": card.l2_bytes}
    finish(bars, {"gpu": card.name, "ceilings": ceilings, "rows": found}, "kernels_gpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
