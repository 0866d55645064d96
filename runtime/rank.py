"""One rank of a replica: its share of the model, and what it does with the wire of a step.

Rank 0 lives in the engine's process. The others are started by `OtherRanks` as processes that run this file; each waits
for wires, computes, and ends when its standard input closes, which it does when rank 0 closes it or dies. Ranks that
torchrun started, here or on other machines, do the same in `follow_rank_0`, and end when rank 0's connection does.
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
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from ..kernels import placement
from ..kernels.gpu_linear import activation_dtype
from ..kernels.gpu_lora import GpuLoraSlots
from ..kernels.lora import LoraSlots
from ..kernels.sampling import argmax
from ..kernels.tiles import TileTable
from ..kernels.weight_formats import WEIGHT_FORMATS
from .adapters import RankAdapters
from .batch import ARGMAX, DRAFT, FILL_SLOT, HEAD, Batch, read_fill, write_fill
from .context_part import ContextPart, context_part
from .device import rank_device
from .draft_shape import draft_shape
from .gpu_steps import GpuSteps
from .launch import Launch
from .memory import give_back_compiler, give_back_freed_memory
from .model_shape import ModelShape, resolve_model
from .parallel import Layout, RankFailed, Share, shares, thread_environment
from .peers import Peers
from .spec import CPU, Pool
from .transformer import Transformer
from .weights import load_weights

START_LIMIT_S = 120.0  # for a process to import torch and call back
LOAD_LIMIT_S = 1800.0  # for it to load its weights after that
STOP_LIMIT_S = 5.0
TASK_FILE = "task.json"


class Rank:
    """The model of one rank and the buffers of its steps.

    batches    one for each step that may be in flight; rank 0 writes a step into the `wire` of one that is free
    capture_s  seconds that capturing decode steps as CUDA graphs took; 0 where none are

    Args:
        device: where it computes; left out: the CPU, or the first GPU.
    """

    def __init__(
        self, pool: Pool, shape: ModelShape, model_dir: Path, peers: Peers | None, device: torch.device | None = None
    ) -> None:
        device = rank_device(pool, 0) if device is None else device
        torch.set_num_threads(pool.num_threads)
        self._peers = peers
        layout = Layout.of(pool)
        ranks = shares(shape, layout, WEIGHT_FORMATS[pool.weight_dtype].sharded_by)
        self._share = ranks[peers.rank if peers else 0]
        self._shape = shape
        self._vocab_sizes = [len(share.vocab) for share in ranks[: layout.shards]]
        self.batches = tuple(Batch(pool) for _ in range(layout.stages))
        self._results: list[Tensor | None] = [None] * layout.stages
        self.adapters = RankAdapters(shape, self._share, pool, device) if pool.max_loras else None
        slots = None if self.adapters is None else self.adapters.slots
        self._transformer = _transformer(pool, shape, model_dir, self._share, peers, slots, device)
        self._draft: Transformer | None = None
        draft = draft_shape(pool)
        if draft is not None:
            number = peers.rank if peers else 0
            share = shares(draft, layout, WEIGHT_FORMATS[pool.weight_dtype].sharded_by)[number]
            self._draft = _transformer(pool, draft, resolve_model(pool.draft_model), share, peers, None, device)
        give_back_freed_memory()  # what packing the weights took in between
        self._gpu = GpuSteps(pool, self._transformer, device, peers) if placement.on_gpu(device) else None

    @property
    def capture_s(self) -> float:
        return 0.0 if self._gpu is None else self._gpu.graphs.capture_s

    def capture(self) -> None:
        """On a GPU: capture decode steps as CUDA graphs; every rank does, once all have loaded. Raises: RankFailed."""
        if self._gpu is not None:
            with torch.inference_mode():
                self._gpu.capture()

    def begin(self, index: int, used: int) -> None:
        """Rank 0: compute its part of the step in the first `used` places of `batches[index].wire`.

        Later pipeline stages may still be at it on return; the ranks of one stage compute together.
        """
        with torch.inference_mode():
            batch = self.batches[index]
            if self._peers is not None:
                self._peers.send_wire(batch.wire_tensor, used)
            batch.read()
            self._results[index] = self._computed(batch)

    def result(self, index: int) -> Tensor:
        """Rank 0: of a step that has begun (head rows,) int64 tokens for ARGMAX, else (head rows, vocab_size) logits.

        Steps end in the order in which they began.
        """
        with torch.inference_mode():
            result, batch = self._results[index], self.batches[index]
            if result is None:
                assert self._peers is not None
                rows = batch.head_rows.shape[0]
                shape = (rows,) if batch.head == ARGMAX else (rows, self._shape.vocab_size)
                dtype = torch.int64 if batch.head == ARGMAX else torch.float32
                received = self._peers.receive_result(shape if rows else (1,), dtype)
                result = received if rows else received.new_empty(shape)
            return result if self._gpu is None else self._gpu.result(result, batch.head)

    def follow(self) -> bool:
        """Another rank: wait for a step and compute this rank's part of it. False: rank 0 has left."""
        assert self._peers is not None
        with torch.inference_mode():
            batch = self.batches[0]
            try:
                self._peers.receive_wire(batch.wire_tensor)
            except RuntimeError:  # its connection is closed
                return False
            if batch.wire[HEAD] == FILL_SLOT and self.adapters is not None:
                self.adapters.put(*read_fill(batch.wire))
                return True
            batch.read()
            result = self._computed(batch)
            if result is not None and self._peers.layout.stages > 1:
                # also of a step that samples nothing: it has ended when its last stage says so
                self._peers.send_result(result if result.shape[0] else result.new_zeros(1))
        return True

    def _computed(self, batch: Batch) -> Tensor | None:
        """The step's result on the first rank of the last stage, None elsewhere."""
        peers, hidden = self._peers, None
        work: Batch | ContextPart = batch
        if peers is not None and peers.layout.parts > 1:
            work = context_part(batch, peers.place.part, peers.layout.parts) or batch
        if peers is not None and not self._share.is_first:
            hidden = peers.take_over((work.token_ids.shape[0], self._shape.hidden_size))
        if self._gpu is None:
            transformer = self._transformer
            if batch.model == DRAFT:
                assert self._draft is not None, "a draft model's step where the pool names none"
                transformer = self._draft
            transformer.copy_blocks(batch.copies)
            logits = transformer.forward(work, hidden)
        else:
            logits = self._gpu.logits(batch)
        if peers is not None and not self._share.is_last:
            peers.pass_on(logits)
            return None
        if not self._share.has_head:
            return None
        if peers is None or self._share.size == 1:
            return _best(logits) if batch.head == ARGMAX else logits
        return self._merged_argmax(logits, peers) if batch.head == ARGMAX else self._gathered(logits, peers)

    def use_tiles(self, tiles: TileTable) -> None:
        """Compute with other tiles from the next step on. Raises: BadTile, and nothing changed."""
        self._transformer.use_tiles(tiles)
        if self._draft is not None:
            self._draft.use_tiles(tiles)

    def fill_slot(self, slot: int, number: int, folder: Path, keep: Collection[int]) -> None:
        """Called on rank 0: every rank puts its share of an adapter into a slot.

        Args:
            keep: adapters that shall stay in the host memory of this rank.
        Raises: BadAdapter.
        """
        assert self.adapters is not None, "a request named an adapter where max_loras is 0"
        self.adapters.put(slot, number, folder, keep)
        if self._peers is not None:
            batch = self.batches[0]
            self._peers.send_wire(batch.wire_tensor, write_fill(batch.wire, slot, number, folder))

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
        padded = torch.nn.functional.pad(logits, (0, max(self._vocab_sizes) - logits.shape[1]))
        parts = peers.gather(padded.contiguous())
        if not parts:
            return None
        return torch.cat([part[:, :size] for part, size in zip(parts, self._vocab_sizes)], dim=1)


