"""The tools of /v1/responses as a chat offers them, which knows functions only: free text for a `custom` tool is its
one argument, a function of a `namespace` is called by both names, what runs on OpenAI's servers is left out."""

import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from miniserve.api.tools import DEFERRED, Tool, check_function, flat_name
from miniserve.sampling_params import ParameterError
from miniserve.text.schemas import spelled

CallKind = Literal["function_call", "custom_tool_call", "tool_search_call"]
"""The type of the item that a call of a tool is."""


class Offered(NamedTuple):
    """A tool as a chat offers it, and what this API calls it."""

    tool: Tool
    kind: CallKind
    name: str
    namespace: str = ""


INPUT = "input"
"""The argument of a custom tool."""
SEARCH = "tool_search"
SEARCH_PARAMETERS = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}


def offered_tools(tools: list[dict[str, Any]]) -> tuple[dict[str, Offered], list[str]]:
    """By flat name what is offered of `tools`, and names of what is left out. Raises `ParameterError`."""
    offered: dict[str, Offered] = {}
    left_out: list[str] = []
    for number, tool in enumerate(tools):
        here, each = f"tools[{number}]", [tool]
        spaced = tool.get("type") == "namespace" and isinstance(tool.get("tools"), list)
        if spaced:
            left_out += ["tools.namespace.description"] if tool.get("description") else []
            each = [one if isinstance(one, dict) else {"type": str(one)} for one in tool["tools"]]
        for index, one in enumerate(each):
            at, kind = f"{here}.tools[{index}]" if spaced else here, one.get("type")
            if kind in ("function", "custom") or (kind == SEARCH and not spaced and one.get("execution") == "client"):
                found = _offered(one, at, tool.get("name") if spaced else "")
                check_function(found.tool["function"], at, taken=offered)
                offered[found.tool["function"]["name"]] = found
            elif spaced or isinstance(kind, str):
                left_out.append(f"tools.{kind}")
            else:
                raise ParameterError(at, f"`{at}` has no `type`: tools of your own are of the type 'function'.")
    return offered, left_out


def _offered(tool: Mapping[str, Any], at: str, namespace: Any) -> Offered:
    if "function" in tool:
        raise ParameterError(at, f"`{at}`: here `name` and `parameters` stand beside `type`, not in `function`.")
    # Unset options of tools come as null from some clients, which would change the prompt.
    function = {key: value for key, value in tool.items() if key not in ("type", DEFERRED) and value is not None}
    kind: CallKind = "function_call"
    name: Any = tool.get("name") or None
    if tool["type"] == "custom":
        kind, function = "custom_tool_call", _custom_function(tool)
    elif tool["type"] == SEARCH:
        kind, name = "tool_search_call", SEARCH
        known = {"description": tool.get("description"), "parameters": tool.get("parameters") or SEARCH_PARAMETERS}
        function = {key: value for key, value in {"name": SEARCH, **known}.items() if value}
    named = isinstance(name, str) and isinstance(namespace, str)
    function["name"] = flat_name(name, namespace) if named else None
    made = {"type": "function", "function": function, **({DEFERRED: True} if tool.get(DEFERRED) else {})}
    return Offered(made, kind, name, namespace)


def _custom_function(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A function of free text. If that has a format, the description says so; a forced call keeps to a regex."""
    form, text = tool.get("format"), {"type": "string"}
    described = [tool["description"]] if isinstance(tool.get("description"), str) else []
    if isinstance(form, dict) and isinstance(definition := form.get("definition"), str):
        described.append(f"The input matches this {form.get('syntax')} grammar:\n{definition}")
        text |= {"pattern": f"^(?:{definition})$"} if form.get("syntax") == "regex" else {}
    parameters = {"type": "object", "properties": {INPUT: text}, "required": [INPUT]}
    return {"name": tool.get("name"), "description": "\n\n".join(described), "parameters": parameters}


def custom_input(arguments: str) -> str:
    """The free text of a call of a custom tool; of one that was cut off, all there is."""
    try:
        return spelled(json.loads(arguments)[INPUT])
    except (ValueError, KeyError, TypeError, RecursionError):
        return arguments
