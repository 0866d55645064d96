"""Tables of others in place of a data sheet: every command takes them alike, and what they do not hold is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paretune.optimizer.sources import Sources
from paretune.optimizer.store import Ledger
from paretune.profiler.hardware import BadHardware, accelerator
from paretune.profiler.importers.step_rows import StepRows, StepsOf, layer_parameters, write_steps
from paretune.profiler.operator_tables import BadTable
from paretune.profiler.step_source import LayerTimes, open_tables
from paretune.profiler.step_time import composed_time_s
from paretune.profiler.table_choice import TableChoice
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.spec import Deployment, Pool, load_deployment, save_deployment
from paretune.traces import read

from .cli_examples import CONFIG, in_folder, paretune, write_inputs
from .operator_table_examples import write_operators
from .profiler_examples import points
from .test_importers_llmservingsim import POOL as PROFILED_POOL
from .test_importers_llmservingsim import SHAPE as PROFILED
from .test_importers_llmservingsim import write_profile
from .test_importers_vidur import write as write_vidur

POOL = Pool(
    accelerator="H100", max_num_seqs=16, max_num_batched_tokens=512, max_model_len=8192, num_kv_blocks=2000, replicas=1
)
SHAPE = ModelShape.from_config(CONFIG)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A log, a model, a spec of an H100, and tables of every kind."""
    folder = tmp_path_factory.mktemp("sources")
    write_inputs(folder)
    write_operators(folder / "operators")
    write_profile(folder / "perf", hardware="H100")
    write_vidur(folder / "vidur")
    of = StepsOf("a Llama 8B", layer_parameters(SHAPE), "H100", source="made up")
    write_steps(folder / "steps.csv", [StepRows(of, points())])
    with in_folder(folder):
        save_deployment(Deployment(model="model", pools=(POOL,)), "spec.yaml")
        yield folder


def sources(**tables: str) -> Sources:
    return Sources.of("model", accelerator_name="H100", tables=TableChoice(**tables))


def p50(*arguments: str) -> float:
    shown = paretune("simulate", "log.csv", "--spec", "spec.yaml", *arguments, "--json")
    assert shown.exit_code == 0, shown.stderr
    return float(shown.json["data"]["summary"]["values"]["tpot"]["p50"])


def test_simulate_takes_operators_and_whole_steps_for_the_data_sheet(here: Path) -> None:
    sheet, operators, steps = p50(), p50("--operator-tables", "operators"), p50("--step-times", "steps.csv")
    assert len({sheet, operators, steps}) == 3
    shown = paretune("simulate", "log.csv", "--spec", "spec.yaml", "--operator-tables", "operators")
    assert "NOT MEASURED" in shown.stdout
    shown = paretune("simulate", "log.csv", "--spec", "spec.yaml", "--step-times", "steps.csv")
    assert "NOT MEASURED" not in shown.stdout


def test_tune_searches_by_operators_and_remembers_them(here: Path) -> None:
    command = (
        "tune", "log.csv", "--model", "model", "--accelerator", "H100", "--slo", "ttf30:p95<=2s", "--trials", "6",
        "--operator-tables", "operators", "--tables-engine", "vllm", "--space", "space.yaml", "--study", "by-operators",
    )  # fmt: skip
    tuned = paretune(*command, "--json")
    assert tuned.exit_code == 0, tuned.stderr
    data = tuned.json["data"]
    assert any("sums of single operators" in each for each in data["not_modeled"])
    # two ranks were not measured, and that is counted
    reasons = [*data["screened"]["invalid"], *data["screened"]["dropped"]]
    assert any("no table custom_allreduce_perf" in reason for reason in reasons)
    assert paretune("pick", "by-operators", "-o", "picked.yaml").exit_code == 0
    picked = load_deployment("picked.yaml")
    assert picked.provenance is not None
    assert "operator tables of h100_sxm" in picked.provenance.profile
    assert not picked.provenance.measured
    (study,) = (row for row in Ledger("out/paretune.db").studies() if row.name == "by-operators")
    assert study.about is not None
    assert study.about["options"]["operator-tables"] == str(Path("operators").absolute())
    assert study.about["options"]["tables-engine"] == "vllm"


