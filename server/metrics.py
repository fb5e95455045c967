"""GET /metrics: vLLM's names under the prefix `mixserve_`, in a registry of this app's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.types import EngineStats
from server.expert_metrics import ExpertCollector
from server.experts import ExpertScrape
from server.protocol.live import Latency
from server.recent import RECENT_SECONDS, RecentTimes

_FIRST_TOKEN_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_REQUEST_BUCKETS = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class Metrics:
    """What the server counts itself, and what its engine counts. A "request" is one choice, as the engine sees it."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(model_name, stats))
        ProcessCollector(registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(f"mixserve_{name}", text, ["model_name"], registry=self._registry, buckets=buckets)
            return metric.labels(model_name)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"mixserve_{name}", text, ["model_name", *labels], registry=self._registry)

        self._model_name = model_name
        self._recent_first, self._recent_inter = RecentTimes(), RecentTimes()
        self._first_token = histogram("time_to_first_token_seconds", "Submission to first token.", _FIRST_TOKEN_BUCKETS)
        self._inter_token = histogram("inter_token_latency_seconds", "Between two tokens.", _TOKEN_BUCKETS)
        self._e2e = histogram("e2e_request_latency_seconds", "Submission to last token.", _REQUEST_BUCKETS)
        self._queue = histogram("request_queue_time_seconds", "Submission to first scheduled.", _REQUEST_BUCKETS)
        self._success = counter("request_success", "Requests that ran to their end.", "finished_reason")
        self._rejected = counter("requests_rejected", "Requests that were refused.", "reason")
        self._aborted = counter("requests_aborted", "Requests whose client left.").labels(model_name)

    def start_request(self) -> RequestTimer:
        return RequestTimer(
            self._queue, self._first_token, self._inter_token, self._e2e, self._recent_first, self._recent_inter
        )

    def latency(self) -> Latency:
        """Of the last minute."""
        return {
            "seconds": RECENT_SECONDS,
            "time_to_first_token": self._recent_first.percentiles(),
            "inter_token": self._recent_inter.percentiles(),
        }

    def count_success(self, finish_reason: str) -> None:
        self._success.labels(self._model_name, finish_reason).inc()

    def count_rejected(self, reason: str) -> None:
        """`reason` must come from a closed list: every new one is a new time series."""
        self._rejected.labels(self._model_name, reason).inc()

    def count_aborted(self) -> None:
        self._aborted.inc()

    def render(self, experts: ExpertScrape | None = None) -> bytes:
        """Prometheus' text format, version 0.0.4; of the experts too, where there is something to tell."""
        text = generate_latest(self._registry)
        if experts is not None:
            registry = CollectorRegistry()
            registry.register(ExpertCollector(self._model_name, experts))
            text += generate_latest(registry)
        return text


class RequestTimer:
    """Times one request from its submission."""

    def __init__(
        self,
        queue: Histogram,
        first_token: Histogram,
        inter_token: Histogram,
        e2e: Histogram,
        recent_first: RecentTimes,
        recent_inter: RecentTimes,
    ) -> None:
        self._queue = queue
        self._first_token = first_token
        self._inter_token = inter_token
        self._e2e = e2e
        self._recent_first = recent_first
        self._recent_inter = recent_inter
        self._start = self._last = time.monotonic()
        self._num_tokens = 0

    def queued(self, seconds: float) -> None:
        """The engine says how long the request waited for its first step."""
        self._queue.observe(seconds)

    def tokens(self, count: int) -> None:
        """`count` tokens arrived together."""
        if count == 0:
            return
        now = time.monotonic()
        if self._num_tokens == 0:
            self._first_token.observe(now - self._start)
            self._recent_first.note(now - self._start)
        else:
            self._inter_token.observe((now - self._last) / count)
            self._recent_inter.note((now - self._last) / count)
        self._last = now
        self._num_tokens += count

    def finish(self) -> None:
        self._e2e.observe(time.monotonic() - self._start)


def kv_cache_usage(stats: EngineStats) -> float:
    """The share in use; 1 is all."""
    return 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0


class EngineCollector(Collector):
    """Reads the engine's latest snapshot when a scrape comes."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        self._model_name = model_name
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield self._gauge("num_requests_running", "Requests in the batch.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Requests in the queue.", stats.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the KV cache in use; 1 is all.", kv_cache_usage(stats))
        yield self._gauge("engine_peak_memory_bytes", "Highest memory use of the engine.", stats.peak_memory_bytes)
        yield self._counter("num_preemptions", "Requests put back for want of KV cache.", stats.num_preemptions)
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_cache_queries)
        yield self._counter("prefix_cache_hits", "Prompt tokens found.", stats.prefix_cache_hits)
        yield self._counter("prompt_tokens", "Prompt tokens read.", stats.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", stats.generation_tokens)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"mixserve_{name}", text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"mixserve_{name}", text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family
