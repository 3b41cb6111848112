"""What clients send that could be refused, and is served or left out instead: each row with what the model is told,
and with what the header names."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Required, Union, get_args, get_origin, get_type_hints

import anthropic
import pytest
from anthropic.types.beta import beta_content_block_param, beta_tool_union_param
from openai.types.responses import response_input_item_param, tool_param

from miniserve.api.messages.schemas import MessagesRequest
from miniserve.api.openai.schemas import ChatRequest
from miniserve.api.responses.schemas import ResponsesRequest
from miniserve.text.tokenizer import Tokenizer
from tests.api.test_messages import MessagesServer
from tests.api.test_responses import ResponsesServer
from tests.support.api import error_of

HI = {"role": "user", "content": "Hi"}
READ = "[image: this model reads text only]"
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
FUNCTION = {"type": "function", "name": "f", "parameters": SCHEMA}
CHAT_FUNCTION = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
OWN = {"name": "f", "input_schema": SCHEMA}


@pytest.fixture
def responses(hermes: Tokenizer) -> ResponsesServer:
    return ResponsesServer(hermes)


@pytest.fixture
def messages(hermes: Tokenizer) -> MessagesServer:
    return MessagesServer(hermes)


def told(request: ChatRequest) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in (m.for_template() for m in request.messages)]


# --- chats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text", "named"),
    [
        ([{"type": "image_url", "image_url": {"url": "data:x"}}], READ, ["messages[].content[].image_url"]),
        ([{"type": "audio_url", "audio_url": {}}], READ.replace("image", "audio"), ["messages[].content[].audio_url"]),
        ([{"type": "video_url", "video_url": {}}], READ.replace("image", "video"), ["messages[].content[].video_url"]),
        ([{"type": "file", "file": {}}], READ.replace("image", "file"), ["messages[].content[].file"]),
        ([{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "No"}], "a", ["messages[].content[].refusal"]),
        ([{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}], "a\nb", []),
        ([], "", []),
        (None, "", []),
    ],
)  # fmt: skip
def test_parts_of_chats(content: Any, text: str, named: list[str]) -> None:
    for role in ("user", "system", "tool", "assistant"):
        made = ChatRequest.model_validate({"messages": [{"role": role, "content": content}]})
        assert told(made) == [(role, text)]
        assert made.ignored == named


@pytest.mark.parametrize("empty", [{"required": None}, {"properties": None}, {"required": None, "type": None}])
def test_keywords_that_are_null_are_missing(empty: dict[str, Any]) -> None:
    function = {"name": "f", "description": None, "parameters": {**SCHEMA, **empty}}
    made = ChatRequest.model_validate({"messages": [HI], "tools": [{"type": "function", "function": function}]})
    assert made.tools is not None
    left = {key: value for key, value in SCHEMA.items() if key not in empty}
    assert made.tools[0]["function"] == {"name": "f", "parameters": left}


def test_tools_in_the_shape_of_responses_are_those_of_chats() -> None:
    one = ChatRequest.model_validate(
        {"messages": [HI], "tools": [FUNCTION], "tool_choice": {"type": "function", "name": "f"}}
    )
    named = {"type": "function", "function": {"name": "f"}}
    two = ChatRequest.model_validate({"messages": [HI], "tools": [CHAT_FUNCTION], "tool_choice": named})
    assert one.tools == two.tools
    assert one.allowed_calls.forced == two.allowed_calls.forced == [CHAT_FUNCTION]


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools(mode: str) -> None:
    tools = [CHAT_FUNCTION, {"type": "function", "function": {"name": "g"}}]
    allowed = {"mode": mode, "tools": [{"type": "function", "function": {"name": "g"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    calls = ChatRequest.model_validate({"messages": [HI], "tools": tools, "tool_choice": choice}).allowed_calls
    assert calls.callable == tools[1:]
    assert calls.forced == (tools[1:] if mode == "required" else [])
    assert not calls.single
    flat = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "g"}]}
    asked = ResponsesRequest.model_validate(
        {"input": "Hi", "tools": [FUNCTION, {"type": "function", "name": "g"}], "tool_choice": flat}
    )
    assert asked.chat(asked.items)[0].allowed_calls.callable == tools[1:]


@pytest.mark.parametrize(
    ("name", "value", "form"),
    [
        ("guided_json", SCHEMA, {"json": SCHEMA}),
        ("guided_regex", "a+", {"regex": "a+"}),
        ("guided_choice", ["a", "b"], {"choice": ["a", "b"]}),
        ("guided_grammar", 'root ::= "a"', {"grammar": 'root ::= "a"'}),
        ("json_schema", SCHEMA, {"json": SCHEMA}),
        ("grammar", 'root ::= "a"', {"grammar": 'root ::= "a"'}),
        ("ebnf", 'root ::= "a"', {"grammar": 'root ::= "a"'}),
        ("regex", "a+", {"regex": "a+"}),
    ],
)
async def test_constraints_under_other_servers_names_are_followed(
    responses: ResponsesServer, name: str, value: Any, form: dict[str, Any]
) -> None:
    least = {
        "chat/completions": {"messages": [HI]},
        "completions": {"prompt": "Hi"},
        "responses": {"input": "Hi"},
        "messages": {"messages": [HI], "max_tokens": 9},
    }
    for route, body in least.items():
        for own in ({name: value}, {"structured_outputs": form}):
            answer = await responses.http.post(f"/{route}", json={**body, **own})
            assert answer.status_code == 200, answer.text
            assert "X-Ignored-Parameters" not in answer.headers
        one, two = responses.engine.turns[-2:]
        assert one.params.grammar == two.params.grammar is not None
        twice = await responses.http.post(f"/{route}", json={**body, name: value, "structured_outputs": form})
        assert "give only one" in twice.json()["error"]["message"]


async def test_a_schema_beside_the_type_of_a_format(responses: ResponsesServer) -> None:
    official = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    for form in ({"type": "json_object", "schema": SCHEMA}, {"type": "json_schema", "schema": SCHEMA}, official):
        answer = await responses.http.post("/chat/completions", json={"messages": [HI], "response_format": form})
        assert answer.status_code == 200
    assert len({turn.params.grammar for turn in responses.engine.turns}) == 1


async def test_sampling_is_the_same_in_all_apis(responses: ResponsesServer) -> None:
    fields: dict[str, Any] = {
        "seed": 5,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.5,
        "logit_bias": {"5": 3},
        "stop_token_ids": [7],
        "ignore_eos": True,
        "top_p": 0,
    }
    await responses.http.post("/chat/completions", json={"messages": [HI], "max_tokens": 9, "stop": ["x"], **fields})
    await responses.http.post("/responses", json={"input": "Hi", "max_output_tokens": 9, "stop": "x", **fields})
    await responses.http.post("/messages", json={"messages": [HI], "max_tokens": 9, "stop_sequences": ["x"], **fields})
    one, two, three = (turn.params for turn in responses.engine.turns)
    assert one == two == three
    assert one.seed == 5
    assert 0 < one.top_p < 1e-5


# --- /v1/responses --------------------------------------------------------------------------------------------------


def kinds_in(union: Any) -> set[str]:
    """All values of `type` in the members of a union of the official clients' types."""
    if get_origin(union) is Annotated:
        return kinds_in(get_args(union)[0])
    if members := get_args(union):
        return {kind for member in members for kind in kinds_in(member)}
    if not hasattr(union, "__required_keys__"):  # an answer's
        return set()
    hint = get_type_hints(union).get("type")
    while get_origin(hint) in (Required, Union):
        hint = get_args(hint)[0]
    return set(get_args(hint)) if get_origin(hint) is Literal else set()


