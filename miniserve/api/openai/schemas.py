"""What requests for chats and completions may hold: OpenAI's fields, then vLLM's; for all others see parameters.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    model_validator,
)

from miniserve.api.fields import (
    Biases,
    Body,
    Count,
    Effort,
    Json,
    JsonList,
    Key,
    Prompts,
    RequestBody,
    Salt,
    Stops,
    Temperature,
    Text,
    TokenIds,
    ToolChoice,
    Tools,
    TopK,
    TopP,
    kind_of,
)
from miniserve.api.parameters import (
    REFUSED_BY_CHAT,
    REFUSED_BY_COMPLETIONS,
)
from miniserve.api.tools import Calling, check_call, check_tools, for_template
from miniserve.sampling_params import (
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_TOKEN_IDS,
    ParameterError,
    SamplingParams,
)
from miniserve.text.template import Message

MAX_CHOICES = 1000
MAX_GRAMMAR_CHARS = 16384
GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a model's generation_config.json may set for requests that do not."""


class ContentPart(Body):
    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, part: Any) -> Any:
        if isinstance(part, dict) and isinstance(kind := part.get("type"), str) and kind != "text":
            raise ValueError(
                f"Content parts of type {kind[:32]!r} are not supported: this model takes text only, in "
                'parts like {"type": "text", "text": "..."}'
            )
        return part


Content = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[list[ContentPart], Field(fail_fast=True), Tag("<list>")],
    Discriminator(kind_of, "content", "Content must be a string or a list of text parts"),
]


def joined(content: str | list[Any]) -> str:
    """A content's text, or the texts of its parts with line breaks between."""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _no_function_call(value: Any) -> None:
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
    """Another name of the same."""
    function_call: Annotated[None, BeforeValidator(_no_function_call)] = None

    @model_validator(mode="after")
    def _is_whole(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"A message of the role {self.role!r} needs `content`")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("A message of the role 'tool' needs `tool_call_id`, the id of the call that it answers")
        for call in self.tool_calls or []:
            check_call(call)
        return self

    def for_template(self) -> Message:
        """As chat templates know messages: content is one string, arguments of calls are objects, `developer` is called
        `system`."""
        rest = self.model_dump(exclude_none=True, exclude={"role", "content", "reasoning", "tool_calls"})
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": joined(self.content or ""), **rest}
        if self.tool_calls:
            message["tool_calls"] = [for_template(call) for call in self.tool_calls]
        if self.reasoning is not None:
            message.setdefault("reasoning_content", self.reasoning)
        return message


Messages = Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]


# --- generation -----------------------------------------------------------------------------------------------------


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """With `include_usage`: every chunk tells the usage of its choice so far."""


