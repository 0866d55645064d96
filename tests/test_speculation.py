"""Speculative decoding on the engine: every answer is what it is without, whatever proposes and whatever happens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paretune.runtime.draft_shape import check_draft
from paretune.runtime.engine import Engine, EngineStats, Output, Request
from paretune.runtime.memory import memory_need
from paretune.runtime.model_shape import BadModel, ModelShape
from paretune.runtime.random_model import write_random_model
from paretune.runtime.runnable import check_runnable
from paretune.runtime.sampler import SamplingParams
from paretune.runtime.spec import BadSpec, Deployment, Pool, parse_deployment

VOCAB = 64
POOL = {
    "weight_dtype": "fp32",
    "kv_cache_dtype": "fp32",
    "max_model_len": 96,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 48,
    "block_size": 4,
    "num_kv_blocks": 200,
}
NGRAM = {"speculation": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model, and one that is smaller and says other things."""
    folder = tmp_path_factory.mktemp("models")
    other = {**SIZES, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "model": write_random_model(folder / "model", **SIZES),
        "other": write_random_model(folder / "other", **other, seed=5),
    }


def drafted_by(models: dict[str, Path], name: str, tokens: int = 3) -> dict[str, object]:
    return {"speculation": "draft_model", "num_speculative_tokens": tokens, "draft_model": str(models[name])}


def requests(count: int = 12) -> list[Request]:
    """Prompts that begin alike in fours, of many lengths; greedy and sampled answers in turn."""
    rng = np.random.default_rng(3)
    prefixes = rng.integers(0, VOCAB, (4, 24)).astype(np.int32)
    found = []
    for number in range(count):
        tail = rng.integers(0, VOCAB, 1 + number % 7).astype(np.int32)
        greedy = {"temperature": 0.0} if number % 3 else {"temperature": 0.6, "top_p": 0.9, "seed": number}
        sampling = SamplingParams(max_tokens=14 + number % 11, ignore_eos=True, **greedy)
        found.append(Request(number, np.concatenate([prefixes[number % 4], tail]), sampling, priority=number % 2))
    return found


def drain(engine: Engine) -> dict[int, list[Output]]:
    outputs: dict[int, list[Output]] = {}
    for _ in range(5000):
        if not engine.has_work:
            break
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    assert not engine.has_work, "somebody waits for ever"
    return outputs


