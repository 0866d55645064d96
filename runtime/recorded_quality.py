"""What each precision costs in quality on the models that ship with the package, as benchmarks/quality.py measured it.

No torch: whoever weighs precisions against each other reads this without running a model. On other models the loss is
another; theirs is found with quality.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD = Path(__file__).resolve().parent / "small_model" / "quality.json"


@dataclass(frozen=True)
class Quality:
    """A precision against fp32 weights and KV cache on the same tokens.

    num_tokens            predicted
    perplexity            exp of the mean negative log-probability of the next token
    reference_perplexity  that of fp32
    kl_nats               mean over tokens of KL(fp32 || this precision)
    top1_agreement        share of tokens whose most probable successor is the same
    """

    weight_dtype: str
    kv_cache_dtype: str
    num_tokens: int
    perplexity: float
    reference_perplexity: float
    kl_nats: float
    top1_agreement: float

    @property
    def perplexity_increase(self) -> float:
        """Relative to fp32: 0.01 is one percent more."""
        return self.perplexity / self.reference_perplexity - 1


def recorded_quality(model: str, weight_dtype: str, kv_cache_dtype: str = "bf16") -> Quality | None:
    """What was measured of a shipped model ("paretune/small" or its ternary twin), or None: nothing was."""
    for row in read_record()["qualities"]:
        if (row["model"], row["weight_dtype"], row["kv_cache_dtype"]) == (model, weight_dtype, kv_cache_dtype):
            return Quality(**{name: value for name, value in row.items() if name != "model"})
    return None


def read_record() -> dict[str, Any]:
    """The whole record: `qualities`, and the `machine` with date and command."""
    record: dict[str, Any] = json.loads(RECORD.read_bytes())
    return record
