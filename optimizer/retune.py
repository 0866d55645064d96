"""The nightly job: has the workload moved, is there a better deployment now, and is it better by more than the noise?

Not sure means keep what runs. The old spec is replaced whole or not at all, every decision is written down with its
reasons, and two runs never work on one spec at a time.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..runtime.spec import BadSpec, Deployment, load_deployment, save_deployment
from ..traces.drift import drift
from ..traces.metrics import Target
from ..traces.trace import Trace
from ..traces.whole_file import write_whole
from .front import Cost, Evaluation

# Below this share of the cost a change of deployment is not worth its own risk, however sure the gain is.
LEAST_GAIN = 0.03

Action = Literal["unchanged", "kept", "replaced"]


class Locked(Exception):
    """Another run works on this spec: who holds the lock."""

    exit_code: ClassVar[int] = 6

    def __init__(self, lock: str, holder: str) -> None:
        super().__init__(lock, holder)
        self.lock, self.holder = lock, holder

    def __str__(self) -> str:
        return f"{self.lock}: held by {self.holder}; one retune at a time; try again when it has ended"


@dataclass(frozen=True)
class Comparison:
    """The spec that runs and the best one found tonight, both evaluated on tonight's trace with the same step times.

    old, new  with intervals (optimizer.evaluate.refine)
    spec      the new one as it would be written, targets and provenance filled in
    """

    old: Evaluation
    new: Evaluation
    spec: Deployment
    cost: Cost


@dataclass(frozen=True)
class Decision:
    """What a night decided, and why.

    action      "unchanged": the workload has not moved, or it has and what runs is still the best; "kept": something
                else looks better, but not surely; "replaced": by something surely better (dry run: would have been)
    exit_code   0, or 5 where the guard kept the old spec
    why         plain sentences
    gain        share of the old cost that the new one saves; None where nothing was compared
    noise       the gain below which it could be chance
    """

    action: Action
    why: tuple[str, ...]
    spec: str
    old: str
    new: str | None = None
    gain: float | None = None
    noise: float | None = None
    dry_run: bool = False
    decided_at: str = ""

    @property
    def exit_code(self) -> int:
        return 5 if self.action == "kept" else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {**vars(self), "why": list(self.why), "exit_code": self.exit_code, "changed": self.action == "replaced"}


def retune(
    spec_path: str | Path,
    trace: Trace,
    tune: Callable[[Trace, Deployment], Comparison],
    *,
    decisions: str | Path = "out/decisions",
    dry_run: bool = False,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Decision:
    """Compare tonight's log with the one the spec was tuned on; if it moved, tune again and replace the spec if sure.

    Args:
        trace: the latest request log.
        tune: tunes on the trace with the old deployment as trial 0, picks, and evaluates both.
        decisions: folder for the record of each decision (JSON, with the old and the new spec whole).
        dry_run: decide and record, but leave the spec as it is.
    Raises: Locked (exit code 6); BadSpec: the spec has no provenance to compare with; what `tune` raises. In each case
        the spec is as it was.
    """
    path = Path(spec_path)
    if not path.is_file():
        raise BadSpec(str(path), "no such file", "the spec that runs", "tune, and pick it, first")
    with only_one(path):
        old = load_deployment(path)
        if old.provenance is None:
            raise BadSpec(
                f"{path.name}: provenance", "nothing", "what `paretune pick` writes", "tune and pick it first"
            )
        moved = drift(old.provenance.trace_fingerprint, trace)
        stamp = now().isoformat(timespec="seconds")
        blank = Decision("unchanged", (), str(path), old.digest(), dry_run=dry_run, decided_at=stamp)
        if not moved.moved:
            decision = replace(blank, why=("the workload has not moved since the spec was tuned",))
            _record(decision, Path(decisions), old, None)
            return decision
        found = tune(trace, old)
        action, why, gain, noise = decide(found, tuple(Target.parse(text) for text in old.targets))
        reasons = (*moved.reasons, *why)
        decision = replace(blank, action=action, why=reasons, new=found.spec.digest(), gain=gain, noise=noise)
        _record(decision, Path(decisions), old, found.spec)
        if action != "kept" and not dry_run:
            # where the same deployment is still the best, its spec learns tonight's workload for the next night
            save_deployment(found.spec, path)
        return decision


def decide(
    found: Comparison, targets: tuple[Target, ...]
) -> tuple[Action, tuple[str, ...], float | None, float | None]:
    """Whether the new deployment replaces the old one, why, the gain in cost and the noise of that gain.

    It does if the old one breaks a target on tonight's trace that the new one holds with its whole interval; or if its
    cost is lower by more than the intervals of both explain (half widths in quadrature, on a log scale) and by at least
    LEAST_GAIN, and it holds every target that the old one holds. Else the old one stays. Where both are the same,
    nothing changes.
    """
    old, new = found.old, found.new
    if found.spec.digest() == old.deployment.digest():
        return "unchanged", ("the deployment that runs is still the best one found",), 0.0, None
    for target in targets:
        value, _, high = new.of_target(target)
        if math.isnan(value) or value > target.limit_s:
            return "kept", (f"the new deployment would break {target}",), None, None
        old_value = old.of_target(target)[0]
        if high > target.limit_s and not old_value > target.limit_s:
            return "kept", (f"the new deployment is not sure to hold {target}: up to {high:.3g} s",), None, None
    broken = [target for target in targets if old.of_target(target)[0] > target.limit_s]
    saved, noise = _gain(old, new, found.cost)
    if broken:
        unsure = [target for target in broken if new.of_target(target)[2] > target.limit_s]
        if unsure:
            why = f"the old deployment breaks {unsure[0]} now, but the new one is not sure to hold it either"
            return "kept", (why,), saved, noise
        value = old.of_target(broken[0])[0]
        return (
            "replaced",
            (f"the old deployment would now break {broken[0]} ({value:.3g} s); the new one holds it",),
            saved,
            noise,
        )
    if saved is None or noise is None:
        return "kept", ("what the two cost cannot be compared",), saved, noise
    if saved <= max(noise, LEAST_GAIN):
        least = max(noise, LEAST_GAIN)
        return (
            "kept",
            (f"the new deployment saves {saved:.1%}, which is within the noise of {least:.1%}",),
            saved,
            noise,
        )
    return (
        "replaced",
        (f"the new deployment saves {saved:.1%} of the cost, more than the noise of {noise:.1%}",),
        saved,
        noise,
    )


def _gain(old: Evaluation, new: Evaluation, cost: Cost) -> tuple[float | None, float | None]:
    """Share of the cost that is saved, and the share that chance could save."""
    before, after = old.cost(cost), new.cost(cost)
    if not (0 < before < math.inf and 0 < after < math.inf):
        return None, None
    low, high = old.cost_interval(cost)[0], new.cost_interval(cost)[1]
    if low <= 0 or high == math.inf:
        return 1 - after / before, None
    half = math.hypot(math.log(before / low), math.log(high / after))
    return 1 - after / before, 1 - math.exp(-half)


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Hold the lock beside a spec. It goes with the process, however that ends. Raises: Locked."""
    lock = path.with_name(f".{path.name}.lock")
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 100).decode(errors="replace").strip() or "another process"
            raise Locked(str(lock), holder) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()}".encode(), 0)
        yield
    finally:
        os.close(handle)


def _record(decision: Decision, folder: Path, old: Deployment, new: Deployment | None) -> None:
    """The decision with both specs, in a file of its own: what a rollback needs, and what a person asks about."""
    stamp = decision.decided_at.replace(":", "").replace("+0000", "Z")
    data = {
        "schema_version": 1,
        **decision.to_dict(),
        "old_spec": old.model_dump(mode="json"),
        "new_spec": None if new is None else new.model_dump(mode="json"),
    }
    name = f"{stamp}-{Path(decision.spec).stem}-{decision.action}-{decision.new or decision.old}.json"
    write_whole(folder / name, json.dumps(data, indent=1, sort_keys=True))
