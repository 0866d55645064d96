"""vLLM on CPU: run_vllm_cpu.py MODEL_DIR DTYPE"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0-1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from workload import report


def main() -> None:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=sys.argv[1],
        dtype=sys.argv[2],
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=2048,
        enforce_eager=True,
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        asked = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        done = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in done]

    report("vllm-cpu", version("vllm-cpu"), generate)


if __name__ == "__main__":
    main()
