"""Profiles of LLMServingSim: read, checked against physics, and summed to step times whose parts are known."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from paretune.optimizer.sources import Sources
from paretune.profiler.engine_tables import Link, engine_step
from paretune.profiler.hardware import BadHardware, accelerator
from paretune.profiler.importers.llmservingsim import EngineProfile, find_profile, read_profile
from paretune.profiler.operator_tables import BadTable
from paretune.profiler.table_choice import TableChoice
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.spec import Pool

CONFIG = {
    "model_type": "qwen3_moe", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False, "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": [],
}  # fmt: skip
DENSE = ("embedding", "layernorm", "qkv_proj", "qk_norm", "rotary_emb", "o_proj", "final_layernorm")
POOL = Pool(accelerator="RTX PRO 6000", max_model_len=512, max_num_seqs=8, max_num_batched_tokens=64, num_kv_blocks=64)


def write_profile(folder: Path, skew_unit: float = 1.0, **meta: Any) -> Path:
    """A profile in which every layer takes 100 us and 1 us a token, sampling 50 us a row, attention 20 us."""
    own = folder / "RTXPRO6000" / "org" / "Model" / "bf16"
    (own / "tp1").mkdir(parents=True)
    about = {"model": "org/Model", "hardware": "RTXPRO6000", "variant": "bf16", "vllm_version": "0.19.0", **meta}
    (own / "meta.yaml").write_text(yaml.safe_dump(about))
    tokens = (1, 8, 64)
    rows = [(layer, n, 100.0 + n) for layer in DENSE for n in tokens]
    pd.DataFrame(rows, columns=["layer", "tokens", "time_us"]).to_csv(own / "tp1" / "dense.csv", index=False)
    rows = [(layer, n, 50.0 * n) for layer in ("lm_head", "sampler") for n in (1, 8)]
    pd.DataFrame(rows, columns=["layer", "sequences", "time_us"]).to_csv(own / "tp1" / "per_sequence.csv", index=False)
    shapes = [s for s in itertools.product((0, 16, 64), (0, 128), (0, 1, 8), (0, 16, 512)) if (s[2] > 0) == (s[3] > 0)]
    shapes = [s for s in shapes if (s[0] > 0 or s[1] == 0) and (s[0] or s[2])]
    columns = ["prefill_chunk", "kv_prefill", "n_decode", "kv_decode"]
    pd.DataFrame(shapes, columns=columns).assign(time_us=20.0).to_parquet(own / "tp1" / "attention.parquet")
    rows = [(n, a, 10.0 * a) for n in (1, 64) for a in (2, 8)]
    columns = ["tokens", "activated_experts", "time_us"]
    pd.DataFrame(rows, columns=columns).to_csv(own / "tp1" / "moe.csv", index=False)
    rows = [
        (n, 1, pc, 0, 128, 512, 176, 20.0 * skew_unit, 60.0 * skew_unit, 30.0 * skew_unit)
        for n in (2, 8)
        for pc in (0, 16)
    ]
    columns = ["n", "nb", "pc", "kp", "kvs", "kv_big", "kv_mean", "t_mean_us", "t_max_us", "t_skew_us"]
    pd.DataFrame(rows, columns=columns).to_csv(own / "tp1" / "skew.csv", index=False)
    return own


def read(folder: Path) -> EngineProfile:
    return read_profile(find_profile(folder, "org/Model"), SHAPE)


SHAPE = ModelShape.from_config(CONFIG)


def test_a_step_is_the_sum_of_its_layers(tmp_path: Path) -> None:
    write_profile(tmp_path)
    batch = engine_step(read(tmp_path), SHAPE, POOL).tables.batch
    assert batch is not None
    # two norms, two norms of heads, qkv, rotary embedding and o in each of 3 layers; embedding and last norm once
    assert batch.tokens_s[8] == pytest.approx((3 * 7 + 2) * 108e-6)
    assert batch.tokens_s[64] == pytest.approx((3 * 7 + 2) * 164e-6 + 3 * 60e-6)  # not captured: launched one by one
    assert batch.samples_s[8] == pytest.approx(2 * 400e-6)
    # chunks of 16 and 64 tokens after 0 and 128, beside 1 and 8 rows of context 16 and 512
    measured = np.ix_((0, 4), (0, 4), (0, 6), (0, 10))
    np.testing.assert_allclose(batch.attention.mixed_s[measured], 3 * 20e-6)
    assert batch.attention.skew.min() == batch.attention.skew.max() == pytest.approx(0.25)
    assert batch.experts_s[64] == pytest.approx(3 * 80e-6)  # so many tokens touch all eight
    assert batch.captured_tokens == 16
    assert batch.padded.tolist()[:10] == [0, 1, 2, 4, 4, 8, 8, 8, 8, 16]
    assert batch.ahead
    assert not batch.exchange_s.any()


def test_ranks_in_time_divide_the_experts_and_exchange_all_tokens(tmp_path: Path) -> None:
    write_profile(tmp_path)
    two = POOL.model_copy(update={"replicas": 2})
    batch = engine_step(read(tmp_path), SHAPE, two, link=Link(1e-6, 1e9), ranks=2).tables.batch
    assert batch is not None
    assert batch.exchange_s[100] == pytest.approx(3 * (1e-6 + 100 * 64 * 2 / 1e9))
    assert batch.experts_s[128] == pytest.approx(3 * 40e-6)


@pytest.mark.parametrize(
    ("name", "tp", "ranks", "latency_s", "bytes_per_s"),
    [
        ("RTX PRO 6000", 2, 1, 4.1e-6, 64e9),
        ("MI300X", 2, 1, 0.0, 64e9),  # of a full mesh of eight, two have the wires of one pair
        ("MI300X", 8, 1, 0.0, 448e9),
        ("MI300X", 16, 1, 5e-6, 400e9),  # between two meshes each of eight devices sends 50 GB/s
        ("MI300X", 1, 2, 0.0, 64e9),
    ],
)
def test_the_catalog_joins_ranks_by_the_links_that_so_many_span(
    tmp_path: Path, name: str, tp: int, ranks: int, latency_s: float, bytes_per_s: float
) -> None:
    write_profile(tmp_path)
    profile = replace(read(tmp_path), accelerator=accelerator(name), tensor_parallel_size=tp)
    pool = POOL.model_copy(update={"tensor_parallel_size": tp, "replicas": ranks})
    own, given = (
        engine_step(profile, SHAPE, pool, link=link, ranks=ranks).tables.batch
        for link in (None, Link(latency_s, bytes_per_s))
    )
    assert own is not None
    assert given is not None
    np.testing.assert_allclose(own.tokens_s, given.tokens_s)
    np.testing.assert_allclose(own.exchange_s, given.exchange_s)


def test_ranks_that_no_link_of_the_catalog_joins_are_refused(tmp_path: Path) -> None:
    write_profile(tmp_path)
    profile = replace(read(tmp_path), accelerator=accelerator("A10G"), tensor_parallel_size=16)
    pool = POOL.model_copy(update={"tensor_parallel_size": 16})
    with pytest.raises(BadHardware, match="at most 8"):
        engine_step(profile, SHAPE, pool)
    assert engine_step(profile, SHAPE, pool, link=Link(1e-6, 1e9)).tables.batch is not None


def test_the_engine_composes_ahead_by_its_version_or_as_told(tmp_path: Path) -> None:
    write_profile(tmp_path, vllm_version="0.13.2")
    profile = read(tmp_path)
    found = [engine_step(profile, SHAPE, POOL, async_scheduling=told).tables.batch for told in (None, True)]
    assert [batch.ahead for batch in found if batch] == [False, True]


def test_what_memory_does_not_allow_is_raised_and_a_wrong_unit_is_named(tmp_path: Path) -> None:
    own = write_profile(tmp_path, skew_unit=3.0)
    rows = pd.read_csv(own / "tp1" / "per_sequence.csv")
    rows.loc[0, "time_us"] = 1e-3
    rows.to_csv(own / "tp1" / "per_sequence.csv", index=False)
    profile = read(tmp_path)
    said = [str(finding) for finding in profile.findings]
    assert any("lm_head" in each and "raised to the bound" in each for each in said)
    assert any("skew" in each and "3.00 times" in each for each in said)
    table = profile.per_sequence["lm_head"]
    assert table.seconds[0] == table.bound_s(table.points[:1])[0] > 1e-9
    assert profile.skew is not None
    np.testing.assert_allclose(profile.skew.share, 0.25)


@pytest.mark.parametrize(
    ("variant", "engine", "found"),
    [
        ("bf16", {}, ("bf16", "bf16")),
        ("fp16", {}, ("fp16", "fp16")),
        ("fp8", {}, ("fp8", "bf16")),
        ("bf16-kvfp8", {}, ("bf16", "fp8")),
        ("fp8-kvfp8", {}, ("fp8", "fp8")),
        ("awq-kvfp8", {}, (None, "fp8")),
        ("my_experiment", {}, (None, None)),
        ("my_experiment", {"dtype": "bfloat16"}, ("bf16", "bf16")),
        ("my_experiment", {"dtype": "bfloat16", "quantization": "fp8", "kv_cache_dtype": "fp8_e4m3"}, ("fp8", "fp8")),
        ("my_experiment", {"dtype": "bfloat16", "quantization": "awq", "kv_cache_dtype": "auto"}, (None, None)),
    ],
)
def test_the_variant_says_the_precision_or_else_the_engine_does(
    tmp_path: Path, variant: str, engine: dict[str, str], found: tuple[str | None, str | None]
) -> None:
    write_profile(tmp_path, variant=variant, engine_effective=engine)
    profile = read(tmp_path)
    assert (profile.weight_dtype, profile.kv_cache_dtype) == found


@pytest.mark.parametrize(
    ("hardware", "variant", "weight_bytes", "tflops", "kv_bytes", "kv_tflops"),
    [
        ("RTXPRO6000", "bf16", 2.0, 467.8, 2.0, 467.8),
        ("RTXPRO6000", "fp8", 1.0, 935.6, 2.0, 467.8),
        ("RTXPRO6000", "bf16-kvfp8", 2.0, 467.8, 1.0, 935.6),
        ("RTXPRO6000", "my_experiment", 0.5, 1871.2, 1.0, 1871.2),
        ("A100", "fp8-kvfp8", 1.0, 312.0, 1.0, 312.0),  # which has no arithmetic of fp8
    ],
)
def test_physics_bounds_each_precision_by_its_own_bytes_and_arithmetic(
    tmp_path: Path, hardware: str, variant: str, weight_bytes: float, tflops: float, kv_bytes: float, kv_tflops: float
) -> None:
    write_profile(tmp_path, hardware=hardware, variant=variant)
    profile = read(tmp_path)
    bytes_per_s = accelerator(hardware).peak_bytes_per_s
    qkv, expert, many = (4 + 2 * 2) * 16 * 64.0, 3 * 64 * 32.0, 1e6
    found = profile.dense["qkv_proj"].bound_s(np.array([[1.0], [many]]))
    np.testing.assert_allclose(found, [weight_bytes * qkv / bytes_per_s, 2 * many * qkv / (1e12 * tflops)])
    assert profile.experts is not None
    found = profile.experts.bound_s(np.array([[1.0, 8.0], [many, 8.0]]))  # each token takes two of them
    expected = [weight_bytes * 8 * expert / bytes_per_s, 2 * many * 2 * expert / (1e12 * tflops)]
    np.testing.assert_allclose(found, expected)
    found = profile.decode.bound_s(np.array([[8.0, 512.0]]))
    np.testing.assert_allclose(found, 8 * 512 * 2 * 2 * 16 * kv_bytes / bytes_per_s)
    found = profile.prefill.bound_s(np.array([[many, 0.0]]))
    np.testing.assert_allclose(found, 4 * 4 * 16 * many**2 / 2 / (1e12 * kv_tflops))


@pytest.mark.parametrize(("factor", "words"), [(1e-3, "larger unit"), (1e3, "smaller unit")])
def test_times_in_another_unit_are_refused(tmp_path: Path, factor: float, words: str) -> None:
    own = write_profile(tmp_path)
    path = own / "tp1" / "per_sequence.csv"
    rows = pd.read_csv(path)
    large = ModelShape.from_config({**CONFIG, "vocab_size": 1_000_000})  # to read its last matrix takes 71 µs
    read_profile(own, large)
    rows.assign(time_us=factor * rows.time_us).to_csv(path, index=False)
    with pytest.raises(BadTable, match=words) as refused:
        read_profile(own, large)
    assert refused.value.allowed == "microseconds"


def test_an_unknown_device_is_read_and_said(tmp_path: Path) -> None:
    write_profile(tmp_path, hardware="Abacus 9")
    step = engine_step(read(tmp_path), SHAPE, POOL)
    assert any("not checked against physics" in note for note in step.not_modeled)
    assert step.tables.batch is not None
    assert step.tables.batch.attention.split_rows == 0


@pytest.mark.parametrize(
    ("file", "content", "found"),
    [
        ("dense.csv", None, "no dense.csv"),
        ("dense.csv", "layer,tokens,time_us\nqkv_proj,1,5\n", "no layernorm"),
        ("dense.csv", "layer,tokens\nqkv_proj,1\n", "no time_us"),
        ("dense.csv", "", "CSV or Parquet"),
        ("moe.csv", "tokens,activated_experts,time_us\n", "no rows"),
    ],
)
def test_a_profile_that_lacks_something_is_refused(tmp_path: Path, file: str, content: str | None, found: str) -> None:
    path = write_profile(tmp_path) / "tp1" / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadTable, match=found):
        read(tmp_path)


@pytest.mark.parametrize(
    ("file", "lines", "found"),
    [
        ("dense.csv", ("layer,tokens,time_us", "qkv_proj,1,5", "qkv_proj,2,fast"), "time_us fast"),
        ("dense.csv", ("layer,tokens,time_us", "qkv_proj,1,5", "qkv_proj,,5"), "tokens"),
        ("moe.csv", ("tokens,activated_experts,time_us", "1,2,4", "1,8,-4"), "time_us -4"),
        ("moe.csv", ("tokens,activated_experts,time_us", "1,2,4", "1,8,0"), "time_us 0"),
        (
            "skew.csv",
            (
                "n,nb,pc,kp,kvs,kv_big,kv_mean,t_mean_us,t_max_us,t_skew_us",
                "2,1,0,0,128,512,176,20,60,30",
                "8,1,0,0,128,512,176,20,60,",
            ),
            "t_skew_us",
        ),
    ],
)
def test_what_is_no_time_or_number_is_refused_by_line(
    tmp_path: Path, file: str, lines: tuple[str, ...], found: str
) -> None:
    path = write_profile(tmp_path) / "tp1" / file
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(BadTable, match=found) as refused:
        read(tmp_path)
    assert refused.value.where == f"{path}:3"


@pytest.mark.parametrize("kind", ["prefill", "decode", "mixed"])
def test_attention_of_every_kind_is_needed(tmp_path: Path, kind: str) -> None:
    path = write_profile(tmp_path) / "tp1" / "attention.parquet"
    rows = pd.read_parquet(path)
    prompts, decodes = rows.prefill_chunk > 0, rows.n_decode > 0
    of_kind = {"prefill": prompts & ~decodes, "decode": decodes & ~prompts, "mixed": prompts & decodes}[kind]
    rows[~of_kind].to_parquet(path, index=False)
    with pytest.raises(BadTable, match=f"no {kind} attention"):
        read(tmp_path)


def test_the_folder_must_hold_one_profile_of_the_model(tmp_path: Path) -> None:
    write_profile(tmp_path)
    with pytest.raises(BadTable, match="0 profiles"):
        find_profile(tmp_path, "org/Other")
    with pytest.raises(BadTable, match="tensor_parallel_size 1"):
        engine_step(read(tmp_path), SHAPE, POOL.model_copy(update={"tensor_parallel_size": 2}), link=Link(1e-6, 1e9))


def test_layer_times_take_the_place_of_the_data_sheet_but_not_of_this_machine(tmp_path: Path) -> None:
    write_profile(tmp_path / "perf")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    tables = TableChoice(layer_times=str(tmp_path / "perf"))
    sources = Sources.of(str(model), accelerator_name="RTX PRO 6000", tables=tables)
    assert sources.step_model(POOL).tables.batch is not None
    with pytest.raises(BadHardware, match="layer times"):
        Sources.of(str(model), tables=tables)


def test_the_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    write_profile(tmp_path, tp_degrees=[1, 2], engine_effective={"hf_overrides": {"num_attention_heads": 8}})
    with pytest.raises(BadTable, match="num_attention_heads"):
        read(tmp_path)
