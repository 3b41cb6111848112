"""/metrics: vLLM's names where dashboards and gateways know them, `miniserve:` for what only miniserve has."""

import time
from collections.abc import Iterable
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from miniserve.dispatcher import Dispatcher

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN_BUCKETS = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
GAP_BUCKETS = [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
REQUEST_BUCKETS = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920]

Family = CounterMetricFamily | GaugeMetricFamily
COUNTER, GAUGE = CounterMetricFamily, GaugeMetricFamily
CACHE_COUNTERS = [  # name, text, field of WorkerStats
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", "prefix_queries"),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache", "prefix_hits"),
    ("spec_decode_num_draft_tokens", "Tokens drafted by prompt lookup", "drafted_tokens"),
    ("spec_decode_num_accepted_tokens", "Drafted tokens that held", "held_tokens"),
    ("num_preemptions", "Times that a running request lost its pages to another", "preemptions"),
]
WORKER_NUMBERS: list[tuple[type[Family], str, str, str]] = [
    (COUNTER, "worker_steps", "Steps that ran the model", "steps"),
    (COUNTER, "worker_busy_seconds", "Seconds of work: steps, messages, copies of KV", "busy_seconds"),
    (COUNTER, "worker_prompt_tokens", "Prompt tokens computed", "prompt_tokens"),
    (COUNTER, "worker_generated_tokens", "Tokens sampled", "generated_tokens"),
    (GAUGE, "worker_requests_running", "Requests in the batch", "running"),
    (GAUGE, "worker_requests_waiting", "Requests that wait in the worker", "waiting"),
    (GAUGE, "worker_queued_prefill_tokens", "Prompt tokens that wait to be computed", "queued_prefill_tokens"),
    (COUNTER, "worker_pages_offloaded", "KV pages copied to host memory", "offloaded"),
    (COUNTER, "worker_pages_restored", "KV pages copied back from host memory", "restored"),
    (GAUGE, "worker_host_pages", "KV pages in host memory", "host_pages"),
    (GAUGE, "worker_leases", "Handoffs whose pages are kept for another worker", "leases"),
]
HANDOFF_COUNTERS = [  # name, text, field of Link
    ("handoffs", "Handoffs that ended well", "count"),
    ("handoff_pages", "KV pages handed off", "pages"),
    ("handoff_bytes", "Bytes of KV handed off", "bytes"),
    ("handoff_seconds", "Seconds of copying the KV of handoffs", "seconds"),
]
Ending = Literal["stop", "length", "abort", "error"]


class Metrics(Collector):
    """What one server counts and measures, in a registry of its own. A "request" is one choice; times in seconds.

    The scheduler's and the workers' own numbers are read when metrics are asked for.
    """

    def __init__(self, dispatcher: Dispatcher, model: str) -> None:
        self._dispatcher = dispatcher
        self._model = model
        self._registry = CollectorRegistry()
        self._registry.register(self)

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
        self._endings = {reason: endings.labels(model, reason) for reason in get_args(Ending)}

    def first_token(self, seconds: float, prompt_tokens: int) -> None:
        """A request's first token came `seconds` after its arrival."""
        self._first_token.observe(seconds)
        self._prompt_tokens.inc(prompt_tokens)

    def gap(self, seconds: float) -> None:
        """A further token came `seconds` after the one before."""
        self._gap.observe(seconds)

    def generated(self, tokens: int) -> None:
        self._generated.inc(tokens)

    def ended(self, reason: Ending, arrived: float) -> None:
        """A request that arrived at `arrived` (`time.perf_counter`) has ended."""
        self._endings[reason].inc()
        if reason in ("stop", "length"):
            self._request.observe(time.perf_counter() - arrived)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """All families, with a sample for each worker or pair of workers where each has its own number."""
        scheduler, model = self._dispatcher.scheduler, self._model
        workers = scheduler.stats.items()
        total = sum(stats.total_pages for _, stats in workers)
        usage = sum(stats.held_pages for _, stats in workers) / total if total else 0.0
        for name, text, number in (
            ("num_requests_running", "Requests on workers", scheduler.active - scheduler.queued),
            ("num_requests_waiting", "Requests that wait", scheduler.queued),
            ("kv_cache_usage_perc", "Part of the KV in use, 0 to 1", usage),
        ):
            yield _family(GAUGE, f"vllm:{name}", text, ["model_name"], [((model,), number)])
        # By worker, so that the counters of one that was started again do not pull down a sum over all.
        for name, text, field in CACHE_COUNTERS:
            samples = [((model, worker), getattr(stats, field)) for worker, stats in workers]
            yield _family(COUNTER, f"vllm:{name}", text, ["model_name", "engine"], samples)
        for kind, name, text, field in WORKER_NUMBERS:
            by_worker = [((worker,), getattr(stats, field)) for worker, stats in workers]
            yield _family(kind, f"miniserve:{name}", text, ["worker"], by_worker)
        states = ("free", "cached", "held")
        pages = [((worker, state), getattr(stats, f"{state}_pages")) for worker, stats in workers for state in states]
        yield _family(GAUGE, "miniserve:kv_pages", "KV pages by state", ["worker", "state"], pages)
        for name, text, field in HANDOFF_COUNTERS:
            moved = [(pair, getattr(totals, field)) for pair, totals in scheduler.links.items()]
            yield _family(COUNTER, f"miniserve:{name}", text, ["source", "destination"], moved)
        placed = [((*pair, self._dispatcher.policy_name), count) for pair, count in scheduler.placements.items()]
        labels = ["prefill_worker", "home", "policy"]
        yield _family(COUNTER, "miniserve:placements", "Turns by where they are prefilled and live", labels, placed)


def _family(
    kind: type[Family], name: str, text: str, labels: list[str], samples: Iterable[tuple[tuple[str, ...], float]]
) -> Metric:
    family = kind(name, f"{text}.", labels=labels)
    for values, number in samples:
        family.add_metric(values, number)
    return family
