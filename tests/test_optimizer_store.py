import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import optuna
import pytest

from paretune.optimizer.optuna_mirror import OptunaMirror
from paretune.optimizer.store import Ledger, LedgerError, NoSuchStudy, Record, StudyRow

from .conftest import missing
from .optimizer_examples import evaluation, small_space

SETTINGS = {"seed": 1, "targets": ["ttf30:p95<=1s"]}


def record(trial: int, fidelity: str = "simulated", digest: str | None = None) -> Record:
    each = evaluation(1.0 + trial, 0.2, trial, fidelity=fidelity)
    return Record(trial, digest or f"digest{trial}", fidelity, (each,), each.deployment.model_dump(mode="json"))  # type: ignore[arg-type]


def postgres_programs() -> Path:
    found = [path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    link = shutil.which("initdb") or shutil.which("postgres")
    if link:
        found.append(Path(link).resolve().parent)
    found = [folder for folder in found if (folder / "initdb").exists()]
    if not found:
        missing("PostgreSQL", "apt-get install postgresql")
    return found[-1]


@pytest.fixture(scope="session")
def postgres_url():
    """A PostgreSQL server of our own, on a free port, as a user that is not root (it refuses to run as root)."""
    try:
        import psycopg
    except ModuleNotFoundError:
        missing("psycopg", "pip install 'paretune[postgres]'")
    programs = postgres_programs()
    with tempfile.TemporaryDirectory(prefix="paretune-postgres-") as folder:
        yield from _postgres(Path(folder), programs, psycopg)


def _postgres(folder: Path, programs: Path, psycopg: ModuleType) -> Iterator[str]:
    as_user: dict[str, object] = {}
    if os.getuid() == 0:
        # pytest's own folders are root's alone, and each pytest that starts makes them so again
        as_user = {"user": 65534, "group": 65534, "extra_groups": []}
        os.chown(folder, 65534, 65534)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = folder / "data"
    options = {"check": True, "capture_output": True, "cwd": folder, **as_user}
    subprocess.run([programs / "initdb", "-D", data, "-U", "paretune", "-A", "trust", "-N"], **options)  # type: ignore[call-overload]
    settings = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]
    server = subprocess.Popen(
        [programs / "postgres", "-D", data, "-p", str(port), *settings],
        cwd=folder,
        stderr=subprocess.DEVNULL,
        **as_user,  # type: ignore[arg-type]
    )
    try:
        url = f"postgresql://paretune@127.0.0.1:{port}/postgres"
        _wait_for(lambda: psycopg.connect(url).close(), psycopg.OperationalError, server)
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)


def _wait_for(connect, refused: type[Exception], server: subprocess.Popen[bytes]) -> None:
    """Return when it takes connections: its port opens earlier, while it recovers."""
    deadline = time.monotonic() + 60
    while True:
        try:
            connect()
            return
        except refused:
            assert server.poll() is None, "PostgreSQL did not start"
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger(request, tmp_path):
    if request.param == "sqlite":
        with Ledger(tmp_path / "new" / "folder" / "ledger.db") as opened:
            yield opened
        return
    with Ledger(request.getfixturevalue("postgres_url")) as opened:
        yield opened
        for study in opened.studies():
            opened.delete(study.name)


