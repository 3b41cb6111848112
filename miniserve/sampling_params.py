"""Sampling parameters: one typed struct used by the HTTP API, the library and the wire."""

import re
from typing import Annotated, Literal, Self, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

MAX_LOGPROBS = 20
MAX_N = 64
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
Count = Annotated[int, Meta(ge=0, lt=2**31)]
Logprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
StopText = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]


class ParameterError(ValueError):
    """A request parameter that cannot be honoured; `param` names it, the message says how to fix it."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param
        self.message = message


def mistyped(struct: msgspec.Struct) -> tuple[str, str] | None:
    """A field that holds what its type or bounds do not allow, and a sentence about it; None where there is none."""
    try:
        msgspec.convert(msgspec.structs.asdict(struct), type(struct))
    except msgspec.ValidationError as error:
        expected, _, at = str(error).partition(" - at ")
        (name,) = re.findall(r"\$\.(\w+)", at)
        kind, value = get_type_hints(type(struct))[name], getattr(struct, name)
        rule = expected.removeprefix("Expected ").partition(", got ")[0].replace("`", "")
        rule = f"one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal else rule
        return name, f"`{name}` must be {'' if at == f'`$.{name}`' else 'made of '}{rule}, got {value!r}."
    return None


class Grammar(msgspec.Struct, frozen=True):
    """What an output must match, as llguidance has it: a JSON schema, a regular expression, or its variant of Lark."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next tokens are chosen and when a turn ends. Names and defaults follow vLLM's `SamplingParams`.

    temperature 0 is greedy. `top_k` 0 or -1, `top_p` 1 and `min_p` 0 switch the filters off. `logprobs` is the number
    of alternatives reported beside the sampled token (0: the sampled token only, None: off), `prompt_logprobs` the same
    for the tokens of the prompt. `max_tokens` None means as many as the context allows; 0 computes the prompt only.
    `seed` makes a request reproducible whatever else is in its batch. One `stop` string becomes a list of one.
    """

    n: Annotated[int, Meta(ge=1, le=MAX_N)] = 1
    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Annotated[dict[int, Bias], Meta(max_length=MAX_LOGIT_BIAS)] = {}
    max_tokens: Count | None = 16
    min_tokens: Count = 0
    stop: str | Annotated[list[StopText], Meta(max_length=MAX_STOPS)] = []
    stop_token_ids: Annotated[list[int], Meta(max_length=MAX_STOP_TOKEN_IDS)] = []
    ignore_eos: bool = False
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    grammar: Grammar | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", [self.stop])

    @property
    def greedy(self) -> bool:
        """True where the arg max is taken: with one candidate, or a temperature that would overflow the logits."""
        return self.temperature < 1e-5 or self.top_k == 1

    @property
    def filtered(self) -> bool:
        """Whether only some tokens may be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def penalized(self) -> bool:
        """Whether tokens that came before are less likely, or likelier."""
        return self.repetition_penalty != 1.0 or bool(self.presence_penalty or self.frequency_penalty)

    def nth(self, i: int) -> Self:
        """The parameters of a prompt's choice number `i`: its own seed, and no second look at the prompt."""
        if i == 0:
            return self
        seed = None if self.seed is None else (self.seed + i + 2**63) % 2**64 - 2**63
        return msgspec.structs.replace(self, seed=seed, prompt_logprobs=None)

    def validate(self, vocab_size: int | None = None) -> Self:
        """Return self, or raise `ParameterError` for the first value of a wrong type or out of bounds. `vocab_size`
        (tokens) also checks the token ids in `logit_bias` and `stop_token_ids`."""
        if problem := mistyped(self):
            raise ParameterError(*problem)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            most = f"at most `max_tokens` ({self.max_tokens})"
            raise ParameterError("min_tokens", f"`min_tokens` must be {most}, got {self.min_tokens}.")
        if vocab_size is not None:
            for name in ("logit_bias", "stop_token_ids"):
                given = getattr(self, name)
                if not all(0 <= token < vocab_size for token in given):
                    ids = f"made of token ids from 0 to {vocab_size - 1}"
                    raise ParameterError(name, f"`{name}` must be {ids}, got {given!r}.")
        return self
