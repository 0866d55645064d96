"""The engine's GPU path on a machine without a GPU: answers under Triton's interpreter, padding, devices, memory."""

import importlib.util
import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from paretune.profiler.hardware import accelerator
from paretune.profiler.tables import step_tables
from paretune.runtime import device
from paretune.runtime.device import Gpu, check_gpus, visible_to_replica
from paretune.runtime.engine import Engine, Request
from paretune.runtime.graph_sizes import captured_sizes, padded_rows
from paretune.runtime.memory import available_for, check_memory, memory_need
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.random_model import write_random_model
from paretune.runtime.runnable import check_runnable, fields_that_need_new_replicas
from paretune.runtime.sampler import SamplingParams
from paretune.runtime.small_model import MODEL_DIR
from paretune.runtime.spec import BadSpec, Deployment, Pool, parse_deployment

from .gpu_programs import run_on_the_cpu
from .triton_program import run

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no triton here: pip install triton (Linux)"
)
LIMITS = {
    "weight_dtype": "fp32", "kv_cache_dtype": "fp32", "max_model_len": 64, "max_num_seqs": 3,
    "max_num_batched_tokens": 16, "block_size": 4, "num_kv_blocks": 30,
}  # fmt: skip
GIB = 1 << 30
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 79 * GIB, 80 * GIB)


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 128, "dtype": "float32",
}  # fmt: skip
# of two layers the first is dense, the second has three experts and a shared one
EXPERTS = {
    "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
    "decoder_sparse_step": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emphatic(write_random_model(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=1, **SIZES))


@pytest.fixture(scope="module")
def mixture_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "mixture"
    return emphatic(write_random_model(folder, family="qwen2_moe", num_hidden_layers=2, **SIZES, experts=EXPERTS))


def emphatic(folder: Path) -> Path:
    """The model with layers that say something: with weights as small as they are written it repeats its embedding."""
    tensors = load_file(folder / "model.safetensors")
    layers = {name: 10 * tensor for name, tensor in tensors.items() if "proj" in name or "gate" in name}
    save_file(tensors | layers, folder / "model.safetensors")
    return folder


def requests() -> list[Request]:
    rng = np.random.default_rng(3)
    lengths_and_sampling = (
        (11, {"max_tokens": 5, "temperature": 0.0}),
        (3, {"max_tokens": 3, "temperature": 0.0}),
        (2, {"max_tokens": 4, "temperature": 1.0, "seed": 4, "top_p": 0.9, "logprobs": 20}),
    )
    return [
        Request(number, rng.integers(0, 64, length).astype(np.int32), SamplingParams(**sampling, ignore_eos=True))
        for number, (length, sampling) in enumerate(lengths_and_sampling)
    ]


def answers(engine: Engine) -> tuple[dict[str, list[int]], list[float]]:
    """Tokens by request, and all log-probabilities that any request asked for: tokens alone forgive small errors."""
    for request in requests():
        engine.add(request)
    found: dict[str, list[int]] = {}
    logprobs: list[float] = []
    while engine.has_work:
        for output in engine.step():
            found.setdefault(str(output.request_id), []).extend(output.token_ids)
            logprobs += [value for each in output.logprobs or () for _, value in each.top]
    return found, logprobs


@needs_triton
@pytest.mark.parametrize("model", ["model_dir", "mixture_dir"])
def test_the_gpu_path_answers_token_by_token_as_the_cpu_does(model: str, request: pytest.FixtureRequest) -> None:
    model_dir = request.getfixturevalue(model)
    expected, logprobs = answers(Engine(Deployment(pools=(Pool.model_validate(LIMITS),)), model_dir))
    asked = [
        (request.request_id, request.prompt_token_ids.tolist(), request.sampling.__dict__) for request in requests()
    ]
    printed = run_on_the_cpu(
        textwrap.dedent("""
        limits, folder, asked = LIMITS, MODEL, ASKED
        pool = Pool.model_validate({**limits, "accelerator": "H100", "cuda_graph_sizes": (1, 3)})
        engine = Engine(Deployment(pools=(pool,)), Path(folder))
        replays.clear()
        requests = [Request(n, np.array(p, np.int32), SamplingParams(**s)) for n, p, s in asked]
        print(json.dumps((*answers(engine, requests), replays)))
        """)
        .replace("LIMITS", repr(LIMITS))
        .replace("MODEL", repr(str(model_dir)))
        .replace("ASKED", repr(asked))
    )
    found, logprobs_found, replays = json.loads(printed.splitlines()[-1])
    assert found == expected
    assert len(logprobs) == 80
    assert logprobs_found == pytest.approx(logprobs, abs=1e-4)
    assert set(replays) == {1, 3}  # of one row, and of two and three rows padded to three


@needs_triton
def test_a_padded_decode_step_gives_every_row_what_it_had_alone_and_touches_no_other_block(model_dir: Path) -> None:
    run_on_the_cpu(
        textwrap.dedent("""
        from paretune.runtime.batch import HEADER, LOGITS, TARGET
        pool = Pool.model_validate({**LIMITS, "accelerator": "H100", "max_num_seqs": 4, "cuda_graph_sizes": (4,)})
        rank = ranks.Rank(pool, engines.ModelShape.load(Path(MODEL)), Path(MODEL), None)
        rank.capture()
        cache = rank._transformer.cache_blocks
        start = torch.randint(0, 120, cache.shape, dtype=torch.uint8)  # any bytes below 0x78 are finite floats
        width, batch = pool.max_model_len // pool.block_size, rank.batches[0]
        contexts = (9, 0, 26, 17)
        tables = np.random.default_rng(0).permutation(30)[:28].reshape(4, 7)
        for rows in (1, 2, 3, 4):
            places = [7 + row for row in range(rows)] + [1] * rows + list(contexts[:rows])
            places += [1 if rows < 3 or row != 1 else 0 for row in range(rows)] + [-1] * rows
            deepest = max(contexts[:rows]) // pool.block_size + 1
            places += np.pad(tables, ((0, 0), (0, 2)))[:rows, :deepest].ravel().tolist()
            batch.wire[: HEADER + len(places)] = [rows, rows, deepest, LOGITS, 0, TARGET, *places]
            results = []
            for padded in (True, False):
                cache.copy_(start)
                rank._gpu.graphs.sizes = (4,) if padded else ()
                replays.clear()
                rank.begin(0, HEADER + len(places))
                assert replays == ([4] if padded else [])
                results.append((rank.result(0).clone(), cache.clone()))
            (logits, blocks), (alone, blocks_alone) = results
            assert logits.shape == (rows - (rows >= 3), 64) and logits.isfinite().all()
            assert torch.allclose(logits, alone, rtol=1e-5, atol=1e-6)
            assert torch.allclose(blocks.view(torch.float32), blocks_alone.view(torch.float32), rtol=1e-5, atol=1e-6)
            touched = (blocks != start).any(2).any(0).nonzero()[:, 0].tolist()
            assert touched == sorted(int(tables[row, contexts[row] // 4]) for row in range(rows)), touched
        """)
        .replace("LIMITS", repr(LIMITS))
        .replace("MODEL", repr(str(model_dir)))
    )


def pool(**changes: object) -> Pool:
    return Pool.model_validate({"accelerator": "H100", **changes})


def test_a_gpu_that_is_not_here_is_refused_by_name_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_seen", lambda: ())
    with pytest.raises(BadSpec, match="accelerator") as refused:
        Engine(Deployment(pools=(pool(),)), MODEL_DIR)
    assert refused.value.exit_code == 2
    assert "doctor" in str(refused.value)


@pytest.mark.parametrize(
    ("spec", "here", "named"),
    [
        (pool(), (Gpu("NVIDIA L4", (8, 9), GIB, GIB),), "NVIDIA L4"),
        (pool(accelerator="L4"), (Gpu("NVIDIA L40S", (8, 9), GIB, GIB),), "NVIDIA L40S"),
        (pool(accelerator="Tesla V100"), (Gpu("Tesla V100-SXM2-32GB", (7, 0), GIB, GIB),), "7.0"),
        (pool(tensor_parallel_size=2), (H100,), "tensor_parallel_size"),
        (pool(replicas=3), (H100, H100), "replicas"),
    ],
)
def test_gpus_that_do_not_fit_the_spec_are_refused(
    monkeypatch: pytest.MonkeyPatch, spec: Pool, here: tuple[Gpu, ...], named: str
) -> None:
    monkeypatch.setattr(device, "_seen", lambda: here)
    with pytest.raises(BadSpec, match=named):
        check_gpus(spec, replicas=spec.replicas)


def test_gpus_that_fit_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_seen", lambda: (H100, H100))
    check_gpus(pool(tensor_parallel_size=2))
    check_gpus(pool(accelerator="h100", replicas=2), replicas=2)
    monkeypatch.setattr(device, "_seen", lambda: (Gpu("NVIDIA RTX PRO 6000 Blackwell", (12, 0), GIB, GIB),))
    check_gpus(pool(accelerator="RTX PRO 6000"))


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("pipeline_parallel_size", {"pipeline_parallel_size": 2}),
        ("context_parallel_size", {"context_parallel_size": 2}),
        ("max_lora_rank", {"max_loras": 1, "max_lora_rank": 512}),
        ("num_kv_blocks", {"num_kv_blocks": 1 << 27}),
    ],
)
def test_what_the_engine_does_on_the_cpu_alone_is_refused_on_gpus(field: str, changes: dict[str, int]) -> None:
    with pytest.raises(BadSpec, match=field):
        check_runnable(Deployment(pools=(pool(**changes),)))


