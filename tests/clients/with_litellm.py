"""`litellm` by its OpenAI-compatible route: chat, a stream, a forced call, JSON by a schema."""

import json
import sys

import litellm

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"sky": {"enum": ["clear", "rain"]}}, "required": ["sky"]},
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"outside": {"type": "boolean"}},
    "required": ["outside"],
    "additionalProperties": False,
}
ASK = {
    "model": "openai/m",
    "api_base": sys.argv[1],
    "api_key": "none",
    "messages": [{"role": "user", "content": "Plan a day."}],
    "temperature": 0,
    "max_tokens": 200,
}

whole = litellm.completion(**{**ASK, "max_tokens": 24})
pieces = list(litellm.completion(**{**ASK, "max_tokens": 24}, stream=True, stream_options={"include_usage": True}))
assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole.choices[0].message.content
(call,) = (
    litellm.completion(**ASK, tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    .choices[0]
    .message.tool_calls
)
assert json.loads(call.function.arguments)["sky"] in ("clear", "rain")
chunks = list(litellm.completion(**ASK, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, stream=True))
built = litellm.stream_chunk_builder(chunks)
assert built.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
form = {"type": "json_schema", "json_schema": {"name": "day", "schema": SCHEMA, "strict": True}}
answer = litellm.completion(**ASK, response_format=form).choices[0].message.content
assert isinstance(json.loads(answer)["outside"], bool)
try:
    litellm.completion(**{**ASK, "temperature": 1e9})
except litellm.BadRequestError as error:
    print(error)
else:
    raise AssertionError("a temperature of 1e9 was taken")
print(json.dumps({"call": call.function.arguments, "json": answer}))
