"""The bill of a choice: who wins under which price sheet, the energy, and what others ask for the same tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..profiler.hardware import Accelerator, BadHardware, accelerator
from ..profiler.prices import Price, PriceBook, PriceSheet, TokenPrice, TokenPrices
from ..profiler.simulator import SimulationResult
from ..runtime.spec import Pool
from ..traces.describe import statistics
from ..traces.metrics import Target, sizing_cost_usd_per_hour, summarize, usd_per_million_tokens
from ..traces.trace import Trace
from .front import Evaluation, Front
from .intervals import CONFIDENCE
from .pick import cheapest, fastest
from .pick import knee as knee_of
from .price_sheets import Choose, SheetComparison, compare
from .sources import Sources
from .store import Ledger
from .study import Study, load_study
from .tuning import Ask, Kept, kept


@dataclass(frozen=True)
class Bill:
    """What a choice costs.

    sheets       the choice made again under every price sheet
    energy       None: not inferred, and why stands in not_inferred
    tokens       what others ask for the same tokens; none: why stands in not_compared
    """

    sheets: SheetComparison
    energy: Energy | None
    not_inferred: str
    tokens: tuple[TokenComparison, ...]
    not_compared: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "price_sheets": self.sheets.to_dict(),
            "energy": self.energy and self.energy.to_dict(),
            "energy_not_inferred": self.not_inferred,
            "token_prices": [each.to_dict() for each in self.tokens],
            "token_prices_not_compared": self.not_compared,
        }


def bill_of(
    found: Kept,
    evaluation: Evaluation,
    choose: Choose,
    *,
    compare_prices: Sequence[str] = (),
    token_prices_path: str | None = None,
    token_model: str | None = None,
) -> Bill:
    """The bill of a candidate of a study, under its own price books and more.

    Args:
        choose: how it was chosen, to choose again under other prices.
        token_model: as the list of token prices calls the model; None: by the name of the study's model.
    Raises: BadHardware: a price book that will not be used.
    """
    device = accelerator(evaluation.deployment.pool.accelerator)
    inferred = energy(evaluation, device)
    why = "" if inferred else f"no source gives the power of {device.name}"
    if device.power_w is not None and not inferred:
        why = "the study was made before utilization was kept: tune again"
    paths = dict.fromkeys([*_price_paths(found.about), *compare_prices])
    token_prices = TokenPrices.load(token_prices_path)
    model = token_model or found.sources.model
    tokens = token_comparisons(evaluation, found.trace, token_prices.of(model))
    not_compared = "" if tokens else "the candidate has no capacity to work its cost out of"
    if not token_prices.of(model):
        not_compared = f"{token_prices.source} has none of {model}"
    return Bill(
        sheets=compare({found.study.name: found.study.front}, sheets_of([PriceBook.load(p) for p in paths]), choose),
        energy=inferred,
        not_inferred=why,
        tokens=tokens,
        not_compared=not_compared,
    )


def sheets_of(books: Sequence[PriceBook]) -> tuple[PriceSheet, ...]:
    """Every sheet of every book, in the order of the books."""
    return tuple(sheet for book in books for sheet in book.sheets())


def choice(
    targets: Sequence[Target], budget_usd: float | None = None, confidence: float = CONFIDENCE, by_knee: bool = False
) -> Choose:
    """How to choose from a front: the fastest within a budget, the cheapest that holds targets, or the knee."""

    def choose(front: Front) -> Evaluation:
        if budget_usd is not None:
            return fastest(front, budget_usd)
        if targets and not by_knee:
            return cheapest(front, targets, confidence)
        return knee_of(front)

    return choose


def compared_prices(ask: Ask, study: Study) -> SheetComparison:
    """The winner under every sheet of the study's book and of those to compare with: by its targets, or the knee."""
    books = [PriceBook.load(path) for path in (ask.prices_path, *ask.compare_prices)]
    return compare({study.name: study.front}, sheets_of(books), choice(study.targets))


def compared_studies(
    names: Sequence[str],
    storage: str,
    *,
    slos: Sequence[str] = (),
    budget_usd: float | None = None,
    compare_prices: Sequence[str] = (),
) -> SheetComparison:
    """The winner among the candidates of several studies, of several accelerators say, under every price sheet.

    Without a way to choose: the cheapest that holds the targets of the first study; if it has none, the knee.
    Raises: NoSuchStudy, BadPick, BadHardware (exit code 2).
    """
    ledger = Ledger(storage)
    studies = [load_study(ledger, name) for name in dict.fromkeys(names)]
    about = [ledger.study(study.name).about or {} for study in studies]
    paths = dict.fromkeys([path for each in about for path in _price_paths(each)] + list(compare_prices))
    targets = [Target.parse(text) for text in slos] or list(studies[0].targets)
    fronts = {study.name: study.front for study in studies}
    return compare(fronts, sheets_of([PriceBook.load(path) for path in paths]), choice(targets, budget_usd))


def _price_paths(about: Mapping[str, Any]) -> list[str | None]:
    """The price books of a study, its own first."""
    return [about.get("prices"), *about.get("compare_prices", ())]


