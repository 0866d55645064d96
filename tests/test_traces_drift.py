"""traces/drift.py: says so when the workload moved, and does not cry wolf when it only wobbles."""

from __future__ import annotations

import numpy as np
import pytest

from paretune.traces import BadTrace, Trace, drift, fingerprint, read, sample_path, scale
from paretune.traces.columns import Labels, PrefixHashes


def stationary(n: int, seed: int, *, cv: float = 1.0, batch: int = 1, voice: float = 0.3, documents: int = 50) -> Trace:
    """Two applications, log-normal lengths, Gamma inter-arrival times or batches, prompts that share documents."""
    rng = np.random.default_rng(seed)
    starts = np.cumsum(rng.gamma(1 / cv**2, batch * cv**2 / 5, -(-n // batch)))
    is_voice = rng.random(n) < voice
    input_tokens = np.clip(rng.lognormal(6 + is_voice, 1.2, n), 1, 1e5).astype(np.int32)
    document = rng.integers(0, documents, n)
    return Trace(
        arrival_s=np.sort(np.repeat(starts, batch)[:n] + rng.exponential(0.5 * (batch > 1), n)),
        input_tokens=input_tokens,
        output_tokens=np.clip(rng.lognormal(5 - is_voice, 0.9, n), 1, 1e5).astype(np.int32),
        app=Labels.of(np.where(is_voice, "voice", "chat").tolist()),
        prefix=PrefixHashes.of(
            [[int(d) * 10 + i for i in range(min(4, t // 64))] for d, t in zip(document, input_tokens)], 64
        ),
    )


@pytest.mark.parametrize("process", [{}, {"cv": 3.0}, {"batch": 8}], ids=["Poisson", "bursty", "batches"])
@pytest.mark.parametrize("n", [60, 400, 2000])
def test_a_stationary_workload_raises_fewer_than_one_false_alarm_in_fifty(n, process):
    alarms = []
    for seed in range(60):
        old, new = stationary(n, seed, **process), stationary(n // 2, 10_000 + seed, **process)
        alarms.append(drift(fingerprint(old), new).moved)
    assert np.mean(alarms) <= 0.02


@pytest.mark.parametrize(
    ("factors", "word"),
    [
        ({"rate": 1.5}, "rate"),
        ({"rate": 0.6}, "rate"),
        ({"input_length": 1.5}, "input"),
        ({"output_length": 1.5}, "output"),
        ({"output_length": 0.6}, "output"),
    ],
)
def test_a_change_of_half_is_found_among_two_thousand_requests_and_named(factors, word):
    for seed in range(10):
        old, new = stationary(2000, seed), stationary(2000, 100 + seed)
        found = drift(fingerprint(old), scale(new, **factors))
        assert found.moved
        assert any(reason.startswith(word) for reason in found.reasons)
        # longer inputs repeat a smaller share of theirs
        assert all(reason.startswith((word, "prefix reuse")) for reason in found.reasons)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"batch": 8}, "index of dispersion"), ({"voice": 0.6}, "share of"), ({"documents": 5000}, "prefix reuse")],
)
def test_changes_of_burstiness_mix_and_reuse_are_found_and_named(change, word):
    for seed in range(5):
        found = drift(fingerprint(stationary(3000, seed)), stationary(3000, 100 + seed, **change))
        assert found.moved
        assert any(reason.startswith(word) for reason in found.reasons)


def test_a_certain_but_immaterial_change_does_not_count_as_moved():
    old, new = stationary(20_000, 1), scale(stationary(20_000, 2), rate=1.06, output_length=1.07)
    assert not drift(fingerprint(old), new).moved


def test_a_trace_has_not_moved_from_itself_and_everything_is_accounted_for():
    trace = read(sample_path())
    found = drift(fingerprint(trace), trace)
    assert not found.moved
    assert found.reasons == ()
    assert [text.split()[0] for text in found.steady[:1]] == ["rate"]
    assert any(text.startswith("output p95") for text in found.steady)


@pytest.mark.parametrize("factors", [{"rate": 1.3}, {"output_length": 1.3}, {"input_length": 1.3}])
def test_a_change_of_three_tenths_is_found_in_ten_minutes_of_real_traffic(factors):
    trace = read(sample_path())
    assert drift(fingerprint(trace), scale(trace, **factors)).moved


def test_a_new_application_is_a_reason():
    old = stationary(1000, 1, voice=0.0)
    found = drift(fingerprint(old), stationary(1000, 2, voice=0.2))
    assert any(reason.startswith("share of voice 0.0% ->") for reason in found.reasons)


def test_a_trace_too_small_to_tell_is_not_a_reason():
    single = Trace(np.zeros(1), np.full(1, 9), np.full(1, 9))
    assert not drift(fingerprint(single), single).moved
    assert not drift(fingerprint(stationary(1000, 1)), stationary(1000, 2).select(slice(0, 3))).moved
    assert not drift(fingerprint(single), stationary(1000, 2)).reasons[1:]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"version": 2}, "version"),
        ({"version": None}, "version"),
        ({"requests": "many"}, "requests"),
        ({"rate_per_s": float("nan")}, "rate_per_s"),
        ({"dispersion": "high"}, "dispersion"),
        ({"input_tokens": None}, "input_tokens"),
        ({"output_tokens": {"design_effect": 1.0}}, "output_tokens: percentiles"),
        ({"output_tokens": {"design_effect": 1.0, "percentiles": {"p50": 3}}}, "output_tokens: percentiles: p10"),
        ({"apps": {"voice": 0.3}}, "apps: voice: share"),
        ({"prefix_reuse": [[64, 0.5]]}, "prefix_reuse"),
    ],
)
def test_what_is_no_fingerprint_is_refused_by_its_field(change, where):
    trace = stationary(100, 1)
    with pytest.raises(BadTrace) as refused:
        drift({**fingerprint(trace), **change}, trace)
    assert refused.value.where == f"fingerprint: {where}"
