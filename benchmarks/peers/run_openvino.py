"""OpenVINO GenAI's continuous batching: run_openvino.py EXPORTED_DIR PRECISION_HINT"""

from __future__ import annotations

import sys
from importlib.metadata import version

import numpy as np
import openvino
import openvino_genai

from workload import report


def main() -> None:
    limits = openvino_genai.SchedulerConfig()
    limits.cache_size, limits.max_num_seqs, limits.max_num_batched_tokens = 1, 16, 2048
    limits.enable_prefix_caching = False
    settings = {"INFERENCE_NUM_THREADS": 2, "INFERENCE_PRECISION_HINT": sys.argv[2]}
    pipeline = openvino_genai.ContinuousBatchingPipeline(sys.argv[1], limits, "CPU", settings)

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        asked = openvino_genai.GenerationConfig()
        asked.max_new_tokens = asked.min_new_tokens = new_tokens
        asked.ignore_eos, asked.do_sample, asked.eos_token_id = True, False, -1
        inputs = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        return [list(one.m_generation_ids[0]) for one in pipeline.generate(inputs, [asked] * len(prompts))]

    report("openvino-genai", version("openvino-genai"), generate)


main()