def test_explain_takes_a_step_of_operators_apart_into_all_of_it(here: Path) -> None:
    shown = paretune(
        "explain", "spec.yaml", "log.csv", "--metric", "ttft:p95", "--no-knobs", "--operator-tables", "operators",
        "--json",
    )  # fmt: skip
    assert shown.exit_code == 0, shown.stderr
    found = shown.json["data"]["metrics"]["ttft:p95"]
    assert sum(part["seconds"] for part in found["parts"].values()) == pytest.approx(found["value"])
    assert shown.json["data"]["host_share"][0]["prompt_tokens"] == 16


def test_explain_refuses_layer_times_and_says_what_else_there_is(here: Path) -> None:
    shown = paretune("explain", "spec.yaml", "log.csv", "--layer-times", "perf")
    assert shown.exit_code == 2
    assert "operator tables, whole steps, or the data sheet" in shown.stderr


@pytest.fixture(scope="module")
def calibration(here: Path) -> Path:
    """Of a server whose decode steps take twice what the operators say."""
    model = sources(operator_tables="operators").step_model(POOL)
    rng = np.random.default_rng(0)
    lines = []
    for place in range(200):
        rows = int(rng.integers(1, 16))
        context = rows * float(rng.integers(100, 4000))
        seconds = 2.0 * composed_time_s(model.tables, rows, rows, rows, context, 0.0)
        lines.append({"replica": 0, "num_tokens": rows, "num_rows": rows, "num_samples": rows, "seconds": seconds,
                      "decode_context": context, "prefill_pairs": 0.0, "started_s": float(place)})  # fmt: skip
    Path("steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = Path("calibration.json")
    done = paretune(
        "calibrate", "--from", "steps.jsonl", "--spec", "spec.yaml", "--operator-tables", "operators", "-o", output
    )
    assert done.exit_code == 0, done.stderr
    return output


def test_calibrate_corrects_operators_and_only_them(calibration: Path) -> None:
    given = ("--operator-tables", "operators")
    assert p50(*given, "--calibration", str(calibration)) == pytest.approx(2 * p50(*given), rel=0.1)
    refused = paretune("simulate", "log.csv", "--spec", "spec.yaml", "--calibration", calibration)
    assert refused.exit_code == 2
    assert "calibrate what you use" in refused.stderr


def test_calibrated_host_time_grows_with_the_steps(calibration: Path) -> None:
    tables = TableChoice(operator_tables="operators")
    plain, corrected = (
        Sources.of("model", accelerator_name="H100", tables=tables, calibration_path=path)
        for path in (None, calibration)
    )
    assert corrected.step_model(POOL).host_step_s > 1.5 * plain.step_model(POOL).host_step_s > 0


@pytest.mark.parametrize(
    ("tables", "where"),
    [
        ({"operator_tables": "operators", "step_times": "steps.csv"}, "step times of an accelerator"),
        ({"operator_tables": "perf"}, "perf"),
        ({"operator_tables": "steps.csv"}, "steps.csv"),
        ({"operator_tables": "model"}, "model"),
        ({"operator_tables": "nowhere"}, "nowhere"),
        ({"operator_tables": "operators", "engine": "sglang"}, "operators/h100_sxm"),
    ],
)
def test_what_is_no_such_table_is_refused_by_name(here: Path, tables: dict[str, str], where: str) -> None:
    with pytest.raises(BadTable) as refused:
        open_tables(TableChoice(**tables), accelerator("H100"))
    assert refused.value.where == where
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("choice", [{"engine": "trtllm"}, {"engine_version": "1.0"}])
@pytest.mark.parametrize(
    "tables", [{}, {"layer_times": "perf"}, {"step_times": "steps.csv"}, {"operator_tables": "vidur"}]
)
def test_an_engine_is_refused_where_no_table_has_one(
    here: Path, tables: dict[str, str], choice: dict[str, str]
) -> None:
    with pytest.raises(BadTable) as refused:
        open_tables(TableChoice(**tables, **choice), accelerator("A100"))
    assert refused.value.where == ("tables-engine" if "engine" in choice else "tables-version")


def test_an_engine_without_tables_ends_a_command(here: Path) -> None:
    for option, value in (("--tables-engine", "trtllm"), ("--tables-version", "1.0")):
        ended = paretune("simulate", "log.csv", "--spec", "spec.yaml", option, value)
        assert ended.exit_code == 2
        assert option.removeprefix("--") in ended.stderr
    assert TableChoice(engine="trtllm", engine_version="1.0").flags() == {
        "--tables-engine": "trtllm",
        "--tables-version": "1.0",
    }


@pytest.mark.parametrize(
    ("source", "option", "value"),
    [
        ("operators", "--model", "model"),
        ("perf", "--system", "H100"),
        ("perf", "--engine", "vllm"),
        ("vidur", "--engine", "vllm"),
        ("vidur", "--version", "1.0"),
        ("steps.csv", "--system", "H100"),
        ("steps.csv", "--model", "model"),
    ],
)
def test_an_import_refuses_the_options_of_other_kinds(here: Path, source: str, option: str, value: str) -> None:
    ended = paretune("profile", "import", source, option, value)
    assert ended.exit_code == 2
    assert f"error: {option}: found given for " in ended.stderr


@pytest.mark.parametrize(
    ("kind", "source", "found"),
    [
        ("splitwise", "steps.csv", "steps"),
        ("vidur", "operators", "aiconfigurator"),
        ("vidur", "nowhere", "nothing there"),
        ("aiconfigurator", "vidur", "vidur"),
    ],
)
def test_an_import_is_of_the_kind_that_it_is_said_to_be(here: Path, kind: str, source: str, found: str) -> None:
    output = Path("imported.parquet")
    ended = paretune("profile", "import", kind, source, "-o", output)
    assert ended.exit_code == 2
    assert found in ended.stderr
    assert not output.exists()


@pytest.mark.parametrize("name", ["operator_tables", "layer_times", "step_times"])
def test_tables_are_of_an_accelerator_of_the_catalog(here: Path, name: str) -> None:
    with pytest.raises(BadHardware):
        Sources.of("model", accelerator_name="cpu", tables=TableChoice(**{name: "perf"}))
    other = {"operator_tables": "operators", "layer_times": "perf", "step_times": "steps.csv"}[name]
    with pytest.raises((BadHardware, BadTable)):
        Sources.of("model", accelerator_name="B200", tables=TableChoice(**{name: other})).step_model(
            POOL.model_copy(update={"accelerator": "B200"})
        )


@pytest.mark.parametrize(
    "change",
    [
        {"pipeline_parallel_size": 2},
        {"enable_expert_parallel": True},
        {"weight_dtype": "fp8"},
        {"kv_cache_dtype": "fp8"},
    ],
)
def test_whole_steps_hold_for_the_sharding_that_was_measured_alone(here: Path, change: dict[str, Any]) -> None:
    found = sources(step_times="steps.csv")
    found.step_model(POOL)
    with pytest.raises(BadTable):
        found.step_model(POOL.model_copy(update=change))


@pytest.mark.parametrize(
    ("meta", "change", "where", "allowed"),
    [
        ({}, {"weight_dtype": "fp8"}, "pool.weight_dtype", "bf16, which was profiled"),
        ({}, {"kv_cache_dtype": "fp8"}, "pool.kv_cache_dtype", "bf16, which was profiled"),
        ({"variant": "bf16-kvfp8"}, {}, "pool.kv_cache_dtype", "fp8, which was profiled"),
        ({"variant": "fp8-kvfp8"}, {"kv_cache_dtype": "fp8"}, "pool.weight_dtype", "fp8, which was profiled"),
        ({"variant": "own", "engine_effective": {"dtype": "fp8"}}, {}, "pool.weight_dtype", "fp8, which was profiled"),
        ({"hardware": "Abacus 9"}, {}, "pool.accelerator", "Abacus 9, which is not in the catalog"),
        ({}, {"num_kv_blocks": 10**9}, "num_kv_blocks", "at most"),
    ],
)
def test_layer_times_hold_for_what_was_profiled_and_fits(
    tmp_path: Path, meta: dict[str, Any], change: dict[str, Any], where: str, allowed: str
) -> None:
    source = LayerTimes(write_profile(tmp_path, **meta))
    with pytest.raises(BadHardware) as refused:
        source.modeled(PROFILED, PROFILED_POOL.model_copy(update=change))
    assert refused.value.where == where
    assert refused.value.allowed.startswith(allowed)


@pytest.mark.parametrize(("variant", "asked"), [("bf16", "fp16"), ("fp16", "bf16")])
def test_layer_times_of_either_half_precision_hold_for_both(tmp_path: Path, variant: str, asked: str) -> None:
    source = LayerTimes(write_profile(tmp_path, variant=variant))
    found = source.modeled(PROFILED, PROFILED_POOL.model_copy(update={"weight_dtype": asked}))
    assert not any("precision" in note for note in found.not_modeled)


def test_layer_times_of_an_unknown_precision_are_taken_as_of_the_pools_and_said(tmp_path: Path) -> None:
    source = LayerTimes(write_profile(tmp_path, variant="my_experiment"))
    for dtype in ("bf16", "fp8"):
        pool = PROFILED_POOL.model_copy(update={"weight_dtype": dtype, "kv_cache_dtype": dtype})
        notes = source.modeled(PROFILED, pool).not_modeled
        assert any("precision of variant my_experiment is not known" in note for note in notes)


def test_adapters_and_blocks_on_the_host_are_the_data_sheets_where_tables_know_nothing_of_them(here: Path) -> None:
    pool = POOL.model_copy(update={"max_loras": 4, "host_kv_blocks": 100})
    sheet = Sources.of("model", accelerator_name="H100").step_model(pool).tables
    for name, place in (("operator_tables", "operators"), ("step_times", "steps.csv")):
        found = sources(**{name: place}).step_model(pool).tables
        assert (found.adapters, found.block_copy_s) == (sheet.adapters, sheet.block_copy_s)
    assert sheet.adapters.token_s > 0 < sheet.block_copy_s


def test_the_digest_follows_the_content_and_not_the_place(here: Path, tmp_path: Path) -> None:
    copy = tmp_path / "steps.csv"
    copy.write_bytes(Path("steps.csv").read_bytes())
    assert sources(step_times=str(copy)).digest == sources(step_times="steps.csv").digest
    copy.write_text(copy.read_text().replace("made up", "made over"))
    assert sources(step_times=str(copy)).digest != sources(step_times="steps.csv").digest


def test_the_plain_default_takes_as_many_devices_as_hold_the_model(here: Path) -> None:
    large = {**CONFIG, "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
             "intermediate_size": 28672}  # fmt: skip
    Path("large").mkdir()
    Path("large/config.json").write_text(json.dumps(large))
    trace = read("log.csv")
    for name, ranks in (("H200", 2), ("H100", 2), ("A100", 2), ("L40S", 4), ("A10G", 8)):
        pool = Sources.of("large", accelerator_name=name).plain_default(trace, cores=8).pool
        assert (pool.accelerator, pool.tensor_parallel_size) == (name, ranks)
        assert pool.num_kv_blocks * pool.block_size >= pool.max_model_len
    Path("large/config.json").write_text(json.dumps({**large, "num_hidden_layers": 240}))
    with pytest.raises(BadHardware, match="memory of 8 x L4"):
        Sources.of("large", accelerator_name="L4").plain_default(trace, cores=8)


def test_a_project_names_its_tables_once(here: Path) -> None:
    from paretune.project import defaults, load_project

    Path("paretune.yaml").write_text("accelerator: H100\nmodel: model\noperator_tables: operators\nprofile: p.json\n")
    try:
        project = load_project()
        assert project.tables == TableChoice(operator_tables="operators")
        for command in ("tune", "simulate", "explain", "calibrate"):
            assert defaults(project)[command]["operator_tables"] == "operators"
        by_project = paretune("simulate", "log.csv", "--spec", "spec.yaml", "--json").json["data"]["summary"]
    finally:
        Path("paretune.yaml").unlink()
    assert by_project["values"]["tpot"]["p50"] == p50("--operator-tables", "operators")
