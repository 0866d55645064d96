import json
import multiprocessing
from datetime import UTC, datetime

import pytest

from paretune.optimizer.pick import make_spec
from paretune.optimizer.retune import Comparison, Locked, decide, only_one, retune
from paretune.runtime.spec import BadSpec, load_deployment, save_deployment
from paretune.traces.metrics import Target
from paretune.traces.transform import scale

from .optimizer_examples import deployment, evaluation, poisson_trace

TRACE = poisson_trace(2000, 3.0)
TARGET = Target.parse("ttf30:p95<=1s")
NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)


def spec_of(evaluation, trace=TRACE, targets=(TARGET,)):
    return make_spec(
        evaluation,
        trace=trace,
        targets=targets,
        study="night",
        profile="made up",
        profile_digest="abc",
        measured_steps=True,
        prices="made up",
        prices_as_of="2026-11-01",
    )


def known(cost, latency_s, trial, spread=0.02, high_s=None):
    band = {
        "usd_per_million_tokens": (cost * (1 - spread), cost * (1 + spread)),
        "ttf30:p95": (latency_s * 0.9, high_s or latency_s * 1.1),
    }
    return evaluation(cost, latency_s, trial, intervals=band)


OLD = known(10, 0.5, 0)


def comparison(new, old=OLD):
    return Comparison(old, new, spec_of(new), "capacity")


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "spec.yaml"
    save_deployment(spec_of(OLD), path)
    return path


def night(spec, trace, new, **options):
    return retune(
        spec, trace, lambda *_: comparison(new), decisions=spec.parent / "decisions", now=lambda: NOON, **options
    )


def test_where_nothing_moved_nothing_is_tuned(spec):
    def tune(trace, old):
        raise AssertionError("tuned for nothing")

    before = spec.read_bytes()
    decision = retune(spec, poisson_trace(2000, 3.0, seed=1), tune, decisions=spec.parent / "decisions")
    assert (decision.action, decision.exit_code) == ("unchanged", 0)
    assert spec.read_bytes() == before


def test_a_clear_gain_replaces_the_spec_and_says_why(spec):
    decision = night(spec, scale(TRACE, rate=2.0), known(7, 0.5, 1))
    assert (decision.action, decision.exit_code) == ("replaced", 0)
    assert decision.gain == pytest.approx(0.3)
    assert any("rate" in why for why in decision.why)
    assert any("saves 30.0%" in why for why in decision.why)
    assert load_deployment(spec).digest() == decision.new != decision.old
    record = json.loads(next((spec.parent / "decisions").glob("*.json")).read_text())
    assert record["changed"] is True
    assert record["old_spec"]["pools"][0]["max_num_seqs"] == OLD.deployment.pool.max_num_seqs
    assert record["new_spec"]["pools"][0]["max_num_seqs"] == 2


@pytest.mark.parametrize(
    ("new", "why"),
    [
        (known(9.5, 0.5, 1, spread=0.2), "within the noise"),
        (known(9.9, 0.5, 1, spread=0.0001), "within the noise"),
        (known(12, 0.2, 1), "within the noise"),
        (known(5, 1.2, 1), "would break"),
        (known(5, 0.9, 1, high_s=1.3), "not sure to hold"),
    ],
)
def test_what_is_not_surely_better_keeps_the_old_spec_with_exit_code_5(spec, new, why):
    before = spec.read_bytes()
    decision = night(spec, scale(TRACE, rate=2.0), new)
    assert (decision.action, decision.exit_code) == ("kept", 5)
    assert why in decision.why[-1]
    assert spec.read_bytes() == before


