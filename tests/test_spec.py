"""Deployment specs: what goes in comes out, and what cannot run or is not known is refused by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from paretune.kernels.tiles import Tile, TileTable
from paretune.runtime.runnable import WEIGHT_DTYPES, check_runnable
from paretune.runtime.safe_yaml import BadYaml, load_yaml
from paretune.runtime.spec import (
    BadSpec,
    Deployment,
    Pool,
    Prediction,
    load_deployment,
    parse_deployment,
    save_deployment,
)


@st.composite
def deployments(draw: st.DrawFn) -> Deployment:
    tiles = TileTable(((("linear", "bf16", 16), Tile("linear", "cpp", (("row_tile", draw(st.integers(0, 14))),))),))
    pool = Pool(
        replicas=draw(st.integers(1, 4)),
        tensor_parallel_size=draw(st.sampled_from([1, 2])),
        num_threads=draw(st.integers(1, 2)),
        weight_dtype=draw(st.sampled_from(WEIGHT_DTYPES)),
        max_num_seqs=draw(st.integers(1, 256)),
        max_num_batched_tokens=draw(st.integers(2048, 8192)),
        block_size=draw(st.sampled_from([8, 16, 32])),
        enable_chunked_prefill=draw(st.booleans()),
        enable_prefix_caching=draw(st.booleans()),
        tiles=draw(st.sampled_from([TileTable(), tiles])),
    )
    predicted = (Prediction(metric="ttf30", percentile=95, value=0.5, low=0.4, high=draw(st.floats(0.5, 1))),)
    return Deployment(pools=(pool,), targets=("voice/ttf30:p95<=600ms",), predicted=predicted)


@given(deployment=deployments())
def test_a_spec_reads_back_as_it_was_written(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("spec") / "spec.yaml"
    save_deployment(deployment, path)
    again = load_deployment(path)
    assert again == deployment
    assert again.digest() == deployment.digest()


@given(deployment=deployments())
def test_the_digest_names_what_runs_and_not_where_it_came_from(deployment: Deployment) -> None:
    assert deployment.model_copy(update={"predicted": (), "targets": ()}).digest() == deployment.digest()
    seqs = deployment.pool.max_num_seqs
    assert deployment.with_pool(max_num_seqs=seqs - 1 or 2).digest() != deployment.digest()


def test_the_digest_is_the_same_on_every_machine() -> None:
    fixed = Deployment(pools=(Pool(max_num_seqs=64),))
    again = parse_deployment(yaml.safe_load(yaml.safe_dump(fixed.model_dump(mode="json"))))
    assert again.digest() == fixed.digest()


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ({"colour": "red"}, "spec: colour"),
        ({"pools": [{"max_num_seqz": 4}]}, "spec: pools.0.max_num_seqz"),
        ({"pools": []}, "spec: pools"),
        ({"pools": [{"max_num_seqs": 0}]}, "spec: pools.0.max_num_seqs"),
        ({"pools": [{"max_num_seqs": "many"}]}, "spec: pools.0.max_num_seqs"),
        ({"pools": [{"weight_dtype": "int3"}]}, "spec: pools.0.weight_dtype"),
        ({"pools": [{"block_size": 12}]}, "spec: pools.0.block_size"),
        ({"pools": [{"num_kv_blocks": 4}]}, "spec: pools.0"),
        ({"pools": [{"enable_chunked_prefill": False, "max_num_batched_tokens": 512}]}, "spec: pools.0"),
        ({"pools": [{"max_num_batched_tokens": 64}]}, "spec: pools.0"),
        ({"pools": [{"accelerator": "H100 SXM 80GB", "num_threads": 8}]}, "spec: pools.0"),
        ({"pools": [{"tiles": [{"operator": "knead"}]}]}, "spec: pools.0.tiles"),
        ({"pools": [{"preemption": "swap"}]}, "spec: pools.0"),
        ({"pools": [{"watermark": 0.1}]}, "spec: pools.0"),
        ({"pools": [{"admission": "watermark"}]}, "spec: pools.0"),
        ({"pools": [{"host_kv_blocks": 8, "enable_prefix_caching": False}]}, "spec: pools.0"),
        ({"pools": [{"scheduling": "lottery"}]}, "spec: pools.0.scheduling"),
        ({"scheduler_policy": "vllm_v1", "pools": [{"admission": "estimated_peak"}]}, "spec: the spec"),
        ({"scheduler_policy": "vllm_v1", "pools": [{"host_kv_blocks": 8}]}, "spec: the spec"),
        ({"schema_version": 99}, "spec: schema_version"),
        ({"targets": ["quickly"]}, "spec: targets"),
        ({"engine": "llamafile"}, "spec: engine"),
    ],
)
def test_a_spec_that_cannot_run_is_refused_by_the_name_of_its_field(data: dict[str, Any], where: str) -> None:
    with pytest.raises(BadSpec) as error:
        parse_deployment(data)
    assert error.value.where == where
    assert error.value.exit_code == 2


def test_several_pools_are_no_one_pool() -> None:
    for pools in ((Pool(role="prefill"), Pool(role="decode")), (Pool(), Pool())):
        with pytest.raises(BadSpec) as error:
            _ = Deployment(pools=pools).pool
        assert error.value.where == "pools"


PREFILL, DECODE = {"role": "prefill"}, {"role": "decode"}


@pytest.mark.parametrize(
    ("pools", "field"),
    [
        ([PREFILL], "pools"),
        ([PREFILL, PREFILL], "pools"),
        ([PREFILL, DECODE, DECODE], "pools"),
        ([PREFILL, {}], "pools"),
        ([PREFILL, {**DECODE, "kv_cache_dtype": "fp8"}], "kv_cache_dtype"),
        ([PREFILL, {**DECODE, "max_model_len": 4096}], "max_model_len"),
        ([PREFILL, {**DECODE, "block_size": 8, "num_kv_blocks": 4096}], "block_size"),
        ([PREFILL, {**DECODE, "max_loras": 2}], "max_loras"),
        ([PREFILL, {**DECODE, "context_parallel_size": 2}], "context_parallel_size"),
        (
            [{**PREFILL, "speculation": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3,
              "prompt_lookup_min": 1}, DECODE],
            "speculation",
        ),
    ],
)  # fmt: skip
def test_pools_that_cannot_pass_kv_on_are_refused_by_the_fields_name(pools: list[dict[str, Any]], field: str) -> None:
    with pytest.raises(BadSpec) as error:
        parse_deployment({"pools": pools})
    assert (error.value.where, error.value.exit_code) == ("spec: the spec", 2)
    assert str(error.value.found).startswith(field)


def test_either_pool_may_have_its_own_accelerator_sharding_precision_and_limits() -> None:
    found = parse_deployment({
        "pools": [
            {**DECODE, "accelerator": "A100", "tensor_parallel_size": 4, "replicas": 3, "block_size": 32},
            {**PREFILL, "accelerator": "H100", "weight_dtype": "fp8", "max_num_seqs": 4, "router": "prefix_affinity"},
        ]
    })  # fmt: skip
    prefill, decode = found.phases
    assert (prefill.accelerator, decode.accelerator) == ("H100", "A100")
    assert [pool.replicas for pool in found.with_replicas(2, 5).phases] == [2, 5]
    with pytest.raises(BadSpec) as error:
        _ = Deployment().phases
    assert error.value.where == "pools"


@pytest.mark.parametrize(
    ("transfer", "where"),
    [
        ({"link": "NVLink 4", "bytes_per_s": 1e9}, "spec: kv_transfer"),
        ({"bytes_per_s": 1e9}, "spec: kv_transfer"),
        ({"latency_s": 1e-6}, "spec: kv_transfer"),
        ({"source": "me"}, "spec: kv_transfer"),
        ({"bytes_per_s": 0, "source": "me"}, "spec: kv_transfer.bytes_per_s"),
        ({"overlap": "tokens"}, "spec: kv_transfer.overlap"),
        ({"first_token": "proxy"}, "spec: kv_transfer.first_token"),
        ({"speed": 1}, "spec: kv_transfer.speed"),
    ],
)
def test_a_transfer_that_says_nothing_sound_is_refused(transfer: dict[str, Any], where: str) -> None:
    with pytest.raises(BadSpec) as error:
        parse_deployment({"pools": [PREFILL, DECODE], "kv_transfer": transfer})
    assert error.value.where == where


def test_kv_transfer_is_for_two_pools_and_part_of_what_runs() -> None:
    with pytest.raises(BadSpec, match="kv_transfer"):
        parse_deployment({"kv_transfer": {}})
    plain = parse_deployment({"pools": [PREFILL, DECODE]})
    assert plain.digest() == parse_deployment({"pools": [PREFILL, DECODE], "kv_transfer": {}}).digest()
    other = parse_deployment({"pools": [PREFILL, DECODE], "kv_transfer": {"overlap": "layers"}})
    assert other.digest() != plain.digest()
    # specs of mixed pools keep the digest that ledgers know them by
    assert "kv_transfer" not in Deployment().signature()


def test_the_bundled_engine_refuses_it_because_it_transfers_no_kv() -> None:
    with pytest.raises(BadSpec, match="transfers no KV") as error:
        check_runnable(parse_deployment({"pools": [PREFILL, DECODE]}))
    assert error.value.where == "pools"


NASTY = {
    "deep lists": "a: " + "[" * 100_000 + "]" * 100_000,
    "deep maps": "".join(" " * i + f"k{i}:\n" for i in range(60)),
    "alias bomb": "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n",
    "duplicate key": "model: a\nmodel: b\n",
    "two documents": "model: a\n---\nmodel: b\n",
    "python object": "model: !!python/object/apply:os.system ['true']\n",
    "unknown tag": "model: !secret x\n",
    "list at the top": "- model\n",
    "nothing": "",
    "no text": "\x00\x01\x02",
    "tab": "model:\n\t- x\n",
    "unclosed": "model: [a, b\n",
    "key that is a list": "? [a, b]\n: c\n",
    "too many values": "a: [" + "1," * 100_001 + "1]",
    "too large": "a: " + "x" * (1 << 20),
}


@pytest.mark.parametrize("name", NASTY)
def test_hostile_yaml_is_refused_with_one_message(name: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(NASTY[name])
    with pytest.raises(BadYaml) as error:
        load_yaml(path)
    assert error.value.where.startswith("spec.yaml")
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)


def test_yaml_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes("model: größe".encode("latin-1"))
    with pytest.raises(BadYaml):
        load_yaml(path)


def test_times_of_day_and_dates_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("start: 2026-11-23\n")
    assert load_yaml(path) == {"start": "2026-11-23"}


def test_a_spec_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "spec.yaml"
    save_deployment(Deployment(), path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_deployment(Deployment(pools=(Pool(max_num_seqs=7),)), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["spec.yaml"]
