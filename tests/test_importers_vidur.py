"""Vidur's tables: what is read in which unit, what physics refuses, and steps as sums of operators that are known."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from paretune.profiler.hardware import BadHardware, accelerator
from paretune.profiler.importers.vidur import OPERATORS, VidurTables, read_tables
from paretune.profiler.importers.vidur_folder import devices
from paretune.profiler.operator_tables import BadTable
from paretune.profiler.roofline import roofline_tables
from paretune.profiler.serving_point import PUBLISHED_HOST
from paretune.profiler.vidur_step import vidur_step
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.spec import Pool

from .cli_examples import paretune

HIDDEN, INTER, HEADS, KV_HEADS, LAYERS = 4096, 14336, 32, 8, 32
SHAPE = ModelShape.from_config(
    {"model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
     "num_key_value_heads": KV_HEADS, "intermediate_size": INTER, "vocab_size": 128256, "rms_norm_eps": 1e-5,
     "max_position_embeddings": 8192}
)  # fmt: skip
POOL = Pool(accelerator="A100", max_num_seqs=32, max_num_batched_tokens=2048, num_kv_blocks=2048)
TOKENS = (1, 16, 256, 1024, 4096)
MATRICES = {
    "attn_pre_proj": HIDDEN * (HEADS + 2 * KV_HEADS) * 128,
    "attn_post_proj": HIDDEN * HIDDEN,
    "mlp_up_proj": 2 * HIDDEN * INTER,
    "mlp_down_proj": HIDDEN * INTER,
}
SMALL_MS = 0.01


def bound_ms(elements: float, tokens: int) -> float:
    """On an A100: 312 TFLOP/s, 2,039 GB/s."""
    return 1e3 * max(2 * tokens * elements / 312e12, 2 * elements / 2.039e12)


def operator_ms(name: str, tokens: int, ranks: int) -> float:
    """Matrices at twice their bound, all else 10 µs."""
    return 2 * bound_ms(MATRICES[name] / ranks, tokens) if name in MATRICES else SMALL_MS


def statistics(name: str, milliseconds: float) -> dict[str, float]:
    times = {"min": 0.9, "max": 1.2, "mean": 1.0, "median": 1.0, "std": 0.01}
    return {f"time_stats.{name}.{each}": factor * milliseconds for each, factor in times.items()}


def mlp_rows(change: Callable[[dict[str, Any]], None] = lambda row: None) -> list[dict[str, Any]]:
    rows = []
    for ranks in (1, 2):
        for tokens in TOKENS:
            row: dict[str, Any] = {
                "n_head": HEADS, "n_kv_head": KV_HEADS, "n_embd": HIDDEN, "n_expanded_embd": INTER, "vocab_size": 32000,
                "use_gated_mlp": True, "num_tokens": tokens, "num_tensor_parallel_workers": ranks,
            }  # fmt: skip
            for name in OPERATORS:
                row |= statistics(name, operator_ms(name, tokens, ranks))
            change(row)
            rows.append(row)
    return rows


def all_reduce_ms(size: int) -> float:
    """20 µs, and 100 GB/s."""
    return 0.02 + 1e3 * size / 100e9


def write(folder: Path, rows: list[dict[str, Any]] | None = None, suffix: str = "parquet") -> Path:
    model = folder / "compute" / "a100" / "meta" / "Llama"
    network = folder / "network" / "a100_dgx"
    model.mkdir(parents=True)
    network.mkdir(parents=True)
    frames = {model / "mlp": pd.DataFrame(mlp_rows() if rows is None else rows)}
    frames[network / "all_reduce"] = pd.DataFrame(
        [
            {"rank": rank, "num_workers": 2, "size": size, "collective": "all_reduce", "devices_per_node": inside,
             "max_devices_per_node": 8, **statistics("all_reduce", all_reduce_ms(size) * (1 if inside == 2 else 50))}
            for rank in (0, 1)
            for inside in (1, 2)
            for size in (2048, 2**20, 2**26)
        ]
    )  # fmt: skip
    for path, frame in frames.items():
        if suffix == "csv":
            frame.to_csv(path.with_suffix(".csv"), index=False)
        else:
            frame.to_parquet(path.with_suffix(".parquet"))
    return folder


def tables_of(folder: Path, change: Callable[[dict[str, Any]], None] = lambda row: None) -> VidurTables:
    return read_tables(write(folder, mlp_rows(change)), "A100")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_times_are_milliseconds_and_messages_bytes_of_one_node(tmp_path: Path, suffix: str) -> None:
    tables = read_tables(write(tmp_path, suffix=suffix))
    assert (tables.models, tables.ranks_of("meta/Llama"), tables.networks) == (("meta/Llama",), (1, 2), ("a100_dgx",))
    table = tables.layer("meta/Llama", 2)["mlp_up_proj"]
    expected = 1e-3 * operator_ms("mlp_up_proj", 256, 2)
    assert table.lookup(np.array([[256.0]])) == pytest.approx(expected)
    reduced = tables.collective("all_reduce", "a100_dgx", 2)
    assert reduced.lookup(np.array([[2.0**20]])) == pytest.approx(1e-3 * all_reduce_ms(2**20))
    assert tables.findings == []
    assert tables.between_nodes() == 6


def test_a_step_is_the_sum_of_its_operators(tmp_path: Path) -> None:
    tables = tables_of(tmp_path)
    for ranks in (1, 2):
        pool = POOL.model_copy(update={"tensor_parallel_size": ranks})
        found = vidur_step(tables, SHAPE, pool)
        for tokens in (1, 256, 1024):
            layer = sum(operator_ms(name, tokens, ranks) for name in MATRICES)
            # two norms, the rotary embedding, the activation and two additions; one norm and the embedding at the ends
            expected = LAYERS * (layer + 6 * SMALL_MS) + 2 * SMALL_MS
            size = 2 * HIDDEN * tokens
            if ranks == 2:
                lookup = tables.collective("all_reduce", "a100_dgx", 2).lookup(np.array([[float(size)]]))
                expected += 2 * LAYERS * 1e3 * float(lookup[0])
            assert found.tables.tokens_s[tokens] == pytest.approx(1e-3 * expected + PUBLISHED_HOST.step_s)
        estimated = roofline_tables(accelerator("A100"), SHAPE, pool)
        np.testing.assert_allclose(found.tables.samples_s, estimated.samples_s)
        np.testing.assert_allclose(found.tables.prefill_attention_s, estimated.prefill_attention_s)
        assert not found.measured
        assert found.host_step_s == PUBLISHED_HOST.step_s
        assert any(note.startswith("attention: not measured") for note in found.not_modeled)


def test_attention_is_taken_where_it_was_measured(tmp_path: Path) -> None:
    write(tmp_path)
    same = {"n_embd": HIDDEN, "n_q_head": HEADS, "n_kv_head": KV_HEADS, "num_tensor_parallel_workers": 1}
    rows: list[dict[str, Any]] = []
    for chunk in (64, 1024, 8192):
        for cached in (0, 4096):
            flops = 4 * HIDDEN * chunk * (cached + chunk / 2)
            step = {**same, "batch_size": 1, "prefill_chunk_size": chunk, "kv_cache_size": cached}
            rows.append({**step, **statistics("attn_prefill", 0.01 + 2e3 * flops / 312e12)})
    for many in (1, 32):
        for context in (128, 1024, 8192):
            moved = 4 * KV_HEADS * 128 * many * context
            step = {**same, "batch_size": many, "prefill_chunk_size": 0, "kv_cache_size": context}
            rows.append({**step, **statistics("attn_decode", 0.005 + 2e3 * moved / 2.039e12)})
    attention = tmp_path / "compute" / "a100" / "meta" / "Llama" / "attention.csv"
    pd.DataFrame(rows).to_csv(attention, index=False)
    modeled = vidur_step(read_tables(tmp_path), SHAPE, POOL)
    assert any(note.startswith("saving new keys and values") for note in modeled.not_modeled)
    found = modeled.tables
    grid = 2.0 ** (np.arange(len(found.decode_attention_s)) / 4)
    at = int(np.argmin(abs(grid - 1024 * 1025 / 2)))
    assert found.prefill_attention_s[at] == pytest.approx(LAYERS * (1e-5 + 2 * 4 * HIDDEN * grid[at] / 312e12), rel=0.1)
    at = int(np.argmin(abs(grid - 32 * 1024)))
    moved = 4 * KV_HEADS * 128 * grid[at]
    assert found.decode_attention_s[at] == pytest.approx(LAYERS * (5e-6 + 2 * moved / 2.039e12), rel=0.1)
    # 3 µs, and 1 ns a token: those of the prompt, or one of each decode row
    saving = [
        {**row, **statistics("attn_kv_cache_save", 3e-3 + 1e-6 * max(row["prefill_chunk_size"], row["batch_size"]))}
        for row in rows
    ]
    pd.DataFrame(saving).to_csv(attention, index=False)
    modeled = vidur_step(read_tables(tmp_path), SHAPE, POOL)
    assert not any(note.startswith("saving new keys and values") for note in modeled.not_modeled)
    for tokens in (1, 32, 64, 1024):
        added_s = modeled.tables.tokens_s[tokens] - found.tokens_s[tokens]
        assert added_s == pytest.approx(LAYERS * (3e-6 + 1e-9 * tokens), rel=1e-6)


def test_more_than_the_peak_rate_is_refused_and_what_a_cache_held_is_raised(tmp_path: Path) -> None:
    def change(row: dict[str, Any]) -> None:
        if row["num_tokens"] == 4096:  # 0.9 of the least time of its arithmetic
            row |= statistics("mlp_up_proj", 0.9 * bound_ms(MATRICES["mlp_up_proj"] / 2, 4096))
        if row["num_tokens"] == 1:
            row |= statistics("attn_post_proj", 0.7 * bound_ms(MATRICES["attn_post_proj"] / 2, 1))

    tables = tables_of(tmp_path, change)
    layer = tables.layer("meta/Llama", 2)
    assert 4096.0 not in layer["mlp_up_proj"].points[:, 0]
    post = layer["attn_post_proj"]
    assert post.seconds[0] == post.bound_s(post.points[:1])[0]
    said = {(finding.refused, finding.rows, finding.of) for finding in tables.findings}
    assert said == {(True, 1, 5), (False, 1, 5)}
    assert any("peak FLOP/s" in str(each) and "num_tokens 4096" in str(each) for each in tables.findings)


def test_statistics_out_of_order_and_times_that_fall_are_said(tmp_path: Path) -> None:
    def change(row: dict[str, Any]) -> None:
        if row["num_tokens"] == 16:
            row["time_stats.attn_rope.min"] = 5.0  # above its median
        if row["num_tokens"] == 1024:
            row |= statistics("mlp_act", SMALL_MS / 3)

    tables = tables_of(tmp_path, change)
    assert 16.0 not in tables.layer("meta/Llama", 1)["attn_rope"].points[:, 0]
    assert 1024.0 in tables.layer("meta/Llama", 1)["mlp_act"].points[:, 0]
    assert sorted((f.refused, f.reason.split(",")[0].split(" of a")[0]) for f in tables.findings) == [
        (False, "less than half the time"),
        (True, "min"),
    ]


@pytest.mark.parametrize("name", ["attn_pre_proj", "mlp_down_proj", "input_layernorm", "attn_rope"])
@pytest.mark.parametrize("empty", [False, True])
def test_an_operator_of_every_model_is_needed(tmp_path: Path, name: str, empty: bool) -> None:
    def change(row: dict[str, Any]) -> None:
        for each in list(row):
            if each.startswith(f"time_stats.{name}."):
                row[each] = np.nan
                if not empty:
                    del row[each]

    with pytest.raises(BadTable, match=name):
        vidur_step(tables_of(tmp_path, change), SHAPE, POOL)


def test_an_operator_that_models_may_lack_is_named_where_it_was_not_timed(tmp_path: Path) -> None:
    def change(row: dict[str, Any]) -> None:
        for each in ("min", "max", "mean", "median", "std"):
            del row[f"time_stats.post_attention_layernorm.{each}"]

    whole = vidur_step(tables_of(tmp_path / "whole"), SHAPE, POOL)
    found = vidur_step(tables_of(tmp_path / "without", change), SHAPE, POOL)
    assert whole.tables.tokens_s[256] - found.tables.tokens_s[256] == pytest.approx(1e-3 * LAYERS * SMALL_MS)
    assert any(note.startswith("post_attention_layernorm: not measured") for note in found.not_modeled)
    assert not any("post_attention_layernorm" in note for note in whole.not_modeled)


@pytest.mark.parametrize(
    ("column", "value"),
    [("time_stats.mlp_act.median", "fast"), ("num_tokens", "many"), ("n_head", 0), ("n_embd", None)],
)
def test_what_is_no_number_is_refused_by_line_and_column(tmp_path: Path, column: str, value: Any) -> None:
    rows = mlp_rows()
    for row in rows:
        row[column] = str(row[column])
    rows[2][column] = value
    with pytest.raises(BadTable, match=column) as refused:
        read_tables(write(tmp_path, rows, "csv"), "A100").layer("meta/Llama", 1)
    assert refused.value.where.endswith("mlp.csv:4")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, suffix=suffix)
    path = tmp_path / "compute" / "a100" / "meta" / "Llama" / f"mlp.{suffix}"
    path.write_bytes(b"" if suffix == "csv" else b"no parquet at all")
    with pytest.raises(BadTable, match="CSV or Parquet"):
        read_tables(tmp_path, "A100").layer("meta/Llama", 1)


@pytest.mark.parametrize(
    ("own", "asked"), [("A100", "a100"), ("rtx_pro_6000", "RTX PRO 6000"), ("RTX-PRO-6000", "rtx_pro_6000")]
)
def test_a_device_is_found_as_the_catalog_writes_it(tmp_path: Path, own: str, asked: str) -> None:
    write(tmp_path)
    (tmp_path / "compute" / "a100").rename(tmp_path / "compute" / own)
    node = tmp_path / "network" / f"{own.lower().replace('-', '_')}_dgx"
    (tmp_path / "network" / "a100_dgx").rename(node)
    tables = read_tables(tmp_path, asked)
    assert devices(tmp_path) == (own,)
    assert (tables.device, tables.accelerator) == (own, accelerator(asked))
    assert tables.networks == (node.name,)
    pool = POOL.model_copy(update={"accelerator": accelerator(asked).name, "tensor_parallel_size": 2})
    assert any(node.name in note for note in vidur_step(tables, SHAPE, pool).not_modeled)


def test_a_node_without_operators_is_of_the_device_that_its_name_begins_with(tmp_path: Path) -> None:
    for node in ("rtx_pro_6000_dgx", "h100_pairwise_nvlink", "x900_dgx"):
        (tmp_path / "network" / node).mkdir(parents=True)
    assert devices(tmp_path) == ("h100", "rtx_pro_6000", "x900")


@pytest.mark.parametrize(("factor", "words"), [(1e-3, "larger unit"), (1e3, "smaller unit")])
def test_a_table_in_another_unit_is_refused_as_a_whole(tmp_path: Path, factor: float, words: str) -> None:
    def change(row: dict[str, Any]) -> None:
        row |= statistics("mlp_down_proj", factor * row["time_stats.mlp_down_proj.median"])

    with pytest.raises(BadTable, match=words):
        tables_of(tmp_path, change).layer("meta/Llama", 1)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda row: {"time_stats.mlp_up_proj.min": 1e6}, "above 0 and in order"),
        (
            lambda row: statistics("mlp_up_proj", 0.9e3 * row["num_tokens"] * MATRICES["mlp_up_proj"] / 312e12),
            "faster than physics",
        ),
    ],
)
def test_why_no_row_is_left_is_said(
    tmp_path: Path, changed: Callable[[dict[str, Any]], dict[str, float]], words: str
) -> None:
    with pytest.raises(BadTable, match=words):
        tables_of(tmp_path, lambda row: row.update(changed(row))).layer("meta/Llama", 2)


def test_prompts_of_which_none_was_timed_are_said_to_have_no_time(tmp_path: Path) -> None:
    write(tmp_path)
    same = {"n_embd": HIDDEN, "n_q_head": HEADS, "n_kv_head": KV_HEADS, "num_tensor_parallel_workers": 1,
            "batch_size": 1, "kv_cache_size": 1024}  # fmt: skip
    rows = [
        {**same, "prefill_chunk_size": 0, **statistics("attn_decode", 0.1)},
        {**same, "prefill_chunk_size": 1024, **statistics("attn_prefill", np.nan)},
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "compute" / "a100" / "meta" / "Llama" / "attention.csv", index=False)
    with pytest.raises(BadTable, match="no row with a time"):
        read_tables(tmp_path).attention("meta/Llama", 1)


def test_messages_that_no_link_carries_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "network" / "a100_dgx" / "all_reduce.parquet"
    frame = pd.read_parquet(path)
    large = frame["size"] == 2**26  # elements taken as bytes would show as twice the size in the same time
    for each in ("min", "median", "max"):
        frame.loc[large, f"time_stats.all_reduce.{each}"] = 1e3 * 2**26 / 400e9  # NVLink 3 has 300 GB/s
    frame.to_parquet(path)
    tables = read_tables(tmp_path)
    assert 2.0**26 not in tables.collective("all_reduce", "a100_dgx", 2).points
    assert [finding.refused for finding in tables.findings] == [True]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"accelerator": "H100"}, BadHardware),
        ({"weight_dtype": "fp8"}, BadHardware),
        ({"tensor_parallel_size": 4}, BadTable),
    ],
)
def test_what_was_not_measured_is_refused(tmp_path: Path, change: dict[str, Any], error: type[Exception]) -> None:
    tables = tables_of(tmp_path)
    with pytest.raises(error):
        vidur_step(tables, SHAPE, POOL.model_copy(update=change))


def test_another_model_is_refused_with_those_that_are_there(tmp_path: Path) -> None:
    tables = tables_of(tmp_path)
    other = ModelShape.from_config(
        {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 16,
         "intermediate_size": 8192, "vocab_size": 1000, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
    )  # fmt: skip
    with pytest.raises(BadTable, match="meta/Llama"):
        vidur_step(tables, other, POOL)
    with pytest.raises(BadTable, match="a100"):
        read_tables(tmp_path, "H100")


def test_the_command_lists_what_was_read_and_what_was_not(tmp_path: Path) -> None:
    def change(row: dict[str, Any]) -> None:
        if row["num_tokens"] == 1:
            row |= statistics("add", -1.0)

    write(tmp_path / "tables", mlp_rows(change))
    output = tmp_path / "rows.parquet"
    ended = paretune("profile", "import", "vidur", tmp_path / "tables", "-o", output)
    assert ended.exit_code == 0
    assert "mlp_up_proj" in ended.stdout
    assert "2 rows refused, 0 flagged" in ended.stdout
    assert "6 rows of collectives of a100 between nodes" in ended.stdout
    assert "attention of a100: not in the folder" in ended.stdout
    rows = pd.read_parquet(output)
    assert (rows["seconds"] >= rows["bound_s"]).all()
    data = paretune("profile", "import", tmp_path / "tables", "--json").json["data"]
    assert data["kind"] == "vidur"
    assert data["points"]["mlp_up_proj"] == 2 * len(TOKENS)


def test_attention_is_missed_device_by_device(tmp_path: Path) -> None:
    write(tmp_path)
    shutil.copytree(tmp_path / "compute" / "a100", tmp_path / "compute" / "h100")
    same = {"n_embd": HIDDEN, "n_q_head": HEADS, "n_kv_head": KV_HEADS, "batch_size": 1, "kv_cache_size": 1024}
    rows = [
        {**same, "num_tensor_parallel_workers": ranks, "prefill_chunk_size": chunk, **statistics(name, 0.1)}
        for ranks in (1, 2)
        for chunk, name in ((0, "attn_decode"), (1024, "attn_prefill"))
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "compute" / "a100" / "meta" / "Llama" / "attention.csv", index=False)
    ended = paretune("profile", "import", tmp_path)
    assert ended.exit_code == 0, ended.stderr
    assert "attention of h100: not in the folder" in ended.stdout
    assert "attention of a100" not in ended.stdout


def test_a_folder_without_tables_is_no_import(tmp_path: Path) -> None:
    output = tmp_path / "rows.parquet"
    for folder in ("compute", "compute/a100"):
        (tmp_path / "tables" / folder).mkdir(parents=True)
        ended = paretune("profile", "import", "vidur", tmp_path / "tables", "-o", output)
        assert ended.exit_code == 2
        assert "no table of any device" in ended.stderr
        assert not output.exists()


def test_the_published_tables_are_read(data_dir: Path) -> None:
    tables = read_tables(data_dir / "ops" / "vidur", "A100")
    read = list(tables.every())
    assert {table.operator for table in read} >= {"mlp_up_proj", "all_reduce", "send_recv"}
    assert all((table.seconds >= table.bound_s(table.points)).all() for table in read)
    assert tables.findings
    assert all(0 < finding.rows <= finding.of for finding in tables.findings)
