"""aiconfigurator's tables: what is read in which unit, what physics refuses, what is flagged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from paretune.profiler.importers import OperatorTables, read_tables
from paretune.profiler.importers.aiconfigurator import installed_folder
from paretune.profiler.importers.checks import drops
from paretune.profiler.operator_tables import BadTable

from .cli_examples import paretune


def written(folder: Path, family: str, version: str, stem: str, rows: list[dict[str, object]]) -> None:
    path = folder / "h100_sxm" / family / "trtllm" / version
    path.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(path / f"{stem}.parquet")


def gemm_rows(latency: float = 0.05, kernel: str = "usual") -> list[dict[str, object]]:
    return [
        {"gemm_dtype": "bfloat16", "kernel_source": kernel, "m": m, "n": n, "k": 4096, "latency": latency * n / 4096}
        for m in (1, 16)
        for n in (4096, 8192)
    ]


def of(folder: Path) -> OperatorTables:
    return read_tables(folder, "H100", "trtllm")


def test_latencies_are_milliseconds_and_the_newest_version_counts(tmp_path: Path) -> None:
    written(tmp_path, "gemm", "1.3.0rc9", "gemm_perf", gemm_rows(9.0))
    written(tmp_path, "gemm", "1.3.0rc20", "gemm_perf", gemm_rows(0.05))
    tables = of(tmp_path)
    assert tables.versions == {"gemm_perf": "1.3.0rc20"}
    table = tables.gemm("bfloat16")
    assert table.lookup(np.array([[16.0, 4096.0, 4096.0]])) == pytest.approx(50e-6)
    assert str(table.origin) == "h100_sxm/trtllm 1.3.0rc20"


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("1.0.0rc5", "1.0.0rc6"),
        ("1.0.0rc6", "1.0.0"),
        ("1.0.0", "1.0.0.post1"),
        ("1.0.0rc1", "1.0"),
        ("0.19.1", "0.20"),
        ("1.2.0rc9", "1.2.0rc10"),
    ],
)
def test_a_candidate_comes_before_its_release_and_a_fix_after(tmp_path: Path, older: str, newer: str) -> None:
    for version in (older, newer):
        written(tmp_path, "gemm", version, "gemm_perf", gemm_rows())
    assert of(tmp_path).versions == {"gemm_perf": newer}


def test_rows_faster_than_the_memory_are_refused_and_counted(tmp_path: Path) -> None:
    # a 4096 x 4096 bf16 weight is 33.6 MB: 10 µs at 3.35 TB/s
    fast = {"gemm_dtype": "bfloat16", "kernel_source": "usual", "m": 2, "n": 4096, "k": 4096, "latency": 0.009}
    written(tmp_path, "gemm", "1.0", "gemm_perf", [*gemm_rows(), fast])
    tables = of(tmp_path)
    assert 2.0 not in tables.gemm("bfloat16").points[:, 0]
    (finding,) = tables.findings
    assert (finding.refused, finding.rows, finding.of) == (True, 1, 5)
    assert "m 2, n 4096, k 4096: 9.0 µs" in finding.example


def test_a_halved_time_of_a_larger_operator_is_flagged_and_kept(tmp_path: Path) -> None:
    odd = {"gemm_dtype": "bfloat16", "kernel_source": "usual", "m": 32, "n": 4096, "k": 4096, "latency": 0.02}
    written(tmp_path, "gemm", "1.0", "gemm_perf", [*gemm_rows(), odd])
    tables = of(tmp_path)
    assert 32.0 in tables.gemm("bfloat16").points[:, 0]
    assert [(f.refused, f.rows) for f in tables.findings] == [(False, 1)]


def test_no_time_falls_in_an_empty_table() -> None:
    assert drops(pd.DataFrame({"m": [], "n": [], "seconds": []}), ("m", "n"), "seconds").tolist() == []


def test_of_two_kernels_at_a_shape_the_usual_one_counts(tmp_path: Path) -> None:
    rare = gemm_rows(5.0, "rare")[:1]
    written(tmp_path, "gemm", "1.0", "gemm_perf", [*gemm_rows(), *rare])
    assert of(tmp_path).gemm("bfloat16").lookup(np.array([[1.0, 4096.0, 4096.0]])) == pytest.approx(50e-6)


def test_message_sizes_of_all_reduce_are_elements(tmp_path: Path) -> None:
    rows = [{"num_gpus": 8, "message_size": n, "latency": n * 1e-8 + 0.01} for n in (1024, 2**20, 2**28)]
    written(tmp_path, "comm", "1.0", "custom_allreduce_perf", rows)
    table = of(tmp_path).all_reduce(8)
    assert table.axes == ("bytes",)
    np.testing.assert_array_equal(table.points[:, 0], [2048, 2**21, 2**29])


def test_a_decode_step_sees_its_own_token(tmp_path: Path) -> None:
    rows = [
        {"batch_size": b, "isl": 1, "step": s, "num_heads": 8, "num_key_value_heads": 1, "head_dim": 128,
         "attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "window_size": 0, "latency": 0.1}
        for b in (1, 8)
        for s in (1023, 2047)
    ]  # fmt: skip
    written(tmp_path, "attention", "1.0", "generation_attention_perf", rows)
    table = of(tmp_path).attention(False, 8, 128, "bfloat16", "bfloat16")
    assert set(table.points[:, 1]) == {1024.0, 2048.0}
    with pytest.raises(BadTable, match="heads_per_kv_head"):
        of(tmp_path).attention(False, 4, 128, "bfloat16", "bfloat16")


@pytest.mark.parametrize(("system", "engine"), [("H200", "trtllm"), ("H100", "llama.cpp"), ("H100", "vllm")])
def test_what_is_not_there_is_named(tmp_path: Path, system: str, engine: str) -> None:
    written(tmp_path, "gemm", "1.0", "gemm_perf", gemm_rows())
    with pytest.raises(BadTable):
        read_tables(tmp_path, system, engine)


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(BadTable, match="operator-tables"):
        installed_folder()


def test_the_command_lists_what_it_refused_and_writes_the_rest(tmp_path: Path) -> None:
    fast = {"gemm_dtype": "bfloat16", "kernel_source": "usual", "m": 2, "n": 4096, "k": 4096, "latency": 0.009}
    written(tmp_path, "gemm", "1.0", "gemm_perf", [*gemm_rows(), fast])
    written(tmp_path, "comm", "1.0", "moe_a2a_perf", [{"latency": 1.0}])
    output = tmp_path / "rows.parquet"
    ended = paretune("profile", "import", str(tmp_path), "--system", "H100", "--engine", "trtllm", "-o", str(output))
    assert ended.exit_code == 0
    assert "refused 1 of 5 rows" in ended.stdout
    assert "not read: moe_a2a_perf" in ended.stdout
    rows = pd.read_parquet(output)
    assert len(rows) == 4
    assert (rows["seconds"] >= rows["bound_s"]).all()
    assert paretune("profile", "import", str(tmp_path), "--system", "TPU", "--engine", "trtllm").exit_code == 2
