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

# Seconds of load on a live server: at least, and for each second of a configuration's steps. With half of the least,
# blocks of a load were twice as far apart (12 to 24 % instead of 7 to 13 % on one machine).
_LEAST_LOAD_S, _LOAD_S = 12.0, 1.5


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
    """Measure steps and operators of every configuration, then live servers of some (`live_configurations`).

    Args:
        seconds_per_configuration: of whole steps; a live server's load lasts half as long again, and 12 s at least.
        tiles: searched ones; every configuration runs on those for its number of threads.
        serving: also replay against live servers; without it, predictions leave out HTTP and its share of the cores.
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

    served = live_configurations(keys) if serving else ()
    # starting a server and its replay take about as long as starting a configuration, its steps and its operators
    whole = len(keys) + len(served)
    profile = measure(
        model,
        keys,
        seconds_per_configuration=seconds_per_configuration,
        tiles=tiles_of,
        max_model_len=max_model_len,
        progress=lambda what, share: tell(share * len(keys) / whole, what),
        command=command,
    )
    for number, key in enumerate(served):
        tell((len(keys) + number) / whole, f"live server {number + 1} of {len(served)}, {key}")
        pool = Pool(
            **key._asdict(),
            max_model_len=min(max_model_len, shape.max_position_embeddings),
            max_num_seqs=64,
            tiles=tiles_of(key),
        )
        deployment = Deployment(model=model, pools=(pool,))
        profile = calibrate_serving(
            profile, deployment, seconds=max(_LEAST_LOAD_S, _LOAD_S * seconds_per_configuration)
        )
    return profile


def live_configurations(keys: Sequence[Key]) -> tuple[Key, ...]:
    """What is measured live: of configurations that use as many cores and ranks the one with the fewest replicas.

    Where a replica is one rank each weight dtype is, because precisions slow down differently. Where ranks share it one
    is, bf16 first: they wait for each other whatever they multiply, and on many cores such splits are most of all.
    """
    best_first = sorted(
        (key for key in keys if key.cores <= usable_cores()),
        key=lambda key: (key.replicas, key.weight_dtype != "bf16"),
    )
    chosen: dict[tuple[int, int, str | None], Key] = {}
    for key in best_first:
        chosen.setdefault((key.cores, key.ranks, key.weight_dtype if key.ranks == 1 else None), key)
    return tuple(sorted(chosen.values(), key=lambda key: key.served_as))