def _best(logits: Tensor) -> Tensor:
    """(rows, vocab) -> (rows,) int64, where the logits are."""
    return torch.from_numpy(argmax(logits)) if logits.device.type == "cpu" else logits.argmax(dim=1)


def _transformer(
    pool: Pool,
    shape: ModelShape,
    model_dir: Path,
    share: Share,
    peers: Peers | None,
    adapters: LoraSlots | GpuLoraSlots | None,
    device: torch.device,
) -> Transformer:
    layout = Layout.of(pool)
    return Transformer(
        shape,
        load_weights(shape, model_dir, share, pool.weight_dtype, pool.tiles, device),
        share,
        num_kv_blocks=pool.num_kv_blocks,
        host_kv_blocks=pool.host_kv_blocks,
        block_size=pool.block_size,
        kv_cache_dtype=pool.kv_cache_dtype,
        max_model_len=pool.max_model_len,
        tiles=pool.tiles,
        reduce=peers.all_reduce if peers and layout.shards > 1 else None,
        parts=peers if layout.parts > 1 else None,
        adapters=adapters,
        device=device,
        activations=activation_dtype(pool.weight_dtype) if placement.on_gpu(device) else torch.float32,
    )


def file_store(folder: Path, pool: Pool) -> Any:
    """Where the ranks of one machine find each other: a file in a folder of ours."""
    return torch.distributed.FileStore(str(folder / "store"), Layout.of(pool).size)  # type: ignore[attr-defined]


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
            for rank in range(1, Layout.of(pool).size):
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
                    raise RankFailed(f"rank {rank} has not {event} within {limit_s:.0f} s")
                time.sleep(0.01)

    def check(self) -> None:
        """Raises RankFailed if a rank has ended."""
        for rank, process in enumerate(self._processes, start=1):
            if process.poll() is not None:
                raise RankFailed(self._obituary(rank, process.returncode))

    def explain(self, error: RuntimeError) -> RankFailed:
        """What a failed collective means: that a rank has ended (it may take a moment to show), or does not answer."""
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline:
            try:
                self.check()
            except RankFailed as failed:
                return failed
            time.sleep(0.01)
        return RankFailed(f"a rank does not answer: {error}; start the engine again")

    def _obituary(self, rank: int, code: int) -> str:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        lines = (self.folder / f"{rank}.log").read_text(errors="replace").strip().splitlines()
        said = f": {lines[-1][:300]}" if lines else ""
        return f"rank {rank} {how}{said}; start the engine again"

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


