"""The study: screen the whole space, simulate what survives, measure the few that could win, and say how sure it is.

Every finished trial is one commit in the ledger. A study that goes on after an interruption proposes the same trials
again and is answered from there, so it ends with the same bytes as one that was never interrupted.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

from ..profiler.prices import Price
from ..profiler.step_time import ModeledStep
from ..runtime.spec import Deployment, Pool
from ..traces.metrics import Metric, Target
from ..traces.trace import Trace
from . import finalists as final
from .capacity import PART_SLACK, BadQuestion, StepModel, busiest_part, check_question
from .evaluate import Question, evaluate, refine, sharpen
from .finalists import Measure
from .front import Cost, Evaluation, Fidelity, Front, pareto
from .sampler import Enumeration, Outcome, Sampler, TpeAndNeighbors
from .shortlist import DEFAULT, Shortlist, refusal
from .space import SearchSpace
from .store import Ledger, Record
from .study import Interrupted, Progress, Study, default_of

# Proposals asked for at once. Fixed, whatever the number of jobs: the same seed gives the same study.
BATCH = 8


def tune(
    trace: Trace,
    space: SearchSpace,
    step_model: StepModel,
    price: Callable[[Pool], Price],
    *,
    metric: Metric,
    percentile: float = 95.0,
    targets: Sequence[Target] | None = None,
    cost: Cost = "capacity",
    survive: int = 0,
    trials: int = 200,
    seed: int = 0,
    jobs: int = 2,
    ledger: Ledger | None = None,
    study: str = "default",
    renew: bool = False,
    profile: str = "",
    prices: str = "",
    about: Mapping[str, Any] | None = None,
    time_budget_s: float | None = None,
    progress: Callable[[Progress], None] | None = None,
    measure: Measure | None = None,
    measurable: Callable[[Deployment], bool] = lambda deployment: True,
    finalists: int = 6,
) -> Study:
    """Find the front of cost against a latency for a trace.

    Trial 0 is the space's default. If the screen leaves no more candidates than there are trials, all are simulated;
    else a sampler proposes them (see optimizer/sampler.py). The front's points get intervals; with `measure`, the
    finalists are served and replayed, and the front is made anew from what was measured.

    Args:
        step_model: pool -> step times. They may not depend on the pool's KV blocks, prefix caching or chunked prefill.
        price: pool -> price of one of its devices.
        metric, percentile: the latency axis: ttft, ttf-k, tpot or e2e at p50, p90, p95 or p99.
        targets: what must hold; the trace's own if left out.
        survive: replicas that a deployment may lose with its targets still held; of cost "sizing" alone, which buys
            so many more.
        trials: candidates to simulate, the default included.
        jobs: threads; the simulator releases the GIL. Does not change the result.
        ledger, study: where trials are kept, under which name; without a ledger nothing is kept.
        renew: forget an earlier study of this name, unless it has the same settings and was interrupted.
        profile, prices: digests of what step times and prices come from; a study goes on only with the same ones.
        about: where the inputs lay, kept with the study for those who read it later.
        time_budget_s: no trial is begun after it; the study is then marked as not complete.
        measure: serve a deployment and replay the trace at a multiple of its rate.
        measurable: whether a deployment can be served where `measure` serves; others are no finalists.
        finalists: candidates to measure.
    Raises: BadQuestion, BadSpace, NoSuchStudy (exit code 2), LedgerError (1), Interrupted (75) on Ctrl-C.
    """
    asked = tuple(trace.targets if targets is None else targets)
    k = check_question(trace, asked, metric, percentile)
    if survive and (cost != "sizing" or not asked):
        asked_for = f"cost {cost} with {len(asked)} targets"
        raise BadQuestion(f"survive {survive}", asked_for, "cost sizing and a target to hold", "give both")

    @functools.lru_cache(maxsize=1024)
    def cached_model(pool: Pool) -> ModeledStep:
        return step_model(pool)

    def model(pool: Pool) -> ModeledStep:
        flags = {"enable_chunked_prefill": True, "enable_prefix_caching": True}
        return cached_model(pool.model_copy(update=flags))

    part = busiest_part(trace)
    question = Question(trace, asked, metric, percentile, cost, k, space.max_devices, model, price, part, survive)
    settings = {
        "trace": trace.digest(),
        "space": space.digest(),
        "targets": [str(target) for target in asked],
        "metric": str(metric),
        "percentile": percentile,
        "cost": cost,
        "seed": seed,
        "profile": profile,
        "prices": prices,
        **({"survive": survive} if survive else {}),
    }
    about = {**(about or {}), "price": asdict(price(space.default.pool))}
    book = _Book(ledger, study, settings, about, renew)
    try:
        run = _Run(question, space, book, seed, jobs, trials, time_budget_s, progress or (lambda _: None))
        found = run.simulate_all(study)
        found = run.refine_points(found)
        if measure is not None:
            found = run.measure_finalists(found, measure, finalists, measurable)
        found = replace(found, not_modeled=run.not_modeled(found))
    except KeyboardInterrupt:
        raise Interrupted(study, len(book.known), ledger.where if ledger else "") from None
    if ledger is not None:
        ledger.finish(study, found.to_dict())
    return found


class _Book:
    """Every trial that is known: read from the ledger once, and written to it one by one."""

    def __init__(
        self, ledger: Ledger | None, study: str, settings: Mapping[str, Any], about: Mapping[str, Any], renew: bool
    ) -> None:
        self._ledger, self._study = ledger, study
        self.known: dict[tuple[str, Fidelity], Record] = {}
        if ledger is not None:
            ledger.open_study(study, settings, about, renew=renew)
            self.known = {(each.digest, each.fidelity): each for each in ledger.records(study)}

    def get(self, digest: str, fidelity: Fidelity) -> Record | None:
        return self.known.get((digest, fidelity))

    def add(self, record: Record) -> None:
        if (record.digest, record.fidelity) in self.known:
            return
        # known first: a Ctrl-C that comes just after the commit must not have it written a second time
        self.known[record.digest, record.fidelity] = record
        if self._ledger is not None:
            self._ledger.record(self._study, record)


class _Run:
    """One run of `tune`: the candidates, and what was found so far."""

    def __init__(
        self,
        question: Question,
        space: SearchSpace,
        book: _Book,
        seed: int,
        jobs: int,
        trials: int,
        time_budget_s: float | None,
        progress: Callable[[Progress], None],
    ) -> None:
        self.question, self.space, self.book, self.seed = question, space, book, seed
        self.jobs, self.trials, self.progress = jobs, trials, progress
        self._stop_at = None if time_budget_s is None else time.monotonic() + time_budget_s
        self._sharp: set[str] = set()
        self.candidates = Shortlist(question, space)
        self.progress(Progress("screen", space.size, space.size))

    def simulate_all(self, name: str) -> Study:
        """Trial 0, then what the sampler proposes, in batches; each batch is decided before it runs."""
        sampler: Sampler
        candidates, twin = self.candidates, self.candidates.twin
        if len(candidates) < self.trials:
            sampler = Enumeration(len(candidates))
        else:
            sampler = TpeAndNeighbors(self.space, candidates.points, self.seed)
        records: list[Record] = []
        batch = [DEFAULT]
        complete = True
        with ThreadPoolExecutor(self.jobs) as workers:
            while batch:
                for index, record in zip(batch, self._simulate(workers, batch, len(records))):
                    records.append(record)
                    candidates.learn(index, record)
                    sampler_index = twin if index == DEFAULT else index
                    if sampler_index is not None:
                        sampler.tell(sampler_index, self._outcome(record))
                self.progress(Progress("simulate", len(records), min(self.trials, len(candidates) + 1)))
                batch = sampler.ask(min(BATCH, self.trials - len(records)))
                batch = [index for index in batch if index != twin]
                if batch and self._stop_at is not None and time.monotonic() > self._stop_at:
                    complete = False
                    break
        evaluations = [each for record in records for each in record.evaluations]
        default = default_of(evaluations)
        model = self.question.step_model(self.space.default.pool)
        return Study(
            name=name,
            seed=self.seed,
            targets=self.question.targets,
            front=self._front(evaluations),
            default=default,
            finalists=(),
            corrections=(),
            screened=replace(
                candidates.screened,
                simulated=len(records),
                failed=sum(record.state == "failed" for record in records),
            ),
            sampler=sampler.name,
            measured_steps=model.measured,
            relative_error=model.relative_error,
            not_modeled=model.not_modeled,
            price=self.question.price(self.space.default.pool),
            complete=complete,
        )

    def not_modeled(self, found: Study) -> tuple[str, ...]:
        """What the step times of the default and of every point of the front leave out, each once."""
        pools = [self.space.default.pool, *(point.deployment.pool for point in found.front.points)]
        return tuple(dict.fromkeys(note for pool in pools for note in self.question.step_model(pool).not_modeled))

    def _simulate(self, workers: ThreadPoolExecutor, batch: Sequence[int], first_trial: int) -> list[Record]:
        """The records of a batch, known ones from the book. On Ctrl-C, those that are done are kept first."""
        names = [self.candidates.deployment(index).digest() for index in batch]
        futures: dict[int, Future[Record]] = {}
        for place, (index, digest) in enumerate(zip(batch, names)):
            if self.book.get(digest, "simulated") is None:
                guess = self.candidates.guess(index)
                futures[place] = workers.submit(self._trial, index, digest, first_trial + place, guess)
        try:
            for future in futures.values():
                self.book.add(future.result())
        except KeyboardInterrupt:
            workers.shutdown(cancel_futures=True)
            for future in futures.values():
                if not future.cancelled() and future.exception() is None:
                    self.book.add(future.result())
            raise
        return [self.book.known[digest, "simulated"] for digest in names]

    def _trial(self, index: int, digest: str, trial: int, guess: float | None) -> Record:
        deployment = self.candidates.deployment(index)
        plain = deployment.model_dump(mode="json")
        try:
            found = evaluate(self.question, deployment, saturation=self.candidates.saturation(index), guess=guess)
        except Exception as error:
            if index == DEFAULT:
                raise
            return Record(trial, digest, "simulated", (), plain, "failed", refusal(error))
        marked = tuple(replace(each, trial=trial, seed=self.seed, candidate=digest) for each in found)
        return Record(trial, digest, "simulated", marked, plain)

    def _outcome(self, record: Record) -> Outcome:
        if not record.evaluations:
            return Outcome(float("inf"), float("inf"), 1e3)
        # without targets one point of the sweep stands for the candidate: the middle load
        each = record.evaluations[len(record.evaluations) // 2]
        excess = [each.of_target(target)[0] / target.limit_s - 1 for target in self.question.targets]
        violation = 0.0 if each.feasible else max([1e-3, *(x for x in excess if x == x)])
        latency_s = each.value(self.question.metric, self.question.percentile)
        return Outcome(latency_s, each.cost(self.question.cost), min(violation, 1e3))

    def _front(self, evaluations: Sequence[Evaluation]) -> Front:
        return pareto(evaluations, self.question.metric, self.question.percentile, self.question.cost)

    def refine_points(self, found: Study) -> Study:
        """Capacities bisected to the end where that may decide the front; intervals for its points and the default."""
        evaluations = list(found.front.evaluations)
        while contenders := self._contenders(evaluations):
            evaluations = self._replaced(evaluations, contenders, self._sharpened, "sharpen")
        evaluations = self._intervals(evaluations, [*self._front(evaluations).points, default_of(evaluations)])
        return replace(found, front=self._front(evaluations), default=default_of(evaluations))

    def _contenders(self, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
        """Those whose capacity is not sharp yet, and whose cost, as low as its tolerance allows, nobody beats."""
        if self.question.cost == "sizing" or not self.question.targets:
            return []
        open_ended = {}
        for each in evaluations:
            slack = PART_SLACK if math.isinf(each.capacity_tolerance) else each.capacity_tolerance
            if each.candidate not in self._sharp and each.fidelity == "simulated":
                least = each.usd_per_million_tokens / (1 + slack)
                open_ended[id(each)] = replace(each, usd_per_million_tokens=least)
        best = self._front([open_ended.get(id(each), each) for each in evaluations])
        on_front = {id(point) for point in best.points}
        return [each for each in evaluations if id(each) in open_ended and id(open_ended[id(each)]) in on_front]

    def _intervals(self, evaluations: Sequence[Evaluation], wanted: Sequence[Evaluation]) -> list[Evaluation]:
        without = [each for each in wanted if not each.intervals and each.summary is not None]
        return self._replaced(evaluations, without, self._refined, "refine")

    def _replaced(
        self,
        evaluations: Sequence[Evaluation],
        some: Sequence[Evaluation],
        improve: Callable[[Evaluation], Evaluation],
        stage: str,
    ) -> list[Evaluation]:
        """All evaluations, `some` of them improved, several at a time."""
        unique = list({id(each): each for each in some}.values())
        better: dict[int, Evaluation] = {}
        with ThreadPoolExecutor(self.jobs) as workers:
            tasks = [workers.submit(improve, each) for each in unique]
            try:
                for done, (each, task) in enumerate(zip(unique, tasks), 1):
                    better[id(each)] = task.result()
                    self.progress(Progress(stage, done, len(unique)))
            except KeyboardInterrupt:
                workers.shutdown(cancel_futures=True)
                raise
        return [better.get(id(each), each) for each in evaluations]

    def _saturation(self, each: Evaluation) -> float:
        return self.candidates.saturation(self.candidates.index(each.candidate))

    def _sharpened(self, each: Evaluation) -> Evaluation:
        self._sharp.add(each.candidate)
        return sharpen(self.question, each, saturation=self._saturation(each))

    def _refined(self, each: Evaluation) -> Evaluation:
        if self.question.targets and self.question.cost == "capacity" and each.candidate not in self._sharp:
            each = self._sharpened(each)
        return refine(self.question, each, saturation=self._saturation(each))

    def measure_finalists(
        self, found: Study, measure: Measure, most: int, measurable: Callable[[Deployment], bool]
    ) -> Study:
        """Measure the finalists, and say again what wins: measured where measured, corrected elsewhere."""
        chosen = [each for each in final.choose(found.front, found.default, most) if measurable(each.deployment)]
        simulated = self._intervals(found.front.evaluations, chosen)
        refined = {(each.candidate, each.load): each for each in simulated}
        done: list[Evaluation] = []
        for number, each in enumerate(chosen, 1):
            done.extend(self._measured(refined[each.candidate, each.load], measure))
            self.progress(Progress("measure", number, len(chosen)))
        corrections = final.corrections(done)
        finalists = final.corrected_by_others(done, self.question.targets)
        targets = self.question.targets
        # a correction can bring a point to the front that had no interval yet
        moved = [final.corrected(each, corrections, targets) for each in simulated]
        on_front = {(each.candidate, each.load) for each in self._front([*moved, *finalists]).points}
        simulated = self._intervals(simulated, [each for each in simulated if (each.candidate, each.load) in on_front])
        evaluations = [*(final.corrected(each, corrections, targets) for each in simulated), *finalists]
        counts = replace(
            found.screened,
            measured=len(finalists),
            measurements_failed=sum(each.measured is None for each in finalists),
        )
        return replace(
            found,
            front=self._front(evaluations),
            default=default_of(evaluations),
            finalists=tuple(finalists),
            corrections=corrections,
            screened=counts,
        )

    def _measured(self, each: Evaluation, measure: Measure) -> tuple[Evaluation, ...]:
        name = each.candidate if self.question.targets else f"{each.candidate} {each.load:.6g}"
        known = self.book.get(name, "measured")
        if known is not None:
            return known.evaluations
        plain = each.deployment.model_dump(mode="json")
        try:
            times = measure(each.deployment, final.rate_of(each, self.question.targets))
            result = final.measured(each, times, self.question.trace, self.question.targets)
            record = Record(each.trial, name, "measured", (result,), plain)
        except Exception as error:
            # not kept in the ledger: a server that did not come up once may come up when the study goes on
            reason = f"could not be measured: {refusal(error)}"
            return (replace(each, fidelity="measured", feasible=False, reason=reason),)
        self.book.add(record)
        return record.evaluations