def test_what_is_still_the_best_is_unchanged_and_its_spec_learns_the_new_workload(spec):
    busy, before, tuned = scale(TRACE, rate=2.0), spec.read_bytes(), []

    def tune(trace, old):
        tuned.append(trace)
        same = known(6, 0.7, 0)
        return Comparison(same, same, spec_of(same, trace), "capacity")

    def run(**options):
        return retune(spec, busy, tune, decisions=spec.parent / "decisions", **options)

    dry = run(dry_run=True)
    assert (dry.action, dry.exit_code) == ("unchanged", 0)
    assert spec.read_bytes() == before
    decision = run()
    assert (decision.action, decision.exit_code, decision.to_dict()["changed"]) == ("unchanged", 0, False)
    assert "still the best" in decision.why[-1]
    after = load_deployment(spec)
    assert after.digest() == decision.old == decision.new
    assert after.provenance.trace_digest == busy.digest()
    assert after.prediction("ttf30", 95).value == pytest.approx(0.7)
    # the next night starts from here
    assert run().why == ("the workload has not moved since the spec was tuned",)
    assert len(tuned) == 2


def test_a_broken_target_is_worth_more_money_but_only_if_the_new_one_surely_holds():
    broken = known(10, 1.4, 0)
    assert decide(comparison(known(15, 0.5, 1), broken), (TARGET,))[0] == "replaced"
    assert decide(comparison(known(15, 0.9, 1, high_s=1.2), broken), (TARGET,))[0] == "kept"


def test_a_dry_run_decides_and_leaves_the_spec(spec):
    before = spec.read_bytes()
    decision = night(spec, scale(TRACE, rate=2.0), known(7, 0.5, 1), dry_run=True)
    assert decision.action == "replaced"
    assert spec.read_bytes() == before


def test_an_error_while_tuning_leaves_the_spec_and_frees_the_lock(spec):
    def tune(trace, old):
        raise BadSpec("x", "y", "z")

    before = spec.read_bytes()
    for _ in range(2):
        with pytest.raises(BadSpec):
            retune(spec, scale(TRACE, rate=2.0), tune)
    assert spec.read_bytes() == before


def test_a_spec_without_provenance_cannot_be_compared(tmp_path):
    path = tmp_path / "spec.yaml"
    save_deployment(deployment(), path)
    with pytest.raises(BadSpec, match="provenance"):
        retune(path, TRACE, lambda *_: comparison(OLD))


def _try(path, answers):
    try:
        with only_one(path):
            answers.put("in")
    except Locked as error:
        answers.put(str(error.exit_code))


def test_two_at_once_the_second_is_sent_away_with_exit_code_6(tmp_path):
    path = tmp_path / "spec.yaml"
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    for expected in ("6", "in"):
        with only_one(path) if expected == "6" else only_one(tmp_path / "another.yaml"):
            other = context.Process(target=_try, args=(path, answers))
            other.start()
            other.join(30)
            assert answers.get(timeout=30) == expected


def test_nights_without_a_change_hardly_ever_replace_the_spec(spec):
    """The trace is drawn anew every night from one distribution; where drift is seen, another deployment looks cheaper
    by as much as the noise of its prediction makes it look."""
    import numpy as np

    rng = np.random.default_rng(0)
    replaced = 0
    before = spec.read_bytes()
    for seed in range(50):
        noisy = known(10 * float(np.exp(rng.normal(0, 0.1 / 1.645))), 0.5, 1, spread=0.1)
        old = known(10 * float(np.exp(rng.normal(0, 0.1 / 1.645))), 0.5, 0, spread=0.1)
        decision = retune(
            spec,
            poisson_trace(1000, 3.0, seed=seed + 10),
            lambda *_, noisy=noisy, old=old: comparison(noisy, old),
            decisions=spec.parent / "decisions",
        )
        replaced += decision.action == "replaced"
        # the guard alone, whatever drift says: one side of a 90 % interval
        spec.write_bytes(before)
    assert replaced <= 1
    chance = sum(
        decide(
            comparison(
                known(10 * float(np.exp(rng.normal(0, 0.1 / 1.645))), 0.5, 1, spread=0.1),
                known(10 * float(np.exp(rng.normal(0, 0.1 / 1.645))), 0.5, 0, spread=0.1),
            ),
            (TARGET,),
        )[0]
        == "replaced"
        for _ in range(200)
    )
    assert chance / 200 < 0.1