def test_replicas_share_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(device.VISIBLE, raising=False)
    two = pool(replicas=2, tensor_parallel_size=2)
    assert [visible_to_replica(two, replica) for replica in range(2)] == ["0,1", "2,3"]
    monkeypatch.setenv(device.VISIBLE, "7,5,3,1")
    assert [visible_to_replica(two, replica) for replica in range(2)] == ["7,5", "3,1"]
    assert visible_to_replica(pool(), 0) is None


def test_device_memory_is_what_counts_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    half_full = Gpu(H100.name, H100.capability, 40 * GIB, 80 * GIB)
    monkeypatch.setattr(device, "_seen", lambda: (H100, half_full))
    two = pool(tensor_parallel_size=2, num_kv_blocks=4096)
    assert available_for(two) == pytest.approx(2 * (40 - 0.08 * 80) * GIB, abs=2)
    shape = ModelShape.load(MODEL_DIR)
    check_memory(shape, two)
    need = memory_need(shape, two)
    assert need.process_bytes == 0
    assert memory_need(shape, two.model_copy(update={"host_kv_blocks": 512})).kv_cache_bytes == need.kv_cache_bytes
    monkeypatch.setattr(device, "_seen", lambda: (H100, Gpu(H100.name, (9, 0), 7 * GIB, 80 * GIB)))
    with pytest.raises(BadSpec, match="num_kv_blocks"):
        check_memory(shape, two.model_copy(update={"num_kv_blocks": 1 << 20}))


