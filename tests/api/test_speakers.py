"""Who is speaking: requests as coding agents send them, and the conversations and groups that these are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from miniserve.text.tokenizer import Tokenizer
from tests.support import dialects
from tests.support.agents import AgentApi, chat, items, tools


@pytest.fixture(scope="module")
def agents_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return dialects.tokenizer(tmp_path_factory.mktemp("agents"), "hermes")


@pytest.fixture
def api(agents_tokenizer: Tokenizer) -> AgentApi:
    return AgentApi(agents_tokenizer)


def shown(conversations: list[dict[str, Any]], *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(one[key] for key in keys) for one in conversations]


async def test_a_codex_parent_and_two_sub_agents_are_three_conversations_of_one_group(api: AgentApi) -> None:
    """The key of the cache and the session are the parent's; the thread is each one's own."""

    def headers(thread: str, **more: str) -> dict[str, str]:
        return {"thread-id": thread, "session-id": "P", "x-codex-window-id": f"{thread}:0", **more}

    sub = {"x-codex-parent-thread-id": "P", "x-openai-subagent": "collab_spawn"}
    flat = [{"type": "function", **tool["function"]} for tool in tools("exec", "spawn")]
    common: dict[str, Any] = {"tools": flat, "prompt_cache_key": "P", "instructions": "You are Codex."}
    for turn in range(1, 4):
        for thread, more in (("P", {}), ("S1", sub), ("S2", sub)):
            body = {**common, "input": items(f"Task of {thread}.", turn)}
            await api.send("/v1/responses", body, headers(thread, **more))
    assert shown(await api.conversations(), "id", "client", "kind", "group", "parent", "by", "turns", "edits") == [
        ("P", "codex", "main", "P", None, "", 3, 0),
        ("S1", "codex", "sub-agent", "P", "P", "header", 3, 0),
        ("S2", "codex", "sub-agent", "P", "P", "header", 3, 0),
    ]
    compact = {"instructions": "Summarize.", "input": items("Task of P.", 3), "prompt_cache_key": "P"}
    await api.send("/v1/responses", compact, headers("P", **{"x-openai-subagent": "compact"}))
    side = (await api.conversations())[-1]
    assert (side["kind"], side["group"], side["turns"]) == ("side", "P", 1)
    assert (await api.http.get("/conversations/P")).json()["turns"] == 3


async def test_an_opencode_title_is_no_turn_of_its_session(api: AgentApi) -> None:
    headers = {"x-session-id": "ses_1", "x-session-affinity": "ses_1"}
    title = {"messages": [{"role": "system", "content": "Make a title."}, *chat("Fix it.", 1)]}
    await api.send("/v1/chat/completions", title, headers)
    for turn in (1, 2):
        body = {"tools": tools("bash", "edit"), "messages": chat("Fix it.", turn, "You are opencode.")}
        await api.send("/v1/chat/completions", body, headers)
    child = {**headers, "x-session-id": "ses_2", "x-parent-session-id": "ses_1"}
    body = {"tools": tools("bash"), "messages": chat("Look around.", 1, "You are a sub-agent.")}
    await api.send("/v1/chat/completions", body, child)
    found = await api.conversations()
    assert shown(found, "kind", "group", "turns", "edits") == [
        ("side", "ses_1", 1, 0),
        ("main", "ses_1", 2, 0),
        ("sub-agent", "ses_1", 1, 0),
    ]
    assert found[1]["id"] == "ses_1", "though the title came first"


async def test_agents_of_a_claude_session(api: AgentApi) -> None:
    session = {"X-Claude-Code-Session-Id": "S"}
    agent = {**session, "x-claude-code-agent-id": "a1"}
    deeper = {**session, "x-claude-code-agent-id": "a2", "x-claude-code-parent-agent-id": "a1"}
    own: dict[str, Any] = {"max_tokens": 9, "tools": [{"name": "Bash", "input_schema": {"type": "object"}}]}
    for headers, task in ((session, "Do."), (agent, "Look."), (deeper, "Deeper."), (session, "Do.")):
        await api.send("/v1/messages", {**own, "messages": chat(task, 1)}, headers)
    title = {"max_tokens": 9, "system": "Title.", "messages": chat("Do.", 1)}
    await api.send("/v1/messages", title, session)
    assert sorted(shown(await api.conversations(), "id", "kind", "group", "parent")) == [
        ("S", "main", "S", None),
        ("S/a1", "sub-agent", "S", "S"),
        ("S/a2", "sub-agent", "S", "S/a1"),
        ("S~4", "side", "S", "S"),
    ]


@pytest.mark.parametrize(
    ("headers", "body", "client", "key"),
    [
        ({"session_id": "p"}, {"prompt_cache_key": "k"}, "pi", "p"),
        ({}, {"prompt_cache_key": "k"}, "", "k"),
        ({"User-Agent": "QwenCode/0.24.4 (linux; x64)"}, {}, "qwen-code", "1"),
        ({"User-Agent": "OpenAI/Python 2.20.0"}, {}, "openai/python", "1"),
        ({"X-Team-Chat": "mine", "X-Session-ID": "s"}, {}, "", "mine"),
        ({"X-Conversation-ID": "c", "thread-id": "t", "x-codex-window-id": "w"}, {}, "codex", "c"),
    ],
)
async def test_keys_of_other_clients(
    agents_tokenizer: Tokenizer, headers: dict[str, str], body: dict[str, Any], client: str, key: str
) -> None:
    api = AgentApi(agents_tokenizer, conversation_headers=["X-Team-Chat"])
    api.http.headers["User-Agent"] = ""
    await api.send("/v1/chat/completions", {**body, "tools": tools("a"), "messages": chat("Do.", 1)}, headers)
    assert shown(await api.conversations(), "client", "id") == [(client, key)]


async def test_a_resumed_session_that_has_lost_a_reminder_goes_on_as_edited(api: AgentApi) -> None:
    first = {"tools": tools("a", "b"), "messages": chat("Fix the parser in this folder.", 1, "You are Qwen Code.")}
    reminded = {**first, "messages": [dict(m) for m in first["messages"]]}
    reminded["messages"][1]["content"] = "This is the context: /tmp, 5 files.\n\n" + first["messages"][1]["content"]
    await api.send("/v1/chat/completions", reminded)
    resumed = {**first, "messages": chat("Fix the parser in this folder.", 2, "You are Qwen Code.")}
    await api.send("/v1/chat/completions", resumed)
    assert shown(await api.conversations(), "turns", "edits") == [(2, 1)]
    other = {**first, "messages": chat("Write a test of the parser.", 1, "You are Qwen Code.")}
    await api.send("/v1/chat/completions", other)
    assert shown(await api.conversations(), "turns", "edits") == [(2, 1), (1, 0)]


@pytest.mark.parametrize("header", ["X-Session-ID", "x-claude-code-agent-id", "x-claude-code-parent-agent-id"])
async def test_names_that_are_too_long_are_refused(api: AgentApi, header: str) -> None:
    headers = {"X-Claude-Code-Session-Id": "S"} if "claude" in header else {}
    response = await api.http.post(
        "/v1/chat/completions", json={"messages": chat("Do.", 1)}, headers=headers | {header: "x" * 999}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == header


async def test_hints_are_heard_and_logged(api: AgentApi) -> None:
    hints = {"priority": 2, "osl": 77, "speculative_prefill": True}
    response = await api.chat(priority=5, service_tier="flex", nvext={"agent_hints": hints})
    assert response.headers["x-ignored-parameters"] == "nvext.agent_hints.speculative_prefill"
    assert (api.engine.turns[-1].said.priority, api.engine.turns[-1].said.osl) == (5 + 1 - 2, 77)
    assert "x-ignored-parameters" not in (await api.chat(service_tier="auto")).headers
    assert (await api.chat(priority="high")).status_code == 400
    fields: dict[str, Any] = {"max_tokens": 9, "messages": chat("Do.", 1), "service_tier": "priority"}
    await api.send("/v1/messages", {**fields, "nvext": {"agent_hints": {"osl": 5}}})
    assert (api.engine.turns[-1].said.priority, api.engine.turns[-1].said.osl) == (-1, 5)
    await api.send("/v1/responses", {"input": "Do.", "priority": -3, "nvext": {"agent_hints": {"osl": 6}}})
    assert (api.engine.turns[-1].said.priority, api.engine.turns[-1].said.osl) == (-3, 6)


def test_the_page_has_every_client() -> None:
    from miniserve.api.identity import CLIENTS

    page = (Path(__file__).parents[2] / "docs" / "conversations.md").read_text("utf-8")
    for name, row in CLIENTS.items():
        assert name in page
        for header in (*row.session, row.agent, row.parent, row.kind):
            assert header in page