class RanksOfOthers:
    """Ranks 1 and up of a replica, started from outside: who started them sees to their end."""

    def __init__(self, launch: Launch) -> None:
        self.store = launch.store()
        self._size = launch.size

    def wait_until_loaded(self) -> None:
        """Return when every rank is ready for its first step. Raises: RankFailed."""
        try:
            self.store.wait([_loaded(rank) for rank in range(1, self._size)], timedelta(seconds=LOAD_LIMIT_S))
        except RuntimeError as error:
            raise RankFailed(f"not every rank has loaded within {LOAD_LIMIT_S:.0f} s: {error}") from None

    def check(self) -> None:
        """A rank that has ended shows in the next collective."""

    def explain(self, error: RuntimeError) -> RankFailed:
        """What a failed collective means."""
        return RankFailed(f"a rank has ended, or does not answer: {error}; start all ranks again")

    def close(self) -> None:
        """They leave when rank 0 does."""


def _loaded(rank: int) -> str:
    return f"loaded {rank}"


def follow_rank_0(pool: Pool, model_dir: Path, launch: Launch) -> int:
    """A rank that was started from outside, until rank 0 leaves; returns the exit code.

    Raises: BadModel; RankFailed: another rank is gone in the middle of a step.
    """
    store = launch.store()
    try:
        device = rank_device(pool, launch.rank - launch.local.start)
        peers = Peers(store, launch.rank, Layout.of(pool), launch.address(), nccl=pool.accelerator != CPU)
        # from here on rank 0 decides what Ctrl-C and SIGTERM mean, which reach all processes
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        rank = Rank(pool, ModelShape.load(model_dir), model_dir, peers, device)
        store.set(_loaded(launch.rank), "")
        rank.capture()
        give_back_compiler()
        while rank.follow():
            pass
    except RuntimeError as error:
        raise RankFailed(f"rank {launch.rank}: another rank has ended, or does not answer: {error}") from None
    return 0


def main() -> None:
    """A rank process; the end of its standard input is its own end."""
    # Ctrl-C and a service manager's SIGTERM reach all processes; rank 0 decides what they mean
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    folder, number = Path(sys.argv[1]), int(sys.argv[2])
    task = json.loads((folder / TASK_FILE).read_text())
    threading.Thread(target=_leave_with_rank_0, daemon=True).start()
    pool, model_dir = Pool.model_validate(task["pool"]), Path(task["model_dir"])
    (folder / f"{number}.started").touch()
    device = rank_device(pool, number)
    peers = Peers(file_store(folder, pool), number, Layout.of(pool), nccl=pool.accelerator != CPU)
    rank = Rank(pool, ModelShape.load(model_dir), model_dir, peers, device)
    (folder / f"{number}.loaded").touch()
    rank.capture()
    give_back_compiler()
    while rank.follow():
        pass
    sys.exit("rank 0 has left")


def _leave_with_rank_0() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
