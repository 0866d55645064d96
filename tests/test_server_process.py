"""The server as users run it: processes, signals, exit codes, the real engine with the model that ships."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import psutil
import pytest

from paretune.runtime.server import serve
from paretune.runtime.server.process import listen
from paretune.runtime.spec import Deployment, save_deployment
from paretune.traces import read

MODEL = "paretune/small"
POOL = {"max_model_len": 512, "num_kv_blocks": 256, "max_num_seqs": 16, "weight_dtype": "fp32"}
SCRIPT = """
import json, sys
from paretune.runtime.server import serve
from paretune.runtime.spec import Deployment

pool, options = json.loads(sys.argv[1]), json.loads(sys.argv[2])
sys.exit(serve(Deployment().with_pool(**pool), **options))
"""
LOAD_LIMIT_S = 120.0


class Server:
    """A server in a process of its own."""

    def __init__(self, folder: Path, *, pool: dict[str, Any] | None = None, **options: Any) -> None:
        self.ready_file = folder / "ready.json"
        options = {"port": 0, "ready_file": str(self.ready_file), **options}
        command = [sys.executable, "-c", SCRIPT, json.dumps({**POOL, **(pool or {})}), json.dumps(options)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)

    def wait_until_ready(self) -> Server:
        wait_until(lambda: self.ready_file.exists() or self.process.poll() is not None, LOAD_LIMIT_S)
        assert self.process.poll() is None, self.process.communicate()[1]
        ready = json.loads(self.ready_file.read_text())
        assert ready["pid"] == self.process.pid
        self.url = ready["url"]
        return self

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0)

    def replicas(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if is_replica(child)]

    def end(self, limit_s: float = 90.0) -> tuple[int, str]:
        """(exit code, stderr) once it has ended; no process of it may be left."""
        _, stderr = self.process.communicate(timeout=limit_s)
        return self.process.returncode, stderr


def wait_until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def is_replica(process: psutil.Process) -> bool:
    try:
        return "runtime.worker" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # a zombie, too: it has ended
        return False


def gone(processes: list[psutil.Process]) -> bool:
    return not any(map(alive, processes))


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def refuses(url: str) -> bool:
    """Whether nobody listens at the address any more."""
    address = urlsplit(url)
    with socket.socket() as probe:
        return probe.connect_ex((address.hostname, address.port)) == errno.ECONNREFUSED


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(**options: Any) -> Server:
        folder = tmp_path / str(len(servers))
        folder.mkdir()
        servers.append(Server(folder, **options))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()


def test_the_loop_closes_with_the_real_engine_and_sigterm_drains_it(
    start: Callable[..., Server], tmp_path: Path
) -> None:
    log, steps = tmp_path / "log" / "requests.jsonl", tmp_path / "log" / "steps.jsonl"
    server = start(request_log=str(log), step_log=str(steps)).wait_until_ready()
    client = server.client()
    prompt = "import os\nimport sys\nimport json\nimport asyncio\n\n\ndef main() -> None:\n    "
    whole = client.completions.create(model=MODEL, prompt=prompt, max_tokens=24, temperature=0)
    chunks = list(client.completions.create(model=MODEL, prompt=prompt, max_tokens=24, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert whole.usage is not None
    seeded = [
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=12, seed=5).choices[0].text for _ in range(2)
    ]
    assert seeded[0] == seeded[1]
    chat = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=4,
        logprobs=True,
        top_logprobs=2,
        extra_body={"ignore_eos": True},
    )
    assert chat.choices[0].logprobs is not None
    assert len(chat.choices[0].logprobs.content or []) == 4

    children = psutil.Process(server.process.pid).children(recursive=True)
    stream = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=400, stream=True, extra_body={"ignore_eos": True, "min_tokens": 400}
    )
    next(stream)
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: refuses(server.url))
    assert len(list(stream)) == 399
    code, stderr = server.end()
    assert code == 0
    assert "Traceback" not in stderr
    assert gone(children)
    assert not server.ready_file.exists()

    trace = read(log)
    assert trace.input_tokens.tolist() == [whole.usage.prompt_tokens] * 4 + [12] + [whole.usage.prompt_tokens]
    assert trace.output_tokens.tolist()[:1] == [whole.usage.completion_tokens]
    assert trace.output_tokens.tolist()[-1] == 400
    records = [json.loads(line) for line in steps.read_text().splitlines()]
    computed = sum(int(trace.input_tokens[i]) + int(trace.output_tokens[i]) - 1 for i in range(len(trace)))
    cached = sum(json.loads(line)["usage"]["prompt_tokens_details"]["cached_tokens"] for line in log.open())
    assert cached > 0
    assert sum(record["num_tokens"] for record in records) == computed - cached


def test_a_second_signal_ends_the_streams_that_run_with_an_error(start: Callable[..., Server]) -> None:
    server = start(pool={"max_model_len": 4096}).wait_until_ready()
    children = psutil.Process(server.process.pid).children(recursive=True)
    stream = server.client().completions.create(
        model=MODEL, prompt="import ", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    os.kill(server.process.pid, signal.SIGINT)
    wait_until(lambda: refuses(server.url))
    os.kill(server.process.pid, signal.SIGINT)
    with pytest.raises(openai.APIError, match="the server ended"):
        list(stream)
    code, stderr = server.end()
    assert code == 0
    assert "Traceback" not in stderr
    assert gone(children)


def test_two_replicas_serve_and_one_that_is_killed_ends_the_server_with_1(start: Callable[..., Server]) -> None:
    server = start(pool={"replicas": 2, "max_model_len": 4096}).wait_until_ready()
    client = server.client()
    answers = [
        client.completions.create(model=MODEL, prompt="import ", max_tokens=8, temperature=0).choices[0].text
        for _ in range(4)
    ]
    assert len(set(answers)) == 1
    children = psutil.Process(server.process.pid).children(recursive=True)
    stream = client.completions.create(
        model=MODEL, prompt="import ", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    server.replicas()[0].kill()
    with pytest.raises(openai.APIError, match="replica 0 stopped"):
        list(stream)
    code, stderr = server.end()
    assert code == 1
    assert "replica 0 stopped (killed by SIGKILL)" in stderr
    assert "Traceback" not in stderr
    assert gone(children)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a replica ends at its next step, by its closed socket")
def test_no_replica_outlives_a_server_that_is_killed(start: Callable[..., Server]) -> None:
    server = start(pool={"replicas": 2})
    wait_until(lambda: len(server.replicas()) == 2, 60)
    loading = psutil.Process(server.process.pid).children(recursive=True)
    time.sleep(1.0)
    server.process.kill()
    server.process.communicate()
    wait_until(lambda: gone(loading))


def test_hundreds_of_clients_that_leave_in_mid_stream_leave_no_block_held(start: Callable[..., Server]) -> None:
    server = start().wait_until_ready()
    host, port = server.url.removeprefix("http://").split(":")
    body = {"model": MODEL, "prompt": "import os\n" * 8, "max_tokens": 400, "ignore_eos": True, "stream": True}
    data = json.dumps(body).encode()
    request = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data

    def metric(name: str) -> float:
        lines = httpx.get(server.url + "/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))

    left, batch = 0, 40
    for _ in range(10):
        connections = [socket.create_connection((host, int(port)), timeout=60) for _ in range(batch)]
        for connection in connections:
            connection.sendall(request)
        # the first tokens of some, and the others in the queue
        assert connections[0].recv(12) == b"HTTP/1.1 200"
        for connection in connections:
            connection.close()
        left += batch
    gone_s = time.monotonic()
    wait_until(lambda: metric("vllm:request_success_total") == left, 60)
    for name in ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting"):
        wait_until(lambda name=name: metric(f"vllm:{name}") == 0)  # type: ignore[misc]
    # they were aborted, not finished: that would have taken 160,000 tokens
    assert metric("vllm:e2e_request_latency_seconds_count") == 0
    assert metric("vllm:generation_tokens_total") < left * 100
    assert time.monotonic() - gone_s < 60
    assert server.client().completions.create(model=MODEL, prompt="x", max_tokens=4).choices[0].finish_reason


def test_keys_stand_in_no_log_no_metric_and_no_other_process(start: Callable[..., Server], tmp_path: Path) -> None:
    right, wrong = "sk-right-0123456789", "sk-wrong-9876543210"
    logs = {"request_log": str(tmp_path / "requests.jsonl"), "step_log": str(tmp_path / "steps.jsonl")}
    server = start(api_keys=["sk-other", right], **logs).wait_until_ready()
    shown = [json.dumps(psutil.Process(server.replicas()[0].pid).environ())]
    for key, status in ((right, 200), (wrong, 401)):
        headers = {"authorization": f"Bearer {key}", "x-app": "test"}
        body = {"model": MODEL, "prompt": "x", "max_tokens": 2}
        response = httpx.post(server.url + "/v1/completions", json=body, headers=headers)
        assert response.status_code == status
        shown.append(response.text)
    with socket.create_connection(tuple(server.url.removeprefix("http://").split(":"))) as connection:
        connection.sendall(f"GET /health HTTP/1.1\r\nAuthorization: Bearer {right}\r\n no: http\r\n\r\n".encode())
        shown.append(connection.recv(4096).decode())
    shown.append(httpx.get(server.url + "/metrics").text)
    server.process.send_signal(signal.SIGTERM)
    code, stderr = server.end()
    assert code == 0
    shown += [stderr, *(Path(path).read_text() for path in logs.values())]
    assert not any(key in text for text in shown for key in (right, wrong))


def test_the_key_of_the_environment_does_not_reach_the_replicas(tmp_path: Path) -> None:
    spec, key_file = tmp_path / "spec.yaml", tmp_path / "keys"
    save_deployment(Deployment().with_pool(**POOL), spec)
    key_file.write_text("from-file-1\n\nfrom-file-2\n")
    command = [sys.executable, "-m", "paretune", "serve", str(spec), "--port", "0", "--api-key-file", str(key_file)]
    environment = {**os.environ, "PARETUNE_API_KEY": "from-environment"}
    server = Server.__new__(Server)
    server.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.process.stderr is not None
        said = ""
        while "http://" not in said:
            line = server.process.stderr.readline()
            assert line, said
            said += line
        url = "http://" + said.split("http://")[1].split(",")[0]
        for name in ("weight", "kv cache", "activation", "process", "available"):
            assert name in said
        assert "PARETUNE_API_KEY" not in server.replicas()[0].environ()
        for key, status in (("from-environment", 200), ("from-file-1", 200), ("from-file-2", 200), ("x", 401)):
            headers = {"authorization": f"Bearer {key}"}
            assert httpx.get(url + "/v1/models", headers=headers).status_code == status
        server.process.send_signal(signal.SIGTERM)
        assert server.end()[0] == 0
    finally:
        server.process.kill()
        server.process.communicate()


def test_a_replica_that_cannot_load_ends_the_server_with_its_exit_code(tmp_path: Path) -> None:
    from paretune.runtime.small_model import MODEL_DIR

    broken = tmp_path / "model"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (broken / name).write_bytes((MODEL_DIR / name).read_bytes())
    code = f"""
