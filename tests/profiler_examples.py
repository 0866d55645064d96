"""Profiles made up for tests: a machine whose step times follow a formula that we know."""

import numpy as np

from paretune.kernels.tiles import TileTable
from paretune.profiler.operators import Composition, linears
from paretune.profiler.profile import (
    Configuration,
    LivePoint,
    OperatorPoint,
    Peaks,
    Profile,
    Serving,
    StepPoint,
    now,
    shape_data,
    this_machine,
    versions,
)
from paretune.runtime.model_shape import ModelShape, resolve_model

SMALL = ModelShape.load(resolve_model("paretune/small"))
# far beyond what any machine does, so that the physics bound stays out of the way unless a test wants it
FAST = Peaks(
    num_threads=1, flops_per_s={"fp32": 1e16, "bf16": 1e16, "int8": 1e16}, read_bytes=((1 << 20, 1e15), (1 << 30, 1e15))
)


def formula_s(step: Composition) -> float:
    """The made-up machine: a host's share, linear layers that first only read their weights, and attention."""
    return (
        1e-3
        + 2e-6 * step.num_rows
        + 1e-5 * step.num_samples
        + 3e-5 * max(8.0, step.num_tokens)
        + 1e-7 * step.decode_context
        + 2e-8 * step.prefill_pairs
    )


def compositions(most_tokens: int = 1024, most_rows: int = 64) -> list[Composition]:
    """What a measurement covers: decoding by rows and context, prompts, chunks, and mixtures."""
    found = []
    for rows in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        found += [
            Composition(rows, rows, rows, rows * float(c), 0.0) for c in (16, 128, 512, 1024) if rows <= most_rows
        ]
    for tokens in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        if tokens <= most_tokens:
            for start in (0, 256, 1024):
                pairs = tokens * start + tokens * (tokens + 1) / 2
                found.append(Composition(tokens, 1, int(start == 0), 0.0, pairs))
            for rows in (4, 16, 32):
                if tokens + rows <= most_tokens:
                    pairs = tokens * (tokens + 1) / 2
                    found.append(Composition(tokens + rows, rows + 1, rows + 1, rows * 64.0, pairs))
    return found


def points(noise: float = 0.0, seed: int = 0) -> tuple[StepPoint, ...]:
    rng = np.random.default_rng(seed)
    return tuple(
        StepPoint(**step._asdict(), median_s=formula_s(step) * float(np.exp(noise * rng.normal())), iqr_s=0.0, count=5)
        for step in compositions()
    )


def serving(
    decode: float = 1.5, prompts: float = 1.5, *, cores: int = 1, measured_on: str = "TP 1 x 1 threads bf16/bf16"
) -> Serving:
    """A live server on which decode steps, and steps with prompts, take so many times as long as alone."""
    steps = [step for step in compositions() if step.num_rows <= 16]
    live = [
        LivePoint(**step._asdict(), mean_s=formula_s(step) * (prompts if step.prefill_pairs else decode), count=3)
        for step in steps
    ]
    return Serving(
        cores=cores, ranks=1, points=live, spread=0.2, between_steps_s=1e-4, after_idle_s=0.0, to_scheduler_s=2e-3,
        to_client_s=3e-3,
        steps=3 * len(live), requests=10, measured_on=measured_on,
    )  # fmt: skip


def operator_points(tiles: dict[str, float], shape: ModelShape = SMALL, precision: str = "bf16") -> list[OperatorPoint]:
    """Linear layers whose time is rows * elements * (the tile's seconds); "default" is the default tile."""
    from paretune.kernels.tiles import Tile

    found = []
    for name, seconds in tiles.items():
        prefetch = 2048 if name == "default" else int(name)
        tile = Tile("linear", "cpp", (("prefetch_bytes", prefetch),))
        for layer in linears(shape, 1):
            for rows in (1, 4, 16, 64, 256, 1024):
                median_s = rows * layer.out_features * layer.in_features * seconds
                found.append(
                    OperatorPoint(
                        operator="linear",
                        name=layer.name,
                        precision=precision,
                        tensor_parallel_size=1,
                        rows=rows,
                        default=name == "default",
                        backend="cpp",
                        parameters=dict(tile.parameters),
                        median_s=median_s,
                        iqr_s=0.0,
                        count=5,
                    )
                )
    return found


def profile(
    *,
    noise: float = 0.0,
    peaks: Peaks | tuple[Peaks, ...] = FAST,
    operators: tuple[OperatorPoint, ...] = (),
    **changes: object,
) -> Profile:
    configuration = Configuration(
        tensor_parallel_size=1, num_threads=1, replicas=1, weight_dtype="bf16", kv_cache_dtype="bf16",
        tiles=TileTable(), steps=points(noise), operators=operators,
    )  # fmt: skip
    plain = {
        "created_at": now(),
        "command": "a test",
        "machine": this_machine("none"),
        "versions": versions(),
        "model": "paretune/small",
        "shape": shape_data(SMALL),
        "peaks": (peaks,) if isinstance(peaks, Peaks) else peaks,
        "configurations": (configuration,),
    }
    return Profile(**{**plain, **changes})


def several_precisions(*weight_dtypes: str, **changes: object) -> Profile:
    """A machine on which a step takes as long whatever the weights are stored in."""
    measured = profile().configurations[0]
    same = tuple(measured.model_copy(update={"weight_dtype": each}) for each in weight_dtypes)
    return profile(configurations=same, **changes)


def four_cores(*replicas: int) -> Profile:
    """A machine of four cores where so many replicas of one thread each were measured side by side."""
    machine = this_machine("none").model_copy(update={"cores": 4})
    measured = profile().configurations[0]
    configurations = tuple(measured.model_copy(update={"replicas": number}) for number in replicas)
    return profile(machine=machine, configurations=configurations)
