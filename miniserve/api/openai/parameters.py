"""What requests for chats and for completions share: how to sample, when to stop, which format the output has."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import from_json

from miniserve.api.fields import EMPTY, TABLES, Amount, Biases, Key, RequestBody, Stops, TokenIds
from miniserve.config import problem
from miniserve.monitor.doctor import Segment
from miniserve.sampling_params import MAX_LOGPROBS, MAX_N, MAX_STOP_TOKEN_IDS, ParameterError, SamplingParams
from miniserve.text.messages import Body, Json, Text

LEAST_TOP_P = 1e-6
"""`top_p` 0 means the most likely token alone."""
MAX_CHOICES = 1000
MAX_GRAMMAR_CHARS = 16384
CONSTRAINTS: Mapping[str, str] = TABLES["constraints"]
GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a model's generation_config.json may set for requests that do not."""


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """With `include_usage`: every chunk holds the usage of its choice so far."""


class SchemaFormat(Body):
    """With `strict`, a schema that no grammar can express exactly is refused; without it `oneOf` means `anyOf`."""

    name: Text | None = None
    description: Text | None = None
    schema_: Annotated[Json | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(SchemaFormat):
    """The schema stands in `json_schema` as in OpenAI's chats, or beside the type as everywhere else."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @model_validator(mode="after")
    def _one_schema(self) -> Self:
        forms = [form for form in (self, self.json_schema) if form is not None and form.schema_ is not None]
        if len(forms) > 1 or (forms and self.type == "text") or (not forms and self.type == "json_schema"):
            raise ValueError(problem("api.schema_format"))
        if self.json_schema is not None and self.type != "json_schema":
            raise ValueError('`json_schema` needs the type "json_schema"')
        return self

    @property
    def form(self) -> SchemaFormat | None:
        """What holds the schema; None where any JSON object will do."""
        return self.json_schema or (self if self.schema_ else None)


Decoded = Annotated[Json, BeforeValidator(lambda it: from_json(it) if isinstance(it, str) else it, Json | Text)]
"""An object, or its JSON text."""


class StructuredOutputs(Body):
    """vLLM's way to say what an output must match: exactly one of these. A `grammar` is GBNF or llguidance's Lark."""

    json_: Annotated[Decoded | None, Field(alias="json")] = None
    regex: Text | None = None
    choice: Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: Annotated[Text, Field(max_length=MAX_GRAMMAR_CHARS)] | None = None
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(form is not None for _, form in self) != 1:
            raise ValueError("Give exactly one of `json`, `regex`, `choice`, `grammar` and `json_object`")
        return self


Urgency = Annotated[int, Field(ge=-1000, le=1000)]


class AgentHints(Body):
    """What Dynamo's clients say of a turn: a higher `priority` goes first, `osl` is how many tokens they expect."""

    priority: Urgency | None = None
    osl: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class NvExt(Body):
    agent_hints: AgentHints | None = None


class SamplingFields(RequestBody):
    """How tokens are sampled and what the output has to match: fields of several servers, in all APIs."""

    refused = TABLES["refused"]["sampling"]

    model: Text | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1), AfterValidator(lambda share: max(share, LEAST_TOP_P))] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Biases | None = None
    stream: bool | None = None

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: Annotated[Key, Field(min_length=1)] | None = None
    """Only requests with the same salt share prefixes."""
    priority: Urgency | None = None
    """Of requests that wait, those with a lower one go first."""
    service_tier: Text | None = None
    nvext: NvExt | None = None

    @classmethod
    def translated(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Raises `ParameterError` for several names of a constraint at once."""
        given = [name for name in CONSTRAINTS if name not in cls.model_fields and data.get(name) not in EMPTY]
        if not given:
            return data
        if len(given) > 1 or data.get("structured_outputs") is not None:
            raise ParameterError(given[0], f"`{given[0]}` is another name of `structured_outputs`: give only one form.")
        rest = {name: value for name, value in data.items() if name != given[0]}
        return {**rest, "structured_outputs": {CONSTRAINTS[given[0]]: data[given[0]]}}


class GenerationRequest(SamplingFields, ABC):
    """The fields that chat and text completions share: OpenAI's first, then vLLM's."""

    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    max_tokens: Amount | None = None
    stop: Stops | None = None
    stream_options: StreamOptions | None = None
    prompt_cache_key: Key | None = None
    """Requests with the same key are turns of one conversation."""
    response_format: ResponseFormat | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    return_token_ids: bool | None = None
    """The answer holds its tokens and those of its prompt; a stream has a chunk for every token, with text or not."""

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ParameterError("stream_options", "`stream_options` can only be given with `stream` true.")
        if self.prompt_logprobs is not None and self.stream:
            raise ParameterError("prompt_logprobs", "`prompt_logprobs` come with whole answers only: no `stream`.")
        if self.structured_outputs is not None and self.response_format and self.response_format.type != "text":
            raise ParameterError("structured_outputs", "Give `response_format` or `structured_outputs`, not both.")
        return self

    @property
    def tool_names(self) -> list[str]:
        return []

    @property
    def segments(self) -> list[Segment]:
        """The texts that the prompt is made of."""
        return []

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

    @abstractmethod
    def output_params(self) -> dict[str, int | None]:
        """`max_tokens` and `logprobs` of the parameters: None without a limit, and for no log-probabilities at all."""

    def sampling(self, defaults: Mapping[str, Any], vocab_size: int) -> SamplingParams:
        """The parameters of one choice; `defaults` is a generation_config.json. Raises `ParameterError`."""
        values = {name: defaults[name] for name in GENERATION_DEFAULTS if defaults.get(name) is not None}
        for name in SamplingParams.__struct_fields__:
            if (value := getattr(self, name, None)) is not None:
                values[name] = value
        return SamplingParams(**values | self.output_params()).validate(vocab_size)