class TestEveryLedger:
    """What must hold on every database."""

    def test_a_trial_is_read_back_as_it_was_written(self, ledger):
        ledger.open_study("night", SETTINGS, {"log": "a.csv"})
        written = [record(0), record(1), record(1, "measured")]
        for each in written:
            ledger.record("night", each)
        found = ledger.records("night")
        assert [(each.trial, each.digest, each.fidelity, each.state) for each in found] == [
            (each.trial, each.digest, each.fidelity, "ok") for each in written
        ]
        assert [each.evaluations[0].to_dict() for each in found] == [each.evaluations[0].to_dict() for each in written]

    def test_a_failed_trial_keeps_its_reason(self, ledger):
        ledger.open_study("night", SETTINGS)
        plain = record(0)
        ledger.record("night", Record(3, "x", "measured", (), plain.deployment, "failed", "out of <memory>; 'quoted'"))
        found = ledger.records("night")[0]
        assert (found.state, found.reason, found.evaluations) == ("failed", "out of <memory>; 'quoted'", ())

    def test_a_candidate_is_kept_once_at_each_fidelity(self, ledger):
        ledger.open_study("night", SETTINGS)
        ledger.record("night", record(0))
        with pytest.raises(LedgerError):
            ledger.record("night", record(5, digest="digest0"))
        assert len(ledger.records("night")) == 1

    def test_the_same_settings_go_on_and_others_are_refused(self, ledger):
        ledger.open_study("night", SETTINGS)
        ledger.record("night", record(0))
        ledger.open_study("night", dict(reversed(SETTINGS.items())))
        assert len(ledger.records("night")) == 1
        with pytest.raises(NoSuchStudy, match="seed"):
            ledger.open_study("night", {**SETTINGS, "seed": 2})

    def test_a_study_is_renewed_where_it_has_ended_or_its_settings_are_others(self, ledger):
        ledger.open_study("night", SETTINGS)
        ledger.open_study("day", SETTINGS)
        ledger.record("day", record(0))
        for settings, ended, kept in ((SETTINGS, False, 1), (SETTINGS, True, 0), ({**SETTINGS, "seed": 2}, False, 0)):
            ledger.open_study("night", SETTINGS, renew=True)
            ledger.record("night", record(0))
            if ended:
                ledger.finish("night", {"front": []})
            ledger.open_study("night", settings, renew=True)
            assert len(ledger.records("night")) == kept
            ledger.delete("night")
        assert len(ledger.records("day")) == 1

    def test_studies_are_listed_and_deleted_apart(self, ledger):
        for name in ("one", "<script>", "日本 'quoted'"):
            ledger.open_study(name, SETTINGS, {"log": name})
            ledger.record(name, record(0))
        ledger.finish("one", {"front": [1, 2]})
        assert [(row.name, row.trials, row.result) for row in ledger.studies()] == [
            ("one", 1, {"front": [1, 2]}),
            ("<script>", 1, None),
            ("日本 'quoted'", 1, None),
        ]
        assert ledger.study("<script>").about == {"log": "<script>"}
        ledger.delete("one")
        assert [row.name for row in ledger.studies()] == ["<script>", "日本 'quoted'"]
        assert len(ledger.records("<script>")) == 1

    def test_what_is_not_there_is_said_by_name(self, ledger):
        for ask in (ledger.records, ledger.study, ledger.delete, lambda name: ledger.finish(name, {})):
            with pytest.raises(NoSuchStudy) as caught:
                ask("nobody")
            assert caught.value.found == "nobody"
            assert caught.value.exit_code == 2


def test_a_ledger_is_still_there_when_it_is_opened_again(tmp_path):
    path = tmp_path / "ledger.db"
    with Ledger(path) as first:
        first.open_study("night", SETTINGS)
        first.record("night", record(0))
    with Ledger(path) as second:
        assert len(second.records("night")) == 1


_WRITER = """
import sys
from tests.test_optimizer_store import SETTINGS, record
from paretune.optimizer.store import Ledger
ledger = Ledger(sys.argv[1])
ledger.open_study("night", SETTINGS)
trial = len(ledger.records("night"))
while True:
    ledger.record("night", record(trial))
    print(trial, flush=True)
    trial += 1
"""


def test_a_killed_writer_loses_no_trial_that_it_had_finished(tmp_path):
    path, here = tmp_path / "ledger.db", Path(__file__).parent.parent
    acknowledged = -1
    for kill in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True, cwd=here
        )
        assert writer.stdout is not None
        for _ in range(3 + kill):
            acknowledged = int(writer.stdout.readline())
        writer.kill()
        rest = writer.stdout.read().split()
        acknowledged = int(rest[-1]) if rest and rest[-1].isdigit() else acknowledged
        writer.wait()
        with Ledger(path) as ledger:
            trials = [each.trial for each in ledger.records("night")]
        assert trials == list(range(len(trials)))
        assert len(trials) >= acknowledged + 1
        with sqlite3.connect(path) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def _write_on(ledger):
    for trial in range(1, 200):
        ledger.record("night", record(trial))


def test_a_full_disk_is_one_clear_error_and_what_was_kept_stays(tmp_path):
    path = tmp_path / "ledger.db"
    with Ledger(path) as ledger:
        ledger.open_study("night", SETTINGS)
        ledger.record("night", record(0))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, hard))
        try:
            with pytest.raises(LedgerError) as caught:
                _write_on(ledger)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)
        assert caught.value.exit_code == 1
        assert "free the disk" in str(caught.value)
    with Ledger(path) as ledger:
        kept = [each.trial for each in ledger.records("night")]
    assert kept == list(range(len(kept)))
    assert kept


