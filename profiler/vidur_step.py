"""Step tables of a pool from Vidur's operators: sums over the layers, joined by its all-reduce.

What Vidur did not measure comes from the data sheet, at the share of it that engines reach, and is said: the vocabulary
projection, and attention where the folder has none.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..runtime.model_shape import ModelShape
from ..runtime.spec import Pool
from .closed_loop import Host
from .facts import same_name
from .hardware import BadHardware
from .importers.vidur import OPERATORS, OPTIONAL, VidurTables
from .measured_step import not_faster
from .operator_tables import BadTable, OperatorTable
from .roofline import check_kv_blocks, roofline_bounds, roofline_tables
from .serving_point import PUBLISHED_HOST
from .step_time import WORK_GRID, ModeledStep, PromptPairs, StepTables

Floats = NDArray[np.float64]

# Of 88 steps of Llama 2 70B on A100 that Splitwise timed end to end, 90 % lie within it of these sums; most of what is
# missing is a host of 2023 in steps of few tokens (benchmarks/imported_tables.py).
RELATIVE_ERROR = 0.58
_DTYPES = ("bf16", "fp16")
_CONTEXT_OF_A_ROW = 1024.0


def vidur_step(
    tables: VidurTables, shape: ModelShape, pool: Pool, *, network: str | None = None, host: Host = PUBLISHED_HOST
) -> ModeledStep:
    """Step times of a pool of the accelerator that was measured.

    Args:
        network: whose all-reduce joins the ranks; None: the one that Vidur calls DEVICE_dgx, else the only one.
        host: what the host adds, which Vidur's tables do not hold.
    Raises: BadHardware: another accelerator, a precision that was not measured, or a model that does not fit;
        BadTable: a model or a number of ranks that was not measured.
    """
    device = tables.accelerator
    if device is None or pool.accelerator != device.name:
        found = tables.device if device is None else device.name
        raise BadHardware("pool.accelerator", pool.accelerator, found, "give the tables of the pool's")
    for field, value in (("weight_dtype", pool.weight_dtype), ("kv_cache_dtype", pool.kv_cache_dtype)):
        if value not in _DTYPES:
            raise BadHardware(f"pool.{field}", value, "bf16: Vidur measured half precision", "choose it")
    if shape.experts is not None or shape.latent is not None or shape.sliding_window is not None:
        found, allowed = "experts, latent attention or a window", "dense models with whole contexts"
        raise BadHardware("model", found, allowed, "take the data sheet, or other tables")
    check_kv_blocks(device, shape, pool)
    model, ranks = tables.model_of(shape), pool.tensor_parallel_size
    joined = None if ranks == 1 else network or _usual_network(tables)
    tokens_s = _tokens_s(tables, model, shape, pool, joined)
    tokens_s[1:] += host.step_s
    estimated, attention = roofline_tables(device, shape, pool), tables.attention(model, ranks)
    prefill_s, decode_s, pairs = estimated.prefill_attention_s, estimated.decode_attention_s, estimated.prompt_pairs
    if attention is not None:
        prefill_s, decode_s = _attention_s(*attention, shape, pool)
        pairs = PromptPairs()
    whole = StepTables(
        tokens_s=tokens_s,
        rows_s=host.row_s * np.arange(pool.max_num_seqs + 1, dtype=np.float64),
        samples_s=estimated.samples_s,
        decode_attention_s=decode_s,
        prefill_attention_s=prefill_s,
        request_s=np.array([host.request_s, host.request_s]),
        prompt_pairs=pairs,
    )
    bounded = not_faster(whole, roofline_bounds(device, shape, pool))
    notes = _notes(tables, model, ranks, attention is not None, joined)
    return ModeledStep(bounded, False, RELATIVE_ERROR, notes, host.step_s)


def _usual_network(tables: VidurTables) -> str:
    known = tables.networks
    usual = [name for name in known if same_name(name, f"{tables.device}_dgx")] or known
    if len(usual) == 1:
        return usual[0]
    raise BadTable(f"{tables.folder}: network", f"{len(known)} of {tables.device}", "one", "keep the one that you have")


def _tokens_s(tables: VidurTables, model: str, shape: ModelShape, pool: Pool, network: str | None) -> Floats:
    """(max_num_batched_tokens + 1,) all layers but attention itself, the embedding, the last norm, and what joins
    ranks."""
    tokens = np.arange(1, pool.max_num_batched_tokens + 1, dtype=np.float64)[:, None]
    layer = tables.layer(model, pool.tensor_parallel_size)
    seconds = np.zeros(len(tokens))
    for name, table in layer.items():
        beside = 1 if name in ("emb", "input_layernorm") else 0  # the embedding; of the norms one more at the end
        seconds += (shape.num_layers * OPERATORS[name] + beside) * table.lookup(tokens)
    saved = tables.cache_save(model, pool.tensor_parallel_size)
    if saved is not None:
        seconds += shape.num_layers * saved.lookup(tokens)
    if network is not None:
        reduced = tables.collective("all_reduce", network, pool.tensor_parallel_size)
        seconds += 2 * shape.num_layers * reduced.lookup(2.0 * shape.hidden_size * tokens)
    return np.concatenate([[0.0], seconds])


def _attention_s(prefill: OperatorTable, decode: OperatorTable, shape: ModelShape, pool: Pool) -> tuple[Floats, Floats]:
    """Over WORK_GRID, all layers: one prompt from its start, and decode rows of _CONTEXT_OF_A_ROW tokens."""
    chunk = np.sqrt(2.0 * WORK_GRID)
    rows = np.clip(WORK_GRID / _CONTEXT_OF_A_ROW, 1.0, float(pool.max_num_seqs))
    prefill_s = prefill.lookup(np.stack([chunk, np.zeros_like(chunk)], axis=1))
    decode_s = decode.lookup(np.stack([rows, WORK_GRID / rows], axis=1))
    layers = float(shape.num_layers)
    return layers * np.maximum.accumulate(prefill_s), layers * np.maximum.accumulate(decode_s)


def _notes(tables: VidurTables, model: str, ranks: int, attention: bool, network: str | None) -> tuple[str, ...]:
    notes = [
        f"step times are sums of single operators that others measured (Vidur, {model} on {tables.device}, half "
        "precision), not measured steps",
        "gaps between kernels, CUDA graphs and their padding, later engines: Vidur timed those of Sarathi-Serve",
        "the vocabulary projection and sampling: not measured there, estimated from the data sheet",
        "time outside the steps: 15.6 ms a request, and 0.54 ms a step of the host, published for another server",
    ]
    if attention:
        notes.append(f"decode attention: by the sum of contexts, at {_CONTEXT_OF_A_ROW:.0f} tokens a row")
    else:
        notes.append("attention: not measured there, estimated from the data sheet")
    if tables.cache_save(model, ranks) is None:
        notes.append("saving new keys and values to the cache: not measured there, counted as no time of its own")
    if left_out := [name for name in OPTIONAL if name not in tables.layer(model, ranks)]:
        notes.append(f"{', '.join(left_out)}: not measured there, counted as no time")
    if network is not None:
        notes.append(f"all-reduce: as NCCL took on {network}, alone")
    return tuple(notes)
