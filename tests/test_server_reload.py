"""SIGHUP on the server as users run it: what changes at once, what takes new replicas, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from paretune.kernels.tiles import Tile, TileTable
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.random_adapter import write_random_adapter
from paretune.runtime.small_model import MODEL_DIR
from paretune.runtime.spec import Adapter, Deployment, Pool, save_deployment

from .test_server_process import MODEL, POOL, Server, gone, wait_until

RELOAD_LIMIT_S = 120.0


class Reloaded(Server):
    """A server whose spec file can be changed."""

    def __init__(self, folder: Path, options: dict[str, Any] | None = None, **pool: Any) -> None:
        self.spec = folder / "spec.yaml"
        self.steps = folder / "steps.jsonl"
        super().__init__(folder, pool=pool, spec_file=str(self.spec), step_log=str(self.steps), **(options or {}))
        self.deployment = Deployment().with_pool(**{**POOL, **pool})
        self.write()
        self.wait_until_ready()

    def write(self, **changes: Any) -> None:
        save_deployment(self.deployment.with_pool(**changes) if changes else self.deployment, self.spec)

    def reload(self, **changes: Any) -> str:
        """Change the spec, send SIGHUP, and wait; returns the result that the server counted."""
        self.write(**changes)
        return self.hang_up()

    def hang_up(self) -> str:
        before = self.reloads()
        self.process.send_signal(signal.SIGHUP)
        wait_until(lambda: sum(self.reloads().values()) > sum(before.values()), RELOAD_LIMIT_S)
        after = self.reloads()
        return next(result for result in after if after[result] != before.get(result, 0))

    def reloads(self) -> dict[str, float]:
        lines = [line for line in self.metrics().splitlines() if line.startswith("paretune:reloads_total{")]
        return {line.split('result="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    def metrics(self) -> str:
        return httpx.get(self.url + "/metrics").text

    def metric(self, name: str) -> float:
        lines = [line for line in self.metrics().splitlines() if line.startswith(name + "{")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def complete(self, **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "prompt": "import ", "max_tokens": 16, "temperature": 0, "ignore_eos": True, **fields}
        return httpx.post(self.url + "/v1/completions", json=body, timeout=120)


class Traffic:
    """Requests, one after the other in each of several threads, until it is stopped; the status of each."""

    def __init__(self, server: Reloaded, threads: int, **fields: Any) -> None:
        self.answers: list[tuple[int, int]] = []
        self._stop = threading.Event()
        self._server, self._fields = server, fields
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            response = self._server.complete(**self._fields)
            tokens = response.json()["usage"]["completion_tokens"] if response.status_code == 200 else 0
            self.answers.append((response.status_code, tokens))

    def stop(self) -> list[tuple[int, int]]:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
        return self.answers


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Reloaded]]:
    servers: list[Reloaded] = []

    def start(**options: Any) -> Reloaded:
        folder = tmp_path / str(len(servers))
        folder.mkdir()
        servers.append(Reloaded(folder, **options))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()


def test_limits_and_tiles_change_in_the_replicas_that_run(start: Callable[..., Reloaded]) -> None:
    server = start(max_num_seqs=8, max_num_batched_tokens=256)
    pids = [replica.pid for replica in server.replicas()]
    reference = server.complete().json()["choices"][0]["text"]
    traffic = Traffic(server, 6, max_tokens=24)
    wait_until(lambda: len(traffic.answers) >= 6, 60)
    tiles = TileTable(((("linear", "fp32", 8), Tile("linear", "torch" if no_compiler() else "cpp")),))
    assert server.reload(max_num_seqs=2, max_num_batched_tokens=32, max_queued_requests=100, tiles=tiles) == "changed"
    seen = len(traffic.answers)
    # those that ran when the limit fell run to their end
    wait_until(lambda: len(traffic.answers) > seen + 12, 60)
    assert set(traffic.stop()) == {(200, 24)}
    assert [replica.pid for replica in server.replicas()] == pids
    assert server.complete().json()["choices"][0]["text"] == reference
    assert server.complete(prompt="import os\n" * 30).status_code == 200
    assert server.hang_up() == "unchanged"
    server.process.send_signal(signal.SIGTERM)
    code, stderr = server.end()
    assert code == 0
    assert "reload changed: " in stderr
    records = [json.loads(line) for line in server.steps.read_text().splitlines()]
    assert max(record["num_rows"] for record in records) > 2
    last = records[-20:]
    assert max(record["num_rows"] for record in last) <= 2
    assert max(record["num_tokens"] for record in last) == 32


def no_compiler() -> bool:
    from paretune.kernels.cpu.build import load

    return load() is None


class Stream(threading.Thread):
    """A long answer that is read as it comes, until it is left."""

    def __init__(self, server: Reloaded, max_tokens: int) -> None:
        super().__init__()
        self.events: list[str] = []
        self.left = threading.Event()
        self._url = server.url + "/v1/completions"
        self._body = {"model": MODEL, "prompt": "x", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=120) as response:
            for line in response.iter_lines():
                self.events += [line] if line else []
                if self.left.is_set():
                    return


def test_what_needs_new_replicas_gets_them_and_no_request_is_dropped(start: Callable[..., Reloaded]) -> None:
    server = start(max_num_seqs=4, max_model_len=4096)
    [old] = server.replicas()
    stream = Stream(server, 4000)
    traffic = Traffic(server, 2)
    wait_until(lambda: len(stream.events) > 10, 60)
    assert server.reload(max_num_seqs=8, num_kv_blocks=300, weight_dtype="bf16") == "replaced"
    seen, answers = len(stream.events), len(traffic.answers)
    # the stream goes on where it began, and new requests elsewhere
    wait_until(lambda: len(stream.events) > seen + 10, 60)
    wait_until(lambda: len(traffic.answers) > answers + 4, 60)
    assert set(traffic.stop()) == {(200, 16)}
    assert len(server.replicas()) == 2
    # as a key, that is: the text of the answer may be about errors
    assert not any(event.startswith('data: {"error"') for event in stream.events)
    steps = server.metric("paretune:engine_steps_total")
    assert steps >= seen
    stream.left.set()
    stream.join(60)
    # the old replica ends with the last it has to do, and what it counted stays counted
    wait_until(lambda: gone([old]), 60)
    assert len(server.replicas()) == 1
    assert server.metric("paretune:engine_steps_total") >= steps
    assert 'num_gpu_blocks="300"' in server.metrics()
    wait_until(lambda: server.metric("vllm:kv_cache_usage_perc") == 0)
    assert server.complete().status_code == 200
    server.process.send_signal(signal.SIGTERM)
    code, stderr = server.end()
    assert code == 0
    assert "Traceback" not in stderr


def test_the_old_replica_finishes_what_it_began(start: Callable[..., Reloaded]) -> None:
    server = start(max_model_len=2048)
    stream = Stream(server, 700)
    wait_until(lambda: len(stream.events) > 10, 60)
    assert server.reload(num_kv_blocks=300) == "replaced"
    stream.join(120)
    assert len(stream.events) == 701
    assert stream.events[-1] == "data: [DONE]"


def test_new_replicas_have_the_adapters_of_the_spec_and_those_that_clients_loaded(
    start: Callable[..., Reloaded], tmp_path: Path
) -> None:
    shape = ModelShape.load(MODEL_DIR)
    for seed, name in enumerate(("a", "b", "c")):
        write_random_adapter(tmp_path / "adapters" / name, shape, rank=4, std=0.3, seed=seed)
    folder = str(tmp_path / "adapters")
    server = start(options={"adapter_dir": folder}, max_loras=2, max_lora_rank=8)
    adapters = tuple(Adapter(name=name, path=f"{folder}/{name}") for name in ("a", "b"))
    assert (
        httpx.post(f"{server.url}/v1/load_lora_adapter", json={"lora_name": "c", "lora_path": "c"}).status_code == 200
    )
    answer = server.complete(model="c").json()["choices"][0]["text"]

    def names() -> list[str]:
        return [one["id"] for one in httpx.get(f"{server.url}/v1/models").json()["data"]]

    server.deployment = server.deployment.model_copy(update={"adapters": adapters})
    assert server.reload() == "replaced"
    assert names() == [MODEL, "a", "b", "c"]
    assert {server.complete(model=name).status_code for name in names()} == {200}
    assert server.complete(model="c").json()["choices"][0]["text"] == answer
    assert httpx.post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": "b"}).status_code == 200
    assert server.reload(max_lora_rank=16) == "replaced"
    assert names() == [MODEL, "a", "b", "c"]  # what the spec says is there again
    server.deployment = server.deployment.model_copy(update={"adapters": adapters[:1]})
    # what cannot be had there leaves all as it is
    shutil.rmtree(tmp_path / "adapters" / "c")
    assert server.reload() == "refused"
    assert server.reload(max_loras=0) == "refused"
    assert names() == [MODEL, "a", "b", "c"]
    assert server.complete(model="c").json()["choices"][0]["text"] == answer
    assert httpx.post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": "c"}).status_code == 200
    assert server.reload() == "replaced"
    assert names() == [MODEL, "a"]
    assert server.complete(model="b").status_code == 404


def test_a_spec_that_cannot_be_had_leaves_the_old_one_running(start: Callable[..., Reloaded], tmp_path: Path) -> None:
    server = start()
    pids = [replica.pid for replica in server.replicas()]
    bad = ["pools: [", "model: no/such/model\n", "pools:\n- max_num_sequences: 3\n", "engine: vllm\n"]
    for text in bad:
        server.spec.write_text(text)
        assert server.hang_up() == "refused"
        assert server.metric("paretune:last_reload_successful") == 0
    assert server.reload(num_kv_blocks=10**9) == "refused"
    server.spec.unlink()
    assert server.hang_up() == "refused"
    assert [replica.pid for replica in server.replicas()] == pids
    assert server.complete().status_code == 200
    assert server.reload(max_num_seqs=3) == "changed"
    assert server.metric("paretune:last_reload_successful") == 1
    server.process.send_signal(signal.SIGTERM)
    code, stderr = server.end()
    assert code == 0
    refusals = [line for line in stderr.splitlines() if "reload refused" in line]
    assert len(refusals) == len(bad) + 2
    for named, line in zip(("spec.yaml", "model", "max_num_sequences", "engine", "num_kv_blocks"), refusals):
        assert named in line


def test_a_hangup_of_the_whole_group_is_a_reload_and_a_drain_may_come_during_one(
    start: Callable[..., Reloaded],
) -> None:
    server = start()
    before = server.replicas()
    for replica in before:
        os.kill(replica.pid, signal.SIGHUP)
    assert server.hang_up() == "unchanged"
    assert server.complete().status_code == 200
    server.write(weight_dtype="int8")
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(server.replicas()) == 2, 60)
    server.process.send_signal(signal.SIGTERM)
    code, stderr = server.end()
    assert code == 0
    assert "Traceback" not in stderr


def test_only_what_engines_cannot_take_on_needs_new_replicas() -> None:
    from paretune.runtime.runnable import fields_that_need_new_replicas

    built = Pool(max_num_seqs=8, max_num_batched_tokens=64)

    def needing(**changes: Any) -> tuple[str, ...]:
        return fields_that_need_new_replicas(built, Pool.model_validate({**built.model_dump(), **changes}))

    assert needing() == ()
    assert needing(max_num_seqs=4, max_num_batched_tokens=32, max_queued_requests=7) == ()
    assert needing(max_num_seqs=9) == ("max_num_seqs",)
    assert needing(max_num_batched_tokens=65) == ("max_num_batched_tokens",)
    assert needing(weight_dtype="int8", replicas=2) == ("replicas", "weight_dtype")
    tile = TileTable(((("linear", "bf16", 8), Tile("linear", "cpp")),))
    assert needing(tiles=tile) == ()
    sharded = Pool(tensor_parallel_size=2)
    assert fields_that_need_new_replicas(sharded, sharded.model_copy(update={"tiles": tile})) == ("tiles",)