def test_sizes_are_vllms_up_to_max_num_seqs() -> None:
    assert captured_sizes(pool(max_num_seqs=1)) == (1,)
    assert captured_sizes(pool(max_num_seqs=33)) == (1, 2, 4, 8, 16, 24, 32, 33)
    assert captured_sizes(pool(max_num_seqs=1024))[-3:] == (480, 496, 512)
    assert captured_sizes(pool(enforce_eager=True)) == ()
    assert captured_sizes(pool(cuda_graph_sizes=(3, 9))) == (3, 9)
    assert captured_sizes(Pool()) == ()
    sizes = captured_sizes(pool(max_num_seqs=100))
    for rows in range(1, 101):
        padded = padded_rows(sizes, rows)
        assert padded is not None
        assert rows <= padded < 2 * rows + 8
    assert padded_rows(sizes, 101) is None


def test_the_simulator_lets_a_step_take_what_the_captured_one_takes() -> None:
    shape, device = ModelShape.load(MODEL_DIR), accelerator("H100")
    plain = step_tables(device, shape, pool(max_num_seqs=20, enforce_eager=True))
    padded = step_tables(device, shape, pool(max_num_seqs=20, cuda_graph_sizes=(4, 20)))
    for rows, captured in ((0, 0), (1, 4), (4, 4), (5, 20), (20, 20), (21, 21)):
        assert padded.tables.tokens_s[rows] == plain.tables.tokens_s[captured]
    for rows, captured in ((0, 0), (3, 4), (19, 20)):
        assert padded.tables.samples_s[rows] == plain.tables.samples_s[captured]
    assert any("enforce_eager" in note for note in plain.not_modeled)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"accelerator": "cpu", "enforce_eager": True}, "enforce_eager"),
        ({"accelerator": "cpu", "cuda_graph_sizes": [4]}, "cuda_graph_sizes"),
        ({"cuda_graph_sizes": [4, 2]}, "ascending"),
        ({"cuda_graph_sizes": [0, 2]}, "ascending"),
        ({"cuda_graph_sizes": [256]}, "no decode step"),
        ({"cuda_graph_sizes": [4], "enforce_eager": True}, "enforce_eager"),
    ],
)
def test_graph_fields_that_mean_nothing_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(BadSpec, match=said):
        parse_deployment({"pools": [{"accelerator": "H100", **changes}]})