def test_every_type_of_item_and_tool_of_the_official_client_is_known() -> None:
    for union, field in ((response_input_item_param.ResponseInputItemParam, "input"), (tool_param.ToolParam, "tools")):
        kinds = kinds_in(union)
        assert len(kinds) > 12
        for kind in kinds - {"item_reference"}:
            whole: dict[str, Any] = {"type": kind, "call_id": "c", "name": "f", "arguments": "{}", "output": "x"}
            whole |= {"input": "x", "tools": [], "role": "developer", "content": "x", "summary": []}
            whole |= {"arguments": {}} if kind == "tool_search_call" else {}
            whole |= {"content": None} if kind == "reasoning" else {}
            made = ResponsesRequest.model_validate({"input": "Hi", field: [whole]})
            made.chat(made.items)


NAMESPACE = {"type": "namespace", "name": "team", "tools": [FUNCTION, {"type": "custom", "name": "patch"}]}


async def test_tools_of_many_kinds(responses: ResponsesServer) -> None:
    """Each is offered as a function, and a call comes back as its own kind of item, whole and streamed."""
    tools = [
        FUNCTION,
        {"type": "custom", "name": "apply", "description": "Patches."},
        NAMESPACE,
        {"type": "tool_search", "execution": "client"},
        {"type": "web_search"},
    ]
    written = [
        {"name": "f", "arguments": {"a": "1"}},
        {"name": "apply", "arguments": {"input": "*** Begin\n"}},
        {"name": "team__f", "arguments": {"a": "2"}},
        {"name": "team__patch", "arguments": {"input": "x"}},
        {"name": "tool_search", "arguments": {"query": "maps"}},
    ]
    responses.say("\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in written))
    answer = await responses.post(tools=tools)
    assert answer.headers["X-Ignored-Parameters"] == "tools.web_search"
    output = answer.json()["output"]
    kinds = ["function_call", "custom_tool_call", "function_call", "custom_tool_call", "tool_search_call"]
    assert [item["type"] for item in output] == kinds
    assert [item.get("namespace") for item in output] == [None, None, "team", "team", None]
    assert [item.get("name") for item in output] == ["f", "apply", "f", "patch", None]
    assert [item.get("input") for item in output] == [None, "*** Begin\n", None, "x", None]
    assert output[4]["arguments"] == {"query": "maps"}
    events = await responses.events(tools=tools)
    streamed = events[-1]["response"]["output"]
    for item in (*streamed, *output):
        del item["id"], item["call_id"]
    assert streamed == output
    done = [event for event in events if event["type"] == "response.custom_tool_call_input.done"]
    assert [event["input"] for event in done] == ["*** Begin\n", "x"]


async def test_calls_of_many_kinds_in_a_history(responses: ResponsesServer) -> None:
    """Items as a stored response has them, and as clients send them back, are the same prompt."""
    calls = [{"name": "team__f", "arguments": {"a": "2"}}, {"name": "team__patch", "arguments": {"input": "x"}}]
    responses.say("\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls))
    first = (await responses.post(tools=[NAMESPACE])).json()
    results = [
        {"type": kind, "call_id": item["call_id"], "output": [{"type": "input_image", "image_url": "x"}]}
        for kind, item in zip(("function_call_output", "custom_tool_call_output"), first["output"], strict=True)
    ]
    responses.say("Done.")
    await responses.post(input=results, previous_response_id=first["id"], tools=[NAMESPACE])
    stored = responses.prompt
    assert stored.count(READ) == 2
    assert '"team__patch", "arguments": {"input": "x"}' in stored
    await responses.post(input=[HI, *first["output"], *results], tools=[NAMESPACE])
    assert responses.prompt == stored


async def test_tools_that_come_up_later_leave_the_prompt_before_them_alone(responses: ResponsesServer) -> None:
    call = {"type": "tool_search_call", "call_id": "c", "arguments": {"query": "g"}}
    found = {"type": "tool_search_output", "call_id": "c", "tools": [{"type": "function", "name": "g"}]}
    more = {"type": "additional_tools", "role": "developer", "tools": [{"type": "function", "name": "h"}]}
    tools = [{"type": "tool_search", "execution": "client"}, {**FUNCTION, "defer_loading": True}]
    prompts = []
    for items in ([HI], [HI, call, found], [HI, call, found, more]):
        await responses.post(input=items, tools=tools, tool_choice="required")
        prompts.append(responses.prompt.removesuffix("<|im_start|>assistant\n"))
    assert prompts[1].startswith(prompts[0])
    assert prompts[2].startswith(prompts[1])
    assert '{"name": "g"}' in prompts[1]
    assert '{"name": "h"}' in prompts[2]
    assert '"f"' not in prompts[2]
    grammar = responses.engine.turns[-1].params.grammar
    assert grammar is not None
    assert all(f'"{name}' in grammar.text.replace("\\", "") for name in ("tool_search", "g", "h"))


@pytest.mark.parametrize(
    "body", [{"input": []}, {"input": ""}, {"input": None}, {}, {"input": [], "instructions": "Be"}]
)
async def test_probes_are_answered(responses: ResponsesServer, body: dict[str, Any]) -> None:
    answer = await responses.http.post("/responses", json={**body, "max_output_tokens": 1})
    assert answer.json()["status"] == "incomplete"


async def test_truncation(responses: ResponsesServer) -> None:
    """The oldest items go first, no more of them than has to, and a result never stays without its call."""
    items = [{"role": "user", "content": f"{number} " + "x" * 400} for number in range(20)]
    items[10:10] = [
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "y" * 400},
    ]
    error_of(await responses.post(input=items, max_output_tokens=100), 400)
    answer = await responses.post(input=items, max_output_tokens=100, truncation="auto", instructions="Be kind.")
    assert answer.headers["X-Ignored-Parameters"] == "input"
    assert answer.json()["truncation"] == "auto"
    prompt = responses.prompt
    assert "Be kind." in prompt
    assert "19 xxx" in prompt
    room = 4096 - 100 - len(responses.engine.turns[-1].tokens)
    assert 0 <= room < 900, room
    assert ("yyy" in prompt) <= ("<tool_call>" in prompt)
    assert "X-Ignored-Parameters" not in (await responses.post(truncation="auto")).headers


@pytest.mark.parametrize("length", [250, 300, 350, 400])
async def test_truncation_between_parallel_calls(responses: ResponsesServer, length: int) -> None:
    items: list[dict[str, Any]] = []
    for turn in range(8):
        calls = [f"c{turn}{letter}" for letter in "abc"]
        said = {"type": "function_call", "name": "f"}
        items += [{**said, "call_id": c, "arguments": json.dumps({"is": c, "x": "x" * length})} for c in calls]
        items += [{"type": "function_call_output", "call_id": c, "output": f"of {c}"} for c in calls]
    answer = await responses.post(input=items, max_output_tokens=100, truncation="auto")
    assert answer.headers["X-Ignored-Parameters"] == "input"
    for call in {item["call_id"] for item in items}:
        assert (f"of {call}" in responses.prompt) == (f'"{call}"' in responses.prompt)


async def test_log_probabilities_of_text(responses: ResponsesServer) -> None:
    wanted: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    responses.say("<think>\nHm.\n</think>\nHello")
    message = (await responses.post(**wanted)).json()["output"][1]
    found = message["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in found).strip().startswith("Hello")
    assert [len(entry["top_logprobs"]) for entry in found] == [2] * len(found)
    events = await responses.events(**wanted)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [entry for event in deltas for entry in event["logprobs"]] == found[
        : sum(len(e["logprobs"]) for e in deltas)
    ]
    assert (await responses.post()).json()["output"][1]["content"][0]["logprobs"] == []


# --- /v1/messages ---------------------------------------------------------------------------------------------------


def test_every_block_and_tool_of_the_official_client_is_known() -> None:
    blocks = kinds_in(beta_content_block_param.BetaContentBlockParam)
    assert len(blocks) > 15
    for kind in blocks:
        role = "assistant" if kind in ("tool_use", "thinking") else "user"
        block = {"type": kind, "id": "a", "name": "f", "input": {}, "text": "x", "thinking": "x", "tool_use_id": "a"}
        last = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]}
        body = {"max_tokens": 9, "messages": [{"role": role, "content": [block]}, last]}
        MessagesRequest.model_validate(body).chat()
    for kind in kinds_in(beta_tool_union_param.BetaToolUnionParam) - {"custom"}:
        made = MessagesRequest.model_validate(
            {"max_tokens": 9, "messages": [HI], "tools": [{"type": kind, "name": "x"}]}
        )
        assert made.ignored == [f"tools.{kind}"]
        assert made.chat().tools is None


