"""Flags: those made from settings, those of several commands, and their values as argparse wants them."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin

import msgspec

from miniserve.config import (
    ConfigError,
    Topology,
    number,
    parse_positive,
    parse_seconds,
    parse_share,
    parse_swap,
    problem,
    tables,
)

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, without a screenful of usage above it; takes `--max_model_len`, as vLLM does.
    What stands behind `--` is for another program: the `args` of a command that has such."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.register("action", "switch", argparse.BooleanOptionalAction)
        for name, parse in VALUES.items():
            self.register("type", name, parse)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        end = given.index("--") if "--" in given else len(given)
        dashed = [re.sub("^--[^=]+", lambda name: name[0].replace("_", "-"), text) for text in given[:end]]
        space, unknown = super().parse_known_args(dashed, namespace)
        if hasattr(space, "args"):
            space.args, end = given[end + 1 :], len(given)
        return space, [*unknown, *given[end:]]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


VALUES: dict[str, Callable[[str], Any]] = {
    "positive": parse_positive,
    "whole": number(int, lambda n: 0 <= n < 2**63, "a whole number"),
    "number": number(float, math.isfinite, "a number"),
    "share": parse_share,
    "seconds": parse_seconds,
    "interval": number(float, lambda n: 0.1 <= n <= 3600, "a number of seconds from 0.1 to 3600"),
    "rate": number(float, lambda n: 0 < n < 1e6, "a rate above 0"),
    "scale": number(float, lambda n: 0 < n <= 1000, "a factor above 0"),
    "distribution": lambda text: resolve_name("miniserve.bench.replay.workload:Distribution").parse(text),
    "topology": Topology.parse,
    "path": Path,
    "swap": parse_swap,
}
"""How values are parsed, by their names in commands.toml."""


def add_commands(parsers: Any, rows: dict[str, Any]) -> dict[str, Parser]:
    """The commands of commands.toml, by name, with their flags. What does the work of one is imported for it only."""
    made: dict[str, Parser] = {}
    for name, row in rows["commands"].items():
        how = {key: row[key] for key in row.keys() - {"run", "groups"}}
        parser = made[name] = parsers.add_parser(name, **how)
        parser.set_defaults(run=lambda args, run=row["run"]: resolve_name(run)(args))
        for title in row.get("groups", ()):
            add_flags(parser.add_argument_group(title), rows["flags"][title])
        add_flags(parser, rows["flags"].get(name, {}))
    return made


def add_flags(group: Any, rows: dict[str, Any]) -> None:
    """Add flags to a parser or a group of it: what argparse knows of each, or its help alone."""
    for flag, what in rows.items():
        group.add_argument(flag, **({"help": what} if isinstance(what, str) else what))


def filled(kind: type[T], args: argparse.Namespace, **more: Any) -> T:
    """A configuration: `more`, and each flag fills the field of its name."""
    given = {name: value for name, value in vars(args).items() if name in signature(kind).parameters}
    return kind(**given | more)


def api_key(args: argparse.Namespace) -> str | None:
    """The key of the flag, else of the environment; None where none is given. Raises `ConfigError`."""
    given = {"--api-key": args.api_key} | {name: os.environ.get(name) for name in ("MINISERVE_API_KEY", "VLLM_API_KEY")}
    for source, text in given.items():
        if text is None:
            continue
        key = text.strip()  # a secret from a file ends in a newline
        if not key:
            raise ConfigError(problem("cli.empty_key", source=source))
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"The API key in {source} must be printable ASCII, as it travels in an HTTP header.")
        return key
    return None


def add_settings(
    parser: argparse.ArgumentParser, config: type[msgspec.Struct], choices: Mapping[str, Collection[str]]
) -> None:
    """Add the flags of flags.toml for fields of `config` and of the structs in it. A bool becomes a switch, a `Literal`
    choices; other fields are parsed by the function that their type is annotated with. `choices` are those of fields
    whose type does not name them. Each value goes by the name of its field."""
    fields = {field.name: field for field in _settings(config)}
    for title, rows in tables("cli/flags.toml").items():
        group = parser.add_argument_group(title)
        for name, row in rows.items():
            flag, field = {"help": row} if isinstance(row, str) else row, fields[name]
            kind, parse = get_args(field.type) if get_origin(field.type) is Annotated else (field.type, str)
            default = None if field.required else field.default
            if field.default_factory is not msgspec.NODEFAULT:
                default = field.default_factory()
            how: dict[str, Any] = {"dest": name, "default": default, "help": flag["help"] or None}
            if kind in (bool, bool | None):
                how["action"] = "store_true" if default is False else argparse.BooleanOptionalAction
            else:
                named = get_args(kind) if get_origin(kind) is Literal else choices.get(name)
                how |= {"type": parse, "choices": named, "metavar": flag.get("metavar")}
                how |= {"nargs": "+", "action": "extend"} if flag.get("many") else {}
            group.add_argument(*flag.get("names", ["--" + name.replace("_", "-")]), **how)


def _settings(config: type[msgspec.Struct]) -> Iterator[msgspec.structs.FieldInfo]:
    for field in msgspec.structs.fields(config):
        is_config = isinstance(field.type, type) and issubclass(field.type, msgspec.Struct)
        yield from _settings(field.type) if is_config else [field]


def add_vllm_flags(parser: argparse.ArgumentParser) -> None:
    """Let `parser` take the flags of vllm_flags.toml. `taken` has those that were given, and what they mean here."""
    hidden: dict[str, Any] = dict.fromkeys(("dest", "default", "help"), argparse.SUPPRESS)
    for values, rows in tables("cli/vllm_flags.toml").items():
        nargs: Any = {"none": 0, "never": "*"}.get(values)
        for names, means in rows.items():
            for name in names.split():
                parser.add_argument(name, action=_Taken, nargs=nargs, const=values, metavar=means, **hidden)


class _Taken(argparse.Action):
    """Notes what a flag means here. A value that would change something is an error."""

    def __call__(
        self, parser: argparse.ArgumentParser, space: argparse.Namespace, given: Any, name: Any = None
    ) -> None:
        if self.const not in ("none", "any") and (self.const == "never" or given not in self.const.split()):
            value = " ".join(given) if isinstance(given, list) else given
            parser.error(f"{name} {value}".rstrip() + f" is vLLM's and cannot be had here: {self.metavar}")
        space.taken = {**getattr(space, "taken", {}), name: self.metavar}
