"""Values of config.json, checked."""

import math
from functools import partial
from typing import Any

from miniserve.config import ConfigError


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
