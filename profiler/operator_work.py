"""Work of one kind of operator in one step on one rank: the quantities that bound how long it takes."""

from __future__ import annotations

from dataclasses import dataclass

from .collectives import Collective


@dataclass(frozen=True)
class OperatorWork:
    """Work of one kind of operator in one step on one rank, all layers together; arrays for as many steps.

    flops                floating-point (or integer) operations
    weight_bytes         read once a step
    kv_bytes             of cached keys and values (or states), read once
    activation_bytes     read and written, each operator by itself; caches and fusion may save them
    messages             collectives
    message_bytes        of all of them together: of the tensor that is reduced, of the whole that is gathered or
                         scattered; of an all-to-all and a send what one rank gives away to others
    ranks                that take part in a collective
    """

    name: str
    flops: float = 0.0
    weight_bytes: float = 0.0
    kv_bytes: float = 0.0
    activation_bytes: float = 0.0
    messages: int = 0
    message_bytes: float = 0.0
    ranks: int = 1

    @property
    def collective(self) -> Collective | None:
        """Which collective it is, by its name; None: it computes."""
        return _COLLECTIVES.get(self.name.rpartition(".")[2]) if self.messages else None

    @property
    def wire_bytes(self) -> float:
        """Least bytes that one rank sends: 2 (n - 1) / n of an all-reduce, (n - 1) / n of a gather or a scatter.

        Patarasu and Yuan, "Bandwidth optimal all-reduce algorithms", JPDC 69(2), 2009. A switch that reduces (NVLink
        SHARP) is not modeled.
        """
        if self.collective in ("all_to_all", "send"):
            return self.message_bytes
        share = (self.ranks - 1) / self.ranks
        return (2 * share if self.collective == "all_reduce" else share) * self.message_bytes


_COLLECTIVES: dict[str, Collective] = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "all_to_all": "all_to_all",
    "send": "send",
}
