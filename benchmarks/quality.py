"""What each precision costs in quality on the small model: perplexity, KL to fp32, top-1 agreement.

    python benchmarks/quality.py [--out runtime/small_model/quality.json] [--tokens 8192]

Text: the held-out part of the small model's corpus, in windows of 512 tokens. The KV cache is fp32 while the weights
are compared, and bf16 as it is by default. Ternary is measured on the ternary twin, against that twin's own weights in
fp32. The last line is one JSON object with the bars; --out is what runtime/recorded_quality.py reads.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from bars import Bar, finish, machine
from paretune.kernels.weight_formats import WEIGHT_FORMATS
from paretune.runtime.model_shape import resolve_model
from paretune.runtime.quality import heldout_tokens, measure_quality
from paretune.runtime.small_model import MODEL_DIR
from paretune.runtime.spec import SMALL_MODEL, SMALL_TERNARY_MODEL
from paretune.traces.whole_file import write_whole

# Most KL to fp32 weights, nats a token: well above what was found on 2026-11-26, well below what would be a defect.
MOST_KL = {"bf16": 1e-3, "fp16": 1e-3, "fp8": 1e-2, "int8": 1e-2, "int4": 0.05, "nvfp4": 0.05, "mxfp4": 0.05}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    token_ids = heldout_tokens(MODEL_DIR)[: chosen.tokens]
    rows, bars = [], []
    cases = [(SMALL_MODEL, dtype) for dtype in WEIGHT_FORMATS if dtype != "ternary"] + [
        (SMALL_TERNARY_MODEL, "ternary")
    ]
    for model, dtype in cases:
        for kv_dtype in ("fp32", "bf16"):
            found = measure_quality(
                resolve_model(model), dtype, kv_dtype, token_ids=token_ids, num_threads=chosen.threads
            )
            rows.append({"model": model, **asdict(found)})
            line = (
                f"{model} {dtype}/{kv_dtype}: perplexity {found.perplexity:.2f}, fp32 {found.reference_perplexity:.2f}"
            )
            print(f"{line}; KL {found.kl_nats:.5f} nats; top-1 {found.top1_agreement:.2%}", flush=True)
            if kv_dtype == "fp32" and dtype in MOST_KL:
                bars.append(Bar(f"KL of {dtype} weights to fp32, nats", found.kl_nats, MOST_KL[dtype], at_least=False))
    if chosen.out:
        rounded = [
            {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}
            for row in rows
        ]
        write_whole(chosen.out, json.dumps({"machine": machine(), "qualities": rounded}, indent=1) + "\n")
    finish(bars, rows)


if __name__ == "__main__":
    main()
