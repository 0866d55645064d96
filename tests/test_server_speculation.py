"""What a server tells of speculation: Prometheus under vLLM's names, and the request log by application."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest

from paretune.runtime.engine import EngineStats, Output
from paretune.runtime.speculated import Speculated
from paretune.traces import read

from .test_server_http import Echo, running

NGRAM = {"speculation": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


@dataclass
class Speculating(Echo):
    """Every step after a request's first keeps two of three proposals."""

    drafts: int = 0

    def step(self) -> list[Output]:
        outputs = super().step()
        for place, output in enumerate(outputs):
            done = self.live.get(output.request_id, (None, None, 12))[2]
            drafts = max(0, done // 3 - 1)
            outputs[place] = replace(output, speculated=Speculated(drafts, 3 * drafts, 2 * drafts))
            self.drafts += drafts > 0
        return outputs

    def stats(self) -> EngineStats:
        drafts = self.drafts
        return super().stats()._replace(
            drafts=drafts, draft_tokens=3 * drafts, accepted_tokens=2 * drafts,
            accepted_by_position=(drafts, drafts, 0),
        )  # fmt: skip


def test_proposals_are_counted_under_vllms_names_and_logged_by_application(tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    with running(Speculating(tokens_per_step=3), log=log, **NGRAM) as server:
        body = {"model": "small", "prompt": list(range(3, 10)), "max_tokens": 12, "ignore_eos": True}
        answer = server.post("/v1/completions", body, headers={"x-app": "code"})
        assert answer.json()["usage"]["completion_tokens"] == 12
        text = httpx.get(server.url + "/metrics").text
    counted = dict(re.findall(r"^(vllm:spec_decode\S+?)(?:\{[^}]*?\}) (\S+)$", text, re.MULTILINE))
    by_position = re.findall(
        r'^vllm:spec_decode_num_accepted_tokens_per_pos_total\{.*position="(\d)"\} (\S+)$', text, re.M
    )
    assert by_position == [("0", "3.0"), ("1", "3.0"), ("2", "0.0")]
    assert counted["vllm:spec_decode_num_drafts_total"] == "3.0"
    assert counted["vllm:spec_decode_num_draft_tokens_total"] == "9.0"
    assert counted["vllm:spec_decode_num_accepted_tokens_total"] == "6.0"
    found = read(log).acceptance[0]
    assert (found.steps, found.drafts, found.draft_tokens, found.accepted_tokens) == (12 - 1 - 6, 3, 9, 6)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_end_with_the_tokens_where_a_stop_string_cuts_a_step_short(stream: bool) -> None:
    asked = {"stop": "two", "logprobs": 1}
    with running(Speculating(tokens_per_step=12), **NGRAM) as server:
        answers = [server.complete("one two three four", **asked)]
        if stream:
            answers = server.stream("one two three four", **asked)
    told = [choice["logprobs"] for answer in answers for choice in answer["choices"] if choice["logprobs"]]
    assert "".join(name for each in told for name in each["tokens"]).endswith("two")
    for each in told:
        assert len(each["tokens"]) == len(each["token_logprobs"]) == len(each["top_logprobs"])


def test_a_server_without_speculation_says_nothing_of_it(tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    with running(Echo(), log=log) as server:
        server.complete([3, 4, 5])
        assert "spec_decode" not in httpx.get(server.url + "/metrics").text
    assert "speculation" not in log.read_text()
    assert read(log).acceptance == ()


def test_what_retired_replicas_counted_adds_up_position_by_position() -> None:
    one = EngineStats(drafts=3, draft_tokens=9, accepted_tokens=5, accepted_by_position=(3, 2))
    other = EngineStats(steps=4, drafts=2, draft_tokens=8, accepted_tokens=6, accepted_by_position=(2, 2, 1, 1))
    assert one.plus(other) == EngineStats(
        steps=4, drafts=5, draft_tokens=17, accepted_tokens=11, accepted_by_position=(5, 4, 1, 1)
    )
    assert one.plus(EngineStats()) == one
