"""A study's finished trials as an Optuna study, for people who look at studies with Optuna's own tools.

paretune reads only its ledger; this is written where it is asked for (`--optuna-storage`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import optuna
import sqlalchemy as sa

from ..traces.metrics import Metric
from .front import Cost
from .space import SearchSpace, Value
from .store import LedgerError, Record

_KEY = "paretune"


def mirror(
    records: Sequence[Record],
    space: SearchSpace,
    url: str,
    study: str,
    *,
    metric: Metric,
    percentile: float,
    cost: Cost,
) -> int:
    """Add the trials that the Optuna study does not hold yet, one commit each; returns how many were added.

    Args:
        records: of the ledger; failed trials stand as failed, infeasible ones carry a constraint above 0.
        url: SQLAlchemy URL of Optuna's own storage; its tables stand beside ours without touching them.
    Raises: LedgerError: the storage cannot be opened or written.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    default = space.default.pool
    choices: dict[str, tuple[Value, ...]] = {
        name: tuple(dict.fromkeys((*values, getattr(default, name)))) for name, values in space.fields
    }
    try:
        mirrored = optuna.create_study(
            storage=optuna.storages.RDBStorage(url),
            study_name=study,
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )
        have = {trial.user_attrs.get(_KEY) for trial in mirrored.get_trials(deepcopy=False)}
        missing = [record for record in records if _name(record) not in have]
        for record in missing:
            mirrored.add_trial(_frozen(record, choices, metric, percentile, cost))
    except (sa.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise LedgerError(url, first, "a database that Optuna can write", "choose another --optuna-storage") from None
    return len(missing)


def _name(record: Record) -> str:
    return f"{record.digest} {record.fidelity}"


def _frozen(
    record: Record, choices: Mapping[str, tuple[Value, ...]], metric: Metric, percentile: float, cost: Cost
) -> optuna.trial.FrozenTrial:
    pool = record.deployment["pools"][0]
    params = {name: pool[name] for name, values in choices.items() if pool[name] in values}
    last = record.evaluations[-1] if record.evaluations else None
    values = None if last is None else [last.value(metric, percentile), last.cost(cost)]
    known = values is not None and all(math.isfinite(value) for value in values)
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.COMPLETE if known else optuna.trial.TrialState.FAIL,
        values=values if known else None,
        params=params,
        distributions={name: optuna.distributions.CategoricalDistribution(choices[name]) for name in params},
        user_attrs={_KEY: _name(record), "reason": record.reason or (last.reason if last is not None else "")},
        constraints={"targets": 0.0 if last.feasible else 1.0} if known and last is not None else None,
    )
