"""The simulator under speculation: the engine's steps for a recorded acceptance, and times that count every token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.profiler.hardware import accelerator
from paretune.profiler.simulator import simulate
from paretune.profiler.speculative_loop import chance
from paretune.profiler.step_time import WORK_GRID, StepTables, composed_time_s, scaled
from paretune.profiler.tables import step_tables
from paretune.runtime.engine import Engine, Request
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.random_model import write_random_model
from paretune.runtime.sampler import SamplingParams
from paretune.runtime.spec import BadSpec, Deployment, Pool
from paretune.traces.acceptance import Acceptance, merged
from paretune.traces.columns import BadTrace, Labels
from paretune.traces.trace import Trace

VOCAB = 32
LIMITS = {
    "weight_dtype": "fp32",
    "kv_cache_dtype": "fp32",
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 48,
    "block_size": 4,
    "num_kv_blocks": 60,
    "enable_prefix_caching": False,
}
NGRAM = {"speculation": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 2}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(
        tmp_path_factory.mktemp("model") / "tiny", vocab_size=VOCAB, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        dtype="float32",
    )  # fmt: skip


def drafted_by(model_dir: Path) -> dict[str, Any]:
    return {"speculation": "draft_model", "num_speculative_tokens": 3, "draft_model": str(model_dir)}


def pool(**changes: Any) -> Pool:
    return Pool.model_validate({**LIMITS, **changes})


def tables(limits: Pool, draft: StepTables | None = None) -> StepTables:
    samples = np.arange(limits.max_num_samples + 1) * 1e-5
    return StepTables(
        tokens_s=5e-3 + 5e-5 * np.arange(limits.max_num_batched_tokens + 1),
        rows_s=np.arange(limits.max_num_seqs + 1) * 1e-5,
        samples_s=samples,
        decode_attention_s=WORK_GRID * 1e-7,
        prefill_attention_s=WORK_GRID * 1e-8,
        request_s=np.zeros(2),
        draft=draft,
    )


def kept(app: str | None, steps: int, drafts: int, tokens: int, accepted: int) -> tuple[Acceptance, ...]:
    return (Acceptance(app, steps, drafts, tokens, accepted),)


ALWAYS = kept(None, 100, 100, 300, 300)
LENGTHS = np.random.default_rng(0).integers(1, 60, (20, 2))


def serve(limits: Pool, model_dir: Path) -> tuple[int, tuple[Acceptance, ...]]:
    """Steps of the engine for requests that are all there at the beginning, and what it says of its proposals."""
    with Engine(Deployment(pools=(limits,)), model_dir) as engine:
        rng = np.random.default_rng(1)
        for number, (prompt, answer) in enumerate(LENGTHS.tolist()):
            sampling = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
            engine.add(Request(number, rng.integers(0, VOCAB, prompt).astype(np.int32), sampling))
        last = {}
        tokens = dict.fromkeys(range(len(LENGTHS)), 0)
        while engine.has_work:
            for output in engine.step():
                last[output.request_id] = output.speculated
                tokens[output.request_id] += len(output.token_ids)
        counts = [last[number].logged(tokens[number]) for number in last]
        return engine.stats().steps, merged(Acceptance(None, **each) for each in counts)


def at_once(acceptance: tuple[Acceptance, ...]) -> Trace:
    return Trace(np.zeros(len(LENGTHS)), LENGTHS[:, 0], LENGTHS[:, 1], acceptance=acceptance)


@pytest.mark.parametrize("blocks", [60, 34])
def test_where_everything_is_kept_the_simulator_makes_the_engines_steps(model_dir: Path, blocks: int) -> None:
    limits = pool(**drafted_by(model_dir), num_kv_blocks=blocks)
    steps, acceptance = serve(limits, model_dir)
    assert acceptance[0].probability == 1.0
    result = simulate(at_once(acceptance), limits, tables(limits, tables(limits)))
    assert result.steps == steps
    assert result.accepted_tokens == result.draft_tokens
    assert result.preemptions > 0 or blocks == 60


def test_a_recorded_acceptance_gives_about_the_engines_steps(model_dir: Path) -> None:
    limits = pool(**NGRAM)
    steps, acceptance = serve(limits, model_dir)
    plain, _ = serve(pool(), model_dir)
    assert 0 < acceptance[0].probability < 1
    result = simulate(at_once(acceptance), limits, tables(limits))
    assert steps < 0.9 * plain, "the model repeats itself, or this test says nothing"
    assert abs(result.steps - steps) < 0.1 * plain
    assert result.accepted_tokens / result.draft_tokens == pytest.approx(acceptance[0].accepted_share, abs=0.1)


def test_one_request_takes_the_sum_of_its_steps_and_of_its_drafts() -> None:
    limits = pool(speculation="draft_model", num_speculative_tokens=3, draft_model="x", max_num_batched_tokens=16)
    draft = scaled(tables(limits), 0.1)
    step = tables(limits, draft)
    result = simulate(Trace([0.0], [10], [6], acceptance=ALWAYS), limits, step)
    # 10 of the prompt give a token; then 1 + 3 give four; the last is one that nobody need propose
    pairs = 10 * 11 / 2
    prefill = composed_time_s(step, 10, 1, 1, 0.0, pairs) + composed_time_s(draft, 10, 1, 0, 0.0, pairs)
    drafts = sum(composed_time_s(draft, 1, 1, 1, 11.0 + i, 0.0) for i in range(3))
    verify = composed_time_s(step, 4, 1, 4, 0.0, 4 * 10 + 4 * 5 / 2)
    last = composed_time_s(step, 1, 1, 1, 15.0, 0.0) + composed_time_s(draft, 1, 1, 0, 15.0, 0.0)
    assert result.times.first_token_s[0] == pytest.approx(prefill)
    assert result.times.end_s[0] == pytest.approx(prefill + drafts + verify + last)
    assert (result.steps, result.drafts, result.draft_tokens, result.accepted_tokens) == (3, 1, 3, 3)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    accepted=st.sampled_from([0, 40, 200, 300]),
    drafts=st.sampled_from([30, 100]),
    replicas=st.integers(1, 2),
    router=st.sampled_from(["round_robin", "least_outstanding_tokens"]),
    blocks=st.sampled_from([34, 200]),
)
def test_every_request_ends_with_all_its_tokens_and_alike_each_time(
    seed: int, accepted: int, drafts: int, replicas: int, router: str, blocks: int
) -> None:
    rng = np.random.default_rng(seed)
    asked = Trace(
        np.cumsum(rng.exponential(0.05, 40)),
        rng.integers(1, 60, 40),
        rng.integers(1, 60, 40),
        acceptance=kept(None, 100, drafts, 3 * drafts, min(accepted, 3 * drafts)),
    )
    limits = pool(**NGRAM, replicas=replicas, router=router, num_kv_blocks=blocks)
    result, again = (simulate(asked, limits, tables(limits)) for _ in range(2))
    assert result.times.finished.all()
    assert result.times.end_s.tobytes() == again.times.end_s.tobytes()
    assert result.steps == again.steps
    assert result.accepted_tokens <= result.draft_tokens <= 3 * result.drafts
    several = asked.output_tokens >= 30
    assert (result.times.kth_token_s[several] <= result.times.end_s[several]).all()


def test_what_is_kept_more_often_takes_fewer_steps_and_nothing_kept_as_many_as_without() -> None:
    asked = [Trace([0.0], [8], [100], acceptance=kept(None, 100, 100, 300, n)) for n in (0, 100, 200, 300)]
    limits = pool(**NGRAM)
    steps = [simulate(each, limits, tables(limits)).steps for each in asked]
    assert steps[0] == simulate(asked[0], pool(), tables(pool())).steps == 100
    assert steps[0] > steps[1] > steps[2] > steps[3] == 26  # one, then four at a time, and the rest


def test_each_application_has_its_own_acceptance() -> None:
    acceptance = (*kept("code", 100, 100, 300, 300), *kept("poems", 100, 100, 300, 0))
    labels = Labels.of(["code", "poems", "code", "poems"])
    asked = Trace(np.arange(4) * 10.0, np.full(4, 8), np.full(4, 80), app=labels, acceptance=acceptance)
    limits = pool(**NGRAM)
    times = simulate(asked, limits, tables(limits)).times
    took_s = times.end_s - times.scheduled_s
    assert took_s[1] > 2 * took_s[0]
    np.testing.assert_allclose(took_s[2:], took_s[:2])


def test_chances_are_uniform_and_those_of_neighbors_unrelated() -> None:
    drawn = np.array([[[chance(r, p, s) for s in (1, 2)] for p in range(100)] for r in range(100)])
    assert drawn.min() >= 0
    assert drawn.max() < 1
    for stream in (0, 1):
        ordered = np.sort(drawn[:, :, stream].ravel())
        assert np.abs(ordered - (np.arange(10_000) + 0.5) / 10_000).max() < 0.02
    for one, other in ((drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1]), (drawn[..., 0], drawn[..., 1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.05


def test_without_a_recorded_acceptance_nothing_is_made_up() -> None:
    limits = pool(**NGRAM)
    with pytest.raises(BadTrace, match="speculation"):
        simulate(Trace([0.0], [8], [8]), limits, tables(limits))
    nothing_proposed = Trace([0.0], [8], [8], acceptance=kept(None, 100, 0, 0, 0))
    assert simulate(nothing_proposed, limits, tables(limits)).drafts == 0
    drafted = pool(**drafted_by(Path("x")))
    with pytest.raises(BadTrace, match="speculation"):
        simulate(nothing_proposed, drafted, tables(drafted, tables(drafted)))
    several = pool(**NGRAM, pipeline_parallel_size=2)
    with pytest.raises(BadSpec, match="speculation"):
        simulate(Trace([0.0], [8], [8], acceptance=ALWAYS), several, tables(several))


def test_step_tables_hold_the_draft_model_and_name_what_they_leave_out(model_dir: Path, tmp_path: Path) -> None:
    shape = ModelShape.load(model_dir)
    big = ModelShape(**{**vars(shape), "hidden_size": 64, "intermediate_size": 512, "num_layers": 8})
    limits = pool(**drafted_by(model_dir), accelerator="H100", weight_dtype="bf16", kv_cache_dtype="bf16")
    modeled = step_tables(accelerator("H100"), big, limits)
    assert modeled.tables.draft is not None
    assert (modeled.tables.draft.tokens_s[1:] < modeled.tables.tokens_s[1:]).all()
    assert len(modeled.tables.samples_s) == 1 + 4 * (1 + 3)
    assert sum("speculation" in note or "draft model" in note for note in modeled.not_modeled) >= 3
    assert scaled(modeled.tables, 2.0).draft.tokens_s[5] == 2 * modeled.tables.draft.tokens_s[5]
    plain = step_tables(accelerator("H100"), big, limits.model_copy(update={"speculation": "none", "draft_model": ""}))
    assert plain.tables.draft is None
    assert not any("speculation" in note for note in plain.not_modeled)
