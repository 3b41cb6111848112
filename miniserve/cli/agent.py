"""`miniserve agent`: coding agents that talk to a running server and to no other, as agents.toml says of each."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from argparse import Namespace
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import urlsplit

from miniserve.cli.flags import api_key
from miniserve.client import ApiClient
from miniserve.config import ConfigError

MOST_OUTPUT = 32000
"""Tokens of an answer, at most: agents keep room for as many, and so use that much less of the context."""
FOLDER = "<private folder of miniserve>"
"""Stands for the private folder in what is printed; a shell's words with it are always quoted."""


def agent(args: Namespace) -> int:
    """Write the files of an agent, and run it with its environment; its exit code. Raises `ConfigError`."""
    agent = {"env": {}, "args": [], "files": {}} | args.agents[args.agent]
    values = _values(args.url, api_key(args), args.model)
    texts = {name: json.dumps(value)[1:-1] for name, value in values.items()}
    contents = {name: Template(text.lstrip()).substitute(texts) for name, text in agent["files"].items()}
    if args.print:
        print(_script(contents, *_filled(agent, values | {"folder": FOLDER}, args.args)))
        return 0
    if shutil.which(agent["command"]) is None:
        raise ConfigError(f"{agent['command']} is not on the PATH. Install it with `{agent['install']}`.")
    with tempfile.TemporaryDirectory(prefix="miniserve-") as folder:
        for name, content in contents.items():
            Path(folder, name).write_text(content, "utf-8")
        return _run(*_filled(agent, values | {"folder": folder}, args.args))


def _values(url: str, key: str | None, model: str | None) -> dict[str, str]:
    """What stands for the names in agents.toml, as the server at `url` says. Raises `ConfigError`."""
    client = ApiClient.around(url, key)
    lengths = {card.id: card.max_model_len for card in client.models()}
    name = model or next(iter(lengths))
    if name not in lengths:
        raise ConfigError(f"{url} serves no {name!r}. --model may be {', '.join(lengths)}.")
    if (length := lengths[name]) is None:
        raise ConfigError(f"{url} is no miniserve: GET /v1/models does not say how long contexts may be.")
    limits = {"context": str(length), "output": str(min(MOST_OUTPUT, length // 4))}
    return {"url": client.url, "root": client.url.removesuffix("/v1"), "key": key or "none", "model": name, **limits}


def _filled(agent: dict[str, Any], values: dict[str, str], more: list[str]) -> tuple[dict[str, str], list[str]]:
    """The environment and the command of an agent. A proxy that is set up here does not get to see the server."""
    environment = {name: Template(text).substitute(values) for name, text in agent["env"].items()}
    around = [urlsplit(values["url"]).hostname or "", os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""]
    environment |= dict.fromkeys(("NO_PROXY", "no_proxy"), ",".join(filter(None, around)))
    return environment, [agent["command"], *(Template(text).substitute(values) for text in agent["args"]), *more]


def _script(contents: dict[str, str], environment: dict[str, str], command: list[str]) -> str:
    """What does the same in a shell."""
    lines = ["folder=$(mktemp -d)"] if contents else []
    lines += [f"cat > \"$folder/{name}\" <<'END'\n{content}END" for name, content in contents.items()]
    words = ["env", *(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(command)]
    return "\n".join([*lines, " ".join(words).replace(FOLDER, "'\"$folder\"'")])


def _run(environment: dict[str, str], command: list[str]) -> int:
    """Run a command; its exit code, as in a shell. All signals are passed on, but for a Ctrl-C that both have got."""
    started: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        if number == signal.SIGINT and os.isatty(0):
            return
        if started is None:
            early.append(number)
        else:
            started.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, pass_on)
    with subprocess.Popen(command, env=os.environ | environment) as process:
        started = process
        for missed in early:
            process.send_signal(missed)
        code = process.wait()
    return code if code >= 0 else 128 - code
