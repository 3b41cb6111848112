"""What requests for /v1/responses may hold, and the chat request that each of them is another spelling of."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, TypeAdapter, field_validator

from miniserve.api.fields import Count, Effort, Key, RequestBody, Salt, Temperature, TopP, at_most, one_of
from miniserve.api.openai.schemas import ChatRequest
from miniserve.api.tools import FewTools, ToolChoice
from miniserve.sampling_params import ParameterError
from miniserve.text.messages import Body, Json, Text, TextOr, joined, kind_of

RESPONSES_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    r"tools\[(\d+)\]\.function": r"tools[\1]",
}
"""Patterns of a chat's parameters, and this API's names of them."""
SAME_NAMES = {"model", "temperature", "top_p", "stream", "parallel_tool_calls", "prompt_cache_key", "cache_salt"}
MAX_METADATA = 16
ITEMS = ("message", "function_call", "function_call_output", "reasoning")
ENCRYPTED = "reasoning.encrypted_content"


class TextPart(Body):
    type: Literal["input_text", "output_text", "text"]
    text: Text


class ReasoningPart(Body):
    type: Literal["reasoning_text", "summary_text"]
    text: Text


TextParts = Annotated[
    list[Annotated[TextPart, one_of("Content parts", ("input_text", "output_text", "text"))]], Field(fail_fast=True)
]
TextOrParts = Annotated[
    TextOr[TextParts], Discriminator(kind_of, "content", "This must be a string or a list of text parts")
]
ReasoningParts = Annotated[list[ReasoningPart], Field(fail_fast=True)]


class ItemBody(Body):
    silent = frozenset({"id", "status"})


class MessageItem(ItemBody):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: TextOrParts


class FunctionCallItem(ItemBody):
    type: Literal["function_call"]
    call_id: Annotated[Text, Field(min_length=1)]
    name: Text
    arguments: Text


class FunctionCallOutputItem(ItemBody):
    type: Literal["function_call_output"]
    call_id: Annotated[Text, Field(min_length=1)]
    output: TextOrParts


class ReasoningItem(ItemBody):
    """`content` goes before `summary`. No server can read what another one has encrypted."""

    type: Literal["reasoning"]
    content: ReasoningParts | None = None
    summary: ReasoningParts | None = None
    encrypted_content: None = None


def _with_type(value: Any) -> Any:
    """The type of messages may be left out."""
    return {"type": "message", **value} if isinstance(value, dict) and "role" in value else value


Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionCallOutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    Discriminator(kind_of),
    one_of("Items", ITEMS),
    BeforeValidator(_with_type),
]
Items = Annotated[list[Item], Field(fail_fast=True, min_length=1)]
InputItem = MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem
OUTPUT: TypeAdapter[list[InputItem]] = TypeAdapter(list[Item])
"""Reads the items of an answer as input of the next one."""


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = None
    description: Text | None = None
    schema_: Annotated[Json | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextSettings(Body):
    format: TextFormat | None = None
    verbosity: Text | None = None


class ReasoningSettings(Body):
    effort: Effort | None = None
    summary: Text | None = None
    generate_summary: Text | None = None


class ResponsesRequest(RequestBody):
    refused = {
        "background": "answers come while the connection is open: use `stream`",
        "context_management": "nothing is compacted here: send a shorter `input`",
        "conversation": "use `previous_response_id`",
        "prompt": "there are no stored prompts here: use `instructions` and `input`",
        "moderation": "nothing is moderated here",
        "image": "this model writes text only",
        "top_logprobs": "use /v1/chat/completions for log-probabilities",
    }

    input: Annotated[TextOr[Items], Discriminator(kind_of, "input", "Input must be a string or a list of items")]
    model: Text | None = None
    instructions: Text | None = None
    previous_response_id: Key | None = None
    tools: FewTools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    stream: bool | None = None
    store: bool | None = None
    """Whether `previous_response_id` can name this response; yes, unless it is false."""
    metadata: (
        Annotated[
            dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]],
            Field(max_length=MAX_METADATA),
            at_most(MAX_METADATA),
        ]
        | None
    ) = None
    truncation: Literal["disabled"] | None = None
    include: Annotated[list[Text], Field(max_length=16)] | None = None
    prompt_cache_key: Key | None = None
    cache_salt: Salt | None = None

    @field_validator("include")
    @classmethod
    def _nothing_that_there_is_not(cls, include: list[str] | None) -> list[str] | None:
        for name in include or []:
            if name != ENCRYPTED:
                raise ValueError(f"{name[:64]!r} cannot be included: there is nothing of it here")
        return include

    @property
    def ignored(self) -> list[str]:
        names = list(self._ignored)
        names += ["include"] if self.include else []
        names += ["text.verbosity"] if self.text and self.text.verbosity else []
        summary = self.reasoning and (self.reasoning.summary or self.reasoning.generate_summary)
        return names + (["reasoning.summary"] if summary else [])

    @property
    def items(self) -> list[InputItem]:
        return [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input

    def chat(self, items: Sequence[InputItem]) -> ChatRequest:
        """As a chat about `items`, the whole conversation. Raises `ParameterError`, `ValidationError`."""
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        fields = {
            "messages": messages + messages_of(items),
            **self.model_dump(include=SAME_NAMES),
            "max_completion_tokens": self.max_output_tokens,
            "tools": [_chat_tool(number, tool) for number, tool in enumerate(self.tools or [])] or None,
            "tool_choice": _chat_choice(self.tool_choice),
            "response_format": self.text and self.text.format and _chat_format(self.text.format),
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
        }
        return ChatRequest.model_validate(fields)


def messages_of(items: Sequence[InputItem]) -> list[dict[str, Any]]:
    """The same as messages of a chat. The reasoning, text and calls of one answer of the model are one message, so that
    the prompt is that of a client of chats."""
    messages: list[dict[str, Any]] = []
    answer: dict[str, Any] | None = None  # the message to which further items of the same answer belong
    for item in items:
        if isinstance(item, FunctionCallOutputItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": joined(item.output)})
            answer = None
        elif isinstance(item, MessageItem) and item.role != "assistant":
            messages.append({"role": item.role, "content": joined(item.content)})
            answer = None
        else:
            if answer is None or _begins_another(answer, item):
                answer = {"role": "assistant"}
                messages.append(answer)
            _add(answer, item)
    return messages


def _begins_another(answer: dict[str, Any], item: InputItem) -> bool:
    if isinstance(item, ReasoningItem):
        return len(answer) > 1
    return isinstance(item, MessageItem) and "content" in answer and "tool_calls" not in answer


def _add(answer: dict[str, Any], item: InputItem) -> None:
    match item:
        case ReasoningItem():
            if thoughts := "\n".join(part.text for part in item.content or item.summary or []):
                answer["reasoning_content"] = thoughts
        case MessageItem():
            answer["content"] = answer.get("content", "") + joined(item.content)
        case FunctionCallItem():
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            answer.setdefault("tool_calls", []).append(call)


def _chat_tool(number: int, tool: dict[str, Any]) -> dict[str, Any]:
    at = f"tools[{number}]"
    if tool.get("type") != "function":
        kind = str(tool.get("type"))[:64]
        raise ParameterError(at, f"`{at}` is a tool of type {kind!r}: only tools of type 'function' are supported.")
    if "function" in tool:
        raise ParameterError(at, f"`{at}`: here `name` and `parameters` stand beside `type`, not in `function`.")
    # Unset options of tools come as null from some clients, which would change the prompt.
    function = {key: value for key, value in tool.items() if key != "type" and value is not None}
    return {"type": "function", "function": function}


def _chat_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
        raise ParameterError(
            "tool_choice",
            '`tool_choice` must be "none", "auto", "required" or {"type": "function", "name": ...}; '
            f"the type {str(choice.get('type'))[:64]!r} is not supported.",
        )
    return {"type": "function", "function": {"name": choice["name"]}}


def _chat_format(form: TextFormat) -> dict[str, Any]:
    if form.type != "json_schema":
        return {"type": form.type}
    if form.schema_ is None:
        raise ParameterError("text.format", '`text.format` of the type "json_schema" needs `schema`.')
    schema = {"name": form.name, "description": form.description, "schema": form.schema_, "strict": form.strict}
    return {"type": "json_schema", "json_schema": schema}
