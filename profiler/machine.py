"""Measure this machine for one model: every way to share its cores, with tuned tiles, and what a live server adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..kernels.tiles import TileTable
from ..runtime.model_shape import ModelShape, resolve_model
from ..runtime.parallel import usable_cores
from ..runtime.runnable import USUAL_WEIGHT_DTYPES
from ..runtime.spec import Deployment, Pool
from .calibration import calibrate_serving
from .measure import measure, possible_configurations
from .profile import Key, Profile
from .tile_file import TileFile

Report = Callable[[float, str], None]

# Starting a server and its replay against starting a configuration and measuring it: about three times as long.
_SERVING_JOBS = 3


def profile_machine(
    model: str,
    *,
    weight_dtypes: Sequence[str] = USUAL_WEIGHT_DTYPES,
    kv_cache_dtypes: Sequence[str] = ("bf16",),
    pipeline_parallel_sizes: Sequence[int] = (1,),
    context_parallel_sizes: Sequence[int] = (1,),
    seconds_per_configuration: float = 8.0,
    tiles: TileFile | None = None,
    max_model_len: int = 2048,
    serving: bool = True,
    cores: int | None = None,
    progress: Report | None = None,
    command: str = "",
) -> Profile:
    """Measure steps and operators of every configuration, then a live server for each number of cores that computes.

    Args:
        tiles: searched ones; every configuration runs on those for its number of threads.
        serving: also replay against a live server; without it, predictions leave out HTTP and its share of the cores.
        cores: use at most so many of this machine's; None: all.
        progress: called with the share that is done and what comes next.
    Raises: BadModel, BadSpec (exit code 2); MeasureFailed, ServerFailed (1).
    """
    tell = progress or (lambda share, what: None)
    shape = ModelShape.load(resolve_model(model))
    keys = possible_configurations(
        cores,
        weight_dtypes=weight_dtypes,
        kv_cache_dtypes=kv_cache_dtypes,
        pipeline_parallel_sizes=pipeline_parallel_sizes,
        context_parallel_sizes=context_parallel_sizes,
        shape=shape,
    )

    def tiles_of(key: Key) -> TileTable:
        return tiles.table(key.num_threads).only(key.weight_dtype) if tiles else TileTable()

    loads = _loads(keys) if serving else ()
    whole = len(keys) + _SERVING_JOBS * len(loads)
    profile = measure(
        model,
        keys,
        seconds_per_configuration=seconds_per_configuration,
        tiles=tiles_of,
        max_model_len=max_model_len,
        progress=lambda what, share: tell(share * len(keys) / whole, what),
        command=command,
    )
    for number, key in enumerate(loads):
        tell((len(keys) + _SERVING_JOBS * number) / whole, f"live server, {key}")
        pool = Pool(
            **key._asdict(),
            max_model_len=min(max_model_len, shape.max_position_embeddings),
            max_num_seqs=64,
            tiles=tiles_of(key),
        )
        profile = calibrate_serving(profile, Deployment(model=model, pools=(pool,)))
    return profile


def _loads(keys: Sequence[Key]) -> tuple[Key, ...]:
    """For each number of cores, and of ranks on them, the configuration measured live: one replica, bf16 first."""
    chosen = []
    for cores, ranks in sorted({(key.cores, key.ranks) for key in keys if key.cores <= usable_cores()}):
        same = [key for key in keys if (key.cores, key.ranks) == (cores, ranks)]
        chosen.append(min(same, key=lambda key: (key.replicas, key.weight_dtype != "bf16", -key.num_threads)))
    return tuple(chosen)
