"""Whole steps of others: Splitwise's runs as steps, our own table out and back, and a pool's tables from either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from paretune.profiler.hardware import accelerator
from paretune.profiler.importers.kinds import read_step_table
from paretune.profiler.importers.splitwise import PARAMETERS
from paretune.profiler.importers.step_rows import COLUMNS, StepRows, StepsOf, bound_s, layer_parameters, write_steps
from paretune.profiler.operator_tables import BadTable
from paretune.profiler.operators import Composition
from paretune.profiler.profile import StepPoint
from paretune.profiler.step_fit import fit_steps
from paretune.profiler.step_time import composed_time_s
from paretune.profiler.whole_steps import measured_as, whole_step
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.spec import Pool

from .cli_examples import paretune
from .profiler_examples import SMALL, points, profile

LLAMA_2_70B = ModelShape.from_config(
    {"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
     "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 32000, "rms_norm_eps": 1e-5,
     "max_position_embeddings": 4096}
)  # fmt: skip
POOL = Pool(
    accelerator="A100", tensor_parallel_size=8, max_model_len=4096, max_num_seqs=64, max_num_batched_tokens=8192,
    num_kv_blocks=4096,
)  # fmt: skip


def prompt_ms(tokens: int) -> float:
    """Eight A100: 40 ms, and two thirds of the peak rate."""
    return 40.0 + 1e3 * 1.5 * 2 * PARAMETERS["llama2-70b"] * tokens / (8 * 312e12)


def decode_ms(batch: int, context: float) -> float:
    return 45.0 + 0.2 * batch + 1e-5 * batch * context


def runs(repeats: int = 3) -> list[dict[str, Any]]:
    found = []
    for batch, prompt in [(1, n) for n in (128, 256, 512, 1024, 2048, 4096)] + [(n, 512) for n in (2, 4, 8, 16)]:
        for repeat in range(repeats):
            off = 1.0 + 0.01 * (repeat - 1)
            token = decode_ms(batch, prompt + 64.5)
            found.append(
                {"model": "llama2-70b", "hardware": "a100-80gb", "tensor_parallel": 8, "prompt_size": prompt,
                 "batch_size": batch, "token_size": 128, "prompt_time": off * prompt_ms(batch * prompt),
                 "token_time": off * token, "e2e_time": off * (prompt_ms(batch * prompt) + 127 * token)}
            )  # fmt: skip
    return found


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def test_the_parameters_that_bound_splitwises_steps_are_the_models() -> None:
    assert layer_parameters(LLAMA_2_70B) == PARAMETERS["llama2-70b"]


def test_a_run_is_one_step_of_its_prompts_and_one_decode_step(tmp_path: Path) -> None:
    (table,), findings = read_step_table(write(tmp_path / "perf.csv", runs()))
    assert findings == []
    assert (table.of.accelerator, table.of.tensor_parallel_size) == ("A100", 8)
    assert len(table.points) == 20
    prompts = [p for p in table.points if p.prefill_pairs and p.num_rows == 4]
    assert [(p.num_tokens, p.num_samples, p.decode_context, p.prefill_pairs, p.count) for p in prompts] == [
        (2048, 4, 0.0, 4 * 512 * 513 / 2, 3)
    ]
    assert prompts[0].median_s == pytest.approx(1e-3 * prompt_ms(2048))
    (decode,) = [p for p in table.points if not p.prefill_pairs and p.num_rows == 4]
    # 127 decode steps after a prompt of 512 read 513 to 639 tokens a row
    assert (decode.num_tokens, decode.decode_context) == (4, 4 * (513 + 639) / 2)
    assert decode.iqr_s == pytest.approx(0.01 * decode.median_s, rel=1e-6)


def test_the_steps_are_predicted_and_never_faster_than_the_data_sheet_allows(tmp_path: Path) -> None:
    tables, _ = read_step_table(write(tmp_path / "perf.csv", runs()))
    found = whole_step(tables, LLAMA_2_70B, POOL, accelerator("A100"))
    assert found.measured
    for tokens in (512, 1024, 4096):
        step = Composition(tokens, 1, 1, 0.0, tokens * (tokens + 1) / 2)
        assert composed_time_s(found.tables, *step) == pytest.approx(1e-3 * prompt_ms(tokens), rel=0.05)
    assert found.host_step_s == pytest.approx(35e-3, rel=0.2)  # of 45 ms reading 68 GB on eight devices takes 8
    assert any("rows together" in note for note in found.not_modeled)
    assert any("num_tokens > 8192" in note for note in whole_step(
        tables, LLAMA_2_70B, POOL.model_copy(update={"max_num_batched_tokens": 16384}), accelerator("A100")
    ).not_modeled)  # fmt: skip


def test_faster_than_the_peak_rate_is_refused_and_a_batch_in_turns_too(tmp_path: Path) -> None:
    rows = runs(1)
    rows[-1] |= {"prompt_time": 100.0, "e2e_time": 100.0 + 127 * rows[-1]["token_time"]}  # 8,192 tokens: at least 449
    rows[-2] |= {"e2e_time": 3 * rows[-2]["e2e_time"]}
    rows[0] |= {"e2e_time": rows[0]["prompt_time"] + 9 * rows[0]["token_time"]}  # ten tokens, and the end
    (table,), findings = read_step_table(write(tmp_path / "perf.csv", rows))
    said = {(f.refused, f.rows): f.reason for f in findings}
    assert set(said) == {(True, 1), (False, 1)}
    assert sum(f.refused for f in findings) == 2
    assert len(table.points) == 20 - 1 - 2
    early = next(p for p in table.points if not p.prefill_pairs and p.num_rows == 1 and p.decode_context < 200)
    assert early.decode_context == pytest.approx(129 + 4)


def test_a_step_that_takes_less_than_one_within_it_is_flagged(tmp_path: Path) -> None:
    rows = runs(1)
    rows[0]["prompt_time"] = 8 * rows[0]["prompt_time"]
    rows[0]["e2e_time"] += 7 / 8 * rows[0]["prompt_time"]
    _, findings = read_step_table(write(tmp_path / "perf.csv", rows))
    # 404 ms for 128 tokens: 256, 512, and 1,024 as one prompt or two take less than half of it
    assert [(f.refused, f.rows) for f in findings] == [(False, 4)]
    assert "that it contains" in findings[0].reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update({k: r[k] * 1e-3 for k in ("prompt_time", "token_time", "e2e_time")}), "larger unit"),
        (lambda r: r.update({k: r[k] * 1e3 for k in ("prompt_time", "token_time", "e2e_time")}), "smaller unit"),
        (lambda r: r.update(token_time=0.0), "token_time 0.0"),
        (lambda r: r.pop("token_size"), "token_size"),
        (lambda r: r.update(model="gpt-5"), "gpt-5"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, change: Any, words: str) -> None:
    rows = runs(1)
    for row in rows:
        change(row)
    with pytest.raises(BadTable, match=words):
        read_step_table(write(tmp_path / "perf.csv", rows))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_an_exported_profile_gives_the_same_steps_back(tmp_path: Path, suffix: str) -> None:
    measured = profile()
    measured.save(tmp_path / "profile.json")
    output = tmp_path / f"steps{suffix}"
    ended = paretune("profile", "export", tmp_path / "profile.json", "-o", output)
    assert ended.exit_code == 0
    tables, findings = read_step_table(output)
    assert [table.points for table in tables] == [each.steps for each in measured.configurations]
    assert [table.of.parameters for table in tables] == [layer_parameters(SMALL)] * len(tables)
    assert all("not checked against physics" in finding.reason for finding in findings)
    for table, each in zip(tables, measured.configurations):
        assert fit_steps(table.points).errors == fit_steps(each.steps).errors
    listed = paretune("profile", "import", output)
    assert f"{len(measured.configurations[0].steps)}" in listed.stdout


def steps_of(**changes: Any) -> StepRows:
    of = {"model": "m", "parameters": layer_parameters(LLAMA_2_70B), "accelerator": "a100", "tensor_parallel_size": 8}
    return StepRows(StepsOf(**{**of, **changes}), points())


def test_a_pool_takes_the_steps_of_its_own_model_sharding_and_precision() -> None:
    right = steps_of()
    others = [steps_of(tensor_parallel_size=4), steps_of(parameters=7_000_000_000), steps_of(weight_dtype="fp8")]
    assert measured_as([*others, right], LLAMA_2_70B, POOL) is right
    with pytest.raises(BadTable, match="tensor_parallel_size"):
        measured_as(others[:1], LLAMA_2_70B, POOL)
    with pytest.raises(BadTable, match="parameters"):
        measured_as(others[1:2], LLAMA_2_70B, POOL)
    with pytest.raises(BadTable, match="weight_dtype"):
        measured_as(others[2:], LLAMA_2_70B, POOL)
    with pytest.raises(BadTable, match="2 tables"):
        measured_as([right, steps_of(source="again")], LLAMA_2_70B, POOL)


def test_a_damaged_table_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    assert write_steps(path, [steps_of()]) == len(points())
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
    frame = pd.read_csv(path)
    frame.loc[3, "median_s"] = -1.0
    frame.to_csv(path, index=False)
    with pytest.raises(BadTable, match=r"steps\.csv:5"):
        read_step_table(path)


def test_no_step_takes_less_than_to_read_the_weights_or_multiply_them() -> None:
    of, device = StepsOf("m", 10**9, "H100", 2), accelerator("H100")
    few, many = (
        StepPoint(num_tokens=n, num_rows=1, num_samples=1, decode_context=0.0, prefill_pairs=0.0, median_s=1.0,
                  iqr_s=0.0, count=1)
        for n in (1, 10_000)
    )  # fmt: skip
    expected = [1e9 / 3.35e12, 1e13 / device.flops_per_s("bf16")]
    assert bound_s(of, [few, many], device).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("weight_dtype", "name", "rate", "weight_bytes"),
    [
        ("nvfp4", "B200", 9000e12, 0.5),
        ("mxfp4", "RTX PRO 6000", 1871.2e12, 0.5),
        ("nvfp4", "H100", 989e12, 0.5),  # expanded to bf16
        ("int4", "H100", 989e12, 0.5),
        ("ternary", "H100", 1979e12, 0.25),
        ("ternary", "Gaudi 3", 1677e12, 0.25),  # no int8 there
        ("fp8", "A100", 312e12, 1.0),
        ("fp16", "A100", 312e12, 2.0),
    ],
)
def test_a_step_is_bounded_by_the_arithmetic_of_its_weights(
    weight_dtype: str, name: str, rate: float, weight_bytes: float
) -> None:
    of, device = StepsOf("m", 10**9, name, weight_dtype=weight_dtype), accelerator(name)
    few, many = (
        StepPoint(num_tokens=n, num_rows=1, num_samples=1, decode_context=0.0, prefill_pairs=0.0, median_s=1.0,
                  iqr_s=0.0, count=1)
        for n in (1, 100_000)
    )  # fmt: skip
    expected = [1e9 * weight_bytes / device.peak_bytes_per_s, 2e14 / rate]
    assert bound_s(of, [few, many], device).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("value", [0, -1, 2.5, "", "two", float("inf")])
@pytest.mark.parametrize("column", ["tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size"])
def test_a_number_of_ranks_that_is_none_is_refused_by_name(tmp_path: Path, column: str, value: Any) -> None:
    path = tmp_path / "steps.csv"
    write_steps(path, [steps_of()])
    frame = pd.read_csv(path)
    frame[column] = frame[column].astype(object)
    frame.loc[3, column] = value
    frame.to_csv(path, index=False)
    with pytest.raises(BadTable, match=column) as refused:
        read_step_table(path)
    assert refused.value.exit_code == 2


def test_whole_numbers_that_another_program_wrote_as_floats_are_read(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    write_steps(path, [steps_of()])
    frame = pd.read_csv(path)
    frame["pipeline_parallel_size"] = frame["pipeline_parallel_size"].astype(float)
    frame.to_csv(path, index=False)
    (table,), _ = read_step_table(path)
    assert measured_as([table], LLAMA_2_70B, POOL).of == steps_of().of


def test_the_hosts_part_of_a_step_is_what_no_token_adds_to() -> None:
    # 50 ms, and 10 ms a token, of which reading 68 GB on eight devices is 8 ms of every step
    steps = tuple(
        StepPoint(num_tokens=n, num_rows=rows, num_samples=rows, decode_context=0.0,
                  prefill_pairs=n * (n / rows + 1) / 2, median_s=0.05 + 0.01 * n, iqr_s=0.0, count=1)
        for n in (4, 8, 16, 32, 64, 128, 256)
        for rows in (1, 4)
    )  # fmt: skip
    found = whole_step([StepRows(steps_of().of, steps)], LLAMA_2_70B, POOL, accelerator("A100"))
    assert found.host_step_s == pytest.approx(0.042, rel=0.05)
    assert any("the host's part of a step" in note for note in found.not_modeled)


@pytest.mark.parametrize(("hardware", "known"), [("a100-40gb", False), ("h100-pcie", False), ("H100-80GB", True)])
def test_another_board_of_a_name_is_not_that_of_the_catalog(tmp_path: Path, hardware: str, known: bool) -> None:
    (table,), findings = read_step_table(
        write(tmp_path / "perf.csv", [{**row, "hardware": hardware} for row in runs()])
    )
    assert table.of.accelerator == ("H100" if known else hardware)
    assert any("not in the catalog" in finding.reason for finding in findings) == (not known)
    pool = POOL.model_copy(update={"accelerator": hardware[:4].upper()})
    if known:
        assert measured_as([table], LLAMA_2_70B, pool) is table
    else:
        with pytest.raises(BadTable, match="accelerator"):
            measured_as([table], LLAMA_2_70B, pool)


def test_splitwises_published_runs_are_read(data_dir: Path) -> None:
    tables, findings = read_step_table(data_dir / "ops" / "splitwise" / "splitwise_a100_dev.csv")
    assert sorted(table.of.tensor_parallel_size for table in tables) == [2, 4, 8, 8]
    # 64 prompts of 512 tokens on two A100: 793 ms, where the arithmetic alone takes 7.2 s
    assert any(f.refused and "64 x 512" in f.example for f in findings)
