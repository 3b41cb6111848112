"""What a running server says of itself, in the terminal: `miniserve top` is a live view, from GET /v1/workers and
/conversations; `miniserve doctor` says in sentences what agents make it compute again, from GET /v1/doctor."""

import contextlib
import io
import signal
import sys
import time
from argparse import Namespace

from rich.console import Console
from rich.live import Live

from miniserve.cli.flags import api_key
from miniserve.cli.screen import Snapshot, clean, screen
from miniserve.client import ApiClient
from miniserve.config import ConfigError
from miniserve.monitor.views import Card

LIVE_SECONDS = 5.0
"""How long an answer may take that is shown live."""
ROWS = 20
"""Conversations that are asked for where the output is no terminal."""
MOST_ROWS = 200
MOST_CAUSES = 5
PLACES = {"tools": "the tools", "system": "the system prompt"}


def top(args: Namespace) -> int:
    """Show the server at `url`, asked every `interval` seconds, until Ctrl-C; `once`, or where the output is no
    terminal, print what it says now. The exit code. Raises `ConfigError` if that cannot be done."""
    client = ApiClient(args.url, api_key(args), LIVE_SECONDS)
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
    return Snapshot(client.get("/workers"), client.get(f"/../conversations?limit={rows}"))  # beside /v1, not in it


def doctor(args: Namespace) -> int:
    """Print the report of the server at `url`; the exit code. Raises `ConfigError`."""
    report = ApiClient.around(args.url, api_key(args)).get("/doctor")
    print("\n".join(line for one in report["data"] for line in _lines(one)) or "No turn has come yet.")
    return 0


def _lines(one: Card) -> list[str]:
    share = one["computed_tokens"] / max(one["prompt_tokens"], 1)
    counts = f"{one['turns']:,} turns, {share:.0%} of {one['prompt_tokens']:,} prompt tokens computed"
    lines = [f"{clean(one['client'])}: {counts}{'' if one['causes'] else ', and no prompt had changed'}"]
    for cause in one["causes"][:MOST_CAUSES]:
        where = PLACES.get(cause["where"], f"the {cause['where']} messages")
        lines.append(f"  {cause['share']:.0%} of that because of {where}: {cause['says']} ({cause['turns']:,} turns)")
        lines.append(f"    {cause['advice']}")
    return lines