class JsonSchemaFormat(Body):
    """`strict` true refuses schemas that cannot be held to exactly; else `oneOf` is taken for `anyOf`."""

    name: Text | None = None
    description: Text | None = None
    schema_: Annotated[Json, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _one_schema(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError(
                'The type "json_schema" needs `json_schema`, with a name and a schema, and no other type does'
            )
        return self


class StructuredOutputs(Body):
    """vLLM's way to say what an output must match: exactly one of these. A `grammar` is Lark as llguidance writes it,
    or GBNF."""

    json_: Annotated[Json | Text | None, Field(alias="json")] = None
    regex: Text | None = None
    choice: Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: Annotated[Text, Field(max_length=MAX_GRAMMAR_CHARS)] | None = None
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        if (
            sum(value is not None for value in (self.json_, self.regex, self.choice, self.grammar, self.json_object))
            != 1
        ):
            raise ValueError("Give exactly one of `json`, `regex`, `choice`, `grammar` and `json_object`")
        return self


class GenerationRequest(RequestBody, ABC):
    """What chat and text completions share."""

    model: Text | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Biases | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_cache_key: Key | None = None
    """Requests with the same key are turns of one conversation."""

    top_k: TopK | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: Salt | None = None
    """Prefixes are only shared among requests with the same salt."""
    return_token_ids: bool | None = None
    """The answer tells its tokens and those of its prompt; a stream has a chunk for every token, with text or not."""

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ParameterError("stream_options", "`stream_options` can only be given with `stream` true.")
        return self

    @model_validator(mode="after")
    def _one_format(self) -> GenerationRequest:
        if self.structured_outputs is not None and self.response_format and self.response_format.type != "text":
            raise ParameterError("structured_outputs", "Give `response_format` or `structured_outputs`, not both.")
        return self

    @property
    def ends_in_tool_result(self) -> bool:
        """Whether the turn before has called a tool, and this one brings what it said."""
        return False

    @property
    def format_field(self) -> Literal["structured_outputs", "response_format"] | None:
        """What says of the request which format its output has; None where it may be any text."""
        if self.structured_outputs is not None:
            return "structured_outputs"
        return "response_format" if self.response_format and self.response_format.type != "text" else None

    @property
    def grammar_field(self) -> str:
        """What is at fault where no output can be held to what the request asks for, though the format is fine."""
        return self.format_field or ""

    @property
    @abstractmethod
    def output_limit(self) -> int | None:
        """Most tokens to generate for each choice; None where the request does not say."""

    @property
    def default_limit(self) -> int | None:
        """What holds where it does not say; None for as many as the context allows."""
        return None

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """How many alternatives to report beside each sampled token; None for no log-probabilities at all."""

    def sampling(self, defaults: Mapping[str, Any], vocab_size: int) -> SamplingParams:
        """The parameters of one choice; `defaults` is a generation_config.json. Raises `ParameterError`."""
        values = {name: defaults[name] for name in GENERATION_DEFAULTS if defaults.get(name) is not None}
        for name in SamplingParams.__struct_fields__:
            if (value := getattr(self, name, None)) is not None:
                values[name] = value
        values["max_tokens"] = self.output_limit
        values["logprobs"] = self.alternatives
        return SamplingParams(**values).validate(vocab_size)


class ChatRequest(GenerationRequest):
    refused = REFUSED_BY_CHAT

    messages: Messages
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    """Whether an answer may call more than one tool; yes, unless it is false."""
    reasoning_effort: Effort | None = None
    """A variable of the chat template; "none" is told to templates as thinking that is switched off, too."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Json | None = None
    """Variables of the model's chat template: those that it reads, `enable_thinking` and the like always."""

    _calling: Calling = PrivateAttr()

    @property
    def ends_in_tool_result(self) -> bool:
        """Whether the turn before has called a tool, and this one brings what it said."""
        return self.messages[-1].role == "tool"

    @model_validator(mode="after")
    def _only_what_is_supported(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ParameterError("top_logprobs", "`top_logprobs` needs `logprobs` true.")
        check_tools(self.tools or [])
        self._calling = Calling(self.tools, self.tool_choice, self.parallel_tool_calls)
        return self

    @property
    def calling(self) -> Calling:
        """Which tools may be called, and which have to be."""
        return self._calling

    @property
    def grammar_field(self) -> str:
        """The tools, if any may be called."""
        return "tools" if self.calling.callable else super().grammar_field

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the chat template gets beside the conversation."""
        own: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            own["reasoning_effort"] = self.reasoning_effort
        if self.reasoning_effort == "none":
            own |= {"enable_thinking": False, "thinking": False}
        return own | (self.chat_template_kwargs or {})

    @property
    def output_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    refused = REFUSED_BY_COMPLETIONS

    prompt: Prompts
    max_tokens: Count | None = 16
    """As with OpenAI and vLLM 16 where it is left out; null means the rest of the context."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _only_what_is_supported(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise ParameterError(
                "echo", "`echo` with `logprobs` is not supported: log-probabilities are of generated tokens only."
            )
        return self

    @property
    def output_limit(self) -> int | None:
        return self.max_tokens if "max_tokens" in self.model_fields_set else None

    @property
    def default_limit(self) -> int | None:
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


# --- tokenizing -----------------------------------------------------------------------------------------------------


class TokenizeRequest(RequestBody):
    """A `prompt` or `messages`."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Json | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ParameterError("prompt", "Give either `prompt` or `messages`.")
        check_tools(self.tools or [])
        return self

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the chat template gets beside the conversation."""
        return self.chat_template_kwargs or {}


class DetokenizeRequest(RequestBody):
    model: Text | None = None
    tokens: TokenIds
