"""What every route has in common: HEAD, other origins, a proxy's prefix, wrong methods, what is counted."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
import pytest

from miniserve.text.tokenizer import Tokenizer
from tests.support.api import HI, Api, error_of, events, make_app, serving
from tests.support.fake_engine import EOS, FakeClient, spell

PAGE = "http://page.example:3000"
PREFLIGHT = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
GETS = ["/", "/dashboard/main.js", "/health", "/version", "/metrics", "/openapi.json", "/docs", "/v1/models"]
GETS += ["/v1/models/alias", "/v1/models/none", "/conversations", "/conversations/c1", "/v1/workers", "/nowhere"]
VARYING = {"x-request-id", "content-length"}


def made(tokenizer: Tokenizer, **config: Any) -> Api:
    engine = FakeClient(steps=[*spell("Hello"), [EOS]], stop_token=EOS)
    return Api(make_app(tokenizer, engine, **config), engine)


# --- HEAD -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GETS)
async def test_head_is_get_without_a_body(api: Api, path: str) -> None:
    get, head = await api.http.get(path), await api.http.head(path)
    assert head.content == b""
    assert head.status_code == get.status_code
    assert head.headers.keys() == get.headers.keys()
    assert head.headers["content-type"] == get.headers["content-type"]
    if path not in ("/metrics", "/v1/workers", "/conversations", "/conversations/c1"):  # they change all the time
        assert head.headers["content-length"] == get.headers["content-length"]


async def test_head_of_a_stream_ends_at_once_and_leaves_the_connection_open(tokenizer: Tokenizer) -> None:
    engine = FakeClient()
    async with serving(make_app(tokenizer, engine)) as port, httpx.AsyncClient(timeout=5) as http:
        for _ in range(40):  # more than may listen at once
            response = await http.head(f"http://127.0.0.1:{port}/v1/events")
            assert (response.status_code, response.content) == (200, b"")
            assert response.headers["content-type"].startswith("text/event-stream")
        assert (await http.get(f"http://127.0.0.1:{port}/v1/models")).status_code == 200


async def test_head_generates_nothing(api: Api) -> None:
    assert (await api.http.head("/v1/chat/completions")).status_code == 405
    assert not api.engine.turns


# --- other origins --------------------------------------------------------------------------------------------------


async def test_no_other_origin_is_let_in_unasked(tokenizer: Tokenizer) -> None:
    api = made(tokenizer)
    assert (await api.http.options("/v1/models", headers=PREFLIGHT)).status_code == 405
    answer = await api.http.get("/v1/models", headers={"Origin": PAGE})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    locked = made(tokenizer, api_key="k")
    assert (await locked.http.options("/v1/models", headers=PREFLIGHT)).status_code == 401


@pytest.mark.parametrize("origins", [[PAGE], ["https://other.example", PAGE], ["*"]])
async def test_preflights_carry_no_key(tokenizer: Tokenizer, origins: list[str]) -> None:
    api = made(tokenizer, api_key="k", allowed_origins=origins)
    answer = await api.http.options("/v1/chat/completions", headers=PREFLIGHT)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] in (PAGE, "*")
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == "authorization"
    error_of(await api.http.options("/v1/models"), 401)  # no preflight


async def test_an_origin_that_is_not_named_is_not_let_in(tokenizer: Tokenizer) -> None:
    api = made(tokenizer, allowed_origins=["https://other.example"])
    assert (await api.http.options("/v1/models", headers=PREFLIGHT)).status_code == 400
    answer = await api.http.get("/v1/models", headers={"Origin": PAGE})
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("status", [200, 400, 401, 404, 405, 413, 500, 503])
async def test_a_page_reads_answers_and_errors_alike(tokenizer: Tokenizer, status: int) -> None:
    api = made(tokenizer, api_key="k", allowed_origins=[PAGE], max_body_bytes=1000)
    headers = {"Origin": PAGE, "Authorization": "Bearer wrong" if status == 401 else "Bearer k"}
    if status == 500:
        api.engine.refuse = ZeroDivisionError("boom")
    if status == 503:
        api.engine.unhealthy_reason = "No decoder is alive."
    body: dict[str, Any] = {"messages": HI, "model": "tiny"}
    body |= {400: {"temperature": -1}, 404: {"model": "x"}, 413: {"user": "x" * 1000}}.get(status, {})
    if status == 503:
        answer = await api.http.get("/health", headers=headers)
    else:
        method = "PUT" if status == 405 else "POST"
        answer = await api.http.request(method, "/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
    assert len(answer.headers.get_list("x-request-id")) == 1


async def test_streams_flow_to_other_origins(tokenizer: Tokenizer) -> None:
    engine = FakeClient(steps=[[65]] * 100, pause=0.05)
    body = {"messages": HI, "stream": True}
    async with (
        serving(make_app(tokenizer, engine, allowed_origins=[PAGE])) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers={"Origin": PAGE}) as http,
        http.stream("POST", "/v1/chat/completions", json=body) as stream,
    ):
        assert stream.headers["access-control-allow-origin"] == PAGE
        lines = stream.aiter_lines()
        while '"content":"A"' not in await anext(lines):
            pass
        assert engine.turns[0].given < 50, "the first piece came long before the last"


# --- a proxy's prefix -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["/llm", "/a/b", "/v2"])
@pytest.mark.parametrize("strips", [True, False])
async def test_a_prefix_is_understood_whether_or_not_the_proxy_takes_it_off(
    tokenizer: Tokenizer, root: str, strips: bool
) -> None:
    api = made(tokenizer, root_path=root, api_key="k")
    at = "" if strips else root
    key = {"Authorization": "Bearer k"}
    assert (await api.http.get(f"{at}/health")).status_code == 200, "open without a key, as ever"
    assert (await api.http.get(f"{at}/")).status_code == 200
    assert (await api.http.get(f"{at}/v1/models")).status_code == 401
    assert (await api.http.get(f"{at}/v1/models/alias", headers=key)).json()["id"] == "alias"
    assert (await api.http.get(f"{at}/openapi.json", headers=key)).json()["servers"] == [{"url": root}]
    assert f"'{root}/openapi.json'" in (await api.http.get(f"{at}/docs", headers=key)).text
    answer = await api.http.post(f"{at}/v1/messages", json={}, headers=key)
    assert answer.json()["type"] == "error", "in the Anthropic API's shape"
    chat = await api.http.post(f"{at}/v1/chat/completions", json={"messages": HI, "stream": True}, headers=key)
    assert events(chat)


async def test_the_page_asks_below_the_prefix(tokenizer: Tokenizer) -> None:
    api = made(tokenizer, root_path="/llm")
    moved = await api.http.get("/llm")
    assert (moved.status_code, moved.headers["location"]) == (307, "/llm/")
    page = (await api.http.get("/llm/")).text
    assert 'src="dashboard/main.js"' in page
    assert 'href="/' not in page
    assert "fetch(new URL(`.${path}`, ROOT)" in (await api.http.get("/llm/dashboard/api.js")).text
    assert (await api.http.get("/llmx/health")).status_code == 404


# --- what is not there ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/v1/responses/compact", None),
        ("POST", "/v1/responses/resp_none/cancel", None),
        ("POST", "/v1/responses/resp_none/input_items", None),
        ("PUT", "/v1/conversations/none/items", None),
        ("PUT", "/v1/conversations/none/items/none", None),
        ("POST", "/conversations/none", None),
        ("POST", "/v1/models/none", None),
        ("POST", "/v1/messages/batches", None),
        ("PUT", "/dashboard/none", None),
        ("POST", "/conversations/c1", None),
        ("DELETE", "/v1/models/tiny", None),
        ("POST", "/health", "GET, HEAD"),
        ("GET", "/v1/messages", "POST"),
        ("PATCH", "/docs", "GET, HEAD"),
    ],
)
async def test_only_what_is_there_can_have_a_wrong_method(api: Api, method: str, path: str, allow: str | None) -> None:
    answer = await api.http.request(method, path)
    assert answer.status_code == (405 if allow else 404)
    assert answer.headers.get("allow") == allow
    says = "The wrong method: " if allow else "There is nothing at "
    assert f"{says}{method} {path}." in answer.json()["error"]["message"]


# --- the Anthropic API ----------------------------------------------------------------------------------------------


async def test_models_for_clients_of_the_anthropic_api(tokenizer: Tokenizer) -> None:
    async with (
        serving(make_app(tokenizer, FakeClient())) as port,
        anthropic.AsyncAnthropic(base_url=f"http://127.0.0.1:{port}", api_key="k", max_retries=0) as client,
    ):
        listed = await client.models.list()
        assert [(model.id, model.type, model.display_name) for model in listed.data] == [
            ("tiny", "model", "tiny"),
            ("alias", "model", "alias"),
        ]
        assert (listed.has_more, listed.first_id, listed.last_id) == (False, "tiny", "alias")
        assert listed.data[0].created_at.year >= 2026
        assert (await client.models.retrieve("alias")).id == "alias"
        with pytest.raises(anthropic.NotFoundError) as caught:
            await client.models.retrieve("none")
        assert caught.value.body["error"]["type"] == "not_found_error"
        assert caught.value.request_id == caught.value.body["request_id"]


async def test_requests_to_the_anthropic_api_have_its_id(api: Api) -> None:
    body = {"model": "tiny", "max_tokens": 4, "messages": HI}
    for sent in (body, {**body, "stream": True}, {}):
        answer = await api.http.post("/v1/messages", json=sent, headers={"X-Request-Id": "mine"})
        assert (answer.headers["request-id"], answer.headers["x-request-id"]) == ("mine", "mine")
    assert json.loads(answer.text)["request_id"] == "mine"
    assert "request-id" not in (await api.chat()).headers
    assert "request_id" not in error_of(await api.chat(temperature=-1), 400)


# --- what is counted ------------------------------------------------------------------------------------------------


async def test_requests_are_counted_by_route(tokenizer: Tokenizer) -> None:
    api = made(tokenizer, api_key="k")
    api.http.headers["Authorization"] = "Bearer k"
    for path in ("/v1/models/alias", "/v1/models/none", "/v1/models/nor/this", "/nowhere", "/elsewhere", "/health"):
        await api.http.get(path)
    await api.http.head("/v1/models")
    await api.http.put("/tokenize")
    await api.chat()
    await api.chat(stream=True)
    await api.chat(temperature=-1)
    lines = [
        line for line in (await api.http.get("/metrics")).text.splitlines() if line.startswith("http_requests_tot")
    ]
    counted = {tuple(line.split('"')[1::2]): float(line.split()[-1]) for line in lines}
    model = "/v1/models/{model:path}"
    assert counted == {
        (model, "GET", "2xx"): 1,
        (model, "GET", "4xx"): 2,
        ("none", "GET", "4xx"): 2,
        ("/v1/models", "HEAD", "2xx"): 1,
        ("/tokenize", "PUT", "4xx"): 1,
        ("/v1/chat/completions", "POST", "2xx"): 2,
        ("/v1/chat/completions", "POST", "4xx"): 1,
    }
    seconds = 'http_request_duration_seconds_count{handler="/v1/chat/completions",method="POST"} 3.0'
    assert seconds in (await api.http.get("/metrics")).text
