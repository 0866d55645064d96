"""llama.cpp through the low-level interface of llama-cpp-python: run_llama_cpp.py MODEL.gguf"""

from __future__ import annotations

import sys
from importlib.metadata import version

import llama_cpp
import numpy as np

from workload import BATCHES, NEW_TOKENS, PREFILL_TOKENS, PROMPT_TOKENS, VOCAB_SIZE, report

STEP_TOKENS = 2048


def main() -> None:
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {sys.argv[1]}")

    def context(sequences: int) -> object:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = max(PREFILL_TOKENS + 1, sequences * (PROMPT_TOKENS + NEW_TOKENS + 7))
        params.n_batch, params.n_ubatch, params.n_seq_max = STEP_TOKENS, 512, sequences
        params.n_threads = params.n_threads_batch = 2
        return llama_cpp.llama_init_from_model(model, params)

    contexts = {batch: context(batch) for batch in BATCHES}
    tokens = llama_cpp.llama_batch_init(STEP_TOKENS, 0, 1)

    def put(place: int, token: int, position: int, sequence: int, wants_logits: bool) -> None:
        tokens.token[place], tokens.pos[place], tokens.n_seq_id[place] = token, position, 1
        tokens.seq_id[place][0], tokens.logits[place] = sequence, wants_logits

    def best(ctx: object, place: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(ctx, place)
        return int(np.argmax(np.ctypeslib.as_array(logits, (VOCAB_SIZE,))))

    def compute(ctx: object, number: int) -> None:
        tokens.n_tokens = number
        if llama_cpp.llama_decode(ctx, tokens) != 0:
            raise SystemExit("llama_decode failed")

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        ctx = contexts[len(prompts)]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
        out: list[list[int]] = [[] for _ in prompts]
        todo = [(s, i, t, i == len(p) - 1) for s, p in enumerate(prompts) for i, t in enumerate(p)]
        for begin in range(0, len(todo), STEP_TOKENS):
            part = todo[begin : begin + STEP_TOKENS]
            for place, (sequence, position, token, last) in enumerate(part):
                put(place, token, position, sequence, last)
            compute(ctx, len(part))
            for place, (sequence, _, _, last) in enumerate(part):
                if last:
                    out[sequence].append(best(ctx, place))
        for step in range(1, new_tokens):
            for sequence, prompt in enumerate(prompts):
                put(sequence, out[sequence][-1], len(prompt) + step - 1, sequence, True)
            compute(ctx, len(prompts))
            for sequence in range(len(prompts)):
                out[sequence].append(best(ctx, sequence))
        return out

    report("llama-cpp-python", version("llama-cpp-python"), generate)


main()
