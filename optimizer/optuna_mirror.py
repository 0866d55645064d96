"""A study's finished trials as an Optuna study, for people who look at studies with Optuna's own tools.

paretune reads only its ledger; this is written where it is asked for (`--optuna-storage`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import optuna
import sqlalchemy as sa

from ..traces.metrics import Metric
from .front import Cost
from .space import SearchSpace, Value
from .store import LedgerError, Record, StudyRow, database_url

_KEY = "paretune"


class OptunaMirror:
    """Optuna's own storage, opened; its tables stand beside ours without touching them.

    Args:
        url: database URL, such as sqlite:///out/optuna.db.
    Raises (every method): LedgerError: the storage cannot be opened or written.
    """

    def __init__(self, url: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._where = url
        with self._errors():
            address = database_url(url)
            self._where = address.render_as_string(hide_password=True)
            self._storage = optuna.storages.RDBStorage(address.render_as_string(hide_password=False))

    def add(self, study: StudyRow, records: Sequence[Record], space: SearchSpace) -> int:
        """Add the trials that the Optuna study does not hold yet, one commit each; returns how many were added.

        A study that was begun anew replaces its earlier mirror; one of the name that is not ours is left alone.

        Args:
            records: of the ledger; failed trials stand as failed, infeasible ones carry a constraint above 0.
        Raises: LedgerError: also where another program has a study of that name there.
        """
        default = space.default.pool
        choices: dict[str, tuple[Value, ...]] = {
            name: tuple(dict.fromkeys((*values, getattr(default, name)))) for name, values in space.fields
        }
        axes = Metric.parse(study.settings["metric"]), study.settings["percentile"], study.settings["cost"]
        begun = {"created_at": study.created_at, **study.settings}
        with self._errors():
            mirrored = self._open(study.name)
            if mirrored.user_attrs.get(_KEY, begun) != begun:
                optuna.delete_study(study_name=study.name, storage=self._storage)
                mirrored = self._open(study.name)
            if _KEY not in mirrored.user_attrs and mirrored.get_trials(deepcopy=False):
                todo = "choose another --study or --optuna-storage"
                raise LedgerError(
                    self._where, f"study {study.name!r} of another program", "a name that is free, or ours", todo
                )
            mirrored.set_user_attr(_KEY, begun)
            have = {trial.user_attrs.get(_KEY) for trial in mirrored.get_trials(deepcopy=False)}
            missing = [record for record in records if _name(record) not in have]
            for record in missing:
                mirrored.add_trial(_frozen(record, choices, *axes))
        return len(missing)

    def _open(self, name: str) -> optuna.Study:
        return optuna.create_study(
            storage=self._storage, study_name=name, directions=["minimize", "minimize"], load_if_exists=True
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sa.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError, OSError) as error:
            first = str(error).strip().splitlines()[0]
            allowed, todo = "a database URL that Optuna can write to", "choose another --optuna-storage"
            raise LedgerError(self._where, first, allowed, todo) from None


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
