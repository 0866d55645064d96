"""Step tables of a pool from whole steps that somebody measured: an exported profile, or Splitwise's runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from ..runtime.model_shape import ModelShape
from ..runtime.spec import Pool
from .facts import same_name
from .hardware import Accelerator
from .importers.step_rows import StepRows, layer_parameters
from .measured_step import extrapolated, fitted_tables, large_enough, not_faster, seconds_of
from .operator_tables import BadTable
from .profile import StepPoint
from .roofline import check_kv_blocks, roofline_bounds, roofline_tables
from .step_fit import StepFit, fit_all_steps
from .step_time import ModeledStep

_SAME_MODEL = 1e-3  # a share by which two counts of one model's parameters may differ
_SHARDING = (
    "tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size", "enable_expert_parallel",
    "weight_dtype", "kv_cache_dtype",
)  # fmt: skip


def whole_step(tables: Sequence[StepRows], shape: ModelShape, pool: Pool, device: Accelerator) -> ModeledStep:
    """Step times of a pool on the accelerator that was measured, fitted as a profile of this machine is.

    Each quarter of the steps, predicted from the others, says how far they are off.

    Raises: BadTable: nothing was measured of this model (by its parameters), accelerator, sharding and precisions;
        BadProfile: too few steps; BadHardware: a model that the memory does not hold.
    """
    found = measured_as(tables, shape, pool)
    check_kv_blocks(device, shape, pool)
    bound = roofline_bounds(device, shape, pool)
    fit = _fit_of(
        found.points, seconds_of(roofline_bounds(device, shape, large_enough(pool, found.points)), found.points)
    )
    step = not_faster(fitted_tables(fit, bound), bound)
    notes = [
        f"steps of {found.of} that others measured ({found.of.source}): of another engine version than yours",
        "time outside the steps (HTTP, tokenizer)",
        *extrapolated(fit, pool),
    ]
    if not any(point.decode_context and point.prefill_pairs for point in found.points):
        notes.append("steps of prompts and decode rows together: none was measured, taken as the sum of their parts")
    notes.append("the host's part of a step: inferred, at most what every step takes beyond its bound")
    # windows and states that each row reads are not in the bound, and so in what the fit says of rows
    device_row_s = min(float(step.rows_s[1]), float(roofline_tables(device, shape, pool).rows_s[1]))
    return ModeledStep(step, True, fit.relative_error, tuple(notes), fit.step_s, device_row_s)


@lru_cache(maxsize=64)
def _fit_of(points: tuple[StepPoint, ...], least_s: tuple[float, ...]) -> StepFit:
    return fit_all_steps(points, least_s)


def measured_as(tables: Sequence[StepRows], shape: ModelShape, pool: Pool) -> StepRows:
    """What was measured of a model under a pool's sharding. Raises: BadTable: nothing."""
    wanted, left = layer_parameters(shape), list(tables)
    # each narrows down what is left, so that an error names the first thing that nothing has
    narrowing: list[tuple[str, object, dict[int, object]]] = [
        ("pool.accelerator", pool.accelerator, {id(each): each.of.accelerator for each in left}),
        ("model: parameters of its layers", f"{wanted:,}", {id(each): f"{each.of.parameters:,}" for each in left}),
    ]
    narrowing += [
        (f"pool.{name}", getattr(pool, name), {id(each): getattr(each.of, name) for each in left}) for name in _SHARDING
    ]
    for where, value, values in narrowing:
        kept = [each for each in left if _same(where, value, values[id(each)])]
        if not kept:
            known = ", ".join(sorted({str(values[id(each)]) for each in left}))
            raise BadTable(where, value, known or "no step that can be true", "choose one of these")
        left = kept
    if len(left) > 1:
        names = "; ".join(str(each.of) for each in left)
        raise BadTable("step times", f"{len(left)} tables: {names}", "one", "keep the one that you mean")
    return left[0]


def _same(where: str, wanted: object, value: object) -> bool:
    if where == "pool.accelerator":
        return same_name(str(wanted), str(value))
    if where.startswith("model"):
        mine, its = (float(str(each).replace(",", "")) for each in (wanted, value))
        return abs(mine - its) <= _SAME_MODEL * mine
    return wanted == value