def test_a_locked_ledger_is_said_to_be_locked(tmp_path, monkeypatch):
    monkeypatch.setattr("paretune.optimizer.store.BUSY_TIMEOUT_S", 0.1)
    path = tmp_path / "ledger.db"
    with Ledger(path) as ledger:
        ledger.open_study("night", SETTINGS)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        try:
            with pytest.raises(LedgerError, match="locked"):
                ledger.record("night", record(0))
        finally:
            other.close()
        ledger.record("night", record(0))


def test_a_file_that_is_no_ledger_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes, not a database\n" * 100)
    with pytest.raises(LedgerError, match="not a database"):
        Ledger(path)
    assert path.read_text() == "my notes, not a database\n" * 100


def test_a_ledger_of_a_newer_paretune_is_refused(tmp_path):
    path = tmp_path / "ledger.db"
    Ledger(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE paretune_schema SET version = 99")
    with pytest.raises(LedgerError, match="schema version 99"):
        Ledger(path)


@pytest.mark.parametrize("where", ["nonsense://", "postgresql://nobody@127.0.0.1:9/none", "/proc/nowhere/ledger.db"])
def test_an_address_where_no_ledger_can_be_is_one_clear_error(where):
    with pytest.raises(LedgerError) as caught:
        Ledger(where)
    assert caught.value.exit_code == 1


def test_a_password_stays_out_of_messages():
    with pytest.raises(LedgerError) as caught:
        Ledger("postgresql://me:secret@127.0.0.1:9/none")
    assert "secret" not in str(caught.value)


def study_row(created_at: str = "2026-11-23T00:00:00+00:00", **changes: object) -> StudyRow:
    settings = {**SETTINGS, "metric": "ttf30", "percentile": 95.0, "cost": "capacity", **changes}
    return StudyRow("night", settings, {}, None, created_at, 0)


def test_trials_are_mirrored_into_optunas_own_storage_once(tmp_path):
    url = f"sqlite:///{tmp_path}/optuna.db"
    failed = Record(2, "x", "simulated", (), record(2).deployment, "failed", "too slow")
    records = [record(0), record(1), failed]
    assert OptunaMirror(url).add(study_row(), records, small_space()) == 3
    assert OptunaMirror(url).add(study_row(), [*records, record(3)], small_space()) == 1
    mirrored = optuna.load_study(study_name="night", storage=url)
    assert [trial.values for trial in mirrored.trials] == [
        pytest.approx([0.2, 1.0]),
        pytest.approx([0.2, 2.0]),
        None,
        pytest.approx([0.2, 4.0]),
    ]
    assert mirrored.trials[2].state == optuna.trial.TrialState.FAIL


def test_a_study_that_was_begun_anew_replaces_its_mirror(tmp_path):
    url = f"sqlite:///{tmp_path}/optuna.db"
    OptunaMirror(url).add(study_row(), [record(0), record(1)], small_space())
    other = small_space(max_num_seqs=(4, 64))
    assert OptunaMirror(url).add(study_row("2026-11-24T00:00:00+00:00", seed=2), [record(0)], other) == 1
    assert len(optuna.load_study(study_name="night", storage=url).trials) == 1


def test_an_optuna_study_of_somebody_else_is_left_alone(tmp_path):
    url = f"sqlite:///{tmp_path}/optuna.db"
    theirs = optuna.create_study(study_name="night", storage=url)
    theirs.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(LedgerError, match="another program"):
        OptunaMirror(url).add(study_row(), [record(0)], small_space())
    assert len(optuna.load_study(study_name="night", storage=url).trials) == 1


@pytest.mark.parametrize("url", ["out/optuna.db", "nonsense://", "sqlite:////proc/nowhere/optuna.db"])
def test_an_address_where_no_mirror_can_be_is_one_clear_error(url):
    with pytest.raises(LedgerError, match="--optuna-storage"):
        OptunaMirror(url)


def test_the_mirrors_password_stays_out_of_messages():
    with pytest.raises(LedgerError) as caught:
        OptunaMirror("postgresql://me:secret@127.0.0.1:9/none")
    assert "secret" not in str(caught.value)


def test_our_tables_and_optunas_share_a_database(tmp_path):
    path = tmp_path / "both.db"
    with Ledger(path) as ledger:
        ledger.open_study("night", SETTINGS)
        OptunaMirror(f"sqlite:///{path}").add(study_row(cost="sizing"), [record(0)], small_space())
        ledger.record("night", record(0))
        assert len(ledger.records("night")) == 1
