"""What requests for /v1/responses may hold, and the chat request that each of them is another spelling of."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from miniserve.api.fields import TABLES, Count, Effort, Key, On, Stops, at_most
from miniserve.api.openai.parameters import ResponseFormat, SamplingFields
from miniserve.api.openai.schemas import ChatRequest
from miniserve.api.responses.items import Item, Items, MessageItem, ToolsItem, messages_of
from miniserve.api.responses.tools import Offered, offered_tools
from miniserve.api.tools import FewTools, ToolChoice, deferred
from miniserve.sampling_params import MAX_LOGPROBS, ParameterError
from miniserve.text.messages import Body, Text, TextOr, text_or

MAX_METADATA = 16
LOGPROBS = "message.output_text.logprobs"
Metadata = Annotated[
    dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]],
    Field(max_length=MAX_METADATA),
    at_most(MAX_METADATA),
]
ConversationId = Annotated[Key, BeforeValidator(lambda given: given.get("id") if isinstance(given, dict) else given)]


class TextSettings(Body):
    format: ResponseFormat | None = None


class ReasoningSettings(Body):
    effort: Effort | None = None


class ResponsesRequest(SamplingFields):
    refused = {**SamplingFields.refused, **TABLES["refused"]["responses"]}

    input: Annotated[TextOr[Items], text_or("Input must be a string or a list of items")] | None = None
    instructions: Text | None = None
    previous_response_id: Key | None = None
    conversation: ConversationId | None = None
    tools: FewTools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: On = True
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    truncation: Literal["auto", "disabled"] | None = None
    """With `auto` the oldest items are left out of a prompt that would be too long."""
    stop: Stops | None = None
    max_output_tokens: Count | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """How many alternatives stand beside each token where `include` asks for log-probabilities."""
    store: On = True
    """Whether `previous_response_id` can name this response."""
    metadata: Metadata | None = None
    include: Annotated[list[Text], Field(max_length=16)] | None = None
    prompt_cache_key: Key | None = None

    _offered: dict[str, Offered]

    @model_validator(mode="after")
    def _tools_and_past(self) -> Self:
        if self.conversation and self.previous_response_id:
            raise ParameterError("conversation", "Give `conversation` or `previous_response_id`, not both.")
        self._offered, left_out = offered_tools(self.tools or [])
        brought = [name for item in self.items if isinstance(item, ToolsItem) for name in offered_tools(item.tools)[1]]
        own = {"include": set(self.include or []) - {LOGPROBS}, "top_logprobs": self.top_logprobs and not self._scored}
        self._ignored += [*left_out, *(f"input[].{name}" for name in brought), *(name for name in own if own[name])]
        return self

    @property
    def _scored(self) -> bool:
        return LOGPROBS in (self.include or [])

    @property
    def items(self) -> list[Item]:
        return [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input or []

    def chat(self, items: Sequence[Item]) -> tuple[ChatRequest, Mapping[str, Offered]]:
        """As a chat about `items`, the whole conversation, and the tools that calls may be of, by their names there.
        Raises `ParameterError`, `ValidationError`."""
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        messages, found = messages_of(items)
        offered = {name: one for name, one in self._offered.items() if not deferred(one.tool)} | found
        chat = ChatRequest.of(
            self,
            # A probe without input is answered, too.
            messages=[*system, *messages] or [{"role": "user", "content": ""}],
            tools=[one.tool for one in offered.values()] or None,
            response_format=self.text and self.text.format,
            reasoning_effort=self.reasoning and self.reasoning.effort,
            max_completion_tokens=self.max_output_tokens,
            logprobs=self._scored,
            top_logprobs=self.top_logprobs if self._scored else None,
        )
        return chat, offered
