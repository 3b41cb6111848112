"""An agent's conversation as agents hold them: six turns of tool calls, under every policy, and with the default model.

It is served twice at the same time, streamed and whole, each with KV of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from miniserve.api.app import create_app
from miniserve.api.service import Service
from miniserve.config import EngineConfig, ServeConfig
from miniserve.dispatcher import Dispatcher
from miniserve.monitor.events import Feed
from miniserve.text.grammar import Compiler
from miniserve.text.tokenizer import Tokenizer
from tests.e2e.test_cluster import cluster, settled
from tests.support import dialects, tiny
from tests.support.often import often

pytestmark = pytest.mark.slow

POLICIES = ["colocated", "disaggregated", "ampd", "conserve", "observe"]
PAGE = 16


def tool(name: str, **properties: Any) -> dict[str, Any]:
    """A tool all of whose arguments are needed."""
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


# Few words and short arguments: each takes its time on a CPU, and a model this small, held to a grammar, fills
# whatever room it is given.
TOOLS = [tool("sky", city={"enum": ["Paris", "Rome"]}), tool("search", query={"type": "string", "maxLength": 12})]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
RESULTS = [
    '{"celsius": 21}',
    "The Louvre and the <|im_start|>Orsay.",
    '["Seine", "Marne"]',
    "No result.",
    "Rain.",
]
"""What the tools say; the second one tries to speak as somebody else."""


@asynccontextmanager
async def api(client: Dispatcher, tokenizer: Tokenizer) -> AsyncIterator[openai.AsyncOpenAI]:
    """The stock client of a server around `client`."""
    config = ServeConfig(engine=EngineConfig(model="m"), served_model_names=["m"])
    feed = Feed(client.scheduler)
    app = create_app(Service(config, client, tokenizer, {}, Compiler(tokenizer)), feed)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), timeout=120) as http:
        yield openai.AsyncOpenAI(base_url="http://m/v1", api_key="none", max_retries=0, http_client=http)


async def ask(api: openai.AsyncOpenAI, messages: list[Any], stream: bool) -> tuple[Any, str, Any]:
    """The one call that comes back, why it ended, and the usage."""
    request: dict[str, Any] = {
        "model": "m",
        "messages": messages,
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 200,
        # A conversation of its own, and none of the other one's pages.
        "prompt_cache_key": f"agent, stream {stream}",
        "extra_body": {"cache_salt": str(stream)},
    }
    if not stream:
        answer = await api.chat.completions.create(**request)
        (call,) = answer.choices[0].message.tool_calls
        return call, answer.choices[0].finish_reason, answer.usage
    finish, calls, usage = "", [], None
    chunks = await api.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    async for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert not choice.delta.content
            calls += choice.delta.tool_calls or []
            finish = choice.finish_reason or finish
    call, *more = calls  # its arguments come as the model writes them
    assert call.function is not None
    for delta in more:
        assert (delta.index, delta.id) == (call.index, None)
        call.function.arguments += delta.function.arguments
    return call, finish, usage


async def converse(api: openai.AsyncOpenAI, stream: bool) -> list[tuple[str, str]]:
    """The calls of all turns, names and arguments."""
    messages: list[Any] = [
        {"role": "system", "content": "You help travellers."},
        {"role": "user", "content": "I go to Paris. What should I pack?"},
    ]
    calls: list[tuple[str, str]] = []
    before = 0
    for result in [*RESULTS, None]:
        call, finish, usage = await ask(api, messages, stream)
        assert finish == "tool_calls"
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
        cached = usage.prompt_tokens_details.cached_tokens
        assert cached >= before // PAGE * PAGE, "the KV of the turn before is where this one runs"
        assert usage.prompt_tokens > before
        before = usage.prompt_tokens
        calls.append((call.function.name, call.function.arguments))
        said = {"name": call.function.name, "arguments": call.function.arguments}
        messages += [
            {"role": "assistant", "tool_calls": [{"id": call.id, "type": "function", "function": said}]},
            {"role": "tool", "tool_call_id": call.id, "content": result},
        ]
    return calls


async def six_turns(folder: Path, policy: str) -> list[tuple[str, str]]:
    """The calls of all turns, streamed or not."""
    tokenizer = Tokenizer.load(folder)
    settings = {"dtype": "float32", "max_model_len": 2560, "max_num_batched_tokens": 256, "kv_cache_memory": 2**27}
    async with cluster(folder, "1P1D", policy, **settings) as client, api(client, tokenizer) as stock:
        streamed, whole = await asyncio.gather(converse(stock, stream=True), converse(stock, stream=False))
        assert streamed == whole
        assert [(c.turns, c.moves, c.edits) for c in client.scheduler.conversations] == [(6, 0, 0)] * 2
        if policy == "conserve":
            assert client.scheduler.placements == {("p0", "d0"): 2, ("d0", "d0"): 10}
        await settled(client)
    return streamed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose template knows tools: it takes a tenth of the default model's time."""
    made = tiny.make_model(tmp_path_factory.mktemp("agent") / "tiny", "llama", max_len=2560)
    settings = json.loads((made / "tokenizer_config.json").read_text())
    settings["chat_template"] = dialects.chatml(dialects.HERMES_CALLS)
    (made / "tokenizer_config.json").write_text(json.dumps(settings))
    return made


@pytest.fixture(scope="module")
def answers() -> list[list[tuple[str, str]]]:
    """The calls of every conversation so far: no policy may change them."""
    return []


@pytest.mark.parametrize("policy", often(POLICIES, "observe"))
async def test_six_turns_of_calls(folder: Path, policy: str, answers: list[list[tuple[str, str]]]) -> None:
    answers.append(await six_turns(folder, policy))
    assert answers[-1] == answers[0]


async def test_six_turns_of_the_default_model(smollm2_folder: Path) -> None:
    await six_turns(smollm2_folder, "observe")
