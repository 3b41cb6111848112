"""What requests for /v1/messages may hold, and the chat request that each of them is another spelling of. What a model
that reads text cannot be given of a content stands as text, or not at all."""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from miniserve.api.errors import ApiError
from miniserve.api.fields import TABLES, Amount, Effort, StopTexts
from miniserve.api.openai.parameters import ResponseFormat, SamplingFields
from miniserve.api.openai.schemas import ChatRequest
from miniserve.api.tools import DEFERRED, FewTools, Tool, ToolChoice, check_tools, deferred
from miniserve.config import problem
from miniserve.sampling_params import ParameterError
from miniserve.text.messages import Body, Json, Text, TextOr, by_type, readable, text_or

TOOL_KEYS = ("name", "description", "input_schema", "strict")
ERROR = "Error: "
"""Begins the result of a tool that failed: chat templates have no other way to say so."""
BILLING = "x-anthropic-billing-header:"
"""Begins a first system block of Claude Code, which changes with each request and means nothing to a model: before all
else in a prompt, it would leave no prefix to find again."""
SERVER_BLOCKS = re.compile(TABLES["left_out"]["blocks"])


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
    input: Json | None


class ToolReferenceBlock(Body):
    type: Literal["tool_reference"]
    tool_name: Text


def as_text(block: Any) -> Any:
    """A block of a kind that chats have no word for, as text or as nothing."""
    kind, source = (block.get("type"), block.get("source")) if isinstance(block, dict) else (None, None)
    if kind == "document" and isinstance(source, dict) and source.get("type") in ("text", "content"):
        said = source.get("data", source.get("content"))
        texts = [block.get("title"), block.get("context"), *_texts_in(said)]
    elif kind in ("search_result", "compaction"):
        texts = [block.get("title"), block.get("source"), *_texts_in(block.get("content"))]
    elif isinstance(kind, str) and SERVER_BLOCKS.fullmatch(kind):
        return {"type": "text", "text": ""}
    else:
        return readable(block)
    return {"type": "text", "text": "\n".join(text for text in texts if isinstance(text, str))}


def _texts_in(content: Any) -> list[Any]:
    blocks = content if isinstance(content, list) else [{"text": content}]
    return [block.get("text") for block in blocks if isinstance(block, dict)]


ResultKinds = TextBlock | ToolReferenceBlock
ResultBlock = Annotated[ResultKinds, by_type("Content blocks", ResultKinds, as_text)]
ResultBlocks = Annotated[list[ResultBlock], Field(fail_fast=True)]


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: Annotated[Text, Field(min_length=1)]
    content: Annotated[TextOr[ResultBlocks], text_or("This must be a string or a list of text blocks")] | None = None
    is_error: bool | None = None


BlockKinds = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock | ToolReferenceBlock
Block = Annotated[BlockKinds, by_type("Content blocks", BlockKinds, as_text)]
Blocks = Annotated[list[Block], Field(fail_fast=True)]
SystemBlocks = Annotated[list[Annotated[TextBlock, by_type("Content blocks", TextBlock)]], Field(fail_fast=True)]
SystemText = Annotated[TextOr[SystemBlocks], text_or("This must be a string or a list of text blocks")]
TextOrBlocks = Annotated[TextOr[Blocks], text_or("Content must be a string or a list of blocks")]


class MessageParam(Body):
    role: Literal["user", "assistant", "system"]
    content: TextOrBlocks | None


class ThinkingSettings(Body):
    type: Literal["enabled", "disabled", "adaptive"]


class OutputConfig(Body):
    effort: Effort | None = None
    format: ResponseFormat | None = None


