"""Tensor parallel ranks: same answers, and no rank outlives or outwaits another."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from paretune.runtime import peers, rank
from paretune.runtime.batch import Batch
from paretune.runtime.context_part import ContextPart, context_part
from paretune.runtime.engine import Engine, Request
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.parallel import (
    Layout,
    RankFailed,
    shares,
    tensor_parallel_sizes,
    thread_environment,
    usable_cores,
)
from paretune.runtime.random_model import write_random_model
from paretune.runtime.sampler import SamplingParams
from paretune.runtime.spec import Deployment, Pool

VOCAB = 63
POOL = {
    "weight_dtype": "fp32", "kv_cache_dtype": "fp32", "max_model_len": 4096, "max_num_seqs": 8,
    "max_num_batched_tokens": 3000, "num_kv_blocks": 600, "tensor_parallel_size": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(
        tmp_path_factory.mktemp("model") / "tiny",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        dtype="float32",
    )


def deployment(**changes: object) -> Deployment:
    return Deployment(pools=(Pool.model_validate({**POOL, **changes}),))


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "paretune.runtime.rank" in " ".join(child.cmdline())]


def answers(engine: Engine) -> dict[int, list[int]]:
    rng = np.random.default_rng(0)
    for request_id, (length, sampling) in enumerate(
        [
            (2500, {"temperature": 0.0}),  # a wire longer than one message
            (40, {"temperature": 1.0, "top_p": 0.9, "seed": 4}),
            (7, {"temperature": 0.0, "min_tokens": 5, "stop_token_ids": tuple(range(0, VOCAB, 2))}),
        ]
    ):
        params = SamplingParams(max_tokens=12, **sampling)
        engine.add(Request(request_id, rng.integers(0, VOCAB, length).astype(np.int32), params))
    got: dict[int, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            got.setdefault(output.request_id, []).extend(output.token_ids)
    return got


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2, "max_num_batched_tokens": 300},
        {"context_parallel_size": 2, "max_num_batched_tokens": 1200},
    ],
    ids=str,
)
def test_ranks_answer_like_one_and_leave_with_the_engine(layout: dict[str, int], model_dir: Path) -> None:
    with Engine(deployment(tensor_parallel_size=1), model_dir) as engine:
        alone = answers(engine)
    with Engine(deployment(**{"tensor_parallel_size": 1, **layout}), model_dir) as engine:
        assert len(children()) == 1
        assert answers(engine) == alone
    assert children() == []


@pytest.mark.parametrize("weight_dtype", ["int4", "nvfp4"])
def test_ranks_compute_what_one_computes_where_weights_are_scaled_in_groups(weight_dtype: str, tmp_path: Path) -> None:
    """Of ten groups of 64 intermediate channels each rank has five; rows of x are rounded to int8 rank by rank."""
    folder = write_random_model(
        tmp_path / "wide", vocab_size=VOCAB, hidden_size=128, intermediate_size=640, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, dtype="float32",
    )  # fmt: skip
    logits = []
    for size in (1, 2):
        asked = deployment(weight_dtype=weight_dtype, tensor_parallel_size=size)
        with Engine(asked, folder, keep_logits=True) as engine:
            engine.add(Request(0, np.arange(40, dtype=np.int32), SamplingParams(max_tokens=1, temperature=0)))
            while engine.has_work:
                engine.step()
            logits.append(torch.cat([kept.logits for kept in engine.kept_logits]))
    error = (logits[1] - logits[0]).abs().max() / logits[0].abs().max()
    assert error < (0.05 if weight_dtype == "int4" else 0.01)


def test_a_killed_rank_ends_the_engine_with_its_name_and_signal(model_dir: Path) -> None:
    with Engine(deployment(), model_dir) as engine:
        engine.add(Request(0, np.arange(20, dtype=np.int32), SamplingParams(max_tokens=100, ignore_eos=True)))
        engine.step()
        os.kill(children()[0].pid, signal.SIGKILL)
        started_s = time.monotonic()
        with pytest.raises(RankFailed, match="rank 1 was killed by SIGKILL") as failed:
            engine.step()
        assert failed.value.exit_code == 1
        with pytest.raises(RankFailed):
            engine.step()
        assert time.monotonic() - started_s < 60


def test_a_rank_that_does_not_answer_is_not_waited_for_forever(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "COLLECTIVE_TIMEOUT_S", 4.0)
    monkeypatch.setattr(rank, "STOP_LIMIT_S", 0.5)
    with Engine(deployment(), model_dir) as engine:
        engine.add(Request(0, np.arange(20, dtype=np.int32), SamplingParams(max_tokens=100, ignore_eos=True)))
        os.kill(children()[0].pid, signal.SIGSTOP)
        started_s = time.monotonic()
        with pytest.raises(RankFailed, match="does not answer"):
            engine.step()
        assert time.monotonic() - started_s < 60
    assert children() == []


def test_a_rank_that_cannot_start_says_why(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RankFailed, match="rank 1 ended with exit code 1"):
        Engine(deployment(), model_dir)


def test_ranks_end_when_rank_0_is_killed(model_dir: Path, tmp_path: Path) -> None:
    program = tmp_path / "rank_0.py"
    program.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from paretune.runtime.engine import Engine\n"
        "from paretune.runtime.spec import parse_deployment\n"
        "engine = Engine(parse_deployment({'pools': [eval(sys.argv[2])]}), Path(sys.argv[1]))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, str(program), str(model_dir), repr(POOL)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        others = psutil.Process(process.pid).children(recursive=True)
        assert len(others) == 1
        process.kill()
        _, alive = psutil.wait_procs(others, timeout=60)
    assert alive == []


def test_stages_compute_other_steps_at_once_and_an_abort_between_them_leaves_nothing(model_dir: Path) -> None:
    with Engine(deployment(tensor_parallel_size=1, pipeline_parallel_size=2), model_dir) as engine:
        for request_id in range(4):
            params = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.0)
            engine.add(Request(request_id, np.arange(20, dtype=np.int32), params))
        seen = [{output.request_id for output in engine.step()} for _ in range(4)]
        assert seen[1:] == [{0, 1}, {2, 3}, {0, 1}]  # two of four in each step, after the first
        assert engine.abort(0)
        assert engine.abort(2)
        got: list[tuple[int, str | None]] = []
        while engine.has_work:
            got += [(output.request_id, output.finish_reason) for output in engine.step()]
        assert [request_id for request_id, reason in got if reason == "abort"] == [0, 2]
        assert {request_id for request_id, reason in got if reason is None} == {1, 3}
        assert engine.stats().kv_blocks_used == 0
        os.kill(children()[0].pid, signal.SIGKILL)
        engine.add(Request(9, np.arange(20, dtype=np.int32), SamplingParams(max_tokens=9)))
        with pytest.raises(RankFailed, match="rank 1 was killed by SIGKILL"):
            got.extend((output.request_id, None) for _ in range(9) for output in engine.step())


def test_each_rank_computes_its_part_of_a_long_prompt_and_all_of_a_short_one(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []

    def spy(batch: Batch, part: int, parts: int) -> ContextPart | None:
        found = context_part(batch, part, parts)
        computed.append((batch.token_ids.shape[0], (found or batch).token_ids.shape[0]))
        return found

    with Engine(deployment(tensor_parallel_size=1, context_parallel_size=2), model_dir) as engine:
        monkeypatch.setattr(rank, "context_part", spy)
        for request_id, length in enumerate((1000, 9)):
            engine.add(Request(request_id, np.zeros(length, np.int32), SamplingParams(max_tokens=2, ignore_eos=True)))
            while engine.has_work:
                engine.step()
    assert computed == [(1000, 500), (1, 1), (9, 9), (1, 1)]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_shares_of_all_ranks_are_the_whole_model(size: int, model_dir: Path) -> None:
    shape = ModelShape.load(model_dir)
    assert size in tensor_parallel_sizes(shape)
    found = shares(shape, Layout(shards=size))
    for part, total in (("heads", 8), ("intermediate", 48), ("vocab", VOCAB)):
        assert [i for share in found for i in getattr(share, part)] == list(range(total))
    copies = max(1, size // 4)
    assert [i for share in found for i in share.kv_heads] == sorted([*range(4)] * copies)
    for share in found:  # each rank has the KV heads that its query heads read
        assert {head // 2 for head in share.heads} == set(share.kv_heads)


def test_threads_wait_asleep_only_where_they_share_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    cores = usable_cores()
    assert "OMP_WAIT_POLICY" not in thread_environment(Pool(num_threads=cores))
    assert thread_environment(Pool(num_threads=cores, replicas=2))["OMP_WAIT_POLICY"] == "passive"
    assert thread_environment(Pool(num_threads=cores + 1))["OMP_NUM_THREADS"] == str(cores + 1)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert "OMP_WAIT_POLICY" not in thread_environment(Pool(num_threads=cores, replicas=2))


def test_the_engine_computes_with_the_threads_of_its_spec(model_dir: Path) -> None:
    for num_threads in (2, 1):
        Engine(deployment(tensor_parallel_size=1, num_threads=num_threads), model_dir)
        assert torch.get_num_threads() == num_threads
