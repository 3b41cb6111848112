"""GET /conversations and /v1/workers over a real scheduler whose workers' reports are made up."""

from __future__ import annotations

import time
from typing import Any

import pytest

from miniserve.hub import resolve as hub
from miniserve.sampling_params import SamplingParams
from miniserve.text.tokenizer import Tokenizer
from tests.support.api import Api, error_of, make_app
from tests.support.fake_engine import FakeClient

ROUTES = ("/conversations", "/conversations/c1", "/v1/workers")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(hub.resolve("smollm2-135m", load_format="dummy").folder)


@pytest.fixture
def api(tokenizer: Tokenizer) -> Api:
    engine = FakeClient()
    return Api(make_app(tokenizer, engine), engine)


async def get(api: Api, path: str) -> Any:
    response = await api.http.get(path)
    assert response.status_code == 200, response.text
    return response.json()


# --- conversations --------------------------------------------------------------------------------------------------


async def test_the_latest_conversation_comes_first(api: Api) -> None:
    found = await get(api, "/conversations")
    assert (found["object"], found["total"]) == ("list", 5)
    assert [(c["id"], c["state"], c["home"], c["turns"], c["tokens"]) for c in found["data"]] == [
        ("late", "queued", None, 0, 0),
        ("busy", "running", "d0", 0, 0),
        ("3", "idle", "d0", 1, 63),
        ("c1", "idle", "d0", 2, 86),
        ("team/a", "idle", "d0", 1, 63),
    ]
    late, busy, *_, first = found["data"]
    assert late["idle"] == busy["idle"] == 0
    assert first["kv_pages"] == 4
    assert first["age"] - first["idle"] == pytest.approx(2.75), "the clock runs on, for both of them"
    assert 95.75 <= first["idle"] < 155.75


async def test_as_many_as_asked_for(api: Api) -> None:
    for limit, ids in ((1, ["late"]), (2, ["late", "busy"]), (1000, ["late", "busy", "3", "c1", "team/a"])):
        found = await get(api, f"/conversations?limit={limit}")
        assert ([c["id"] for c in found["data"]], found["total"]) == (ids, 5)