def answer(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def serve(
    model_dir: Path, changes: dict[str, object], policy: str = "paretune", asked: list[Request] | None = None
) -> tuple[dict[int, list[int]], EngineStats]:
    spec = Deployment(pools=(Pool.model_validate({**POOL, **changes}),), scheduler_policy=policy)
    with Engine(spec, model_dir) as engine:
        for request in requests() if asked is None else asked:
            engine.add(request)
        outputs = drain(engine)
        stats = engine.stats()
    assert stats.kv_blocks_used == 0
    check_counts(outputs, stats)
    return {request_id: answer(each) for request_id, each in outputs.items()}, stats


def check_counts(outputs: dict[int, list[Output]], stats: EngineStats) -> None:
    """What each request was told adds up to what the engine says, and to the tokens that came."""
    last = [each[-1].speculated for each in outputs.values()]
    assert sum(one.drafts for one in last) == stats.drafts
    assert sum(one.draft_tokens for one in last) == stats.draft_tokens
    assert sum(one.accepted_tokens for one in last) == stats.accepted_tokens == sum(stats.accepted_by_position)
    assert list(stats.accepted_by_position) == sorted(stats.accepted_by_position, reverse=True)
    for each in outputs.values():
        if each[-1].finish_reason == "length":
            assert each[-1].speculated.accepted_tokens == sum(len(output.token_ids) - 1 for output in each)


@pytest.fixture(scope="module")
def drafted(models: dict[str, Path], plain: dict[int, list[int]]) -> dict[int, list[int]]:
    """Greedy answers are those without a draft model; sampled ones are the same under every draft model."""
    answers, stats = serve(models["model"], drafted_by(models, "model", 1))
    greedy = [number for number in plain if number % 3]
    assert [answers[number] for number in greedy] == [plain[number] for number in greedy]
    assert stats.accepted_tokens == stats.draft_tokens > 0
    return answers


@pytest.fixture(scope="module")
def plain(models: dict[str, Path]) -> dict[int, list[int]]:
    answers, stats = serve(models["model"], {})
    assert stats.drafts == stats.draft_tokens == 0
    return answers


SETTINGS = [
    ("paretune", {}),
    ("paretune", {"num_kv_blocks": 26}),
    ("paretune", {"num_kv_blocks": 26, "preemption": "swap", "host_kv_blocks": 60}),
    ("paretune", {"num_kv_blocks": 26, "host_kv_blocks": 100, "scheduling": "priority"}),
    ("paretune", {"enable_prefix_caching": False, "max_num_batched_tokens": 20, "long_prefill_token_threshold": 3}),
    ("paretune", {"admission": "estimated_peak", "num_kv_blocks": 30, "max_num_seqs": 8}),
]


@pytest.mark.parametrize(
    ("policy", "changes"), [*SETTINGS, ("vllm_v1", {}), ("vllm_v1", {"num_kv_blocks": 26, "scheduling": "priority"})]
)
def test_ngrams_change_no_answer(
    policy: str, changes: dict[str, object], models: dict[str, Path], plain: dict[int, list[int]]
) -> None:
    answers, stats = serve(models["model"], {**NGRAM, **changes}, policy)
    assert answers == plain
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    assert stats.preemptions > 0 or changes.get("num_kv_blocks") != 26


@pytest.mark.parametrize(("policy", "changes"), SETTINGS)
def test_a_draft_model_that_says_other_things_changes_no_answer(
    policy: str, changes: dict[str, object], models: dict[str, Path], drafted: dict[int, list[int]]
) -> None:
    answers, stats = serve(models["model"], {**drafted_by(models, "other"), **changes}, policy)
    assert answers == drafted
    assert stats.accepted_tokens < stats.draft_tokens
    assert stats.preemptions > 0 or changes.get("num_kv_blocks") != 26


def test_the_model_itself_as_its_draft_is_always_agreed_with(
    models: dict[str, Path], drafted: dict[int, list[int]]
) -> None:
    answers, stats = serve(models["model"], drafted_by(models, "model"))
    assert answers == drafted
    assert stats.accepted_tokens == stats.draft_tokens > 0
    _, without = serve(models["model"], {})
    assert stats.steps < 0.5 * without.steps


def test_ranks_that_share_layers_verify_and_draft_together(
    models: dict[str, Path], drafted: dict[int, list[int]]
) -> None:
    answers, stats = serve(models["model"], {**drafted_by(models, "model"), "tensor_parallel_size": 2})
    assert answers == drafted
    assert stats.accepted_tokens == stats.draft_tokens > 0


def test_ngrams_go_with_ranks_that_divide_prompts(models: dict[str, Path], plain: dict[int, list[int]]) -> None:
    answers, stats = serve(models["model"], {**NGRAM, "context_parallel_size": 2})
    assert answers == plain
    assert stats.accepted_tokens > 0


def test_an_answer_ends_at_a_stop_token_though_more_was_accepted(models: dict[str, Path]) -> None:
    prompt = requests()[1].prompt_token_ids

    def asked(**sampling: object) -> list[Request]:
        return [Request(0, prompt, SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **sampling}))]

    free, _ = serve(models["model"], {}, asked=asked(max_tokens=30))
    for place in range(1, 12):
        stops = (free[0][place],)
        expected = free[0][: free[0].index(free[0][place]) + 1]
        got, _ = serve(
            models["model"], drafted_by(models, "model", 5), asked=asked(max_tokens=30, stop_token_ids=stops)
        )
        assert got[0] == expected
    for most in range(1, 12):
        got, _ = serve(models["model"], drafted_by(models, "model", 5), asked=asked(max_tokens=most))
        assert got[0] == free[0][:most]
    banned, _ = serve(models["model"], {}, asked=asked(max_tokens=30, min_tokens=9, stop_token_ids=tuple(free[0][:6])))
    got, _ = serve(models["model"], NGRAM, asked=asked(max_tokens=30, min_tokens=9, stop_token_ids=tuple(free[0][:6])))
    assert got == banned


