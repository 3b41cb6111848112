"""`miniserve agent` with a scripted server and, in the place of the agents, programs that show how they were started.
tests/clients/test_agents.py starts real ones."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from miniserve.cli import main as cli
from tests.support.scripted import Replies, ScriptedServer
from tests.support.terminal import PATIENCE_SECONDS, Terminal, environment

AGENTS = tomllib.loads((Path(cli.__file__).parent / "agents.toml").read_text("utf-8"))
MODEL = 'vendor/a "model"'
SHOW = f"""#!{sys.executable}
import json, os, sys
paths = [word.partition("=")[2] if word.startswith("--") else word for word in [*sys.argv[1:], *os.environ.values()]]
shown = {{path: open(path).read() for path in paths if "miniserve-" in path or "/tmp." in path if os.path.isfile(path)}}
print(json.dumps({{"args": sys.argv[1:], "env": dict(os.environ), "files": shown, "cwd": os.getcwd()}}))
sys.exit(int(os.environ.get("EXIT", "0")))
"""


class ModelServer(ScriptedServer):
    """A server that has models, and a key."""

    def __init__(self) -> None:
        self.models: Any = {"data": [{"id": MODEL, "max_model_len": 40960}, {"id": "other", "max_model_len": 40960}]}
        script = self

        class Answers(Replies):
            def do_GET(self) -> None:
                known = self.path == "/v1/models" and self.headers["Authorization"] in ("Bearer secret", None)
                self.reply(200 if known else 404, json.dumps(script.models).encode())

        super().__init__(Answers)


@pytest.fixture
def server() -> Iterator[ModelServer]:
    scripted = ModelServer()
    yield scripted
    scripted.close()


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder of programs with the names of all agents."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for agent in AGENTS.values():
        (folder / agent["command"]).write_text(SHOW)
        (folder / agent["command"]).chmod(0o755)
    return folder


def start(*words: str, installed: Path, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "miniserve", "agent", *words]
    env = environment(PATH=f"{installed}:{os.environ['PATH']}", **more)
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, env=env)


@pytest.mark.parametrize("name", AGENTS)
def test_agents_are_told_of_the_server(server: ModelServer, installed: Path, tmp_path: Path, name: str) -> None:
    """Its address, key, model and context, in JSON where files are such; a private folder is gone afterwards."""
    given = ["-p", "it's", "--snake_case", "--", "x"]
    done = start(
        *[name, "--url", server.url, "--api-key", "secret", "--", *given],
        installed=installed,
        NO_PROXY="there",
        TMPDIR=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["args"][-len(given) :] == given
    assert shown["env"]["NO_PROXY"] == shown["env"]["no_proxy"] == "127.0.0.1,there"
    told = json.dumps([shown["args"], shown["env"], shown["files"]])
    for value in (server.url.removesuffix("/v1"), "secret", "model", "40960"):
        assert value in told
    assert len(shown["files"]) == len(AGENTS[name].get("files", {}))
    for path, text in shown["files"].items():
        assert json.dumps(MODEL) in text or json.dumps(f"openai/{MODEL}") in text
        assert not path.endswith(".json") or json.loads(text)
    assert not list(tmp_path.glob("miniserve-*"))


@pytest.mark.parametrize("name", AGENTS)
def test_what_is_printed_does_the_same_in_a_shell(server: ModelServer, installed: Path, name: str) -> None:
    words = [name, "--url", server.url, "--model", MODEL]
    printed = start(*words, "--print", "--", "it's", installed=installed).stdout
    env = environment(PATH=f"{installed}:{os.environ['PATH']}")
    copied = subprocess.run(["sh", "-euc", printed], capture_output=True, text=True, check=True, env=env).stdout
    assert same(copied) == same(start(*words, "--", "it's", installed=installed).stdout)


def same(shown: str) -> Any:
    """What a program has shown, without what tells two starts of it apart: its folder, and what shells set."""
    files = json.loads(shown)["files"]
    found = json.loads(shown.replace(str(Path(next(iter(files))).parent), "folder") if files else shown)
    return found | {"env": {name: found["env"][name] for name in found["env"].keys() - {"_", "PWD", "OLDPWD", "SHLVL"}}}


def test_an_exit_code_is_passed_on(server: ModelServer, installed: Path) -> None:
    assert start("claude", "--url", server.url, installed=installed, EXIT="7").returncode == 7


def until(installed: Path, number: signal.Signals, action: str) -> Path:
    """Put a qwen there that runs until it gets a signal, and then does `action`; the file it makes when it is ready."""
    ready = installed / "ready"
    trap = f"trap {shlex.quote(action)} {number.name[3:]}"
    (installed / "qwen").write_text(f"#!/bin/sh\n{trap}\n: > {ready}\nwhile :; do sleep 0.05; done\n")
    return ready


def wait_for(ready: Path) -> None:
    ends = time.monotonic() + PATIENCE_SECONDS
    while not ready.exists():
        assert time.monotonic() < ends
        time.sleep(0.05)


@pytest.mark.parametrize("action", ["exit 9", "-"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_passed_on(
    server: ModelServer, installed: Path, tmp_path: Path, number: signal.Signals, action: str
) -> None:
    """To an agent that ends by itself then, and to one that the signal ends; the folder is gone in either case."""
    ready = until(installed, number, action)
    process = subprocess.Popen(
        [sys.executable, "-m", "miniserve", "agent", "qwen", "--url", server.url],
        env=environment(PATH=f"{installed}:{os.environ['PATH']}", TMPDIR=str(tmp_path)),
        stdin=subprocess.DEVNULL,
    )
    wait_for(ready)
    process.send_signal(number)
    assert process.wait(PATIENCE_SECONDS) == (9 if action == "exit 9" else 128 + number)
    assert not list(tmp_path.glob("miniserve-*"))


def test_ctrl_c_is_for_the_agent_alone(server: ModelServer, installed: Path, tmp_path: Path) -> None:
    ready = until(installed, signal.SIGINT, "sleep 0.5; exit 9")
    env = {"PATH": f"{installed}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    terminal = Terminal("agent", "qwen", "--url", server.url, **env)
    wait_for(ready)
    terminal.press(b"\x03")
    assert terminal.ends() == 9
    assert not list(tmp_path.glob("miniserve-*"))


# --- what goes wrong ------------------------------------------------------------------------------------------------


def failure(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a failure."""
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    return line


def test_an_agent_that_is_not_installed(
    server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["agent", "codex", "--url", server.url]) == 1
    assert (
        capsys.readouterr().err
        == "miniserve: codex is not on the PATH. Install it with `npm install -g @openai/codex`.\n"
    )


def test_no_server(port: int, installed: Path) -> None:
    line = failure(start("claude", "--url", f"http://127.0.0.1:{port}/v1", installed=installed))
    assert "No server answers" in line
    assert "`miniserve serve`" in line


def test_another_model(server: ModelServer, installed: Path) -> None:
    line = failure(start("claude", "--url", server.url, "--model", "x", installed=installed))
    assert line.endswith(f"serves no 'x'. --model may be {MODEL}, other.")


@pytest.mark.parametrize("models", [[], {"data": [{"id": "x"}]}])
def test_another_api(server: ModelServer, installed: Path, models: Any) -> None:
    server.models = models
    assert "is no miniserve" in failure(start("claude", "--url", server.url, installed=installed))


def test_words_of_other_commands_are_no_agents(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["top", "--", "--once"])
    assert ended.value.code == 2
    assert "unrecognized arguments: -- --once" in capsys.readouterr().err
