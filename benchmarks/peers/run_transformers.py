"""transformers' generate: run_transformers.py MODEL_DIR DTYPE"""

from __future__ import annotations

import sys
from importlib.metadata import version

import torch
from transformers import AutoModelForCausalLM

from workload import report


def main() -> None:
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2])).eval()

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        tokens = torch.tensor(prompts)
        limits = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        with torch.inference_mode():
            whole = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False, pad_token_id=0, **limits
            )
        return whole[:, tokens.shape[1] :].tolist()

    report("transformers", version("transformers"), generate)


main()
