"""/metrics: vLLM's names where dashboards and gateways know them, `miniserve:` for what only miniserve has."""

import time
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from miniserve.cluster.messages import Report, WorkerStats
from miniserve.config import tables
from miniserve.dispatcher import Dispatcher
from miniserve.scheduler.conversation import FINISHES, TurnEnd

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TABLES = tables("monitor/metrics.toml")
BUCKETS: dict[str, list[float]] = TABLES["buckets"]
PROBED = {"/metrics", "/health", "/version"}
"""Routes that are not counted, as with vLLM: a share of errors is one of real requests."""

Family = CounterMetricFamily | GaugeMetricFamily
KINDS: dict[str, type[Family]] = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}


class Metrics(Collector):
    """What one server counts and measures, in a registry of its own. A "request" is one choice; times in seconds. The
    scheduler's and the workers' own numbers are read when metrics are asked for."""

    def __init__(self, dispatcher: Dispatcher, model: str) -> None:
        self._dispatcher = dispatcher
        self._model = model
        self._registry = CollectorRegistry()
        self._registry.register(self)

        def made(name: str, row: dict[str, Any]) -> Any:
            about = name, f"{row['text']}.", row["labels"]
            if "buckets" not in row:
                return Counter(*about, registry=self._registry)
            return Histogram(*about, buckets=BUCKETS[row["buckets"]], registry=self._registry)

        self._own = {name: made(name, row) for name, row in TABLES["own"].items()}
        self._histograms = {
            name: made(f"vllm:{name}", {**row, "labels": ["model_name"]}).labels(model)
            for name, row in TABLES["requests"].items()
        }
        self._prompt_tokens = self._own["vllm:prompt_tokens"].labels(model)
        self.generated = self._own["vllm:generation_tokens"].labels(model)
        self._endings = {reason: self._own["vllm:request_success"].labels(model, reason) for reason in FINISHES}
        dispatcher.watchers.append(self._stepped)

    def observe(self, **values: float | None) -> None:
        """Of a request, values for histograms by their names in metrics.toml; None is left out."""
        for name, value in values.items():
            if value is not None:
                self._histograms[name].observe(value)

    def first_token(self, seconds: float, prompt_tokens: int) -> None:
        """A request's first token came `seconds` after its arrival."""
        self.observe(time_to_first_token_seconds=seconds)
        self._prompt_tokens.inc(prompt_tokens)

    def missed(self, kind: str, tokens: int) -> None:
        """A turn's prompt had changed, and `tokens` were computed again."""
        self._own["miniserve:prefix_misses"].labels(kind).inc()
        self._own["miniserve:prefix_missed_tokens"].labels(kind).inc(tokens)

    def ended(self, reason: TurnEnd, arrived: float) -> None:
        """A request that arrived at `arrived` (`time.perf_counter`) has ended."""
        self._endings[reason].inc()
        if reason in ("stop", "length"):
            self.observe(e2e_request_latency_seconds=time.perf_counter() - arrived)

    def requested(self, method: str, status: int, handler: str, seconds: float) -> None:
        """An HTTP request has ended. `handler` is its route's template, or "none"; uvicorn knows some 30 methods."""
        if handler not in PROBED:
            self._own["http_requests"].labels(method, f"{status // 100}xx", handler).inc()
            self._own["http_request_duration_seconds"].labels(method, handler).observe(seconds)

    def _stepped(self, worker: str, report: Report) -> None:
        for step in report.steps:
            self._own["vllm:iteration_tokens_total"].labels(self._model, worker).observe(step.prefill + step.decodes)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """All families, with a sample for each worker or pair of workers where each has its own number."""
        scheduler, model = self._dispatcher.scheduler, self._model
        workers = scheduler.stats.items()
        total = sum(stats.total_pages for _, stats in workers)
        usage = sum(stats.held_pages for _, stats in workers) / total if total else 0.0
        waiting = scheduler.queued
        server = SimpleNamespace(running=len(scheduler.turns) - waiting, waiting=waiting, usage=usage)
        states = ("free", "cached", "held")
        # By table of metrics.toml: for values of its labels, a number or what has it as a field.
        sources: dict[str, Iterable[tuple[tuple[str, ...], Any]]] = {
            "server": [((model,), server)],
            "engine": [((model, name), stats) for name, stats in workers],
            "pool": [(self._pool(name, stats), 1) for name, stats in workers if name in self._dispatcher.ready],
            "sleep": [((model, name, "awake"), 1) for name, _ in workers],
            "worker": [((name,), stats) for name, stats in workers],
            "pages": [((name, at), getattr(stats, f"{at}_pages")) for name, stats in workers for at in states],
            "pair": scheduler.links.items(),
            "placement": [((*pair, scheduler.policy.name), count) for pair, count in scheduler.placements.items()],
        }
        for source, found in sources.items():
            for name, row in TABLES[source].items():
                family = KINDS[row["kind"]](name, f"{row['text']}.", labels=TABLES["labels"][source])
                for values, of in found:
                    family.add_metric(values, getattr(of, row["field"]) if "field" in row else of)
                yield family

    def _pool(self, worker: str, stats: WorkerStats) -> tuple[str, ...]:
        ready = self._dispatcher.ready[worker]
        sizes = ready.page_tokens, stats.total_pages, stats.host_total
        return self._model, worker, ready.dtype, *map(str, sizes)