def test_an_answer_ends_at_max_model_len(models: dict[str, Path]) -> None:
    prompt = np.resize(np.arange(5, dtype=np.int32), 90)
    sampling = SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True)
    expected, _ = serve(models["model"], {}, asked=[Request(0, prompt, sampling)])
    assert len(expected[0]) == 6
    for changes in (NGRAM, drafted_by(models, "model", 8)):
        got, _ = serve(models["model"], changes, asked=[Request(0, prompt, sampling)])
        assert got == expected


def test_logprobs_are_those_of_the_tokens_that_were_kept(models: dict[str, Path]) -> None:
    told = []
    for changes in ({}, drafted_by(models, "model"), NGRAM):
        with Engine(Deployment(pools=(Pool.model_validate({**POOL, **changes}),)), models["model"]) as engine:
            sampling = SamplingParams(max_tokens=20, temperature=0.0, logprobs=2, ignore_eos=True)
            engine.add(Request(0, requests()[0].prompt_token_ids, sampling))
            outputs = drain(engine)[0]
        entries = [entry for output in outputs for entry in output.logprobs or ()]
        assert [entry.token_id for entry in entries] == answer(outputs)
        assert all(len(output.logprobs or ()) == len(output.token_ids) for output in outputs)
        told.append([entry.logprob for entry in entries])
    np.testing.assert_allclose(told[1:], [told[0]] * 2, atol=1e-4)


def test_kept_logits_are_those_of_the_answer(models: dict[str, Path]) -> None:
    """What was computed for rejected proposals is not among them."""
    rows: list[dict[int, np.ndarray]] = []
    for changes in ({}, NGRAM, drafted_by(models, "other")):
        spec = Deployment(pools=(Pool.model_validate({**POOL, **changes}),))
        with Engine(spec, models["model"], keep_logits=True) as engine:
            engine.add(requests()[1])
            drain(engine)
        rows.append({kept.start + i: row.numpy() for kept in engine.kept_logits for i, row in enumerate(kept.logits)})
    for found in rows[1:]:
        assert found.keys() == rows[0].keys()
        for place, row in found.items():
            np.testing.assert_allclose(row, rows[0][place], atol=1e-4)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_request_ends_once_and_every_block_is_free_in_the_end(
    models: dict[str, Path], data: st.DataObject
) -> None:
    method = data.draw(st.sampled_from([NGRAM, drafted_by(models, "model"), drafted_by(models, "other", 5)]))
    pool = {
        **POOL,
        **method,
        "num_kv_blocks": data.draw(st.sampled_from([24, 30, 60])),
        "max_num_seqs": data.draw(st.sampled_from([1, 3, 8])),
        "enable_prefix_caching": data.draw(st.booleans()),
    }
    engine = Engine(Deployment(pools=(Pool.model_validate(pool),)), models["model"])
    wanted: dict[int, int] = {}
    got: dict[int, int] = {}
    endings: dict[int, str] = {}
    actions = data.draw(st.lists(st.sampled_from(["add", "add", "step", "step", "step", "abort"]), max_size=50))
    for number, action in enumerate([*actions, *["step"] * 2000]):
        if action == "add":
            length, most = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 20))
            prompt = np.resize(np.arange(number % 5 + 1, dtype=np.int32), length)
            engine.add(Request(number, prompt, SamplingParams(max_tokens=most, ignore_eos=True, seed=number)))
            wanted[number] = min(most, 96 - length)
        elif action == "abort" and wanted.keys() - endings.keys():
            engine.abort(min(wanted.keys() - endings.keys()))
        elif action == "step":
            for output in engine.step():
                got[output.request_id] = got.get(output.request_id, 0) + len(output.token_ids)
                if output.finish_reason is not None:
                    assert output.request_id not in endings
                    endings[output.request_id] = output.finish_reason
            if number > len(actions) and not engine.has_work:
                break
    assert endings.keys() == wanted.keys()
    for request_id, reason in endings.items():
        assert got[request_id] == wanted[request_id] if reason == "length" else got[request_id] < wanted[request_id]
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"speculation": "ngram"}, "num_speculative_tokens"),
        ({"num_speculative_tokens": 2}, "num_speculative_tokens"),
        ({**NGRAM, "prompt_lookup_min": 4}, "prompt_lookup_min"),
        ({**NGRAM, "prompt_lookup_min": 0}, "prompt_lookup_min"),
        ({"prompt_lookup_max": 2}, "prompt_lookup_max"),
        ({**NGRAM, "draft_model": "x"}, "draft_model"),
        ({"speculation": "draft_model", "num_speculative_tokens": 2}, "draft_model"),
        ({**NGRAM, "max_num_batched_tokens": 19, "max_num_seqs": 4}, "max_num_batched_tokens"),
        ({**NGRAM, "num_speculative_tokens": 65}, "num_speculative_tokens"),
    ],
)
def test_fields_that_do_not_fit_each_other_are_refused_by_name(changes: dict[str, object], words: str) -> None:
    with pytest.raises(BadSpec, match=words):
        parse_deployment({"pools": [{**POOL, **changes}]})


