"""/metrics: vLLM's names where dashboards and gateways know them, `miniserve:` for what only miniserve has."""

import time
from collections.abc import Iterable
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from miniserve.cluster.messages import Report
from miniserve.dispatcher import Dispatcher

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN_BUCKETS = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
GAP_BUCKETS = [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
REQUEST_BUCKETS = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920]
TOKEN_BUCKETS: list[float] = [digit * 10**zeros for zeros in range(6) for digit in (1, 2, 5)]
HTTP_BUCKETS = [0.1, 0.5, 1, 5, 30, 120, 600]
REQUEST_HISTOGRAMS: dict[str, tuple[str, list[float]]] = {
    "time_to_first_token_seconds": ("From a request's arrival to its first token", FIRST_TOKEN_BUCKETS),
    "inter_token_latency_seconds": ("Between tokens of a request", GAP_BUCKETS),
    "e2e_request_latency_seconds": ("From a request's arrival to its end", REQUEST_BUCKETS),
    "request_queue_time_seconds": ("From a turn's start to its first token, without `prefill`", REQUEST_BUCKETS),
    "request_prefill_time_seconds": ("From when a turn got its pages to its first token", REQUEST_BUCKETS),
    "request_decode_time_seconds": ("From a request's first token to its last", REQUEST_BUCKETS),
    "request_inference_time_seconds": ("Prefill and decode together", REQUEST_BUCKETS),
    "request_time_per_output_token_seconds": ("A request's mean time between tokens", GAP_BUCKETS),
    "request_prompt_tokens": ("Prompt tokens of a request", TOKEN_BUCKETS),
    "request_generation_tokens": ("Tokens generated for a request", TOKEN_BUCKETS),
    "request_params_max_tokens": ("The most tokens that a request may get", TOKEN_BUCKETS),
    "request_params_n": ("Choices of a prompt", [1, 2, 5, 10, 20]),
    "request_max_num_generation_tokens": ("Tokens of the longest choice of a prompt", TOKEN_BUCKETS),
}
"""vLLM's names. Times are vLLM's, too: a request waits, prefills and decodes one after the other."""
PROBED = {"/metrics", "/health", "/version"}
"""Routes that are not counted, as with vLLM: a share of errors is one of real requests."""

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

        def histogram(name: str, text: str, labels: list[str], buckets: list[float]) -> Histogram:
            return Histogram(name, f"{text}.", labels, buckets=buckets, registry=self._registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, f"{text}.", labels, registry=self._registry)

        self._histograms = {
            name: histogram(f"vllm:{name}", text, ["model_name"], buckets).labels(model)
            for name, (text, buckets) in REQUEST_HISTOGRAMS.items()
        }
        text = "Tokens computed in a step, of prompts and of answers"
        self._steps = histogram("vllm:iteration_tokens_total", text, ["model_name", "engine"], TOKEN_BUCKETS)
        text = "Prompt tokens of requests that have begun to answer"
        self._prompt_tokens = counter("vllm:prompt_tokens", text, "model_name").labels(model)
        self._generated = counter("vllm:generation_tokens", "Tokens generated", "model_name").labels(model)
        text = "Requests that have ended, by reason"
        endings = counter("vllm:request_success", text, "model_name", "finished_reason")
        self._endings = {reason: endings.labels(model, reason) for reason in get_args(Ending)}
        self._http = counter("http_requests", "HTTP requests that have ended", "method", "status", "handler")
        self._http_seconds = histogram(
            "http_request_duration_seconds", "From a head to the end of its answer", ["method", "handler"], HTTP_BUCKETS
        )
        dispatcher.watchers.append(self._stepped)

    def observe(self, **values: float | None) -> None:
        """Of a request, values for histograms by their names in `REQUEST_HISTOGRAMS`; None is left out."""
        for name, value in values.items():
            if value is not None:
                self._histograms[name].observe(value)

    def first_token(self, seconds: float, prompt_tokens: int) -> None:
        """A request's first token came `seconds` after its arrival."""
        self.observe(time_to_first_token_seconds=seconds)
        self._prompt_tokens.inc(prompt_tokens)

    def generated(self, tokens: int) -> None:
        self._generated.inc(tokens)

    def ended(self, reason: Ending, arrived: float) -> None:
        """A request that arrived at `arrived` (`time.perf_counter`) has ended."""
        self._endings[reason].inc()
        if reason in ("stop", "length"):
            self.observe(e2e_request_latency_seconds=time.perf_counter() - arrived)

    def requested(self, method: str, status: int, handler: str, seconds: float) -> None:
        """An HTTP request has ended. `handler` is its route's template, or "none"; uvicorn knows some 30 methods."""
        if handler not in PROBED:
            self._http.labels(method, f"{status // 100}xx", handler).inc()
            self._http_seconds.labels(method, handler).observe(seconds)

    def _stepped(self, worker: str, report: Report) -> None:
        for step in report.steps:
            self._steps.labels(self._model, worker).observe(step.prefill + step.decodes)

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
        labels = ["model_name", "engine", "cache_dtype", "block_size", "num_gpu_blocks", "num_cpu_blocks"]
        pools = [
            ((model, name, ready.dtype, *map(str, (ready.page_tokens, stats.total_pages, stats.host_total))), 1)
            for name, stats in workers
            if (ready := self._dispatcher.ready.get(name)) is not None
        ]
        yield _family(GAUGE, "vllm:cache_config_info", "Each worker's pools of KV, in pages", labels, pools)
        labels, awake = ["model_name", "engine", "sleep_state"], [((model, name, "awake"), 1) for name, _ in workers]
        yield _family(GAUGE, "vllm:engine_sleep_state", "1: awake, as every worker that lives is", labels, awake)
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
