"""onnxruntime-genai: run_onnxruntime.py EXPORTED_DIR"""

from __future__ import annotations

import sys
from importlib.metadata import version

import numpy as np
import onnxruntime_genai

from workload import report


def main() -> None:
    model = onnxruntime_genai.Model(sys.argv[1])

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        params = onnxruntime_genai.GeneratorParams(model)
        length = len(prompts[0]) + new_tokens
        params.set_search_options(do_sample=False, max_length=length, min_length=length, batch_size=len(prompts))
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        out: list[list[int]] = [[] for _ in prompts]
        while len(out[0]) < new_tokens:
            generator.generate_next_token()
            for tokens, token in zip(out, generator.get_next_tokens()):
                tokens.append(int(token))
        return out

    report("onnxruntime-genai", version("onnxruntime-genai"), generate)


main()
