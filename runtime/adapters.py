"""LoRA adapters: folders in PEFT's format, read, checked against the base, cut to one rank's share, packed, held.

    disk --read_adapter--> host memory (max_cpu_loras packed adapters) --put--> the rank's slots (max_loras)

Only safetensors are read: a pickle can run any code when it is opened. What an adapter asks for and this engine does
not do is refused by the name of its field or tensor.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..kernels import placement
from ..kernels.gpu_linear import activation_dtype
from ..kernels.gpu_lora import GpuLoraSlots
from ..kernels.lora import Delta, LoraSlots, Matrix, PackedAdapter, pack_adapter
from .model_shape import ModelShape
from .parallel import Share
from .spec import Pool

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

# the matrices of a layer in the order of the forward pass; matrix number = layer * MATRICES + one of these
QKV, O_PROJ, GATE_UP, DOWN = range(4)
MATRICES = 4
# where a checkpoint's module lies: matrix, part of it
_PLACE = {
    "self_attn.q_proj": (QKV, 0),
    "self_attn.k_proj": (QKV, 1),
    "self_attn.v_proj": (QKV, 2),
    "self_attn.o_proj": (O_PROJ, 0),
    "mlp.gate_proj": (GATE_UP, 0),
    "mlp.up_proj": (GATE_UP, 1),
    "mlp.down_proj": (DOWN, 0),
}
_MODULES = ", ".join(name.partition(".")[2] for name in _PLACE)
_TENSOR = re.compile(r"base_model\.model\.(model\.layers\.(\d+)\.(self_attn\.\w+|mlp\.\w+))\.lora_([AB])\.weight")
# fields of PEFT 0.7 to 0.18 that say nothing of what the adapter computes, or whose say is in the tensors
_IDLE_FIELDS = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights",
    "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "target_modules",
    "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "qalora_group_size", "runtime_config", "peft_version", "ensure_weight_tying",
}  # fmt: skip
# ways to begin training that leave the base as it is; the others (pissa, olora, corda, loftq) change it
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
_CPU = torch.device("cpu")
_FLOATS = {"F32", "BF16", "F16"}


class BadAdapter(Exception):
    """An adapter that will not be used: where (file and field or tensor), found, allowed, what to do."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str) -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {str(self.found)[:80]}; allowed: {self.allowed}; {self.todo}"


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says of the scale: alpha / r, with rank-stabilized LoRA alpha / sqrt(r)
    (Kalajdzievski, arXiv:2312.03732); patterns name modules with a rank or alpha of their own."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]

    def rank(self, module: str) -> int:
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        rank = self.rank(module)
        return _by_pattern(self.alpha_pattern, module, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def _by_pattern(pattern: dict[str, Any], module: str, default: float) -> float:
    """As PEFT looks a module up: the first key that matches its whole name or the end of it behind a dot."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return float(value)
    return default


def read_config(folder: Path) -> AdapterConfig:
    """Read and check adapter_config.json. Raises: BadAdapter."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise BadAdapter(str(folder), f"no {CONFIG_FILE}", "a folder that PEFT saved", "name such a folder") from None
    except (OSError, ValueError) as error:
        raise BadAdapter(str(path), error, "JSON", "copy the adapter again") from None
    if not isinstance(config, dict):
        raise BadAdapter(str(path), type(config).__name__, "an object", "copy the adapter again")

    def refuse(field: str, allowed: str) -> BadAdapter:
        return BadAdapter(f"{path}: {field}", repr(config.get(field)), allowed, "use an adapter without it")

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", "LORA")
    if config.get("bias", "none") != "none":
        raise refuse("bias", "none")
    start = config.get("init_lora_weights", True)
    if not (start is None or isinstance(start, bool) or start in _PLAIN_STARTS):
        raise refuse(
            "init_lora_weights", f"true, false, {', '.join(_PLAIN_STARTS)}: the base's weights stay as they are"
        )
    # use_dora, modules_to_save, fan_in_fan_out, layer_replication, target_parameters, ..., and what is newer than this
    for field, value in config.items():
        if field not in _IDLE_FIELDS and value:
            raise refuse(field, "absent, null or false: this engine does not do it")
    r, alpha = config.get("r"), config.get("lora_alpha")
    if type(r) is not int or r < 1:
        raise refuse("r", "an integer >= 1")
    if not _is_number(alpha):
        raise refuse("lora_alpha", "a number")
    if type(config.get("use_rslora", False)) is not bool:
        raise refuse("use_rslora", "true or false")
    patterns: dict[str, dict[str, Any]] = {}
    for field, fits in (("rank_pattern", lambda v: type(v) is int and v >= 1), ("alpha_pattern", _is_number)):
        pattern = patterns[field] = config.get(field) or {}
        if not isinstance(pattern, dict) or not all(
            re.fullmatch(r"[\w.^]+", key) and fits(value) for key, value in pattern.items()
        ):
            raise refuse(field, "names of modules, each with a number")
    modules = config.get("target_modules")
    if isinstance(modules, list):
        known = {name.rpartition(".")[2] for name in _PLACE}
        unknown = sorted({str(module) for module in modules if str(module).rpartition(".")[2] not in known})
        if unknown:
            raise BadAdapter(f"{path}: target_modules", unknown[0], _MODULES, "train the adapter on these alone")
    return AdapterConfig(r, float(alpha or 0), config.get("use_rslora", False), **patterns)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def matrices(shape: ModelShape, share: Share) -> list[Matrix]:
    """What adapters may change on one rank, MATRICES a layer; of a mixture of experts its attention alone."""
    heads, kv_heads = len(share.heads) * shape.head_dim, len(share.kv_heads) * shape.head_dim
    inter, hidden = len(share.intermediate), shape.hidden_size
    layer = [
        Matrix(hidden, (heads, kv_heads, kv_heads)),
        Matrix(heads, (hidden,)),
        Matrix(hidden, () if shape.experts else (inter, inter)),
        Matrix(inter, () if shape.experts else (hidden,)),
    ]
    return layer * shape.num_layers


def read_adapter(folder: Path, shape: ModelShape, share: Share, max_rank: int) -> dict[tuple[int, int], Delta]:
    """An adapter's deltas by (matrix, part), one rank's share, as stored.

    Column-parallel matrices (q, k, v, gate, up) take A whole and their rows of B; row-parallel ones (o, down) their
    columns of A and B whole: what they add is a partial sum like the base's, and goes through the same all-reduce.

    Raises: BadAdapter, naming file and field or tensor.
    """
    config = read_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        if (folder / PICKLE_FILE).exists():
            todo = "convert it where you trust it: PeftModel.save_pretrained(folder, safe_serialization=True)"
            raise BadAdapter(str(folder / PICKLE_FILE), "pickled weights", "safetensors (pickles run code)", todo)
        raise BadAdapter(str(folder), f"no {WEIGHTS_FILE}", "a folder that PEFT saved", "copy the weights as well")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as stored:
            return dict(_deltas(stored, path, config, shape, share, max_rank))
    except (SafetensorError, OSError) as error:
        raise BadAdapter(str(path), error, "whole safetensors", "copy the file again") from None


def _deltas(
    stored: Any, path: Path, config: AdapterConfig, shape: ModelShape, share: Share, max_rank: int
) -> Iterator[tuple[tuple[int, int], Delta]]:
    names = set(stored.keys())
    if not names:
        raise BadAdapter(str(path), "no tensors", "lora_A and lora_B of some module", "copy the adapter again")
    places = {place for place in _PLACE if place.startswith("self_attn.") or not shape.experts}
    for name in sorted(names):
        found = _TENSOR.fullmatch(name)
        if found is None or found[3] not in places or int(found[2]) >= shape.num_layers:
            modules = ", ".join(place.partition(".")[2] for place in _PLACE if place in places)
            mixture = " of a mixture of experts" if shape.experts else ""
            allowed = f"lora_A and lora_B of {modules} in {shape.num_layers} layers{mixture}"
            raise BadAdapter(
                f"{path}: {name}", "a tensor that the base has no place for", allowed, "train it on this base"
            )
        module, layer, place, side = found[1], int(found[2]), found[3], found[4]
        other = f"base_model.model.{module}.lora_{'B' if side == 'A' else 'A'}.weight"
        if other not in names:
            raise BadAdapter(f"{path}: {other}", "no such tensor", "A and B of every module", "copy the adapter again")
        if side == "B":
            continue
        matrix, part = _PLACE[place]
        rank = config.rank(module)
        if rank > max_rank:
            todo = "raise max_lora_rank in the spec"
            raise BadAdapter(f"{path}: {name}", f"rank {rank}", f"at most max_lora_rank, {max_rank}", todo)
        whole_in, columns, whole_out, rows = _cut(matrix, part, shape, share)
        a = _read(stored, path, name, (rank, whole_in))[:, columns.start : columns.stop]
        b = _read(stored, path, other, (whole_out, rank))[rows.start : rows.stop]
        yield (layer * MATRICES + matrix, part), Delta(a, b, config.scale(module))


def _cut(matrix: int, part: int, shape: ModelShape, share: Share) -> tuple[int, range, int, range]:
    """(in_features, this rank's columns of A, out_features, this rank's rows of B) of a module of the checkpoint."""
    hidden, inter = shape.hidden_size, shape.intermediate_size
    heads, total = (share.kv_heads, shape.num_kv_heads) if matrix == QKV and part else (share.heads, shape.num_heads)
    of_heads = range(heads.start * shape.head_dim, heads.stop * shape.head_dim)
    if matrix == QKV:
        return hidden, range(hidden), total * shape.head_dim, of_heads
    if matrix == O_PROJ:
        return total * shape.head_dim, of_heads, hidden, range(hidden)
    if matrix == GATE_UP:
        return hidden, range(hidden), inter, share.intermediate
    return inter, share.intermediate, hidden, range(hidden)


def _read(stored: Any, path: Path, name: str, shape: tuple[int, int]) -> Tensor:
    view = stored.get_slice(name)
    if tuple(view.get_shape()) != shape:
        allowed = f"{shape} (from the base's config.json and {CONFIG_FILE})"
        raise BadAdapter(f"{path}: {name}", f"shape {tuple(view.get_shape())}", allowed, "use an adapter of this base")
    if view.get_dtype() not in _FLOATS:
        raise BadAdapter(f"{path}: {name}", view.get_dtype(), "fp32, bf16 or fp16", "save the adapter as one of these")
    return torch.as_tensor(view[:])


class RankAdapters:
    """One rank's adapters: packed in host memory, least recently used first out, and in the slots that steps read.

    A and B are fp32 beside fp32 weights, else bf16.
    """

    def __init__(self, shape: ModelShape, share: Share, pool: Pool, device: torch.device = _CPU) -> None:
        self._shape, self._share = shape, share
        self._max_rank = pool.max_lora_rank
        self._precision = "fp32" if pool.weight_dtype == "fp32" else "bf16"
        self._matrices = matrices(shape, share)
        self._most = pool.max_cpu_loras or pool.max_loras
        self._host: OrderedDict[int, PackedAdapter] = OrderedDict()
        self._backend = "torch" if placement.on_gpu(device) else None
        self.slots: LoraSlots | GpuLoraSlots
        if placement.on_gpu(device):
            dtype = activation_dtype(pool.weight_dtype)
            self.slots = GpuLoraSlots(self._matrices, pool.max_loras, pool.max_lora_rank, dtype, device)
        else:
            self.slots = LoraSlots(self._matrices, pool.max_loras, pool.max_lora_rank, self._precision)

    def read(self, number: int, folder: Path, keep: Collection[int] = ()) -> PackedAdapter:
        """Adapter `number` from host memory, from disk if it is not there; others than `keep` may have to go.

        Raises: BadAdapter.
        """
        if number not in self._host:
            deltas = read_adapter(folder, self._shape, self._share, self._max_rank)
            self._host[number] = pack_adapter(deltas, self._matrices, self._precision, backend=self._backend)
        self._host.move_to_end(number)
        for other in list(self._host):
            if len(self._host) <= self._most:
                break
            if other != number and other not in keep:
                del self._host[other]
        return self._host[number]

    def put(self, slot: int, number: int, folder: Path, keep: Collection[int] = ()) -> None:
        """Fill a slot. Raises: BadAdapter."""
        self.slots.put(slot, self.read(number, folder, keep))

    @property
    def in_host_memory(self) -> tuple[int, ...]:
        """Numbers of the adapters there, least recently used first."""
        return tuple(self._host)


class AdapterNames:
    """The adapters that requests may name.

    A number names one adapter for good: a name that is loaded anew gets another, so that no cached block and no slot of
    the old one is taken for the new.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._folders: dict[int, Path] = {}
        self._live: Counter[int] = Counter()
        self._last = 0

    def __contains__(self, name: str) -> bool:
        return name in self._numbers

    def names(self) -> list[str]:
        return list(self._numbers)

    def number(self, name: str) -> int:
        return self._numbers[name]

    def folder(self, number: int) -> Path:
        return self._folders[number]

    def next_number(self) -> int:
        return self._last + 1

    def add(self, name: str, folder: Path) -> int:
        """Name `next_number()`."""
        self._last += 1
        self._numbers[name] = self._last
        self._folders[self._last] = folder
        return self._last

    def remove(self, name: str) -> None:
        """New requests cannot name it; those that do go on."""
        number = self._numbers.pop(name)
        if not self._live[number]:
            del self._folders[number]

    def begin(self, number: int) -> None:
        """A request that names it lives."""
        self._live[number] += 1

    def end(self, number: int) -> None:
        """It lives no more."""
        self._live[number] -= 1
        if not self._live[number]:
            del self._live[number]
            if number not in self._numbers.values():
                del self._folders[number]

    @property
    def live(self) -> Collection[int]:
        """Numbers that live requests name."""
        return self._live.keys()
