"""The Triton kernel of a mixture of experts where there is no GPU: results under the interpreter, and machine code."""

import importlib.util

import pytest

from .test_kernels_triton import run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no triton here: pip install triton (Linux)"
)


def test_every_token_gets_the_weighted_sum_of_its_experts() -> None:
    run("""
        from paretune.kernels.moe import Routing, reference, route
        from paretune.kernels.triton_moe import moe
        chosen = tile("linear", block_m=32, block_n=64, block_k=64)
        cases = ((45, 3, 2, 70, 33, torch.float32, 1e-4), (1, 4, 3, 33, 17, torch.float16, 1e-2))
        for rows, experts, k, hidden, inter, dtype, tolerance in cases:
            x, routing = torch.randn(rows, hidden).to(dtype), route(torch.randn(rows, experts), k, True)
            gate_up = (torch.randn(experts, 2 * inter, hidden) / hidden**0.5).to(dtype)
            down = (torch.randn(experts, hidden, inter) / inter**0.5).to(dtype)
            oracle = reference(x, routing, list(gate_up), list(down))
            check(moe(x, routing, gate_up, down, chosen), oracle, tolerance)
        halves = [moe(x, routing, gate_up[a:b], down[a:b], chosen, first=a) for a, b in ((0, 1), (1, 4))]
        check(halves[0].float() + halves[1].float(), oracle, tolerance)
        nobody = Routing(torch.zeros(1, 3, dtype=torch.int32), routing.weights)
        gate_up[1:] = float("nan")
        check(moe(x, nobody, gate_up, down, chosen), reference(x, nobody, list(gate_up), list(down)), tolerance)
        for wrong in (dict(gate_up=gate_up[:, 1:]), dict(down=down.float()), dict(tile=Tile("linear", "torch"))):
            try:
                moe(**(dict(x=x, routing=routing, gate_up=gate_up, down=down, tile=chosen) | wrong))
            except (ValueError, BadTile) as error:
                assert "moe: " in str(error)
            else:
                raise AssertionError("took what does not fit")
    """)


def test_numbers_of_rows_that_are_no_power_of_two_have_a_default_tile() -> None:
    run("""
        from types import SimpleNamespace
        from paretune.kernels import gpu_moe, placement
        from paretune.kernels.moe import reference, route
        for rows, chosen in ((23, 1), (45, 2), (1, 1)):
            x, routing = torch.randn(rows, 40), route(torch.randn(rows, 2), chosen, True)
            gate_up, down = torch.randn(2, 2 * 24, 40) / 6, torch.randn(2, 40, 24) / 5
            layer = [SimpleNamespace(precision="fp32", tiles=[Tile("linear", "torch")] * 33)] * 2
            packed = SimpleNamespace(stacks=(gate_up, down), gate_up=layer, first=0)
            check(gpu_moe.moe(x, routing, packed), reference(x, routing, list(gate_up), list(down)), 1e-4)
        tiles = [gpu_moe.default_tile("bf16", rows, "triton") for rows in range(1, 300)]
        assert {tile.get("block_m") for tile in tiles} == {16, 32, 64}
    """)


def test_the_tiles_are_the_rows_of_each_expert_cut_into_pieces() -> None:
    run("""
        from paretune.kernels.triton_moe import sorted_rows
        for _ in range(20):
            experts = torch.stack([torch.randperm(7)[:3] for _ in range(int(torch.randint(1, 90, ())))]).int()
            for first, count in ((0, 7), (2, 3), (6, 1)):
                rows = sorted_rows(experts, first, count, 16)
                taken = []
                for start, end, expert in zip(*(part.tolist() for part in rows[2:])):
                    assert end - start <= 16
                    taken += [(first + expert, rows.token[at].item()) for at in range(start, end)]
                flat = enumerate(experts.tolist())
                wanted = [(e, token) for token, chosen in flat for e in chosen if first <= e < first + count]
                assert taken == sorted(wanted)
                assert sorted(rows.place.flatten().tolist()) == list(range(experts.numel()))
    """)


def test_it_compiles_for_a_gpu_that_is_not_here() -> None:
    run(
        """
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from paretune.kernels.triton_moe import grouped_matmul_kernel as kernel
        kinds = dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), "*bf16")
        kinds |= dict.fromkeys(("row_ptr", "tile_start_ptr", "tile_end_ptr", "tile_expert_ptr"), "*i32")
        constants = dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64)
        signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, num_stages=3))
        assert "wgmma" in compiled.asm["ptx"]
    """,
        interpret=False,
    )
