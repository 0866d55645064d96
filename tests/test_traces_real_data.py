"""The public traces of the data folder, read whole; skipped where it is not there (conftest.data_dir)."""

from __future__ import annotations

import time

import numpy as np
import pytest

from paretune.traces import Trace, drift, fingerprint, read, sample_path, statistics, window, write

# rows: ../shared/data/README.md; reuse: the trace's publishers and that README
KNOWN = {
    "azure2023/conv_first40min.csv": 14_176,
    "azure2023/code_first40min.csv": 7_491,
    "mooncake/synthetic_trace.jsonl": 3_993,
}


@pytest.mark.parametrize("name", KNOWN)
def test_every_request_is_read_and_survives_parquet_and_pandas(data_dir, name, tmp_path):
    trace = read(data_dir / "traces" / name)
    assert len(trace) == KNOWN[name]
    assert trace.notes == ()
    write(trace, tmp_path / "trace.parquet")
    assert read(tmp_path / "trace.parquet").digest() == trace.digest()
    assert Trace.from_pandas(trace.to_pandas()).digest() == trace.digest()


def test_azure_lengths_and_times_agree_with_pandas(data_dir):
    pd = pytest.importorskip("pandas")
    path = data_dir / "traces" / "azure2023" / "conv_first40min.csv"
    frame = pd.read_csv(path, parse_dates=["TIMESTAMP"])
    trace = read(path)
    np.testing.assert_array_equal(trace.input_tokens, frame["ContextTokens"])
    np.testing.assert_array_equal(trace.output_tokens, frame["GeneratedTokens"])
    since = (frame["TIMESTAMP"] - frame["TIMESTAMP"][0]).dt.total_seconds()
    np.testing.assert_allclose(trace.arrival_s, since, atol=1e-6)


def test_azure_code_is_extremely_bursty(data_dir):
    total = statistics(read(data_dir / "traces" / "azure2023" / "code_first40min.csv")).total
    assert total.interarrival_cv == pytest.approx(13, abs=0.5)
    assert total.output.mean == pytest.approx(28, abs=0.5)


def test_mooncake_repeats_65_1_percent_of_its_input_tokens(data_dir):
    found = statistics(read(data_dir / "traces" / "mooncake" / "synthetic_trace.jsonl"))
    assert round(100 * found.total.prefix_reuse, 1) == 65.1


def test_the_sample_is_the_ten_minutes_that_its_notice_says(data_dir):
    whole = read(data_dir / "traces" / "azure2023" / "conv_first40min.csv")
    part, shipped = window(whole, 960, 1560), read(sample_path())
    np.testing.assert_array_equal(part.input_tokens, shipped.input_tokens)
    np.testing.assert_array_equal(part.output_tokens, shipped.output_tokens)
    np.testing.assert_allclose(np.diff(part.arrival_s), np.diff(shipped.arrival_s), atol=1e-9)


def test_code_is_not_conversation(data_dir):
    conv, code = (read(data_dir / "traces" / "azure2023" / f"{name}_first40min.csv") for name in ("conv", "code"))
    assert drift(fingerprint(conv), code).moved
    assert not drift(fingerprint(conv), conv).moved


def test_forty_minutes_of_azure_are_read_in_a_fifth_of_a_second(data_dir):
    def read_s() -> float:
        start_s = time.process_time()
        read(data_dir / "traces" / "azure2023" / "conv_first40min.csv")
        return time.process_time() - start_s

    # the best of five, of CPU time: other processes share the machine (0.05 s on two quiet cores)
    assert min(read_s() for _ in range(5)) < 0.2
