"""However a replica is sharded, it answers as Hugging Face transformers does, and each rank holds what was reckoned."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.auto import AutoModelForCausalLM

from paretune.kernels.tiles import TileTable
from paretune.runtime.context_part import divided
from paretune.runtime.engine import Engine, Request
from paretune.runtime.memory import memory_need, rank_weight_bytes
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.parallel import Layout, shares
from paretune.runtime.runnable import check_runnable
from paretune.runtime.sampler import SamplingParams
from paretune.runtime.spec import BadSpec, Deployment, Pool
from paretune.runtime.weights import load_weights

CONFIG = LlamaConfig(
    vocab_size=199,  # odd: the ranks' parts of the vocabulary differ
    hidden_size=48,
    intermediate_size=82,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=1,  # fewer than ranks: each rank holds a copy
    head_dim=16,
    max_position_embeddings=512,
    attention_bias=True,
    mlp_bias=True,
    initializer_range=0.25,  # far from uniform answers: greedy tokens do not hang on the last bit
    eos_token_id=None,
    bos_token_id=None,
    pad_token_id=None,
)
# every rank's part fills whole panels of the packed layout, whose padding is not reckoned
ROUND_CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    attention_bias=True,
    mlp_bias=True,
)
POOL = {
    "weight_dtype": "fp32", "kv_cache_dtype": "fp32", "max_model_len": 400, "max_num_seqs": 4,
    "max_num_batched_tokens": 256, "block_size": 8, "num_kv_blocks": 120,
}  # fmt: skip
PROMPT_LENGTHS = (300, 5, 61, 16, 3)
MAX_TOKENS = 7


@pytest.fixture(scope="module")
def round_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("round")
    AutoModelForCausalLM.from_config(ROUND_CONFIG).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(1)
    CONFIG._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(CONFIG).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder, model


def deployment(**changes: object) -> Deployment:
    return Deployment(pools=(Pool.model_validate({**POOL, **changes}),))


def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, CONFIG.vocab_size, length).astype(np.int32) for length in PROMPT_LENGTHS]


def answers(engine: Engine) -> tuple[dict[int, list[int]], Mapping[int, Tensor]]:
    """Greedy tokens of each prompt, and the logits of every token but the last, which nobody computes."""
    for request_id, prompt in enumerate(prompts()):
        engine.add(Request(request_id, prompt, SamplingParams(max_tokens=MAX_TOKENS, temperature=0)))
    tokens: dict[int, list[int]] = {request_id: [] for request_id in range(len(PROMPT_LENGTHS))}
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    logits = {
        request_id: torch.full((length + MAX_TOKENS - 1, CONFIG.vocab_size), torch.nan)
        for request_id, length in enumerate(PROMPT_LENGTHS)
    }
    for kept in engine.kept_logits:
        logits[kept.request_id][kept.start : kept.start + len(kept.logits)] = kept.logits
    return tokens, logits


LAYOUTS: list[dict[str, object]] = [
    {"tensor_parallel_size": 2},
    {"pipeline_parallel_size": 3},
    {"pipeline_parallel_size": 2, "tensor_parallel_size": 2},
    {"context_parallel_size": 2},
    {"context_parallel_size": 2, "pipeline_parallel_size": 2},
    {"context_parallel_size": 2, "tensor_parallel_size": 2, "max_num_batched_tokens": 100, "num_kv_blocks": 60},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_sharded_replica_answers_like_transformers(
    layout: dict[str, object], model: tuple[Path, torch.nn.Module]
) -> None:
    folder, reference = model
    with Engine(deployment(**layout), folder, keep_logits=True) as engine:
        tokens, logits = answers(engine)
        assert engine.stats().kv_blocks_used == 0
    for request_id, prompt in enumerate(prompts()):
        ids = torch.tensor([[*prompt.tolist(), *tokens[request_id]]])
        with torch.no_grad():
            expected = reference(ids).logits[0]
        torch.testing.assert_close(logits[request_id], expected[:-1], atol=1e-4, rtol=1e-4)
        assert tokens[request_id] == expected[len(prompt) - 1 : -1].argmax(dim=1).tolist()


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 1, 4), (1, 1, 8), (3, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("weight_dtype", ["fp32", "bf16", "int8"])
def test_a_rank_holds_the_bytes_that_were_reckoned(
    layout: tuple[int, int, int], weight_dtype: str, round_model_dir: Path
) -> None:
    shape = ModelShape.load(round_model_dir)
    for share in shares(shape, Layout(*layout)):
        weights = load_weights(shape, round_model_dir, share, weight_dtype, TileTable())
        held = [weights.embedding, weights.norm, weights.head]
        for layer in weights.layers:
            held += [layer.input_norm, layer.qkv, layer.o, layer.post_norm, layer.gate_up, layer.down]
        assert sum(part.nbytes for part in held if part is not None) == rank_weight_bytes(shape, share, weight_dtype)


def test_the_stages_of_a_pipeline_are_the_whole_model_once(round_model_dir: Path) -> None:
    shape = ModelShape.load(round_model_dir)
    stages = shares(shape, Layout(stages=3))
    assert [layer for share in stages for layer in share.layers] == list(range(shape.num_layers))
    whole = memory_need(shape, Pool(**POOL))
    cut = memory_need(shape, Pool(**POOL, pipeline_parallel_size=3))
    assert cut.weight_bytes - whole.weight_bytes == 2 * 4 * shape.hidden_size  # the last norm is on every stage
    assert cut.kv_cache_bytes == whole.kv_cache_bytes


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tensor_parallel_size": 3}, "tensor_parallel_size"),
        ({"tensor_parallel_size": 16}, "tensor_parallel_size"),
        ({"pipeline_parallel_size": 4}, "pipeline_parallel_size"),
    ],
)
def test_a_layout_that_the_model_does_not_allow_is_refused_by_its_field(
    changes: dict[str, object], field: str, model: tuple[Path, torch.nn.Module]
) -> None:
    with pytest.raises(BadSpec) as refused:
        check_runnable(deployment(**changes), ModelShape.load(model[0]))
    assert refused.value.where == f"pools.0.{field}"


@given(counts=st.lists(st.integers(1, 300), min_size=1, max_size=12), parts=st.integers(1, 5))
def test_every_token_is_in_one_part_and_the_parts_of_a_long_prompt_cost_the_same(counts: list[int], parts: int) -> None:
    found = divided(np.array(counts), parts)
    places = [(row, token) for own in found for row, first, last in own for token in range(first, last)]
    assert sorted(places) == [(row, token) for row, count in enumerate(counts) for token in range(count)]
    assert all(first < last for own in found for _, first, last in own)
    for row, count in enumerate(counts):
        if count >= 2 * parts:
            pairs = [sum(t + 1 for r, a, b in own if r == row for t in range(a, b)) for own in found]
            # pieces whose lengths differ by one token move at most one row of the triangle each
            assert max(pairs) - min(pairs) <= 2 * count
