"""What the host takes of a prompt's time to first token: by hand for made-up steps, and falling with its length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paretune.profiler.hardware import accelerator
from paretune.profiler.host_share import PROMPTS, host_shares, shares_of_profile
from paretune.profiler.step_time import WORK_GRID, ModeledStep, StepTables
from paretune.profiler.tables import step_tables
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.spec import Deployment, Pool, save_deployment

from .cli_examples import CONFIG, in_folder, paretune, write_inputs
from .profiler_examples import SMALL, profile

POOL = Pool(
    accelerator="H100", max_num_seqs=8, max_num_batched_tokens=1024, max_model_len=20000, num_kv_blocks=4000, replicas=2
)
HOST_S, ROW_S, TOKEN_S, PAIR_S = 4e-3, 1e-3, 1e-5, 1e-9
BEFORE_S, AFTER_S = 20e-3, 5e-3


def modeled(pool: Pool = POOL) -> ModeledStep:
    """4 ms of the host a step and 1 ms a request, 10 µs a token, 1 ns a query-key pair; 20 ms before, 5 ms after."""
    tokens = np.arange(pool.max_num_batched_tokens + 1, dtype=np.float64)
    tokens_s = HOST_S + TOKEN_S * tokens
    tokens_s[0] = 0.0
    tables = StepTables(
        tokens_s=tokens_s,
        rows_s=ROW_S * np.arange(pool.max_num_seqs + 1, dtype=np.float64),
        samples_s=np.zeros(pool.max_num_samples + 1),
        decode_attention_s=np.zeros(len(WORK_GRID)),
        prefill_attention_s=PAIR_S * WORK_GRID,
        request_s=np.array([BEFORE_S, AFTER_S]),
    )
    return ModeledStep(tables, True, 0.1, (), HOST_S)


def test_the_share_is_the_hosts_part_of_every_step_and_what_is_beside_them() -> None:
    found = {each.prompt_tokens: each for each in host_shares(POOL, modeled())}
    assert set(found) == set(PROMPTS)
    for tokens, steps in ((16, 1), (1024, 1), (4096, 4), (16384, 16)):
        host_s = steps * (HOST_S + ROW_S)
        computed_s = TOKEN_S * tokens + PAIR_S * tokens * (tokens + 1) / 2
        each = found[tokens]
        assert each.steps == steps
        assert each.ttft_s == pytest.approx(BEFORE_S + host_s + computed_s + AFTER_S, rel=1e-6)
        assert (each.host_steps_s, each.host_request_s) == pytest.approx((host_s, BEFORE_S + AFTER_S))
        assert each.share == pytest.approx((host_s + BEFORE_S + AFTER_S) / each.ttft_s)


@pytest.mark.parametrize("name", ["A100", "H100", "B200", "L40S"])
def test_the_share_falls_with_the_length_of_the_prompt(name: str) -> None:
    shape = ModelShape.from_config(CONFIG)
    pool = POOL.model_copy(update={"accelerator": name, "num_kv_blocks": 1100})
    shares = [each.share for each in host_shares(pool, step_tables(accelerator(name), shape, pool))]
    assert len(shares) == len(PROMPTS)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 3 * shares[-1]


def test_prompts_that_the_pool_does_not_take_are_left_out() -> None:
    short = POOL.model_copy(update={"max_model_len": 1025})
    assert [each.prompt_tokens for each in host_shares(short, modeled(short))] == [16, 64, 256, 1024]
    whole = POOL.model_copy(update={"enable_chunked_prefill": False, "max_model_len": 1024})
    assert [each.prompt_tokens for each in host_shares(whole, modeled(whole))] == [16, 64, 256]


def test_a_profile_has_a_share_for_each_configuration() -> None:
    measured = profile()
    shares = shares_of_profile(measured, SMALL)
    assert list(shares) == [str(each.key) for each in measured.configurations]
    for each in shares.values():
        assert all(0 < s.share <= 1 for s in each)
        assert [s.share for s in each] == sorted((s.share for s in each), reverse=True)


def test_explain_and_profile_show_print_it(tmp_path: Path) -> None:
    write_inputs(tmp_path, 60)
    with in_folder(tmp_path):
        pool = Pool(accelerator="H100", max_model_len=8192, num_kv_blocks=2000)
        save_deployment(Deployment(model="model", pools=(pool,)), "spec.yaml")
        shown = paretune("explain", "spec.yaml", "log.csv", "--no-knobs")
        assert shown.exit_code == 0, shown.stderr
        assert "host's share" in shown.stdout
        rows = paretune("explain", "spec.yaml", "log.csv", "--no-knobs", "--json").json["data"]["host_share"]
        assert [row["prompt_tokens"] for row in rows] == [16, 64, 256, 1024, 4096]
        profile().save("profile.json")
        text = paretune("profile", "show", "profile.json").stdout
        assert "host's share of the TTFT of a prompt alone" in text
        data = paretune("profile", "show", "profile.json", "--json").json["data"]
        assert list(data["host_share"]) == ["TP 1 x 1 threads bf16/bf16"]
