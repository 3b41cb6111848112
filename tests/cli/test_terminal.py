"""`miniserve top` at a terminal: sizes, signals, servers that come and go."""

from __future__ import annotations

import signal
import termios
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.scripted import WatchedServer
from tests.support.terminal import Terminal

pytestmark = pytest.mark.slow


@pytest.fixture
def server(port: int) -> Iterator[WatchedServer]:
    watched = WatchedServer(port)
    yield watched
    watched.close()


@pytest.fixture
def top() -> Iterator[Callable[..., Terminal]]:
    """Opens `miniserve top` for a port."""
    opened: list[Terminal] = []

    def open_at(port: int, **size: Any) -> Terminal:
        opened.append(Terminal("top", "--url", f"http://127.0.0.1:{port}/v1", "--interval", "0.1", **size))
        return opened[-1]

    yield open_at
    for terminal in opened:
        terminal.close()


def test_it_leaves_the_terminal_as_it_was(server: WatchedServer, top: Callable[..., Terminal]) -> None:
    terminal = top(server.port)
    before = termios.tcgetattr(terminal.terminal)
    lines = terminal.see("team/a")
    assert len(lines) == 30
    assert {len(line) for line in lines} == {100}
    assert b"\x1b[?1049h" in terminal.written, "a screen of its own"
    assert b"\x1b[2J" not in terminal.written, "which is never cleared, as that would flicker"
    terminal.press(b"\x03")
    assert terminal.ends() == 0
    assert terminal.written.rstrip().endswith(b"\x1b[?25h\x1b[?1049l"), "the cursor, and the screen from before"
    assert termios.tcgetattr(terminal.terminal) == before


def test_sigterm_gives_the_terminal_back(server: WatchedServer, top: Callable[..., Terminal]) -> None:
    terminal = top(server.port)
    terminal.see("team/a")
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.ends() == 143
    assert b"\x1b[?1049l" in terminal.written


def test_the_terminal_changes_its_size(server: WatchedServer, top: Callable[..., Terminal]) -> None:
    terminal = top(server.port, columns=60, lines=20)
    lines = terminal.see("team/a")
    assert (len(lines), len(lines[0])) == (20, 60)
    terminal.resize(120, 40)
    lines = terminal.see("on host")
    assert (len(lines), len(lines[0])) == (40, 120)
    while "/conversations?limit=40" not in server.paths:
        terminal.read(0.1)
    terminal.resize(30, 6)
    lines = terminal.see("worker")
    assert (len(lines), len(lines[0])) == (6, 30)


def test_a_server_goes_and_comes_back(port: int, top: Callable[..., Terminal]) -> None:
    server = WatchedServer(port)
    terminal = top(port)
    terminal.see("5 conversations known")
    server.close()
    lines = terminal.see("No server answers")
    assert any("Still trying" in line for line in lines)
    assert any(line.startswith("team/a") for line in lines), "what was seen stays"
    again = WatchedServer(port)
    terminal.see("5 conversations known")
    again.answer = lambda path: (401, b'{"error": {"message": "send the one given to --api-key"}}')
    terminal.see("The server says: send the one given to --api-key")
    assert terminal.process.poll() is None
    terminal.press(b"\x03")
    assert terminal.ends() == 0
    again.close()


def test_it_waits_for_a_server_that_is_not_there_yet(port: int, top: Callable[..., Terminal]) -> None:
    terminal = top(port)
    terminal.see("Still trying.")
    terminal.press(b"\x03")
    assert terminal.ends() == 0
