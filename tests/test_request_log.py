"""The server's request log: what it writes, our own reader takes; what must not be in it is not."""

from __future__ import annotations

import json
import os
import resource
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.runtime.request_log import SALT_FILE, BadRequestLog, FinishedRequest, RequestLog
from paretune.traces import read, statistics


def finished(created: float, prompt: list[int], *, tokens: int = 5, app: str | None = None) -> FinishedRequest:
    return FinishedRequest(
        created=created,
        model="small",
        app=app,
        session=None,
        prompt_token_ids=np.array(prompt, dtype=np.int32),
        completion_tokens=tokens,
        cached_tokens=0,
        ttft_s=0.1,
        e2e_s=0.5,
        finish_reason="length",
    )


def write(path: Path, *requests: FinishedRequest, block_size: int = 4) -> None:
    log = RequestLog(path, block_size=block_size)
    for request in requests:
        log.write(request)
    log.close()


def test_what_is_written_in_order_of_completion_is_read_in_order_of_arrival(tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    write(log, finished(1e9 + 2.5, [1] * 9, app="chat"), finished(1e9 + 1.0, [2] * 7, tokens=3, app="voice"))
    trace = read(log)
    assert trace.arrival_s.tolist() == [0.0, 1.5]
    assert trace.input_tokens.tolist() == [7, 9]
    assert trace.output_tokens.tolist() == [3, 5]
    assert trace.app is not None
    assert trace.app.values() == ["voice", "chat"]
    assert statistics(trace) is not None


prompts = st.lists(st.integers(0, 3), min_size=1, max_size=20)


@settings(max_examples=30, deadline=None)
@given(st.lists(prompts, min_size=1, max_size=6), st.integers(1, 8))
def test_equal_hashes_in_the_log_mean_equal_prefixes(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[list[int]], block_size: int
) -> None:
    log = tmp_path_factory.mktemp("log") / "requests.jsonl"
    write(log, *(finished(1e9 + i, prompt) for i, prompt in enumerate(prompts)), block_size=block_size)
    prefix = read(log).prefix
    seen: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        hashes = [] if prefix is None else prefix.row(i).tolist()
        assert len(hashes) == len(prompt) // block_size
        for block, value in enumerate(hashes, start=1):
            assert seen.setdefault(value, prompt[: block * block_size]) == prompt[: block * block_size]
    whole = {tuple(p[: b * block_size]) for p in prompts for b in range(1, len(p) // block_size + 1)}
    assert len(seen) == len(whole), "equal prefixes must have equal hashes"


def test_a_log_that_is_continued_keeps_its_salt_and_its_block_size(tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    write(log, finished(1e9, [1, 2, 3, 4] * 3), block_size=4)
    write(log, finished(1e9 + 1, [1, 2, 3, 4] * 3), block_size=8)
    prefix = read(log).prefix
    assert prefix is not None
    assert prefix.block_size == 4
    assert prefix.row(0).tolist() == prefix.row(1).tolist()


def test_another_folder_hashes_the_same_prompt_to_other_values(tmp_path: Path) -> None:
    rows = []
    for name in ("a", "b"):
        log = tmp_path / name / "requests.jsonl"
        write(log, finished(1e9, [1, 2, 3, 4]))
        rows += json.loads(log.read_text())["prefix_hashes"]
    assert rows[0] != rows[1]


def test_the_salt_is_for_its_owner_alone_and_not_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    write(log, finished(1e9, [1, 2, 3, 4]))
    salt = tmp_path / SALT_FILE
    assert stat.S_IMODE(salt.stat().st_mode) == 0o600
    assert json.loads(salt.read_text())["salt"] not in log.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [SALT_FILE, log.name]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_salt_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    write(tmp_path / "requests.jsonl", finished(1e9, [1]))
    (tmp_path / SALT_FILE).chmod(mode)
    with pytest.raises(BadRequestLog, match="chmod 600") as error:
        RequestLog(tmp_path / "requests.jsonl", block_size=4)
    assert error.value.exit_code == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"salt": "00", "block_size": 4}', '{"salt": "zz"}'])
def test_a_damaged_salt_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / SALT_FILE).write_text(content)
    (tmp_path / SALT_FILE).chmod(0o600)
    with pytest.raises(BadRequestLog, match=SALT_FILE):
        RequestLog(tmp_path / "requests.jsonl", block_size=4)


def test_half_a_line_left_by_a_crash_is_dropped_and_whole_ones_stay(tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    write(log, finished(1e9, [1] * 8), finished(1e9 + 1, [1] * 8))
    whole = log.read_bytes()
    for cut in range(len(whole) // 2 + 1, len(whole) - 1, 7):
        log.write_bytes(whole[:cut])
        write(log, finished(1e9 + 2, [1] * 8))
        assert len(read(log)) == 2


def test_a_whole_last_line_without_its_line_end_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    write(log, finished(1e9, [1] * 8))
    log.write_bytes(log.read_bytes().rstrip(b"\n"))
    write(log, finished(1e9 + 1, [1] * 8))
    assert len(read(log)) == 2


def test_a_file_that_is_no_request_log_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    precious = tmp_path / "spec.yaml"
    precious.write_text("model: small\nno line end")
    with pytest.raises(BadRequestLog, match=r"spec\.yaml"):
        RequestLog(precious, block_size=4)
    assert precious.read_text() == "model: small\nno line end"


def test_a_folder_in_the_place_of_the_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequestLog):
        RequestLog(tmp_path, block_size=4)


def test_a_full_disk_leaves_whole_lines_and_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "requests.jsonl"
    log = RequestLog(path, block_size=4)
    log.write(finished(1e9, [1] * 8))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, before[1]))
    try:
        log.write(finished(1e9 + 1, [1] * 8))
        log.write(finished(1e9 + 2, [1] * 8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.write(finished(1e9 + 3, [1] * 8))
    log.close()
    assert log.failed_writes == 2
    assert capsys.readouterr().err.count(str(path)) == 1
    assert read(path).arrival_s.tolist() == [0.0, 3.0]


def test_two_servers_may_write_one_log_at_once(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    logs = [RequestLog(path, block_size=4) for _ in range(2)]
    for i in range(20):
        logs[i % 2].write(finished(1e9 + i, [1] * 40))
    assert len(read(path)) == 20
    assert os.listdir(tmp_path).count(SALT_FILE) == 1
