"""Train the small model that ships with paretune: `python -m paretune.runtime.small_model.train --out DIR`.

A Llama of 5.2 M parameters and a byte-level BPE tokenizer, both from the text of corpus.py, in plain PyTorch with AdamW
(Loshchilov & Hutter, arXiv:1711.05101) on a cosine schedule. The folder it writes is what Hugging Face transformers
reads (LlamaForCausalLM, bf16 safetensors). Files are replaced one by one, each whole, whenever the validation loss is
better than before, so the folder can be loaded at any time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn

from ...traces.whole_file import write_whole
from .corpus import Document, Share, documents, heldout_text, split
from .folder import EOS_ID, SPECIAL_TOKENS, byte_level, json_bytes, text_files
from .llama import Llama, Shape, mean_loss, rows


@dataclass(frozen=True)
class Schedule:
    """When training stops and how fast it learns; the cosine follows the budget, steps or minutes, nearer its end."""

    steps: int
    minutes: float
    batch: int = 4
    length: int = 512
    peak_rate: float = 2.5e-3
    final_share: float = 0.03
    warmup_steps: int = 100
    weight_decay: float = 0.1
    evaluate_minutes: float = 4.0
    bf16: bool = False

    def rate(self, step: int, spent: float) -> float:
        """Learning rate at `step` when the share `spent` (0 to 1) of the budget is gone."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(spent, 1.0)))
        decayed = self.final_share + (1 - self.final_share) * cosine
        return self.peak_rate * min(1.0, (step + 1) / self.warmup_steps) * decayed


