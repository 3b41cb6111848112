"""Sampling parameters: one typed struct used by the HTTP API, the library and the wire."""

from __future__ import annotations

import math
import re
from inspect import formatannotation
from typing import Literal, get_args, get_origin, get_type_hints

import msgspec

MAX_LOGPROBS = 20
MAX_N = 64
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024


class ParameterError(ValueError):
    """A request parameter that cannot be honoured; `param` names it, the message says how to fix it."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param
        self.message = message


def mistyped(struct: msgspec.Struct) -> tuple[str, str] | None:
    """A field that holds what its type does not allow, and a sentence about it; None where there is none."""
    try:
        msgspec.convert(msgspec.structs.asdict(struct), type(struct))
    except msgspec.ValidationError as error:
        (name,) = re.findall(r"`\$\.(\w+)", str(error))
        kind, value = get_type_hints(type(struct))[name], getattr(struct, name)
        if get_origin(kind) is Literal and isinstance(value, str):
            return name, f"`{name}` must be one of {', '.join(get_args(kind))}, got {value!r}."
        kind = str if get_origin(kind) is Literal else kind
        return name, f"`{name}` must be of type {formatannotation(kind)}, got {value!r}."
    return None


class Grammar(msgspec.Struct, frozen=True):
    """What an output must match, in one of llguidance's forms: a JSON schema as JSON, a regular expression, or a
    grammar in its variant of Lark."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next tokens are chosen and when a turn ends. Names and defaults follow vLLM's `SamplingParams`.

    temperature 0 is greedy. `top_k` 0 or -1, `top_p` 1 and `min_p` 0 switch the filters off. `logprobs` is the number
    of alternatives reported beside the sampled token (0: the sampled token only, None: off), `prompt_logprobs` the same
    for the tokens of the prompt. `max_tokens` None means as many as the context allows; 0 computes the prompt only.
    `seed` makes a request reproducible whatever else is in its batch. One `stop` string becomes a list of one.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", [self.stop])

    @property
    def greedy(self) -> bool:
        """True where the arg max is taken. Temperatures under 1e-5 would overflow the logits, so they are greedy."""
        return self.temperature < 1e-5

    @property
    def looks_back(self) -> bool:
        """Whether the choice of a token depends on which ones came before it, beyond what the model makes of them."""
        penalised = self.repetition_penalty != 1.0 or bool(self.presence_penalty or self.frequency_penalty)
        return penalised or self.grammar is not None

    def nth(self, i: int) -> SamplingParams:
        """The parameters of a prompt's choice number `i`: its own seed, and no second look at the prompt."""
        if i == 0:
            return self
        seed = None if self.seed is None else (self.seed + i + 2**63) % 2**64 - 2**63
        return msgspec.structs.replace(self, seed=seed, prompt_logprobs=None)

    def validate(self, vocab_size: int | None = None) -> SamplingParams:
        """Return self, or raise `ParameterError` for the first value of a wrong type or out of bounds.

        `vocab_size` (tokens) also checks the token ids in `logit_bias` and `stop_token_ids`.
        """

        def check(ok: bool, param: str, rule: str) -> None:
            if not ok:
                raise ParameterError(param, f"`{param}` must be {rule}, got {getattr(self, param)!r}.")

        if problem := mistyped(self):
            raise ParameterError(*problem)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            check(math.isfinite(getattr(self, name)), name, "a finite number")
        check(1 <= self.n <= MAX_N, "n", f"between 1 and {MAX_N}")
        check(0 <= self.temperature <= 100, "temperature", "between 0 and 100")
        check(-1 <= self.top_k < 2**31, "top_k", "-1 or 0 (off) or a positive number of tokens")
        check(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        check(0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")
        check(0 < self.repetition_penalty <= 100, "repetition_penalty", "above 0 and at most 100")
        check(-2 <= self.presence_penalty <= 2, "presence_penalty", "between -2 and 2")
        check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "between -2 and 2")
        check(self.max_tokens is None or 0 <= self.max_tokens < 2**31, "max_tokens", "at least 0")
        check(0 <= self.min_tokens < 2**31, "min_tokens", "at least 0")
        most = math.inf if self.max_tokens is None else self.max_tokens
        check(self.min_tokens <= most, "min_tokens", f"at most `max_tokens` ({most})")
        for name in ("logprobs", "prompt_logprobs"):
            check((getattr(self, name) or 0) in range(MAX_LOGPROBS + 1), name, f"between 0 and {MAX_LOGPROBS}")
        check(len(self.stop) <= MAX_STOPS, "stop", f"a list of at most {MAX_STOPS} strings")
        texts = f"made of non-empty strings of at most {MAX_STOP_CHARS} characters"
        check(all(0 < len(s) <= MAX_STOP_CHARS for s in self.stop), "stop", texts)
        ids = self.stop_token_ids
        check(len(ids) <= MAX_STOP_TOKEN_IDS, "stop_token_ids", f"a list of at most {MAX_STOP_TOKEN_IDS} token ids")
        check(len(self.logit_bias) <= MAX_LOGIT_BIAS, "logit_bias", f"a map of at most {MAX_LOGIT_BIAS} tokens")
        biases = "a map of token ids to numbers between -100 and 100"
        check(all(-100 <= v <= 100 for v in self.logit_bias.values()), "logit_bias", biases)
        if vocab_size is not None:
            for name in ("logit_bias", "stop_token_ids"):
                known = all(0 <= token < vocab_size for token in getattr(self, name))
                check(known, name, f"made of token ids from 0 to {vocab_size - 1}")
        return self