import sys
from paretune.runtime.server import serve
from paretune.runtime.server.process import listen
from paretune.runtime.spec import Deployment

sys.exit(serve(Deployment(model={str(broken)!r}), port=0))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LOAD_LIMIT_S)
    assert done.returncode == 2
    assert "safetensors" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_token_does_not_wait_for_the_acknowledgment_of_the_one_before() -> None:
    """Nagle's algorithm is off on what the server accepts; clients delay acknowledgments by up to 40 ms."""

    async def no_delay() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = listen("127.0.0.1", 0)
        async with await asyncio.start_server(accept, sock=listener):
            with socket.create_connection(listener.getsockname()):
                return await asyncio.wait_for(found, 10)

    assert asyncio.run(no_delay()) == 1


# refused at the door: nothing is loaded, so these need no process of their own


def refused(capsys: pytest.CaptureFixture[str], deployment: Deployment, **options: Any) -> tuple[int, str]:
    code = serve(deployment, **options)
    err = capsys.readouterr().err
    assert err.startswith("paretune serve: ")
    assert err.count("\n") == 1
    return code, err


def test_a_port_in_use_is_exit_code_1_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, err = refused(capsys, Deployment(), port=port)
    assert code == 1
    assert f"127.0.0.1:{port}" in err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
def test_a_host_that_others_reach_needs_an_api_key(capsys: pytest.CaptureFixture[str], host: str) -> None:
    code, err = refused(capsys, Deployment(), host=host)
    assert code == 2
    assert host in err
    assert "API key" in err


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        ({"port": 99999}, 2, "99999"),
        ({"port": -1}, 2, "port"),
        ({"api_keys": [""]}, 2, "api_keys"),
        ({"port": 0, "request_log": "/proc/none/requests.jsonl"}, 1, "requests.jsonl"),
        ({"port": 0, "step_log": "/proc/none/steps.jsonl"}, 1, "steps.jsonl"),
    ],
)
def test_options_that_cannot_be_honored_are_refused(
    capsys: pytest.CaptureFixture[str], options: dict[str, Any], code: int, named: str
) -> None:
    got, err = refused(capsys, Deployment(), **options)
    assert got == code
    assert named in err


@pytest.mark.parametrize(
    ("deployment", "named"),
    [
        (Deployment(model="no/such/model"), "no/such/model"),
        (Deployment(engine="vllm"), "engine"),
        (Deployment().with_pool(max_model_len=8192, num_kv_blocks=1024), "max_model_len"),
        (Deployment().with_pool(tensor_parallel_size=3), "tensor_parallel_size"),
        (Deployment().with_pool(accelerator="H100 SXM"), "accelerator"),
        (Deployment().with_pool(num_kv_blocks=10**9), "num_kv_blocks"),
    ],
)
def test_a_spec_that_cannot_run_here_is_refused_by_its_field(
    capsys: pytest.CaptureFixture[str], deployment: Deployment, named: str
) -> None:
    code, err = refused(capsys, deployment, port=0)
    assert code == 2
    assert named in err


def test_the_server_process_imports_no_torch() -> None:
    code = "import sys, paretune.runtime.server.process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
