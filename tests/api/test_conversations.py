"""OpenAI's Conversations API, with the official client, and responses that go on with such conversations."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from miniserve.text.tokenizer import Tokenizer
from tests.api.test_responses import ResponsesServer
from tests.support.api import error_of

HI = {"type": "message", "role": "user", "content": "Hi"}


@pytest.fixture
def api(hermes: Tokenizer) -> ResponsesServer:
    return ResponsesServer(hermes)


async def test_the_life_of_a_conversation(api: ResponsesServer) -> None:
    conversations = api.openai.conversations
    made = await conversations.create(metadata={"a": "b"}, items=[HI])  # type: ignore[list-item]
    assert made.id.startswith("conv_")
    assert await conversations.retrieve(made.id) == made
    changed = await conversations.update(made.id, metadata={"c": "d"})
    assert (changed.metadata, changed.created_at) == ({"c": "d"}, made.created_at)
    added = await conversations.items.create(made.id, items=[{**HI, "content": "Again"}])  # type: ignore[list-item]
    listed = (await conversations.items.list(made.id, order="asc")).data
    assert [item.content[0].text for item in listed] == ["Hi", "Again"]  # type: ignore[union-attr]
    assert listed[1].id == added.data[0].id
    assert (await conversations.items.retrieve(listed[0].id, conversation_id=made.id)).id == listed[0].id  # type: ignore[union-attr]
    await conversations.items.delete(listed[0].id, conversation_id=made.id)  # type: ignore[arg-type]
    assert [item.id for item in (await conversations.items.list(made.id)).data] == [listed[1].id]
    assert (await conversations.delete(made.id)).deleted
    with pytest.raises(openai.NotFoundError, match="no conversation"):
        await conversations.retrieve(made.id)


async def test_what_is_ignored_is_named(api: ResponsesServer) -> None:
    made = await api.http.post("/conversations", json={"items": [{**HI, "content": [{"type": "input_image"}]}], "a": 1})
    assert made.headers["x-ignored-parameters"] == "a, items[].content[].input_image"
    path = f"/conversations/{made.json()['id']}"
    changed = await api.http.post(path, json={"metadata": {}, "items": [HI]})
    assert changed.headers["x-ignored-parameters"] == "items"
    added = await api.http.post(f"{path}/items", json={"items": [{"type": "web_search_call", "id": "ws_1"}]})
    assert added.headers["x-ignored-parameters"] == "items[].web_search_call"
    assert (await api.http.get(f"{path}/items/ws_1")).json() == {"type": "web_search_call", "id": "ws_1"}


async def test_responses_go_on_with_a_conversation(api: ResponsesServer) -> None:
    made = await api.openai.conversations.create()
    api.say("It rains.")
    first = await api.openai.responses.create(model="tiny", input="Weather?", conversation=made.id)
    assert first.conversation is not None
    assert first.conversation.id == made.id
    async with api.openai.responses.stream(model="tiny", input="Why?", conversation={"id": made.id}) as stream:
        await stream.get_final_response()
    assert api.prompt.index("Weather?") < api.prompt.index("It rains.") < api.prompt.index("Why?")
    items = (await api.openai.conversations.items.list(made.id, order="asc")).data
    assert [item.role for item in items] == ["user", "assistant", "user", "assistant"]  # type: ignore[union-attr]
    one, two = api.engine.turns
    assert one.conversation == two.conversation == made.id
    own = await api.openai.responses.input_items.list(first.id)
    assert [item.content[0].text for item in own.data] == ["Weather?"]  # type: ignore[union-attr]


async def test_items_come_in_pages(api: ResponsesServer) -> None:
    items = [{**HI, "content": str(number)} for number in range(25)]
    made = (await api.http.post("/conversations", json={"items": items})).json()["id"]

    async def page(**query: Any) -> tuple[list[str], bool, str]:
        found = (await api.http.get(f"/conversations/{made}/items", params=query)).json()
        assert found["first_id"] == found["data"][0]["id"]
        return [item["content"][0]["text"] for item in found["data"]], found["has_more"], found["last_id"]

    texts, more, last = await page()
    assert texts == [str(number) for number in range(24, 4, -1)]
    assert more
    texts, more, _ = await page(after=last)
    assert texts == ["4", "3", "2", "1", "0"]
    assert not more
    assert (await page(order="asc", limit=2))[0] == ["0", "1"]
    for query, param in (({"after": "x"}, "after"), ({"limit": 0}, "limit"), ({"limit": 101}, "limit")):
        answer = await api.http.get(f"/conversations/{made}/items", params=query)  # type: ignore[arg-type]
        assert error_of(answer, 400)["param"] == param


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/conversations/conv_x"),
        ("POST", "/conversations/conv_x"),
        ("DELETE", "/conversations/conv_x"),
        ("GET", "/conversations/conv_x/items"),
        ("POST", "/conversations/conv_x/items"),
        ("GET", "/conversations/conv_x/items/msg_x"),
        ("DELETE", "/conversations/conv_x/items/msg_x"),
        ("GET", "/responses/resp_x/input_items"),
        ("POST", "/responses"),
    ],
)
async def test_what_is_not_there(api: ResponsesServer, method: str, path: str) -> None:
    body = {"items": [HI], "input": "Hi", "conversation": "conv_x"} if method == "POST" else None
    error = error_of(await api.http.request(method, path, json=body), 404)
    assert error["code"] in ("conversation_not_found", "response_not_found")
    assert not api.engine.turns


async def test_input_is_counted(api: ResponsesServer) -> None:
    tools: Any = [{"type": "function", "name": "f", "parameters": {}}]
    counted = await api.openai.responses.input_tokens.count(model="tiny", input="Hi", tools=tools, instructions="Be")
    await api.openai.responses.create(model="tiny", input="Hi", tools=tools, instructions="Be")
    assert counted.input_tokens == len(api.engine.turns[0].tokens)
