"""Every C++ operator on odd sizes against float64, as a program: `python cpu_operator_sweep.py [library.so]`.

The library is one that was compiled for another processor, or with sanitizers; left out: this machine's own. Memory
that operators write to is NaN before, and so is every number of a cache that no sequence owns.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from paretune.kernels import Tile, decoder, fused, sampling
from paretune.kernels.cpu import build
from paretune.kernels.decode_attention import decode_attention
from paretune.kernels.decode_attention import reference as decode_reference
from paretune.kernels.decoder import Decoder, DecoderLayer, computes
from paretune.kernels.linear import linear, pack
from paretune.kernels.linear import reference as linear_reference
from paretune.kernels.lora import Delta, LoraSlots, Matrix, adapter_rows, pack_adapter
from paretune.kernels.lora import reference as lora_reference
from paretune.kernels.moe import moe, pack_experts, reference_route, route
from paretune.kernels.moe import reference as moe_reference
from paretune.kernels.paged_cache import CACHE_DTYPES, PagedCache
from paretune.kernels.prefill_attention import prefill_attention
from paretune.kernels.prefill_attention import reference as prefill_reference
from paretune.kernels.stored_weight import quantize_int8, store
from paretune.kernels.weight_formats import WEIGHT_FORMATS

SIZES = (1, 17, 127)


def poisoned(allocate):
    """torch.empty or its like, full of NaN: an entry that nobody wrote shows."""

    def allocate_poisoned(*arguments, **keywords):
        tensor = allocate(*arguments, **keywords)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return allocate_poisoned


def check(result, oracle, tolerance=1e-4):
    if oracle.numel() == 0:
        assert result.shape == oracle.shape
        return
    error = torch.nan_to_num((result.double() - oracle).abs(), nan=float("inf")).max()
    assert error <= tolerance * max(1.0, float(oracle.abs().max())), error


def sweep_linear():
    for rows, out_features, in_features in ((1, 1, 1), (1, 127, 17), (17, 17, 127), (127, 17, 1), (127, 127, 17)):
        x, weight, bias = (
            torch.randn(rows, in_features),
            torch.randn(out_features, in_features),
            torch.randn(out_features),
        )
        quantized, scale = quantize_int8(x)
        for k_block, serial in ((0, 0), (40, 0), (0, 1 << 20)):
            tile = Tile("linear", "cpp", (("k_block", k_block), ("serial_below_kmacs", serial)))
            for precision, form in WEIGHT_FORMATS.items():
                stored = store(weight, precision)
                multiplied = quantized.double() * scale[:, None].double() if form.arithmetic == "int8" else x
                oracle = linear_reference(multiplied, stored.expanded(), bias)
                check(linear(x, pack(stored, bias=bias), tile), oracle, 2e-2 if form.arithmetic == "bf16" else 1e-4)
        half = linear_reference(x.bfloat16(), weight.bfloat16())
        check(linear(x.bfloat16(), pack(weight, "bf16")), half, 2e-2)


def sweep_attention():
    lengths = [127, 0, 1, 17]
    tables = torch.full((4, 9), 1 << 30, dtype=torch.int32)
    used = [-(-length // 16) for length in lengths]
    order = torch.randperm(sum(used) + 1).int()
    for sequence, blocks in enumerate(used):
        tables[sequence, :blocks], order = order[:blocks], order[blocks:]
    owned = torch.cat(
        [tables[s].long()[torch.arange(n) // 16] * 16 + torch.arange(n) % 16 for s, n in enumerate(lengths)]
    )
    context = torch.tensor(lengths, dtype=torch.int32)
    # (tokens in the cache before, new ones): a whole prompt, an empty one, one token, the end of a prompt
    starts = torch.tensor([0, 127, 127, 128, 139], dtype=torch.int32)
    before = torch.tensor([0, 0, 0, 5], dtype=torch.int32)
    for dtype in CACHE_DTYPES:
        for heads, kv_heads, head_dim in ((1, 1, 2), (4, 1, 34), (8, 1, 64), (8, 2, 18), (3, 3, 128)):
            cache = PagedCache.zeros(sum(used) + 1, dtype, 16, kv_heads, head_dim)
            everywhere = torch.arange((sum(used) + 1) * 16)
            nothing = torch.full((len(everywhere), kv_heads, head_dim), float("nan"))
            cache.write(everywhere, nothing, nothing)
            cache.write(owned, *torch.randn(2, len(owned), kv_heads, head_dim))
            q, scale = torch.randn(4, heads, head_dim), head_dim**-0.5
            oracle = decode_reference(q, cache, tables, context, scale)
            for split, serial in ((16, 0), (65536, 1 << 20)):
                tile = Tile("decode_attention", "cpp", (("split_tokens", split), ("serial_below_tokens", serial)))
                check(
                    decode_attention(q, cache, tables, context, scale, tile), oracle, 2e-2 if dtype == "bf16" else 1e-4
                )
            q = torch.randn(139, heads, head_dim)
            tile = Tile("prefill_attention", "cpp", (("serial_below_kmacs", 0),))
            out = prefill_attention(q, cache, tables, starts, before, scale, tile)
            oracle = prefill_reference(q, cache, tables, starts, before, scale)
            check(out, oracle, 1e-4 if dtype == "fp32" else 2e-2)
            half = prefill_attention(q.bfloat16(), cache, tables, starts, before, scale, tile)
            check(half, prefill_reference(q.bfloat16(), cache, tables, starts, before, scale), 3e-2)
            none = torch.zeros(0, heads, head_dim)
            no_context, no_tables = torch.zeros(0, dtype=torch.int32), torch.zeros(0, 1, dtype=torch.int32)
            assert decode_attention(none, cache, no_tables, no_context, scale).shape == none.shape


def sweep_fused():
    for rows in SIZES:
        for width in SIZES:
            x, weight = torch.randn(rows, width), torch.randn(width)
            for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
                cast = x.to(dtype)
                check(fused.rms_norm(cast, weight, 1e-5), fused.reference_rms_norm(cast, weight, 1e-5), tolerance)
                residual = cast.clone()
                normed = fused.add_rms_norm(cast, residual, weight, 1e-5)
                check(normed, fused.reference_rms_norm(residual, weight, 1e-5), tolerance)
                gate_up = torch.randn(rows, 2 * width).to(dtype)
                check(fused.swiglu(gate_up), fused.reference_swiglu(gate_up), tolerance)
    for tokens in SIZES:
        for dtype in CACHE_DTYPES:
            for heads, kv_heads, head_dim in ((1, 1, 2), (8, 2, 34)):
                for number in (torch.float32, torch.bfloat16):
                    q = torch.randn(tokens, heads, head_dim).to(number)
                    k, v = torch.randn(2, tokens, kv_heads, head_dim).to(number)
                    angles, positions = torch.rand(200, head_dim // 2), torch.randint(0, 200, (tokens,))
                    slots = torch.randperm(8 * 17)[:tokens]
                    slots[tokens // 2] = -1
                    rotated = [fused.reference_rope(x, positions, angles.cos(), angles.sin()) for x in (q, k)]
                    cache = PagedCache.zeros(17, dtype, 8, kv_heads, head_dim)
                    cache.blocks.fill_(0xFF)
                    fused.rope_and_cache(q, k, v, positions, angles.cos(), angles.sin(), cache, slots)
                    check(q, rotated[0], 1e-5 if number is torch.float32 else 1e-2)
                    kept = slots >= 0
                    for found, x in zip(cache.read(torch.arange(17), 17 * 8), (rotated[1], v)):
                        check(found[slots[kept]], x[kept].double(), {"fp32": 1e-5, "fp8": 0.07}.get(dtype, 1e-2))


def sweep_sampling():
    for vocab in SIZES:
        logits = torch.randn(17, vocab)
        logits[3] = 0.0
        assert sampling.argmax(logits).tolist() == logits.argmax(dim=1).tolist()
        for top_k, top_p in ((0, 1.0), (1, 1.0), (5, 0.7), (0, 0.5), (1000, 0.9)):
            uniform = (torch.arange(17) / 17).double().numpy()
            cuts = np.full(17, min(top_k, vocab)), np.full(17, top_p)
            for row, token in enumerate(sampling.draw(logits, uniform, *cuts)):
                assert sampling.reference(logits[row], min(top_k, vocab), top_p)[token] > 0


def sweep_lora():
    for rows in SIZES:
        for in_features, parts, ranks in ((1, (1,), (1,)), (17, (127, 17), (17, 64)), (127, (17, 1, 127), (1, 64, 17))):
            matrix = Matrix(in_features, parts)
            sizes = tuple(enumerate(zip(ranks, parts)))
            adapters = [
                {part: Delta(torch.randn(r, in_features), torch.randn(n, r), 0.5) for part, (r, n) in sizes}
                for _ in range(3)
            ]
            slot_of_row = np.array(([2, -1, 0] + [1] * rows)[:rows], np.int32)
            for precision, tolerance in (("fp32", 1e-4), ("bf16", 2e-2)):
                slots = LoraSlots([matrix], 3, 64, precision)
                for slot, deltas in enumerate(adapters):
                    slots.put(
                        slot, pack_adapter({(0, part): each for part, each in deltas.items()}, [matrix], precision)
                    )
                x, y = torch.randn(rows, in_features), torch.randn(rows, sum(parts))
                oracle = lora_reference(x, y, slot_of_row, adapters, parts)
                slots.add(0, x, y, adapter_rows(slot_of_row, 3))
                check(y, oracle, tolerance)


def sweep_moe():
    for rows, experts, k, hidden, inter in (
        (0, 2, 1, 1, 1), (1, 1, 1, 1, 1), (1, 8, 8, 17, 127), (17, 33, 3, 127, 17), (127, 5, 2, 17, 1),
        (600, 2, 1, 33, 17),
    ):  # fmt: skip
        x, logits = torch.randn(rows, hidden), torch.randn(rows, experts)
        gate_up = [torch.randn(2 * inter, hidden) / hidden**0.5 for _ in range(experts)]
        down = [torch.randn(hidden, inter) / inter**0.5 for _ in range(experts)]
        for renormalize in (True, False):
            routing, expected = route(logits, k, renormalize), reference_route(logits, k, renormalize)
            assert torch.equal(routing.experts, expected.experts)
            check(routing.weights, expected.weights, 1e-6)
        for precision, tolerance in (("fp32", 1e-4), ("bf16", 3e-2), ("int8", 0.1), ("int4", 1.0)):
            stored = [[store(weight, precision) for weight in part] for part in (gate_up, down)]
            oracle = moe_reference(x, expected, *([each.expanded() for each in part] for part in stored))
            packed = [[pack(each) for each in part] for part in stored]
            check(moe(x, routing, pack_experts(*packed)), oracle, tolerance)
            if experts > 1:  # the experts of two ranks
                cuts = [pack_experts(*(part[a:b] for part in packed), a) for a, b in ((0, 1), (1, experts))]
                check(moe(x, routing, cuts[0]) + moe(x, routing, cuts[1]), oracle, tolerance)


def reference_rms(x, weight):
    return fused.reference_rms_norm(x, weight, 1e-5)


def decoder_layer_reference(x, layer, weights, step, cos, sin, heads, scale):
    """One layer in float64, but for what the cache rounds; it writes the cache."""
    head_dim, kv_heads = layer.cache.head_dim, layer.cache.kv_heads
    qkv = linear_reference(reference_rms(x, layer.input_norm), weights[0].expanded()).view(len(x), -1, head_dim)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    if layer.q_norm is not None:
        q, k = reference_rms(q, layer.q_norm), reference_rms(k, layer.k_norm)
    q, k = (fused.reference_rope(each, step.positions, cos, sin) for each in (q, k))
    layer.cache.write(step.slot_mapping, k.float(), v.float())
    mixed = prefill_reference(q, layer.cache, step.block_tables, step.query_start, step.context_len, scale)
    x = x + linear_reference(mixed.flatten(1), weights[1].expanded())
    gated = fused.reference_swiglu(linear_reference(reference_rms(x, layer.post_norm), weights[2].expanded()))
    return x + linear_reference(gated, weights[3].expanded())


class ExactWorkspace:
    """As much as was asked for, on the heap: what is written behind it a sanitizer sees. Full of NaN at every call."""

    def __init__(self):
        self.nbytes, self._memory = 0, torch.zeros(1)

    @property
    def address(self):
        self._memory = torch.full((-(-self.nbytes // 4) + 16,), float("nan"))
        return -(-self._memory.data_ptr() // 64) * 64

    def grow(self, nbytes):
        self.nbytes = nbytes


def sweep_decoder():
    """Two layers on prompts of three and one tokens and a request that decodes, and on one of 150 tokens."""
    hidden, inter, heads, kv_heads, head_dim, vocabulary = 17, 127, 4, 2, 6, 33
    qkv, blocks = (heads + 2 * kv_heads) * head_dim, 53
    for precision, cache_dtype, tolerance in (("fp32", "fp32", 1e-4), ("bf16", "bf16", 5e-2), ("int8", "int8", 0.2)):
        shapes = ((qkv, hidden), (hidden, heads * head_dim), (2 * inter, hidden), (hidden, inter))
        caches = [PagedCache.zeros(blocks, cache_dtype, 3, kv_heads, head_dim) for _ in range(2)]
        stored = [[store(torch.randn(n, k) / k**0.5, precision) for n, k in shapes] for _ in caches]
        norms, head_norms = torch.rand(2, 2, hidden) + 0.5, torch.rand(2, 2, head_dim) + 0.5
        layers = []
        for index, (cache, weights) in enumerate(zip(caches, stored)):
            packed = [pack(weight) for weight in weights]
            of_heads = head_norms[index] if precision != "int8" else (None, None)
            normed = (norms[index, 0], packed[0], *of_heads, packed[1], norms[index, 1])
            layers.append(DecoderLayer(*normed, *packed[2:], cache))
        embedding, norm = torch.randn(vocabulary, hidden), torch.rand(hidden) + 0.5
        embedding = embedding.bfloat16() if precision == "bf16" else embedding
        head = store(torch.randn(vocabulary, hidden) / hidden**0.5, precision)
        cos, sin = torch.rand(160, head_dim // 2), torch.rand(160, head_dim // 2)
        sizes = {"heads": heads, "eps": 1e-5, "scale": head_dim**-0.5}
        assert computes(layers, embedding, pack(head))
        whole = Decoder(layers, embedding, norm, pack(head), cos, sin, **sizes)
        stage = Decoder(layers, None, norm, None, cos, sin, **sizes)
        for starts, context in (([0, 3, 4, 5], [0, 0, 2]), ([0, 1, 2, 3], [0, 1, 2]), ([0, 150], [0])):
            spans = list(zip(starts, starts[1:], context))
            step = SimpleNamespace(
                token_ids=torch.randint(0, vocabulary, (starts[-1],)),
                positions=torch.cat([torch.arange(b - a) + c for a, b, c in spans]),
                slot_mapping=torch.cat([3 * at + torch.arange(b - a) + c for at, (a, b, c) in enumerate(spans)]),
                block_tables=torch.arange(len(spans) * (blocks - 2), dtype=torch.int32).view(len(spans), -1) % blocks,
                query_start=torch.tensor(starts, dtype=torch.int32),
                context_len=torch.tensor(context, dtype=torch.int32),
                length=torch.tensor(context, dtype=torch.int32) + torch.tensor(starts).diff().int(),
                head_rows=torch.tensor(starts[1:]) - 1,
                decode_only=starts[-1] == 3,
            )
            if len(spans) > 1:
                step.block_tables[:, 0] = torch.arange(len(spans))
            random = torch.randn(2, 12, kv_heads, head_dim)
            for cache in caches:
                cache.write(torch.arange(12), *random)
            x = embedded = embedding[step.token_ids].double()
            for layer, weights in zip(layers, stored):
                x = decoder_layer_reference(x, layer, weights, step, cos, sin, heads, sizes["scale"])
            expected = linear_reference(reference_rms(x[step.head_rows], norm), head.expanded())
            for call, oracle, rows in ((whole, expected, step.head_rows), (whole, expected[:0], step.head_rows[:0]),
                                       (stage, x, step.head_rows)):  # fmt: skip
                for cache in caches:
                    cache.write(torch.arange(12), *random)
                step.head_rows = rows
                check(call(step, embedded.float() if call is stage else None, None), oracle, tolerance)
                step.head_rows = torch.tensor(starts[1:]) - 1


if __name__ == "__main__":
    if len(sys.argv) > 1:
        other = build.Library(Path(sys.argv[1]))
        build._attempt = lambda: build._Attempt(other, None)
    torch.manual_seed(0)
    torch.set_num_threads(2)
    torch.empty, torch.Tensor.new_empty = poisoned(torch.empty), poisoned(torch.Tensor.new_empty)
    assert torch.ones(1).new_empty(9).isnan().all()
    sweep_linear()
    sweep_attention()
    sweep_fused()
    sweep_sampling()
    sweep_lora()
    sweep_moe()
    decoder.WORKSPACE = ExactWorkspace()
    sweep_decoder()
    library = build.load()
    assert library is not None
    sys.stdout.write(f"all right {library.instructions}\n")