@pytest.mark.parametrize(
    ("block", "text"),
    [
        ({"type": "image", "source": {}}, READ),
        ({"type": "document", "source": {"type": "base64"}}, READ.replace("image", "file")),
        ({"type": "document", "title": "T", "source": {"type": "text", "data": "all"}}, "T\nall"),
        ({"type": "search_result", "title": "T", "source": "S", "content": [{"type": "text", "text": "x"}]}, "T\nS\nx"),
        ({"type": "compaction", "content": "so far"}, "so far"),
        ({"type": "server_tool_use", "id": "a", "name": "web_search", "input": {}}, ""),
    ],
)
def test_blocks(block: dict[str, Any], text: str) -> None:
    for content, role in (
        ([block], "user"),
        ([{"type": "tool_result", "tool_use_id": "a", "content": [block]}], "tool"),
    ):
        made = MessagesRequest.model_validate({"max_tokens": 9, "messages": [{"role": "user", "content": content}]})
        assert told(made.chat()) == [(role, text)]
        assert [name.rpartition(".")[2] for name in made.ignored] == [block["type"]]


def test_claudes_billing_line_stays_out_of_the_prompt() -> None:
    line = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=1234;"}
    body = {"max_tokens": 9, "messages": [HI], "system": [line, {"type": "text", "text": "You are"}]}
    assert told(MessagesRequest.model_validate(body).chat())[0] == ("system", "You are")
    assert told(MessagesRequest.model_validate(body).chat(normalize=False))[0][1].startswith("x-anthropic")
    only = MessagesRequest.model_validate({**body, "system": line["text"]})
    assert told(only.chat()) == [("user", "Hi")]


