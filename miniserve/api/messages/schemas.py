"""What requests for /v1/messages may hold, and the chat request that each of them is another spelling of."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from miniserve.api.fields import Count, Effort, RequestBody, Salt, StopTexts, Temperature, TopK, TopP, one_of
from miniserve.api.openai.schemas import ChatRequest
from miniserve.api.tools import FewTools
from miniserve.sampling_params import ParameterError
from miniserve.text.messages import Body, Json, Text, TextOr, joined, kind_of

MESSAGES_NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    r"tools\[(\d+)\]\.function\.parameters": r"tools[\1].input_schema",
    r"tools\[(\d+)\]\.function": r"tools[\1]",
}
"""Patterns of a chat's parameters, and this API's names of them."""
SAME_NAMES = {"model", "max_tokens", "temperature", "top_k", "top_p", "stream", "cache_salt"}
TOOL_KEYS = ("name", "description", "input_schema", "strict")
ERROR = "Error: "
"""Begins the result of a tool that failed: chat templates have no other way to say so."""


class TextBlock(Body):
    type: Literal["text"]
    text: Text


class ThinkingBlock(Body):
    type: Literal["thinking"]
    thinking: Text


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: Annotated[Text, Field(min_length=1)]
    name: Text
    input: Json


TextBlocks = Annotated[list[Annotated[TextBlock, one_of("Content blocks", ["text"])]], Field(fail_fast=True)]
TextOrBlocks = Annotated[
    TextOr[TextBlocks], Discriminator(kind_of, "content", "This must be a string or a list of text blocks")
]


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: Annotated[Text, Field(min_length=1)]
    content: TextOrBlocks | None = None
    is_error: bool | None = None


Block = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")],
    Discriminator(lambda block: f"<{block['type']}>"),
    one_of("Content blocks", ["text", "thinking", "tool_use", "tool_result"]),
]
Blocks = Annotated[list[Block], Field(fail_fast=True)]


class MessageParam(Body):
    role: Literal["user", "assistant", "system"]
    content: Annotated[
        TextOr[Blocks], Discriminator(kind_of, "content", "Content must be a string or a list of blocks")
    ]


class ThinkingSettings(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: Text | None = None


class ToolChoiceParam(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: Annotated[Json, Field(alias="schema")]


class OutputConfig(Body):
    effort: Effort | None = None
    format: OutputFormat | None = None


class CountTokensRequest(RequestBody):
    """The fields of a request that its prompt is made of."""

    refused = {
        "container": "there are no containers here",
        "mcp_servers": "let the model call tools of yours",
        "context_management": "nothing is edited here: send the `messages` that count",
    }

    messages: Annotated[list[MessageParam], Field(fail_fast=True, min_length=1)]
    model: Text | None = None
    system: TextOrBlocks | None = None
    tools: FewTools | None = None
    tool_choice: ToolChoiceParam | None = None
    thinking: ThinkingSettings | None = None
    output_config: OutputConfig | None = None

    @property
    def ignored(self) -> list[str]:
        thinking = [f"thinking.{key}" for key in ("budget_tokens", "display") if getattr(self.thinking, key, None)]
        keys = {key for tool in self.tools or [] for key in tool if key not in (*TOOL_KEYS, "type")}
        return [*self._ignored, *thinking, *(f"tools.{key}" for key in keys)]

    def chat(self) -> ChatRequest:
        """As a chat. Raises `ParameterError`, `ValidationError`."""
        return ChatRequest.model_validate(self._fields())

    def _fields(self) -> dict[str, Any]:
        messages = [{"role": "system", "content": joined(self.system)}] if self.system else []
        for number, message in enumerate(self.messages):
            messages += _chat_messages(message, f"messages[{number}]")
        continued = self.messages[-1].role == "assistant"
        if continued and "tool_calls" in messages[-1]:
            raise ParameterError("messages", "`messages` ends with a `tool_use`: answer it with a `tool_result`.")
        thinking, choice, config = self.thinking, self.tool_choice, self.output_config
        fields: dict[str, Any] = {
            "messages": messages,
            **self.model_dump(include=SAME_NAMES),
            "tools": [_chat_tool(number, tool) for number, tool in enumerate(self.tools or [])] or None,
            "tool_choice": choice and _chat_choice(choice),
            "parallel_tool_calls": False if choice and choice.disable_parallel_tool_use else None,
            "reasoning_effort": config and config.effort,
            # An answer that has begun already goes on.
            "continue_final_message": continued,
            "add_generation_prompt": not continued,
        }
        if thinking is not None:
            fields["chat_template_kwargs"] = {"enable_thinking": thinking.type != "disabled"}
        if config and config.format:
            schema = {"name": "output", "schema": config.format.schema_}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return fields


class MessagesRequest(CountTokensRequest):
    max_tokens: Count
    stop_sequences: StopTexts | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    stream: bool | None = None
    cache_salt: Salt | None = None

    def _fields(self) -> dict[str, Any]:
        return {**super()._fields(), "stop": self.stop_sequences}


def _chat_messages(message: MessageParam, at: str) -> list[dict[str, Any]]:
    """The same as messages of a chat, in which the results of tools are messages of their own."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    if message.role == "assistant":
        return [_answer(message.content, at)]
    messages: list[dict[str, Any]] = []
    texts: list[str] = []

    def flush() -> None:
        if texts:
            messages.append({"role": message.role, "content": "\n".join(texts)})
            texts.clear()

    for number, block in enumerate(message.content):
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolResultBlock) and message.role == "user":
            flush()
            result = (ERROR if block.is_error else "") + joined(block.content or "")
            messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": result})
        else:
            raise _misplaced(block, message.role, f"{at}.content[{number}]")
    flush()
    return messages or [{"role": message.role, "content": ""}]


