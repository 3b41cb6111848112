"""The small routes: models, tokens, health, metrics."""

from __future__ import annotations

from miniserve.text.tokenizer import Tokenizer
from tests.support.api import HI, PROMPT, Api, error_of, make_app
from tests.support.fake_engine import EOS, FakeClient, spell


async def test_small_routes(api: Api) -> None:
    models = (await api.http.get("/v1/models")).json()
    assert [(m["id"], m["max_model_len"], m["root"]) for m in models["data"]] == [
        ("tiny", 512, "tiny"),
        ("alias", 512, "tiny"),
    ]
    assert (await api.http.get("/version")).json().keys() == {"version"}
    assert (await api.http.get("/health")).status_code == 200
    tokens = (await api.http.post("/tokenize", json={"prompt": "Hi"})).json()
    assert tokens == {"count": 2, "max_model_len": 512, "tokens": [72, 105]}
    tokens = (await api.http.post("/tokenize", json={"messages": HI, "model": "tiny"})).json()
    assert tokens["tokens"] == PROMPT
    text = await api.http.post("/detokenize", json={"tokens": [72, 105, EOS]})
    assert text.json() == {"prompt": "Hi<|eos_token|>"}
    for body in ({}, {"prompt": "x", "messages": HI}):
        assert error_of(await api.http.post("/tokenize", json=body), 400)["param"] == "prompt"
    error_of(await api.http.post("/detokenize", json={"tokens": [49152]}), 400)
    error_of(await api.http.post("/detokenize", json={"tokens": [1], "model": "x"}), 404)


async def test_one_model(tokenizer: Tokenizer) -> None:
    engine = FakeClient()
    api = Api(make_app(tokenizer, engine, served_model_names=["org/tiny", "alias"]), engine)
    models = (await api.http.get("/v1/models")).json()["data"]
    for path, model in (("org/tiny", models[0]), ("org%2Ftiny", models[0]), ("alias", models[1])):
        assert (await api.http.get(f"/v1/models/{path}")).json() == model
    for path in ("tiny", "org", "org/tiny/"):
        error = error_of(await api.http.get(f"/v1/models/{path}"), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")


async def test_metrics(tokenizer: Tokenizer) -> None:
    engine = FakeClient(steps=[*spell("Hello"), [EOS]], stop_token=EOS)
    api = Api(make_app(tokenizer, engine), engine)
    await api.chat()
    await api.chat(max_tokens=2)
    response = await api.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
    label = 'model_name="tiny"'
    expected = {
        f"vllm:num_requests_running{{{label}}}": 1,
        f"vllm:num_requests_waiting{{{label}}}": 1,
        f"vllm:kv_cache_usage_perc{{{label}}}": 0.25,
        f"vllm:time_to_first_token_seconds_count{{{label}}}": 2,
        f"vllm:inter_token_latency_seconds_count{{{label}}}": 6,
        f"vllm:e2e_request_latency_seconds_count{{{label}}}": 2,
        f"vllm:prompt_tokens_total{{{label}}}": 2 * len(PROMPT),
        f"vllm:generation_tokens_total{{{label}}}": 8,
        f'vllm:request_success_total{{finished_reason="stop",{label}}}': 1,
        f'vllm:request_success_total{{finished_reason="length",{label}}}': 1,
        f'vllm:request_success_total{{finished_reason="abort",{label}}}': 0,
        f'vllm:prefix_cache_queries_total{{engine="d0",{label}}}': 640,
        f'vllm:prefix_cache_hits_total{{engine="d0",{label}}}': 320,
        f'vllm:num_preemptions_total{{engine="d0",{label}}}': 3,
        'miniserve:handoffs_total{destination="d0",source="p0"}': 4,
        'miniserve:handoff_pages_total{destination="d0",source="p0"}': 16,
        'miniserve:handoff_bytes_total{destination="d0",source="p0"}': 16 * 4096,
        'miniserve:handoff_seconds_total{destination="d0",source="p0"}': 2.5,
        'miniserve:placements_total{home="d0",policy="conserve",prefill_worker="p0"}': 4,
        'miniserve:kv_pages{state="free",worker="d0"}': 60,
    }
    assert {name: float(samples[name]) for name in expected} == expected
