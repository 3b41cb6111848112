"""Messages of a conversation as clients write them, for the server and the library alike, and as chat templates read
them. The types of fields here are those of all requests."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, WrapValidator, model_validator

from miniserve.config import problem, tables
from miniserve.text.template import Message

MAX_DEPTH = 100
"""How deep free-form JSON may be nested: templates and serializers recurse into it."""


def valid_unicode(text: str) -> str:
    """`text`. Raises `ValueError` if it holds half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(problem("text.unicode", start=error.start)) from error
    return text


def levels(value: Any) -> Iterator[tuple[int, Any]]:
    """All objects and lists in a JSON value with how deep they are, level by level."""
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        for item in level:
            yield depth, item
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]


def sound_json(value: dict[str, Any]) -> dict[str, Any]:
    """`value`. Raises `ValueError` if it is nested too deeply for templates, or holds text that is no Unicode."""
    for depth, outer in levels(value):
        if depth > MAX_DEPTH:
            raise ValueError(f"This is nested too deeply: use at most {MAX_DEPTH} levels of objects and lists")
        for item in (*outer, *outer.values()) if isinstance(outer, dict) else outer:
            if isinstance(item, str):
                valid_unicode(item)
    return value


def text_or(problem: str) -> Discriminator:
    """For a union of text and a list (`TextOr`) or an object; `problem` is the error for what is neither."""
    kinds: dict[type, str] = {str: "<text>", list: "<list>", dict: "<object>"}
    return Discriminator(lambda value: kinds.get(type(value)), "kind", problem)


T = TypeVar("T")
Text = Annotated[str, AfterValidator(valid_unicode)]
TextOr = Annotated[Text, Tag("<text>")] | Annotated[T, Tag("<list>")]
"""Text or a list; `text_or` discriminates between them."""
Json = Annotated[dict[str, Any], AfterValidator(sound_json)]
"""An object of the client's own making, for the chat template."""
JsonList = Annotated[list[Json], Field(fail_fast=True)]


class Body(BaseModel):
    """An object in a request."""

    model_config = ConfigDict(allow_inf_nan=False, protected_namespaces=())


def call_for_template(call: dict[str, Any]) -> dict[str, Any]:
    """A call of the history as templates know it: its arguments are an object, if their text is one."""
    function = dict(call["function"])
    function["arguments"] = arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            if isinstance(decoded := json.loads(arguments), dict):
                function["arguments"] = sound_json(decoded)
    return {**call, "function": function}


UNREADABLE: dict[str, str] = tables("text/contents.toml")["unreadable"]


def readable(part: Any) -> Any:
    """A part of a content as text, whatever it is, where its type is known; else as it came."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in UNREADABLE:
        return part
    return {"type": "text", "text": f"[{what}: this model reads text only]" if (what := UNREADABLE[kind]) else ""}


def types_of(kinds: Any) -> dict[str, type[Body]]:
    """The bodies of a union (or one alone) by their `type`."""
    each = get_args(kinds) or (kinds,)
    return {name: kind for kind in each for name in get_args(kind.model_fields["type"].annotation)}


def by_type(what: str, kinds: Any, before: Callable[[Any], Any] = lambda value: value) -> WrapValidator:
    """Reads an object as the one of `kinds` whose `type` it has, or gets `before` it is read."""
    known = types_of(kinds)

    def read(value: Any, _: object) -> Any:
        value = before(value)
        if isinstance(value, Body):
            return value
        name = value.get("type") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in known:
            given = f"of type {name[:32]!r}" if isinstance(name, str) else "without a `type`"
            raise ValueError(f"{what} {given} are not supported: use {', '.join(known)}")
        return known[name].model_validate(value)

    return WrapValidator(read, json_schema_input_type=kinds)


class ContentPart(Body):
    type: Literal["text", "input_text", "output_text", "summary_text", "reasoning_text"]
    text: Text


Part = Annotated[ContentPart, by_type("This model reads text only: content parts", ContentPart, readable)]
ContentParts = Annotated[list[Part], Field(fail_fast=True)]
Content = Annotated[TextOr[ContentParts], text_or("Content must be a string or a list of text parts")]


def joined(content: str | list[Any]) -> str:
    """A content's text, or the texts of its parts with line breaks between."""
    return content if isinstance(content, str) else "\n".join(part.text for part in content if part.text)


def complaint(error: Mapping[str, Any]) -> tuple[str, str]:
    """Where in a value the first thing is that pydantic does not like, as `messages[0].content`, and why. Parts of a
    location in angle brackets name branches of a union."""
    path = ""
    for part in error["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<") and part != "[key]":
            path += f".{part}" if path else part
    return path, error["msg"].removeprefix("Value error, ").rstrip(".")


def _no_function_call(value: Any, _: object) -> None:
    if value is not None:
        raise ValueError("This is not supported: use `tool_calls`, and for the result the role 'tool'")


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Text | None = None
    tool_calls: JsonList | None = None
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    """Another name of `reasoning_content`."""
    function_call: Annotated[None, WrapValidator(_no_function_call)] = None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if "content" not in self.model_fields_set and self.role != "assistant":
            raise ValueError(f"A message of the role {self.role!r} needs `content`")
        for call in self.tool_calls or []:
            function = call.get("function")
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise ValueError(problem("text.call"))
            if not isinstance(call.get("id", ""), str | None):
                raise ValueError("The `id` of a tool call must be a string")
        return self

    def for_template(self) -> Message:
        """As chat templates know messages: content is a string, arguments are objects, `developer` is `system`."""
        rest = self.model_dump(exclude_none=True, exclude={"role", "content", "reasoning", "tool_calls"})
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": joined(self.content or ""), **rest}
        if self.tool_calls:
            message["tool_calls"] = [call_for_template(call) for call in self.tool_calls]
        if self.reasoning is not None:
            message.setdefault("reasoning_content", self.reasoning)
        return message
