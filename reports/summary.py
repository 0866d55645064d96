"""What a study found, in plain sentences: pure functions, for the page and the terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..optimizer.front import Cost, Evaluation, Front
from ..optimizer.pick import knee
from ..traces.describe import AppStatistics, Statistics
from ..traces.metrics import E2E, HOURS_PER_MONTH, Target, usd_per_month
from .comparison import as_predicted, between, compared, value_of
from .report_data import ReportData, is_same
from .words import (
    count,
    dollars,
    metric_words,
    percent,
    seconds,
    share_of_requests,
    significant,
    span,
    times,
)

if TYPE_CHECKING:
    from ..optimizer.study import Study

# A ratio closer to one than this is no difference that anyone would act on, whatever its interval.
LEAST_DIFFERENCE = 0.01

# Fewer requests beyond a percentile than this, and it is an accident of the recorded window.
LEAST_BEYOND = 50


def money(evaluation: Evaluation, cost: Cost) -> str:
    """The cost axis in words: "$18,400 a month", "$0.412 per million tokens"."""
    return f"{_money(evaluation.cost(cost), cost)} {cost_unit(cost)}"


def money_range(evaluation: Evaluation, cost: Cost) -> str:
    """The interval of the cost, without its unit; empty where it has none, since what devices cost is known."""
    low, high = evaluation.cost_interval(cost)
    return "" if low == high else between(_money(low, cost), _money(high, cost))


def cost_unit(cost: Cost) -> str:
    return "a month" if cost == "sizing" else "per million tokens"


def wait_range(front: Front, evaluation: Evaluation) -> str:
    """The interval of the front's latency; empty where none was worked out."""
    low, high = evaluation.interval(front.metric, front.percentile)
    return "" if low == high else between(seconds(low), seconds(high))


def headline(data: ReportData) -> str:
    """One sentence: what changes, what it costs with a range, what people feel."""
    cost = data.front.cost
    pick, default = as_predicted(data.chosen), as_predicted(data.default)
    if is_same(pick, default):
        return (
            f"The plain default is already the best choice for this traffic: it costs {money(pick, cost)}, and "
            f"{_feel(data.front, pick)}."
        )
    if not math.isfinite(default.cost(cost)):
        bill = f"The plain default cannot keep the target at any load; the pick can, for {money(pick, cost)}"
    else:
        bill = f"The pick {_verb(pick, default, cost)}"
    if likely := money_range(pick, cost):
        bill += f" (likely {likely})"
    return f"{bill}, and {_feel(data.front, pick)}{_instead(data.front, pick, default)}."


def _verb(pick: Evaluation, default: Evaluation, cost: Cost) -> str:
    after, before = pick.cost(cost), default.cost(cost)
    subject = "the monthly bill" if cost == "sizing" else "the price of a million tokens"
    if abs(after / before - 1) < LEAST_DIFFERENCE:
        return f"leaves {subject} at {_money(after, cost)}"
    verb = "lowers" if after < before else "raises"
    return f"{verb} {subject} from {_money(before, cost)} to {_money(after, cost)}"


def _feel(front: Front, evaluation: Evaluation) -> str:
    wait = seconds(as_predicted(evaluation).value(front.metric, front.percentile))
    return f"{share_of_requests(front.percentile)} wait at most {wait} for {metric_words(front.metric)}"


def _instead(front: Front, pick: Evaluation, default: Evaluation) -> str:
    before, after = default.value(front.metric, front.percentile), pick.value(front.metric, front.percentile)
    if math.isnan(before) or math.isnan(after) or abs(after / before - 1) < LEAST_DIFFERENCE:
        return ""
    return f" instead of {seconds(before)}"


def verified_sentence(data: ReportData) -> str:
    """What the live server said about the front's metric."""
    if data.chosen_measured is None:
        return "These figures are predictions: the pick has not been replayed on a live server yet."
    front = data.front
    measured_s = value_of(data.chosen_measured.summary, front.metric, front.percentile)
    guess_s = as_predicted(data.chosen).value(front.metric, front.percentile)
    return (
        f"Checked on a live server with the recorded traffic: {seconds(guess_s)} was predicted, "
        f"{seconds(measured_s)} was measured."
    )


