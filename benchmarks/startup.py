"""How long people wait: `paretune --help`, and `tune` on 40 minutes of the Azure conversation trace, simulated only."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bars import Bar, finish, needed_data, spread
from paretune.profiler.hardware import accelerator
from paretune.profiler.roofline import kv_blocks
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.random_model import write_random_model
from paretune.runtime.spec import Pool

RUNS = 7
TUNE_RUNS = 3
HELP_LIMIT_S = 0.4
TUNE_LIMIT_S = 60.0
CANDIDATES = 500
DEVICE = "H100"

# Whole prompts need as many batched tokens as the model is long, so 8 x 12 x (6 + 1) of the 1,152 points are valid:
# enough for CANDIDATES of them to be left after the screen.
SPACE = """\
fields:
  tensor_parallel_size: [1, 2, 4, 8]
  weight_dtype: [bf16, fp8]
  max_num_seqs: [16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320]
  max_num_batched_tokens: [512, 1024, 2048, 4096, 8192, 16384]
  enable_chunked_prefill: [true, false]
max_devices: 8
default:
  pools:
  - accelerator: {device}
    max_model_len: 16384
    num_kv_blocks: {blocks}
"""

# Llama-3.1-8B's shape with random weights would be 16 GB: the tuner reads only config.json and never a weight
CONFIG = ("models", "hf_configs", "meta-llama--Meta-Llama-3.1-8B.json")


def paretune(*arguments: str) -> tuple[float, str]:
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "paretune", *arguments], capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode != 0:
        sys.exit(f"paretune {' '.join(arguments)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return seconds, done.stdout


def loads_torch() -> bool:
    code = "import sys, paretune.cli; print('torch' in sys.modules)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() != "False"


def main() -> int:
    trace = needed_data("traces", "azure2023", "conv_first40min.csv")
    config = needed_data(*CONFIG)
    help_s = [paretune("--help")[0] for _ in range(RUNS)]
    tune_s = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_random_model(
            folder / "model", vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2,
        )  # fmt: skip
        (model / "config.json").write_text(config.read_text())
        shape = ModelShape.from_config(json.loads(config.read_text()))
        device = accelerator(DEVICE)
        # bf16 on one device leaves the least room: what fits there fits every candidate
        blocks = kv_blocks(device, shape, Pool(accelerator=DEVICE, tensor_parallel_size=1, weight_dtype="bf16"))
        space = folder / "space.yaml"
        space.write_text(SPACE.format(device=DEVICE, blocks=blocks))
        simulated = []
        for run in range(TUNE_RUNS):
            seconds, out = paretune(
                "tune", str(trace), "--model", str(model), "--accelerator", DEVICE, "--space", str(space),
                "--slo", "ttf30:p95<=2s", "--trials", str(CANDIDATES), "--storage", str(folder / f"{run}.db"), "--json",
            )  # fmt: skip
            tune_s.append(seconds)
            found = json.loads(out)["data"]
            simulated.append(found["screened"]["simulated"] - found["screened"]["failed"])
            print(f"tune: {seconds:.1f} s, {simulated[-1]} simulated", file=sys.stderr)
    details = {"help_s": spread(help_s), "tune_s": spread(tune_s), "screened": found["screened"]}
    bars = [
        Bar("seconds of paretune --help", statistics.median(help_s), HELP_LIMIT_S, at_least=False),
        Bar("torch loaded by --help (0 = no)", float(loads_torch()), 0.0, at_least=False),
        Bar("candidates simulated", min(simulated), CANDIDATES),
        Bar(f"seconds of tune, {CANDIDATES} candidates", statistics.median(tune_s), TUNE_LIMIT_S, at_least=False),
    ]
    finish(bars, details, "startup")
    return 0


if __name__ == "__main__":
    sys.exit(main())