@dataclass
class Record:
    """What a training run did; written beside the weights as training.json."""

    seed: int
    shape: dict[str, Any]
    schedule: dict[str, Any]
    corpus: dict[str, Any]
    machine: dict[str, Any]
    parameters: int
    steps: int = 0
    tokens: int = 0
    minutes: float = 0.0
    best_validation_loss: float = math.inf
    heldout_perplexity: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def begin(
        cls,
        model: Llama,
        schedule: Schedule,
        seed: int,
        shares: Mapping[Share, Sequence[Document]],
        training: Sequence[Tensor],
        validation: Tensor,
    ) -> Record:
        """The record of a run that has not made a step yet."""
        return cls(
            seed=seed,
            shape=asdict(model.shape),
            schedule=asdict(schedule),
            corpus={
                "sha256": hashlib.sha256("".join(item.text for item in shares["train"]).encode()).hexdigest(),
                **{f"{name}_documents": len(share) for name, share in shares.items()},
                "train_tokens": sum(len(item) for item in training),
                "validation_tokens": validation.numel(),
            },
            machine=machine(),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
        )


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` entries, learned from `texts`."""
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, found: Sequence[Document]) -> list[Tensor]:
    """Token ids of each document, <s> first and </s> last."""
    encoded = tokenizer.encode_batch([document.text for document in found])
    return [torch.tensor([*item.ids, EOS_ID], dtype=torch.int64) for item in encoded]


def train(out: Path, *, shape: Shape, schedule: Schedule, seed: int, stdlib: Path | None = None) -> Record:
    """Train on the standard library at `stdlib` and write the model folder `out`; the best by validation loss stays."""
    started = time.monotonic()
    torch.manual_seed(seed)
    shares = split(documents(stdlib))
    tokenizer = train_tokenizer([document.text for document in shares["train"]], shape.vocab_size)
    training = encode(tokenizer, shares["train"])
    validation = rows(torch.cat(encode(tokenizer, shares["validation"])).tolist(), schedule.length)
    if not len(validation):
        raise ValueError(f"validation text is shorter than one row of {schedule.length} tokens; give a smaller length")
    heldout = heldout_text(shares)
    model = Llama(shape)
    record = Record.begin(model, schedule, seed, shares, training, validation)
    print(json.dumps({"parameters": record.parameters, **record.corpus, **record.machine}), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    _write_static(out, shape, tokenizer, heldout)
    fit(model, training, validation, schedule, record, out, started, save_weights)
    record.heldout_perplexity = heldout_perplexity(model, out, rows(tokenizer.encode(heldout).ids, schedule.length))
    record.minutes = (time.monotonic() - started) / 60
    write_record(record, out)
    print(json.dumps({"heldout_perplexity": record.heldout_perplexity, "minutes": record.minutes}), flush=True)
    return record


def fit(
    model: Llama,
    training: Sequence[Tensor],
    validation: Tensor,
    schedule: Schedule,
    record: Record,
    out: Path,
    started: float,
    save: Callable[[Llama, Path], None],
) -> None:
    """The training loop; calls `save` whenever the validation loss is the best so far, and ends with that best."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=schedule.peak_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    batches = _batches(training, schedule, record.seed)
    best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluated = time.monotonic()
    spent, running = 0.0, 0.0
    while spent < 1.0:
        rate = schedule.rate(record.steps, spent)
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=schedule.bf16):
            loss = model.loss(tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record.steps += 1
        record.tokens += tokens.numel()
        running = loss.item() if record.steps == 1 else 0.98 * running + 0.02 * loss.item()
        now = time.monotonic()
        spent = max(record.steps / schedule.steps, (now - started) / 60 / schedule.minutes)
        if spent < 1.0 and now - evaluated < schedule.evaluate_minutes * 60:
            continue
        found = mean_loss(model, validation, schedule.batch)
        point = {
            "step": record.steps,
            "minutes": round((now - started) / 60, 2),
            "rate": rate,
            "train_loss": round(running, 4),
            "validation_loss": round(found, 4),
        }
        record.curve.append(point)
        record.minutes = point["minutes"]
        print(json.dumps({**point, "validation_perplexity": round(math.exp(found), 2)}), flush=True)
        if found < record.best_validation_loss:
            record.best_validation_loss = found
            best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            save(model, out)
        write_record(record, out)
        evaluated = time.monotonic()
    model.load_state_dict(best)


def _batches(training: Sequence[Tensor], schedule: Schedule, seed: int) -> Iterator[Tensor]:
    """(batch, length) int64 without end: each epoch the documents in a new order, cut into rows, the rows shuffled."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(training), generator=generator).tolist()
        epoch = rows(torch.cat([training[index] for index in order]).tolist(), schedule.length)
        shuffled = epoch[torch.randperm(len(epoch), generator=generator)]
        yield from (part for part in torch.split(shuffled, schedule.batch) if len(part) == schedule.batch)


def heldout_perplexity(model: Llama, out: Path, tokens: Tensor) -> dict[str, float]:
    """Perplexity of (rows, length) `tokens`: with the trained fp32 weights, as saved, and with bf16 arithmetic too."""
    found = {"fp32_weights": math.exp(mean_loss(model, tokens, 4))}
    saved = load(out)
    found["bf16_weights"] = math.exp(mean_loss(saved, tokens, 4))
    found["bf16_weights_and_arithmetic"] = math.exp(mean_loss(saved.bfloat16(), tokens, 4))
    return {name: round(value, 3) for name, value in found.items()}


def load(folder: Path) -> Llama:
    """The model in `folder` in fp32."""
    config = json.loads((folder / "config.json").read_text())
    model = Llama(Shape(**{name: config[name] for name in asdict(Shape())}))
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()})
    return model


def save_weights(model: Llama, out: Path) -> None:
    """Write model.safetensors in bf16 (rounded to nearest even), whole."""
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    write_whole(out / "model.safetensors", save_tensors(tensors, metadata={"format": "pt"}))


def _write_static(out: Path, shape: Shape, tokenizer: Tokenizer, heldout: str) -> None:
    files = {
        "config.json": json_bytes(shape.config()),
        "heldout.txt": heldout.encode(),
        **text_files(tokenizer, shape.max_position_embeddings),
    }
    for name, content in files.items():
        write_whole(out / name, content)


def write_record(record: Record, out: Path) -> None:
    write_whole(out / "training.json", json_bytes(asdict(record)))


def machine() -> dict[str, Any]:
    """Where a run happened, as far as it changes the numbers."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(prog="python -m paretune.runtime.small_model.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps, if the minutes last")
    parser.add_argument("--minutes", type=float, default=60.0, help="wall time after which the schedule has ended")
    parser.add_argument("--batch", type=int, default=Schedule.batch, help="rows a step")
    parser.add_argument("--length", type=int, default=Schedule.length, help="tokens a row")
    parser.add_argument("--rate", type=float, default=Schedule.peak_rate, help="highest learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--bf16", action="store_true", help="bf16 matmuls: faster where the CPU has AVX-512 BF16 or AMX"
    )
    chosen = parser.parse_args(argv)
    torch.set_num_threads(chosen.threads)
    schedule = Schedule(chosen.steps, chosen.minutes, chosen.batch, chosen.length, chosen.rate, bf16=chosen.bf16)
    train(chosen.out, shape=Shape(), schedule=schedule, seed=chosen.seed)


if __name__ == "__main__":
    main()
