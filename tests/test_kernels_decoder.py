"""A decoder's layers in one C++ call give the numbers of the operators one by one (held to transformers elsewhere)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from paretune.kernels.cpu.build import load
from paretune.kernels.tiles import Tile, TileTable
from paretune.runtime.engine import Engine, Request
from paretune.runtime.random_model import write_random_model
from paretune.runtime.sampler import SamplingParams
from paretune.runtime.spec import Deployment, Pool

pytestmark = pytest.mark.skipif(load() is None, reason="no C++ compiler: `paretune doctor` says what to do")

FAMILIES = ("llama", "qwen2", "qwen3")
PRECISIONS = [("fp32", "fp32"), ("bf16", "bf16"), ("int8", "int8"), ("int4", "fp8"), ("fp8", "bf16"), ("mxfp4", "fp32")]
POOL = Pool(
    max_model_len=400, max_num_seqs=6, max_num_batched_tokens=128, block_size=8, num_kv_blocks=400,
    enable_prefix_caching=False, num_threads=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family in FAMILIES:
        made[family] = write_random_model(
            tmp_path_factory.mktemp(family) / "model", family=family, vocab_size=301, hidden_size=64,
            intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
            max_position_embeddings=512, tie_word_embeddings=family == "qwen2",
        )  # fmt: skip
    return made


def logits(engine: Engine) -> list[torch.Tensor]:
    """Of every token of prompts of 1 to 330 tokens, the first ones of which decode beside the others' prompts."""
    engine.kept_logits.clear()
    rng = np.random.default_rng(3)
    for number, tokens in enumerate((5, 1, 330, 40, 256, 17)):
        sampling = SamplingParams(max_tokens=4 + number, temperature=0, ignore_eos=True)
        engine.add(Request(number, rng.integers(0, 301, tokens).astype(np.int32), sampling))
        engine.step()
    while engine.has_work:
        engine.step()
    return [kept.logits for kept in engine.kept_logits]


def one_by_one(engine: Engine) -> None:
    assert engine._rank._transformer._decoder is not None
    engine._rank._transformer._decoder = None


@pytest.mark.parametrize(("weights", "cache"), PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_is_the_operators_one_by_one(models: dict[str, Path], family: str, weights: str, cache: str) -> None:
    pool = POOL.model_copy(update={"weight_dtype": weights, "kv_cache_dtype": cache})
    with Engine(Deployment(pools=(pool,)), models[family], keep_logits=True) as engine:
        together = logits(engine)
        one_by_one(engine)
        apart = logits(engine)
    assert len(together) == len(apart) > 20
    for one, other in zip(together, apart):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)


def test_of_more_rows_the_mlp_takes_some_at_a_time(models: dict[str, Path]) -> None:
    """Then a row can stand in a tile of another height, whose compiled sums may differ in the last bit."""
    pool = POOL.model_copy(update={"weight_dtype": "fp32", "kv_cache_dtype": "fp32", "max_num_batched_tokens": 512})
    with Engine(Deployment(pools=(pool,)), models["qwen3"], keep_logits=True) as engine:
        together = logits(engine)
        one_by_one(engine)
        for one, other in zip(together, logits(engine), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.abs().max()))


def table(*backends: str) -> TileTable:
    """The backend of 1, 2, 4, ... rows."""
    return TileTable(tuple((("linear", "fp32", 1 << at), Tile("linear", each)) for at, each in enumerate(backends)))


def test_steps_that_another_library_multiplies_go_operator_by_operator(models: dict[str, Path]) -> None:
    tiles = table("cpp", "cpp", "cpp", "cpp", "cpp", "cpp", "torch", "torch", "torch")
    pool = POOL.model_copy(update={"weight_dtype": "fp32", "kv_cache_dtype": "fp32", "tiles": tiles})
    with Engine(Deployment(pools=(pool,)), models["llama"], keep_logits=True) as engine:
        decoder = engine._rank._transformer._decoder
        assert decoder is not None
        assert decoder.most_tokens == 32
        mixed = logits(engine)
        one_by_one(engine)
        for one, other in zip(mixed, logits(engine), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_a_torch_tile_for_one_row_leaves_no_step_for_one_call(models: dict[str, Path]) -> None:
    tiles = table("torch", "cpp", "cpp")
    pool = POOL.model_copy(update={"weight_dtype": "fp32", "tiles": tiles})
    with Engine(Deployment(pools=(pool,)), models["llama"], keep_logits=True) as engine:
        decoder = engine._rank._transformer._decoder
        assert decoder is not None
        assert decoder.most_tokens == 0
        assert all(torch.isfinite(each).all() for each in logits(engine))


def test_new_tiles_reach_the_one_call(models: dict[str, Path]) -> None:
    tiles = TileTable(
        tuple((("linear", "int8", 1 << at), Tile("linear", "cpp", (("row_tile", 2),))) for at in range(9))
    )
    pool = POOL.model_copy(update={"weight_dtype": "int8"})
    with Engine(Deployment(pools=(pool,)), models["llama"], keep_logits=True) as engine:
        before = logits(engine)
        engine.change(pool.model_copy(update={"tiles": tiles}))
        decoder = engine._rank._transformer._decoder
        assert decoder is not None
        assert decoder._tiles[3, 0] == 2
        for one, other in zip(before, logits(engine), strict=True):
            assert torch.equal(one, other)  # int8 sums are exact however they are cut
