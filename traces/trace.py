"""The one type of a request log: immutable columns, valid by construction. No text, only lengths and keyed hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .acceptance import Acceptance, acceptance_of_rows, acceptance_rows
from .columns import MAX_SECONDS, MAX_TOKENS, BadTrace, Labels, PrefixHashes, frozen
from .metrics import BadTarget, Target

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["MAX_TOKENS", "BadTrace", "Labels", "PrefixHashes", "Trace"]


@dataclass(frozen=True, eq=False)
class Trace:
    """A request log, one row a request, n >= 1 rows. Arrays are read-only; two traces are equal if their digests are.

    arrival_s      (n,) float64  seconds, ascending, first >= 0, last < 1e12
    input_tokens   (n,) int32    >= 1
    output_tokens  (n,) int32    >= 1
    app, adapter, session        Labels of n rows, or None
    pause_s        (n,) float64  seconds from the end of the session's request before until this one was sent, >= 0 and
                                 < 1e12; NaN = not recorded; or None
    prefix         PrefixHashes of n rows, or None; at most ceil(input_tokens / block_size) hashes a request
    targets        what the requests are owed; see `rows`
    target         (n,) int32, index into targets for requests with a target of their own, -1 = none; or None
    acceptance     of speculative decoding, by application, while the log was written; empty where it was not used
    source         where it came from, for people
    notes          what reading or transforming left out or changed, for people; no part of the digest, nor is source

    A target that some request has as its own governs those requests alone; all others govern by application. (The same
    words can stand twice, once for each.)

    Raises: BadTrace: a column breaks its rule; the message names the row, counted from 0.
    """

    arrival_s: npt.NDArray[np.float64]
    input_tokens: npt.NDArray[np.int32]
    output_tokens: npt.NDArray[np.int32]
    app: Labels | None = None
    adapter: Labels | None = None
    session: Labels | None = None
    pause_s: npt.NDArray[np.float64] | None = None
    prefix: PrefixHashes | None = None
    targets: tuple[Target, ...] = ()
    target: npt.NDArray[np.int32] | None = None
    acceptance: tuple[Acceptance, ...] = ()
    source: str = "memory"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "arrival_s", frozen(np.asarray(self.arrival_s, dtype=np.float64) + 0.0))
        self._check_arrivals()
        for name in ("input_tokens", "output_tokens"):
            object.__setattr__(self, name, self._checked_tokens(name))
        for name in ("app", "adapter", "session"):
            labels = getattr(self, name)
            if labels is not None and len(labels.codes) != len(self):
                raise self._bad(name, len(labels.codes), f"{len(self)} rows, as many as arrival_s")
        if self.pause_s is not None:
            self._check_pauses()
        if self.prefix is not None:
            self._check_prefix(self.prefix)
        self._check_targets()

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last, seconds."""
        return float(self.arrival_s[-1] - self.arrival_s[0])

    @property
    def rate_per_s(self) -> float:
        """Mean arrival rate: n - 1 inter-arrival times over the duration; 0 where nothing separates the arrivals."""
        return (len(self) - 1) / self.duration_s if self.duration_s > 0 else 0.0

    def rows(self, target: Target) -> npt.NDArray[np.bool_]:
        """The requests that `target`, one of `targets`, governs: (n,) bool.

        Those that have it as their own; and, where it governs by application, all requests of its `app` (None: of every
        app) that have no target of their own.
        """
        own = np.full(len(self), -1, dtype=np.int32) if self.target is None else self.target
        governed = np.zeros(len(self), dtype=np.bool_)
        owned = self._owned()
        for index, candidate in enumerate(self.targets):
            if candidate == target:
                governed |= (own == index) if index in owned else (own == -1) & self._of_app(target.app)
        return governed

    def select(self, rows: npt.NDArray[np.bool_] | slice) -> Trace:
        """These requests, in order, at the same arrival times. Targets that none of them has as its own any more go."""
        targets, target = self.targets, self.target
        if target is not None:
            target = target[rows]
            left, owned = set(target.tolist()), self._owned()
            kept = [i for i in range(len(targets)) if i not in owned or i in left]
            position = np.full(len(targets) + 1, -1, dtype=np.int32)
            position[kept] = np.arange(len(kept), dtype=np.int32)
            targets = tuple(targets[i] for i in kept)
            target = position[target] if left != {-1} else None
        return replace(
            self,
            arrival_s=self.arrival_s[rows],
            input_tokens=self.input_tokens[rows],
            output_tokens=self.output_tokens[rows],
            app=None if self.app is None else self.app.select(rows),
            adapter=None if self.adapter is None else self.adapter.select(rows),
            session=None if self.session is None else self.session.select(rows),
            pause_s=None if self.pause_s is None else self.pause_s[rows],
            prefix=None if self.prefix is None else self.prefix.select(rows),
            targets=targets,
            target=target,
        )

    def digest(self) -> str:
        """SHA-256 (hex) of the content: the same for the same requests, on every machine, however names are coded."""
        sha = hashlib.sha256(b"paretune trace 1")
        for name in ("arrival_s", "input_tokens", "output_tokens"):
            column = getattr(self, name)
            _update(sha, name, column.astype(column.dtype.newbyteorder("<")).tobytes())
        for name in ("app", "adapter", "session"):
            labels = getattr(self, name)
            labels = None if labels is None else labels.select(slice(None))
            if labels is not None:
                _update(sha, f"{name} names", json.dumps(labels.names).encode())
                _update(sha, f"{name} codes", labels.codes.astype("<i4").tobytes())
        if self.pause_s is not None:
            _update(sha, "pause_s", self.pause_s.astype("<f8").tobytes())
        if self.prefix is not None:
            _update(sha, "prefix block size", str(self.prefix.block_size).encode())
            _update(sha, "prefix hashes", self.prefix.hashes.astype("<i8").tobytes())
            _update(sha, "prefix offsets", self.prefix.offsets.astype("<i8").tobytes())
        owned = self._owned()
        shared = sorted(str(target) for i, target in enumerate(self.targets) if i not in owned)
        _update(sha, "targets", json.dumps(shared).encode())
        if self.target is not None and owned:
            own = Labels.of(None if i < 0 else str(self.targets[i]) for i in self.target.tolist())
            assert own is not None, "owned is not empty"
            _update(sha, "own targets", json.dumps(own.names).encode())
            _update(sha, "own target codes", own.codes.astype("<i4").tobytes())
        if self.acceptance:
            _update(sha, "acceptance", json.dumps(acceptance_rows(self.acceptance)).encode())
        return sha.hexdigest()

    def to_pandas(self) -> pd.DataFrame:
        """One row a request; absent columns are left out. What is not per request goes to `attrs["paretune"]`.

        app, adapter and session are categories, prefix_hashes an int64 array a row, target the text of a request's own.
        """
        import pandas as pd

        frame = pd.DataFrame({name: getattr(self, name) for name in ("arrival_s", "input_tokens", "output_tokens")})
        for name in ("app", "adapter", "session"):
            labels: Labels | None = getattr(self, name)
            if labels is not None:
                frame[name] = pd.Categorical.from_codes(
                    labels.codes, categories=pd.Index(list(labels.names), dtype=str)
                )
        if self.pause_s is not None:
            frame["pause_s"] = self.pause_s
        if self.prefix is not None:
            frame["prefix_hashes"] = pd.Series([self.prefix.row(i) for i in range(len(self))], dtype=object)
        if self.target is not None:
            own = [None if i < 0 else str(self.targets[i]) for i in self.target.tolist()]
            frame["target"] = pd.Series(own, dtype=object)
        owned = self._owned()
        frame.attrs["paretune"] = {
            "targets": [str(target) for i, target in enumerate(self.targets) if i not in owned],
            "prefix_block_size": None if self.prefix is None else self.prefix.block_size,
            "acceptance": acceptance_rows(self.acceptance),
            "source": self.source,
            "notes": list(self.notes),
        }
        return frame

    @classmethod
    def from_pandas(cls, frame: pd.DataFrame) -> Trace:
        """The trace of a frame as `to_pandas` makes it. Raises: BadTrace: a column is missing or breaks its rule."""
        about = frame.attrs.get("paretune", {})
        source = str(about.get("source", "pandas"))
        for name in ("arrival_s", "input_tokens", "output_tokens"):
            if name not in frame:
                raise BadTrace(f"{source}: {name}", list(frame.columns), "a column of that name", "add it")
        prefix = None
        if "prefix_hashes" in frame:
            block_size = about.get("prefix_block_size")
            if block_size is None:
                raise BadTrace(
                    f"{source}: prefix_hashes",
                    "no block size",
                    'attrs["paretune"]["prefix_block_size"]',
                    "say how many tokens a hash covers, or drop the column",
                )
            prefix = PrefixHashes.of(list(frame["prefix_hashes"]), int(block_size))
        shared = [parse_target(f"{source}: targets", text) for text in about.get("targets", [])]
        own = frame.get("target")
        texts = None if own is None else [None if blank else str(text) for text, blank in zip(own, own.isna())]
        targets, target = join_targets(shared, texts, lambda i: f"{source}: row {i}: target")
        return cls(
            arrival_s=frame["arrival_s"].to_numpy(),
            input_tokens=frame["input_tokens"].to_numpy(),
            output_tokens=frame["output_tokens"].to_numpy(),
            app=_labels_of(frame, "app"),
            adapter=_labels_of(frame, "adapter"),
            session=_labels_of(frame, "session"),
            pause_s=frame["pause_s"].to_numpy(np.float64) if "pause_s" in frame else None,
            prefix=prefix,
            targets=targets,
            target=target,
            acceptance=acceptance_of_rows(about.get("acceptance", []), source),
            source=source,
            notes=tuple(about.get("notes", ())),
        )

    def _owned(self) -> set[int]:
        """Indices of the targets that are some request's own."""
        return set() if self.target is None else set(self.target.tolist()) - {-1}

    def _of_app(self, app: str | None) -> npt.NDArray[np.bool_]:
        if app is None:
            return np.ones(len(self), dtype=np.bool_)
        if self.app is None or app not in self.app.names:
            return np.zeros(len(self), dtype=np.bool_)
        governed: npt.NDArray[np.bool_] = self.app.codes == self.app.names.index(app)
        return governed

    def _bad(self, where: str, found: object, allowed: str) -> BadTrace:
        return BadTrace(f"{self.source}: {where}", found, allowed, "correct the log and run again")

    def _check_arrivals(self) -> None:
        arrival_s = self.arrival_s
        if arrival_s.ndim != 1 or not len(arrival_s):
            raise self._bad("arrival_s", f"shape {arrival_s.shape}", "at least one request")
        unfit = ~((arrival_s >= 0) & (arrival_s < MAX_SECONDS))
        if unfit.any():
            i = int(np.argmax(unfit))
            raise self._bad(
                f"row {i}: arrival_s", float(arrival_s[i]), f"a number of seconds from 0 to {MAX_SECONDS:g}"
            )
        back = np.diff(arrival_s) < 0
        if back.any():
            i = int(np.argmax(back)) + 1
            raise self._bad(f"row {i}: arrival_s", float(arrival_s[i]), f"not before {arrival_s[i - 1]}, the row above")

    def _check_pauses(self) -> None:
        pause_s = np.asarray(self.pause_s, dtype=np.float64)
        object.__setattr__(self, "pause_s", frozen(pause_s + 0.0))
        if pause_s.shape != (len(self),):
            raise self._bad("pause_s", f"shape {pause_s.shape}", f"{len(self)} rows, as many as arrival_s")
        unfit = ~(((pause_s >= 0) & (pause_s < MAX_SECONDS)) | np.isnan(pause_s))
        if unfit.any():
            i = int(np.argmax(unfit))
            raise self._bad(f"row {i}: pause_s", float(pause_s[i]), f"seconds from 0 to {MAX_SECONDS:g}, or none")

    def _checked_tokens(self, name: str) -> npt.NDArray[np.int32]:
        column: npt.NDArray[Any] = np.asarray(getattr(self, name))
        if column.shape != (len(self),) or column.dtype.kind not in "iuf":
            raise self._bad(name, f"{column.dtype} of shape {column.shape}", f"{len(self)} integers")
        unfit = ~((column >= 1) & (column <= MAX_TOKENS) & (column == np.floor(column)))
        if unfit.any():
            i = int(np.argmax(unfit))
            raise self._bad(f"row {i}: {name}", column[i].item(), f"an integer of 1 to {MAX_TOKENS}")
        return frozen(column.astype(np.int32, copy=False))

    def _check_prefix(self, prefix: PrefixHashes) -> None:
        if len(prefix.offsets) != len(self) + 1:
            raise self._bad("prefix", len(prefix.offsets) - 1, f"{len(self)} rows, as many as arrival_s")
        most = -(-self.input_tokens.astype(np.int64) // prefix.block_size)
        over = prefix.counts > most
        if over.any():
            i = int(np.argmax(over))
            allowed = f"at most {most[i]} of {prefix.block_size} tokens for {self.input_tokens[i]} input tokens"
            raise self._bad(f"row {i}: prefix hashes", int(prefix.counts[i]), allowed)
        previous, first = prefix.previous()
        order = np.argsort(prefix.hashes, kind="stable")
        same = np.diff(prefix.hashes[order]) == 0
        unchained = same & ((np.diff(previous[order]) != 0) | (np.diff(first[order].astype(np.int8)) != 0))
        if unchained.any():
            at = int(order[1:][unchained].min())
            i = int(np.searchsorted(prefix.offsets, at, side="right")) - 1
            raise self._bad(
                f"row {i}: prefix hashes",
                int(prefix.hashes[at]),
                "chained hashes: one hash stands for one whole prefix",
            )

    def _check_targets(self) -> None:
        if self.target is not None:
            target = np.asarray(self.target, dtype=np.int32)
            object.__setattr__(self, "target", frozen(target))
            if target.shape != (len(self),) or target.min() < -1 or target.max() >= len(self.targets):
                raise self._bad("target", f"shape {target.shape}", f"{len(self)} indices into targets, or -1")


def _update(sha: hashlib._Hash, name: str, data: bytes) -> None:
    sha.update(f"{name}:{len(data)}:".encode())
    sha.update(data)


def _labels_of(frame: pd.DataFrame, name: str) -> Labels | None:
    if name not in frame:
        return None
    column = frame[name]
    return Labels.of(None if blank else str(value) for value, blank in zip(column, column.isna()))


def parse_target(where: str, text: object) -> Target:
    """Target.parse for a text that stands in a log. Raises: BadTrace, naming the place."""
    try:
        return Target.parse(str(text))
    except BadTarget as error:
        raise BadTrace(where, text, error.allowed, error.todo) from None


def join_targets(
    shared: Sequence[Target], own: Sequence[str | None] | None, where: Callable[[int], str]
) -> tuple[tuple[Target, ...], npt.NDArray[np.int32] | None]:
    """`targets` and `target` of a Trace, from those that govern by application and one text (or None) a request.

    where: row number -> place, for messages.
    """
    if own is None or all(text is None for text in own):
        return tuple(shared), None
    index: dict[Target, int] = {}
    parsed: dict[str, int] = {}
    target = np.full(len(own), -1, dtype=np.int32)
    for i, text in enumerate(own):
        if text is not None:
            if text not in parsed:
                parsed[text] = index.setdefault(parse_target(where(i), text), len(shared) + len(index))
            target[i] = parsed[text]
    return (*shared, *index), target
