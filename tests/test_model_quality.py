"""What a precision costs on the shipped model, measured through the engine."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from paretune.runtime.model_shape import BadModel
from paretune.runtime.quality import heldout_tokens, measure_quality, perplexity
from paretune.runtime.random_model import write_random_model
from paretune.runtime.recorded_quality import recorded_quality
from paretune.runtime.runnable import WEIGHT_DTYPES
from paretune.runtime.small_model import MODEL_DIR

CONTEXT = 128


@pytest.fixture(scope="module")
def token_ids() -> np.ndarray:
    return heldout_tokens(MODEL_DIR)[: 8 * CONTEXT]


def test_perplexity_is_that_of_transformers(token_ids: np.ndarray) -> None:
    model = LlamaForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32, attn_implementation="eager").eval()
    windows = torch.from_numpy(token_ids).long().view(8, CONTEXT)
    with torch.no_grad():
        expected = math.exp(model(windows, labels=windows).loss)
    assert perplexity(MODEL_DIR, "fp32", "fp32", token_ids=token_ids, context=CONTEXT) == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize(
    ("weight_dtype", "most_increase", "most_kl", "least_agreement"),
    [
        ("bf16", 0.005, 1e-3, 0.97),
        ("int8", 0.02, 1e-2, 0.93),
        ("int4", 0.05, 0.03, 0.85),
        ("fp8", 0.02, 1e-2, 0.93),
        ("nvfp4", 0.05, 0.03, 0.85),
        ("mxfp4", 0.05, 0.04, 0.82),
    ],
)
def test_rounding_costs_little(
    token_ids: np.ndarray, weight_dtype: str, most_increase: float, most_kl: float, least_agreement: float
) -> None:
    found = measure_quality(MODEL_DIR, weight_dtype, token_ids=token_ids, context=CONTEXT)
    assert found.num_tokens == 8 * (CONTEXT - 1)
    assert abs(found.perplexity_increase) < most_increase
    assert 0 < found.kl_nats < most_kl
    # where the processor multiplies in fp32, bf16 weights may choose every token as fp32 ones do: the KL differs
    assert least_agreement < found.top1_agreement <= 1


@pytest.mark.parametrize(
    ("kv_cache_dtype", "most_increase", "most_kl", "least_agreement"),
    [("bf16", 0.002, 1e-4, 0.99), ("int8", 0.005, 1e-3, 0.97), ("fp8", 0.02, 5e-3, 0.93)],
)
def test_a_rounded_kv_cache_costs_little(
    token_ids: np.ndarray, kv_cache_dtype: str, most_increase: float, most_kl: float, least_agreement: float
) -> None:
    found = measure_quality(MODEL_DIR, "fp32", kv_cache_dtype, token_ids=token_ids, context=CONTEXT)
    assert abs(found.perplexity_increase) < most_increase
    assert 0 < found.kl_nats < most_kl
    assert least_agreement < found.top1_agreement


def test_the_quality_of_every_precision_is_on_record() -> None:
    for weight_dtype in WEIGHT_DTYPES:
        model = "paretune/small-ternary" if weight_dtype == "ternary" else "paretune/small"
        found = recorded_quality(model, weight_dtype)
        assert found is not None
        assert found.weight_dtype == weight_dtype
        assert found.num_tokens > 8000
        assert found.perplexity_increase < 0.05
    assert recorded_quality("paretune/small", "ternary") is None
    fewer_bits = [recorded_quality("paretune/small", name) for name in ("bf16", "int8", "int4")]
    assert sorted(fewer_bits, key=lambda found: found.kl_nats if found else math.inf) == fewer_bits


def test_the_record_says_what_is_measured_here() -> None:
    recorded = recorded_quality("paretune/small", "int4", "fp32")
    assert recorded is not None
    found = measure_quality(MODEL_DIR, "int4", "fp32", token_ids=heldout_tokens(MODEL_DIR)[:2048])
    assert found.kl_nats == pytest.approx(recorded.kl_nats, rel=0.25)
    assert found.top1_agreement == pytest.approx(recorded.top1_agreement, abs=0.02)


def test_fp32_is_its_own_reference(token_ids: np.ndarray) -> None:
    found = measure_quality(MODEL_DIR, "fp32", "fp32", token_ids=token_ids, context=CONTEXT)
    assert found.perplexity == found.reference_perplexity
    assert found.kl_nats == 0
    assert found.top1_agreement == 1


def test_a_text_of_other_lengths_than_the_window_is_counted_whole(token_ids: np.ndarray) -> None:
    assert measure_quality(MODEL_DIR, "bf16", token_ids=token_ids[:300], context=CONTEXT).num_tokens == 127 + 127 + 43


def test_a_model_without_a_tokenizer_needs_token_ids(tmp_path) -> None:
    folder = write_random_model(
        tmp_path / "m", vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    with pytest.raises(BadModel, match="tokenizer"):
        perplexity(folder, "bf16")
    assert perplexity(folder, "bf16", token_ids=np.arange(20), context=16) == pytest.approx(20, rel=0.2)
