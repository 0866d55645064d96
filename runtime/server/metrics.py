"""What /metrics tells Prometheus. Names are vLLM's where the meaning is; times count from receipt of the request.

Source of the names: vllm/v1/metrics/loggers.py of vLLM 0.10 to 0.32 (2026-11), and the dashboards in its examples.
Older names that dashboards still ask for stand beside the newer ones. What this server does not have is not reported
as 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..engine_stats import EngineStats
from ..worker import Queue

if TYPE_CHECKING:
    from .generation import Generation
    from .replicas import Fleet

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# vLLM's buckets (vllm/v1/metrics/loggers.py), so that one dashboard shows both
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 40, 80)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)


class Metrics:
    """The server's own registry: what it counts itself, and what its replicas report."""

    def __init__(self, model: str, max_model_len: int, fleet: Fleet) -> None:
        """fleet: whose statistics are reported as they are when Prometheus asks."""
        registry = CollectorRegistry()
        self._registry = registry

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ("model_name",), registry=registry).labels(model)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, ("model_name",), registry=registry, buckets=buckets).labels(model)

        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of requests whose first token came.")
        self._generation_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        ttft = "From receipt of the request to its first token."
        self._ttft = histogram("vllm:time_to_first_token_seconds", ttft, _TTFT_S)
        inter_token = "Between a request's tokens of two steps."
        self._inter_token = histogram("vllm:inter_token_latency_seconds", inter_token, _TOKEN_S)
        tpot = "(E2E - TTFT) / (tokens - 1) of a finished request; those of one token are left out."
        self._tpot = histogram("vllm:request_time_per_output_token_seconds", tpot, _TOKEN_S)
        e2e = "From receipt of a request to its last token."
        self._e2e = histogram("vllm:e2e_request_latency_seconds", e2e, _REQUEST_S)
        self._time_per_token = histogram("vllm:time_per_output_token_seconds", f"{inter_token} (older name)", _TOKEN_S)
        queue = "From receipt of a request to the step that admitted it."
        self._queue_time = histogram("vllm:request_queue_time_seconds", queue, _REQUEST_S)
        prefill = "From the step that admitted a request to its first token."
        self._prefill_time = histogram("vllm:request_prefill_time_seconds", prefill, _REQUEST_S)
        decode = "From a request's first token to its last."
        self._decode_time = histogram("vllm:request_decode_time_seconds", decode, _REQUEST_S)
        inference = "From the step that admitted a request to its last token."
        self._inference_time = histogram("vllm:request_inference_time_seconds", inference, _REQUEST_S)
        lengths = _one_two_five(max_model_len)
        self._prompt_length = histogram("vllm:request_prompt_tokens", "Prompt tokens of a finished request.", lengths)
        answer = "Tokens generated for a finished request."
        self._answer_length = histogram("vllm:request_generation_tokens", answer, lengths)
        most = "Most tokens that a request may get."
        self._max_tokens = histogram("vllm:request_params_max_tokens", most, lengths)
        self._max_generation = histogram("vllm:request_max_num_generation_tokens", most, lengths)
        self._choices = histogram("vllm:request_params_n", "Answers asked for each prompt.", (1, 2, 5, 10, 20))
        step = "Tokens computed in one engine step, of prompts and answers."
        self._step_tokens = histogram("vllm:iteration_tokens_total", step, _STEP_TOKENS)
        refused = ("model_name", "reason")
        text = "Requests answered 429, by the limit that they met."
        self._refused = Counter("vllm:admission_rejections", text, refused, registry=registry).labels(
            model, "max_num_queued_reqs"
        )
        text = "Streams that ended because their client read too slowly."
        self._cut = counter("paretune:streams_cut", text)
        text = "Reloads of the spec, by result: changed, replaced, unchanged, refused."
        self._reloads = Counter("paretune:reloads", text, ("model_name", "result"), registry=registry)
        text = "Whether the last reload of the spec took effect, 1 or 0; 1 before the first."
        reloaded = Gauge("paretune:last_reload_successful", text, ("model_name",), registry=registry)
        self._reloaded = reloaded.labels(model)
        self._reloaded.set(1)
        reasons = ("model_name", "finished_reason")
        self._finished = Counter("vllm:request_success", "Requests that ended, by reason.", reasons, registry=registry)
        self._model = model
        registry.register(_Replicas(model, fleet))
        fleet.on_step = self.step

    def step(self, queue: Queue) -> None:
        """An engine has made a step."""
        if queue.tokens:
            self._step_tokens.observe(queue.tokens)

    def request_received(self, max_tokens: int) -> None:
        """A prompt is on its way to a replica."""
        self._max_tokens.observe(max_tokens)
        self._max_generation.observe(max_tokens)
        self._choices.observe(1)

    def request_refused(self) -> None:
        """A request met the limit of the queue."""
        self._refused.inc()

    def stream_cut(self) -> None:
        """A stream ended because its client read too slowly."""
        self._cut.inc()

    def reloaded(self, result: str) -> None:
        """The spec was read again; "changed", "replaced", "unchanged" or "refused"."""
        self._reloads.labels(self._model, result).inc()
        self._reloaded.set(result != "refused")

    def first_token(self, ttft_s: float, prompt_tokens: int, tokens: int) -> None:
        """A request's first tokens came."""
        self._ttft.observe(ttft_s)
        self._prompt_tokens.inc(prompt_tokens)
        self._generation_tokens.inc(tokens)

    def next_tokens(self, gap_s: float, tokens: int) -> None:
        """More tokens of a request came."""
        self._inter_token.observe(gap_s)
        self._time_per_token.observe(gap_s)
        self._generation_tokens.inc(tokens)

    def request_finished(self, request: Generation, reason: str, end_s: float) -> None:
        """A request ended. Times of unfinished ones would drag the histograms down, so they are only counted."""
        self._finished.labels(self._model, reason).inc()
        first_s, admitted_s = request.first_token_s, request.admitted_s
        if reason not in ("stop", "length") or first_s is None or admitted_s is None:
            return
        self._e2e.observe(end_s - request.received_s)
        self._queue_time.observe(admitted_s - request.received_s)
        self._prefill_time.observe(first_s - admitted_s)
        self._decode_time.observe(end_s - first_s)
        self._inference_time.observe(end_s - admitted_s)
        self._prompt_length.observe(len(request.prompt_token_ids))
        self._answer_length.observe(request.completion_tokens)
        if request.completion_tokens > 1:
            self._tpot.observe((end_s - first_s) / (request.completion_tokens - 1))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


