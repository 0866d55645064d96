"""From a study in the ledger to a report, with everything real but the hardware: an H100's data sheet."""

from __future__ import annotations

import shlex
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest

from paretune.optimizer.pick import knee
from paretune.optimizer.tuning import Ask, pick_spec, tune_trace
from paretune.profiler.hardware import accelerators
from paretune.reports.gather import BadReport, gather
from paretune.reports.page import html
from paretune.runtime.spec import Deployment, load_deployment, save_deployment
from paretune.traces import Trace, write

from .cli_examples import paretune


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log, and a ledger with one study of it."""
    folder = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    n = 200
    trace = Trace(np.cumsum(rng.exponential(0.05, n)), rng.integers(16, 600, n), rng.integers(2, 120, n))
    write(trace, folder / "log.parquet")
    tune_trace(
        Ask(
            log=str(folder / "log.parquet"),
            model="paretune/small",
            slos=("ttf30:p95<=1s",),
            accelerator=next(name for name in sorted(accelerators()) if name.startswith("H100")),
            max_devices=1,
            study="=<b>nightly</b>",
            storage=str(folder / "paretune.db"),
            trials=6,
        ),
        lambda share, what: None,
    )
    return folder


def test_a_study_becomes_a_report(folder: Path) -> None:
    storage, spec = str(folder / "paretune.db"), str(folder / "spec.yaml")
    chosen, deployment = pick_spec("=<b>nightly</b>", storage, output=spec)
    data = gather("=<b>nightly</b>", storage, spec_path=spec)
    assert data.chosen.deployment.digest() == chosen.deployment.digest() == deployment.digest()
    assert data.profile_measured is False
    assert data.default.trial == 0
    assert data.prices_as_of[:2] == "20"
    assert data.not_modeled
    assert [str(target) for target in data.targets] == ["ttf30:p95<=1s"]
    text = html(data)
    assert "Step times are not measured" in text
    assert "<b>nightly" not in text
    assert any("were simulated" in sentence for sentence in data.search)


def test_without_a_spec_the_knee_is_shown(folder: Path) -> None:
    data = gather("=<b>nightly</b>", str(folder / "paretune.db"))
    assert data.chosen is knee(data.front)


def test_a_spec_of_another_study_is_refused(folder: Path) -> None:
    save_deployment(Deployment().with_pool(max_num_seqs=3), folder / "other.yaml")
    with pytest.raises(BadReport, match=r"that study .* tried") as refusal:
        gather("=<b>nightly</b>", str(folder / "paretune.db"), spec_path=str(folder / "other.yaml"))
    assert refusal.value.exit_code == 2


def test_the_commands_of_a_report_lead_to_the_same_study_and_spec(folder: Path) -> None:
    storage, spec = str(folder / "again.db"), str(folder / "again.yaml")
    text = "fields: {max_num_seqs: [4, 16, 64, 128], max_num_batched_tokens: [256, 2048]}\n"
    (folder / "space.yaml").write_text(text)
    with chdir(folder):
        ask = Ask(
            log="log.parquet", model="paretune/small", storage=storage, slos=("ttf30:p95<=1s",), accelerator="H100",
            metric="e2e:p50", cost="sizing", space_path="space.yaml", max_devices=2, study="odd", trials=5, seed=3,
        )  # fmt: skip
        study = tune_trace(ask, lambda share, what: None)
        point = study.front.points[-1]
        _, before = pick_spec("odd", storage, point=len(study.front.points), output=spec)
        commands = gather("odd", storage, spec_path=spec).commands
    tuned, picked, verified = (shlex.split(line) for line in commands)
    assert verified == ["paretune", "verify", spec, str(folder / "log.parquet")]
    Path(storage).unlink()
    assert paretune(*tuned[1:]).exit_code == 0
    assert paretune(*picked[1:]).exit_code == 0
    after = load_deployment(spec)
    assert after.pools == point.deployment.pools == before.pools
    assert after.predicted == before.predicted


def test_without_targets_the_report_shows_the_load_that_the_spec_was_picked_at(folder: Path) -> None:
    storage, spec = str(folder / "paretune.db"), str(folder / "swept.yaml")
    ask = Ask(
        log=str(folder / "log.parquet"), model="paretune/small", accelerator="H100", max_devices=2, study="swept",
        storage=storage, trials=4,
    )  # fmt: skip
    study = tune_trace(ask, lambda share, what: None)
    points = study.front.points
    assert len({point.load for point in points}) > 1
    for number, point in enumerate(points, start=1):
        pick_spec("swept", storage, point=number, output=spec)
        data = gather("swept", storage, spec_path=spec)
        assert (data.chosen.load, data.chosen.trial) == (point.load, point.trial)
        assert data.chosen.cost("capacity") == point.cost("capacity")
    # a target that is named only when picking does not change the load that the predictions speak of
    _, deployment = pick_spec("swept", storage, slos=["ttf30:p95<=100s"], output=spec)
    chosen = gather("swept", storage, spec_path=spec).chosen
    assert deployment.provenance is not None
    assert deployment.provenance.rate == chosen.load * chosen.deployment.pool.replicas