class CountTokensRequest(SamplingFields):
    """The fields of a request; to count its prompt it need have no limit of its output."""

    refused = {**SamplingFields.refused, **TABLES["refused"]["messages"]}

    messages: Annotated[list[MessageParam], Field(fail_fast=True, min_length=1)]
    max_tokens: Amount | None = None
    stop_sequences: StopTexts | None = None
    system: SystemText | None = None
    tools: FewTools | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingSettings | None = None
    output_config: OutputConfig | None = None
    thread: Json | None = None

    @property
    def ignored(self) -> list[str]:
        tools = self.tools or []
        keys = {key for tool in tools if _own(tool) for key in tool if key not in (*TOOL_KEYS, "type", DEFERRED)}
        kinds = {tool["type"] for tool in tools if not _own(tool)}
        return [*self._ignored, *(f"tools.{key}" for key in keys | kinds)]

    def chat(self, normalize: bool = True) -> ChatRequest:
        """As a chat; with `normalize` without what changes from request to request and means nothing to a model. Raises
        `ParameterError`, `ValidationError`, `ApiError`."""
        if self.thread:
            # The official client sends the whole conversation then, without `thread`.
            unsupported = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
            raise ApiError(400, problem("api.thread"), param="thread", anthropic={"details": unsupported})
        own = {number: _chat_tool(number, tool) for number, tool in enumerate(self.tools or []) if _own(tool)}
        check_tools([*own.values()], [*own])
        tools: dict[str, Tool] = {tool["function"]["name"]: tool for tool in own.values()}
        said = self.system or ""
        texts = [said] if isinstance(said, str) else [block.text for block in said]
        if normalize and texts[0].startswith(BILLING):
            texts[0] = texts[0].partition("\n")[2]
        system = "\n".join(filter(None, texts))
        messages, referred = _chat_messages(self.messages, tools)
        messages = [{"role": "system", "content": system}, *messages] if system else messages
        continued = self.messages[-1].role == "assistant"
        if continued and "tool_calls" in messages[-1]:
            raise ParameterError("messages", "`messages` ends with a `tool_use`: answer it with a `tool_result`.")
        single = isinstance(self.tool_choice, dict) and self.tool_choice.get("disable_parallel_tool_use")
        thinking, config = self.thinking, self.output_config
        return ChatRequest.of(
            self,
            messages=messages,
            tools=[t for name, t in tools.items() if not deferred(t) or name in referred] or None,
            stop=self.stop_sequences,
            parallel_tool_calls=False if single else None,
            reasoning_effort=config and config.effort,
            response_format=config and config.format,
            chat_template_kwargs=thinking and {"enable_thinking": thinking.type != "disabled"},
            # An answer that has begun already goes on.
            continue_final_message=continued,
            add_generation_prompt=not continued,
        )


class MessagesRequest(CountTokensRequest):
    max_tokens: Amount


def _chat_messages(history: list[MessageParam], tools: Mapping[str, Tool]) -> tuple[list[dict[str, Any]], set[str]]:
    """The messages of a chat, in which the results of tools are messages of their own; and the `tools` that they refer
    to, by name. A deferred one is described where that happens first, so that the prompt before it stays as it was."""
    messages: list[dict[str, Any]] = []
    referred: set[str] = set()

    def said(block: TextBlock | ToolReferenceBlock) -> str:
        if isinstance(block, TextBlock):
            return block.text
        tool = tools.get(block.tool_name)
        if tool is None or not deferred(tool) or block.tool_name in referred:
            return block.tool_name
        referred.add(block.tool_name)
        return json.dumps(tool["function"], ensure_ascii=False)

    for number, message in enumerate(history):
        at, role, content = f"messages[{number}]", message.role, message.content or ""
        if isinstance(content, str):
            messages.append({"role": role, "content": content})
            continue
        if role == "assistant":
            messages.append(_answer(content, at))
            continue
        own: list[dict[str, Any]] = []
        for index, block in enumerate(content):
            if isinstance(block, ToolResultBlock) and role == "user":
                given = [block.content] if isinstance(block.content, str) else map(said, block.content or [])
                result = (ERROR if block.is_error else "") + "\n".join(filter(None, given))
                own.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": result})
            elif not isinstance(block, TextBlock | ToolReferenceBlock):
                raise _misplaced(block, role, f"{at}.content[{index}]")
            elif text := said(block):
                if not own or own[-1]["role"] != role:
                    own.append({"role": role, "content": []})
                own[-1]["content"].append({"type": "text", "text": text})
        messages += own or [{"role": role, "content": ""}]
    return messages, referred


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
                function = {"name": block.name, "arguments": block.input or {}}
                answer.setdefault("tool_calls", []).append({"id": block.id, "type": "function", "function": function})
            case _:
                raise _misplaced(block, "assistant", f"{at}.content[{number}]")
    return answer


def _misplaced(block: Any, role: str, at: str) -> ParameterError:
    return ParameterError(at, f"`{at}`: a message of the role {role!r} cannot hold a block of type {block.type!r}.")


def _own(tool: dict[str, Any]) -> bool:
    """Whether the client runs a tool and says what it takes. All others are Anthropic's, and left out."""
    return tool.get("type") in ("custom", None) or not isinstance(tool["type"], str)


def _chat_tool(number: int, tool: dict[str, Any]) -> Tool:
    if "input_schema" not in tool:
        at = f"tools[{number}].input_schema"
        raise ParameterError(at, f"`{at}` is missing.")
    names = {"input_schema": "parameters"}
    # Marks for a cache and the like move from turn to turn: they must not be part of the prompt.
    function = {names.get(key, key): tool[key] for key in tool if key in TOOL_KEYS and tool[key] is not None}
    return {"type": "function", "function": function, **({DEFERRED: True} if tool.get(DEFERRED) else {})}
