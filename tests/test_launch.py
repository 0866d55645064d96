"""Ranks that somebody else starts: what the environment says, and a server whose ranks are plain processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from paretune.runtime.engine import Engine, Request
from paretune.runtime.launch import Launch
from paretune.runtime.memory import memory_need
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.random_model import write_random_model
from paretune.runtime.sampler import SamplingParams
from paretune.runtime.spec import BadSpec, Deployment, Pool, save_deployment

POOL = {
    "weight_dtype": "fp32", "kv_cache_dtype": "fp32", "max_model_len": 128, "max_num_seqs": 4,
    "max_num_batched_tokens": 128, "num_kv_blocks": 32,
}  # fmt: skip
ENVIRONMENT = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "4000"}
PROMPT = list(range(9, 40))
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(
        tmp_path_factory.mktemp("model") / "tiny", vocab_size=300, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, dtype="float32",
    )  # fmt: skip


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def greedy(model_dir: Path) -> list[int]:
    engine = Engine(Deployment(pools=(Pool.model_validate(POOL),)), model_dir)
    engine.add(Request(0, np.array(PROMPT, np.int32), SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)))
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            tokens += output.token_ids
    return tokens


def ask(ready_file: Path, processes: list[subprocess.Popen[str]]) -> list[int]:
    """The greedy answer of the server that writes ready_file."""
    deadline = time.monotonic() + LIMIT_S
    while not ready_file.exists():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it never got ready"
        time.sleep(0.05)
    ready = json.loads(ready_file.read_text())
    body = {"model": ready["model"], "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(ready["url"] + "/v1/completions", json={**body, "return_token_ids": True}, timeout=60)
    assert answer.status_code == 200, answer.text
    token_ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return token_ids


SERVE = """
import sys
from pathlib import Path
from paretune.runtime.server import serve
from paretune.runtime.spec import load_deployment

sys.exit(serve(load_deployment(sys.argv[1]), port=0, ready_file=sys.argv[2]))
"""


@pytest.mark.parametrize("field", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_ranks_that_join_over_tcp_answer_like_one_and_leave_with_rank_0(
    field: str, model_dir: Path, tmp_path: Path
) -> None:
    spec, ready_file = tmp_path / "spec.yaml", tmp_path / "ready.json"
    pool = Pool.model_validate({**POOL, field: 2})
    save_deployment(Deployment(model=str(model_dir), pools=(pool,)), spec)
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SERVE, str(spec), str(ready_file)]
    processes = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        assert ask(ready_file, processes) == greedy(model_dir)
        for process in reversed(processes):  # as Ctrl-C and torchrun do; rank 0 decides what it means
            process.send_signal(signal.SIGTERM)
        assert [process.wait(LIMIT_S) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_torchrun_starts_the_ranks(model_dir: Path, tmp_path: Path) -> None:
    spec, ready_file = tmp_path / "spec.yaml", tmp_path / "ready.json"
    pool = Pool.model_validate({**POOL, "tensor_parallel_size": 2})
    save_deployment(Deployment(model=str(model_dir), pools=(pool,)), spec)
    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command = [*torchrun, str(free_port()), str(script), str(spec), str(ready_file)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert ask(ready_file, [process]) == greedy(model_dir)
        os.kill(json.loads(ready_file.read_text())["pid"], signal.SIGTERM)  # rank 0: the server ends, and all with it
        assert process.wait(LIMIT_S) == 0
    finally:
        process.terminate()
        process.communicate()


def test_the_environment_says_who_and_where() -> None:
    assert Launch.from_environment({}) is None
    launch = Launch.from_environment(ENVIRONMENT)
    assert launch is not None
    assert (launch.rank, launch.size, launch.local) == (1, 4, range(2))
    assert (launch.host, launch.address()) == ("127.0.0.1", "127.0.0.1")


@pytest.mark.parametrize(
    ("changes", "variable"),
    [
        ({"RANK": "4"}, "RANK"),
        ({"RANK": "-1"}, "RANK"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({"MASTER_PORT": ""}, "MASTER_PORT"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused_by_the_variables_name(
    changes: dict[str, str], variable: str
) -> None:
    with pytest.raises(BadSpec) as refused:
        Launch.from_environment({**ENVIRONMENT, **changes})
    assert refused.value.where == f"environment: {variable}"


def test_ranks_that_are_not_those_of_the_spec_are_refused() -> None:
    launch = Launch.from_environment(ENVIRONMENT)
    assert launch is not None
    launch.check(Pool(tensor_parallel_size=2, pipeline_parallel_size=2))
    for pool, where in (
        (Pool(tensor_parallel_size=2), "environment: WORLD_SIZE"),
        (Pool(tensor_parallel_size=4, replicas=2), "pools.0.replicas"),
        (Pool(tensor_parallel_size=4, max_loras=1), "pools.0.max_loras"),
    ):
        with pytest.raises(BadSpec) as refused:
            launch.check(pool)
        assert refused.value.where == where


def test_a_machine_needs_memory_for_its_own_ranks_only(model_dir: Path) -> None:
    shape = ModelShape.load(model_dir)
    pool = Pool.model_validate({**POOL, "pipeline_parallel_size": 2})
    first, second = (memory_need(shape, pool, ranks=[rank]) for rank in range(2))
    assert first.total_bytes + second.total_bytes == memory_need(shape, pool).total_bytes
