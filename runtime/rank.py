"""One rank of a replica: its share of the model, and what it does with the wire of a step.

Rank 0 lives in the engine's process. The others are started by `OtherRanks` as processes that run this file; each waits
for wires, computes, and ends when its standard input closes, which it does when rank 0 closes it or dies.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from .adapters import RankAdapters
from .batch import ARGMAX, FILL_SLOT, HEAD, Batch, read_fill, write_fill
from .model_shape import ModelShape
from .parallel import RankFailed, share_of, thread_environment
from .peers import Peers
from .spec import Pool
from .transformer import Transformer
from .weights import load_weights

START_LIMIT_S = 120.0  # for a process to import torch and call back
LOAD_LIMIT_S = 1800.0  # for it to load its weights after that
STOP_LIMIT_S = 5.0
TASK_FILE = "task.json"


class Rank:
    """The model of one rank and the buffers of its steps. `batch.wire` is where a step comes in."""

    def __init__(self, pool: Pool, shape: ModelShape, model_dir: Path, peers: Peers | None) -> None:
        torch.set_num_threads(pool.num_threads)
        self._peers = peers
        self._share = share_of(shape, peers.rank if peers else 0, pool.tensor_parallel_size)
        self._vocab_width = -(-shape.vocab_size // pool.tensor_parallel_size)
        self._vocab_sizes = [len(share_of(shape, r, self._share.size).vocab) for r in range(self._share.size)]
        self.batch = Batch(pool)
        self.adapters = RankAdapters(shape, self._share, pool) if pool.max_loras else None
        self._transformer = Transformer(
            shape,
            load_weights(shape, model_dir, self._share, pool.weight_dtype, pool.tiles),
            self._share,
            num_kv_blocks=pool.num_kv_blocks,
            block_size=pool.block_size,
            kv_cache_dtype=pool.kv_cache_dtype,
            max_model_len=pool.max_model_len,
            tiles=pool.tiles,
            reduce=peers.all_reduce if peers else None,
            adapters=None if self.adapters is None else self.adapters.slots,
        )

    def run(self, used: int = 0) -> Tensor | None:
        """Compute the step in `batch.wire` (rank 0: its first `used` places) together with the other ranks.

        Returns: on rank 0 (head rows,) int64 tokens for ARGMAX, else (head rows, vocab_size) fp32 logits; else None.
        """
        with torch.inference_mode():
            if self._peers is not None:
                self._peers.broadcast_wire(self.batch.wire_tensor, used)
                if self.batch.wire[HEAD] == FILL_SLOT and self.adapters is not None:
                    self.adapters.put(*read_fill(self.batch.wire))
                    return None
            self.batch.read()
            logits = self._transformer.forward(self.batch)
            if self._peers is None:
                return logits.argmax(dim=1) if self.batch.head == ARGMAX else logits
            if self.batch.head == ARGMAX:
                return self._merged_argmax(logits, self._peers)
            return self._gathered(logits, self._peers)

    def fill_slot(self, slot: int, number: int, folder: Path, keep: Collection[int]) -> None:
        """Called on rank 0: every rank puts its share of an adapter into a slot.

        Args:
            keep: adapters that shall stay in the host memory of this rank.
        Raises: BadAdapter.
        """
        assert self.adapters is not None, "a request named an adapter where max_loras is 0"
        self.adapters.put(slot, number, folder, keep)
        if self._peers is not None:
            self._peers.broadcast_wire(self.batch.wire_tensor, write_fill(self.batch.wire, slot, number, folder))

    def _merged_argmax(self, logits: Tensor, peers: Peers) -> Tensor | None:
        """The best token of all ranks: one (logit, token) pair a row travels, in float64, which holds both exactly."""
        best, token = logits.max(dim=1)
        parts = peers.gather(torch.stack((best.double(), (token + self._share.vocab.start).double())))
        if not parts:
            return None
        pairs = torch.stack(parts)
        winner = pairs[:, 0].argmax(dim=0)  # of equal logits the first rank's, which is the smallest token
        return pairs[:, 1].gather(0, winner[None])[0].long()

    def _gathered(self, logits: Tensor, peers: Peers) -> Tensor | None:
        padded = torch.nn.functional.pad(logits, (0, self._vocab_width - logits.shape[1]))
        parts = peers.gather(padded.contiguous())
        if not parts:
            return None
        return torch.cat([part[:, :size] for part, size in zip(parts, self._vocab_sizes)], dim=1)


class OtherRanks:
    """Ranks 1 and up of a replica: processes of ours that end with us.

    Raises RankFailed: one of them does not start, or does not load.
    """

    def __init__(self, pool: Pool, model_dir: Path, shape: ModelShape) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="paretune-ranks-")  # mode 0700: the meeting place is private
        self.folder = Path(self._folder.name)
        task = {"pool": pool.model_dump(mode="json"), "model_dir": str(model_dir.resolve())}
        (self.folder / TASK_FILE).write_text(json.dumps(task))
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(1, pool.tensor_parallel_size):
                self._processes.append(self._start(pool, rank))
            self._wait_for("started", START_LIMIT_S)
        except BaseException:
            self.close()
            raise

    def _start(self, pool: Pool, rank: int) -> subprocess.Popen[bytes]:
        with open(self.folder / f"{rank}.log", "wb") as log:
            # -P: what lies in the working directory is no module of ours
            return subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(self.folder), str(rank)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, **thread_environment(pool)},
            )

    def wait_until_loaded(self) -> None:
        """Return when every rank is ready for its first step."""
        self._wait_for("loaded", LOAD_LIMIT_S)

    def _wait_for(self, event: str, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        for rank in range(1, len(self._processes) + 1):
            while not (self.folder / f"{rank}.{event}").exists():
                self.check()
                if time.monotonic() > deadline:
                    raise RankFailed(f"tensor parallel rank {rank} has not {event} within {limit_s:.0f} s")
                time.sleep(0.01)

    def check(self) -> None:
        """Raises RankFailed if a rank has ended."""
        for rank, process in enumerate(self._processes, start=1):
            if process.poll() is not None:
                raise RankFailed(self._obituary(rank, process.returncode))

    def explain(self, error: RuntimeError) -> RankFailed:
        """What a failed collective means: that a rank has ended (it may take a moment to show), or does not answer."""
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            try:
                self.check()
            except RankFailed as failed:
                return failed
            time.sleep(0.01)
        return RankFailed(f"a tensor parallel rank does not answer: {error}; start the engine again")

    def _obituary(self, rank: int, code: int) -> str:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        lines = (self.folder / f"{rank}.log").read_text(errors="replace").strip().splitlines()
        said = f": {lines[-1][:300]}" if lines else ""
        return f"tensor parallel rank {rank} {how}{said}; start the engine again"

    def close(self) -> None:
        """End the ranks: they leave when their input closes, and are killed if they do not."""
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()


def main() -> None:
    """A rank process; the end of its standard input is its own end."""
    # Ctrl-C and a service manager's SIGTERM reach all processes; rank 0 decides what they mean
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    folder, number = Path(sys.argv[1]), int(sys.argv[2])
    task = json.loads((folder / TASK_FILE).read_text())
    threading.Thread(target=_leave_with_rank_0, daemon=True).start()
    pool, model_dir = Pool.model_validate(task["pool"]), Path(task["model_dir"])
    (folder / f"{number}.started").touch()
    peers = Peers(folder, number, pool.tensor_parallel_size)
    rank = Rank(pool, ModelShape.load(model_dir), model_dir, peers)
    (folder / f"{number}.loaded").touch()
    while True:
        rank.run()


def _leave_with_rank_0() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
