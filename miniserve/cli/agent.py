"""`miniserve agent`: coding agents, started so that they talk to a running server and to no other. agents.toml has what
each of them wants to be told."""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import tomllib
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import urlsplit

from miniserve.cli import flags
from miniserve.cli.client import ApiClient
from miniserve.config import ConfigError

PATIENCE_SECONDS = 10.0
MOST_OUTPUT = 32000
"""Tokens of an answer, at most; agents ask for that many in each request and keep the room free."""
FOLDER = "<folder>"
"""Stands for the private folder in what is printed. It is nothing that a shell takes as it is, so it gets quoted."""


def add_agent(commands: Any) -> None:
    agents = tomllib.loads((files("miniserve.cli") / "agents.toml").read_text("utf-8"))
    usage = "miniserve agent AGENT [--url URL] [--api-key KEY] [--model NAME] [--print] [-- ARGS...]"
    parser = flags.add_command(commands, _agent, "start a coding agent that uses a running server", usage=usage)
    parser.set_defaults(agents=agents, args=[])
    parser.add_argument("name", choices=tuple(agents), metavar="AGENT", help=", ".join(agents))
    flags.add_url(parser, "http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="default: the server's first")
    text = "show the environment, files and command, to be copied to a shell, and start nothing"
    parser.add_argument("--print", action="store_true", dest="shown", help=text)


def _agent(args: argparse.Namespace) -> int:
    """Start a coding agent in this folder that uses a running server, and no other: its address, key, model and context
    length, with telemetry and looking for updates turned off. The agent's own settings are left as they are."""
    agent = args.agents[args.name]
    values = _values(args.url, flags.api_key(args), args.model)
    if args.shown:
        print(_script(agent, values | {"folder": FOLDER}, args.args))
        return 0
    if shutil.which(agent["command"]) is None:
        raise ConfigError(f"{agent['command']} is not on the PATH. Install it with `{agent['install']}`.")
    with tempfile.TemporaryDirectory(prefix="miniserve-") as folder:
        environment, command = _filled(agent, values | {"folder": folder}, args.args)
        for name, text in agent.get("files", {}).items():
            Path(folder, name).write_text(_file(text, values), "utf-8")
        return _run(command, os.environ | environment)


def _values(url: str, key: str | None, model: str | None) -> dict[str, str]:
    """What stands for the names in agents.toml, as the server at `url` says. Raises `ConfigError`."""
    root = url.rstrip("/").removesuffix("/v1")
    served = json.loads(ApiClient(f"{root}/v1", key, PATIENCE_SECONDS).get("/models"))["data"]
    found = next((card for card in served if model in (None, card["id"])), None)
    if found is None:
        names = ", ".join(card["id"] for card in served)
        raise ConfigError(f"There is no model {model!r} at {url}. Served there: {names}.")
    context = found["max_model_len"]
    limits = {"context": str(context), "output": str(min(MOST_OUTPUT, context // 4))}
    return {"url": f"{root}/v1", "root": root, "key": key or "none", "model": found["id"], **limits}


def _filled(agent: dict[str, Any], values: dict[str, str], more: list[str]) -> tuple[dict[str, str], list[str]]:
    """The environment and the command of an agent. A proxy that is set up here does not get to see the server."""
    environment = {name: Template(text).substitute(values) for name, text in agent.get("env", {}).items()}
    around = [urlsplit(values["url"]).hostname or "", os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""]
    environment |= dict.fromkeys(("NO_PROXY", "no_proxy"), ",".join(filter(None, around)))
    command = [agent["command"], *(Template(text).substitute(values) for text in agent.get("args", [])), *more]
    return environment, command


def _file(text: str, values: dict[str, str]) -> str:
    return Template(text.lstrip()).substitute({name: json.dumps(value)[1:-1] for name, value in values.items()})


def _script(agent: dict[str, Any], values: dict[str, str], more: list[str]) -> str:
    """What does the same in a shell."""
    lines = ["folder=$(mktemp -d)"] if "files" in agent else []
    for name, text in agent.get("files", {}).items():
        lines += [f"cat > \"$folder/{name}\" <<'END'", _file(text, values) + "END"]
    environment, command = _filled(agent, values, more)
    words = ["env", *(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(command)]
    return "\n".join([*lines, " ".join(words).replace(FOLDER, "'\"$folder\"'")])


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Run a command to its end; its exit code, as a shell gives it. Signals are passed on, but for a Ctrl-C that the
    terminal has sent to both."""
    with subprocess.Popen(command, env=environment) as process, contextlib.ExitStack() as after:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            shared = number == signal.SIGINT and os.isatty(0)
            before = signal.signal(number, lambda got, _, shared=shared: None if shared else process.send_signal(got))
            after.callback(signal.signal, number, before)
        code = process.wait()
    return code if code >= 0 else 128 - code