def _answer(blocks: list[Any], at: str) -> dict[str, Any]:
    """One answer of the model as a message of a chat: its text as the model wrote it, its reasoning, its calls."""
    answer: dict[str, Any] = {"role": "assistant", "content": ""}
    for number, block in enumerate(blocks):
        match block:
            case TextBlock():
                answer["content"] += block.text
            case ThinkingBlock():
                answer["reasoning_content"] = answer.get("reasoning_content", "") + block.thinking
            case ToolUseBlock():
                function = {"name": block.name, "arguments": block.input}
                answer.setdefault("tool_calls", []).append({"id": block.id, "type": "function", "function": function})
            case _:
                raise _misplaced(block, "assistant", f"{at}.content[{number}]")
    return answer


def _misplaced(block: Any, role: str, at: str) -> ParameterError:
    return ParameterError(at, f"`{at}`: a message of the role {role!r} cannot hold a block of type {block.type!r}.")


def _chat_tool(number: int, tool: dict[str, Any]) -> dict[str, Any]:
    at = f"tools[{number}]"
    if tool.get("type", "custom") not in ("custom", None):
        kind = str(tool["type"])[:64]
        raise ParameterError(at, f"`{at}` is a tool of type {kind!r}: only tools of your own are supported.")
    if "input_schema" not in tool:
        raise ParameterError(f"{at}.input_schema", f"`{at}.input_schema` is missing.")
    names = {"input_schema": "parameters"}
    # Marks for a cache and the like move from turn to turn: they must not be part of the prompt.
    function = {names.get(key, key): tool[key] for key in tool if key in TOOL_KEYS and tool[key] is not None}
    return {"type": "function", "function": function}


def _chat_choice(choice: ToolChoiceParam) -> str | dict[str, Any]:
    if choice.type != "tool":
        return {"auto": "auto", "any": "required", "none": "none"}[choice.type]
    if choice.name is None:
        raise ParameterError("tool_choice.name", "`tool_choice` of the type 'tool' needs `name`.")
    return {"type": "function", "function": {"name": choice.name}}
