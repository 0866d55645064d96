"""Bad input, full disks and interruptions: one clear message, the right exit code, and nothing half written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from paretune.optimizer.store import Ledger, Record
from paretune.runtime.random_model import write_random_model
from paretune.traces import read, write

from .cli_examples import TARGET, TUNE, Ended, ended, files, in_folder, paretune, start, tuned_folder, write_inputs

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROWS = ("2023-11-16 18:15:46.680590,374,44\n", "2023-11-16 18:15:50.995156,396,109\n")
POOL = {"max_model_len": 64, "num_kv_blocks": 16, "max_num_seqs": 4, "max_num_batched_tokens": 64}


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Path]:
    """A folder with a good log, a good model's sizes, and a spec of it."""
    write_inputs(tmp_path)
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({"model": "model", "pools": [{"accelerator": "H100"}]}))
    with in_folder(tmp_path) as folder:
        yield folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a log, a finished study of it, and the spec that was picked. Read only."""
    return tuned_folder(tmp_path_factory.mktemp("tuned"))


def refused(done: Ended, exit_code: int, *words: str) -> None:
    """It said one thing on stderr, with these words, and nothing on stdout."""
    said = [line for line in done.stderr.splitlines() if not line.endswith(" ...")]
    assert done.exit_code == exit_code, done.stderr
    assert len(said) == 1, done.stderr
    assert said[0].startswith(("error: ", "paretune serve: "))
    assert all(word in said[0] for word in words), done.stderr
    assert done.stdout == ""


# request logs

BAD_LOGS = {
    "empty": ("", "empty"),
    "only a header": (HEADER, ":2"),
    "truncated": ((HEADER + "".join(ROWS))[:-9], ":3", "cut off"),
    "unsorted": (HEADER + ROWS[1] + ROWS[0], ":3", "TIMESTAMP", "sort"),
    "negative": (HEADER + ROWS[0].replace(",44", ",-4"), ":2", "GeneratedTokens", "'-4'"),
    "NaN": (HEADER + ROWS[0].replace("374", "NaN"), ":2", "ContextTokens", "'NaN'"),
    "a column twice": (HEADER.replace("\n", ",ContextTokens\n") + ROWS[0].replace("\n", ",1\n"), ":1", "twice"),
    "a header twice": (HEADER + ROWS[0] + HEADER + ROWS[1], ":3", "TIMESTAMP"),
    "another format": ("<html><body>not found</body></html>", ":1", "azure"),
    "JSON cut off": ('{"timestamp": 1, "input_length": 5, "output_le', ":1", "whole JSON object"),
    "JSON with NaN": ('{"timestamp": NaN, "input_length": 5, "output_length": 5, "hash_ids": []}\n', ":1", "NaN"),
    "Parquet cut off": ("PAR1" + "x" * 100, "Parquet", "cut off"),
}


@pytest.mark.parametrize("name", BAD_LOGS)
def test_a_bad_log_is_refused_where_it_is_bad_by_every_command_that_reads_one(here: Path, name: str) -> None:
    text, *words = BAD_LOGS[name]
    Path("bad.log").write_text(text)
    before = files(here)
    commands = [
        ["trace", "describe", "bad.log"],
        ["trace", "check", "bad.log"],
        ["trace", "convert", "bad.log", "-o", "out.parquet"],
        ["simulate", "bad.log", "--spec", "spec.yaml"],
        ["tune", "bad.log", *TUNE[2:]],
        ["replay", "bad.log", "--url", "http://127.0.0.1:9"],
        ["verify", "spec.yaml", "bad.log"],
    ]
    for command in commands:
        refused(paretune(*command), 2, "bad.log", *words)
    assert files(here) == before


def test_an_error_comes_as_json_too(here: Path) -> None:
    Path("bad.log").write_text("")
    done = paretune("trace", "check", "bad.log", "--json")
    assert done.json["exit_code"] == done.exit_code == 2
    assert done.json["data"] is None
    assert f"error: {done.json['error']}\n" == done.stderr


def test_a_log_that_is_not_the_named_format_is_refused(here: Path) -> None:
    refused(paretune("trace", "check", "log.csv", "--format", "mooncake"), 2, "log.csv:1")


# specs

BAD_SPECS = {
    "unknown field": ("model: model\npools: [{max_num_sequences: 4}]", "pools.0.max_num_sequences", "unknown field"),
    "impossible combination": ("pools: [{enable_chunked_prefill: false, max_num_batched_tokens: 256}]", "chunked"),
    "KV cache too small": ("pools: [{num_kv_blocks: 1}]", "num_kv_blocks"),
    "a number out of range": ("pools: [{replicas: 0}]", "pools.0.replicas", "0"),
    "infinity": ("pools: [{replicas: .inf}]", "pools.0.replicas"),
    "two documents": ("model: model\n---\nmodel: model\n", "document"),
    "a key twice": ("model: model\nmodel: other\n", "model", "twice"),
    "deeply nested": ("model: " + "[" * 100_000, "32"),
    "an alias bomb": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "alias"),
    "an object of Python": ("model: !!python/object/apply:os.system ['touch pwned']\n", "python/object"),
    "more than 1 MiB": ("model: " + "x" * (2 << 20), "1,048,576"),
    "not a mapping": ("- model\n", "mapping"),
    "not UTF-8": (b"model: \xff\xfe", "UTF-8"),
    "empty": ("", "mapping"),
    "of a later version": ("schema_version: 2\n", "schema_version", "update"),
}


@pytest.mark.parametrize("name", BAD_SPECS)
def test_a_bad_spec_is_refused_by_every_command_that_reads_one(here: Path, name: str) -> None:
    content, *words = BAD_SPECS[name]
    Path("bad.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    before = files(here)
    commands = [
        ["simulate", "log.csv", "--spec", "bad.yaml"],
        ["export", "bad.yaml", "-o", "out.yaml"],
        ["serve", "bad.yaml", "--port", "0"],
        ["verify", "bad.yaml", "log.csv"],
        [*TUNE, "--baseline", "bad.yaml"],
    ]
    for command in commands:
        done = paretune(*command)
        refused(done, 2, "bad.yaml", *words)
        assert len(done.stderr) < 600
        shutil.rmtree("out", ignore_errors=True)
    assert files(here) == before


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("fields: {max_num_seqs: []}", "no values"),
        ("fields: {no_such_field: [1]}", "no_such_field"),
        ("fields: {max_num_seqs: [0]}", "max_num_seqs"),
        ("fields: {replicas: [1, 1]}", "once"),
        ("[1, 2]", "mapping"),
    ],
)
def test_a_bad_space_is_refused(here: Path, text: str, word: str) -> None:
    Path("space.yaml").write_text(text)
    refused(paretune(*TUNE), 2, "space", word)


@pytest.mark.parametrize("text", ["trial: 3", "schema_version: 9", "cost: foo", "trials: 0"])
def test_bad_settings_are_refused_by_name(here: Path, text: str) -> None:
    Path("paretune.yaml").write_text(f"{text}\n")
    refused(paretune("front"), 2, "paretune.yaml", text.partition(":")[0])


@pytest.mark.parametrize("option", ["--time-budget=nan", "--time-budget=inf", "--time-budget=-1"])
def test_a_number_that_is_none_is_refused(here: Path, option: str) -> None:
    done = paretune(*TUNE, option)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--time-budget" in done.stderr
    assert not Path("out").exists()


@pytest.mark.parametrize("budget", ["-1", "0", "nan"])
def test_a_budget_of_nothing_is_no_budget(here: Path, budget: str) -> None:
    done = paretune("pick", "--budget", budget)
    assert done.exit_code == 2
    assert "--budget" in done.stderr


def test_an_accelerator_that_nobody_knows_is_not_exported(here: Path) -> None:
    Path("spec.yaml").write_text(yaml.safe_dump({"model": "/elsewhere", "pools": [{"accelerator": "nonsuch"}]}))
    refused(paretune("export", "spec.yaml"), 2, "nonsuch", "H100")
    # the model may lie on another machine
    Path("spec.yaml").write_text(yaml.safe_dump({"model": "/elsewhere", "pools": [{"accelerator": "h100"}]}))
    assert paretune("export", "spec.yaml").exit_code == 0


def test_only_accelerators_with_rates_are_named_as_allowed(here: Path) -> None:
    unknown = paretune(*TUNE, "--accelerator", "H1000")
    refused(unknown, 2, "cpu", "H100")
    assert "A10G" not in unknown.stderr
    rateless = paretune(*TUNE, "--accelerator", "A10G")
    refused(rateless, 2, "A10G", "no source gives one", "H100")


def test_a_percentile_that_no_curve_has_is_refused_before_the_study(here: Path) -> None:
    before = files(here)
    refused(paretune(*TUNE, "--metric", "ttf30:p75"), 2, "p75", "p50, p90, p95, p99")
    assert {name: text for name, text in files(here).items() if not name.startswith("out/")} == before


def test_what_is_not_there_is_named(here: Path) -> None:
    refused(paretune("tune", "log.csv", "--model", "nowhere"), 2, "nowhere")
    refused(paretune("tune", "log.csv", "--model", "model", "--profile", "nowhere.json"), 2, "nowhere.json", "profile")
    refused(paretune("front", "nothing"), 2, "nothing")
    Path("paretune.yaml").write_text("log: log.csv\n")
    refused(paretune("retune"), 2, "out/spec.yaml")
    assert paretune("tune", "nowhere.csv").exit_code == 2
    assert paretune(*TUNE, "--accelerator", "no-such-chip").exit_code == 2
    assert paretune(*TUNE, "--slo", "ttf30").exit_code == 2


def test_a_changed_profile_and_a_file_that_is_no_ledger_are_refused(here: Path) -> None:
    Path("profile.json").write_text('{"schema_version": 1, "digest": "0"}')
    refused(paretune("tune", "log.csv", "--model", "model", "--profile", "profile.json"), 2, "profile.json")
    Path("tiles.json").write_text("{}")
    refused(paretune("kernels", "show", "tiles.json"), 2, "tiles.json")
    Path("ledger.db").write_text("this is no database, and was never one\n" * 50)
    before = files(here)
    refused(paretune(*TUNE, "--storage", "ledger.db"), 1, "ledger.db", "not a database")
    assert files(here) == before


# models


def missing_shard(folder: Path) -> str:
    (folder / "model-00002-of-00002.safetensors").unlink()
    return "model-00002-of-00002.safetensors"


def pickled(folder: Path) -> str:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return "pickle"


def mismatched(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    return "shape (64, 32)"


def cut_off(folder: Path) -> str:
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    return "model-00001-of-00002.safetensors"


def of_another_kind(folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return "model_type"


def without_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json"


def random_model(folder: Path) -> Path:
    return write_random_model(
        folder / "random", family="llama", vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, shards=2,
    )  # fmt: skip


@pytest.mark.parametrize("damage", [missing_shard, pickled, mismatched, cut_off], ids=lambda damage: damage.__name__)
def test_a_damaged_model_is_not_served(tmp_path: Path, damage: Callable[[Path], str]) -> None:
    word = damage(random_model(tmp_path))
    spec = {"model": "random", "pools": [{**POOL, "weight_dtype": "fp32"}]}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    before = files(tmp_path)
    refused(ended(start("serve", "spec.yaml", "--port", "0", cwd=tmp_path)), 2, word)
    assert files(tmp_path) == before


def test_verify_refuses_a_mistyped_application_before_it_starts_a_server(tmp_path: Path) -> None:
    random_model(tmp_path)
    spec = {"model": "random", "pools": [{**POOL, "weight_dtype": "fp32"}]}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    (tmp_path / "log.csv").write_text(HEADER + ROWS[0].replace("374", "7"))
    with in_folder(tmp_path):
        before = files(tmp_path)
        done = paretune("verify", "spec.yaml", "log.csv", "--slo", "vioce/ttf30:p95<=600ms")
    refused(done, 2, "vioce/ttf30:p95<=600ms", "no request that it governs")
    assert files(tmp_path) == before


def test_verify_ends_as_the_server_that_it_starts(tmp_path: Path) -> None:
    word = mismatched(random_model(tmp_path))
    spec = {"model": "random", "pools": [{**POOL, "weight_dtype": "fp32"}]}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    (tmp_path / "log.csv").write_text(HEADER + ROWS[0].replace("374", "7"))
    refused(ended(start("verify", "spec.yaml", "log.csv", cwd=tmp_path)), 2, word)


@pytest.mark.parametrize("damage", [of_another_kind, without_config], ids=lambda damage: damage.__name__)
def test_a_model_without_sizes_is_refused_by_every_command_that_reads_them(
    here: Path, damage: Callable[[Path], str]
) -> None:
    word = damage(here / "model")
    for command in (["simulate", "log.csv", "--spec", "spec.yaml"], [*TUNE], ["serve", "spec.yaml", "--port", "0"]):
        refused(paretune(*command), 2, "config.json", word)


# ports and disks


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    random_model(tmp_path)
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({"model": "random", "pools": [POOL]}))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = ended(start("serve", "spec.yaml", "--port", str(port), cwd=tmp_path))
    refused(done, 1, f"127.0.0.1:{port}", "in use")


def at_most(size: int) -> Callable[[], None]:
    """For a child: no file beyond `size` bytes, which is what a full disk looks like to a writer."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


