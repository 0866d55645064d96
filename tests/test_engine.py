"""The engine as its callers see it: answers, endings, accounting, refusals."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paretune.runtime.engine import Engine, Output, Request
from paretune.runtime.memory import check_memory, memory_need
from paretune.runtime.model_shape import BadModel, ModelShape
from paretune.runtime.random_model import write_random_model
from paretune.runtime.runnable import check_runnable
from paretune.runtime.sampler import BadRequest, SamplingParams
from paretune.runtime.small_model import MODEL_DIR
from paretune.runtime.spec import BadSpec, Deployment, Pool

VOCAB = 64
SMALL = {
    "weight_dtype": "fp32",
    "kv_cache_dtype": "fp32",
    "max_model_len": 96,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 48,
    "block_size": 4,
    "num_kv_blocks": 60,
}
GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(
        tmp_path_factory.mktemp("model") / "tiny",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        dtype="float32",
    )


def deployment(**changes: object) -> Deployment:
    return Deployment(pools=(Pool.model_validate({**SMALL, **changes}),))


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([length, seed]).integers(0, VOCAB, length).astype(np.int32)


def drain(engine: Engine) -> dict[int, list[Output]]:
    outputs: dict[int, list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def answer(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def ask(engine: Engine, prompt_token_ids: np.ndarray, **sampling: object) -> list[Output]:
    engine.add(Request(0, prompt_token_ids, SamplingParams(**{**GREEDY, **sampling})))
    return drain(engine)[0]


def test_an_answer_has_max_tokens_tokens_and_ends_by_length(model_dir: Path) -> None:
    engine = Engine(deployment(), model_dir)
    outputs = ask(engine, prompt(10), max_tokens=7)
    assert [len(output.token_ids) for output in outputs] == [1] * 7
    assert [output.finish_reason for output in outputs] == [None] * 6 + ["length"]


def test_an_answer_ends_at_max_model_len(model_dir: Path) -> None:
    assert len(answer(ask(Engine(deployment(), model_dir), prompt(90), max_tokens=50))) == 6


def test_a_stop_token_ends_the_answer_and_is_its_last_token(model_dir: Path) -> None:
    engine = Engine(deployment(), model_dir)
    free = answer(ask(engine, prompt(10), max_tokens=20))
    outputs = ask(engine, prompt(10), max_tokens=20, stop_token_ids=(free[3],))
    assert answer(outputs) == free[: free.index(free[3]) + 1]
    assert outputs[-1].finish_reason == "stop"


def test_min_tokens_keeps_stop_tokens_away(model_dir: Path) -> None:
    engine = Engine(deployment(), model_dir)
    stops = tuple(set(answer(ask(engine, prompt(10), max_tokens=20))))
    outputs = ask(engine, prompt(10), max_tokens=20, min_tokens=12, stop_token_ids=stops)
    assert len(answer(outputs)) >= 12
    assert not set(answer(outputs)[:12]) & set(stops)


def test_logprobs_of_an_answer_name_the_tokens_it_has(model_dir: Path) -> None:
    outputs = ask(Engine(deployment(), model_dir), prompt(10), max_tokens=5, logprobs=2)
    told = [entry for output in outputs for entry in output.logprobs or ()]
    assert [entry.token_id for entry in told] == answer(outputs)
    assert all(entry.top[0] == (entry.token_id, entry.logprob) for entry in told)


def test_a_seeded_answer_is_the_same_in_every_batch_and_chunking(model_dir: Path) -> None:
    wanted = SamplingParams(max_tokens=30, temperature=1.0, top_p=0.9, seed=11, ignore_eos=True)
    answers = []
    for others, changes in (
        (0, {}),
        (3, {}),
        (9, {"max_num_batched_tokens": 7}),
        (5, {"num_kv_blocks": 26, "enable_prefix_caching": False}),
    ):
        engine = Engine(deployment(**changes), model_dir)
        for other in range(others):
            engine.add(Request(other, prompt(20 + other), SamplingParams(max_tokens=25, seed=other)))
        engine.add(Request(100, prompt(33), wanted))
        answers.append(answer(drain(engine)[100]))
    assert answers[1:] == answers[:1] * 3
    assert len(set(answers[0])) > 10


def test_other_seeds_give_other_answers(model_dir: Path) -> None:
    engine = Engine(deployment(), model_dir)
    answers = [answer(ask(engine, prompt(33), max_tokens=30, temperature=1.0, seed=seed)) for seed in (1, 2)]
    assert answers[0] != answers[1]


def test_blocks_of_an_answer_are_found_by_the_next_turn(model_dir: Path) -> None:
    engine = Engine(deployment(), model_dir)
    first = ask(engine, prompt(10), max_tokens=15)
    assert first[0].num_cached_tokens == 0
    turn = np.concatenate([prompt(10), answer(first), prompt(6, seed=1)]).astype(np.int32)
    second = ask(engine, turn, max_tokens=3)
    assert second[0].num_cached_tokens == 24  # 24 of 25 tokens are computed, in blocks of 4
    engine_without = Engine(deployment(enable_prefix_caching=False), model_dir)
    assert answer(ask(engine_without, turn, max_tokens=3)) == answer(second)
    assert engine_without.stats().prefix_hit_tokens == 0


def test_an_equal_block_behind_another_prefix_is_no_hit(model_dir: Path) -> None:
    engine = Engine(deployment(), model_dir)
    first, other, block = prompt(4, seed=1), prompt(4, seed=2), prompt(4, seed=3)
    ask(engine, np.concatenate([first, block]), max_tokens=1)
    ask(engine, np.concatenate([other, prompt(4, seed=4)]), max_tokens=1)
    found = ask(engine, np.concatenate([other, block, prompt(4, seed=5)]), max_tokens=1)
    assert found[0].num_cached_tokens == 4


def test_a_server_that_lives_long_holds_no_more_tokens_than_its_live_requests(model_dir: Path) -> None:
    engine = Engine(deployment(), model_dir)
    room = len(engine._store.tokens)
    for number in range(400):
        engine.add(Request(number, prompt(1 + number % 90, number), SamplingParams(max_tokens=1)))
        engine.add(Request(-1, prompt(50), SamplingParams(max_tokens=30)))
        engine.step()
        engine.abort(-1)
        drain(engine)
    assert len(engine._store.tokens) == room


def test_an_aborted_request_reports_it_once_and_gives_everything_back(model_dir: Path) -> None:
    engine = Engine(deployment(), model_dir)
    for request_id in range(7):
        engine.add(Request(request_id, prompt(20, request_id), SamplingParams(max_tokens=20, **GREEDY)))
    engine.step()
    assert engine.stats().waiting > 0
    assert engine.abort(0)  # running
    assert engine.abort(6)  # waiting
    assert not engine.abort(6)
    assert not engine.abort(99)
    outputs = drain(engine)
    assert [output.finish_reason for output in outputs[0]][-1] == "abort"
    assert [output.finish_reason for output in outputs[6]] == ["abort"]
    assert engine.stats().kv_blocks_used == 0
    for request_id in range(1, 6):
        alone = answer(ask(Engine(deployment(), model_dir), prompt(20, request_id), max_tokens=20))
        assert answer(outputs[request_id])[-19:] == alone[-19:]


def test_aborting_everybody_leaves_an_engine_without_work_but_its_reports(model_dir: Path) -> None:
    engine = Engine(deployment(), model_dir)
    engine.add(Request(0, prompt(20), SamplingParams(max_tokens=20, ignore_eos=True)))
    engine.step()
    engine.abort(0)
    assert engine.has_work
    assert [output.finish_reason for output in engine.step()] == ["abort"]
    assert not engine.has_work
    assert engine.step() == []


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_request_ends_once_and_every_block_is_free_in_the_end(model_dir: Path, data: st.DataObject) -> None:
    engine = Engine(
        deployment(
            num_kv_blocks=data.draw(st.sampled_from([24, 30, 60])),
            max_num_seqs=data.draw(st.sampled_from([1, 3, 8])),
            max_num_batched_tokens=data.draw(st.sampled_from([8, 48])),
            enable_prefix_caching=data.draw(st.booleans()),
        ),
        model_dir,
    )
    wanted: dict[int, int] = {}
    got: dict[int, int] = {}
    endings: list[tuple[int, str]] = []
    live: set[int] = set()
    actions = data.draw(st.lists(st.sampled_from(["add", "add", "step", "step", "abort"]), max_size=60))
    for number, action in enumerate([*actions, *["step"] * 3000]):
        if action == "add":
            length = data.draw(st.integers(1, 60))
            max_tokens = data.draw(st.integers(1, 20))
            sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=number)
            engine.add(Request(number, prompt(length, seed=number % 2), sampling))
            wanted[number] = min(max_tokens, 96 - length)
            live.add(number)
        elif action == "abort" and live:
            engine.abort(min(live))
        elif action == "step":
            for output in engine.step():
                got[output.request_id] = got.get(output.request_id, 0) + len(output.token_ids)
                if output.finish_reason is not None:
                    endings.append((output.request_id, output.finish_reason))
                    live.discard(output.request_id)
            if number > len(actions) and not engine.has_work:
                break
    assert sorted(request_id for request_id, _ in endings) == sorted(wanted)
    for request_id, reason in endings:
        assert got[request_id] == wanted[request_id] if reason == "length" else got[request_id] < wanted[request_id]
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)


def test_more_requests_wait_than_there_were_slots_for(model_dir: Path) -> None:
    engine = Engine(deployment(max_num_seqs=1), model_dir)
    for request_id in range(300):
        sampling = SamplingParams(max_tokens=2, seed=request_id % 3, stop_token_ids=(request_id % VOCAB,))
        engine.add(Request(request_id, prompt(30, request_id), sampling))
    assert engine.stats().waiting == 300
    outputs = drain(engine)
    assert len(outputs) == 300
    for request_id in (0, 1, 299):
        sampling = {"max_tokens": 2, "seed": request_id % 3, "stop_token_ids": (request_id % VOCAB,)}
        alone = ask(engine, prompt(30, request_id), temperature=1.0, ignore_eos=False, **sampling)
        assert answer(alone) == answer(outputs[request_id])


def test_a_step_says_what_it_did(model_dir: Path) -> None:
    engine = Engine(deployment(max_num_batched_tokens=16), model_dir)
    engine.add(Request(0, prompt(10), SamplingParams(max_tokens=5, **GREEDY)))
    engine.add(Request(1, prompt(20), SamplingParams(max_tokens=5, **GREEDY)))
    engine.step()
    first = engine.last_step
    engine.step()
    second = engine.last_step
    assert first is not None
    assert second is not None
    assert (first.num_tokens, first.num_rows, first.num_samples) == (16, 2, 1)
    assert (first.decode_context, first.prefill_pairs) == (0, 10 * 11 / 2 + 6 * 7 / 2)
    assert (second.num_tokens, second.num_rows, second.num_samples) == (15, 2, 2)
    assert (second.decode_context, second.prefill_pairs) == (11, 14 * 6 + 14 * 15 / 2)
    assert 0 < second.seconds < 10
    assert second.started_s >= first.started_s + first.seconds
    assert engine.stats().steps == 2


@pytest.mark.parametrize(
    ("token_ids", "field"),
    [
        (np.zeros(0, np.int32), "prompt_token_ids"),
        (np.zeros(96, np.int32), "prompt_token_ids"),
        (np.array([1, VOCAB], np.int32), "prompt_token_ids"),
        (np.array([-1], np.int32), "prompt_token_ids"),
        (np.array([1.5]), "prompt_token_ids"),
        (np.zeros((2, 2), np.int32), "prompt_token_ids"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused_and_costs_nothing(
    model_dir: Path, token_ids: np.ndarray, field: str
) -> None:
    engine = Engine(deployment(), model_dir)
    with pytest.raises(BadRequest, match=field):
        engine.add(Request(0, token_ids, SamplingParams()))
    assert not engine.has_work
    assert len(answer(ask(engine, prompt(95), max_tokens=5))) == 1


def test_an_id_in_use_is_refused(model_dir: Path) -> None:
    engine = Engine(deployment(), model_dir)
    engine.add(Request(5, prompt(3), SamplingParams()))
    with pytest.raises(BadRequest, match="request_id"):
        engine.add(Request(5, prompt(4), SamplingParams()))


def test_it_runs_with_blocks_of_one_token(model_dir: Path) -> None:
    expected = answer(ask(Engine(deployment(), model_dir), prompt(30), max_tokens=20))
    engine = Engine(deployment(block_size=1, num_kv_blocks=240), model_dir)
    assert answer(ask(engine, prompt(30), max_tokens=20)) == expected


@pytest.mark.parametrize(
    ("field", "spec"),
    [
        ("engine", Deployment(engine="vllm")),
        ("pools", Deployment(pools=(Pool(role="prefill"), Pool(role="decode")))),
        ("weight_dtype", Deployment(pools=(Pool(weight_dtype="ternary"),))),
        ("host_kv_blocks", Deployment(pools=(Pool(host_kv_blocks=8, pipeline_parallel_size=2),))),
        ("max_model_len", Deployment(pools=(Pool(max_model_len=4097, num_kv_blocks=4096),))),
        ("tensor_parallel_size", Deployment(pools=(Pool(tensor_parallel_size=3),))),
    ],
)
def test_what_the_engine_cannot_honor_is_refused_by_the_fields_name(field: str, spec: Deployment) -> None:
    with pytest.raises(BadSpec, match=field) as refused:
        check_runnable(spec, ModelShape.load(MODEL_DIR))
    assert refused.value.exit_code == 2


def test_an_active_sliding_window_is_refused_and_an_idle_one_is_not() -> None:
    config = {
        "model_type": "mistral", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192, "sliding_window": 1024,
    }  # fmt: skip
    shape = ModelShape.from_config(config)
    check_runnable(deployment(max_model_len=1024, num_kv_blocks=256), shape)
    with pytest.raises(BadModel, match="sliding_window") as refused:
        check_runnable(deployment(max_model_len=1025, num_kv_blocks=260), shape)
    assert refused.value.exit_code == 2
    assert ModelShape.from_config({**config, "model_type": "qwen2"}).sliding_window is None


def test_memory_is_reckoned_before_loading_and_the_hint_fits() -> None:
    shape = ModelShape.load(MODEL_DIR)
    pool = Pool(num_kv_blocks=65536, replicas=2)
    need = memory_need(shape, pool)
    assert need.kv_cache_bytes == 2 * 65536 * 16 * 2 * 6 * 4 * 32 * 2  # replicas, tokens, K and V, layers, heads, bf16
    scaled = memory_need(shape, pool.model_copy(update={"kv_cache_dtype": "int8"}))
    assert scaled.kv_cache_bytes == 2 * 65536 * 16 * 2 * 6 * 4 * (32 + 4)  # a byte each, and a scale of four a head
    available = need.total_bytes - 1
    with pytest.raises(BadSpec, match="num_kv_blocks: ") as refused:
        check_memory(shape, pool, available=available)
    blocks = int(refused.value.todo.split("num_kv_blocks: ")[1].split(",")[0])
    check_memory(shape, pool.model_copy(update={"num_kv_blocks": blocks}), available=available)
    with pytest.raises(BadSpec, match="smaller model"):
        check_memory(shape, pool, available=1000)
    with pytest.raises(BadSpec, match="replicas: 1"):
        check_memory(shape, pool, available=need.process_bytes // 2 + (100 << 20))


def test_a_cache_beyond_the_machine_is_refused_before_it_is_taken(model_dir: Path) -> None:
    with pytest.raises(BadSpec, match="num_kv_blocks"):
        Engine(deployment(num_kv_blocks=10**10), model_dir)


def test_the_hint_goes_down_to_int4_where_int8_does_not_fit() -> None:
    shape = replace(ModelShape.load(MODEL_DIR), hidden_size=4096, intermediate_size=14336, num_layers=32)
    pool = Pool(num_kv_blocks=128, max_model_len=2048)
    room = memory_need(shape, pool.model_copy(update={"weight_dtype": "int4"})).total_bytes
    with pytest.raises(BadSpec) as refused:
        check_memory(shape, pool, available=room)
    assert "weight_dtype: int4" in refused.value.todo
