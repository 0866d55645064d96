"""Programs with Triton kernels, each in a process of its own: TRITON_INTERPRET counts when triton is imported, and the
process of the tests stays without triton."""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
import textwrap

PREAMBLE = r"""
import torch
from paretune.kernels import BadTile, Tile
from paretune.kernels.paged_cache import PagedCache
torch.manual_seed(0)

def tile(operator, **parameters):
    return Tile(operator, "triton", tuple(parameters.items()))

def check(result, oracle, tolerance):
    error = torch.nan_to_num((result.double() - oracle).abs(), nan=float("inf")).max().item()
    assert error < tolerance, error

def paged(lengths, kv_heads, head_dim, block_size, dtype):
    blocks = [-(-length // block_size) for length in lengths]
    order, taken = torch.randperm(sum(blocks) + 2).int(), 0
    tables = torch.zeros(len(lengths), max(blocks) + 1, dtype=torch.int32)
    cache = PagedCache.zeros(len(order), dtype, block_size, kv_heads, head_dim)
    cache.blocks.fill_(0x7F if dtype == "int8" else 0xFF)  # NaN in every float format
    if dtype == "int8":
        cache.key_scales.fill_(float("nan"))
        cache.value_scales.fill_(float("nan"))
    for s, length in enumerate(lengths):
        tables[s, : blocks[s]] = order[taken : taken + blocks[s]]
        taken += blocks[s]
        for p in range(length):
            slot = tables[s, p // block_size] * block_size + p % block_size
            cache.write(slot[None], *torch.randn(2, 1, kv_heads, head_dim))
    return cache, tables

def compiled(kernel, arch, kinds, constants, num_warps=4, num_stages=2):
    # machine code for a GPU that is not here, and the bytes of its stack, which are registers spilled
    import re, subprocess, tempfile, triton
    from pathlib import Path
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    unknown = (kinds.keys() | constants.keys()) - set(kernel.arg_names)
    assert not unknown, unknown
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    # sizes that are multiples of 16 in real models, and that Triton's launcher sees to be
    sizes = ("width", "out_features", "in_features", "x_stride", "weight_stride", "group_stride", "block_stride")
    sizes += ("q_stride", "k_stride", "v_stride", "head_stride")
    wide = [i for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr") or name in sizes]
    aligned = {(i,): [["tt.divisibility", 16]] for i in wide}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = dict(num_warps=num_warps, num_stages=num_stages)
    code = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(code.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        said = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return code, int(re.search(r"STACK:(\d+)", said)[1])
"""


# Importing torch and triton takes longer than most programs: one process has them, and forks for each program.
PARENT = r"""
import json, os, signal, sys, traceback
import triton
import paretune.kernels.moe
exec(sys.argv[1])
names = dict(globals())
for line in sys.stdin:
    program, output = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(300)
        file = os.open(output, os.O_WRONLY)
        os.dup2(file, 1), os.dup2(file, 2)
        code = 1
        try:
            exec(compile(program, "<program>", "exec"), names)
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@functools.cache
def _parent(interpret):
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PARENT, PREAMBLE]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.communicate)  # it ends when its input does
    return process


def run(program, interpret=True):
    """Run a program behind PREAMBLE; what it printed."""
    process = _parent(interpret)
    with tempfile.NamedTemporaryFile("r") as output:
        process.stdin.write(json.dumps((textwrap.dedent(program), output.name)) + "\n")
        process.stdin.flush()
        status = process.stdout.readline()
        printed = output.read()
    assert status == "0\n", printed[-3000:]
    return printed
