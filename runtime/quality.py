"""What a precision costs in quality: perplexity, and how far the answers of a rounded model are from those of fp32.

Measured through the engine that serves, so that its rounding of weights, activations and KV cache is all in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from .engine import Engine, Request
from .model_shape import BadModel, ModelShape
from .recorded_quality import Quality
from .sampler import SamplingParams
from .small_model import HELDOUT_TEXT
from .spec import Deployment, Pool

CONTEXT = 512
MAX_TOKENS = 8192
_BLOCK_SIZE = 16


def measure_quality(
    model_dir: Path,
    weight_dtype: str,
    kv_cache_dtype: str = "bf16",
    *,
    token_ids: NDArray[np.integer] | None = None,
    context: int = CONTEXT,
    num_threads: int = 1,
) -> Quality:
    """Run a text through the model in this precision and in fp32.

    Args:
        token_ids: (n,) n >= 2; left out: the first MAX_TOKENS of `heldout_tokens`.
        context: tokens of the windows the text is cut into; the first token of each is not predicted.
        num_threads: of torch and the operators, in this process, from here on.
    Raises: BadSpec, BadModel: as the engine does.
    """
    token_ids = heldout_tokens(model_dir)[:MAX_TOKENS] if token_ids is None else token_ids
    loss = reference_loss = kl = agreed = 0.0
    with (
        _engine(model_dir, "fp32", "fp32", context, num_threads) as reference,
        _engine(model_dir, weight_dtype, kv_cache_dtype, context, num_threads) as rounded,
    ):
        num_tokens = 0
        for window in _windows(token_ids, context):
            expected, found = _log_probabilities(reference, window), _log_probabilities(rounded, window)
            reference_loss += _loss(expected, window)
            loss += _loss(found, window)
            kl += float((expected.exp() * (expected - found)).sum())
            agreed += float((expected.argmax(dim=1) == found.argmax(dim=1)).sum())
            num_tokens += len(window) - 1
    return Quality(
        weight_dtype=weight_dtype,
        kv_cache_dtype=kv_cache_dtype,
        num_tokens=num_tokens,
        perplexity=math.exp(loss / num_tokens),
        reference_perplexity=math.exp(reference_loss / num_tokens),
        kl_nats=kl / num_tokens,
        top1_agreement=agreed / num_tokens,
    )


def perplexity(
    model_dir: Path,
    weight_dtype: str,
    kv_cache_dtype: str = "bf16",
    *,
    token_ids: NDArray[np.integer] | None = None,
    context: int = CONTEXT,
    num_threads: int = 1,
) -> float:
    """exp of the mean negative log-probability of the next token; arguments as in `measure_quality`."""
    token_ids = heldout_tokens(model_dir)[:MAX_TOKENS] if token_ids is None else token_ids
    loss = 0.0
    num_tokens = 0
    with _engine(model_dir, weight_dtype, kv_cache_dtype, context, num_threads) as engine:
        for window in _windows(token_ids, context):
            loss += _loss(_log_probabilities(engine, window), window)
            num_tokens += len(window) - 1
    return math.exp(loss / num_tokens)


def heldout_tokens(model_dir: Path, text: Path = HELDOUT_TEXT) -> NDArray[np.int32]:
    """A text in the model's own tokens; by default the part of the small model's corpus that it was not trained on.

    Raises: BadModel: the model has no tokenizer.json.
    """
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise BadModel(str(path), "no such file", "the model's tokenizer", "give token_ids instead")
    return np.array(Tokenizer.from_file(str(path)).encode(text.read_text(encoding="utf-8")).ids, np.int32)


def _engine(model_dir: Path, weight_dtype: str, kv_cache_dtype: str, context: int, num_threads: int) -> Engine:
    positions = ModelShape.load(model_dir).max_position_embeddings
    fields = {
        "num_threads": num_threads,
        "weight_dtype": weight_dtype,
        "kv_cache_dtype": kv_cache_dtype,
        "max_model_len": min(context + 1, positions),
        "max_num_seqs": 1,
        "max_num_batched_tokens": context,
        "block_size": _BLOCK_SIZE,
        "num_kv_blocks": context // _BLOCK_SIZE + 2,
        "enable_prefix_caching": False,
    }
    deployment = Deployment(model=str(model_dir), pools=(Pool.model_validate(fields),))
    return Engine(deployment, model_dir, keep_logits=True)


def _windows(token_ids: NDArray[np.integer], context: int) -> Iterator[NDArray[np.int32]]:
    for start in range(0, len(token_ids) - 1, context):
        window = token_ids[start : start + context].astype(np.int32)
        if len(window) > 1:
            yield window


def _log_probabilities(engine: Engine, window: NDArray[np.int32]) -> Tensor:
    """(n - 1, vocab_size): what the model says about tokens 1 .. n - 1 of a window."""
    engine.add(Request(0, window, SamplingParams(max_tokens=1, temperature=0)))
    while engine.has_work:
        engine.step()
    logits = torch.cat([kept.logits for kept in engine.kept_logits])[:-1]
    engine.kept_logits.clear()
    return torch.log_softmax(logits, dim=1)


def _loss(log_probabilities: Tensor, window: NDArray[np.int32]) -> float:
    successors = torch.from_numpy(window[1:]).long()
    return -float(log_probabilities.gather(1, successors[:, None]).double().sum())
