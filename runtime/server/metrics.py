"""What /metrics tells Prometheus. Names are vLLM's where the meaning is; times count from receipt of the request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..worker import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# vLLM's buckets (vllm/v1/metrics/loggers.py), so that one dashboard shows both
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 40, 80)
_REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)


class Metrics:
    """The server's own registry: what it counts itself, and what its replicas report."""

    def __init__(self, model: str, replicas: Callable[[], Sequence[Stats]]) -> None:
        """replicas: the latest statistics of every replica."""
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
        reasons = ("model_name", "finished_reason")
        self._finished = Counter("vllm:request_success", "Requests that ended, by reason.", reasons, registry=registry)
        self._model = model
        registry.register(_Replicas(model, replicas))

    def first_token(self, ttft_s: float, prompt_tokens: int, tokens: int) -> None:
        """A request's first tokens came."""
        self._ttft.observe(ttft_s)
        self._prompt_tokens.inc(prompt_tokens)
        self._generation_tokens.inc(tokens)

    def next_tokens(self, gap_s: float, tokens: int) -> None:
        """More tokens of a request came."""
        self._inter_token.observe(gap_s)
        self._generation_tokens.inc(tokens)

    def request_finished(self, reason: str, e2e_s: float, ttft_s: float | None, tokens: int) -> None:
        """A request ended. Times of unfinished ones would drag the histograms down, so they are only counted."""
        self._finished.labels(self._model, reason).inc()
        if reason in ("stop", "length"):
            self._e2e.observe(e2e_s)
            if ttft_s is not None and tokens > 1:
                self._tpot.observe((e2e_s - ttft_s) / (tokens - 1))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _Replicas:
    """Reports the replicas' statistics, added up, when Prometheus asks."""

    def __init__(self, model: str, replicas: Callable[[], Sequence[Stats]]) -> None:
        self._model = model
        self._replicas = replicas

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._replicas()
        used, total = sum(one.kv_blocks_used for one in stats), sum(one.kv_blocks_total for one in stats)
        yield self._gauge("vllm:num_requests_running", "Requests in the running batch.", sum(s.running for s in stats))
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait.", sum(s.waiting for s in stats))
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks held, 0 to 1.", used / total if total else 0)
        yield self._counter("vllm:num_preemptions", "Requests preempted.", sum(s.preemptions for s in stats))
        hits, queries = sum(s.prefix_hit_tokens for s in stats), sum(s.prefix_query_tokens for s in stats)
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", queries)
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", hits)
        yield self._counter("paretune:engine_steps", "Engine steps.", sum(s.steps for s in stats))

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family