def _one_two_five(most: int) -> list[int]:
    """1, 2, 5, 10, 20, ... up to `most`, as vLLM's buckets of lengths are."""
    buckets = [digit * 10**exponent for exponent in range(len(str(most))) for digit in (1, 2, 5)]
    return [bucket for bucket in buckets if bucket <= most]


class _Replicas:
    """Reports the replicas' statistics, added up, when Prometheus asks."""

    def __init__(self, model: str, fleet: Fleet) -> None:
        self._model = model
        self._fleet = fleet

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._fleet.stats()
        used, total = sum(one.kv_blocks_used for one in stats), sum(one.kv_blocks_total for one in stats)
        yield self._gauge("vllm:num_requests_running", "Requests in the running batch.", sum(s.running for s in stats))
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait.", sum(s.waiting for s in stats))
        usage = used / total if total else 0
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks held, 0 to 1.", usage)
        yield self._gauge("vllm:gpu_cache_usage_perc", "Share of KV blocks held, 0 to 1 (older name).", usage)
        yield self._counter("vllm:num_preemptions", "Requests preempted.", sum(s.preemptions for s in stats))
        hits, queries = sum(s.prefix_hit_tokens for s in stats), sum(s.prefix_query_tokens for s in stats)
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", queries)
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", hits)
        for name, value in (("queries", queries), ("hits", hits)):
            yield self._counter(f"vllm:gpu_prefix_cache_{name}", "Older name of prefix_cache_" + name, value)
        if self._fleet.pool.speculation != "none":
            yield from self._speculation(stats)
        yield self._cache_config()
        yield self._counter("paretune:engine_steps", "Engine steps.", sum(s.steps for s in stats))

    def _speculation(self, stats: Sequence[EngineStats]) -> Iterator[Metric]:
        drafts, tokens = sum(one.drafts for one in stats), sum(one.draft_tokens for one in stats)
        accepted = sum(one.accepted_tokens for one in stats)
        yield self._counter("vllm:spec_decode_num_drafts", "Steps of a request that verified proposals.", drafts)
        yield self._counter("vllm:spec_decode_num_draft_tokens", "Tokens proposed, and verified.", tokens)
        yield self._counter("vllm:spec_decode_num_accepted_tokens", "Proposed tokens that the model said.", accepted)
        text = "Drafts whose token at this position, counted from 0, was accepted."
        name = "vllm:spec_decode_num_accepted_tokens_per_pos"
        by_position = CounterMetricFamily(name, text, labels=["model_name", "position"])
        for position in range(self._fleet.pool.num_speculative_tokens):
            counts = (sum(one.accepted_by_position[position : position + 1]) for one in stats)
            by_position.add_metric([self._model, str(position)], sum(counts))
        yield by_position

    def _cache_config(self) -> Metric:
        """What dashboards multiply usage with; always 1."""
        pool = self._fleet.pool
        labels = {
            "block_size": str(pool.block_size),
            "num_gpu_blocks": str(pool.num_kv_blocks * pool.replicas),
            "cache_dtype": pool.kv_cache_dtype,
            "enable_prefix_caching": str(pool.enable_prefix_caching),
        }
        text = "KV cache of the replicas together, as labels."
        family = GaugeMetricFamily("vllm:cache_config_info", text, labels=["model_name", *labels])
        family.add_metric([self._model, *labels.values()], 1)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family