@dataclass(frozen=True)
class Card:
    """Before and after of one thing that people care about."""

    title: str
    before: str
    after: str
    note: str


def cards(data: ReportData) -> tuple[Card, Card, Card]:
    """Cost, the wait on the curve, and how much traffic one copy carries (or, where nobody asked, the whole answer)."""
    front = data.front
    pick, default = as_predicted(data.chosen), as_predicted(data.default)
    hold = f"{dollars(usd_per_month(pick.usd_per_hour))} a month for the hardware ({HOURS_PER_MONTH} hours)"
    bill = Card(
        f"Dollars {cost_unit(front.cost)}",
        _money(default.cost(front.cost), front.cost),
        _money(pick.cost(front.cost), front.cost),
        "; ".join([*_likely(money_range(pick, front.cost)), hold]),
    )
    wait = Card(
        f"Wait for {metric_words(front.metric)}",
        seconds(default.value(front.metric, front.percentile)),
        seconds(pick.value(front.metric, front.percentile)),
        "; ".join([f"{share_of_requests(front.percentile)} wait no longer", *_likely(wait_range(front, pick))]),
    )
    return bill, wait, _third_card(data, pick, default)


def _likely(interval: str) -> list[str]:
    return [f"likely {interval}"] if interval else []


def _third_card(data: ReportData, pick: Evaluation, default: Evaluation) -> Card:
    rate_per_s = data.statistics.total.rate_per_s
    if pick.capacity_rate > 0 and rate_per_s > 0:
        before, after = (f"{significant(each.capacity_rate * rate_per_s, 2)} / s" for each in (default, pick))
        note = f"requests a second that one copy carries within the target; {significant(rate_per_s, 2)} were recorded"
        return Card("Traffic it can carry", before, after, note)
    before, after = (seconds(each.value(E2E, 50)) for each in (default, pick))
    return Card("Wait for the whole answer", before, after, "half of all requests wait no longer")


@dataclass(frozen=True)
class Option:
    """A point of the front with a name that people can say."""

    name: str
    number: int
    evaluation: Evaluation


def options(front: Front) -> tuple[Option, ...]:
    """Cheapest, balanced (the knee) and fastest; where two are one point, its names are joined."""
    if not front.points:
        return ()
    named = (("cheapest", front.points[0]), ("balanced", knee(front)), ("fastest", front.points[-1]))
    names: dict[int, list[str]] = {}
    for name, point in named:
        names.setdefault(front.points.index(point), []).append(name)
    return tuple(Option(" and ".join(words), i + 1, front.points[i]) for i, words in names.items())


def workload(statistics: Statistics) -> tuple[str, ...]:
    """The traffic in plain words: all of it, then application by application."""
    total = statistics.total
    everything = (
        f"{count(total.requests, 'request')} over {span(statistics.duration_s)}, {significant(total.rate_per_s, 2)} a "
        f"second on average; {_burstiness(total)}. {_lengths(total)}"
    )
    apps = [
        f"{each.app or 'No application named'}: {percent(each.share)} of the requests; {_burstiness(each)}. "
        f"{_lengths(each)}"
        for each in statistics.apps
    ]
    return (everything, *apps)


def _burstiness(app: AppStatistics) -> str:
    if math.isnan(app.dispersion):
        return "too few to say how bursty"
    if app.dispersion < 0.8:
        return "they arrive more evenly than chance would have it"
    if app.dispersion <= 1.5:
        return "they arrive like independent people would"
    return f"they come in bursts (counts vary {times(app.dispersion)} as much as with independent people)"


def _lengths(app: AppStatistics) -> str:
    reuse = ""
    if app.prefix_reuse is not None:
        reuse = f" {percent(app.prefix_reuse)} of the prompt tokens repeat the beginning of an earlier prompt."
    return (
        f"A typical prompt has {count(round(app.input.p50), 'token')} and a typical answer {round(app.output.p50):,}; "
        f"one in twenty has more than {round(app.input.p95):,} or {round(app.output.p95):,}.{reuse}"
    )


