"""The items of /v1/responses: a conversation's messages, calls, results and reasoning, and the chat that they are."""

import json
import re
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter

from miniserve.api.fields import TABLES
from miniserve.api.responses.tools import INPUT, SEARCH, Offered, offered_tools
from miniserve.api.tools import DEFERRED, FewTools, flat_name
from miniserve.text.messages import Body, Content, ContentParts, Json, Text, by_type, joined, types_of

LEFT_OUT = re.compile(TABLES["left_out"]["items"])
CallId = Annotated[Text, Field(min_length=1)]
OrNull = BeforeValidator(lambda text: "" if text is None else text)
"""Clients have null where there is no text."""


class ItemBody(Body):
    id: Text | None = None
    status: Text | None = None


class MessageItem(ItemBody):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[Content, OrNull]


class NamedCallItem(ItemBody):
    call_id: CallId
    name: Text
    namespace: Text | None = None


class FunctionCallItem(NamedCallItem):
    type: Literal["function_call"]
    arguments: Annotated[Text, OrNull]


class CustomToolCallItem(NamedCallItem):
    type: Literal["custom_tool_call"]
    input: Annotated[Text, OrNull]


class CallOutputItem(ItemBody):
    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: CallId
    output: Annotated[Content, OrNull]


class ToolSearchCallItem(ItemBody):
    type: Literal["tool_search_call"]
    call_id: CallId
    execution: Text | None = None
    arguments: Json


class ToolsItem(ItemBody):
    """Tools that were searched for with the call `call_id`, or that a `role` brings up."""

    type: Literal["tool_search_output", "additional_tools"]
    tools: Annotated[FewTools, AfterValidator(lambda tools: offered_tools(tools) and tools)]
    call_id: CallId | None = None
    execution: Text | None = None
    role: Text | None = None


class ReasoningItem(ItemBody):
    """`content` goes before `summary`. What another server has encrypted cannot be read, and is ignored."""

    type: Literal["reasoning"]
    content: ContentParts | None = None
    summary: ContentParts | None = None


class LeftOutItem(ItemBody):
    """Only what it was is kept of it."""

    type: Literal["left_out"]
    was: Text


def _known(value: Any) -> Any:
    """The type of messages may be left out. What a server has searched for has no `call_id`, and no need of a place."""
    if not isinstance(value, dict):
        return value
    if (kind := value.get("type")) is None and "role" in value:
        kind = "message"
    if not isinstance(kind, str):
        return value
    searched = kind.startswith(SEARCH) and value.get("call_id") is None
    if (kind in ITEMS and searched) or (kind not in ITEMS and LEFT_OUT.fullmatch(kind)):
        return {"type": "left_out", "was": kind, "id": value.get("id")}
    return {**value, "type": kind}


Call = FunctionCallItem | CustomToolCallItem | ToolSearchCallItem
ItemKinds = MessageItem | Call | CallOutputItem | ReasoningItem | ToolsItem | LeftOutItem
ITEMS = types_of(ItemKinds)
Item = Annotated[ItemKinds, by_type("Items", ItemKinds, _known)]
Items = Annotated[list[Item], Field(fail_fast=True)]
OUTPUT: TypeAdapter[list[Item]] = TypeAdapter(list[Item])
"""Reads the items of an answer as input of the next one."""
PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc"}


def new_id(kind: str) -> str:
    return f"{PREFIXES.get(kind, 'item')}_{secrets.token_hex(16)}"


def with_ids(items: Sequence[Item]) -> list[Item]:
    """`items`, each with an id now, the client's own where there is one."""
    for item in items:
        item.id = item.id or new_id(item.type)
    return [*items]


def item_out(item: Item) -> dict[str, Any]:
    """An item as it is shown: a message's text as a part."""
    shown = {**item.model_dump(exclude_none=True), "status": item.status or "completed"}
    if isinstance(item, LeftOutItem):
        return {"type": item.was, "id": item.id}
    if isinstance(item, MessageItem) and isinstance(item.content, str):
        kind = "output_text" if item.role == "assistant" else "input_text"
        shown["content"] = [{"type": kind, "text": item.content}]
    return shown


def messages_of(items: Sequence[Item]) -> tuple[list[dict[str, Any]], dict[str, Offered]]:
    """The same as messages of a chat, and the tools that the conversation has brought up, by flat name. The reasoning,
    text and calls of one answer of the model are one message, so that the prompt is that of a client of chats."""
    messages: list[dict[str, Any]] = []
    found: dict[str, Offered] = {}
    answer: dict[str, Any] | None = None  # the message to which further items of the same answer belong
    for item in items:
        match item:
            case LeftOutItem():
                continue
            case ReasoningItem() if not (item.content or item.summary):
                continue
            case CallOutputItem():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": joined(item.output)})
            case ToolsItem(type="tool_search_output"):
                content = _described(item.tools, found)
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
            case ToolsItem():
                content = f"These tools are at hand, too:\n<tools>{_described(item.tools, found)}</tools>"
                messages.append({"role": "developer", "content": content})
            case MessageItem() if item.role != "assistant":
                messages.append({"role": item.role, "content": joined(item.content)})
            case _:
                thought = isinstance(item, ReasoningItem) and answer and len(answer) > 1
                said = isinstance(item, MessageItem) and answer and "content" in answer and "tool_calls" not in answer
                if answer is None or thought or said:  # another answer begins
                    answer = {"role": "assistant"}
                    messages.append(answer)
                if isinstance(item, ReasoningItem):
                    answer["reasoning_content"] = "\n".join(part.text for part in item.content or item.summary or [])
                elif isinstance(item, MessageItem):
                    answer["content"] = answer.get("content", "") + joined(item.content)
                else:
                    call = {"id": item.call_id, "type": "function", "function": _called(item)}
                    answer.setdefault("tool_calls", []).append(call)
                continue
        answer = None
    return messages, found


def _described(tools: list[dict[str, Any]], found: dict[str, Offered]) -> str:
    """Tools that come up in mid-conversation, as text, so that the prompt before stays as it was; added to `found`."""
    offered, _ = offered_tools(tools)
    for name, one in offered.items():
        found[name] = one._replace(tool={**one.tool, DEFERRED: True})
    return json.dumps([one.tool["function"] for one in offered.values()], ensure_ascii=False)


def _called(item: Call) -> dict[str, Any]:
    if isinstance(item, ToolSearchCallItem):
        return {"name": SEARCH, "arguments": item.arguments}
    arguments = item.arguments if isinstance(item, FunctionCallItem) else {INPUT: item.input}
    return {"name": flat_name(item.name, item.namespace), "arguments": arguments}
