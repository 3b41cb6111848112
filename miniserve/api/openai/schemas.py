"""Requests for chats, completions and tokens: OpenAI's fields, then vLLM's."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from miniserve.api.fields import TABLES, Amount, Count, Effort, On, Prompts, RequestBody, TokenIds
from miniserve.api.openai.parameters import GenerationRequest, SamplingFields
from miniserve.api.tools import AllowedCalls, ToolChoice, Tools, check_tools
from miniserve.monitor.doctor import Segment
from miniserve.sampling_params import MAX_LOGPROBS, ParameterError
from miniserve.text.messages import ChatMessage, Json, Text

Messages = Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]


class TemplateFields(RequestBody):
    """Of what a chat template renders a prompt, beside the messages."""

    tools: Tools | None = None
    add_generation_prompt: On = True
    continue_final_message: bool | None = None
    chat_template_kwargs: Json | None = None
    """Variables of the chat template: those that it reads, and always `enable_thinking` and the like."""

    @property
    def template_variables(self) -> dict[str, Any]:
        return self.chat_template_kwargs or {}


class ChatRequest(TemplateFields, GenerationRequest):
    refused = {**SamplingFields.refused, **TABLES["refused"]["chat"]}

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    """Whether an answer may call more than one tool; yes, unless it is false."""
    reasoning_effort: Effort | None = None
    """A variable of the chat template; "none" also sets the variables that switch thinking off."""

    @classmethod
    def of(cls, other: RequestBody, **own: Any) -> Self:
        """A chat of `own` fields, and of `other`'s of the same names. Raises `ParameterError`, `ValidationError`."""
        same = cls.model_fields.keys() & type(other).model_fields.keys() - own.keys()
        return cls.model_validate({**other.model_dump(include=same, by_alias=True), **own})

    @property
    def tool_names(self) -> list[str]:
        return [tool["function"]["name"] for tool in self.tools or []]

    @property
    def segments(self) -> list[Segment]:
        segments = []
        for number, message in enumerate(self.messages):
            texts = [message.content] if isinstance(message.content, str) else [p.text for p in message.content or []]
            role = "system" if message.role == "developer" else message.role
            texts = [message.reasoning_content or message.reasoning or "", *texts]
            segments += [Segment(f"messages[{number}]", role, text) for text in texts if text]
        return segments

    @property
    def ends_in_tool_result(self) -> bool:
        return self.messages[-1].role == "tool"

    @model_validator(mode="after")
    def _only_what_is_supported(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ParameterError("top_logprobs", "`top_logprobs` needs `logprobs` true.")
        check_tools(self.tools or [])
        return self

    @property
    def allowed_calls(self) -> AllowedCalls:
        """Raises `ParameterError`."""
        return AllowedCalls(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def template_variables(self) -> dict[str, Any]:
        effort = self.reasoning_effort
        own = {} if effort is None else {"reasoning_effort": effort}
        off = {"enable_thinking": False, "thinking": False} if effort == "none" else {}
        return {**own, **off, **super().template_variables}

    def output_params(self) -> dict[str, int | None]:
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return {"max_tokens": self.max_completion_tokens or self.max_tokens, "logprobs": logprobs}


class CompletionRequest(GenerationRequest):
    refused = {**SamplingFields.refused, **TABLES["refused"]["completion"]}

    prompt: Prompts
    suffix: Text | None = None
    max_tokens: Amount | None = 16
    """16 if it is left out, as with OpenAI and vLLM; null means the rest of the context, 0 no output at all."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    add_special_tokens: On = True

    @model_validator(mode="after")
    def _only_what_is_supported(self) -> Self:
        if self.suffix and (self.echo or not all(isinstance(prompt, str) for prompt in self.prompt)):
            raise ParameterError("suffix", "`suffix` needs a `prompt` of text, not of token ids, and no `echo`.")
        return self

    def output_params(self) -> dict[str, int | None]:
        limit = self.max_tokens if "max_tokens" in self.model_fields_set else None
        return {"max_tokens": limit, "logprobs": self.logprobs}


class TokenizeRequest(TemplateFields):
    """A `prompt` or `messages`."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: On = True

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ParameterError("prompt", "Give either `prompt` or `messages`.")
        check_tools(self.tools or [])
        return self


class DetokenizeRequest(RequestBody):
    model: Text | None = None
    tokens: TokenIds
