"""Where a study's step times, prices and plain default come from: a profile of this machine, or data sheets."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ..profiler.hardware import Accelerator, BadHardware, accelerator
from ..profiler.operator_tables import BadTable
from ..profiler.prices import Price, PriceBook
from ..profiler.profile import BadProfile, Profile
from ..profiler.recalibration import Calibration
from ..profiler.roofline import kv_blocks
from ..profiler.step_source import StepSource, digest_of, open_tables
from ..profiler.step_time import ModeledStep
from ..profiler.table_choice import TableChoice
from ..profiler.tables import step_bounds, step_tables
from ..runtime.model_shape import ModelShape, resolve_model
from ..runtime.spec import CPU, Deployment, Pool
from ..traces.trace import Trace

# What vLLM 0.32 serves with where nobody says otherwise (its base defaults): what people run today.
DEFAULT_MAX_NUM_SEQS = 128
DEFAULT_MAX_NUM_BATCHED_TOKENS = 2048
CPU_KV_TOKENS = 65536

# What the simulator leaves out whatever the step times come from.
_SIMULATOR_LEAVES_OUT = (
    "answers in the prefix cache: the engine finds a chat's last answer in the next turn, the simulator only what the "
    "log names; and priorities, which a log does not have",
    "sampling other than greedy; the cores that HTTP, text and clients use, which are not priced either",
)
_ADAPTERS_LEAVE_OUT = (
    "what LoRA adapters add to a step, and the time to fill a slot: waiting for slots is simulated, these are not",
)


@dataclass(frozen=True)
class Sources:
    """Step times and prices for one model.

    measured from `profile` where the accelerator is "cpu", of `device` from the tables of others where they are given,
    from its data sheet else; each as the user's own server corrects it where a calibration is given.
    """

    model: str
    shape: ModelShape
    prices: PriceBook
    profile: Profile | None = None
    device: Accelerator | None = None
    calibration: Calibration | None = None
    tables: StepSource | None = None

    @classmethod
    def of(
        cls,
        model: str,
        *,
        accelerator_name: str = CPU,
        profile_path: str | os.PathLike[str] | None = None,
        prices_path: str | os.PathLike[str] | None = None,
        any_machine: bool = False,
        calibration_path: str | os.PathLike[str] | None = None,
        tables: TableChoice | None = None,
    ) -> Sources:
        """Read them.

        Args:
            tables: what takes the place of the accelerator's data sheet.
        Raises: BadModel, BadProfile (none for "cpu", too), BadHardware, BadTable (exit code 2), OSError.
        """
        shape = ModelShape.load(resolve_model(model))
        prices = PriceBook.load(prices_path)
        calibration = None if calibration_path is None else Calibration.load(calibration_path)
        device = accelerator(accelerator_name)
        opened = None if tables is None else open_tables(tables, device)
        if accelerator_name != CPU:
            return cls(model, shape, prices, device=device, tables=opened, calibration=calibration)
        if profile_path is None:
            raise BadProfile("profile", "none", "a profile of this machine", "`paretune profile run`")
        profile = Profile.load(profile_path, any_machine=any_machine)
        profile.check_shape(shape)
        return cls(model, shape, prices, profile=profile, calibration=calibration)

    def step_model(self, pool: Pool) -> ModeledStep:
        """Step times of one replica of a pool. Raises: BadProfile, BadHardware, BadTable."""
        found = self._uncalibrated(pool)
        if self.calibration is not None:
            bounds = step_bounds(self.peaks, self.shape, pool)
            found = self.calibration.applied(found, bounds, pool, self.uncalibrated_digest)
        left_out = [*found.not_modeled, *_SIMULATOR_LEAVES_OUT]
        if pool.max_queued_requests:
            left_out.append("max_queued_requests: requests that the server would refuse wait in the simulator")
        if found.tables.batch is not None and pool.max_loras:
            left_out += _ADAPTERS_LEAVE_OUT
        return replace(found, not_modeled=tuple(left_out))

    def _uncalibrated(self, pool: Pool) -> ModeledStep:
        if self.tables is None:
            return step_tables(self.peaks, self.shape, pool)
        assert self.device is not None
        if pool.accelerator != self.device.name:
            raise BadHardware("pool.accelerator", pool.accelerator, self.device.name, "give the tables of the pool's")
        return self.tables.modeled(self.shape, pool)

    @property
    def peaks(self) -> Profile | Accelerator:
        """Whose peak rates bound the steps, and say what does."""
        found = self.profile or self.device
        assert found is not None, "one of the two is always given"
        return found

    def check_explained(self) -> None:
        """Raises: BadTable: steps from these tables cannot be taken apart."""
        if self.tables is not None and self.tables.unexplained:
            allowed = "operator tables, whole steps, or the data sheet"
            todo = f"{self.tables.unexplained}; `simulate` takes them, `explain` the others"
            raise BadTable("explain", self.tables.name, allowed, todo)

    def price(self, pool: Pool) -> Price:
        """Of one device of a pool. Raises: BadHardware: the price book has none."""
        return self.prices.usd_per_device_hour(pool.accelerator)

    @property
    def uncalibrated_name(self) -> str:
        if self.profile is not None:
            return f"profile of {self.profile.name}"
        assert self.device is not None
        if self.tables is not None:
            return f"{self.tables.name} on {self.device.name}"
        return f"data sheet of {self.device.name} ({self.device.as_of})"

    @property
    def name(self) -> str:
        if self.calibration is None:
            return self.uncalibrated_name
        return f"{self.uncalibrated_name}, calibrated on {self.calibration.recorded_in}"

    @property
    def measured(self) -> bool:
        return self.profile is not None or (self.tables is not None and self.tables.measured)

    @property
    def digest(self) -> str:
        """Of all that step times come from."""
        if self.calibration is None:
            return self.uncalibrated_digest
        both = self.uncalibrated_digest + self.calibration.model_dump_json()
        return hashlib.sha256(both.encode()).hexdigest()[:16]

    @cached_property
    def uncalibrated_digest(self) -> str:
        """The profile's own, or one of the data sheet's figures and the tables in its place."""
        if self.profile is not None:
            return self.profile.digest()
        found = hashlib.sha256(repr(self.device).encode())
        if self.tables is not None:
            found.update(digest_of(self.tables).encode())
        return found.hexdigest()[:16]

    @property
    def prices_digest(self) -> str:
        return hashlib.sha256(repr(self.prices.offers).encode()).hexdigest()[:16]

    def plain_default(self, trace: Trace, *, cores: int) -> Deployment:
        """What people run who change nothing: vLLM's limits, bf16, all cores (or as many accelerators as hold the
        model), room for the log.

        Raises: BadHardware: not even eight accelerators hold it.
        """
        longest = int((trace.input_tokens.astype("int64") + trace.output_tokens).max())
        max_model_len = min(-(-longest // 64) * 64, self.shape.max_position_embeddings)
        name = CPU if self.device is None else self.device.name
        pool = Pool(
            accelerator=name,
            num_threads=cores if name == CPU else 1,
            max_model_len=max_model_len,
            max_num_seqs=DEFAULT_MAX_NUM_SEQS,
            max_num_batched_tokens=DEFAULT_MAX_NUM_BATCHED_TOKENS,
            num_kv_blocks=max(CPU_KV_TOKENS, 2 * max_model_len) // 16,
        )
        if self.device is not None:
            pool = _on_as_many_as_hold_it(self.device, self.shape, pool)
        return Deployment(model=self.model, pools=(pool,))


def _on_as_many_as_hold_it(device: Accelerator, shape: ModelShape, pool: Pool) -> Pool:
    """The pool on the fewest ranks, of 1, 2, 4 and 8, whose memory holds the weights and one request."""
    for ranks in (1, 2, 4, 8):
        sharded = pool.model_copy(update={"tensor_parallel_size": ranks})
        blocks = kv_blocks(device, shape, sharded)
        if blocks * pool.block_size >= pool.max_model_len:
            found = sharded.model_copy(update={"num_kv_blocks": blocks})
            return Pool.model_validate(found.model_dump())
    todo = "name a spec with --baseline that holds it: fewer bytes a weight, or more ranks"
    raise BadHardware(f"memory of 8 x {device.name}", "too little", "the weights and one request", todo)


def absolute(path: str | None) -> str | None:
    """The same file from every folder, for what a study remembers."""
    return None if path is None else str(Path(path).absolute())
