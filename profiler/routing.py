"""Where the tokens of a mixture of experts go: experts touched, loads of ranks, and what travels between ranks.

Routing is taken as uniform where nobody says otherwise: each token chooses any k of the E experts alike.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from ..runtime.model_parts import Experts


class Routing(NamedTuple):
    """How tokens are spread over experts.

    imbalance  (token, expert) pairs of the rank with the most over the mean; None: expected under uniform routing
    touched    share of a rank's experts that at least one token of a step chooses; None: expected likewise
    """

    imbalance: float | None = None
    touched: float | None = None


UNIFORM = Routing()


def touched(chosen: float, tokens: float) -> float:
    """Expected share of the experts that at least one of so many tokens chooses, each with probability `chosen`.

    >>> round(touched(8 / 128, 16), 3)
    0.644
    """
    share: float = 1.0 - (1.0 - chosen) ** tokens
    return share


def load_imbalance(experts: Experts, tokens: float, ranks: int) -> float:
    """Expected load of the rank with the most (token, expert) pairs over the mean, under uniform routing.

    A rank's load is a sum of draws without replacement, one for each token, taken as normal; the expected largest of n
    normal numbers is Blom's (Statistical Estimates and Transformed Beta-Variables, 1958), and since the loads add up to
    a constant they lie sqrt(n / (n - 1)) further apart. At most what the experts of a rank can take.
    """
    if ranks == 1:
        return 1.0
    count, k = experts.num_experts, experts.experts_per_token
    mean = np.maximum(tokens, 1) * k / ranks
    variance = mean * (1 - 1 / ranks) * (count - k) / (count - 1)
    most = NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25)) * math.sqrt(ranks / (ranks - 1))
    bounded = np.minimum(mean + most * np.sqrt(variance), np.maximum(tokens, 1) * min(k, -(-count // ranks))) / mean
    return float(bounded) if np.ndim(bounded) == 0 else bounded


def ranks_chosen(experts: Experts, ranks: int) -> float:
    """Expected number of ranks that hold at least one of the experts that a token chooses, under uniform routing.

    1 - C(E - m, k) / C(E, k) for each rank, which holds m = E / ranks experts. Rounded up where they do not divide.

    >>> experts = Experts(256, 256, 8, 2048, True, 2048, tuple(range(3, 61)))
    >>> round(ranks_chosen(experts, 8), 2), round(ranks_chosen(experts, 256), 2)
    (5.29, 8.0)
    """
    count, k = experts.num_experts, experts.experts_per_token
    held = -(-count // ranks)
    return ranks * (1.0 - math.comb(count - held, k) / math.comb(count, k))
