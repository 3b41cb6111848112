"""/metrics: vLLM's names where dashboards and gateways know them, `miniserve:` for what only miniserve has."""

import time
import tomllib
from collections.abc import Iterable
from importlib.resources import files
from typing import Any, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from miniserve.cluster.messages import Report
from miniserve.dispatcher import Dispatcher

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TABLES: dict[str, Any] = tomllib.loads((files("miniserve.monitor") / "metrics.toml").read_text("utf-8"))
BUCKETS: dict[str, list[float]] = TABLES["buckets"]
PROBED = {"/metrics", "/health", "/version"}
"""Routes that are not counted, as with vLLM: a share of errors is one of real requests."""

Family = CounterMetricFamily | GaugeMetricFamily
COUNTER, GAUGE = CounterMetricFamily, GaugeMetricFamily
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
        self._generated = self._own["vllm:generation_tokens"].labels(model)
        self._endings = {reason: self._own["vllm:request_success"].labels(model, reason) for reason in get_args(Ending)}
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
        for name, text, number in (
            ("num_requests_running", "Requests on workers", scheduler.active - scheduler.queued),
            ("num_requests_waiting", "Requests that wait", scheduler.queued),
            ("kv_cache_usage_perc", "Part of the KV in use, 0 to 1", usage),
        ):
            yield _family(GAUGE, f"vllm:{name}", text, ["model_name"], [((model,), number)])
        # By worker, so that the counters of one that was started again do not pull down a sum over all.
        for name, row in TABLES["cache"].items():
            samples = [((model, worker), getattr(stats, row["field"])) for worker, stats in workers]
            yield _family(COUNTER, f"vllm:{name}", row["text"], ["model_name", "engine"], samples)
        labels = ["model_name", "engine", "cache_dtype", "block_size", "num_gpu_blocks", "num_cpu_blocks"]
        pools = [
            ((model, name, ready.dtype, *map(str, (ready.page_tokens, stats.total_pages, stats.host_total))), 1)
            for name, stats in workers
            if (ready := self._dispatcher.ready.get(name)) is not None
        ]
        yield _family(GAUGE, "vllm:cache_config_info", "Each worker's pools of KV, in pages", labels, pools)
        labels, awake = ["model_name", "engine", "sleep_state"], [((model, name, "awake"), 1) for name, _ in workers]
        yield _family(GAUGE, "vllm:engine_sleep_state", "1: awake, as every worker that lives is", labels, awake)
        for kind, rows in ((COUNTER, TABLES["worker"]["counter"]), (GAUGE, TABLES["worker"]["gauge"])):
            for name, row in rows.items():
                by_worker = [((worker,), getattr(stats, row["field"])) for worker, stats in workers]
                yield _family(kind, f"miniserve:{name}", row["text"], ["worker"], by_worker)
        states = ("free", "cached", "held")
        pages = [((worker, state), getattr(stats, f"{state}_pages")) for worker, stats in workers for state in states]
        yield _family(GAUGE, "miniserve:kv_pages", "KV pages by state", ["worker", "state"], pages)
        for name, row in TABLES["handoff"].items():
            moved = [(pair, getattr(totals, row["field"])) for pair, totals in scheduler.links.items()]
            yield _family(COUNTER, f"miniserve:{name}", row["text"], ["source", "destination"], moved)
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
