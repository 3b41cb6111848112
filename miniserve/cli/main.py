"""The commands and their dispatch. Flags are vLLM's wherever vLLM has one; help imports nothing heavy."""

import logging
import os
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from typing import TYPE_CHECKING, Any

from miniserve import __version__
from miniserve.cli import flags
from miniserve.cli.flags import api_key, filled
from miniserve.config import ConfigError, EngineConfig, ServeConfig, tables
from miniserve.scheduler.baselines import POLICIES
from miniserve.text.formats import FORMATS, REASONING_MARKS

if TYPE_CHECKING:
    from miniserve.hub.resolve import ModelFiles


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit code. 1: it could not do its work and has said why, 2: it was called wrongly."""
    args = make_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except ConfigError as error:
        print(f"miniserve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # that the reader of the rest has gone (`| head`) must not become the exit code
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def make_parser() -> flags.Parser:
    """The parser of all commands; `run` of what it parses is the command."""
    rows = tables("cli/commands.toml")
    rows["flags"]["simulate"]["--policy"]["choices"] = tuple(POLICIES)
    parser = flags.Parser(prog="miniserve", description="A compact LLM serving engine for agents.")
    parser.add_argument("--version", action="version", version=f"miniserve {__version__}")
    commands = flags.add_commands(parser.add_subparsers(title="commands", required=True, metavar="COMMAND"), rows)
    for one in (parser, commands["serve"]):
        one.epilog, one.formatter_class = rows["examples"], RawDescriptionHelpFormatter
    commands["serve"].add_argument("positional_model", nargs="?", metavar="MODEL", help="the same as --model")
    parsers = {"tool_call_parser": ("auto", *FORMATS), "reasoning_parser": ("auto", "none", *REASONING_MARKS)}
    flags.add_settings(commands["serve"], ServeConfig, {"policy": tuple(POLICIES), **parsers})
    flags.add_vllm_flags(commands["serve"])
    agents = tables("cli/agents.toml")
    commands["agent"].set_defaults(agents=agents, args=[])
    commands["agent"].add_argument("agent", choices=tuple(agents), metavar="AGENT", help=", ".join(agents))
    return parser


def serve(args: Namespace) -> int:
    """Find the model, and serve it with the settings that the flags ask for. The exit code; raises `ConfigError`."""
    config = asked(args)
    for flag, means in getattr(args, "taken", {}).items():
        print(f"miniserve: {flag} changes nothing here: {means}.", file=sys.stderr, flush=True)
    logging.basicConfig(level=config.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    files = found(config)
    from miniserve.cli.serve import serve

    return serve(config, files)


def asked(args: Namespace) -> ServeConfig:
    """The settings that the flags of `serve` ask for: each one is the field of its name. Raises `ConfigError`."""
    from miniserve.hub.fetch import DEFAULT_MODEL

    if args.model and args.positional_model and args.model != args.positional_model:
        raise ConfigError(f"Two models are given, {args.positional_model} and {args.model}: one is served at a time.")
    model = args.model or args.positional_model or DEFAULT_MODEL
    made: dict[str, Any] = {"engine": filled(EngineConfig, args, model=model), "api_key": api_key(args)}
    made["served_model_names"] = args.served_model_names or [model]
    if args.log_prompts and not made["api_key"]:
        raise ConfigError("--log-prompts shows what clients have said: give --api-key too, so that only you see it.")
    made["allowed_origins"] = [origin for origins in args.allowed_origins for origin in origins]
    return filled(ServeConfig, args, **made)


def found(config: ServeConfig) -> "ModelFiles":
    """The model's files. Raises `ConfigError`."""
    from miniserve.hub.resolve import resolve

    return resolve(
        config.engine.model,
        revision=config.revision,
        load_format=config.engine.load_format,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
