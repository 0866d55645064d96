"""A deployment of two phases: one pool computes prompts, another one answers, and the KV cache goes from pool to pool.

What the two pools must have in common, and how KV travels. The bundled engine does not run such a deployment: the
simulator does (profiler/disaggregated.py), and exporters translate it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from .pool import Part, Pool


class KvTransfer(Part):
    """How the KV cache of a prompt goes from a prefill replica to a decode replica."""

    link: str = Field(
        "",
        max_length=100,
        description="name of a link in links.csv that joins devices, not of one to their host; empty: the nearest "
        "that joins all devices",
    )
    bytes_per_s: float | None = Field(
        None, gt=0, description="of one device in one direction, in place of a link of the catalog"
    )
    latency_s: float | None = Field(None, ge=0, description="of one transfer, with bytes_per_s; null counts none")
    source: str = Field("", max_length=200, description="where bytes_per_s and latency_s come from, and of what date")
    overlap: Literal["none", "layers"] = Field(
        "none",
        description="KV leaves when the decode pool asks for it, after the prompt (vLLM's NixlConnector), or layer by "
        "layer as it is computed (Splitwise)",
    )
    first_token: Literal["decode", "prefill"] = Field(
        "decode",
        description="whose token is the first that a client gets: the decode pool's, which computes the prompt's last "
        "token once more (vLLM and its proxy), or the prefill pool's (DistServe, Splitwise)",
    )

    @model_validator(mode="after")
    def _sourced(self) -> Self:
        if self.bytes_per_s is not None and self.link:
            raise ValueError(f"link ({self.link!r}) and bytes_per_s ({self.bytes_per_s:g}): give one of them")
        if self.bytes_per_s is not None and not self.source:
            raise ValueError(f"source must say where bytes_per_s ({self.bytes_per_s:g}) comes from, and of what date")
        if self.bytes_per_s is None and (self.latency_s is not None or self.source):
            name = "source" if self.latency_s is None else "latency_s"
            raise ValueError(f"{name} goes with bytes_per_s: the catalog's links have their own")
        return self


def is_disaggregated(pools: Sequence[Pool]) -> bool:
    """Whether prompts and answers are computed by pools of their own."""
    return any(pool.role != "mixed" for pool in pools)


def check_phases(pools: Sequence[Pool]) -> None:
    """What a prefill and a decode pool must have in common, so that one can go on where the other ended.

    Raises: ValueError, which names the field.
    """
    if not is_disaggregated(pools):
        return
    roles = sorted(pool.role for pool in pools)
    if roles != ["decode", "prefill"]:
        found = ", ".join(pool.role for pool in pools)
        raise ValueError(f"pools: their roles ({found}) must be one prefill and one decode, or mixed")
    prefill, decode = by_role(pools)
    for name, why in (
        ("kv_cache_dtype", "the decode pool goes on with the bytes that the prefill pool wrote"),
        ("max_model_len", "what one pool takes the other must take"),
    ):
        first, second = getattr(prefill, name), getattr(decode, name)
        if first != second:
            raise ValueError(f"{name} must be the same in both pools (prefill {first}, decode {second}): {why}")
    if decode.block_size < prefill.block_size:
        raise ValueError(
            f"block_size of the decode pool ({decode.block_size}) must be at least that of the prefill pool "
            f"({prefill.block_size}): blocks are put together, not cut"
        )
    if (prefill.max_loras == 0) != (decode.max_loras == 0):
        raise ValueError(
            f"max_loras (prefill {prefill.max_loras}, decode {decode.max_loras}) must be 0 in both pools, or in none"
        )
    if decode.context_parallel_size > 1:
        raise ValueError(
            f"context_parallel_size of the decode pool ({decode.context_parallel_size}) must be 1: it divides long "
            "prompts, which the prefill pool computes"
        )
    if prefill.speculation != "none":
        raise ValueError(
            f"speculation of the prefill pool ({prefill.speculation}) must be 'none': it computes one token an answer"
        )


def by_role(pools: Sequence[Pool]) -> tuple[Pool, Pool]:
    """The prefill and the decode pool of a disaggregated deployment."""
    prefill, decode = (next(pool for pool in pools if pool.role == role) for role in ("prefill", "decode"))
    return prefill, decode
