"""Traces drawn from ServeGen's client pools: rates, patterns and lengths are those of the pool, images count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paretune.runtime.spec import Deployment, Pool, save_deployment
from paretune.traces import read, statistics, window, write
from paretune.traces.columns import BadTrace

from .cli_examples import in_folder, paretune, write_inputs

# client -> (rate in each of its windows, cv, pattern, shape)
CLIENTS: dict[int, tuple[list[float], float, str | None, float]] = {
    0: ([2.0, 4.0, 0.0], 0.5, "Gamma", 4.0),
    1: ([1.0, 1.0, 1.0], 1.0, None, 0.0),
    2: ([3.0, 0.0, 3.0], 1.5, "Weibull", 0.7),
}
HISTOGRAMS: dict[str, dict[float, float]] = {
    "text_tokens": {100: 0.5, 300: 0.5},
    "image_count": {0: 0.5, 2: 0.5},
    "image_tokens": {400: 1.0},
    "output_tokens": {50: 1.0},
}


def pool_files(folder: Path, clients: dict[int, Any] = CLIENTS, without: tuple[int, ...] = ()) -> Path:
    rates, lengths = [], []
    for client, (by_window, cv, pattern, shape) in clients.items():
        rates += [
            {
                "pool": "p",
                "client": client,
                "t": 600 * i,
                "rate": rate,
                "cv": cv,
                "pat": pattern,
                "p1": shape,
                "p2": 0.0,
            }
            for i, rate in enumerate(by_window)
        ]
        if client not in without:
            lengths += [
                {"pool": "p", "client": client, "window": 0, "field": field, "value": value, "prob": prob}
                for field, values in HISTOGRAMS.items()
                for value, prob in values.items()
            ]
    path = folder / "p_client_rates.parquet"
    pq.write_table(pa.Table.from_pylist(rates), path)
    pq.write_table(pa.Table.from_pylist(lengths), folder / "p_length_histograms.parquet")
    return path


def test_images_count_as_prompt_tokens_and_are_said(tmp_path: Path) -> None:
    trace = read(pool_files(tmp_path))
    assert set(trace.input_tokens.tolist()) == {100, 300, 900, 1100}  # with none, or with two images of 400
    assert set(trace.output_tokens.tolist()) == {50}
    images = int((trace.input_tokens >= 900).sum())
    note = next(note for note in trace.notes if note.startswith("images: "))
    assert f"{2 * images:,} in {images / len(trace):.0%} of the requests" in note
    assert f"{800 * images:,} tokens count as prompt tokens" in note
    assert images / len(trace) == pytest.approx(0.5, abs=0.03)


def test_rates_and_burstiness_are_those_of_the_pool(tmp_path: Path) -> None:
    # many windows, so that counts say something
    clients = {client: (rates * 20, cv, *rest) for client, (rates, cv, *rest) in CLIENTS.items()}
    trace = read(pool_files(tmp_path, clients))
    assert trace.app is not None
    for client, (rates, _, pattern, shape) in clients.items():
        mine = trace.arrival_s[trace.app.codes == trace.app.names.index(f"client {client}")]
        for i, rate in enumerate(rates[:3]):
            count = sum(((mine >= 600 * at) & (mine < 600 * (at + 1))).sum() for at in range(i, len(rates), 3))
            assert count / (600 * 20) == pytest.approx(rate, rel=0.03)
        if client == 0:
            assert statistics(trace).apps  # described by client
        inside = mine[mine < 600]
        gaps = np.diff(inside)
        expected = {"Gamma": 1 / np.sqrt(shape or 1), "Weibull": 1.46, None: 1.0}[pattern]  # Weibull of shape 0.7
        assert gaps.std() / gaps.mean() == pytest.approx(expected, rel=0.1)


def test_the_same_pool_gives_the_same_trace(tmp_path: Path) -> None:
    path = pool_files(tmp_path)
    assert read(path).digest() == read(path).digest()


def test_clients_without_lengths_are_left_out_and_counted(tmp_path: Path) -> None:
    trace = read(pool_files(tmp_path, without=(1,)))
    assert trace.app is not None
    assert set(trace.app.names) == {"client 0", "client 2"}
    assert any("1 clients left out" in note for note in trace.notes)


def test_rates_without_their_histograms_are_refused(tmp_path: Path) -> None:
    path = pool_files(tmp_path)
    (tmp_path / "p_length_histograms.parquet").unlink()
    with pytest.raises(BadTrace) as raised:
        read(path)
    assert raised.value.where == "p_length_histograms.parquet"


def test_a_day_of_image_requests_is_drawn_from_the_public_pool(data_dir: Path, tmp_path: Path) -> None:
    trace = read(data_dir / "traces" / "servegen" / "mm-image_client_rates.parquet")
    # 818,610: its rates times ten minutes, added up
    assert len(trace) == pytest.approx(818_610, rel=0.01)
    assert any(note.startswith("images: ") and "encoding them is not modeled" in note for note in trace.notes)
    write_inputs(tmp_path)
    with in_folder(tmp_path):
        write(window(trace, 3600.0, 3660.0), "images.parquet")
        described = paretune("trace", "describe", "images.parquet").stdout
        assert "note: images: " in described
        pool = Pool(accelerator="H100", max_num_seqs=64, max_num_batched_tokens=2048, num_kv_blocks=4000, replicas=4)
        save_deployment(Deployment(model="model", pools=(pool,)), "spec.yaml")
        found = paretune("simulate", "images.parquet", "--spec", "spec.yaml", "--json")
        assert found.exit_code == 0
        assert found.json["data"]["summary"]["finished"] > 0
        assert any(note.startswith("images: ") for note in found.json["data"]["notes"])
        assert "note: images: " in paretune("simulate", "images.parquet", "--spec", "spec.yaml").stdout
