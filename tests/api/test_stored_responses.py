"""Stored responses: a later request goes on with one, forks it, reads it or deletes it; the store is bounded."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from miniserve.api.responses.store import ResponseStore, Stored
from miniserve.dispatcher import EngineError
from miniserve.text.tokenizer import Tokenizer
from tests.support.api import error_of
from tests.support.servers import CALL, THOUGHT, WEATHER, ResponsesServer


@pytest.fixture
def api(hermes: Tokenizer) -> ResponsesServer:
    return ResponsesServer(hermes)


@pytest.mark.parametrize("stream", [False, True])
async def test_previous_response(api: ResponsesServer, stream: bool) -> None:
    """Going on with a stored response is the same as sending all of the conversation again."""

    async def ask(**body: Any) -> dict[str, Any]:
        return (await api.events(**body))[-1]["response"] if stream else await api.whole(**body)

    api.say(f"{THOUGHT}I look.\n{CALL}")
    first = await ask(tools=[WEATHER], instructions="Now only.")
    call_id = first["output"][-1]["call_id"]
    result = [{"type": "function_call_output", "call_id": call_id, "output": "Rain"}]
    api.say("It rains.")
    second = await ask(input=result, previous_response_id=first["id"], tools=[WEATHER])
    assert second["previous_response_id"] == first["id"]
    third = await ask(input="Thanks", previous_response_id=second["id"], tools=[WEATHER])
    assert third["id"] not in (first["id"], second["id"])
    continued = api.engine.turns[-1].tokens
    whole = [{"role": "user", "content": "Hi"}, *first["output"], *result, *second["output"]]
    await ask(input=[*whole, {"role": "user", "content": "Thanks"}], tools=[WEATHER])
    assert api.engine.turns[-1].tokens == continued
    assert "Now only." not in api.prompt
    assert "I look." in api.prompt
    assert "Hm." in api.prompt
    # The dispatcher gets the conversation, not only a prompt that resembles the last one.
    assert api.engine.asked == ["", 1, 1, ""]  # type: ignore[attr-defined]


async def test_forks(api: ResponsesServer) -> None:
    first = await api.whole(input="One")
    for _ in range(2):
        fork = await api.whole(input="Two", previous_response_id=first["id"])
    await api.whole(input="Three", previous_response_id=fork["id"])
    assert "One" in api.prompt
    assert api.prompt.count("Two") == 1
    # The second one is for the scheduler to place by its prompt; it has a conversation of its own then.
    assert api.engine.asked == ["", 1, "", 3]  # type: ignore[attr-defined]


async def test_forks_at_the_same_time_and_retries(api: ResponsesServer) -> None:
    first = await api.whole(input="One")
    api.engine.refuse = EngineError("No decoder is alive.")
    error_of(await api.post(previous_response_id=first["id"]), 503)
    api.engine.refuse = None
    await asyncio.gather(*(api.whole(input=text, previous_response_id=first["id"]) for text in "abc"))
    assert sorted(api.engine.asked, key=str) == ["", "", "", 1]  # type: ignore[attr-defined]


async def test_ids_of_conversations_that_clients_choose(api: ResponsesServer) -> None:
    response = await api.http.post("/responses", json={"input": "a"}, headers={"X-Conversation-ID": "mine"})
    await api.whole(input="b", previous_response_id=response.json()["id"])
    await api.whole(input="c", previous_response_id=response.json()["id"], prompt_cache_key="other")
    assert api.engine.asked == ["mine", "mine", "other"]  # type: ignore[attr-defined]


async def test_what_is_not_stored(api: ResponsesServer) -> None:
    kept = await api.whole(store=False)
    assert kept["store"] is False
    for id in (kept["id"], "resp_unknown", "x" * 200):
        error = error_of(await api.post(previous_response_id=id), 404)
        assert (error["param"], error["code"]) == ("previous_response_id", "previous_response_not_found")
        assert "whole conversation as `input`" in error["message"]
    # Clients do not choose ids: a response could be replaced by another one of the same id.
    ids = [(await api.http.post("/responses", json={"input": "a"}, headers={"X-Request-Id": "q"})).json()["id"]]
    ids += [(await api.http.post("/responses", json={"input": "a"}, headers={"X-Request-Id": "q"})).json()["id"]]
    assert ids[0] != ids[1]


async def test_failures_are_not_stored(api: ResponsesServer) -> None:
    api.say("Hel", finish="error", error="The engine broke.")
    events = await api.events()
    assert [e["type"] for e in events[-2:]] == ["error", "response.failed"]
    assert events[-2]["message"] == "The engine broke."
    failed = events[-1]["response"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
    error_of(await api.post(previous_response_id=failed["id"]), 404)


@pytest.mark.parametrize("stream", [False, True])
async def test_stored_responses_can_be_read_and_deleted(api: ResponsesServer, stream: bool) -> None:
    api.say(f"{THOUGHT}I look.\n{CALL}")
    options: dict[str, Any] = {"tools": [WEATHER], "metadata": {"a": "b"}}
    answer = (await api.events(**options))[-1]["response"] if stream else await api.whole(**options)
    behind = await api.whole(previous_response_id=answer["id"])
    assert (await api.http.get(f"/responses/{answer['id']}")).json() == answer
    assert (await api.openai.responses.retrieve(answer["id"])).output_text == "I look."
    refused = error_of(await api.http.get(f"/responses/{answer['id']}", params={"stream": "true"}), 400)
    assert refused["param"] == "stream"
    deleted = await api.http.delete(f"/responses/{answer['id']}")
    assert deleted.json() == {"id": answer["id"], "object": "response", "deleted": True}
    for method in ("GET", "DELETE"):
        error = error_of(await api.http.request(method, f"/responses/{answer['id']}"), 404)
        assert (error["code"], answer["id"] in error["message"]) == ("response_not_found", True)
    error_of(await api.post(previous_response_id=answer["id"]), 404)
    # What has gone on behind it goes on.
    await api.whole(previous_response_id=behind["id"])
    assert "I look." in api.prompt
    await api.openai.responses.delete(behind["id"])
    with pytest.raises(openai.NotFoundError, match="no response"):
        await api.openai.responses.retrieve(behind["id"])


async def test_items_that_are_left_out_keep_their_id(api: ResponsesServer) -> None:
    search = {"type": "web_search_call", "id": "ws_1", "action": {"query": "x"}}
    answer = await api.whole(input=[search, {"role": "user", "content": "Hi"}])
    listed = (await api.http.get(f"/responses/{answer['id']}/input_items")).json()["data"]
    assert listed[1] == {"type": "web_search_call", "id": "ws_1"}


def test_the_store_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miniserve.api.responses.store.MAX_RESPONSES", 3)
    monkeypatch.setattr("miniserve.api.responses.store.MAX_TOKENS", 100)
    store = ResponseStore("response")
    for number in range(4):
        store.put(str(number), Stored((number,), 10, ""))
    assert store.get("0") is None
    assert store.get("1") is not None  # and is the latest used now
    store.put("4", Stored((), 85, ""))
    assert [store.get(id) is not None for id in "1234"] == [True, False, False, True]
    store.put("5", Stored((), 101, ""))
    assert len(store._stored) == 0
    store.put("6", Stored((), 100, ""))
    assert len(store._stored) == 1
    store.put("7", Stored((), 50, "", b"x" * 204))
    assert len(store._stored) == 0
    store.delete("7")
    store.put("8", Stored((), 50, "", b"x" * 200))
    assert store.get("8") is not None
    store.delete("8")
    store.put("9", Stored((), 100, ""))
    assert len(store._stored) == 1
