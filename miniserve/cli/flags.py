"""Values of command line flags: each parser raises what argparse shows in one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from miniserve.config import ConfigError


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, without a screenful of usage above it."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser of ours as argparse wants it: its message is shown as it is."""

    def check(text: str) -> Any:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return check


def number(text: str, kind: Callable[[str], Any], ok: Callable[[Any], bool], what: str) -> Any:
    """`kind` of the text if that is `ok`; `what` says what it should be."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not ok(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def positive(text: str) -> int:
    """A whole number above 0."""
    return int(number(text, int, lambda n: n > 0, "a whole number above 0"))


def tokens(text: str) -> int:
    """A count of tokens: 8192, 8k (8000) or 8K (8192), as in vLLM."""
    units = {"k": 1000, "K": 1024, "m": 10**6, "M": 2**20}
    unit = units.get(text[-1:], 1)
    digits = text[:-1] if unit > 1 else text
    return int(number(digits, float, lambda n: 1 <= n * unit < 2**31, "a number of tokens, like 8192 or 32k") * unit)


def seconds(text: str) -> float:
    """Seconds, 0 too."""
    return float(number(text, float, lambda n: 0 <= n < 1e9, "a number of seconds"))


def interval(text: str) -> float:
    """How often to look, in seconds."""
    return float(number(text, float, lambda n: 0.1 <= n <= 3600, "a number of seconds from 0.1 to 3600"))


def fraction(text: str) -> float:
    """Above 0, at most 1."""
    return float(number(text, float, lambda n: 0 < n <= 1, "a fraction above 0 and at most 1"))


def share(text: str) -> float:
    """From 0 to 1."""
    return float(number(text, float, lambda n: 0 <= n <= 1, "a share from 0 to 1"))


def port(text: str) -> int:
    """A TCP port; 0 is any."""
    return int(number(text, int, lambda n: 0 <= n < 65536, "a port from 0 to 65535"))


def rate(text: str) -> float:
    """Something a second, above 0."""
    return float(number(text, float, lambda n: 0 < n < 1e6, "a rate above 0"))


def scale(text: str) -> float:
    """A factor above 0."""
    return float(number(text, float, lambda n: 0 < n <= 1000, "a factor above 0"))


def stretch(text: str) -> float:
    """A factor of at least 1, or 0 for none."""
    return float(number(text, float, lambda n: n == 0 or 1 <= n <= 1000, "0, or a factor from 1"))


def whole(text: str) -> int:
    """A whole number, 0 too."""
    return int(number(text, int, lambda n: 0 <= n < 2**63, "a whole number"))


def span(text: str) -> tuple[float, float]:
    """A time span in seconds, like 20..60."""
    low, dots, high = text.partition("..")
    start, end = seconds(low), seconds(high) if dots else 0.0
    if not start < end:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time span, like 20..60")
    return start, end