def test_deferred_tools_are_described_where_they_are_referred_to() -> None:
    tools = [OWN, {**OWN, "name": "g", "defer_loading": True}, {**OWN, "name": "h", "defer_loading": True}]
    use = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}
    found = [{"type": "tool_reference", "tool_name": "g"}, {"type": "tool_reference", "tool_name": "g"}]
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": found}]}
    body = {"max_tokens": 9, "tools": tools, "messages": [HI, use, result]}
    chat = MessagesRequest.model_validate(body).chat()
    described = json.dumps({"name": "g", "parameters": SCHEMA})
    assert told(chat)[2] == ("tool", f"{described}\ng")
    assert [tool["function"]["name"] for tool in chat.allowed_calls.callable] == ["f", "g"]
    assert MessagesRequest.model_validate(body).ignored == []


async def test_deferred_tools_are_not_in_the_prompt(messages: MessagesServer) -> None:
    await messages.whole(tools=[OWN])
    without = messages.prompt
    await messages.whole(tools=[OWN, {**OWN, "name": "later", "defer_loading": True}])
    assert messages.prompt == without


async def test_threads_send_the_whole_conversation_instead(messages: MessagesServer) -> None:
    for thread in ({"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}):
        answer = await messages.post(thread=thread)
        assert answer.status_code == 400
        details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        assert answer.json()["error"]["details"] == details


async def test_anthropics_tool_runner_runs_to_its_end(messages: MessagesServer) -> None:
    calls: list[str] = []

    @anthropic.beta_async_tool
    async def weather(city: str) -> str:
        """Tell the weather."""
        calls.append(city)
        messages.say("It rains.")
        return "Rain"

    messages.say('<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>')
    runner = messages.anthropic.beta.messages.tool_runner(
        model="tiny", max_tokens=99, tools=[weather], messages=[{"role": "user", "content": "Weather?"}]
    )
    last = await runner.until_done()
    assert calls == ["Paris"]
    assert last.content[0].type == "text"
    assert "Weather?" in messages.prompt
    assert "Rain" in messages.prompt
