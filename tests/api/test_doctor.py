"""The prefix doctor: what changed in the prompts of agents, as the server names it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from miniserve.cli import main as cli
from miniserve.monitor.doctor import KINDS
from miniserve.scheduler.scheduler import MOST_CLIENTS
from miniserve.text.tokenizer import Tokenizer
from tests.support import dialects
from tests.support.agents import AgentApi, AgentEngine, chat, tools
from tests.support.api import make_app, serving

RULES = " ".join(f"Rule {n}: keep the code as small as it can be, and say what you have seen." for n in range(20))
TASK = "Mend the parser, please, so that it takes what it should take, and nothing else."


@pytest.fixture(scope="module")
def agents_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return dialects.tokenizer(tmp_path_factory.mktemp("doctor"), "hermes")


def body(
    system: str = "", task: str | list[str] = TASK, turns: int = 1, rules: str = RULES, **more: Any
) -> dict[str, Any]:
    """`system` stands in the middle of the rules, a task of several texts is a message of several parts."""
    texts = [task] if isinstance(task, str) else task
    messages = chat(TASK, turns, f"You are an agent.\n{system}\n{rules}")
    messages[1]["content"] = [{"type": "text", "text": text} for text in texts]
    return {"tools": tools("read", "write", "run"), "messages": messages, **more}


async def found(tokenizer: Tokenizer, *bodies: dict[str, Any], route: str = "/v1/chat/completions", **config: Any):
    """The misses of requests of one session (`key`), or of several."""
    api = AgentApi(tokenizer, **config)
    for number, sent in enumerate(bodies):
        await api.send(route, sent, {"X-Session-ID": sent.pop("key", f"s{number}")})
    return await api.misses()


SESSIONS = [
    ("date", body("Today's date: 2026-11-29."), body("Today's date: 2026-11-30."), "messages[0]"),
    ("date", body("Today is Sunday, Nov 29, 2026."), body("Today is Monday, Nov 30, 2026."), "messages[0]"),
    ("timestamp", body("Now: 2026-11-29T14:54:09.123456"), body("Now: 2026-11-29T15:01:44.654321"), "messages[0]"),
    ("timestamp", body("Now: 2026-11-29 15:37:38"), body("Now: 2026-11-29 15:37:39"), "messages[0]"),
    ("git-status", body("Status:\n M a.py\n?? b.py\n"), body("Status:\n M a.py\n M c.py\n"), "messages[0]"),
    ("git-status", body("Current branch: main"), body("Current branch: fix/parser"), "messages[0]"),
    ("cwd", body("Folder: /home/me/one"), body("Folder: /home/me/another"), "messages[0]"),
    ("system", body("You are kind."), body("You are strict."), "messages[0]"),
    ("date", body(task=["Today is 2026-11-29.", RULES]), body(task=["Today is 2026-11-30.", RULES]), "messages[1]"),
    ("reminder", body(task=["You have 3 files.", RULES]), body(task=["You have no file.", RULES]), "messages[1]"),
    ("tools-reordered", body(), body(tools=tools("read", "run", "write")), "tools"),
]


@pytest.mark.parametrize(("kind", "first", "second", "field"), SESSIONS)
async def test_what_differs_between_two_sessions(agents_tokenizer, kind, first, second, field) -> None:
    assert await found(agents_tokenizer, dict(first), dict(second)) == [(kind, field)]


def with_reasoning(reasoning: str | None) -> dict[str, Any]:
    made = body(turns=3, key="s")
    made["messages"][2]["reasoning_content"] = reasoning
    return made


LONG = [*chat(TASK, 9, f"You are an agent.\n{RULES}"), {"role": "user", "content": RULES * 3}]
SUMMARY = [LONG[0], {"role": "user", "content": f"So far the parser was mended. {RULES[:300]}"}]
TURNS = [
    ("timestamp", body(key="s", rules="It is 14:54:09.12"), body(key="s", rules="It is 15:01:44.65", turns=2)),
    ("reasoning", with_reasoning("The user wants it mended. I should read it first."), with_reasoning(None)),
    ("compaction", body(messages=LONG[:2], key="s"), body(messages=LONG, key="s"), body(messages=SUMMARY, key="s")),
    ("tools", body(key="s"), body(tools=tools("read", "search"), key="s", turns=2)),
    ("tools-reordered", body(key="s"), body(tools=tools("write", "read", "run"), key="s", turns=2)),
    ("edited", body(key="s", turns=4), body(task=TASK + " Quickly.", key="s", turns=4)),
    ("date", body("It is 2026-11-29.", key="s"), body("It is 2026-11-30.", key="s", turns=2)),
]


@pytest.mark.parametrize(("kind", "bodies"), [(kind, bodies) for kind, *bodies in TURNS])
async def test_what_differs_between_two_turns(agents_tokenizer, kind, bodies) -> None:
    assert [kind for kind, _ in await found(agents_tokenizer, *(dict(sent) for sent in bodies))] == [kind]


async def test_the_billing_line_counts_only_where_it_stays_in(agents_tokenizer) -> None:
    def sent(mark: str) -> dict[str, Any]:
        texts = [f"x-anthropic-billing-header: cc_version=2.1.332.{mark}; cc_entrypoint=cli;", RULES]
        return {"max_tokens": 9, "system": [{"type": "text", "text": t} for t in texts], "messages": chat(TASK, 1)}

    raw = await found(agents_tokenizer, sent("4a6"), sent("710"), route="/v1/messages", normalize_prompts=False)
    assert raw == [("billing", "messages[0]")]
    assert await found(agents_tokenizer, sent("4a6"), sent("710"), route="/v1/messages") == []


WELL = [
    [body(turns=n, key="s") for n in (1, 2, 3, 4)],
    [body(), body(task="Write a page about the parser, and about what it cannot do.")],
    [body(), {"messages": chat("What is the capital of France?", 1)}],
    [body(), body(tools=tools("read", "search", "fetch"))],
    [body(key="s"), body(key="s")],
    [body(turns=4, key="s"), body(turns=2, key="s")],
]


@pytest.mark.parametrize("bodies", WELL)
async def test_it_says_nothing_where_all_is_well(agents_tokenizer, bodies) -> None:
    assert await found(agents_tokenizer, *(dict(sent) for sent in bodies)) == []


async def test_what_is_shown(agents_tokenizer) -> None:
    """Positions, hashes and kinds; texts with consent alone."""
    hidden, shown = [AgentApi(agents_tokenizer, **more) for more in ({}, {"log_prompts": True, "api_key": "k"})]
    shown.http.headers["Authorization"] = "Bearer k"
    seen = []
    for api in (hidden, shown):
        for number, day in enumerate(("29", "30")):
            await api.send("/v1/chat/completions", body(f"It is 2026-11-{day}."), {"X-Session-ID": f"s{number}"})
        (miss,) = (await api.http.get("/conversations/s1")).json()["misses"]
        seen.append(miss)
        assert miss["before_hash"] != miss["after_hash"]
        assert "2026" not in (await api.http.get("/v1/doctor")).text
    assert (seen[0]["before"], seen[0]["after"]) == (None, None)
    assert "It is 2026-11-29" in seen[1]["before"]
    assert "It is 2026-11-30" in seen[1]["after"]
    prompt = shown.engine.turns[-1].tokens
    assert agents_tokenizer.decode(prompt[: seen[1]["token"]], False).endswith("It is 2026-11-")
    assert seen[1]["lost"] == len(prompt) - seen[1]["token"] - 2
    texts = ("before", "after", "before_hash", "after_hash")
    assert [seen[0][key] for key in seen[0] if key not in texts] == [
        seen[1][key] for key in seen[1] if key not in texts
    ]
    assert seen[0]["before_hash"] != seen[1]["before_hash"], (
        "by a secret of each server, so that no reader can guess the text"
    )


async def test_the_report_and_the_metrics(agents_tokenizer) -> None:
    api = AgentApi(agents_tokenizer)
    api.http.headers["User-Agent"] = "QwenCode/0.24.4"
    for number in range(4):
        await api.send("/v1/chat/completions", body(f"It is 14:0{number}:00."))
    (report,) = (await api.http.get("/v1/doctor")).json()["data"]
    (cause,) = report["causes"]
    assert (report["client"], report["turns"]) == ("qwen-code", 4)
    assert (cause["kind"], cause["where"], cause["turns"]) == ("timestamp", "system", 3)
    assert cause["tokens"] == pytest.approx(report["computed_tokens"] * cause["share"])
    text = (await api.http.get("/metrics")).text
    assert 'miniserve:prefix_misses_total{kind="timestamp"} 3.0' in text
    assert f'miniserve:prefix_missed_tokens_total{{kind="timestamp"}} {cause["tokens"]:.1f}' in text


def test_every_kind_says_something() -> None:
    assert all(row["says"] and row["advice"] for row in KINDS.values())


async def test_the_command_says_it_in_sentences(agents_tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    engine = AgentEngine()
    async with serving(make_app(agents_tokenizer, engine)) as port, httpx.AsyncClient() as http:
        command = ["doctor", "--url", f"http://127.0.0.1:{port}/v1"]
        assert await asyncio.to_thread(cli.main, command) == 0
        assert capsys.readouterr().out == "No turn has come yet.\n"
        for number in range(3):
            headers = {"X-Session-ID": f"s{number}", "User-Agent": "QwenCode/0.24.4"}
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            assert (await http.post(url, json=body(f"It is 14:0{number}:00."), headers=headers)).status_code == 200
            headers = {"User-Agent": "well/1.0"}
            await http.post(url, json={"messages": chat("Hi.", number + 1)}, headers=headers)
        assert await asyncio.to_thread(cli.main, command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("qwen-code: 3 turns, 100% of ")
    assert "because of the system prompt: the time of day stands in it (2 turns)" in lines[1]
    assert lines[2].strip() == KINDS["timestamp"]["advice"]
    assert lines[3].startswith("well: 3 turns, ")
    assert lines[3].endswith("and no prompt had changed")


async def test_a_prompt_that_was_found_all_the_same_is_no_miss(agents_tokenizer) -> None:
    """The session before was another one, and an older one has left its KV."""
    api = AgentApi(agents_tokenizer)
    for number, day in enumerate(("29", "30", "29")):
        prompt = body(f"It is 2026-11-{day}.")
        api.engine.found = 10_000 if number == 2 else 0
        await api.send("/v1/chat/completions", prompt, {"X-Session-ID": f"s{number}"})
    assert len(await api.misses()) == 1


async def test_any_number_of_programs_is_counted(agents_tokenizer) -> None:
    api = AgentApi(agents_tokenizer)
    for number in range(3 * MOST_CLIENTS):
        api.http.headers["User-Agent"] = "a" * (number // 26 + 1) + chr(97 + number % 26)
        await api.send(
            "/v1/chat/completions", body(f"It is 14:{number % 60:02}:00."), {"X-Session-ID": f"s{number // 2}"}
        )
    report = (await api.http.get("/v1/doctor")).json()["data"]
    assert len(report) == MOST_CLIENTS + 1
    assert next(one for one in report if one["client"] == "other clients")["causes"]
