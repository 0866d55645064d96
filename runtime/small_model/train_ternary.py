"""Train the ternary twin of the small model: `python -m paretune.runtime.small_model.train_ternary --out DIR`.

From the small model's own weights, on the same text in the same way (train.py), with the layers' matrices ternary from
the first steps on (ternary_linear.py).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from ...traces.whole_file import write_whole
from . import HELDOUT_TEXT, MODEL_DIR
from .corpus import documents, split
from .folder import json_bytes, text_files
from .llama import mean_loss, rows
from .ternary_linear import QUANTIZATION_CONFIG, make_ternary, save_ternary
from .train import Record, Schedule, encode, fit, load, machine, write_record


def train_ternary(out: Path, *, schedule: Schedule, seed: int, stdlib: Path | None = None) -> Record:
    """Train on the standard library at `stdlib` and write the model folder `out`; the best by validation loss stays."""
    started = time.monotonic()
    torch.manual_seed(seed)
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    shares = split(documents(stdlib))
    training = encode(tokenizer, shares["train"])
    validation = rows(torch.cat(encode(tokenizer, shares["validation"])).tolist(), schedule.length)
    model = load(MODEL_DIR)
    make_ternary(model)
    record = Record.begin(model, schedule, seed, shares, training, validation)
    print(json.dumps({"parameters": record.parameters, **record.corpus, **machine()}), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": json_bytes({**model.shape.config(), "quantization_config": QUANTIZATION_CONFIG}),
        **text_files(tokenizer, model.shape.max_position_embeddings),
    }
    for name, content in files.items():
        write_whole(out / name, content)
    fit(model, training, validation, schedule, record, out, started, save_ternary)
    heldout = rows(tokenizer.encode(HELDOUT_TEXT.read_text(encoding="utf-8")).ids, schedule.length)
    record.heldout_perplexity = {"ternary_weights": round(math.exp(mean_loss(model, heldout, 4)), 3)}
    record.minutes = (time.monotonic() - started) / 60
    write_record(record, out)
    print(json.dumps({"heldout_perplexity": record.heldout_perplexity, "minutes": record.minutes}), flush=True)
    return record


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(prog="python -m paretune.runtime.small_model.train_ternary", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps, if the minutes last")
    parser.add_argument("--minutes", type=float, default=30.0, help="wall time after which the schedule has ended")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--bf16", action="store_true", help="bf16 matmuls: faster where the CPU has AVX-512 BF16 or AMX"
    )
    chosen = parser.parse_args(argv)
    torch.set_num_threads(chosen.threads)
    schedule = Schedule(chosen.steps, chosen.minutes, peak_rate=chosen.rate, bf16=chosen.bf16)
    train_ternary(chosen.out, schedule=schedule, seed=chosen.seed)


if __name__ == "__main__":
    main()
