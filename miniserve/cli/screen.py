"""What `miniserve top` draws: a pure function of what a server reports."""

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.styled import Styled
from rich.table import Table
from rich.text import Text

from miniserve.config import format_bytes, tables
from miniserve.monitor.views import Card

ID_CHARS = 24
BAR_CELLS = 16
STATES = {"running": "green", "queued": "yellow", "idle": "dim"}
COLUMNS = tables("cli/screen.toml")


class Snapshot(NamedTuple):
    """What a server answered to GET /v1/workers and GET /conversations."""

    workers: Card
    conversations: Card


def screen(
    url: str, snapshot: Snapshot | None, most: int | None = None, *, problem: str = "", age: float = 0.0
) -> RenderableType:
    """The whole screen. Tables of workers and of what went between them have `most` rows; None: all there are.
    `snapshot` is the latest, None before the first. A `problem` says why it is not fresh but `age` seconds old."""
    title = Text.assemble(("miniserve", "bold"), f" at {clean(url)}", no_wrap=True, overflow="ellipsis")
    style = "bold red" if problem else ""
    if snapshot is None:
        status = f"{problem} Still trying." if problem else "Asking it for the first time."
        return Group(title, Text(clean(status), style))
    workers, conversations = snapshot.workers["data"], snapshot.conversations["data"]
    links = sorted(snapshot.workers["links"], key=lambda link: -link["bytes"])
    known = max(snapshot.conversations["total"], len(conversations))
    title.append(f", policy {clean(snapshot.workers['policy'])}")
    counts = _many(len(workers), "worker"), _many(snapshot.workers["queued"], "turn") + " queued"
    status = ", ".join((*counts, _many(known, "conversation") + " known"))
    if problem:
        status = f"{problem} Still trying; what follows is {_span(age)} old."
    body = Group(
        *_table("workers", workers[:most], len(workers)),
        *_table("kv", workers[:most], len(workers)),
        *_table("links", links[:most], len(links)),
        *_table("conversations", conversations, known),
    )
    return Group(title, Text(clean(status), style), Styled(body, "dim") if problem else body)


def _table(name: str, cards: Sequence[Card], total: int) -> list[RenderableType]:
    """A table of the first cards of `total`, after an empty line; nothing without cards."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for number, title in enumerate(COLUMNS[name]):
        table.add_column(title, justify="right" if number else "left", no_wrap=True)
    for card in cards:
        table.add_row(*(_cell(card, column) for column in COLUMNS[name].values()))
    if not table.row_count:
        return []
    more = [Text(f"and {total - table.row_count:,} more", "dim")] if table.row_count < total else []
    return [Text(), table, *more]


def _cell(card: Card, column: Card) -> Text:
    value: Any = card
    for key in filter(None, column.get("of", "").split(".")):
        value = value[key]
    shown = SHOWN[column.get("as", "count")](value)
    striking = "above" in column and (value or 0) > column["above"]
    return shown if isinstance(shown, Text) else Text(shown, column["style"] if striking else "")


def bar(kv: Card) -> Text:
    """KV pages of a worker: those that are held, those that are cached, those that are free."""
    total = max(kv["total"], 1)
    held = min(BAR_CELLS * kv["held"] // total, BAR_CELLS)
    cached = min(BAR_CELLS * (kv["held"] + kv["cached"]) // total, BAR_CELLS) - held
    return Text.assemble(("#" * held, "cyan"), ("+" * cached, "blue"), ("." * (BAR_CELLS - held - cached), "dim"))


def clean(text: str, most: int = 300) -> str:
    """The first `most` characters of a text from elsewhere, without those that move the cursor or cover others."""
    composed = unicodedata.normalize("NFC", text[:most])
    return "".join(c if c.isprintable() and not unicodedata.combining(c) else "\ufffd" for c in composed)


def _short(text: str) -> str:
    """Both ends of a long text, as ids often begin alike."""
    half = ID_CHARS // 2
    return text if len(text) <= ID_CHARS else f"{text[: half - 1]}…{text[-half:]}"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _took(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.{int(seconds < 0.1)}f} ms"


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.{int(seconds < 10)}f} s"


SHOWN: dict[str, Callable[[Any], str | Text]] = {
    "count": "{:,}".format,
    "share": "{:.0%}".format,
    "text": lambda text: clean(text or ""),
    "id": lambda text: _short(clean(text)),
    "state": lambda state: Text(state, STATES[state]),
    "bytes": format_bytes,
    "rate": lambda rate: "" if rate is None else f"{rate / 1e9:.2f}",
    "took": _took,
    "span": _span,
    "bar": bar,
    "host": lambda kv: f"{kv['host_used']:,}/{kv['host_total']:,}",
    "ends": lambda link: f"{clean(link['source'])} -> {clean(link['destination'])}",
    "idle": lambda card: _span(card["idle"]) if card["state"] == "idle" else "",
}
