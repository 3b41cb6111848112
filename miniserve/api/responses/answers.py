"""The answers of /v1/responses, as types, for mypy and OpenAPI. What they put out, a later request may take in."""

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from miniserve.api.openai.answers import CompletionTokensDetails, PromptTokensDetails
from miniserve.api.responses.items import Item

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class InputTokensDetails(PromptTokensDetails):
    """`cache_write_tokens` is always 0: other servers charge for them."""

    cache_write_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: CompletionTokensDetails
    total_tokens: int


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class ResponseFailure(TypedDict):
    code: str
    message: str


class ResponseOut(TypedDict):
    """A response repeats the parameters of its request, with the values that were used."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Status
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[Item]
    usage: ResponseUsage | None
    background: Literal[False]
    conversation: NotRequired[dict[str, str]]
    frequency_penalty: float
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    presence_penalty: float
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, str | None]
    safety_identifier: None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    user: None


class InputTokens(TypedDict):
    object: Literal["response.input_tokens"]
    input_tokens: int


class ItemList(TypedDict):
    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ConversationOut(TypedDict):
    id: str
    object: Literal["conversation"]
    created_at: int
    metadata: dict[str, str]


class Deleted(TypedDict):
    id: str
    object: Literal["response", "conversation.deleted"]
    deleted: Literal[True]
