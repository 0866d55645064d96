"""Adapters over HTTP: the real server in front of the real engine with the model that ships."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from paretune.runtime import worker
from paretune.runtime.engine import Engine
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.random_adapter import write_random_adapter
from paretune.runtime.request_log import RequestLog
from paretune.runtime.server import serve
from paretune.runtime.server.adapters import ServedAdapters
from paretune.runtime.server.app import ServedModel, Service
from paretune.runtime.server.replicas import Fleet, Replica
from paretune.runtime.small_model import MODEL_DIR
from paretune.runtime.spec import Adapter, Deployment, Pool
from paretune.runtime.text import ChatTemplate, Tokenizer
from paretune.traces import read

MODEL = "small"
POOL = Pool(
    weight_dtype="fp32", kv_cache_dtype="fp32", max_model_len=256, max_num_seqs=8, max_num_batched_tokens=256,
    num_kv_blocks=128, max_loras=2, max_lora_rank=8,
)  # fmt: skip


@dataclass
class Running:
    url: str
    folder: Path

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60)

    def answer(self, model: str) -> str:
        body = {"model": model, "prompt": "import os", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        response = self.post("/v1/completions", **body)
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text

    def models(self) -> list[str]:
        return [one["id"] for one in httpx.get(self.url + "/v1/models").json()["data"]]


@contextmanager
def running(
    folder: Path, *, replicas: int = 1, may_change: bool = True, log: Path | None = None, pool: Pool = POOL
) -> Iterator[Running]:
    """A server in a thread of its own, each engine in another; adapters a and b are loaded at the start."""
    shape = ModelShape.load(MODEL_DIR)
    for seed, name in enumerate(["a", "b", "c"]):
        write_random_adapter(folder / name, shape, rank=4, std=0.3, seed=seed)
    adapters = tuple(Adapter(name=name, path=str(folder / name)) for name in ("a", "b"))
    listener = socket.create_server(("127.0.0.1", 0))
    pairs = [socket.socketpair() for _ in range(replicas)]
    engines = [Engine(Deployment(pools=(pool,), adapters=adapters), MODEL_DIR) for _ in pairs]
    workers = [threading.Thread(target=drive, args=(engine, pair[1])) for engine, pair in zip(engines, pairs)]
    fleet = Fleet([Replica(index, lambda replica: None) for index in range(replicas)], pool)
    model = ServedModel(
        MODEL, shape.vocab_size, 256, frozenset({2}), Tokenizer.load(MODEL_DIR), ChatTemplate.load(MODEL_DIR)
    )
    request_log = None if log is None else RequestLog(log, block_size=4)
    served = ServedAdapters(MODEL, adapters, fleet, folder if may_change else None)
    service = Service(model, fleet, request_log=request_log, adapters=served)
    server = uvicorn.Server(uvicorn.Config(service.app(), lifespan="off", log_level="warning", access_log=False))

    async def run() -> None:
        loop = asyncio.get_running_loop()
        for replica, (ours, _) in zip(fleet.replicas, pairs):
            await loop.create_connection(lambda replica=replica: replica, sock=ours)
        await server.serve(sockets=[listener])
        for replica in fleet.replicas:
            replica.close()
        await asyncio.sleep(0)

    server_thread = threading.Thread(target=lambda: asyncio.run(run()))
    for thread in (*workers, server_thread):
        thread.start()
    try:
        wait_until(lambda: fleet.ready)
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", folder)
    finally:
        server.should_exit = True
        for thread in (server_thread, *workers):
            thread.join(30)
            assert not thread.is_alive()
        if request_log is not None:
            request_log.close()


def drive(engine: Engine, connection: socket.socket) -> None:
    connection.sendall(worker.frame((worker.READY,)))
    try:
        worker.run(engine, connection, worker.Inbox(connection))
    finally:
        connection.close()


def wait_until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("adapters"), replicas=2) as server:
        yield server


def test_an_adapter_is_asked_for_as_the_model(server: Running) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    assert {"small", "a", "b"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("a").id == "a"
    answers = {name: server.answer(name) for name in ("small", "a", "b")}
    assert len(set(answers.values())) == 3
    chat = client.chat.completions.create(model="a", messages=[{"role": "user", "content": "hi"}], max_tokens=5)
    assert chat.model == "a"
    assert httpx.get(server.url + "/v1/models/a").json()["parent"] == "small"


def test_a_model_that_nobody_has_is_not_found(server: Running) -> None:
    response = server.post("/v1/completions", model="nobody", prompt="x")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_adapters_come_and_go_while_the_server_runs(server: Running) -> None:
    assert server.post("/v1/completions", model="late", prompt="x").status_code == 404
    loaded = server.post("/v1/load_lora_adapter", lora_name="late", lora_path="c")
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'late' added successfully.")
    assert server.models() == ["small", "a", "b", "late"]
    answers = {server.answer("late") for _ in range(4)}  # both replicas, twice
    assert len(answers) == 1
    assert answers != {server.answer("small")}
    again = server.post("/v1/load_lora_adapter", lora_name="late", lora_path="c")
    assert again.status_code == 400
    assert again.json()["error"]["param"] == "lora_name"
    gone = server.post("/v1/unload_lora_adapter", lora_name="late")
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'late' removed successfully.")
    assert server.models() == ["small", "a", "b"]
    assert server.post("/v1/unload_lora_adapter", lora_name="late").status_code == 404
    # the name is free again, and means what it is loaded with now
    assert server.post("/v1/load_lora_adapter", lora_name="late", lora_path=str(server.folder / "a")).status_code == 200
    assert server.answer("late") == server.answer("a")
    assert server.post("/v1/unload_lora_adapter", lora_name="late").status_code == 200


def test_a_path_outside_the_folder_is_refused_however_it_is_written(server: Running, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(server.folder / "a", outside)
    link = server.folder / "link"
    link.symlink_to(outside)
    try:
        for path in (str(outside), f"../../{outside.name}", "link", "nowhere", "a\0b", "/", "..", "a/../.."):
            refused = server.post("/v1/load_lora_adapter", lora_name="x", lora_path=path)
            assert refused.status_code == 400, path
            assert refused.json()["error"]["param"] == "lora_path"
    finally:
        link.unlink()
    assert "x" not in server.models()


def test_an_adapter_that_does_not_fit_is_refused_with_its_reason_and_leaves_nothing(server: Running) -> None:
    folder = write_random_adapter(server.folder / "wide", ModelShape.load(MODEL_DIR), rank=9)
    refused = server.post("/v1/load_lora_adapter", lora_name="wide", lora_path="wide")
    assert refused.status_code == 400
    assert "max_lora_rank" in refused.json()["error"]["message"]
    shutil.rmtree(folder)
    write_random_adapter(folder, ModelShape.load(MODEL_DIR), rank=8)
    assert server.post("/v1/load_lora_adapter", lora_name="wide", lora_path="wide").status_code == 200
    assert server.post("/v1/unload_lora_adapter", lora_name="wide").status_code == 200


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{}", "lora_name"),
        (b"[]", "the body"),
        (b"{", "the body"),
        (b'{"lora_name": "", "lora_path": "a"}', "lora_name"),
        (b'{"lora_name": 3, "lora_path": "a"}', "lora_name"),
        (b'{"lora_name": "small", "lora_path": "a"}', "lora_name"),
        (b'{"lora_name": "x", "lora_path": "a", "load_inplace": true}', "load_inplace"),
    ],
)
def test_a_body_that_says_something_else_is_refused_by_field(server: Running, body: bytes, field: str) -> None:
    response = httpx.post(server.url + "/v1/load_lora_adapter", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


def test_the_request_log_names_the_adapter_and_the_reader_takes_it(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with running(tmp_path, log=log) as server:
        for name in ("a", "small", "b", "a"):
            server.answer(name)
    logged = [json.loads(line)["model"] for line in log.read_text().splitlines()]
    assert logged == ["a", "small", "b", "a"]
    trace = read(log)
    assert trace.adapter is not None
    assert trace.adapter.values() == ["a", None, "b", "a"]


def test_without_a_folder_nobody_changes_adapters(tmp_path: Path) -> None:
    with running(tmp_path, may_change=False) as server:
        assert server.models() == ["small", "a", "b"]
        assert server.post("/v1/load_lora_adapter", lora_name="late", lora_path="c").status_code == 404
        assert server.post("/v1/unload_lora_adapter", lora_name="a").status_code == 404


def test_an_adapter_that_vanished_ends_its_request_and_not_the_server(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with running(tmp_path, pool=POOL.model_copy(update={"max_loras": 1})) as server:
        before = server.answer("b")  # host memory holds one adapter: this one
        shutil.rmtree(tmp_path / "a")
        shutil.rmtree(tmp_path / "b")
        ended = server.post("/v1/completions", model="a", prompt="import os", max_tokens=5)
        assert (ended.status_code, ended.json()["choices"][0]["finish_reason"]) == (200, "abort")
        assert server.answer("b") == before
    assert "no adapter_config.json" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"served_model_name": "a"}, "served_model_name"),
        ({"adapter_dir": "/nowhere"}, "adapter_dir"),
        ({"adapter_dir": "/", "max_loras": 0}, "max_loras"),
    ],
)
def test_options_that_cannot_be_are_refused_before_loading(
    options: dict[str, Any], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    max_loras = options.pop("max_loras", 1)
    pool = POOL.model_copy(update={"max_loras": max_loras})
    adapters = (Adapter(name="a", path="x"),) if max_loras else ()
    assert serve(Deployment(pools=(pool,), adapters=adapters), port=0, **options) == 2
    assert word in capsys.readouterr().err