def test_tiles_of_captured_graphs_need_new_replicas() -> None:
    tiled = pool(tiles={"schema_version": 1, "tiles": [
        {"operator": "linear", "precision": "bf16", "rows": 8, "backend": "triton", "parameters": {}}
    ]})  # fmt: skip
    assert fields_that_need_new_replicas(pool(), tiled) == ("tiles",)


FAKE_GPU = """
import dataclasses
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.runtime.jit import JITFunction
from paretune.kernels import placement
from paretune.runtime import transformer
from paretune.runtime.device_batch import DeviceBatch
from paretune.kernels.gpu_linear import activation_dtype
from paretune.kernels.gpu_lora import GpuLoraSlots, RowTiles
from paretune.kernels.paged_cache import PagedCache
from paretune.kernels.tiles import TileTable
from paretune.runtime.adapters import matrices
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.parallel import Layout, shares
from paretune.runtime.weights import load_weights
from pathlib import Path

placement.on_gpu = lambda where: True
placement.capability = lambda device: (9, 0)
placement.multiprocessors = lambda device: 132
JITFunction.run = lambda self, *arguments, **options: None  # a kernel writes, and reads nothing that the host sees
mode = FakeTensorMode(allow_non_fake_inputs=False)


def indexed(x, index):
    # Tensor.__getitem__ asks for a CUDA build; these are the same views without
    dim = 0
    for each in index if isinstance(index, tuple) else (index,):
        if each is None:
            x = x.unsqueeze(dim)
            dim += 1
        elif isinstance(each, int):
            x = x.select(dim, each)
        else:
            first, last, _ = each.indices(x.shape[dim])
            x = x.narrow(dim, first, last - first)
            dim += 1
    return x


FakeTensor.__getitem__ = indexed


def faked(thing):
    # the same with every tensor on a GPU that is not here
    if isinstance(thing, torch.Tensor):
        there = torch.empty_strided(thing.shape, thing.stride(), dtype=thing.dtype, device="meta")
        return FakeTensor(mode, there, torch.device("cuda:0"))
    if isinstance(thing, (tuple, list)):
        return type(thing)(map(faked, thing))
    if dataclasses.is_dataclass(thing):
        fields = {field.name: faked(getattr(thing, field.name)) for field in dataclasses.fields(thing) if field.init}
        return type(thing)(**fields)
    return thing


def step(rows, tokens, width, decode_only, adapters):
    batch = object.__new__(DeviceBatch)
    sizes = dict(token_ids=tokens, positions=tokens, slot_mapping=tokens, query_start=rows + 1)
    for name, size in (sizes | dict(context_len=rows, length=rows, head_rows=rows)).items():
        setattr(batch, name, faked(torch.zeros(size, dtype=torch.int32)))
    batch.block_tables = faked(torch.zeros(rows, width, dtype=torch.int32))
    tiles = RowTiles(*(faked(torch.zeros(n, dtype=torch.int32)) for n in (tokens, 1, 1, 1))) if adapters else None
    batch.adapter_rows = batch.head_adapter_rows = tiles
    batch.decode_only, batch.max_query_rows = decode_only, tokens
    return batch


def check(folder, weight_dtype, kv_cache_dtype, ranks=1):
    shape, cpu = ModelShape.load(Path(folder)), torch.device("cpu")
    share = shares(shape, Layout(shards=ranks, expert_parallel=ranks > 1))[0]
    weights = load_weights(shape, Path(folder), share, weight_dtype, TileTable(), cpu)
    dtype = activation_dtype(weight_dtype)
    slots = GpuLoraSlots(matrices(shape, share), 2, 16, dtype, cpu)
    slots._a, slots._b, slots._scale = faked(slots._a), faked(slots._b), faked(slots._scale)
    slots._there = [[[True] * 2 for _ in parts] for parts in slots._there]
    summed = []
    model = transformer.Transformer(
        shape, weights, share, num_kv_blocks=20, host_kv_blocks=4, block_size=4, kv_cache_dtype=kv_cache_dtype,
        max_model_len=64, tiles=TileTable(), reduce=summed.append if ranks > 1 else None, adapters=slots, device=cpu,
        activations=dtype,
    )
    model._weights, model._cos, model._sin = faked(weights), faked(model._cos), faked(model._sin)
    model._cache = [PagedCache(faked(c.blocks), c.dtype, c.block_size, c.kv_heads, c.head_dim) for c in model._cache]
    for rows, tokens, decode_only in ((3, 3, True), (16, 16, True), (2, 21, False)):
        with mode, torch.inference_mode():
            logits = model.forward(step(rows, tokens, 5, decode_only, adapters=not decode_only))
        assert logits.shape == (rows, len(share.vocab))
        assert (logits.dtype, logits.device.type) == (torch.float32, "cuda")
    assert {x.dtype for x in summed} == ({dtype} if ranks > 1 else set())


with torch.inference_mode():
    for weight_dtype in ("fp32", "bf16", "fp16"):
        check(MIXTURE, weight_dtype, "bf16")
    check(MIXTURE, "bf16", "bf16", ranks=2)
    for weight_dtype in ("fp32", "bf16", "fp16", "fp8", "int8", "int4", "nvfp4", "mxfp4"):
        check(FOLDER, weight_dtype, "bf16")
    for kv_cache_dtype in ("fp32", "fp8", "int8"):
        check(FOLDER, "bf16", kv_cache_dtype)
    check(FOLDER, "bf16", "fp8", ranks=2)
"""


@needs_triton
def test_a_step_in_every_precision_stays_on_the_gpu_and_waits_for_nothing(tmp_path: Path, mixture_dir: Path) -> None:
    """On tensors that have a device and no numbers: whatever looked at a number, or lay elsewhere, would raise."""
    folder = write_random_model(
        tmp_path / "model", vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, family="qwen3",
    )  # fmt: skip
    program = FAKE_GPU.replace("FOLDER", repr(str(folder))).replace("MIXTURE", repr(str(mixture_dir)))
    run(program, interpret=False)
