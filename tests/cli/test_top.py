"""How `miniserve top` asks, and how it bears servers that are not there, hang, refuse, or are something else."""

from __future__ import annotations

import asyncio
import contextlib
import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console, RenderableType

from miniserve.cli import main as cli
from miniserve.cli import top as terminal_top
from miniserve.client import ApiClient
from miniserve.config import ConfigError
from miniserve.hub import resolve as hub
from miniserve.text.tokenizer import Tokenizer
from tests.support.api import make_app, serving
from tests.support.fake_engine import FakeClient
from tests.support.scripted import Replies, ScriptedServer, WatchedServer
from tests.support.terminal import PATIENCE_SECONDS, environment


@pytest.fixture
def server() -> Iterator[WatchedServer]:
    watched = WatchedServer()
    yield watched
    watched.close()


def failure(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line of a failure."""
    assert cli.main(["top", *flags]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line


@pytest.mark.parametrize("flags", [["--once"], []])
def test_one_snapshot_is_printed(server: WatchedServer, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    """Without --once too, as the output is no terminal."""
    assert cli.main(["top", "--url", server.url, "--api-key", "k", *flags]) == 0
    out, err = capsys.readouterr()
    assert (err, "\x1b" in out) == ("", False)
    lines = [line.rstrip() for line in out.splitlines()]
    assert lines[0] == f"miniserve at {server.url}, policy conserve"
    assert ["team/a", "idle", "d0", "1"] in [line.split()[:4] for line in lines]
    assert server.paths == ["/v1/workers", "/conversations?limit=20"]
    assert server.keys == ["Bearer k"] * 2


def test_output_is_ascii_where_the_terminal_is(server: WatchedServer) -> None:
    command = [sys.executable, "-m", "miniserve", "top", "--url", server.url]
    env = environment(PYTHONIOENCODING="ascii", COLUMNS="100")
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "####" in done.stdout


def test_no_server_says_how_to_start_one(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{port}/v1"
    line = failure(capsys, "--url", url, "--once")
    assert line.startswith(f"miniserve: No server answers at {url} (Connection refused).")
    assert "`miniserve serve`" in line


@pytest.mark.parametrize("flags", [["--once"], []])
def test_an_address_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    assert "write it like http://127.0.0.1:8000/v1" in failure(capsys, "--url", "127.0.0.1:8000", *flags)


async def test_the_key_is_sent(capsys: pytest.CaptureFixture[str]) -> None:
    """The real API."""
    tokenizer = Tokenizer.load(hub.resolve("smollm2-135m", load_format="dummy").folder)
    async with serving(make_app(tokenizer, FakeClient(), api_key="k")) as port:
        flags = ["--url", f"http://127.0.0.1:{port}/v1", "--once"]
        assert "--api-key" in await asyncio.to_thread(failure, capsys, *flags)
        assert "--api-key" in await asyncio.to_thread(failure, capsys, *flags, "--api-key", "other")
        assert await asyncio.to_thread(cli.main, ["top", *flags, "--api-key", "k"]) == 0
    assert "5 conversations known" in capsys.readouterr().out


@pytest.mark.parametrize("body", [b"<html>", b"\xff", b"[]", b'{"object": "list"}', b""])
def test_another_server_is_recognized(server: WatchedServer, capsys: pytest.CaptureFixture[str], body: bytes) -> None:
    server.answer = lambda path: (200, body)
    line = failure(capsys, "--url", server.url, "--once")
    assert line.startswith(f"miniserve: {server.url} is no miniserve: what GET /workers gives")


def test_a_url_without_v1_is_suspected(server: WatchedServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer = lambda path: (404, b'{"error": {"message": "There is nothing at GET /workers."}}')
    line = failure(capsys, "--url", server.url.removesuffix("/v1"), "--once")
    assert line == "miniserve: The server says: There is nothing at GET /workers. Does --url end in /v1?"


def test_a_server_that_does_not_answer_is_an_error(
    server: WatchedServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = threading.Event()
    server.answer = lambda path: (200, b"late" if hangs.wait(10) else b"")
    monkeypatch.setattr(terminal_top, "LIVE_SECONDS", 0.2)
    assert "has not answered for 0.2 s" in failure(capsys, "--url", server.url, "--once")
    hangs.set()


@pytest.mark.parametrize("trickles", [False, True])
def test_an_answer_that_is_late_is_waited_for_no_longer(trickles: bool) -> None:
    """The server sees the connection close, whether it says nothing or a little all the time."""
    gone = threading.Event()

    class Late(Replies):
        def do_GET(self) -> None:
            self.connection.settimeout(0.02)
            if trickles:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            with contextlib.suppress(OSError):
                while not gone.is_set():
                    with contextlib.suppress(TimeoutError):
                        gone.set() if self.connection.recv(1) == b"" else None
                    if trickles:
                        self.wfile.write(b"x")
            gone.set()

    server = ScriptedServer(Late)
    with pytest.raises(ConfigError, match=r"has not answered for 0\.2 s"):
        ApiClient(server.url, None, 0.2).get("/workers")
    assert gone.wait(PATIENCE_SECONDS)
    server.close()


def test_a_server_that_hangs_is_asked_again(server: WatchedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal_top, "LIVE_SECONDS", 0.2)
    hangs = threading.Event()
    shown: list[str] = []
    answer = server.answer
    server.answer = lambda path: (200, b"late" if hangs.wait(PATIENCE_SECONDS) else b"")
    console = Console(file=io.StringIO(), width=100, height=30)

    def update(view: RenderableType, refresh: bool) -> None:
        with console.capture() as drawn:
            console.print(view)
        shown.append(drawn.get())
        if "has not answered for 0.2 s. Still trying." in shown[-1]:
            server.answer = answer
        if "5 conversations known" in shown[-1]:
            raise KeyboardInterrupt

    live: Any = SimpleNamespace(console=console, update=update)
    with pytest.raises(KeyboardInterrupt):
        terminal_top._watch(ApiClient(server.url, None, 0.2), 0.1, live)
    hangs.set()
    assert "Asking it for the first time." in shown[0]
    assert any("has not answered" in text for text in shown)


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "often", "1e9"])
def test_intervals_have_bounds(interval: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["top", "--interval", interval])
    assert end.value.code == 2
    assert "is not a number of seconds from 0.1 to 3600" in capsys.readouterr().err
