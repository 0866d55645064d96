"""paretune's own engine, in this process: run_paretune.py MODEL_DIR WEIGHT_DTYPE"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import paretune
from paretune.runtime.engine import Engine, Request, SamplingParams
from paretune.runtime.memory import memory_need
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.spec import Deployment, Pool
from workload import report, resident_mb


def main() -> None:
    imported_mb = resident_mb()
    model, weight_dtype = Path(sys.argv[1]), sys.argv[2]
    pool = Pool(
        num_threads=2,
        weight_dtype=weight_dtype,
        kv_cache_dtype="bf16",
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=512,
        num_kv_blocks=256,
        enable_prefix_caching=False,
    )
    engine = Engine(Deployment(model=str(model), pools=(pool,)), model)

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        asked = SamplingParams(max_tokens=new_tokens, min_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        out: list[list[int]] = [[] for _ in prompts]
        for number, prompt in enumerate(prompts):
            engine.add(Request(number, np.array(prompt, np.int32), asked))
        while engine.has_work:
            for output in engine.step():
                out[output.request_id] += output.token_ids
        return out

    need = memory_need(ModelShape.load(model), pool)
    held_mb = (need.weight_bytes + need.kv_cache_bytes) / 2**20
    report("paretune", paretune.__version__, generate, imported_mb=imported_mb, weights_and_kv_mb=held_mb)
    engine.close()


if __name__ == "__main__":
    main()
