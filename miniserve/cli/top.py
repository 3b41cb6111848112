"""`miniserve top`: a live view of a running server in the terminal, from GET /v1/workers and /v1/conversations.

It asks in a thread and draws in the main one: a server that takes its time freezes nothing.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import select
import signal
import socket
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
from rich.console import Console
from rich.live import Live

from miniserve.cli.chat import BROKEN, Server
from miniserve.cli.screen import Snapshot, screen
from miniserve.config import ConfigError
from miniserve.monitor.conversation_views import ConversationList
from miniserve.monitor.worker_views import WorkerList

PATIENCE_SECONDS = 5.0
"""How long an answer may take."""
DRAW_SECONDS = 0.1
"""How soon a new size of the terminal, or a key, is noticed."""
ONCE_ROWS = 20
MOST_ROWS = 200

T = TypeVar("T")


@dataclass
class Polled(Server):
    """A server that is asked again and again, and that one can stop waiting for."""

    gave_up: bool = False
    connection: http.client.HTTPConnection | None = field(default=None, repr=False)

    def snapshot(self, rows: int) -> Snapshot:
        """What it says of itself now, with its `rows` latest conversations. Raises `ConfigError`."""
        self.gave_up = False
        limit = max(1, min(rows, MOST_ROWS))
        return Snapshot(
            self._get("/workers", WorkerList),
            self._get(f"/conversations?limit={limit}", ConversationList),
        )

    def hang_up(self) -> None:
        """Called from another thread: the answer is waited for no longer."""
        self.gave_up = True
        with contextlib.suppress(OSError, AttributeError):  # not connected yet, or no more
            self.connection.sock.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]

    def check_url(self) -> None:
        """Raises `ConfigError` for a URL that no waiting will help."""
        self._connection()

    def _connection(self) -> tuple[http.client.HTTPConnection, str]:
        self.connection, base = super()._connection()
        return self.connection, base

    def _get(self, path: str, kind: type[T]) -> T:
        try:
            with self.request("GET", path) as reply:
                return msgspec.json.decode(reply.response.read(), type=kind)
        except msgspec.DecodeError as error:
            raise ConfigError(
                f"{self.url} is no miniserve of this version: what GET {path} gives is something else ({error})."
            ) from error
        except (ConfigError, *BROKEN) as error:
            if self.gave_up:
                raise ConfigError(f"The server at {self.url} has not answered for {PATIENCE_SECONDS:g} s.") from error
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"The answer of {self.url} broke off: is the server still running?") from error


def _ask(server: Polled, rows: int) -> Future[Snapshot]:
    """Ask in a thread of its own, which holds up nobody who wants to leave."""
    asked: Future[Snapshot] = Future()

    def work() -> None:
        try:
            asked.set_result(server.snapshot(rows))
        except Exception as error:
            asked.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return asked


def top(url: str, api_key: str | None, interval: float, once: bool) -> int:
    """Show the server at `url`, asked every `interval` seconds, until Ctrl-C or q; `once`, or where nobody looks at a
    terminal, print what it says now. The exit code. Raises `ConfigError` if that cannot be done."""
    server = Polled(url, api_key)
    server.check_url()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # ids may be in any script, terminals not
    console = Console(highlight=False)
    if once or not (sys.stdout.isatty() and console.is_terminal) or console.is_dumb_terminal:
        try:
            snapshot = _ask(server, ONCE_ROWS).result(PATIENCE_SECONDS)
        except TimeoutError:
            raise ConfigError(f"The server at {url} has not answered for {PATIENCE_SECONDS:g} s.") from None
        console.print(screen(url, snapshot, console.width, 2**31))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without giving the terminal back
    with (
        contextlib.suppress(KeyboardInterrupt),
        _keys() as quits,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        _watch(server, interval, live, quits)
    return 0


def _watch(server: Polled, interval: float, live: Live, quits: Callable[[], bool]) -> None:
    """Ask and draw, until somebody `quits`."""
    console = live.console
    snapshot: Snapshot | None = None
    asked: Future[Snapshot] | None = None
    problem, drawn = "", None
    due = began = seen = time.monotonic()
    while not quits():
        now = time.monotonic()
        if asked is None and now >= due:
            asked, began = _ask(server, console.height), now
        elif asked is not None and asked.done():
            try:
                snapshot, problem, seen = asked.result(), "", now
            except ConfigError as error:
                problem = str(error)
            asked, due = None, now + interval
        elif asked is not None and now - began > PATIENCE_SECONDS:
            server.hang_up()
        age = int(now - seen) if problem else 0
        state = (snapshot, problem, age, console.size)
        if state != drawn:
            view = screen(server.url, snapshot, console.width, console.height, problem=problem, age=age)
            live.update(view, refresh=True)
            drawn = state


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[], bool]]:
    """A function that waits for a moment, and says whether q was pressed. Keys are not shown meanwhile."""
    if not sys.stdin.isatty():

        def wait() -> bool:
            time.sleep(DRAW_SECONDS)
            return False

        yield wait
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def quits() -> bool:
        if not select.select([terminal], [], [], DRAW_SECONDS)[0]:
            return False
        keys = os.read(terminal, 64)
        return not keys or b"q" in keys.lower()  # nothing: the terminal has gone

    tty.setcbreak(terminal)
    try:
        yield quits
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
