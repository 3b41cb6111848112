"""What a field of a request may hold, whatever the API, and how the fields that nobody knows are told of.

Every list is `fail_fast`: one error is told, and an error for each of a million wrong items would cost a gigabyte.
"""

from __future__ import annotations

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

from miniserve.api.parameters import (
    ASKS_FOR_NOTHING,
    MAX_NAMED,
    ignored_names,
)
from miniserve.api.sound import sound_json, valid_unicode
from miniserve.api.tools import MAX_TOOLS, TOOL_SCHEMA, few_tools
from miniserve.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_STOP_CHARS,
    MAX_STOPS,
)

MAX_PROMPTS = 128
MAX_KEY_CHARS = 256


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
