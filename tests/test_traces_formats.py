"""traces/formats.py: every accepted format has a sample in tests/data/traces; every bad one is refused by its place."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from paretune.traces import BadTrace, read, sample_path, write
from paretune.traces.formats import FORMATS
from paretune.traces.metrics import Target

DATA = Path(__file__).parent / "data" / "traces"
AZURE = b"TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = b"Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
MOON = b'{"timestamp": 0, "input_length": 600, "output_length": 6, "hash_ids": [0, 1]}\n'
OPENAI = b'{"timestamp": 5, "model": "m", "usage": {"prompt_tokens": 3, "completion_tokens": 4}}\n'


def rows(trace):
    return list(zip(trace.arrival_s.round(9).tolist(), trace.input_tokens.tolist(), trace.output_tokens.tolist()))


def test_azure_csv():
    trace = read(DATA / "azure.csv")
    assert rows(trace) == [(0.0, 374, 44), (4.314579, 396, 109), (4.710427, 91, 16)]
    assert trace.app is None
    assert trace.source == "azure.csv"
    assert trace.notes == ("1 of 4 requests left out: no input or no output tokens (failed)",)


def test_azure_csv_of_later_years_with_time_zones_and_more_columns():
    trace = read(DATA / "azure_zones_crlf.csv")
    assert rows(trace) == [(0.0, 2162, 5), (0.007405, 2399, 6)]
    assert trace.notes == ("columns not read: NumImages",)


def test_burstgpt_csv_names_applications_by_model_and_log_type_and_leaves_failures_out():
    trace = read(DATA / "burstgpt.csv")
    assert rows(trace) == [(0.0, 472, 18), (40.0, 1087, 230), (113.0, 417, 276)]
    assert trace.app.values() == ["ChatGPT/Conversation log", "ChatGPT/Conversation log", "GPT-4/API log"]
    assert trace.notes == ("1 of 4 requests left out: no input or no output tokens (failed)",)


def test_burstgpt_csv_with_sessions():
    trace = read(DATA / "burstgpt_sessions.csv")
    assert rows(trace) == [(0.0, 12, 34), (0.75, 56, 78), (2.5, 90, 12)]
    assert trace.session.values() == ["1027", None, "1027"]


def test_mooncake_jsonl_keeps_the_prefix_hashes_with_their_block_size():
    trace = read(DATA / "mooncake.jsonl")
    assert rows(trace) == [(0.0, 1200, 6), (0.0, 1024, 4), (3.5, 600, 1)]
    assert trace.prefix.block_size == 512
    assert [trace.prefix.row(i).tolist() for i in range(3)] == [[0, 1, 2], [0, 1], [0, 7]]


@pytest.mark.parametrize("variant", ["timestamp_seconds", "timestamp_ms", "timestamp_iso", "nested"])
def test_openai_logs_of_every_time_format_read_the_same(variant):
    trace = read(DATA / f"openai_{variant}.jsonl")
    assert rows(trace) == [(0.0, 19, 10), (1.25, 11, 12)]
    assert trace.app.names[-1] == "llama"


def test_openai_chat_completions_are_sorted_by_creation_and_the_model_is_the_application():
    trace = read(DATA / "openai_created.jsonl")
    assert rows(trace) == [(0.0, 19, 10), (1.0, 11, 12), (3.0, 7, 3)]
    assert trace.app.values() == ["gpt-4.1", "gpt-4.1", "gpt-4.1-mini"]
    assert "lines were not in order of arrival and were sorted" in trace.notes
    assert "1 of 4 requests left out: they failed or have no tokens" in trace.notes


def test_openai_responses_may_be_nested_with_the_application_in_the_metadata():
    trace = read(DATA / "openai_nested.jsonl")
    assert trace.app.values() == ["voice", "llama"]
    assert trace.session.values() == ["s-1", None]
    assert trace.notes == ("1 of 3 requests left out: they failed or have no tokens",)


def test_openai_batch_output_leaves_failures_out():
    trace = read(DATA / "openai_batch.jsonl")
    assert rows(trace) == [(0.0, 19, 10), (1.0, 11, 12)]
    assert "2 of 4 requests left out: they failed or have no tokens" in trace.notes


def test_openai_logs_may_carry_all_that_a_trace_holds():
    trace = read(DATA / "openai_full.jsonl")
    assert rows(trace) == [(0.0, 32, 30), (0.5, 20, 5), (1.0, 4, 2)]
    assert trace.app.values() == ["voice", "chat", "small"]
    assert trace.session.values() == ["s-1", "s-2", None]
    assert trace.adapter.values() == ["lora-a", None, None]
    assert trace.prefix.block_size == 16
    assert [trace.prefix.row(i).tolist() for i in range(3)] == [[-5, 9000000000000000000], [-5], []]
    assert trace.targets == (Target.parse("ttf30:p95<=600ms"),)
    assert trace.target.tolist() == [0, -1, -1]


def test_no_text_of_a_log_enters_a_trace(tmp_path):
    for name in ("openai_created.jsonl", "openai_nested.jsonl"):
        assert "not read" in (DATA / name).read_text()
        trace = read(DATA / name)
        write(trace, tmp_path / "trace.parquet")
        assert "not read" not in repr(trace)
        assert b"not read" not in (tmp_path / "trace.parquet").read_bytes()


def test_the_sample_that_ships_is_ten_minutes_of_azure_conversations_with_its_license():
    trace = read(sample_path())
    assert len(trace) == 3564
    assert 590 < trace.duration_s <= 600
    assert sample_path().stat().st_size < 150_000
    notice = sample_path().with_name("NOTICE.md").read_text()
    assert "CC-BY-4.0" in notice
    assert "Splitwise" in notice


def test_the_format_can_be_named_and_is_then_the_one_that_is_read():
    assert read(DATA / "azure.csv", format="azure").digest() == read(DATA / "azure.csv").digest()
    with pytest.raises(BadTrace) as refused:
        read(DATA / "azure.csv", format="burstgpt")
    assert refused.value.where == "azure.csv:1: Timestamp"
    with pytest.raises(BadTrace) as refused:
        read(DATA / "azure.csv", format="csv")
    assert refused.value.where == "format"
    assert all(name in refused.value.allowed for name in FORMATS)


def test_the_name_of_a_file_says_nothing_about_its_format(tmp_path):
    (tmp_path / "log.parquet").write_bytes((DATA / "azure.csv").read_bytes())
    assert read(tmp_path / "log.parquet").digest() == read(DATA / "azure.csv").digest()


@pytest.mark.parametrize("name", sorted(path.name for path in DATA.iterdir()))
def test_byte_order_mark_crlf_and_blank_last_lines_change_nothing(name, tmp_path):
    data = (DATA / name).read_bytes()
    dressed = tmp_path / name
    dressed.write_bytes(b"\xef\xbb\xbf" + data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert read(dressed).digest() == read(DATA / name).digest()


def test_a_last_line_without_its_end_is_read_and_noted(tmp_path):
    (tmp_path / "cut.csv").write_bytes((DATA / "azure.csv").read_bytes().rstrip())
    trace = read(tmp_path / "cut.csv")
    assert trace.digest() == read(DATA / "azure.csv").digest()
    assert "no line end" in trace.notes[0]


def moon(**fields: object) -> bytes:
    return json.dumps({"timestamp": 9, "input_length": 600, "output_length": 6, "hash_ids": [0, 1], **fields}).encode()


def openai(**fields: object) -> bytes:
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    return json.dumps({"timestamp": 5, "model": "m", "usage": usage, **fields}).encode()


STAMP = b"2023-11-16 18:15:46.6805900"
BAD = {
    "empty": (b"", "log"),
    "blank": (b" \n\r\n", "log"),
    "only a byte-order mark": (b"\xef\xbb\xbf", "log"),
    "header alone": (AZURE, "log:2"),
    "prose": (b"Dear reader,\nthis is no log.\n", "log:1"),
    "another CSV": (b"time,in,out\n1,2,3\n", "log:1"),
    "unknown objects": (b'{"a": 1}\n', "log:1"),
    "a JSON list": (b'[{"timestamp": 1}]\n', "log:1"),
    "a JSON number": (OPENAI + b"7\n", "log:2"),
    "UTF-16": (AZURE.decode().encode("utf-16"), "log:1"),
    "UTF-16 without mark": (AZURE.decode().encode("utf-16-le"), "log:1"),
    "NUL byte": (AZURE + STAMP + b",1,2\n" + STAMP + b",1\0,2\n", "log:3"),
    "Latin-1": (AZURE + STAMP + b",1,2\n" + STAMP + b",1,2\xe9\n", "log:3"),
    "gzip": (gzip.compress(AZURE), "log"),
    "zip": (b"PK\x03\x04rest", "log"),
    "zstd": (b"\x28\xb5\x2f\xfdrest", "log"),
    "azure: half last line": (AZURE + STAMP + b",1,2\n2023-11-16 18:1", "log:3"),
    "azure: half stamp": (AZURE + STAMP + b",1,2\n2023-11-16 18:1,5,6\n", "log:3: TIMESTAMP"),
    "azure: header twice": (AZURE + STAMP + b",1,2\n" + AZURE, "log:3: TIMESTAMP"),
    "azure: column twice": (b"TIMESTAMP,ContextTokens,GeneratedTokens,GeneratedTokens\n", "log:1: GeneratedTokens"),
    "azure: blank line inside": (AZURE + b"\n" + STAMP + b",1,2\n", "log:2"),
    "azure: too many fields": (AZURE + STAMP + b",1,2,3\n", "log:2"),
    "azure: unsorted": (
        AZURE + STAMP + b",1,2\n2023-11-16 18:15:47,1,2\n2023-11-16 18:15:46.9,1,2\n",
        "log:4: TIMESTAMP",
    ),
    "azure: negative": (AZURE + STAMP + b",1,2\n" + STAMP + b",-1,2\n", "log:3: ContextTokens"),
    "azure: NaN": (AZURE + STAMP + b",NaN,2\n", "log:2: ContextTokens"),
    "azure: fraction": (AZURE + STAMP + b",1,2.5\n", "log:2: GeneratedTokens"),
    "azure: nothing": (AZURE + STAMP + b",,2\n", "log:2: ContextTokens"),
    "azure: exponent": (AZURE + STAMP + b",1e999,2\n", "log:2: ContextTokens"),
    "azure: underscore": (AZURE + STAMP + b",1_0,2\n", "log:2: ContextTokens"),
    "azure: Arabic digits": (AZURE + STAMP + ",٣,2\n".encode(), "log:2: ContextTokens"),
    "azure: huge": (AZURE + STAMP + b"," + b"9" * 100_000 + b",2\n", "log:2: ContextTokens"),
    "azure: past int32": (AZURE + STAMP + b",2147483648,2\n", "log:2: ContextTokens"),
    "azure: no such day": (AZURE + STAMP + b",1,2\n2023-02-30 18:15:46,1,2\n", "log:3: TIMESTAMP"),
    "azure: year 9999": (AZURE + b"9999-11-16 18:15:46,1,2\n", "log:2: TIMESTAMP"),
    "azure: all failed": (AZURE + STAMP + b",1,0\n", "log"),
    "azure: open quote": (AZURE + b'"' + STAMP + b",1,2\n", "log:2"),
    "very long line": (AZURE + b"x" * 2_000_000 + b"\n", "log:2"),
    "burstgpt: negative": (BURST + b"5,ChatGPT,1,-2,3,API log\n", "log:2: Response tokens"),
    "burstgpt: unsorted": (BURST + b"5,a,1,2,3,API log\n4,a,1,2,3,API log\n", "log:3: Timestamp"),
    "burstgpt: time is text": (BURST + b"nan,a,1,2,3,API log\n", "log:2: Timestamp"),
    "burstgpt: infinity": (BURST + b"1e999,a,1,2,3,API log\n", "log:2: Timestamp"),
    "burstgpt: negative time": (BURST + b"-1,a,1,2,3,API log\n", "log:2: Timestamp"),
    "mooncake: half last line": (MOON + moon()[:40], "log:2"),
    "mooncake: unsorted": (MOON + moon() + b"\n" + moon(timestamp=8), "log:3: timestamp"),
    "mooncake: negative": (MOON + moon(output_length=-6), "log:2: output_length"),
    "mooncake: fraction": (MOON + moon(output_length=6.5), "log:2: output_length"),
    "mooncake: true": (MOON + moon(output_length=True), "log:2: output_length"),
    "mooncake: NaN": (MOON + moon(timestamp=float("nan")), "log:2"),
    "mooncake: Infinity": (MOON + moon(output_length=float("inf")), "log:2"),
    "mooncake: 1e999": (MOON + moon().replace(b'"timestamp": 9', b'"timestamp": 1e999'), "log:2: timestamp"),
    "mooncake: past all times": (MOON + moon(timestamp=9e19), "log:2: timestamp"),
    "mooncake: huge": (MOON + moon(output_length=0).replace(b": 0,", b": " + b"9" * 100_000 + b","), "log:2"),
    "mooncake: past int32": (MOON + moon(input_length=2**31), "log:2: input_length"),
    "mooncake: no hashes": (MOON + moon(hash_ids=None), "log:2: hash_ids"),
    "mooncake: too many hashes": (MOON + moon(hash_ids=[0, 1, 2]), "log:2: hash_ids"),
    "mooncake: hash past int64": (MOON + moon(hash_ids=[2**63]), "log:2: hash_ids"),
    "mooncake: hash is text": (MOON + moon(hash_ids=["0"]), "log:2: hash_ids"),
    "mooncake: not chained": (MOON + moon(hash_ids=[5, 1]), "log:2: hash_ids"),
    "mooncake: key twice": (MOON + moon()[:-1] + b', "timestamp": 3}', "log:2"),
    "nested 100k deep": (MOON + b'{"a":' * 100_000, "log:2"),
    "nested 100k deep, first line": (b"[" * 100_000, "log:1"),
    "nested objects 100k deep, first line": (b'{"usage":' * 100_000 + b"1" + b"}" * 100_000, "log:1"),
    "openai: no usage": (OPENAI + b'{"timestamp": 6, "model": "m"}', "log:2: usage"),
    "openai: usage is text": (OPENAI + openai(usage="3"), "log:2: usage"),
    "openai: no completion tokens": (OPENAI + openai(usage={"prompt_tokens": 3}), "log:2: usage.completion_tokens"),
    "openai: no time": (OPENAI + openai().replace(b"timestamp", b"time"), "log:2: created"),
    "openai: negative time": (OPENAI + openai(timestamp=-1), "log:2: timestamp"),
    "openai: time is true": (OPENAI + openai(timestamp=True), "log:2: timestamp"),
    "openai: time is prose": (OPENAI + openai(timestamp="noon"), "log:2: timestamp"),
    "openai: no such day": (OPENAI + openai(timestamp="2025-02-30T00:00:00Z"), "log:2: timestamp"),
    "openai: time too large": (OPENAI + openai(timestamp=1e300), "log:2: timestamp"),
    "openai: no model": (OPENAI + openai(model=None), "log:2: model"),
    "openai: model is a number": (OPENAI + openai(model=3), "log:2: model"),
    "openai: app is a list": (OPENAI + openai(app=["voice"]), "log:2: app"),
    "openai: app is half a character": (OPENAI + openai(app="\ud800"), "log:2: app"),
    "openai: metadata is text": (OPENAI + openai(metadata="voice"), "log:2: metadata"),
    "openai: bad target": (OPENAI + openai(target="fast please"), "log:2: target"),
    "openai: hashes without block size": (OPENAI + openai(prefix_hashes=[1]), "log:2: prefix_block_size"),
    "openai: block size 0": (OPENAI + openai(prefix_hashes=[1], prefix_block_size=0), "log:2: prefix_block_size"),
    "openai: two block sizes": (
        openai(prefix_hashes=[1], prefix_block_size=16) + b"\n" + openai(prefix_hashes=[1], prefix_block_size=32),
        "log:2: prefix_block_size",
    ),
    "openai: response is a list": (OPENAI + openai(response=[]), "log:2: response"),
    "openai: all failed": (openai(usage=None), "log"),
    "parquet: cut off": (b"PAR1\x15\x04\x15", "log"),
    "parquet: footer of zeros": (b"PAR1" + b"\0" * 100 + b"PAR1", "log"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_log_is_refused_by_file_line_and_field(case, tmp_path):
    data, where = BAD[case]
    (tmp_path / "log").write_bytes(data)
    with pytest.raises(BadTrace) as refused:
        read(tmp_path / "log")
    error = refused.value
    assert error.where == where
    assert error.exit_code == 2
    assert error.allowed
    assert error.todo
    assert len(str(error)) < 700
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_missing_file_a_folder_and_an_unreadable_path_are_refused_by_name(tmp_path):
    (tmp_path / "file").write_bytes(AZURE)
    for path, name in ((tmp_path / "none.csv", "none.csv"), (tmp_path, tmp_path.name), (tmp_path / "file" / "x", "x")):
        with pytest.raises(BadTrace) as refused:
            read(path)
        assert refused.value.where == name


@pytest.mark.parametrize("name", sorted(path.name for path in DATA.iterdir()))
def test_a_log_cut_anywhere_is_read_or_refused_and_never_crashes(name, tmp_path):
    data = (DATA / name).read_bytes()
    whole = read(DATA / name)
    refused = 0
    for end in range(0, len(data), 13):
        (tmp_path / "cut").write_bytes(data[:end])
        try:
            assert len(read(tmp_path / "cut")) <= len(whole)
        except BadTrace:
            refused += 1
    assert refused > 0


def test_parquet_cut_anywhere_is_refused(tmp_path):
    write(read(DATA / "openai_full.jsonl"), tmp_path / "t.parquet")
    data = (tmp_path / "t.parquet").read_bytes()
    for end in range(4, len(data) - 1, 97):
        (tmp_path / "cut").write_bytes(data[:end])
        with pytest.raises(BadTrace):
            read(tmp_path / "cut")


def test_damaged_logs_of_every_format_are_read_or_refused_and_never_crash(tmp_path):
    write(read(DATA / "openai_full.jsonl"), tmp_path / "full.parquet")
    originals = [path.read_bytes() for path in [*sorted(DATA.iterdir()), tmp_path / "full.parquet"]]
    pieces = [
        b"",
        b"-",
        b"NaN",
        b"1e999",
        b'"',
        b",",
        b"{",
        b"[]",
        b"null",
        b"9" * 20,
        b"\n",
        b"\xff",
        b"\0",
        b"\\ud800",
    ]
    rng = np.random.default_rng(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(400):
        data = bytearray(originals[rng.integers(len(originals))])
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(data)))
            data[at : at + int(rng.integers(0, 3))] = pieces[rng.integers(len(pieces))]
        (tmp_path / "damaged").write_bytes(data)
        try:
            trace = read(tmp_path / "damaged")
        except BadTrace:
            outcomes["refused"] += 1
            continue
        write(trace, tmp_path / "again.parquet")
        assert read(tmp_path / "again.parquet").digest() == trace.digest()
        outcomes["read"] += 1
    assert min(outcomes.values()) > 20


def test_parquet_that_somebody_else_wrote_is_read_where_it_has_the_columns(tmp_path):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"arrival_s": [0.0, 1.5], "input_tokens": [3, 4], "output_tokens": [5, 6], "more": [1, 2]})
    frame.assign(app=["a", None]).to_parquet(tmp_path / "theirs.parquet")
    trace = read(tmp_path / "theirs.parquet")
    assert rows(trace) == [(0.0, 3, 5), (1.5, 4, 6)]
    assert trace.app.values() == ["a", None]
    assert trace.notes == ("columns not read: more",)


@pytest.mark.parametrize(
    ("columns", "where"),
    [
        ({"input_tokens": None}, "bad.parquet: input_tokens"),
        ({"input_tokens": [3.5, 4]}, "bad.parquet: row 0: input_tokens"),
        ({"input_tokens": [3, None]}, "bad.parquet: row 1: input_tokens"),
        ({"input_tokens": ["3", "4"]}, "bad.parquet: input_tokens"),
        ({"input_tokens": [3, -4]}, "bad.parquet: row 1: input_tokens"),
        ({"output_tokens": [0, 1]}, "bad.parquet: row 0: output_tokens"),
        ({"arrival_s": [2.0, 1.0]}, "bad.parquet: row 1: arrival_s"),
        ({"arrival_s": [0.0, float("nan")]}, "bad.parquet: row 1: arrival_s"),
        ({"arrival_s": [0.0, float("inf")]}, "bad.parquet: row 1: arrival_s"),
        ({"app": [1, 2]}, "bad.parquet: app"),
        ({"prefix_hashes": [[1], [2]]}, "bad.parquet: prefix_block_size"),
        ({"prefix_hashes": [1, 2]}, "bad.parquet: prefix_hashes"),
        ({"target": ["ttft:p95<=1s", "soon"]}, "bad.parquet: row 1: target"),
    ],
)
def test_parquet_with_a_bad_column_is_refused_by_row_and_column(columns, where, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    good = {"arrival_s": [0.0, 1.5], "input_tokens": [3, 4], "output_tokens": [5, 6]}
    table = pa.table({name: column for name, column in {**good, **columns}.items() if column is not None})
    pq.write_table(table, tmp_path / "bad.parquet")
    with pytest.raises(BadTrace) as refused:
        read(tmp_path / "bad.parquet")
    assert refused.value.where == where


@pytest.mark.parametrize(
    ("about", "where"),
    [
        (b"{", "t.parquet: metadata"),
        (b"[]", "t.parquet: metadata"),
        (b'{"schema_version": 2}', "t.parquet: schema_version"),
        (b'{"schema_version": 1, "targets": "x"}', "t.parquet: metadata: targets"),
        (b"[" * 100_000, "t.parquet: metadata"),
        (
            b'{"schema_version": 1, "targets": ["?"], "notes": [], "source": "x", "prefix_block_size": null}',
            "t.parquet: targets",
        ),
    ],
)
def test_parquet_of_another_version_or_with_damaged_metadata_is_refused(about, where, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"arrival_s": [0.0], "input_tokens": [3], "output_tokens": [5]})
    pq.write_table(table.replace_schema_metadata({b"paretune.trace": about}), tmp_path / "t.parquet")
    with pytest.raises(BadTrace) as refused:
        read(tmp_path / "t.parquet")
    assert refused.value.where == where


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    trace = read(DATA / "azure.csv")
    write(trace, tmp_path / "t.parquet")
    before = (tmp_path / "t.parquet").read_bytes()

    def full(table, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space"):
        write(trace.select(np.array([True, False, True])), tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]
