"""vLLM's dashboards on top of /metrics: every query they make finds numbers of a server that has served a turn."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest
from prometheus_client.parser import text_string_to_metric_families

from miniserve.cluster.messages import Report, StepTime
from miniserve.text.tokenizer import Tokenizer
from tests.support import fake_engine
from tests.support.api import HI, PROMPT, Api, make_app
from tests.support.fake_engine import EOS, STATS, FakeClient, spell

PANELS = [  # what the panels of vLLM's Grafana dashboards ask for, one query of each kind
    'vllm:e2e_request_latency_seconds_bucket{model_name="$model_name"}',
    'vllm:e2e_request_latency_seconds_sum{model_name="$model_name"}',
    'vllm:prompt_tokens_total{model_name="$model_name"}',
    'vllm:generation_tokens_total{model_name="$model_name"}',
    'vllm:inter_token_latency_seconds_bucket{model_name="$model_name"}',
    'vllm:inter_token_latency_seconds_count{model_name="$model_name"}',
    'vllm:num_requests_running{model_name="$model_name"}',
    'vllm:num_requests_waiting{model_name="$model_name"}',
    'vllm:time_to_first_token_seconds_bucket{model_name="$model_name"}',
    'vllm:kv_cache_usage_perc{model_name="$model_name"}',
    'vllm:request_prompt_tokens_bucket{model_name="$model_name"}',
    'vllm:request_generation_tokens_bucket{model_name="$model_name"}',
    'vllm:request_success_total{model_name="$model_name"}',
    'vllm:request_queue_time_seconds_sum{model_name="$model_name"}',
    'vllm:request_prefill_time_seconds_sum{model_name="$model_name"}',
    'vllm:request_decode_time_seconds_sum{model_name="$model_name"}',
    'vllm:request_inference_time_seconds_sum{model_name="$model_name"}',
    'vllm:request_time_per_output_token_seconds_sum{model_name="$model_name"}',
    'vllm:request_max_num_generation_tokens_sum{model_name="$model_name"}',
    'vllm:request_params_n_sum{model_name="$model_name"}',
    'vllm:request_params_max_tokens_sum{model_name="$model_name"}',
    'vllm:iteration_tokens_total_bucket{model_name="$model_name",engine="d0"}',
    'vllm:iteration_tokens_total_sum{model_name="$model_name"}',
    'vllm:cache_config_info{model_name="$model_name",block_size="16",num_gpu_blocks="100"}',
    'vllm:engine_sleep_state{model_name="$model_name",sleep_state="awake"}',
    'vllm:num_preemptions_total{model_name="$model_name",engine="d0"}',
    'vllm:prefix_cache_queries_total{model_name="$model_name",engine="d0"}',
    'vllm:prefix_cache_hits_total{model_name="$model_name",engine="d0"}',
    'http_requests_total{method="POST",status="2xx",handler="/v1/chat/completions"}',
    'http_request_duration_seconds_count{method="POST",handler="/v1/chat/completions"}',
]
Samples = dict[str, list[tuple[dict[str, str], float]]]


def samples(text: str) -> Samples:
    found: Samples = defaultdict(list)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name].append((sample.labels, sample.value))
    return found


def asked(query: str, among: Samples, model: str) -> list[float]:
    """The values of the series that a query selects."""
    name, selector = re.fullmatch(r"([\w:]+)\{(.*)\}", query.replace("$model_name", model)).groups()
    wanted = dict(re.findall(r'(\w+)="([^"]*)"', selector))
    return [value for labels, value in among[name] if wanted.items() <= labels.items()]


@pytest.fixture
async def served(tokenizer: Tokenizer) -> Samples:
    """A choice of six tokens, two choices of two tokens, and what worker d0 says of its steps."""
    engine = FakeClient(steps=[*spell("Hello"), [EOS]], stop_token=EOS, cached=16, pause=0.01)
    api = Api(make_app(tokenizer, engine), engine)
    assert (await api.chat()).status_code == 200
    assert (await api.chat(n=2, max_tokens=2)).status_code == 200
    steps = [StepTime(60, 60, 0, 0, 0.5), StepTime(3, 63, 2, 80, 0.1)]
    for watch in engine.watchers:
        watch("d0", Report([], [], STATS, steps))
    return samples((await api.http.get("/metrics")).text)


@pytest.mark.parametrize("query", PANELS)
async def test_no_panel_is_empty(served: Samples, query: str) -> None:
    assert asked(query, served, "tiny")


@pytest.mark.parametrize(
    ("name", "count", "total"),
    [
        ("request_prompt_tokens", 3, 3 * len(PROMPT)),
        ("request_generation_tokens", 3, 6 + 2 + 2),
        ("request_params_max_tokens", 3, 512 - len(PROMPT) + 2 + 2),
        ("request_params_n", 2, 1 + 2),
        ("request_max_num_generation_tokens", 2, 6 + 2),
        ("iteration_tokens_total", 2, 60 + 5),
    ],
)
async def test_sizes(served: Samples, name: str, count: int, total: int) -> None:
    assert [value for _, value in served[f"vllm:{name}_count"]] == [count]
    assert [value for _, value in served[f"vllm:{name}_sum"]] == [total]


async def test_times_add_up(served: Samples) -> None:
    sums = {name: sum(value for _, value in values) for name, values in served.items()}
    phase = {
        name: sums[f"vllm:request_{name}_time_seconds_sum"] for name in ("queue", "prefill", "decode", "inference")
    }
    assert phase["inference"] == pytest.approx(phase["prefill"] + phase["decode"])
    assert phase["decode"] == pytest.approx(sums["vllm:inter_token_latency_seconds_sum"])
    assert phase["decode"] >= 0.07, "seven pauses of 0.01 s"
    whole = sums["vllm:e2e_request_latency_seconds_sum"]
    assert 0.8 * whole - 0.05 <= phase["queue"] + phase["inference"] <= whole


async def test_the_first_token_says_how_long_its_prompt_took(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of the time to it was waiting."""
    real = fake_engine.outputs
    monkeypatch.setattr(fake_engine, "outputs", lambda *a, **k: real(*a, **{**k, "prefill": 0.15}))
    engine = FakeClient(steps=spell("Hi"), pause=0.2, cached=0)
    api = Api(make_app(tokenizer, engine), engine)
    await api.chat()
    found = samples((await api.http.get("/metrics")).text)
    assert found["vllm:request_prefill_time_seconds_sum"][0][1] == 0.15
    assert 0.05 <= found["vllm:request_queue_time_seconds_sum"][0][1] <= 0.15


async def test_what_ends_badly_is_no_time_of_a_request(tokenizer: Tokenizer) -> None:
    engine = FakeClient(steps=spell("Hi"), finish="error", error="boom")
    api = Api(make_app(tokenizer, engine), engine)
    assert (await api.http.post("/v1/chat/completions", json={"messages": HI})).status_code == 500
    found = samples((await api.http.get("/metrics")).text)
    assert found["vllm:request_decode_time_seconds_count"][0][1] == 0
    assert ({"model_name": "tiny", "finished_reason": "error"}, 1.0) in found["vllm:request_success_total"]
