"""The types of a request's fields, whatever the API, and the account of those that mean nothing here: refused if they
would change the answer, else ignored and named, as docs/api.md has them.

Every list is `fail_fast`: an error for each of a million wrong items would cost a gigabyte.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from miniserve.config import tables
from miniserve.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_CHARS, MAX_STOPS, ParameterError
from miniserve.text.messages import Body, Text, TextOr, text_or

TABLES = tables("api/parameters.toml")
MAX_PROMPTS = 128
MAX_KEY_CHARS = 256
IGNORED_HEADER = "X-Ignored-Parameters"
MAX_IGNORED_NAMES = 16
IGNORED_NAME = re.compile(r"[A-Za-z0-9_.\[\]-]{1,64}")
EMPTY: tuple[Any, ...] = (None, False, 0, "", [], {})
"""Values of a parameter that are as good as leaving it out."""


def at_most(most: int) -> BeforeValidator:
    """Refuses an object with more keys, or a list of more items, before pydantic looks at them one by one."""

    def check(value: Any) -> Any:
        if isinstance(value, dict | list) and len(value) > most:
            raise ValueError(f"This should have at most {most} items, not {len(value)}")
        return value

    return BeforeValidator(check)


def _prompt_list(value: Any) -> Any:
    """One prompt, as text or token ids, is a list of one."""
    one = isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], int | float))
    return [value] if one else value


Count = Annotated[int, Field(ge=1, lt=2**31)]
Amount = Annotated[int, Field(ge=0, lt=2**31)]
"""Where 0 means none at all."""
On = Annotated[bool, BeforeValidator(lambda value: True if value is None else value)]
TokenIds = Annotated[list[Amount], Field(fail_fast=True)]
StopText = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARS)]
StopTexts = Annotated[list[StopText], Field(fail_fast=True, max_length=MAX_STOPS)]
Stops = Annotated[
    StopTexts,
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given, StopText | StopTexts),
]
Prompt = Annotated[TextOr[TokenIds], text_or("A prompt must be a string or a list of token ids")]
PromptList = Annotated[list[Prompt], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
Prompts = Annotated[PromptList, BeforeValidator(_prompt_list, json_schema_input_type=Text | TokenIds | PromptList)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[dict[Amount, Bias], Field(max_length=MAX_LOGIT_BIAS), at_most(MAX_LOGIT_BIAS)]
Key = Annotated[Text, Field(max_length=MAX_KEY_CHARS)]
Effort = Annotated[Text, Field(max_length=32)]


class RequestBody(Body):
    """A body that knows which of its parameters mean nothing. `refused` are an error: by name, what to do instead."""

    refused: ClassVar[Mapping[str, str]] = {}

    _ignored: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="wrap")
    @classmethod
    def _account_for_all(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(data, dict):
            data = cls.translated(data)
        made = handler(data)
        if isinstance(data, dict):
            for name in data.keys() - cls.model_fields.keys():
                if data[name] in EMPTY or data[name] in TABLES["harmless"].get(name, ()):
                    continue
                if name in cls.refused:
                    raise ParameterError(name, f"`{name}` is not supported: {cls.refused[name]}.")
                made._ignored.append(str(name))
            inside: set[str] = set()
            for at in (at for name in cls.model_fields for at in _unknown(data.get(name), getattr(made, name), name)):
                inside.add(at)
                if len(inside) > MAX_IGNORED_NAMES:  # the header names no more
                    break
            made._ignored += inside
        return made

    @classmethod
    def translated(cls, data: dict[str, Any]) -> dict[str, Any]:
        """`data` under the names of this API's fields, where clients have other ones for them."""
        return data

    @property
    def ignored(self) -> list[str]:
        return self._ignored


@cache
def _field_names(kind: type[Body]) -> Mapping[str, str]:
    """By the keys of requests: the names of fields."""
    return {field.alias or name: name for name, field in kind.model_fields.items()}


def _unknown(given: Any, made: Any, at: str) -> Iterator[str]:
    """Where in `given` there are keys that mean nothing to `made`, which was read from it."""
    if isinstance(made, list) and isinstance(given, list) and made and isinstance(made[0], Body):
        for value, inner in zip(given, made, strict=True):
            yield from _unknown(value, inner, f"{at}[]")
    elif isinstance(made, Body) and isinstance(given, dict):
        names, kind = _field_names(type(made)), given.get("type")
        if isinstance(kind, str) and getattr(made, "type", kind) != kind:  # something else was put in its place
            yield f"{at}.{kind}"
            return
        for key, value in given.items():
            if key in names:
                yield from _unknown(value, getattr(made, names[key]), f"{at}.{key}")
            elif value not in EMPTY:
                yield f"{at}.{key}"


def ignored_header(names: Iterable[str]) -> dict[str, str]:
    """The header that names what was ignored, if anything. Clients may send names that no header can hold."""
    shown = sorted({name if IGNORED_NAME.fullmatch(name) else "..." for name in names})
    more = ["..."] if len(shown) > MAX_IGNORED_NAMES else []
    return {IGNORED_HEADER: ", ".join(shown[:MAX_IGNORED_NAMES] + more)} if shown else {}
