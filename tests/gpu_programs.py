"""The GPU path where there is no GPU: what programs do first, so that its tensors lie on the CPU, its kernels run under
Triton's interpreter, and a "CUDA graph" is the same function called again on what its batch then holds."""

from .triton_program import run

ON_THE_CPU = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from paretune.kernels import placement
placement.on_gpu = lambda where: True
placement.capability = lambda device: (9, 0)
placement.multiprocessors = lambda device: 1  # a program takes milliseconds: two parts of a context, or one
from paretune.runtime import engine as engines, gpu_steps, rank as ranks
from paretune.runtime.decode_graphs import Recorded
from paretune.runtime.engine import Engine, Request
from paretune.runtime.sampler import SamplingParams
from paretune.runtime.spec import Adapter, Deployment, Pool
engines.check_gpus = engines.check_memory = lambda *ignored, **also: None
ranks.rank_device = lambda pool, local_rank: torch.device("cpu")
replays = []

class Recorder:
    def __init__(self, wait): pass
    def __call__(self, compute):
        result = compute().clone()
        def replay():
            replays.append(len(result))
            result.copy_(compute())
        return Recorded(replay, result)

gpu_steps.CudaRecorder = Recorder

def answers(engine, requests):
    for request in requests:
        engine.add(request)
    found, logprobs = {}, []
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
            logprobs += [value for each in output.logprobs or () for _, value in each.top]
    return found, logprobs
"""


def run_on_the_cpu(program: str) -> str:
    """Run a program behind ON_THE_CPU; what it printed."""
    return str(run(ON_THE_CPU + program))
