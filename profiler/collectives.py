"""The least time of a collective over the links that a group of devices spans: a latency and a bandwidth term.

Over several levels a collective is hierarchical (reduce-scatter in the domain, all-reduce of the shares over the
network, all-gather in the domain), and its stages overlap: the slowest level bounds it, with the latency of all.
"""

from __future__ import annotations

from typing import Literal

from .hardware import Accelerator, Link

Collective = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "send"]


def collective_bound_s(
    collective: Collective, accelerator: Accelerator, devices: int, message_bytes: float, messages: int = 1
) -> float:
    """Least time of `messages` collectives over a group of devices, seconds: a bound, not an estimate.

    By level, g devices send in one direction, of a message of B bytes: an all-reduce 2 (g - 1) / g * B (Patarasuk and
    Yuan, "Bandwidth optimal all-reduce algorithms", JPDC 69(2), 2009), or B where the switch adds up; all-gather,
    reduce-scatter and all-to-all (g - 1) / g * B; a send B. Over a further level goes what is left of B when the
    domain has shared it out (all-to-all: all that is for other domains).

    Args:
        message_bytes: of all messages together: of an all-reduce what each device holds before, of an all-gather what
            it holds after, of a reduce-scatter before, of an all-to-all what each device has for all.
    Raises: BadHardware: no link joins so many devices.

    >>> from .hardware import accelerator
    >>> f"{collective_bound_s('all_reduce', accelerator('A100'), 8, 2 * 1024 * 8192) * 1e6:.0f} µs"    # 4 + 98
    '102 µs'
    """
    if devices == 1 or not messages:
        return 0.0
    spans = accelerator.spans(devices)
    latency_s = messages * sum(link.latency_s or 0.0 for link, _ in spans)
    if collective == "send":
        return latency_s + message_bytes / spans[-1][0].bytes_per_s_among(2)
    slowest_s, left_bytes, domain = 0.0, message_bytes, 1
    for link, size in spans:
        if collective == "all_to_all":
            inner, domain = domain, min(domain * size, devices)
            sent = message_bytes * (domain - inner) / devices
        else:
            sent = _sent_bytes(collective, link, size, left_bytes)
            left_bytes /= size
        slowest_s = max(slowest_s, sent / link.bytes_per_s_among(size))
    return latency_s + slowest_s


def _sent_bytes(collective: Collective, link: Link, size: int, message_bytes: float) -> float:
    once = (size - 1) / size * message_bytes
    if collective != "all_reduce":
        return once
    return min(2 * once, message_bytes) if link.in_network_reduction else 2 * once


def latency_unknown(accelerator: Accelerator, devices: int) -> tuple[str, ...]:
    """The links that a group spans whose latency no source gives, so that bounds count none."""
    return tuple(link.name for link, _ in accelerator.spans(devices) if link.latency_s is None)
