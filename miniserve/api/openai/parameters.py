"""What requests for chats and for completions share: how to sample, when to stop, which format the output has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from miniserve.api.fields import Biases, Key, RequestBody, Salt, Stops, Temperature, TokenIds, TopK, TopP
from miniserve.sampling_params import MAX_LOGPROBS, MAX_N, MAX_STOP_TOKEN_IDS, ParameterError, SamplingParams
from miniserve.text.messages import Body, Json, Text

MAX_CHOICES = 1000
MAX_GRAMMAR_CHARS = 16384
GUIDED_FORMS = ("json", "regex", "choice", "grammar")
"""Forms of structured output that had parameters of their own in older versions of vLLM."""
GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a model's generation_config.json may set for requests that do not."""


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """With `include_usage`: every chunk holds the usage of its choice so far."""


class JsonSchemaFormat(Body):
    """With `strict`, a schema that no grammar can express exactly is refused; without it `oneOf` means `anyOf`."""

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
    """vLLM's way to say what an output must match: exactly one of these. A `grammar` is GBNF, or Lark as llguidance
    writes it."""

    json_: Annotated[Json | Text | None, Field(alias="json")] = None
    regex: Text | None = None
    choice: Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: Annotated[Text, Field(max_length=MAX_GRAMMAR_CHARS)] | None = None
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        forms = (self.json_, self.regex, self.choice, self.grammar, self.json_object)
        if sum(form is not None for form in forms) != 1:
            raise ValueError("Give exactly one of `json`, `regex`, `choice`, `grammar` and `json_object`")
        return self


class GenerationRequest(RequestBody, ABC):
    """The fields that chat and text completions share: OpenAI's first, then vLLM's."""

    refused = {
        "use_beam_search": "tokens are sampled, or taken greedily with `temperature` 0",
        "truncate_prompt_tokens": "cut the input yourself",
        "bad_words": "use `logit_bias`",
        **dict.fromkeys(
            ["allowed_token_ids", "logits_processors", *(f"guided_{form}" for form in GUIDED_FORMS)],
            "use `structured_outputs` or `response_format`",
        ),
    }

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
    """Only requests with the same salt share prefixes."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    return_token_ids: bool | None = None
    """The answer holds its tokens and those of its prompt; a stream has a chunk for every token, with text or not."""

    @model_validator(mode="after")
    def _fields_agree(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ParameterError("stream_options", "`stream_options` can only be given with `stream` true.")
        if self.prompt_logprobs is not None and self.stream:
            raise ParameterError("prompt_logprobs", "`prompt_logprobs` come with whole answers only: no `stream`.")
        if self.structured_outputs is not None and self.response_format and self.response_format.type != "text":
            raise ParameterError("structured_outputs", "Give `response_format` or `structured_outputs`, not both.")
        return self

    @property
    def ends_in_tool_result(self) -> bool:
        """Whether the turn before has called a tool, and this turn brings its result."""
        return False

    @property
    def format_field(self) -> Literal["structured_outputs", "response_format"] | None:
        """The field that sets the format of the output; None if the output may be any text."""
        if self.structured_outputs is not None:
            return "structured_outputs"
        return "response_format" if self.response_format and self.response_format.type != "text" else None

    @property
    def grammar_field(self) -> str:
        """The field at fault if the grammar of the whole answer does not compile, though that of the format does."""
        return self.format_field or ""

    @property
    @abstractmethod
    def output_limit(self) -> int | None:
        """Most tokens to generate for each choice; None if the request sets no limit."""

    @property
    def default_limit(self) -> int | None:
        """The limit of a request that sets none; None for as many tokens as the context allows."""
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
