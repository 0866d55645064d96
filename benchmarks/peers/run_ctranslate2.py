"""CTranslate2: run_ctranslate2.py CONVERTED_DIR COMPUTE_TYPE"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import ctranslate2

from workload import report


def main() -> None:
    folder, compute_type = Path(sys.argv[1]), sys.argv[2]
    generator = ctranslate2.Generator(
        str(folder), device="cpu", compute_type=compute_type, intra_threads=2, inter_threads=1
    )
    words = json.loads((folder / "vocabulary.json").read_text())

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        done = generator.generate_batch(
            [[words[token] for token in prompt] for prompt in prompts],
            max_length=new_tokens,
            min_length=new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
            max_batch_size=16,
        )
        return [one.sequences_ids[0] for one in done]

    report("ctranslate2", version("ctranslate2"), generate)


main()