def test_a_draft_model_under_vllms_rules_is_refused() -> None:
    pool = {**POOL, "speculation": "draft_model", "num_speculative_tokens": 2, "draft_model": "x"}
    with pytest.raises(BadSpec, match="speculation"):
        parse_deployment({"scheduler_policy": "vllm_v1", "pools": [pool]})


def test_what_a_draft_model_must_be_is_said(models: dict[str, Path], tmp_path: Path) -> None:
    strange = {
        "vocabulary": {**SIZES, "vocab_size": 63},
        "max_model_len": {**SIZES, "max_position_embeddings": 64},
        "tensor_parallel_size": {**SIZES, "num_attention_heads": 1, "num_key_value_heads": 1},
    }
    for word, sizes in strange.items():
        folder = write_random_model(tmp_path / word, **sizes)
        changes = {**drafted_by({"strange": folder}, "strange"), "tensor_parallel_size": 2}
        with pytest.raises(BadSpec, match=rf"draft_model.*{word}"):
            serve(models["model"], changes)
    with pytest.raises(BadModel, match="no such directory"):
        serve(models["model"], drafted_by({"nowhere": tmp_path / "nowhere"}, "nowhere"))
    with pytest.raises(BadSpec, match="speculation"):
        check_runnable(Deployment(pools=(Pool.model_validate({**POOL, **NGRAM, "accelerator": "H100"}),)))
    for layout in ("pipeline_parallel_size", "context_parallel_size"):
        with pytest.raises(BadSpec, match="speculation"):
            serve(models["model"], {**drafted_by(models, "other"), layout: 2})


def test_a_draft_model_with_fewer_experts_than_ranks_that_divide_them_is_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    shape = ModelShape.load(models["model"])
    ranks = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    for count in (1, 2):
        experts = {"num_local_experts": count, "num_experts_per_tok": 1}
        folder = write_random_model(tmp_path / str(count), **SIZES, family="mixtral", experts=experts)
        pool = Pool.model_validate({**POOL, **drafted_by({"few": folder}, "few"), **ranks})
        if count == 1:
            with pytest.raises(BadSpec, match=r"draft_model.*1 experts for 2 ranks"):
                check_draft(pool, shape)
        else:
            check_draft(pool, shape)


def test_a_draft_model_with_another_tokenizer_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    for name, vocabulary in (("model", {"a": 0, "b": 1}), ("other", {"a": 1, "b": 0})):
        shutil.copytree(models[name], tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    with pytest.raises(BadModel, match="another vocabulary"):
        serve(tmp_path / "model", drafted_by({"other": tmp_path / "other"}, "other"))


def test_memory_counts_the_draft_model_and_its_cache(models: dict[str, Path]) -> None:
    model, other = (ModelShape.load(models[name]) for name in ("model", "other"))
    without = Pool.model_validate(POOL)
    drafted = Pool.model_validate({**POOL, **drafted_by(models, "other")})
    need, plain_need = memory_need(model, drafted), memory_need(model, without)
    cache = 200 * 4 * other.kv_bytes_per_token("fp32")
    weights = other.weight_bytes("fp32") + other.embedding_bytes("fp32")
    assert need.draft_bytes >= weights + cache
    assert need.weight_bytes == plain_need.weight_bytes
    assert need.kv_cache_bytes == plain_need.kv_cache_bytes
    assert need.total_bytes >= plain_need.total_bytes + weights + cache