def confidence(data: ReportData) -> tuple[str, ...]:
    """How sure we are: what the intervals mean, how many held, what the figures rest on."""
    front, total = data.front, data.statistics.total
    verdicts = [row.inside for row in compared(data) if row.inside is not None]
    beyond = total.requests * (100 - front.percentile) / 100
    sentences = [
        "Each interval should hold nine of ten measured values. It comes from what the step-time model got wrong where "
        "it had not been fitted, and from how much the recorded traffic varies by itself."
    ]
    if verdicts:
        sentences.append(f"Of {count(len(verdicts), 'measured value')}, {sum(verdicts)} lie inside their interval.")
    if not data.profile_measured:
        sentences.append(
            f"Step times are not measured: they are estimated from the {data.profile}, and real hardware takes longer "
            "than peak rates or single operators let it expect."
        )
    if beyond < LEAST_BEYOND:
        sentences.append(
            f"Only {count(math.ceil(beyond), 'request')} of {total.requests:,} lie beyond the wait that the curve "
            "shows, so another recording could move it."
        )
    return (*sentences, *data.search)


def search_words(study: Study) -> tuple[str, ...]:
    """How the curve was found, one sentence each."""
    seen = study.screened
    invalid, dropped = sum(seen.invalid.values()), sum(seen.dropped.values())
    sentences = [
        f"Of {seen.points:,} points of the search space {invalid:,} are no valid deployment and {dropped:,} were left "
        f"out by a formula; {seen.simulated:,} were simulated and {seen.measured:,} measured on a live server. "
        f"They were proposed by {study.sampler}, seed {study.seed}."
    ]
    sentences += [
        f"{each.metric}: over {each.number} finalists, measured values were {each.ratio:.2f} times the simulated ones; "
        "predictions are corrected by that."
        for each in study.corrections
    ]
    if seen.failed or seen.measurements_failed:
        sentences.append(f"{seen.failed:,} simulations and {seen.measurements_failed:,} measurements failed.")
    if not study.complete:
        sentences.append("The study ended before it was done, so there may be better points.")
    return tuple(sentences)


def not_tested(data: ReportData) -> tuple[str, ...]:
    """What nobody has looked at, and a reader should not take for granted."""
    sentences = []
    if data.chosen_measured is None:
        sentences.append("The pick has not been replayed on a live server: type: paretune verify.")
    else:
        lost = data.chosen_measured.summary.requests - data.chosen_measured.summary.finished
        if lost:
            sentences.append(f"In the replay {count(lost, 'request')} did not finish; its waits leave them out.")
        if math.isnan(data.chosen_measured.usd_per_million_tokens):
            sentences.append("How much traffic the pick carries was predicted, not measured.")
    before = [pool.weight_dtype for pool in data.default.deployment.pools]
    after = [pool.weight_dtype for pool in data.chosen.deployment.pools]
    if before != after:
        sentences.append(
            f"Whether answers with weights in {', '.join(after)} are as good as in {', '.join(before)}: this report is "
            "about time and money."
        )
    recorded_s = data.statistics.duration_s
    factor = significant(HOURS_PER_MONTH * 3600 / max(recorded_s, 1), 2)
    sentences.append(
        f"Traffic unlike the {span(recorded_s)} recorded. A month's bill assumes that the deployment is held for "
        f"{HOURS_PER_MONTH} hours, {factor} times the recording."
    )
    return tuple(sentences)


def limit_on_axis(data: ReportData) -> Target | None:
    """The tightest target for all requests on the metric and percentile of the curve, or None."""
    same = [
        target
        for target in data.targets
        if target.app is None and target.metric == data.front.metric and target.percentile == data.front.percentile
    ]
    return min(same, key=lambda target: target.limit_s, default=None)


def _money(usd: float, cost: Cost) -> str:
    """Of the cost axis: per hour becomes per month."""
    return dollars(usd_per_month(usd) if cost == "sizing" else usd)