def bill_of_pick(
    name: str,
    storage: str,
    evaluation: Evaluation,
    *,
    slos: Sequence[str] = (),
    budget_usd: float | None = None,
    knee: bool = False,
    confidence: float = CONFIDENCE,
    compare_prices: Sequence[str] = (),
    token_prices_path: str | None = None,
    token_model: str | None = None,
) -> Bill:
    """`bill_of` what `pick_spec` chose in the same way.

    Without a way: by the study's targets, or the knee; so, too, for a point by number, which other prices renumber.
    Raises: what `tuning.kept` raises, and `bill_of`.
    """
    found = kept(name, storage)
    targets = [Target.parse(text) for text in slos] or list(found.study.targets)
    choose = choice(targets, budget_usd, confidence, by_knee=knee)
    return bill_of(
        found,
        evaluation,
        choose,
        compare_prices=compare_prices,
        token_prices_path=token_prices_path,
        token_model=token_model,
    )


@dataclass(frozen=True)
class Energy:
    """Energy of the devices, inferred and not measured: their greatest power, for as long as they compute.

    Left out: what they draw idle and in pauses between steps, hosts and network, and the building (PUE). On the other
    side, a device that waits for its memory draws less than at most.

    utilization        share of the time that the devices compute, modeled
    joules_per_token   of an output token, the computing of prompts included
    power_w            of one device at most, with its source and date
    """

    utilization: float
    joules_per_token: float
    power_w: float
    source: str
    as_of: str

    @property
    def kwh_per_million_tokens(self) -> float:
        return self.joules_per_token * 1e6 / 3.6e6

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, labeled as inferred."""
        return {"inferred": True, **asdict(self), "kwh_per_million_tokens": self.kwh_per_million_tokens}


def energy(evaluation: Evaluation, device: Accelerator) -> Energy | None:
    """At the load that the evaluation's latencies speak of. None: no source gives the device's power, or no run."""
    return _energy(evaluation.utilization, evaluation.busy_device_s_per_token, device)


def _energy(utilization: float, busy_device_s_per_token: float, device: Accelerator) -> Energy | None:
    if device.power_w is None or not math.isfinite(busy_device_s_per_token):
        return None
    source, as_of = device.sources["power_w"]
    return Energy(
        utilization=utilization,
        joules_per_token=busy_device_s_per_token * device.power_w,
        power_w=device.power_w,
        source=source,
        as_of=as_of,
    )


@dataclass(frozen=True)
class RunCost:
    """What one simulated run costs: the price of every device that it holds, busy or not, and its energy.

    utilization             share of the time that a replica computes
    usd_per_million_tokens  output tokens, at the load of the run
    price, usd_*            None: the book has no price for the device, and why stands in unpriced
    """

    utilization: float
    price: Price | None
    unpriced: str
    usd_per_hour: float | None
    usd_per_million_tokens: float | None
    energy: Energy | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {**asdict(self), "energy": self.energy and self.energy.to_dict()}


def run_cost(result: SimulationResult, pool: Pool, sources: Sources) -> RunCost:
    """Of a run of one pool, all its replicas."""
    summary = summarize(result.times)
    tokens = int(result.times.output_tokens.sum())
    utilization = busy_s_per_token = math.nan
    if tokens:
        utilization = result.busy_s * summary.output_tokens_per_s / tokens / pool.replicas
        busy_s_per_token = result.busy_s * pool.devices_per_replica / tokens
    found = _energy(utilization, busy_s_per_token, accelerator(pool.accelerator))
    try:
        price = sources.price(pool)
    except BadHardware as unpriced:
        return RunCost(utilization, None, str(unpriced), None, None, found)
    usd_per_hour = sizing_cost_usd_per_hour(pool.devices_per_replica, pool.replicas, price.usd_per_hour)
    usd = usd_per_million_tokens(usd_per_hour, summary.output_tokens_per_s)
    return RunCost(utilization, price, "", usd_per_hour, usd, found)


@dataclass(frozen=True)
class TokenComparison:
    """What somebody asks for the tokens of this traffic, against what the model says that they cost us.

    usd_per_million_tokens  theirs: input, cached input and output of the trace, per million output tokens
    ours_usd                ours at capacity, per million output tokens
    ours_low, ours_high     its interval
    cached_share            of the input tokens that were taken as cached: what the trace repeats
    """

    price: TokenPrice
    usd_per_million_tokens: float
    ours_usd: float
    ours_low: float
    ours_high: float
    cached_share: float

    @property
    def possibly_subsidized(self) -> bool:
        """Whether it is below our modeled cost, on devices of the price that was asked for."""
        return self.usd_per_million_tokens < self.ours_usd

    @property
    def within_interval(self) -> bool:
        """Whether our cost may be as low, within the error of our model."""
        return self.usd_per_million_tokens >= self.ours_low

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, with what follows from it."""
        follows = {"possibly_subsidized": self.possibly_subsidized, "within_interval": self.within_interval}
        return {**asdict(self), **follows}


def token_comparisons(
    evaluation: Evaluation, trace: Trace, prices: Sequence[TokenPrice]
) -> tuple[TokenComparison, ...]:
    """One for each price, cheapest first; none where the evaluation has no capacity to work a cost out of."""
    ours = evaluation.usd_per_million_tokens
    if not math.isfinite(ours):
        return ()
    low, high = evaluation.intervals.get("usd_per_million_tokens", (ours, ours))
    input_tokens = float(trace.input_tokens.sum(dtype="int64"))
    output_tokens = float(trace.output_tokens.sum(dtype="int64"))
    cached_share = statistics(trace).total.prefix_reuse or 0.0
    found = []
    for price in prices:
        theirs = price.usd(input_tokens, cached_share * input_tokens, output_tokens) / output_tokens * 1e6
        found.append(TokenComparison(price, theirs, ours, low, high, cached_share))
    return tuple(sorted(found, key=lambda each: each.usd_per_million_tokens))
