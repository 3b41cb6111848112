"""The stock `openai` package: chat, streams, tools, and the helpers that parse into pydantic models."""

import json
import sys
from enum import Enum

import openai
from pydantic import BaseModel, ConfigDict

client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
ASK = {"model": "m", "messages": [{"role": "user", "content": "Plan a day."}], "temperature": 0, "max_tokens": 400}


class Sky(Enum):
    """Few choices, for a model that knows nothing."""

    clear = "clear"
    rain = "rain"


class Day(BaseModel):
    """A plan."""

    model_config = ConfigDict(extra="forbid")
    sky: Sky
    outside: bool


class Look(BaseModel):
    """A tool's arguments."""

    sky: Sky


assert [model.id for model in client.models.list()] == ["m"]
assert client.models.retrieve("m").object == "model"

# --- chat and streams ---
# The second one finds its prompt cached, as the stream does: in bf16 two tokens that are as likely may change places.
_, whole = (client.chat.completions.create(**{**ASK, "max_tokens": 24}) for _ in range(2))
assert whole.usage
assert whole.usage.completion_tokens <= 24
pieces = list(
    client.chat.completions.create(**{**ASK, "max_tokens": 24}, stream=True, stream_options={"include_usage": True})
)
assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole.choices[0].message.content
assert pieces[-1].usage
assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
assert client.completions.create(model="m", prompt="Once", max_tokens=4).choices[0].text is not None

# --- tools ---
tool = {"type": "function", "function": {"name": "look", "parameters": Look.model_json_schema()}}
forced = {**ASK, "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
answer = client.chat.completions.create(**forced).choices[0]
assert answer.finish_reason == "tool_calls"
(call,) = answer.message.tool_calls
Look.model_validate_json(call.function.arguments)
deltas = [d for c in client.chat.completions.create(**forced, stream=True) for d in c.choices[0].delta.tool_calls or []]
assert "".join(d.function.arguments or "" for d in deltas) == call.function.arguments
after = [*ASK["messages"], answer.message, {"role": "tool", "tool_call_id": call.id, "content": "clear"}]
assert client.chat.completions.create(**{**forced, "messages": after}).choices[0].message.tool_calls

# --- parse helpers ---
plan = client.chat.completions.parse(**ASK, response_format=Day).choices[0].message.parsed
assert isinstance(plan, Day)
with client.chat.completions.stream(**ASK, response_format=Day) as stream:
    assert stream.get_final_completion().choices[0].message.parsed == plan
strict = {**forced, "tools": [openai.pydantic_function_tool(Look, name="look")]}
(parsed,) = client.chat.completions.parse(**strict).choices[0].message.tool_calls
assert isinstance(parsed.function.parsed_arguments, Look)
with client.chat.completions.stream(**strict) as stream:
    assert stream.get_final_completion().choices[0].message.tool_calls[0].function.parsed_arguments

# --- errors ---
try:
    client.chat.completions.create(model="another", messages=ASK["messages"])
except openai.NotFoundError as error:
    print(error.code)  # model_not_found
else:
    raise AssertionError("there is no such model")
print(json.dumps({"plan": plan.model_dump(mode="json"), "call": call.function.arguments}))
