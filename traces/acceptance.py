"""How often the tokens that speculative decoding proposed were kept, application by application, as a log says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .columns import MAX_TOKENS, BadTrace, Labels

# counts of one request as a log has them, and of one application added up
COUNTS = ("steps", "drafts", "draft_tokens", "accepted_tokens")
_MOST = MAX_TOKENS**2


@dataclass(frozen=True)
class Acceptance:
    """What was proposed for the requests of an application while they were logged, and kept.

    app              its name; None for requests without one
    steps            that brought a request more tokens after its first
    drafts           of these, steps that verified proposals
    draft_tokens     proposed
    accepted_tokens  of these, in a row from the first of a step, what the model said, too

    Raises: BadTrace: counts that cannot be.
    """

    app: str | None
    steps: int
    drafts: int
    draft_tokens: int
    accepted_tokens: int

    def __post_init__(self) -> None:
        counts = [getattr(self, name) for name in COUNTS]
        if not all(type(count) is int and 0 <= count <= _MOST for count in counts):
            raise BadTrace(f"acceptance of {self.app}", counts, "integers from 0 on", "correct the log")
        drafted = self.drafts > 0 or self.draft_tokens == 0
        if not (drafted and self.drafts <= self.steps and self.drafts <= self.draft_tokens >= self.accepted_tokens):
            allowed = "drafts <= steps, drafts <= draft_tokens (0 without drafts), accepted_tokens <= draft_tokens"
            raise BadTrace(f"acceptance of {self.app}", counts, allowed, "correct the log")

    @property
    def drafted_share(self) -> float:
        """Share of the steps that had proposals to verify."""
        return self.drafts / self.steps if self.steps else 0.0

    @property
    def accepted_share(self) -> float:
        """Share of the proposed tokens that were kept, as servers report it."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else 0.0

    @property
    def probability(self) -> float:
        """Chance of a proposal to be kept where those before it were, taken as the same at every place of a draft.

        The one that gives the recorded mean: accepted per draft = p + p**2 + ... + p**k with k the mean length of a
        draft, its fraction counted in part (Leviathan et al., arXiv:2211.17192, equation 1, without the last token).
        """
        if self.accepted_tokens == 0:
            return 0.0
        if self.accepted_tokens == self.draft_tokens:
            return 1.0
        wanted, length = self.accepted_tokens / self.drafts, self.draft_tokens / self.drafts
        low, high = 0.0, 1.0
        for _ in range(60):
            p = (low + high) / 2
            powers = p ** np.arange(1, int(length) + 1)
            kept = float(powers.sum()) + (length - int(length)) * p ** (int(length) + 1)
            low, high = (p, high) if kept < wanted else (low, p)
        return (low + high) / 2


def merged(found: Iterable[Acceptance]) -> tuple[Acceptance, ...]:
    """One of each application, by name; those whose answers took no further step say nothing, and are left out."""
    sums: dict[str | None, Acceptance] = {}
    for each in found:
        before = sums.get(each.app, Acceptance(each.app, 0, 0, 0, 0))
        sums[each.app] = replace(before, **{name: getattr(before, name) + getattr(each, name) for name in COUNTS})
    kept = (each for each in sums.values() if each.steps)
    return tuple(sorted(kept, key=lambda each: (each.app is not None, each.app or "")))


def total(found: tuple[Acceptance, ...]) -> Acceptance:
    """All applications together."""
    return Acceptance(None, *(sum(getattr(each, name) for each in found) for name in COUNTS))


def by_request(
    found: tuple[Acceptance, ...], app: Labels | None, requests: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """`drafted_share` and `probability` of each request's application, (n,) each.

    An application of which nothing was recorded gets what was recorded of all together; one for which nothing was
    proposed is proposed nothing, and would keep what all together do.
    """
    everybody = total(found)
    rest = (everybody.drafted_share, everybody.probability)
    rates = {each.app: (each.drafted_share, each.probability if each.drafts else rest[1]) for each in found}
    if app is None:
        table, codes = [rates.get(None, rest)], np.zeros(requests, np.int64)
    else:
        table = [*(rates.get(name, rest) for name in app.names), rates.get(None, rest)]
        codes = app.codes.astype(np.int64)  # without an application: -1, the last place of the table
    drafted, probability = np.array(table, np.float64).T
    return drafted[codes], probability[codes]


def acceptance_rows(found: tuple[Acceptance, ...]) -> list[list[Any]]:
    """As plain data: [application or None, steps, drafts, draft tokens, accepted tokens] each."""
    return [[each.app, *(getattr(each, name) for name in COUNTS)] for each in found]


def acceptance_of_rows(rows: object, where: str) -> tuple[Acceptance, ...]:
    """What `acceptance_rows` wrote. Raises: BadTrace."""
    fits = isinstance(rows, list) and all(isinstance(row, list) and len(row) == 1 + len(COUNTS) for row in rows)
    if not fits or not all(row[0] is None or isinstance(row[0], str) for row in rows):  # type: ignore[attr-defined]
        raise BadTrace(f"{where}: acceptance", rows, f"a list of [app, {', '.join(COUNTS)}]", "write the file again")
    return tuple(Acceptance(*row) for row in rows)  # type: ignore[attr-defined]
