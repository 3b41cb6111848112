"""The answers of /v1/messages, as types: mypy checks the code that builds them, and OpenAPI documents them."""

from typing import Literal

from typing_extensions import TypedDict

from miniserve.api.messages.blocks import TextBlock, ThinkingBlock, ToolUseBlock

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class ThinkingTokens(TypedDict):
    thinking_tokens: int


class MessageUsage(TypedDict):
    """`input_tokens` are those that were computed; the prompt also has those that were found in the cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens


class MessageOut(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(TypedDict):
    input_tokens: int


class ModelCard(TypedDict):
    type: Literal["model"]
    id: str
    display_name: str
    created_at: str


class ModelCards(TypedDict):
    data: list[ModelCard]
    has_more: bool
    first_id: str
    last_id: str