FULL_DISK: dict[str, tuple[list[str], int, str]] = {
    "convert": (["trace", "convert", "log.csv", "-o", "old.txt"], 500, "old.txt"),
    "export": (["export", "out/spec.yaml", "-o", "old.txt"], 50, "old.txt"),
    "tune": ([*TUNE, "--storage", "new.db"], 4096, "new.db"),
}


@pytest.mark.parametrize("name", FULL_DISK)
def test_a_full_disk_leaves_the_old_file_and_no_other(tuned: Path, tmp_path: Path, name: str) -> None:
    command, size, word = FULL_DISK[name]
    folder = tmp_path / "copy"
    shutil.copytree(tuned, folder)
    (folder / "old.txt").write_text("what was there before\n")
    before = files(folder)
    refused(ended(start(*command, cwd=folder, preexec_fn=at_most(size))), 1, word)
    after = files(folder)
    # what SQLite had begun, and rolls back when it is opened next
    for path in ("new.db", "new.db-journal"):
        after.pop(path, None)
    assert after == before


@pytest.mark.parametrize(
    "command",
    [
        ["trace", "convert", "log.csv", "-o", "old.txt"],
        ["pick", "-o", "old.txt"],
        ["export", "out/spec.yaml", "-o", "old.txt"],
        ["report", "-o", "old.txt"],
        ["report", "-o", "old.txt", "--plots"],
        ["init", "new"],
    ],
    ids=" ".join,
)
def test_a_disk_that_fills_at_the_last_moment_leaves_the_old_file_and_no_other(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shutil.copytree(tuned, tmp_path / "copy")
    with in_folder(tmp_path / "copy") as folder:
        Path("old.txt").write_text("what was there before\n")
        before = files(folder)
        monkeypatch.setattr(os, "fsync", full)
        refused(paretune(*command), 1, "new" if command[0] == "init" else "old.txt", "No space left", "free some space")
        assert files(folder) == before


@pytest.mark.parametrize("arguments", [["front"], ["front", "--json"]], ids=" ".join)
def test_a_full_disk_below_stdout_is_said_on_stderr(tuned: Path, arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        refused(ended(start(*arguments, cwd=tuned, stdout=full)), 1, "standard output", "No space left")


def test_a_folder_that_may_not_be_written_is_named(here: Path) -> None:
    Path("file").write_text("")
    refused(paretune("trace", "convert", "log.csv", "-o", "file/out.parquet"), 1, "file")
    refused(paretune(*TUNE, "--storage", "file/ledger.db"), 1, "file")


# interruptions


@pytest.fixture(scope="module")
def long_study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder to copy, and what `front --json` says of its study when nothing interrupts it."""
    folder = tmp_path_factory.mktemp("long")
    write_inputs(folder, requests=1500)
    space: dict[str, Any] = yaml.safe_load((folder / "space.yaml").read_text())
    space["fields"]["max_num_seqs"] = [2, 4, 8, 16, 32, 64, 128, 256]
    space["fields"]["max_num_batched_tokens"] = [256, 512, 1024, 2048, 4096]
    (folder / "space.yaml").write_text(yaml.safe_dump(space))
    whole = folder.with_name("whole")
    shutil.copytree(folder, whole)
    with in_folder(whole):
        assert paretune(*LONG).exit_code == 0
        return folder, paretune("front", "--json").stdout


LONG = (*TUNE, "--trials", "40", "--jobs", "1", "--seed", "3")


def trials_kept(folder: Path) -> int:
    ledger = folder / "out" / "paretune.db"
    if not ledger.exists():
        return 0
    with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True, timeout=5)) as connection:
        try:
            return int(connection.execute("select count(*) from paretune_evaluation").fetchone()[0])
        except sqlite3.OperationalError:
            return 0  # its tables are being made


def interrupt(process: subprocess.Popen[str], folder: Path, number: signal.Signals, after: int) -> Ended:
    """Send a signal once so many trials are kept."""
    deadline = time.monotonic() + 300
    while process.poll() is None and trials_kept(folder) < after:
        assert time.monotonic() < deadline, "the study did not get that far"
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()
    process.send_signal(number)
    return ended(process)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_an_interrupted_study_goes_on_to_the_same_front(
    long_study: tuple[Path, str], tmp_path: Path, number: signal.Signals
) -> None:
    inputs, front = long_study
    folder = tmp_path / "copy"
    shutil.copytree(inputs, folder)
    done = interrupt(start(*LONG, cwd=folder), folder, number, after=5)
    if number == signal.SIGKILL:
        assert done.exit_code == -signal.SIGKILL
    else:
        refused(done, 75, "study 'default'", "interrupted", "same command")
        assert {path.name for path in (folder / "out").iterdir()} == {"paretune.db"}
    with closing(sqlite3.connect(folder / "out" / "paretune.db")) as ledger:
        assert ledger.execute("pragma integrity_check").fetchall() == [("ok",)]
    with in_folder(folder):
        kept = trials_kept(folder)
        assert kept >= 5
        half = paretune("front", "--json")
        assert half.json["data"]["complete"] is False
        again = paretune(*LONG)
        assert again.exit_code == 0
        assert trials_kept(folder) >= kept
        shown = paretune("front", "--json").stdout
    assert shown == front


def test_a_study_interrupted_before_its_first_trial_can_go_on_too(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    os.mkfifo(tmp_path / "log.fifo")
    process = start("tune", "log.fifo", *TUNE[2:], cwd=tmp_path)
    # opening our end waits until the command has opened its own
    with open(tmp_path / "log.fifo", "wb"):
        process.send_signal(signal.SIGTERM)
        refused(ended(process), 75, "interrupted", "same command")
    assert not (tmp_path / "out").exists()


def test_a_command_that_cannot_go_on_says_only_that_it_was_interrupted(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log.fifo")
    process = start("trace", "describe", "log.fifo", cwd=tmp_path)
    with open(tmp_path / "log.fifo", "wb"):
        process.send_signal(signal.SIGINT)
        refused(ended(process), 130, "interrupted")


def test_an_interrupted_writer_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    (tmp_path / "old.parquet").write_text("what was there before\n")
    before = files(tmp_path)
    for wait_s in (0.3, 0.5, 0.7):
        process = start("trace", "convert", "log.csv", "-o", "old.parquet", cwd=tmp_path)
        time.sleep(wait_s)
        process.send_signal(signal.SIGTERM)
        done = ended(process)
        # ended by the signal itself where Python was not up yet
        assert done.exit_code in (0, 130, -signal.SIGTERM)
        # a signal that comes after the file has been replaced comes too late
        if done.exit_code == 0 or files(tmp_path) != before:
            assert done.exit_code != -signal.SIGTERM
            assert len(read(tmp_path / "old.parquet")) == 60
            (tmp_path / "old.parquet").write_text("what was there before\n")
        assert files(tmp_path) == before


def test_a_writer_interrupted_in_the_middle_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_inputs(tmp_path)
    (tmp_path / "old.parquet").write_text("what was there before\n")
    before = files(tmp_path)

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(read(tmp_path / "log.csv"), tmp_path / "old.parquet")
    assert files(tmp_path) == before


def test_debug_shows_the_traceback_of_an_error(here: Path) -> None:
    Path("bad.log").write_text("")
    done = ended(start("--debug", "trace", "check", "bad.log", cwd=here))
    assert done.exit_code == 1
    assert "Traceback" in done.stderr
    assert "BadTrace" in done.stderr


def test_targets_come_from_the_log_or_from_the_command(here: Path) -> None:
    without = [word for word in TUNE if word not in ("--slo", TARGET)]
    assert paretune("trace", "convert", "log.csv", "-o", "log.parquet", "--target", TARGET).exit_code == 0
    assert paretune("tune", "log.parquet", *without[2:], "--trials", "3").exit_code == 0
    done = paretune("tune", "log.parquet", *without[2:], "--trials", "3", "--slo", "ttft:p50<=1s")
    refused(done, 2, "other settings")


def test_a_ctrl_c_just_after_a_commit_neither_loses_the_trial_nor_writes_it_twice(
    here: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, written = Ledger.record, []

    def interrupted(self: Ledger, study: str, trial: Record) -> None:
        record(self, study, trial)
        written.append(trial.digest)
        if len(written) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "record", interrupted)
    refused(paretune(*TUNE, "--trials", "20"), 75, "interrupted")
    monkeypatch.undo()
    assert trials_kept(here) == len(written) == len(set(written)) >= 4
    assert paretune(*TUNE, "--trials", "20").exit_code == 0
    again = paretune("front", "--json").stdout
    with in_folder(tuned):
        assert again == paretune("front", "--json").stdout


def test_serving_more_threads_than_there_are_cores_is_warned_of(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paretune.runtime import server

    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(server, "serve", lambda *arguments, **options: 0)
    Path("spec.yaml").write_text(yaml.safe_dump({"model": "model", "pools": [{**POOL, "num_threads": 900}]}))
    assert "warning: 900 threads on " in paretune("serve", "spec.yaml").stderr
    Path("spec.yaml").write_text(yaml.safe_dump({"model": "model", "pools": [{**POOL, "num_threads": 1}]}))
    assert paretune("serve", "spec.yaml").stderr == ""


def test_a_demo_that_is_interrupted_goes_on_when_it_is_typed_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paretune import demo

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    refused(paretune("demo"), 75, "type the same command again to go on")


def test_a_server_that_is_not_there_is_named(here: Path) -> None:
    done = paretune("replay", "log.csv", "--url", "http://127.0.0.1:9")
    refused(done, 1, "127.0.0.1:9")
