"""Step tables from measured operators: sums of the operators of a step, above the bound of the whole step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from paretune.profiler.hardware import BadHardware, accelerator
from paretune.profiler.importers import read_tables
from paretune.profiler.operator_source import OperatorSource
from paretune.profiler.operators import Composition
from paretune.profiler.roofline import step_bound_s
from paretune.profiler.step_time import composed_time_s
from paretune.profiler.tables import step_tables
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.spec import Pool

from .operator_table_examples import write_operators

LLAMA_8B = ModelShape.from_config(
    {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
     "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "rms_norm_eps": 1e-5,
     "max_position_embeddings": 131072}
)  # fmt: skip
POOL = Pool(
    accelerator="H100", weight_dtype="bf16", kv_cache_dtype="bf16", max_num_seqs=64, max_num_batched_tokens=4096,
    num_kv_blocks=4096,
)  # fmt: skip
STEPS = [
    Composition(1, 1, 1, 1000.0, 0.0),
    Composition(64, 64, 64, 64 * 2000.0, 0.0),
    Composition(4096, 2, 2, 0.0, 2048 * 2049.0),
    Composition(2048 + 32, 33, 33, 32 * 500.0, 1024 * 2049.0),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> OperatorSource:
    """Every operator at twice its bound, and 5 µs."""
    return OperatorSource(read_tables(write_operators(tmp_path_factory.mktemp("tables")), "H100", "vllm"))


@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_above_its_bound_and_near_the_sum_of_its_operators(source: OperatorSource, step: Composition) -> None:
    found = step_tables(source, LLAMA_8B, POOL)
    seconds = composed_time_s(found.tables, *step)
    bound = sum(step_bound_s(accelerator("H100"), LLAMA_8B, step, POOL).values())
    launches = 32 * 5 * 5e-6 + 32 * 4 * 3e-6 + source.host.step_s
    assert seconds > 1.5 * bound
    assert seconds < 2.5 * bound + 2 * launches


def test_it_is_said_to_be_inferred_from_which_versions(source: OperatorSource) -> None:
    found = step_tables(source, LLAMA_8B, POOL)
    assert not found.measured
    assert "h100_sxm with vllm 1.0" in found.not_modeled[0]
    assert (np.diff(found.tables.tokens_s[1:]) > -1e-9).all()


@pytest.mark.parametrize("change", [{"accelerator": "B200"}, {"weight_dtype": "int4"}, {"kv_cache_dtype": "int8"}])
def test_what_the_tables_do_not_have_is_refused(source: OperatorSource, change: dict[str, str]) -> None:
    with pytest.raises(BadHardware):
        step_tables(source, LLAMA_8B, POOL.model_copy(update=change))


def test_models_that_are_not_laid_out_are_refused(source: OperatorSource) -> None:
    with pytest.raises(BadHardware, match="sliding window"):
        step_tables(source, replace(LLAMA_8B, sliding_window=4096), POOL)
