"""How often proposals were kept: from the server's log into a trace, by application, and back out of every format."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretune.runtime.request_log import FinishedRequest, RequestLog
from paretune.runtime.speculated import Speculated
from paretune.traces import read, statistics, write
from paretune.traces.acceptance import Acceptance, by_request, merged, total
from paretune.traces.columns import BadTrace, Labels
from paretune.traces.trace import Trace


def finished(app: str, tokens: int, speculated: Speculated | None) -> FinishedRequest:
    return FinishedRequest(
        created=1e9, model="m", app=app, session=None, prompt_token_ids=np.arange(9, dtype=np.int32),
        completion_tokens=tokens, cached_tokens=0, ttft_s=0.1, e2e_s=1.0, finish_reason="length",
        speculated=speculated,
    )  # fmt: skip


def test_a_log_says_how_often_proposals_of_each_application_were_kept(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "log.jsonl", block_size=4)
    log.write(finished("code", 11, Speculated(4, 12, 6)))
    log.write(finished("code", 21, Speculated(5, 15, 15)))
    log.write(finished("chat", 5, Speculated(0, 0, 0)))
    log.write(finished("chat", 5, None))
    log.close()
    found = read(tmp_path / "log.jsonl")
    assert found.acceptance == (Acceptance("chat", 4, 0, 0, 0), Acceptance("code", 4 + 5, 9, 27, 21))
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[3]).get("speculation") is None
    write(found, tmp_path / "log.parquet")
    again = read(tmp_path / "log.parquet")
    assert again.acceptance == found.acceptance
    assert again.digest() == found.digest() != dataclasses.replace(found, acceptance=()).digest()
    assert Trace.from_pandas(found.to_pandas()).acceptance == found.acceptance
    assert found.select(slice(0, 1)).acceptance == found.acceptance
    described = statistics(found)
    assert described.total.acceptance == Acceptance(None, 13, 9, 27, 21)
    assert {each.app: each.acceptance for each in described.apps} == dict(zip(("chat", "code"), found.acceptance))


@pytest.mark.parametrize(
    "speculation",
    [
        {"steps": 1, "drafts": 2, "draft_tokens": 2, "accepted_tokens": 0},
        {"steps": 3, "drafts": 2, "draft_tokens": 4, "accepted_tokens": 5},
        {"steps": 3, "drafts": -1, "draft_tokens": 4, "accepted_tokens": 3},
        {"steps": 3, "drafts": 0, "draft_tokens": 4, "accepted_tokens": 3},
        {"steps": 3, "drafts": 2, "draft_tokens": 4},
        [1, 2],
    ],
)
def test_counts_that_cannot_be_are_refused_with_their_line(tmp_path: Path, speculation: object) -> None:
    log = RequestLog(tmp_path / "log.jsonl", block_size=4)
    log.write(finished("code", 11, None))
    log.close()
    row = json.loads((tmp_path / "log.jsonl").read_text())
    (tmp_path / "log.jsonl").write_text(json.dumps({**row, "speculation": speculation}) + "\n")
    with pytest.raises(BadTrace, match=r":1.*speculation"):
        read(tmp_path / "log.jsonl")


@given(p=st.floats(0, 1), length=st.integers(1, 8))
def test_the_chance_of_a_token_is_found_in_the_mean_of_what_was_kept(p: float, length: int) -> None:
    drafts = 10_000_000
    accepted = round(drafts * sum(p**i for i in range(1, length + 1)))
    found = Acceptance("app", drafts, drafts, length * drafts, accepted).probability
    assert found == pytest.approx(p, abs=1e-4)


def test_an_application_that_was_not_recorded_gets_what_all_have_together() -> None:
    acceptance = merged([Acceptance("a", 10, 10, 10, 10), Acceptance("b", 30, 10, 10, 0), Acceptance("c", 0, 0, 0, 0)])
    assert [each.app for each in acceptance] == ["a", "b"]
    assert total(acceptance) == Acceptance(None, 40, 20, 20, 10)
    drafted, probability = by_request(acceptance, Labels.of(["b", None, "a", "c"]), 4)
    assert drafted.tolist() == [1 / 3, 0.5, 1.0, 0.5]
    assert probability == pytest.approx([0.0, 0.5, 1.0, 0.5])
    drafted, _ = by_request(acceptance, None, 3)
    assert drafted.tolist() == [0.5] * 3


def test_an_application_for_which_nothing_was_proposed_is_proposed_nothing() -> None:
    acceptance = merged([Acceptance("code", 10, 10, 20, 20), Acceptance("poems", 90, 0, 0, 0)])
    drafted, probability = by_request(acceptance, Labels.of(["poems", "code"]), 2)
    assert drafted.tolist() == [0.0, 1.0]
    assert probability.tolist() == [1.0, 1.0]  # of a draft model's, which proposes all the same
