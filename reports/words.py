"""Figures as people read them: `$31,200`, `1.4 s`, "95 of 100 requests"."""

from __future__ import annotations

import math

from ..traces.metrics import Metric

UNKNOWN = "—"

# Tokens per English word of common byte-pair vocabularies: about four for three words.
WORDS_PER_TOKEN = 0.75


def significant(value: float, digits: int) -> str:
    """Rounded to significant digits, with thousands separated and no exponent.

    >>> significant(31187, 3), significant(0.004123, 2), significant(9.96, 2)
    ('31,200', '0.0041', '10')
    """
    if value == 0:
        return "0"
    place = digits - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, place)
    place = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(place, 0)}f}"


def dollars(usd: float) -> str:
    """
    >>> dollars(31187), dollars(18.4), dollars(0.5), dollars(0.004123), dollars(math.inf)
    ('$31,200', '$18.40', '$0.50', '$0.00412', '—')
    """
    if not math.isfinite(usd):
        return UNKNOWN
    if usd == 0 or 1 <= abs(usd) < 99.995:
        return f"${usd:,.2f}"
    text = significant(usd, 3)
    while text.endswith("0") and len(text.partition(".")[2]) > 2:
        text = text[:-1]
    return f"${text}"


def seconds(value_s: float, digits: int = 2) -> str:
    """
    >>> seconds(1.43), seconds(0.0581), seconds(75), seconds(0.00042), seconds(math.inf)
    ('1.4 s', '58 ms', '75 s', '420 µs', 'never')
    """
    if math.isnan(value_s):
        return UNKNOWN
    if math.isinf(value_s):
        return "never"
    rounded_s = float(f"{value_s:.{digits - 1}e}")
    for unit, unit_s in (("s", 1.0), ("ms", 1e-3)):
        if rounded_s == 0 or rounded_s >= unit_s:
            return f"{significant(value_s / unit_s, digits)} {unit}"
    return f"{significant(value_s * 1e6, digits)} µs"


def times(ratio: float) -> str:
    """
    >>> times(2.345), times(1.04), times(12.4)
    ('2.3 times', '1.04 times', '12 times')
    """
    return f"{significant(ratio, 3 if ratio < 2 else 2)} times"


def percent(share: float) -> str:
    """
    >>> percent(0.314), percent(0.004)
    ('31 %', '0.4 %')
    """
    return f"{significant(share * 100, 2 if share >= 0.01 else 1)} %"


def span(duration_s: float) -> str:
    """
    >>> span(600), span(5), span(7500), span(864000)
    ('10 minutes', '5 seconds', '2.1 hours', '10 days')
    """
    for unit_s, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if duration_s >= 2 * unit_s:
            return f"{significant(duration_s / unit_s, 2).removesuffix('.0')} {unit}"
    return f"{significant(duration_s, 2).removesuffix('.0')} seconds"


def count(number: int, thing: str) -> str:
    """
    >>> count(1, "request"), count(3564, "request")
    ('1 request', '3,564 requests')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def metric_label(metric: Metric) -> str:
    """
    >>> metric_label(Metric("ttf", 30))
    'TTF-30'
    """
    return f"TTF-{metric.k}" if metric.name == "ttf" else metric.name.upper()


def metric_words(metric: Metric) -> str:
    """What is waited for, as the object of "waits for".

    >>> metric_words(Metric("ttf", 30))
    'the first 30 tokens of the answer (about 22 words)'
    """
    if metric.name == "ttf":
        return f"the first {metric.k} tokens of the answer (about {int(metric.k * WORDS_PER_TOKEN)} words)"
    return {
        "ttft": "the answer to begin",
        "tpot": "each further token of the answer",
        "itl": "the next token of the answer",
        "e2e": "the whole answer",
    }[metric.name]


def share_of_requests(percentile: float) -> str:
    """What pNN means, without the word.

    >>> share_of_requests(95), share_of_requests(50), share_of_requests(99.9)
    ('95 of 100 requests', 'half of all requests', '999 of 1,000 requests')
    """
    if percentile == 50:
        return "half of all requests"
    whole = 100
    while percentile * whole / 100 % 1 and whole < 100_000:
        whole *= 10
    return f"{percentile * whole / 100:,.0f} of {whole:,} requests"
