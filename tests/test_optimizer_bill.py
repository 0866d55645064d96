"""The bill of a choice: the winner by price sheet, energy from modeled utilization, and what others ask for tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from paretune.optimizer.bill import choice, energy, token_comparisons
from paretune.optimizer.front import Evaluation, Front, pareto
from paretune.optimizer.pick import BadPick
from paretune.optimizer.price_sheets import compare, repriced
from paretune.profiler.hardware import accelerator
from paretune.profiler.prices import Offer, PriceSheet, TokenPrice
from paretune.traces.metrics import Metric, Target
from paretune.traces.trace import PrefixHashes, Trace

from .optimizer_examples import deployment, evaluation

TTFT = Metric.parse("ttft")
HOLDS = [Target.parse("ttft:p95<=10s")]


def on(name: str, cost: float, latency_s: float, trial: int, **changes: object) -> Evaluation:
    """One device of that name, at 1 USD an hour and `cost` USD per million tokens."""
    where = deployment(accelerator=name, max_num_seqs=trial + 1)
    limits = {"intervals": {"usd_per_million_tokens": (cost / 2, cost * 2)}, "usd_per_hour": 1.0}
    return evaluation(cost, latency_s, trial, deployment=where, **{**limits, **changes})


def front(*evaluations: Evaluation) -> Front:
    return pareto(evaluations, TTFT, 95, "capacity")


def sheet(kind: str, **prices: float) -> PriceSheet:
    offers = tuple(Offer(name, "A", "x", usd, kind, "s", "2026-01-01") for name, usd in prices.items())
    return PriceSheet(kind, "book.csv", offers)


STUDIES = {"h100": front(on("H100", 0.5, 1.0, 1)), "l40s": front(on("L40S", 0.4, 2.0, 2))}


def test_a_winner_that_flips_between_price_sheets_is_said_to() -> None:
    # at 1 USD an hour each, L40S serves for less; it takes H100 at 1.25 times its price to be as cheap
    found = compare(STUDIES, [sheet("on-demand", H100=3.0, L40S=1.0), sheet("spot", H100=1.0, L40S=1.3)], choice(HOLDS))
    assert [each.study for each in found.winners] == ["l40s", "h100"]
    assert [each.cost_usd for each in found.winners] == pytest.approx([0.4, 0.5])
    assert found.flips
    assert found.to_dict()["flips"] is True


def test_one_winner_under_every_sheet_does_not_flip() -> None:
    found = compare(STUDIES, [sheet("on-demand", H100=3.0, L40S=1.0), sheet("spot", H100=1.5, L40S=0.5)], choice(HOLDS))
    assert [each.study for each in found.winners] == ["l40s", "l40s"]
    assert not found.flips


def test_candidates_whose_devices_a_sheet_does_not_price_are_left_out_and_named() -> None:
    found = compare(STUDIES, [sheet("owned", H100=0.9), sheet("spot", A100=1.0)], choice(HOLDS)).winners
    assert (found[0].study, found[0].unpriced) == ("h100", ("L40S",))
    assert (found[1].winner, found[1].unpriced, found[1].as_of) == (None, ("H100", "L40S"), "")


def test_a_sheet_under_which_nothing_holds_has_no_winner() -> None:
    strict = choice([Target.parse("ttft:p95<=1ms")])
    assert compare(STUDIES, [sheet("spot", H100=1.0, L40S=1.0)], strict).winners[0].winner is None


def test_a_budget_buys_another_point_where_devices_cost_less() -> None:
    study = {"one": front(on("H100", 0.2, 4.0, 1), on("H100", 0.6, 1.0, 2))}
    sheets = [sheet("on-demand", H100=1.0), sheet("spot", H100=0.5)]
    found = compare(study, sheets, choice(HOLDS, budget_usd=0.3))
    assert [each.winner.trial for each in found.winners if each.winner] == [1, 2]
    assert found.flips


def test_studies_of_other_axes_are_not_compared() -> None:
    other = replace(STUDIES["h100"], cost="sizing")
    with pytest.raises(BadPick):
        compare({**STUDIES, "other": other}, [sheet("spot", H100=1.0)], choice(HOLDS))


def test_at_another_price_costs_and_their_intervals_move_and_latencies_stay() -> None:
    before = on("H100", 0.5, 1.0, 1, intervals={"usd_per_million_tokens": (0.25, 1.0), "ttft:p95": (0.5, 2.0)})
    after = repriced(before, {"H100": 3.0})
    assert (after.usd_per_hour, after.usd_per_million_tokens) == pytest.approx((3.0, 1.5))
    assert after.intervals["usd_per_million_tokens"] == pytest.approx((0.75, 3.0))
    assert after.intervals["ttft:p95"] == (0.5, 2.0)
    assert after.summary is before.summary


def test_energy_is_the_devices_power_for_as_long_as_they_compute() -> None:
    found = energy(on("H100", 0.5, 1.0, 1, utilization=0.5, busy_device_s_per_token=1e-3), accelerator("H100"))
    assert found is not None
    # 700 W for a millisecond a token: 0.7 J, 0.194 kWh a million
    assert found.joules_per_token == pytest.approx(0.7)
    assert found.kwh_per_million_tokens == pytest.approx(0.7 / 3.6)
    assert found.to_dict()["inferred"] is True
    assert "h100_sxm" in found.source


def test_energy_is_not_inferred_without_a_power_or_a_run() -> None:
    assert energy(on("TPU v5e", 0.5, 1.0, 1, busy_device_s_per_token=1e-3), accelerator("TPU v5e")) is None
    assert energy(on("H100", 0.5, 1.0, 1), accelerator("H100")) is None


def test_a_token_price_below_our_modeled_cost_is_possibly_subsidized() -> None:
    n = 4
    trace = Trace(np.arange(n, dtype=np.float64), np.full(n, 300), np.full(n, 100))
    ours = on("H100", 2.0, 1.0, 1)  # 1 to 4
    # three input tokens to an output token
    prices = [TokenPrice("m", name, usd, None, usd, "s", "2026-01-01") for name, usd in
              (("dear", 0.75), ("cheap", 0.1), ("near", 0.3))]  # fmt: skip
    found = token_comparisons(ours, trace, prices)
    assert [each.price.provider for each in found] == ["cheap", "near", "dear"]
    assert [each.usd_per_million_tokens for each in found] == pytest.approx([0.4, 1.2, 3.0])
    assert [each.possibly_subsidized for each in found] == [True, True, False]
    assert [each.within_interval for each in found] == [False, True, True]


def test_what_a_trace_repeats_is_charged_as_cached() -> None:
    n = 4
    prefix = PrefixHashes.of([[1, 2]] * n, 100)
    trace = Trace(np.arange(n, dtype=np.float64), np.full(n, 200), np.full(n, 100), prefix=prefix)
    found = token_comparisons(on("H100", 2.0, 1.0, 1), trace, [TokenPrice("m", "p", 1.0, 0.1, 0.0, "s", "2026-01-01")])
    # all but the first of four prompts, two input tokens to an output token
    assert found[0].cached_share == pytest.approx(0.75)
    assert found[0].usd_per_million_tokens == pytest.approx(2 * (0.25 * 1.0 + 0.75 * 0.1))


def test_a_candidate_without_capacity_is_not_compared() -> None:
    trace = Trace(np.arange(2, dtype=np.float64), np.full(2, 3), np.full(2, 2))
    prices = [TokenPrice("m", "p", 1.0, None, 1.0, "s", "2026-01-01")]
    assert token_comparisons(evaluation(float("inf"), 1.0), trace, prices) == ()


def test_what_the_ledger_keeps_of_utilization_comes_back_and_older_ledgers_read_as_unknown() -> None:
    kept = on("H100", 0.5, 1.0, 1, utilization=0.5, busy_device_s_per_token=1e-3).to_dict()
    again = Evaluation.from_dict(kept)
    assert (again.utilization, again.busy_device_s_per_token) == (0.5, 1e-3)
    del kept["utilization"], kept["busy_device_s_per_token"]
    assert np.isnan(Evaluation.from_dict(kept).utilization)
