"""The families of models served, and what tells them apart (`families.toml`); values of config.json, checked."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from miniserve.config import ConfigError, tables


@dataclass(frozen=True)
class Family:
    """A table of `families.toml`, which says what each key means."""

    types: list[str]
    also: list[str] = field(default_factory=list)
    defaults: dict[str, Any] = field(default_factory=dict)
    bias: str = ""
    qk_norm: bool = False
    zero_norms: bool = False
    after_norms: bool = False
    windows: str = ""
    gated: bool = False
    scaled: bool = False
    experts: list[str] = field(default_factory=list)


FAMILIES = {name: Family(**table) for name, table in tables("families.toml").items()}
"""By the architecture that config.json names."""


def text_model(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the text model alone, if `config` has one beside a tower for images, its nulls filled."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    outer = {key: value for key, value in config.items() if not key.endswith("_config") or key.startswith("quant")}
    text = {key: value for key, value in text.items() if key != "architectures"}
    return text | outer | {key: value for key, value in text.items() if value is not None}


def number(config: dict[str, Any], name: str, default: float | None = None, kind: type = float) -> Any:
    """A number above zero, of the type `kind`. Raises `ConfigError`."""
    value = default if config.get(name) is None else config[name]
    if value is None:
        raise ConfigError(f"The model's config.json has no {name!r}.")
    if type(value) not in (int, kind) or not 0 < value < math.inf:
        number = "a whole number" if kind is int else "a number"
        raise ConfigError(f"The model's config.json has {name!r}: {value!r:.60}, which must be {number} above zero.")
    return value


whole = partial(number, kind=int)


def flag(config: dict[str, Any], name: str) -> bool:
    value = config.get(name)
    if not isinstance(value, bool | None):
        raise ConfigError(f"The model's config.json has {name!r}: {value!r:.60}, which must be true or false.")
    return bool(value)
