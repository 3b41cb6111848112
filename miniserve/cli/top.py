"""`miniserve top`: a live view of a running server in the terminal, from GET /v1/workers and /conversations.

It asks in a thread and draws in the main one, so that a slow server does not freeze the screen.
"""

import contextlib
import io
import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import msgspec
from rich.console import Console
from rich.live import Live

from miniserve.cli.client import ApiClient
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


def _get(client: ApiClient, path: str, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(client.get(path), type=kind)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"{client.url} is no miniserve of this version: what GET {path.removeprefix('/..')} gives is something "
            f"else ({error})."
        ) from error


def _ask(client: ApiClient, rows: int) -> Future[Snapshot]:
    """Ask for a snapshot with the `rows` latest conversations. Leaving does not wait for the thread that asks."""
    asked: Future[Snapshot] = Future()
    latest = f"/../conversations?limit={max(1, min(rows, MOST_ROWS))}"  # beside /v1, not in it

    def work() -> None:
        try:
            workers = _get(client, "/workers", WorkerList)
            asked.set_result(Snapshot(workers, _get(client, latest, ConversationList)))
        except Exception as error:
            asked.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return asked


def top(url: str, api_key: str | None, interval: float, once: bool) -> int:
    """Show the server at `url`, asked every `interval` seconds, until Ctrl-C or q; `once`, or where the output is no
    terminal, print what it says now. The exit code. Raises `ConfigError` if that cannot be done."""
    client = ApiClient(url, api_key, PATIENCE_SECONDS)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # ids may be in any script, terminals not
    console = Console(highlight=False)
    if once or not (sys.stdout.isatty() and console.is_terminal) or console.is_dumb_terminal:
        try:
            snapshot = _ask(client, ONCE_ROWS).result(PATIENCE_SECONDS)
        except TimeoutError:
            raise client.slow() from None
        console.print(screen(url, snapshot, console.width, 2**31))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the `with` below, which restores the terminal
    with (
        contextlib.suppress(KeyboardInterrupt),
        _keys() as quits,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        _watch(client, interval, live, quits)
    return 0


def _watch(client: ApiClient, interval: float, live: Live, quits: Callable[[], bool]) -> None:
    """Ask and draw, until the user `quits`."""
    console = live.console
    snapshot: Snapshot | None = None
    asked: Future[Snapshot] | None = None
    problem, drawn = "", None
    due = began = seen = time.monotonic()
    while not quits():
        now = time.monotonic()
        if asked is None and now >= due:
            asked, began = _ask(client, console.height), now
        elif asked is not None and asked.done():
            try:
                snapshot, problem, seen = asked.result(), "", now
            except ConfigError as error:
                problem = str(error)
            asked, due = None, now + interval
        elif asked is not None and now - began > PATIENCE_SECONDS:
            problem, asked, due = str(client.slow()), None, now + interval
        age = int(now - seen) if problem else 0
        state = (snapshot, problem, age, console.size)
        if state != drawn:
            view = screen(client.url, snapshot, console.width, console.height, problem=problem, age=age)
            live.update(view, refresh=True)
            drawn = state


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[], bool]]:
    """A function that waits for a moment, and says whether q was pressed. Keys are not shown meanwhile."""
    if not sys.stdin.isatty():
        yield partial(threading.Event().wait, DRAW_SECONDS)  # False when the time is up: no key can come
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
