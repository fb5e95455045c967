"""What Prometheus is told of the experts: counters since the server started, gauges over the window of latest steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.experts import ExpertScrape

_GAUGES = (
    ("expert_load_max_over_mean", "max_over_mean", "Assignments of the busiest expert over the mean; 1 is even."),
    ("expert_load_cv", "coefficient_of_variation", "Coefficient of variation of the experts' assignments."),
    ("router_entropy", "entropy", "Mean entropy of the router's distribution, in nats."),
    ("router_auxiliary_loss", "auxiliary_loss", "E * sum f * P; 1 is even."),
    ("expert_effective_batch", "effective_batch", "Mean tokens of an expert in a step in which it has any."),
    ("expert_distinct", "distinct_experts", "Mean number of experts that a step uses."),
)


class ExpertCollector(Collector):
    """The metrics of one scrape. Before the first step, and after a reset until the next, there are no gauges."""

    def __init__(self, model_name: str, scrape: ExpertScrape) -> None:
        self._model_name = model_name
        self._scrape = scrape

    def collect(self) -> Iterator[Metric]:
        labels = ["model_name", "layer"]
        counts, window = self._scrape.counts, self._scrape.window
        tokens = CounterMetricFamily("mixserve_expert_tokens", "Tokens an expert computed.", labels=[*labels, "expert"])
        for layer, dispatched in enumerate(counts.dispatched):
            for expert, value in enumerate(dispatched):
                tokens.add_metric([self._model_name, str(layer), str(expert)], value)
        yield tokens
        dropped = CounterMetricFamily("mixserve_expert_dropped", "Assignments that were dropped.", labels=labels)
        yield self._by_layer(dropped, counts.dropped)
        if window.steps:
            for name, field, text in _GAUGES:
                gauge = GaugeMetricFamily(f"mixserve_{name}", f"{text} Over the latest steps.", labels=labels)
                yield self._by_layer(gauge, [getattr(layer, field) for layer in window.layers])

    def _by_layer(self, family: CounterMetricFamily | GaugeMetricFamily, values: Sequence[float]) -> Metric:
        for layer, value in enumerate(values):
            family.add_metric([self._model_name, str(layer)], value)
        return family
