"""The commands and their dispatch. Flags are vLLM's wherever vLLM has one; help imports nothing heavy."""

import argparse
import logging
import os
import sys
from typing import Any

from miniserve import __version__
from miniserve.cli import agent, evaluate, flags
from miniserve.cli.flags import add_command, api_key, filled
from miniserve.config import ConfigError, EngineConfig, ServeConfig
from miniserve.scheduler.baselines import POLICIES
from miniserve.text.formats import FORMATS, REASONING_MARKS

EXAMPLES = """examples:
  miniserve serve                                     the default model, one worker
  miniserve serve llama-3.1-8b --max-model-len 16k    an alias, a folder or a hub id
  miniserve serve --topology 1P1D                     a prefiller and a decoder
  miniserve chat                                      talk to the server that runs here
  miniserve agent claude                              a coding agent that uses it
  miniserve top                                       watch it: workers, KV, conversations
  miniserve doctor                                    why prompts are computed again
  miniserve replay swe-agent --scale-tokens 0.05      send it agents, and measure
  miniserve simulate swe-agent --topology 1P3D        the same on GPUs that are not here
"""
COLUMNS = """Of workers: `run` and `wait` are requests in the batch and before it, `backlog` prompt tokens to be
computed, `prefills` the share of time spent on prompts, `512 tok.` and `step` what a prompt of 512 tokens and a decode
step take. Of KV: pages `reserved` for turns that run, `resident` for what rests between turns."""
WITH_EXAMPLES: dict[str, Any] = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}


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
        _flush()


def _flush() -> None:
    """Write out what is buffered. That a reader of it has gone (`| head`) must not become the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def make_parser() -> flags.Parser:
    """The parser of all commands; `run` of what it parses is the command."""
    parser = flags.Parser(prog="miniserve", description="A compact LLM serving engine for agents.", **WITH_EXAMPLES)
    parser.add_argument("--version", action="version", version=f"miniserve {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_serve(commands)
    add_command(commands, _chat, "talk to a running server in the terminal", "server")
    add_command(commands, _top, "watch a running server in the terminal", "server", epilog=COLUMNS)
    add_command(commands, _doctor, "say what agents make a running server compute again, and why", "server")
    agent.add_agent(commands)
    evaluate.add_commands(commands)
    return parser


def _add_serve(commands: Any) -> None:
    parser = add_command(commands, _serve, "serve a model over the OpenAI API", **WITH_EXAMPLES)
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help="the same as --model")
    choices = {
        "policy": tuple(POLICIES),
        "tool_call_parser": ("auto", *FORMATS),
        "reasoning_parser": ("auto", "none", *REASONING_MARKS),
    }
    flags.add_settings(parser, ServeConfig, choices)
    flags.add_vllm_flags(parser)


def _serve(args: argparse.Namespace) -> int:
    """Serve a model over the OpenAI API. Ready when GET /health answers 200."""
    from miniserve.hub.fetch import DEFAULT_MODEL
    from miniserve.hub.resolve import resolve

    if args.model and args.positional_model and args.model != args.positional_model:
        raise ConfigError(f"Two models are given, {args.positional_model} and {args.model}: one is served at a time.")
    config = serve_config(args, args.model or args.positional_model or DEFAULT_MODEL)
    for flag, means in getattr(args, "taken", {}).items():
        print(f"miniserve: {flag} changes nothing here: {means}.", file=sys.stderr, flush=True)
    logging.basicConfig(level=config.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    files = resolve(
        config.engine.model,
        revision=config.revision,
        load_format=config.engine.load_format,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    from miniserve.cli.serve import serve

    return serve(config, files)


def serve_config(args: argparse.Namespace, model: str) -> ServeConfig:
    """The settings that flags ask for: each one is the field of its name. Raises `ConfigError`."""
    made: dict[str, Any] = {"engine": filled(EngineConfig, args, model=model), "api_key": api_key(args)}
    made["served_model_names"] = args.served_model_names or [model]
    if args.log_prompts and not made["api_key"]:
        raise ConfigError("--log-prompts shows what clients have said: give --api-key too, so that only you see it.")
    made["allowed_origins"] = [origin for origins in args.allowed_origins for origin in origins]
    return filled(ServeConfig, args, **made)


def _chat(args: argparse.Namespace) -> int:
    """Talk to a running server; shows the time to the first token and tokens per second."""
    from miniserve.cli.chat import chat

    options = {name: getattr(args, name) for name in ("model", "temperature", "max_tokens")}
    given = {name: value for name, value in options.items() if value is not None}
    return chat(args.url, api_key(args), args.system, given)


def _top(args: argparse.Namespace) -> int:
    """Watch a running server: its workers, their KV, the latest conversations. Ctrl-C leaves."""
    from miniserve.cli.top import top

    return top(args.url, api_key(args), args.interval, args.once)


def _doctor(args: argparse.Namespace) -> int:
    """Say what each client's turns have computed that earlier ones had computed already, and what to do about it."""
    from miniserve.cli.doctor import doctor

    return doctor(args.url, api_key(args))
