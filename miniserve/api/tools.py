"""The tools of a request: what they may look like, and which of them has to be called."""

import json
import re
from collections.abc import Container, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Tag, WithJsonSchema

from miniserve.api.fields import TABLES, at_most
from miniserve.config import problem
from miniserve.sampling_params import ParameterError
from miniserve.text.messages import Json, JsonList, text_or

MAX_TOOLS = 256
MAX_TOOLS_CHARS = 256 * 1024
"""Of all tools as JSON; a model reads all of it before it answers."""
TOOL_SCHEMA: dict[str, Any] = TABLES["tool"]
"""A tool for OpenAPI. Tools stay as they came: a template renders the keys in the client's order."""
NAME = re.compile(TOOL_SCHEMA["properties"]["function"]["properties"]["name"]["pattern"])

DEFERRED = "defer_loading"
Tool = dict[str, Any]


def few_tools(value: Any) -> Any:
    """`value`. Raises `ValueError` for tools that are too long, before they are looked at one by one: for a megabyte of
    them that takes longer than the event loop has."""
    with suppress(RecursionError):  # `sound_json` refuses what is nested too deeply
        if (size := len(json.dumps(value, ensure_ascii=False))) > MAX_TOOLS_CHARS:
            raise ValueError(problem("api.long_tools", size=size, most=MAX_TOOLS_CHARS))
    return value


def in_chat_shape(tools: Any) -> Any:
    """Tools in the shape of the Responses API (`name` and `parameters` beside `type`) as chats have them. Keys and
    keywords of schemas that are null are as good as missing."""

    def reshaped(tool: Any) -> Any:
        if not isinstance(tool, dict):
            return tool
        if tool.get("type") == "function" and "function" not in tool and "name" in tool:
            tool = {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
        if not isinstance(function := tool.get("function"), dict):
            return tool
        return {**tool, "function": {key: without_nulls(value) for key, value in without_nulls(function).items()}}

    return [reshaped(tool) for tool in tools] if isinstance(tools, list) else tools


def without_nulls(value: Any) -> Any:
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


FewTools = Annotated[JsonList, BeforeValidator(few_tools), at_most(MAX_TOOLS)]
Tools = Annotated[
    FewTools,
    BeforeValidator(in_chat_shape),
    WithJsonSchema({"type": "array", "items": TOOL_SCHEMA, "maxItems": MAX_TOOLS}),
]
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<text>")] | Annotated[Json, Tag("<object>")],
    text_or("Input should be 'none', 'auto', 'required' or an object"),
]


def check_tools(tools: list[Tool], numbers: Sequence[int] | None = None) -> None:
    """Raises `ParameterError` for the first that is not in order; `numbers` are their places in the request."""
    taken: set[str] = set()
    for number, tool in zip(numbers or range(len(tools)), tools, strict=True):
        at = f"tools[{number}]"
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise ParameterError(at, problem("api.tool", at=at))
        check_function(function, f"{at}.function", taken)
        taken.add(function["name"])


def check_function(function: dict[str, Any], at: str, taken: Container[str]) -> None:
    """Raises `ParameterError` about the place `at` if it is not in order, or has a name that others have `taken`."""
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ParameterError(f"{at}.name", problem("api.tool_name", at=at, name=str(name)[:64]))
    if name in taken:
        raise ParameterError(f"{at}.name", f"Two tools are called {name!r}: rename one.")
    given = without_nulls(function.get("parameters"))
    parameters = given if isinstance(given, dict) else {}
    required = parameters.get("required", [])
    listed = isinstance(required, list) and all(isinstance(key, str) for key in required)
    schema = isinstance(given, dict | None) and parameters.get("type", "object") == "object"
    for place, right, what in (
        ("description", isinstance(function.get("description") or "", str), "a string"),
        ("parameters", schema, "a JSON schema of the type object"),
        ("parameters.properties", isinstance(parameters.get("properties", {}), dict), "an object"),
        ("parameters.required", listed, "a list of strings"),
    ):
        if not right:
            raise ParameterError(f"{at}.{place}", f"`{at}.{place}` must be {what}.")


def with_all_keys(tool: Tool) -> Tool:
    """`tool` with empty values for what its client has left out."""
    empty = {"description": "", "parameters": {"type": "object", "properties": {}}}
    return {**tool, "function": tool["function"] | {key: empty[key] for key in empty if key not in tool["function"]}}


def deferred(tool: Tool) -> bool:
    """Whether a tool is not in the prompt from the start: it can be called once the conversation speaks of it."""
    return bool(tool.get(DEFERRED) or tool["function"].get(DEFERRED))


class AllowedCalls:
    """What `tool_choice` asks for. `callable` are the tools that the model may call, `forced` those of which it has to
    call one, and `single` allows no second call. Raises `ParameterError`."""

    def __init__(self, tools: list[Tool] | None, choice: str | dict[str, Any] | None, parallel: bool | None) -> None:
        mode, names = _read_choice(choice)
        if not tools and mode not in ("none", "auto"):
            raise ParameterError("tool_choice", "A `tool_choice` that asks for a call needs `tools`.")
        known = {tool["function"]["name"]: tool for tool in tools or []}
        if unknown := [name for name in names or () if name not in known]:
            raise ParameterError("tool_choice", f"`tool_choice` names {unknown[0][:128]!r}, which is none of `tools`.")
        chosen = [known[name] for name in (known if names is None else names)]
        self.callable = [] if mode == "none" else chosen
        self.forced = chosen if mode in ("required", "named") else []
        self.single = parallel is False or mode == "named"


def _read_choice(choice: str | dict[str, Any] | None) -> tuple[str, list[str] | None]:
    """`none`, `auto`, `required` or `named`, and of which tools, None for all. `choice` is in the words of any of the
    APIs. Raises `ParameterError`."""
    if not isinstance(choice, dict):
        return choice or "auto", None
    kind, allowed = choice.get("type"), choice.get("allowed_tools", choice)
    if kind in ("none", "auto", "any"):
        return "required" if kind == "any" else kind, None
    if kind in ("function", "custom", "tool") and (names := _names_in([choice])):
        return "named", names
    if kind == "allowed_tools" and isinstance(allowed, dict):
        mode, tools = allowed.get("mode", "auto"), allowed.get("tools")
        if mode in ("auto", "required") and isinstance(tools, list) and (names := _names_in(tools)):
            return mode, names
        if mode == "auto" and tools:  # all of them were left out of the tools, too
            return "none", None
    raise ParameterError("tool_choice", problem("api.tool_choice", kind=str(kind)[:64]))


def _names_in(tools: list[Any]) -> list[str]:
    """The names of those that have one: all but those that other servers run."""
    functions = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)]
    named = [one for one in functions if isinstance(one, dict) and isinstance(one.get("name"), str)]
    return [flat_name(one["name"], one.get("namespace")) for one in named]


def flat_name(name: str, namespace: str | None) -> str:
    """The name of a tool of a namespace among all those of a request, as vLLM makes it."""
    return f"{namespace}__{name}" if namespace else name
