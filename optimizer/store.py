"""The ledger: every study and every evaluation at every fidelity, in SQLite or PostgreSQL; one commit a trial.

Sampling happens in memory; what a trial gave is written when it is done, all of it or nothing. So a run that is killed
loses the trials under way and no other, and a resumed one is answered from here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Self

import sqlalchemy as sa

from .front import Evaluation, Fidelity

SCHEMA_VERSION = 1

# Another process may hold the write lock of SQLite while it commits, or copies the file.
BUSY_TIMEOUT_S = 30.0

_metadata = sa.MetaData()
_schema = sa.Table("paretune_schema", _metadata, sa.Column("version", sa.Integer, primary_key=True))
_study = sa.Table(
    "paretune_study",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("settings", sa.JSON, nullable=False),
    sa.Column("about", sa.JSON, nullable=False),
    sa.Column("result", sa.JSON),
    sa.Column("created_at", sa.Text, nullable=False),
)
_evaluation = sa.Table(
    "paretune_evaluation",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study", sa.ForeignKey("paretune_study.id", ondelete="CASCADE"), nullable=False),
    sa.Column("trial", sa.Integer, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("fidelity", sa.String(16), nullable=False),
    sa.Column("state", sa.String(8), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("deployment", sa.JSON, nullable=False),
    sa.Column("values", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Text, nullable=False),
    sa.UniqueConstraint("study", "digest", "fidelity"),
)


class LedgerError(Exception):
    """The ledger cannot be read or written: where, what was found, what is allowed, what to do."""

    exit_code: ClassVar[int] = 1

    def __init__(self, where: str, found: object, allowed: str, todo: str) -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {str(self.found)[:200]}; allowed: {self.allowed}; {self.todo}"


class NoSuchStudy(LedgerError):
    """A study that the ledger does not hold, or one that was made with other settings."""

    exit_code: ClassVar[int] = 2


@dataclass(frozen=True)
class Record:
    """One finished trial at one fidelity.

    digest       of the candidate as it was proposed
    state        "ok", or "failed" with the reason; a failed trial has no evaluations and is not tried again
    evaluations  one; without targets, one for each load
    """

    trial: int
    digest: str
    fidelity: Fidelity
    evaluations: tuple[Evaluation, ...]
    deployment: Mapping[str, Any]
    state: str = "ok"
    reason: str = ""


@dataclass(frozen=True)
class StudyRow:
    """A study as the ledger lists it.

    settings  what decides its trials; it goes on only with the same ones
    about     where its inputs lay, for those who read it later
    result    what it ended with; None while it runs, or after it was interrupted
    """

    name: str
    settings: Mapping[str, Any]
    about: Mapping[str, Any]
    result: Mapping[str, Any] | None
    created_at: str
    trials: int


class Ledger:
    """Studies and evaluations under a file path or a database URL (`postgresql://...`).

    Raises (every method): LedgerError: disk full, locked, unreachable, not a ledger, or made by a newer paretune.
    """

    def __init__(self, where: str | os.PathLike[str]) -> None:
        text = os.fspath(where)
        self.where = text
        if "://" not in text:
            try:
                Path(text).absolute().parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise LedgerError(
                    text, error, "a folder that can be written", "choose another place for the ledger"
                ) from None
            text = f"sqlite:///{text}"
        try:
            url = database_url(text)
            self.where = url.render_as_string(hide_password=True)
            self._engine = sa.create_engine(url, connect_args=_connect_args(url), pool_pre_ping=True)
        except ModuleNotFoundError as error:
            raise LedgerError(
                self.where, error, "an installed database driver", "pip install 'paretune[postgres]'"
            ) from None
        except sa.exc.ArgumentError as error:
            raise LedgerError(self.where, error, "a file path or a database URL", "correct the address") from None
        if url.drivername.startswith("sqlite"):
            sa.event.listen(self._engine, "connect", _prepare_sqlite)
        self._create()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._engine.dispose()

    def open_study(
        self,
        name: str,
        settings: Mapping[str, Any],
        about: Mapping[str, Any] | None = None,
        *,
        renew: bool = False,
    ) -> None:
        """Begin a study, or go on with one that was begun with the same settings.

        about: where inputs lie and what was asked, for those who read the study later; the last word counts.
        renew: forget an earlier study of the name that has ended or was begun with other settings.
        Raises: NoSuchStudy: the name is taken by a study with other settings, and not to be renewed.
        """
        plain, told = json.loads(json.dumps(settings)), json.loads(json.dumps(about or {}))
        with self._begin() as connection:
            query = sa.select(_study.c.settings, _study.c.result).where(_study.c.name == name)
            row = connection.execute(query).one_or_none()
            if row is not None and renew and (row.settings != plain or row.result is not None):
                self._delete(connection, name)
                row = None
            if row is None:
                connection.execute(_study.insert().values(name=name, settings=plain, about=told, created_at=_now()))
            elif row.settings == plain:
                # where the inputs lie now, and what was asked beside the settings
                connection.execute(_study.update().where(_study.c.name == name).values(about=told))
            else:
                known = row.settings
                other = sorted(key for key in {*known, *plain} if known.get(key) != plain.get(key))
                raise NoSuchStudy(
                    f"study {name!r} in {self.where}",
                    f"other settings: {', '.join(other)}",
                    "the settings it was begun with",
                    "choose another --study, or start it anew with --fresh",
                )

    def record(self, study: str, record: Record) -> None:
        """Write one finished trial, in one commit. Raises: LedgerError: also where another run wrote the same trial."""
        with self._begin() as connection:
            connection.execute(
                _evaluation.insert().values(
                    study=self._id(connection, study),
                    trial=record.trial,
                    digest=record.digest,
                    fidelity=record.fidelity,
                    state=record.state,
                    reason=record.reason,
                    deployment=dict(record.deployment),
                    values=[each.to_dict() for each in record.evaluations],
                    created_at=_now(),
                )
            )

    def records(self, study: str) -> list[Record]:
        """Everything known of a study, in order of trial. Raises: NoSuchStudy."""
        with self._begin() as connection:
            query = sa.select(_evaluation).where(_evaluation.c.study == self._id(connection, study))
            rows = connection.execute(query.order_by(_evaluation.c.trial, _evaluation.c.id)).mappings().all()
        return [
            Record(
                trial=row["trial"],
                digest=row["digest"],
                fidelity=row["fidelity"],
                evaluations=tuple(Evaluation.from_dict(each) for each in row["values"]),
                deployment=row["deployment"],
                state=row["state"],
                reason=row["reason"],
            )
            for row in rows
        ]

    def finish(self, study: str, result: Mapping[str, Any]) -> None:
        """Keep what a study ended with."""
        with self._begin() as connection:
            which = _study.c.id == self._id(connection, study)
            connection.execute(_study.update().where(which).values(result=dict(result)))

    def study(self, name: str) -> StudyRow:
        """Raises: NoSuchStudy."""
        for row in self.studies():
            if row.name == name:
                return row
        raise self._missing(name)

    def studies(self) -> list[StudyRow]:
        """All studies, oldest first."""
        trials = sa.select(sa.func.count()).where(_evaluation.c.study == _study.c.id).scalar_subquery()
        with self._begin() as connection:
            rows = connection.execute(sa.select(_study, trials.label("trials")).order_by(_study.c.id)).mappings().all()
        return [
            StudyRow(row["name"], row["settings"], row["about"], row["result"], row["created_at"], row["trials"])
            for row in rows
        ]

    def delete(self, name: str) -> None:
        """Forget a study and its evaluations. Raises: NoSuchStudy."""
        with self._begin() as connection:
            self._delete(connection, name)

    def _delete(self, connection: sa.Connection, name: str) -> None:
        which = self._id(connection, name)
        connection.execute(_evaluation.delete().where(_evaluation.c.study == which))
        connection.execute(_study.delete().where(_study.c.id == which))

    def _id(self, connection: sa.Connection, name: str) -> int:
        found = connection.execute(sa.select(_study.c.id).where(_study.c.name == name)).scalar_one_or_none()
        if found is None:
            raise self._missing(name)
        return int(found)

    def _missing(self, name: str) -> NoSuchStudy:
        return NoSuchStudy(f"study in {self.where}", name, "a study that was begun there", "list them, or tune first")

    def _create(self) -> None:
        with self._begin() as connection:
            _metadata.create_all(connection)
            version = connection.execute(sa.select(_schema.c.version)).scalar_one_or_none()
            if version is None:
                connection.execute(_schema.insert().values(version=SCHEMA_VERSION))
            elif version != SCHEMA_VERSION:
                raise LedgerError(
                    self.where,
                    f"schema version {version}",
                    str(SCHEMA_VERSION),
                    "update paretune, or use another ledger",
                )

    @contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except (sa.exc.DBAPIError, OSError) as error:
            found = error.orig if isinstance(error, sa.exc.DBAPIError) else error
            first = str(found).strip().splitlines()[0] if str(found).strip() else type(found).__name__
            todo = "free the disk, wait for the other run, or choose another ledger; nothing that was kept is lost"
            raise LedgerError(self.where, first, "a database that can be read and written", todo) from None


def database_url(text: str) -> sa.URL:
    """A database URL; `postgresql://` is served by the driver that paretune installs. Raises: sqlalchemy's errors."""
    url = sa.make_url(text)
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


def _connect_args(url: sa.URL) -> dict[str, Any]:
    if url.drivername.startswith("sqlite"):
        return {"timeout": BUSY_TIMEOUT_S}
    return {"connect_timeout": int(BUSY_TIMEOUT_S)} if url.drivername.startswith("postgresql") else {}


def _prepare_sqlite(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    # a reader (a report, a copy) must not stop the writer; what is committed must survive a power cut
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