@pytest.mark.parametrize("limit", ["0", "-1", "1001", "many", "1.5", ""])
async def test_how_many_may_be_asked_for(api: Api, limit: str) -> None:
    error = error_of(await api.http.get(f"/conversations?limit={limit}"), 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", "limit")


# --- one conversation -----------------------------------------------------------------------------------------------


async def test_what_a_turn_was(api: Api) -> None:
    found = await get(api, "/conversations/c1")
    assert (found["id"], found["state"], found["turns"], found["running"]) == ("c1", "idle", 2, [])
    first, second = found["history"]
    assert {name: value for name, value in first.items() if name != "phases"} == {
        "turn": 1,
        "arrived": 0.0,
        "gap": None,
        "after_tool": False,
        "prompt_tokens": 60,
        "new_tokens": 60,
        "cached_tokens": 0,
        "output_tokens": 3,
        "home": "d0",
        "prefill_at": "p0",
        "moved_pages": 4,
        "runs": 1,
        "finish": "stop",
    }
    assert first["phases"] == pytest.approx(
        {
            "queued": 0.0,
            "waited": 0.25,
            "prefill": 1.0,
            "transfer": 1.0,
            "exposed": 0.5,
            "first_token": 1.25,
            "decode": 1.0,
        }
    )
    assert second["arrived"] == pytest.approx(
        first["phases"]["first_token"] + first["phases"]["decode"] + second["gap"]
    )
    assert (second["turn"], second["after_tool"], second["cached_tokens"]) == (2, True, 48)
    assert (second["prefill_at"], second["moved_pages"], second["new_tokens"]) == ("d0", 0, 83 - 63)


@pytest.mark.parametrize("id", ["c1", "team/a", "3"])
async def test_phases_follow_each_other(api: Api, id: str) -> None:
    for turn in (await get(api, f"/conversations/{id}"))["history"]:
        phases = turn["phases"]
        before = [phases[name] for name in ("queued", "waited", "prefill")]
        assert sum(before) == pytest.approx(phases["first_token"])
        assert phases["exposed"] <= phases["transfer"]


async def test_the_time_in_the_queue_is_part_of_the_phases(api: Api) -> None:
    (turn,) = (await get(api, "/conversations/team/a"))["history"]
    assert turn["phases"]["queued"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("id", "state", "output", "home", "prefill_at"),
    [("busy", "decode", 1, "d0", "p0"), ("late", "queued", 0, None, None)],
)
async def test_turns_that_have_not_ended(
    api: Api, id: str, state: str, output: int, home: str | None, prefill_at: str | None
) -> None:
    found = await get(api, f"/conversations/{id}")
    assert found["history"] == []
    (turn,) = found["running"]
    assert turn["age"] == pytest.approx(found["age"])
    assert (turn["state"], turn["prompt_tokens"], turn["output_tokens"]) == (state, 60, output)
    assert (turn["home"], turn["prefill_at"]) == (home, prefill_at)


@pytest.mark.parametrize("path", ["team/a", "team%2Fa", "3"])
async def test_ids_with_slashes_and_numbers_of_those_without_a_key(api: Api, path: str) -> None:
    assert (await get(api, f"/conversations/{path}"))["id"] == path.replace("%2F", "/")


async def test_a_key_goes_before_a_number(api: Api) -> None:
    assert (await get(api, "/conversations/3"))["turns"] == 1
    api.engine.scheduler.submit("g", [9] * 20, SamplingParams(max_tokens=4), 0, "3", "", time.monotonic())
    assert (await get(api, "/conversations/3"))["turns"] == 0


@pytest.mark.parametrize(
    "path", ["unknown", "2", "team", "team/a/", "c1/", "", "-3", "%D9%A3", "9" * 40, "%00", "%ED%A0%80", "x" * 5000]
)
async def test_a_conversation_that_is_not_known_is_a_404(api: Api, path: str) -> None:
    error = error_of(await api.http.get(f"/conversations/{path}"), 404)
    assert error["code"] == "conversation_not_found"
    assert "GET /conversations" in error["message"]
    assert len(error["message"]) < 700


# --- workers --------------------------------------------------------------------------------------------------------


async def test_workers(api: Api) -> None:
    found = await get(api, "/v1/workers")
    assert (found["object"], found["policy"], found["queued"]) == ("list", "conserve", 1)
    p0, d0 = found["data"]
    assert [(w["name"], w["role"], w["epoch"], w["turns"]) for w in (p0, d0)] == [
        ("p0", "prefiller", 1, 0),
        ("d0", "decoder", 1, 1),
    ]
    assert d0["kv"] == {
        "total": 100,
        "free": 60,
        "cached": 15,
        "held": 25,
        "reserved": 4,  # of "busy": 60 tokens of prompt and the 3 that a turn generates
        "resident": 4 + 4 + 6,
        "page_bytes": 4096,
        "host_total": 0,
        "host_used": 0,
        "snapshots": 0,
        "snapshot_pages": 0,
    }
    assert p0["kv"]["reserved"] == p0["kv"]["resident"] == 0
    assert (d0["running"], d0["waiting"], d0["preemptions"], d0["leases"]) == (1, 0, 3, 0)
    assert 0 < d0["prefilling"] < 1
    assert 0 < d0["load"] < 1
    assert 1.5 <= d0["last_heard"] < 61.5, "the clock runs on"
    assert d0["rates"]["prefill_2048"] > d0["rates"]["prefill_512"] > d0["rates"]["decode_step"] > 0


async def test_what_went_between_workers(api: Api) -> None:
    (link,) = (await get(api, "/v1/workers"))["links"]
    assert (link["source"], link["destination"], link["moves"], link["bytes"]) == ("p0", "d0", 4, 4 * 4 * 4096)
    assert link["seconds"] == pytest.approx(2.5)
    assert link["bandwidth"] > 0


async def test_without_workers_there_is_an_empty_list(api: Api) -> None:
    for name in ("d0", "p0"):
        api.engine.scheduler.worker_down(name, returns=False)
    found = await get(api, "/v1/workers")
    assert (found["data"], found["queued"]) == ([], 0)
    assert (await get(api, "/conversations/c1"))["home"] is None
    assert (await get(api, "/conversations/c1"))["history"][0]["home"] == "d0", "names outlive workers"


# --- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ROUTES)
async def test_the_key_is_asked_for(tokenizer: Tokenizer, path: str) -> None:
    engine = FakeClient()
    api = Api(make_app(tokenizer, engine, api_key="k"), engine)
    assert error_of(await api.http.get(path), 401)["code"] == "invalid_api_key"
    assert (await api.http.get(path, headers={"Authorization": "Bearer k"})).status_code == 200


@pytest.mark.parametrize("path", ROUTES)
async def test_they_are_only_looked_at(api: Api, path: str) -> None:
    for method in ("PUT", "DELETE", *([] if path == "/v1/workers" else ["POST"])):  # which adds one
        status = 404 if path == "/conversations/c1" else 405
        assert error_of(await api.http.request(method, path), status)


async def test_openapi_describes_them(api: Api) -> None:
    document = await get(api, "/openapi.json")
    answers = {}
    for path in ("/conversations", "/conversations/{conversation}", "/v1/workers"):
        operation = document["paths"][path]["get"]
        assert operation["description"]
        assert {"200", "4XX", "500", "503"} <= operation["responses"].keys()
        answers[path] = operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].rsplit("/")[-1]
    assert answers == {
        "/conversations": "ConversationList",
        "/conversations/{conversation}": "ConversationDetail",
        "/v1/workers": "WorkerList",
    }
    (limit,) = document["paths"]["/conversations"]["get"]["parameters"]
    assert limit["schema"] | {"title": ""} == {
        "type": "integer",
        "minimum": 1,
        "maximum": 1000,
        "default": 100,
        "title": "",
    }
    for name in ("TurnPhases", "TurnCard", "RunningTurn", "Kv", "Rates", "WorkerCard", "LinkCard", "ConversationCard"):
        schema = document["components"]["schemas"][name]
        assert schema["description"]
        assert set(schema["required"]) == set(schema["properties"])
