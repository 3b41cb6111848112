"""`miniserve top`: a live view of a running server in the terminal, from GET /v1/workers and /conversations."""

import contextlib
import io
import signal
import sys
import time
from argparse import Namespace

from rich.console import Console
from rich.live import Live

from miniserve.cli.client import ApiClient
from miniserve.cli.flags import api_key
from miniserve.cli.screen import Snapshot, screen
from miniserve.config import ConfigError

PATIENCE_SECONDS = 5.0
"""How long an answer may take."""
ROWS = 20
"""Conversations that are asked for where the output is no terminal."""
MOST_ROWS = 200


def top(args: Namespace) -> int:
    """Show the server at `url`, asked every `interval` seconds, until Ctrl-C; `once`, or where the output is no
    terminal, print what it says now. The exit code. Raises `ConfigError` if that cannot be done."""
    client = ApiClient(args.url, api_key(args), PATIENCE_SECONDS)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # ids may be in any script, terminals not
    console = Console(highlight=False)
    if args.once or not (sys.stdout.isatty() and console.is_terminal) or console.is_dumb_terminal:
        console.print(screen(client.url, _ask(client, ROWS)))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the `with` below, which restores the terminal
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, screen=True) as live:
        _watch(client, args.interval, live)
    return 0


def _watch(client: ApiClient, interval: float, live: Live) -> None:
    """Ask and draw, until an exception ends it. `live` fits what was drawn to the terminal, whose size may change."""
    snapshot: Snapshot | None = None
    live.update(screen(client.url, None), refresh=True)
    seen = time.monotonic()
    while True:
        height, problem = live.console.height, ""
        try:
            snapshot = _ask(client, min(height, MOST_ROWS))
            seen = time.monotonic()
        except ConfigError as error:
            problem = str(error)
        # A quarter of the lines for each table; conversations take what is left, and are cut off below.
        most, age = max(height // 4 - 2, 1), int(time.monotonic() - seen)
        live.update(screen(client.url, snapshot, most, problem=problem, age=age), refresh=True)
        time.sleep(interval)


def _ask(client: ApiClient, rows: int) -> Snapshot:
    """A snapshot with the `rows` latest conversations."""
    latest = f"/../conversations?limit={rows}"  # beside /v1, not in it
    return Snapshot(client.get("/workers"), client.get(latest))
