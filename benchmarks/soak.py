"""Fifteen minutes at 1.5 times what the server carries, with clients that leave, read slowly, or send nonsense.

The bars: resident memory that does not grow after the warm-up, every KV block back at the end, no request without an
end, no answer of 500 or more, and no open file left. 429 is the right answer to half a load too many.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

from bars import Bar, finish, spread
from paretune.profiler.live import LiveServer, live_server
from paretune.runtime.spec import SMALL_MODEL, Deployment

OVERLOAD = 1.5
# of one normal request; with 64 in the queue none should wait for long
REQUEST_LIMIT_S = 120.0
CALIBRATION_S = 15.0
CALIBRATION_CLIENTS = 24
# the warm-up: the first fifth, in which memory that is only taken when it is first written gets written
WARM_UP_SHARE = 0.2
DRIFT = 0.02
DEPLOYMENT = Deployment().with_pool(
    num_threads=1,
    max_model_len=512,
    max_num_seqs=16,
    max_num_batched_tokens=256,
    num_kv_blocks=384,
    max_queued_requests=64,
)
MALFORMED = (
    b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 40_000 + b"\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{{{{{{{{{{",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n{",
    b"DELETE /v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
)


class Clients:
    """Requests of all kinds to one server, and what became of them."""

    def __init__(self, server: LiveServer, seed: int) -> None:
        self._address = server.url.removeprefix("http://").rpartition(":")
        self._model = server.model
        self._random = random.Random(seed)
        self.ends: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.stuck = 0
        self.server_errors: list[str] = []

    async def one(self) -> None:
        """A request of a random kind, to its end."""
        kinds = (self.good, self._leaves, self._slow, self._malformed)
        kind = self._random.choices(kinds, weights=(65, 20, 8, 7))[0]
        try:
            async with asyncio.timeout(REQUEST_LIMIT_S):
                await kind()
        except TimeoutError:
            self.stuck += 1
        except OSError:
            # the right end of a client that does not read
            self.ends["connection reset"] += 1

    def _request(self, **fields: Any) -> bytes:
        words = self._random.choices(("import", "os", "def", "return", "x", "=", "\n", "class"), k=self._words())
        body = {"model": self._model, "prompt": " ".join(words), "stream": True, "ignore_eos": True}
        body |= {"max_tokens": self._random.randint(4, 120), "stream_options": {"include_usage": True}, **fields}
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(data)}\r\n\r\n"
        return head.encode() + data

    def _words(self) -> int:
        return self._random.randint(1, 100)

    async def _connect(self, receive_buffer: int | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, _, port = self._address
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
        return await asyncio.open_connection(sock=connection, limit=1 << 12)

    async def good(self) -> None:
        reader, writer = await self._connect()
        try:
            writer.write(self._request())
            self._ended("good", await reader.read(-1))
        finally:
            writer.transport.abort()

    def _ended(self, kind: str, answer: bytes) -> None:
        status = int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0
        self.statuses[status] += 1
        if status >= 500 or b'"server_error"' in answer:
            self.server_errors.append(f"{kind}: {answer[-300:]!r}")
        whole = status != 200 or b"[DONE]" in answer
        self.ends[f"{kind}: {status}" if whole else f"{kind}: cut"] += 1

    async def _leaves(self) -> None:
        reader, writer = await self._connect()
        try:
            request = self._request(max_tokens=300, stream=self._random.random() < 0.7)
            if self._random.random() < 0.2:
                request = request[: self._random.randrange(len(request))]
            writer.write(request)
            await asyncio.wait([asyncio.ensure_future(reader.read(1 << 12))], timeout=self._random.expovariate(2.0))
            self.ends["left"] += 1
        finally:
            writer.transport.abort()

    async def _slow(self) -> None:
        reader, writer = await self._connect(receive_buffer=4096)
        try:
            logprobs = self._random.choice((None, 20))
            writer.write(self._request(prompt=["x y z"] * 4, max_tokens=300, logprobs=logprobs))
            answer = bytearray()
            give_up_s = time.monotonic() + self._random.uniform(5, 40)
            while time.monotonic() < give_up_s and (part := await reader.read(1 << 10)):
                answer += part
                await asyncio.sleep(0.05)
            self.ends["slow: cut" if b"read faster" in answer else "slow: left or done"] += 1
        finally:
            writer.transport.abort()

    async def _malformed(self) -> None:
        reader, writer = await self._connect()
        try:
            if self._random.random() < 0.3:
                fields = self._random.choice(({"n": 5}, {"prompt": [-1]}, {"max_tokens": 10**6}, {"model": "no"}))
                writer.write(self._request(**fields))
            else:
                writer.write(self._random.choice(MALFORMED))
            answering = asyncio.ensure_future(reader.read(-1))
            await asyncio.wait([answering], timeout=30)
            if answering.done():
                self._ended("malformed", answering.result())
            else:
                answering.cancel()
                self.ends["malformed: left"] += 1
        finally:
            writer.transport.abort()


async def capacity_per_s(clients: Clients) -> float:
    """Good requests per second with as many clients as fill the batch."""
    ended = 0
    deadline_s = time.monotonic() + CALIBRATION_S

    async def client() -> None:
        nonlocal ended
        while time.monotonic() < deadline_s:
            await clients.good()
            ended += 1

    await asyncio.gather(*(client() for _ in range(CALIBRATION_CLIENTS)))
    return ended / CALIBRATION_S


async def soak(clients: Clients, rate_per_s: float, seconds: float) -> None:
    """Arrivals at a rate, whatever becomes of them, and then their ends."""
    pause = random.Random(1)
    tasks: set[asyncio.Task[None]] = set()
    next_s = time.monotonic()
    end_s = next_s + seconds
    while next_s < end_s:
        await asyncio.sleep(max(0.0, next_s - time.monotonic()))
        task = asyncio.create_task(clients.one())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        next_s += pause.expovariate(rate_per_s)
    await asyncio.gather(*tasks)


def processes(server: LiveServer) -> list[psutil.Process]:
    process = psutil.Process(server.pid)
    return [process, *process.children(recursive=True)]


def open_files(server: LiveServer) -> int:
    return sum(process.num_fds() for process in processes(server))


async def memory_of(server: LiveServer, samples: list[tuple[float, int]]) -> None:
    """Resident bytes of all processes of the server, once a second, until it is cancelled."""
    while True:
        resident = sum(process.memory_info().rss for process in processes(server))
        samples.append((time.monotonic(), resident))
        await asyncio.sleep(1.0)


def metric(server: LiveServer, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


def settled(server: LiveServer, limit_s: float = 60.0) -> dict[str, float]:
    """What is still held once everybody has gone, at the latest after a while."""
    names = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting")
    deadline_s = time.monotonic() + limit_s
    while True:
        held = {name: metric(server, name) for name in names}
        if not any(held.values()) or time.monotonic() > deadline_s:
            return held
        time.sleep(0.5)


def drift(samples: list[tuple[float, int]]) -> tuple[float, dict[str, object]]:
    """How much the memory of the last tenth lies above that of the tenth after the warm-up, as a share; and both."""
    warm = samples[int(WARM_UP_SHARE * len(samples)) :]
    tenth = max(1, len(warm) // 10)
    first, last = ([size for _, size in part] for part in (warm[:tenth], warm[-tenth:]))
    change = statistics.median(last) / statistics.median(first) - 1
    mib = {"first": spread([size / 2**20 for size in first]), "last": spread([size / 2**20 for size in last])}
    return change, {**mib, "start": samples[0][1] / 2**20, "samples": len(samples)}


async def run(server: LiveServer, minutes: float) -> tuple[Clients, float, list[tuple[float, int]]]:
    rate_per_s = OVERLOAD * await capacity_per_s(Clients(server, 0))
    print(f"{rate_per_s:.1f} requests a second, {OVERLOAD} x capacity, for {minutes:g} minutes", file=sys.stderr)
    clients = Clients(server, 1)
    samples: list[tuple[float, int]] = []
    sampling = asyncio.create_task(memory_of(server, samples))
    await soak(clients, rate_per_s, 60 * minutes)
    sampling.cancel()
    return clients, rate_per_s, samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0)
    minutes = parser.parse_args().minutes
    with (
        tempfile.TemporaryDirectory() as folder,
        live_server(
            DEPLOYMENT, request_log=Path(folder) / "requests.jsonl", step_log=Path(folder) / "steps.jsonl"
        ) as server,
    ):
        files_before = open_files(server)
        clients, rate_per_s, samples = asyncio.run(run(server, minutes))
        held = settled(server)
        files_after = open_files(server)
        counted = {
            name: metric(server, name)
            for name in ("vllm:request_success_total", "vllm:admission_rejections_total", "paretune:streams_cut_total")
        }
    change, memory = drift(samples)
    for error in clients.server_errors[:5]:
        print(error, file=sys.stderr)
    details = {
        "minutes": minutes,
        "model": SMALL_MODEL,
        "requests_per_s": rate_per_s,
        "ends": dict(sorted(clients.ends.items())),
        "statuses": {str(status): count for status, count in sorted(clients.statuses.items())},
        "resident_mib": memory,
        "counted_by_the_server": counted,
        "open_files": [files_before, files_after],
        "cores": os.cpu_count(),
    }
    print(json.dumps(details, indent=1), file=sys.stderr)
    finish(
        [
            Bar("resident memory: change after the warm-up", change, DRIFT, at_least=False),
            Bar("share of KV blocks held at the end", held["vllm:kv_cache_usage_perc"], 0, at_least=False),
            Bar("requests still in the engine at the end", sum(held.values()), 0, at_least=False),
            Bar("requests without an end", clients.stuck, 0, at_least=False),
            Bar("answers of 500 or more", len(clients.server_errors), 0, at_least=False),
            Bar("open files more than at the start", files_after - files_before, 0, at_least=False),
        ],
        details,
        "soak",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
