"""/metrics: vLLM's names where dashboards and gateways know them, `miniserve:` for what only miniserve has."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from miniserve.frontend.client import EngineClient

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN_BUCKETS = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
GAP_BUCKETS = [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
REQUEST_BUCKETS = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920]
Ending = Literal["stop", "length", "abort", "error"]


class Metrics:
    """What one server counts and measures, in a registry of its own. A "request" is one choice; times in seconds."""

    def __init__(self, client: EngineClient, model: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(client, model))

        def histogram(name: str, text: str, buckets: list[float]) -> Histogram:
            made = Histogram(name, text, ["model_name"], buckets=buckets, registry=self._registry)
            return made.labels(model)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["model_name"], registry=self._registry).labels(model)

        self._first_token = histogram(
            "vllm:time_to_first_token_seconds", "From a request's arrival to its first token.", FIRST_TOKEN_BUCKETS
        )
        self._gap = histogram("vllm:inter_token_latency_seconds", "Between tokens of a request.", GAP_BUCKETS)
        self._request = histogram(
            "vllm:e2e_request_latency_seconds", "From a request's arrival to its end.", REQUEST_BUCKETS
        )
        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of requests that have begun to answer.")
        self._generated = counter("vllm:generation_tokens", "Tokens generated.")
        endings = Counter(
            "vllm:request_success",
            "Requests that have ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        reasons: tuple[Ending, ...] = ("stop", "length", "abort", "error")
        self._endings = {reason: endings.labels(model, reason) for reason in reasons}

    def first_token(self, seconds: float, prompt_tokens: int) -> None:
        """A request's first token came `seconds` after its arrival."""
        self._first_token.observe(seconds)
        self._prompt_tokens.inc(prompt_tokens)

    def gap(self, seconds: float) -> None:
        """A further token came `seconds` after the one before."""
        self._gap.observe(seconds)

    def generated(self, tokens: int) -> None:
        """Tokens came."""
        self._generated.inc(tokens)

    def ended(self, reason: Ending, arrived: float) -> None:
        """A request that arrived at `arrived` (`time.perf_counter`) has ended."""
        self._endings[reason].inc()
        if reason in ("stop", "length"):
            self._request.observe(time.perf_counter() - arrived)

    def render(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)


class EngineCollector(Collector):
    """Reads the engine's own numbers when somebody asks for them."""

    def __init__(self, client: EngineClient, model: str) -> None:
        self._client = client
        self._model = model

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names are known without asking an engine that may not have started."""
        return []

    def collect(self) -> Iterable[Metric]:
        """All families, with a sample per worker or pair of workers where there is more than one number."""
        yield from self._of_all()
        yield from self._of_workers()
        yield from self._of_pairs()

    def _of_all(self) -> Iterable[Metric]:
        stats = self._client.stats.values()
        total = sum(s.total_pages for s in stats)
        for name, text, value in (
            ("num_requests_running", "Requests on workers.", self._client.running),
            ("num_requests_waiting", "Requests that wait for a place on a worker.", self._client.queued),
            (
                "kv_cache_usage_perc",
                "Part of the KV pages that running requests hold, from 0 to 1.",
                sum(s.held_pages for s in stats) / total if total else 0.0,
            ),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge

    def _of_workers(self) -> Iterable[Metric]:
        # By worker, so that the counters of one that was started again do not pull down a sum over all.
        for name, text, field in (
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "prefix_queries"),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", "prefix_hits"),
            ("num_preemptions", "Times that a running request lost its pages to another.", "preemptions"),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=["model_name", "engine"])
            for worker, stats in self._client.stats.items():
                counter.add_metric([self._model, worker], getattr(stats, field))
            yield counter
        for name, text, field in (
            ("worker_steps", "Steps of the worker's loop that ran the model.", "steps"),
            ("worker_busy_seconds", "Seconds in such steps.", "busy_seconds"),
            ("worker_prefilled_tokens", "Prompt tokens that the worker has computed.", "prompt_tokens"),
            ("worker_generated_tokens", "Tokens that the worker has sampled.", "generated_tokens"),
        ):
            counter = CounterMetricFamily(f"miniserve:{name}", text, labels=["worker"])
            for worker, stats in self._client.stats.items():
                counter.add_metric([worker], getattr(stats, field))
            yield counter
        for name, text, field in (
            ("worker_requests_running", "Requests in the worker's batch.", "running"),
            ("worker_requests_waiting", "Requests that wait in the worker.", "waiting"),
            ("worker_queued_prefill_tokens", "Prompt tokens that wait to be computed.", "queued_prefill_tokens"),
            ("worker_leases", "Handoffs whose pages the worker keeps for another.", "leases"),
        ):
            gauge = GaugeMetricFamily(f"miniserve:{name}", text, labels=["worker"])
            for worker, stats in self._client.stats.items():
                gauge.add_metric([worker], getattr(stats, field))
            yield gauge
        pages = GaugeMetricFamily("miniserve:kv_pages", "KV pages by state.", labels=["worker", "state"])
        for worker, stats in self._client.stats.items():
            for state in ("free", "cached", "held"):
                pages.add_metric([worker, state], getattr(stats, f"{state}_pages"))
        yield pages

    def _of_pairs(self) -> Iterable[Metric]:
        for name, text, field in (
            ("handoffs", "Handoffs that ended well.", "count"),
            ("handoff_pages", "KV pages handed off.", "pages"),
            ("handoff_bytes", "Bytes of KV handed off.", "bytes"),
            ("handoff_seconds", "Seconds of copying KV in handoffs.", "seconds"),
        ):
            counter = CounterMetricFamily(f"miniserve:{name}", text, labels=["source", "destination"])
            for pair, handoffs in self._client.handoffs.items():
                counter.add_metric(pair, getattr(handoffs, field))
            yield counter
        placed = CounterMetricFamily(
            "miniserve:placements",
            "Turns by the worker that prefills and the home.",
            labels=["prefill_worker", "home", "policy"],
        )
        for (prefiller, home), count in self._client.placements.items():
            placed.add_metric([prefiller, home, self._client.policy_name], count)
        yield placed
