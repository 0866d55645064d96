"""How long the KV cache of a prompt takes from a prefill replica to a decode replica: what each device sends and gets,
and the link between them.

Every rank of the prefill replica sends its part over its own link, at the same time; a transfer takes as long as the
device that sends or receives most, at the link's peak rate: a bound, not an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.model_shape import ModelShape
from ..runtime.spec import BadSpec, Deployment, KvTransfer, Pool
from .facts import same_name
from .hardware import Accelerator, Link, accelerator
from .operators import Sharding, kv_bytes_per_token, stage_shape
from .rank_memory import state_bytes_of_request


@dataclass(frozen=True)
class TransferLink:
    """What joins the two pools.

    send_bytes_per_s, receive_bytes_per_s  of one device of the prefill pool, and of one of the decode pool
    latency_s       of one transfer
    latency_known   False: no source gives one, and none is counted
    """

    name: str
    send_bytes_per_s: float
    receive_bytes_per_s: float
    latency_s: float
    latency_known: bool
    source: str

    @property
    def not_modeled(self) -> tuple[str, ...]:
        rate = f"KV travels at the peak rate of {self.name} ({self.source}), and is set up in its latency alone"
        return (rate,) if self.latency_known else (rate, f"the latency of {self.name}: no source gives one")


@dataclass(frozen=True)
class KvBytes:
    """What one request's KV is to the devices of two replicas, in bytes a token, and in bytes that do not grow with it
    (states of linear attention).

    sent, received  of the device that sends most, and of the one that receives most
    all             that go over all links together
    """

    sent_per_token: int
    received_per_token: int
    all_per_token: int
    sent_states: int
    received_states: int
    all_states: int


def transferred_bytes(shape: ModelShape, prefill: Pool, decode: Pool) -> KvBytes:
    """Bytes of a request's KV on their way, under the sharding of both replicas.

    Each rank of the decode replica gets what it holds: its share of the heads of its layers; a latent (MLA) whole, on
    every rank. It reads that from the prefill ranks that have it: where the decode replica has more ranks than the
    prefill replica, several read from the same one; where it has fewer, one reads from several, of a latent from one of
    them (vLLM's NixlConnector does so). Context-parallel ranks hold all KV, and one group of them sends.
    """
    most, least = Sharding.of(decode), Sharding.of(prefill)
    tp_to, tp_from = decode.tensor_parallel_size, prefill.tensor_parallel_size
    dtype = prefill.kv_cache_dtype
    readers = -(-tp_to // tp_from)
    senders = [stage_shape(shape, prefill.pipeline_parallel_size, i) for i in range(prefill.pipeline_parallel_size)]
    getters = [stage_shape(shape, decode.pipeline_parallel_size, i) for i in range(decode.pipeline_parallel_size)]
    parts, states = (tp_to, most) if tp_to >= tp_from else (tp_from, least)
    return KvBytes(
        sent_per_token=readers * max(kv_bytes_per_token(held, parts, dtype) for held in senders),
        received_per_token=max(kv_bytes_per_token(held, tp_to, dtype) for held in getters),
        all_per_token=tp_to * sum(kv_bytes_per_token(held, tp_to, dtype) for held in getters),
        sent_states=readers * max(state_bytes_of_request(held, states) for held in senders),
        received_states=max(state_bytes_of_request(held, most) for held in getters),
        all_states=tp_to * sum(state_bytes_of_request(held, most) for held in getters),
    )


@dataclass(frozen=True)
class TransferTime:
    """Seconds of a transfer, without waiting: latency_s + fixed_s + s_per_token * the tokens of its whole blocks.

    The first of the three is on the way and leaves the link free; the others occupy it.
    """

    latency_s: float
    fixed_s: float
    s_per_token: float
    block_size: int
    bytes_per_token: int
    fixed_bytes: int

    def tokens(self, input_tokens: int) -> int:
        """Of the blocks that a prompt fills, the last one perhaps in part: they travel whole."""
        return -(-input_tokens // self.block_size) * self.block_size

    def seconds(self, input_tokens: int) -> float:
        """Of the prompt alone on the link."""
        return self.latency_s + self.fixed_s + self.s_per_token * self.tokens(input_tokens)


def transfer_time(shape: ModelShape, prefill: Pool, decode: Pool, link: TransferLink) -> TransferTime:
    """How long KV takes from one replica to another. Never less than bytes / bandwidth of any device."""
    each = transferred_bytes(shape, prefill, decode)
    send, receive = link.send_bytes_per_s, link.receive_bytes_per_s
    return TransferTime(
        latency_s=link.latency_s,
        fixed_s=max(each.sent_states / send, each.received_states / receive),
        s_per_token=max(each.sent_per_token / send, each.received_per_token / receive),
        block_size=prefill.block_size,
        bytes_per_token=each.all_per_token,
        fixed_bytes=each.all_states,
    )


def transfer_link(deployment: Deployment) -> TransferLink:
    """What the spec says that joins its pools, from the catalog or in figures of its own.

    Raises: BadSpec: no link of that name, one that does not reach, or none known. BadHardware: an unknown accelerator.
    """
    prefill, decode = deployment.phases
    asked = deployment.kv_transfer or KvTransfer()
    if asked.bytes_per_s is not None:
        rate = asked.bytes_per_s
        known = asked.latency_s is not None
        return TransferLink("the spec's own link", rate, rate, asked.latency_s or 0.0, known, asked.source)
    sender, receiver = accelerator(prefill.accelerator), accelerator(decode.accelerator)
    devices = sum(pool.replicas * pool.devices_per_replica for pool in (prefill, decode))
    first, second = _named(asked.link, sender, receiver) if asked.link else _nearest(sender, receiver, devices)
    _check_reaches(first, second, sender, receiver, devices)
    latencies = [link.latency_s for link in (first, second) if link.latency_s is not None]
    name = first.name if first == second else f"{first.name} to {second.name}"
    sources = dict.fromkeys(f"{link.source}, {link.as_of}" for link in (first, second))
    return TransferLink(
        name,
        first.bytes_per_s_among(2),
        second.bytes_per_s_among(2),
        max(latencies, default=0.0),
        bool(latencies),
        "; ".join(sources),
    )


def _named(name: str, sender: Accelerator, receiver: Accelerator) -> tuple[Link, Link]:
    ends = (sender, receiver)
    # levels alone: the bus to a server's host ends there, and joins no two servers
    first, second = (next((x for x in end.levels if same_name(x.name, name)), None) for end in ends)
    if first is None or second is None:
        common = [each.name for each in sender.levels if any(same_name(each.name, x.name) for x in receiver.levels)]
        allowed = f"a link of {sender.name} and {receiver.name}: {', '.join(common) or 'they have none in common'}"
        raise BadSpec("kv_transfer.link", name, allowed, _todo("leave it empty for the network"))
    return first, second


def _nearest(sender: Accelerator, receiver: Accelerator, devices: int) -> tuple[Link, Link]:
    """The level that joins all devices of both pools, of one kind; devices of two kinds meet over the network."""
    if sender == receiver:
        joined = 1
        for level in sender.levels:
            joined *= level.devices or devices
            if joined >= devices:
                return level, level
    first, second = (next((x for x in end.levels if x.devices is None), None) for end in (sender, receiver))
    if first is None or second is None:
        without = sender.name if first is None else receiver.name
        allowed = f"figures of your own: the catalog has no link that joins {devices} devices, {without} among them"
        raise BadSpec("kv_transfer.bytes_per_s", None, allowed, _todo("measure yours"))
    return first, second


def _check_reaches(first: Link, second: Link, sender: Accelerator, receiver: Accelerator, devices: int) -> None:
    for link in (first, second):
        if link.devices is not None and sender != receiver:
            allowed = f"a network: {link.name} joins devices of one kind, not {sender.name} and {receiver.name}"
            raise BadSpec("kv_transfer.link", link.name, allowed, _todo("leave it empty"))
        if link.devices is not None and link.devices < devices:
            allowed = f"at most {link.devices} devices on {link.name}; both pools together have {devices}"
            raise BadSpec("kv_transfer.link", link.name, allowed, _todo("leave it empty, or take fewer replicas"))


def _todo(first: str) -> str:
    return f"{first}, or give bytes_per_s, latency_s and source"
