"""Metrics of one HTTP process, in Prometheus' text form at ``/metrics``.

What concerns requests is of the process that answers; what concerns models is put together from
all their replicas, calls over the handle (PPO's) included. With several HTTP processes the label
``ingress`` tells their series apart. Serve's own metrics are on Ray's metrics port.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from reward_service.score import ModelScores
from reward_service.statistics import ModelStatus

CONTENT_TYPE = CONTENT_TYPE_LATEST
PREFIX = "rlhf_reward"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class ServiceMetrics:
    """Counters of requests, and gauges of the models as they are at a scrape."""

    def __init__(self, ingress: str = "0") -> None:
        self._ingress = ingress
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "requests",
            "HTTP requests answered",
            ["ingress", "route", "status"],
            namespace=PREFIX,
            registry=registry,
        )
        self._seconds = Histogram(
            "request_seconds",
            "Time to answer",
            ["ingress", "route"],
            buckets=SECONDS,
            namespace=PREFIX,
            registry=registry,
        )
        self._in_flight = Gauge(
            "requests_in_flight", "HTTP requests", ["ingress"], namespace=PREFIX, registry=registry
        )
        self._items = Counter(
            "items",
            "Items scored over HTTP",
            ["ingress", "model", "outcome"],
            namespace=PREFIX,
            registry=registry,
        )
        self._tokens = Counter(
            "tokens",
            "Tokens scored over HTTP",
            ["ingress", "model"],
            namespace=PREFIX,
            registry=registry,
        )

    def begin(self) -> None:
        """A request comes in."""
        self._in_flight.labels(self._ingress).inc()

    def end(self, route: str, status: int, seconds: float) -> None:
        """It has been answered."""
        self._in_flight.labels(self._ingress).dec()
        self._requests.labels(self._ingress, route, str(status)).inc()
        self._seconds.labels(self._ingress, route).observe(seconds)

    def count(self, answer: ModelScores) -> None:
        """Scores that go out."""
        failed = sum(error is not None for error in answer.errors)
        items = self._items
        items.labels(self._ingress, answer.model, "scored").inc(len(answer.errors) - failed)
        items.labels(self._ingress, answer.model, "failed").inc(failed)
        self._tokens.labels(self._ingress, answer.model).inc(sum(answer.tokens))

    def text(self, statuses: Mapping[str, ModelStatus]) -> bytes:
        """The page that Prometheus reads."""
        models = CollectorRegistry()
        models.register(_Models(statuses.values()))
        return generate_latest(self._registry) + generate_latest(models)


class _Models(Collector):
    def __init__(self, statuses: Iterable[ModelStatus]) -> None:
        self._statuses = list(statuses)

    def collect(self) -> Iterable[Metric]:
        def gauge(name: str, help_text: str, *labels: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"{PREFIX}_{name}", help_text, labels=["model", *labels])

        ready = gauge("model_ready", "1 when the model can score", "version")
        replicas = gauge("model_replicas", "Processes that answered for the model")
        refused = gauge("model_reload_refused", "1 when the last reload was refused")
        mean = gauge("score_mean", "Mean score of a version", "version")
        std = gauge("score_std", "Standard deviation of its scores", "version")
        least = gauge("score_min", "Least score", "version")
        greatest = gauge("score_max", "Greatest score", "version")
        count = CounterMetricFamily(f"{PREFIX}_scores", "Scores", labels=["model", "version"])
        for status in self._statuses:
            ready.add_metric([status.model, status.version], float(status.error is None))
            replicas.add_metric([status.model], status.replicas)
            refused.add_metric([status.model], float(status.reload_error is not None))
            for seen in status.statistics:
                where = [status.model, seen.version]
                count.add_metric(where, seen.count)
                if seen.count:
                    mean.add_metric(where, seen.mean)
                    std.add_metric(where, seen.std)
                    least.add_metric(where, seen.least)
                    greatest.add_metric(where, seen.greatest)
        return [ready, replicas, refused, mean, std, least, greatest, count]
