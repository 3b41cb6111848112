"""What `miniserve top` draws: a pure function of what a server reports."""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.styled import Styled
from rich.table import Table
from rich.text import Text

from miniserve.config import format_bytes
from miniserve.monitor.views import Card

ID_CHARS = 24
BAR_CELLS = 16
SILENT_SECONDS = 5.0
"""A worker that is idle reports once a second; one that was silent for so long is in a very long step, or not well."""
STATES = {"running": "green", "queued": "yellow", "idle": "dim"}
# All columns of a table fit into 80.
WORKERS = "worker", "epoch", "turns", "run", "wait", "backlog", "prefills", "512 tok.", "step", "preempted", "heard"
KV = "KV pages", "held, cached", "held", "cached", "free", "reserved", "resident", "on host"
LINKS = "KV moved", "moves", "bytes", "GB/s"
CONVERSATIONS = "conversation", "state", "home", "turns", "tokens", "KV pages", "moves", "edits", "idle"

Row = Sequence[str | Text]


@dataclass(frozen=True)
class Snapshot:
    """What a server answered to GET /v1/workers and GET /conversations."""

    workers: Card
    conversations: Card


def screen(
    url: str, snapshot: Snapshot | None, most: int | None = None, *, problem: str = "", age: float = 0.0
) -> RenderableType:
    """The whole screen. Tables of workers and of what went between them have `most` rows; None: all there are.

    `snapshot` is the latest, None before the first. A `problem` says why it is not fresh but `age` seconds old.
    """
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
        *_table(WORKERS, map(_worker, workers[:most]), len(workers)),
        *_table(KV, map(_kv, workers[:most]), len(workers)),
        *_table(LINKS, map(_link, links[:most]), len(links)),
        *_table(CONVERSATIONS, map(_conversation, conversations), known),
    )
    return Group(title, Text(clean(status), style), Styled(body, "dim") if problem else body)


def _table(head: Sequence[str], rows: Iterable[Row], total: int) -> list[RenderableType]:
    """A table of the first rows of `total`, after an empty line; nothing without rows."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for number, title in enumerate(head):
        table.add_column(title, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    if not table.row_count:
        return []
    more = [Text(f"and {total - table.row_count:,} more", "dim")] if table.row_count < total else []
    return [Text(), table, *more]


def _worker(worker: Card) -> Row:
    return (
        clean(worker["name"]),
        Text(f"{worker['epoch']}", "yellow" if worker["epoch"] > 1 else ""),
        f"{worker['turns']:,}",
        f"{worker['running']:,}",
        Text(f"{worker['waiting']:,}", "yellow" if worker["waiting"] else ""),
        f"{worker['queued_prefill_tokens']:,}",
        f"{worker['prefilling']:.0%}",
        _took(worker["rates"]["prefill_512"]),
        _took(worker["rates"]["decode_step"]),
        f"{worker['preemptions']:,}",
        Text(_span(worker["last_heard"]), "red" if (worker["last_heard"] or 0) > SILENT_SECONDS else ""),
    )


def _kv(worker: Card) -> Row:
    kv = worker["kv"]
    counts = [f"{pages:,}" for pages in (kv["held"], kv["cached"], kv["free"], kv["reserved"], kv["resident"])]
    return (clean(worker["name"]), bar(kv), *counts, f"{kv['host_used']:,}/{kv['host_total']:,}")


def bar(kv: Card) -> Text:
    """KV pages of a worker: those that are held, those that are cached, those that are free."""
    total = max(kv["total"], 1)
    held = min(BAR_CELLS * kv["held"] // total, BAR_CELLS)
    cached = min(BAR_CELLS * (kv["held"] + kv["cached"]) // total, BAR_CELLS) - held
    return Text.assemble(("#" * held, "cyan"), ("+" * cached, "blue"), ("." * (BAR_CELLS - held - cached), "dim"))


def _link(link: Card) -> Row:
    ends = f"{clean(link['source'])} -> {clean(link['destination'])}"
    rate = "" if link["bandwidth"] is None else f"{link['bandwidth'] / 1e9:.2f}"
    return ends, f"{link['moves']:,}", format_bytes(link["bytes"]), rate


def _conversation(card: Card) -> Row:
    counts = [f"{card[key]:,}" for key in ("turns", "tokens", "kv_pages", "moves", "edits")]
    idle = _span(card["idle"]) if card["state"] == "idle" else ""
    return (
        _short(clean(card["id"])),
        Text(card["state"], STATES[card["state"]]),
        clean(card["home"] or ""),
        *counts,
        idle,
    )


def clean(text: str, most: int = 300) -> str:
    """The first `most` characters of a text from elsewhere, without those that move the cursor, change the direction of
    writing, or pile up on other lines."""
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
