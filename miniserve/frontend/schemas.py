"""What requests may hold. Fields are OpenAI's, then vLLM's extras; for all others see parameters.py.

Every list is `fail_fast`: one error is told, and an error for each of a million wrong items would cost a gigabyte.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    Tag,
    WithJsonSchema,
    model_validator,
)

from miniserve.frontend.parameters import (
    ASKS_FOR_NOTHING,
    MAX_NAMED,
    REFUSED_BY_CHAT,
    REFUSED_BY_COMPLETIONS,
    ignored_names,
)
from miniserve.frontend.sound import sound_json, valid_unicode
from miniserve.frontend.tools import MAX_TOOLS, TOOL_SCHEMA, Calling, check_call, check_tools, few_tools, for_template
from miniserve.sampling import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_CHARS,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
    ParameterError,
    SamplingParams,
)
from miniserve.template import Message

MAX_PROMPTS = 128
MAX_KEY_CHARS = 256
MAX_CHOICES = 1000
MAX_GRAMMAR_CHARS = 16384
GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a model's generation_config.json may set for requests that do not."""


def kind_of(value: Any) -> str | None:
    """Which branch of a union of text, lists and objects with a type a value means; errors are about that one only."""
    if isinstance(value, str):
        return "<text>"
    if isinstance(value, list):
        return "<list>"
    return f"<{kind}>" if isinstance(value, dict) and isinstance(kind := value.get("type"), str) else None


def _choice_kind(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<object>" if isinstance(value, dict) else None


def one_of(what: str, kinds: Sequence[str]) -> BeforeValidator:
    """Refuses objects of other types by name."""

    def check(value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind not in kinds:
            given = f"of type {kind[:32]!r}" if isinstance(kind, str) else "without a `type`"
            raise ValueError(f"{what} {given} are not supported: use {', '.join(kinds)}")
        return value

    return BeforeValidator(check)


def at_most(most: int) -> BeforeValidator:
    """Refuses an object with more keys before they are looked at: `fail_fast` is for lists only."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"This should have at most {most} items, not {len(value)}")
        return value

    return BeforeValidator(check)


def _prompt_list(value: Any) -> Any:
    """One prompt, as text or token ids, is a list of one."""
    one = isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], int | float))
    return [value] if one else value


def _stop_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Text = Annotated[str, AfterValidator(valid_unicode)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
StopText = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARS)]
StopTexts = Annotated[list[StopText], Field(fail_fast=True, max_length=MAX_STOPS)]
Stops = Annotated[StopTexts, BeforeValidator(_stop_list, json_schema_input_type=StopText | StopTexts)]
Prompt = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[TokenIds, Tag("<list>")],
    Discriminator(kind_of, "prompt", "A prompt must be a string or a list of token ids"),
]
PromptList = Annotated[list[Prompt], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
Prompts = Annotated[PromptList, BeforeValidator(_prompt_list, json_schema_input_type=Text | TokenIds | PromptList)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[dict[TokenId, Bias], Field(max_length=MAX_LOGIT_BIAS), at_most(MAX_LOGIT_BIAS)]
Temperature = Annotated[float, Field(ge=0, le=100)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=-1, lt=2**31)]
Key = Annotated[Text, Field(max_length=MAX_KEY_CHARS)]
Salt = Annotated[Key, Field(min_length=1)]
Effort = Annotated[Text, Field(max_length=32)]
Json = Annotated[dict[str, Any], AfterValidator(sound_json)]
"""An object of the client's own making, for the chat template."""
JsonList = Annotated[list[Json], Field(fail_fast=True)]
FewTools = Annotated[JsonList, BeforeValidator(few_tools)]
Tools = Annotated[
    FewTools,
    WithJsonSchema({"type": "array", "items": TOOL_SCHEMA, "maxItems": MAX_TOOLS}),
]


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<text>")] | Annotated[Json, Tag("<object>")],
    Discriminator(_choice_kind, "tool_choice", "Input should be 'none', 'auto', 'required' or an object"),
]


class Body(BaseModel):
    """An object in a request. `untold` are keys that our own answers have and that mean nothing when they come back."""

    model_config = ConfigDict(allow_inf_nan=False, protected_namespaces=())
    untold: ClassVar[frozenset[str]] = frozenset()


@cache
def _fields(kind: type[Body]) -> Mapping[str, str]:
    """By the keys of requests: the names of fields."""
    return {field.alias or name: name for name, field in kind.model_fields.items()}


def _unknown(given: Any, made: Any, at: str) -> Iterator[str]:
    """Where in `given` there are keys that mean nothing to `made`, which was read from it."""
    if isinstance(made, list) and isinstance(given, list) and made and isinstance(made[0], Body):
        for value, inner in zip(given, made, strict=True):
            yield from _unknown(value, inner, f"{at}[]")
    elif isinstance(made, Body) and isinstance(given, dict):
        fields = _fields(type(made))
        for key, value in given.items():
            if key in fields:
                yield from _unknown(value, getattr(made, fields[key]), f"{at}.{key}")
            elif key not in made.untold and value not in ASKS_FOR_NOTHING:
                yield f"{at}.{key}"


class RequestBody(Body):
    """A body that knows which parameters mean nothing. `refused` are an error: by name, what to do instead."""

    refused: ClassVar[Mapping[str, str]] = {}

    _ignored: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="wrap")
    @classmethod
    def _account_for_all(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        made = handler(data)
        if isinstance(data, dict):
            made._ignored = ignored_names(cls.model_fields.keys(), cls.refused, data)
            inside: set[str] = set()
            for at in (at for name in cls.model_fields for at in _unknown(data.get(name), getattr(made, name), name)):
                inside.add(at)
                if len(inside) > MAX_NAMED:  # no more are told
                    break
            made._ignored += inside
        return made

    @property
    def ignored(self) -> list[str]:
        """Parameters that the client sent in vain."""
        return self._ignored


# --- messages -------------------------------------------------------------------------------------------------------


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
