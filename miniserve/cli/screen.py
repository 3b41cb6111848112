"""What `miniserve top` draws: a pure function of what a server reports."""

import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Generic, Literal, TypeVar

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.styled import Styled
from rich.table import Table
from rich.text import Text

from miniserve.config import format_bytes
from miniserve.monitor.conversation_views import ConversationCard, ConversationList
from miniserve.monitor.worker_views import Kv, LinkCard, WorkerCard, WorkerList

ID_CHARS = 28
BAR_CELLS, MOST_BAR_CELLS = 12, 48
GAP = 2
"""Columns between columns."""
ROOMY = 24
"""Lines from which on there are empty ones between tables."""
LEAVES_FIRST = (2, 1, 0)
"""Which of the tables (workers, their KV, what was moved, conversations) are left out where lines are few, in order."""
SILENT_SECONDS = 5.0
"""A worker that is idle reports once a second; one that was silent for so long is in a very long step, or not well."""
STATES = {"running": "green", "queued": "yellow", "idle": "dim"}

Row = TypeVar("Row")


@dataclass(frozen=True)
class Snapshot:
    """What a server answered to GET /v1/workers and GET /conversations."""

    workers: WorkerList
    conversations: ConversationList


def screen(
    url: str, snapshot: Snapshot | None, width: int, height: int, *, problem: str = "", age: float = 0.0
) -> RenderableType:
    """The whole screen: at most `width` columns, and `height` lines where that leaves room for the header.

    `snapshot` is the latest, None before the first. A `problem` says why it is not fresh but `age` seconds old.
    """
    top = _header(url, snapshot, width, problem, age)
    if snapshot is None:
        return Group(*top)
    workers, links = snapshot.workers["data"], snapshot.workers["links"]
    conversations = snapshot.conversations["data"]
    known = max(snapshot.conversations["total"], len(conversations))
    kv = KV_COLUMNS if any(worker["kv"]["host_total"] for worker in workers) else KV_COLUMNS[:-1]
    counts = [len(workers), len(workers), len(links), known]
    between = int(height >= ROOMY)
    most = _lines(counts, height - len(top), between)
    tables = [
        _table(WORKER_COLUMNS, workers, width, most[0]),
        _table(kv, workers, width, most[1]),
        _table(LINK_COLUMNS, sorted(links, key=lambda link: -link["bytes"]), width, most[2]),
        _table(CONVERSATION_COLUMNS, conversations, width, most[3], known),
    ]
    shown = [table for table, lines in zip(tables, most, strict=True) if lines]
    body = Group(*chain.from_iterable((*[Text()] * between, *table) for table in shown))
    return Group(*top, Styled(body, "dim") if problem else body)


def _header(url: str, snapshot: Snapshot | None, width: int, problem: str, age: float) -> list[Text]:
    title = Text.assemble(("miniserve", "bold"), f" at {clean(url)}")
    if snapshot is None:
        status = f"{problem} Still trying." if problem else "Asking it for the first time."
    else:
        workers, known = snapshot.workers, snapshot.conversations["total"]
        title.append(f", policy {clean(workers['policy'])}")
        counts = _many(len(workers["data"]), "worker"), _many(workers["queued"], "turn") + " queued"
        status = ", ".join((*counts, _many(known, "conversation") + " known"))
        if problem:
            status = f"{problem} Still trying; what follows is {_span(age)} old."
    style = "bold red" if problem else ""
    lines = [title, *(Text(line, style) for line in textwrap.wrap(clean(status), width))]
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    return lines


def _lines(counts: Sequence[int], height: int, between: int) -> list[int]:
    """How many lines below its head each table gets; 0: the table is left out.

    Each table keeps two lines and the last a quarter of all; the rest goes to the first tables that have more rows.
    """
    wanted = [*(min(count, 2) for count in counts[:-1]), min(counts[-1], max(2, height // 4))]
    least = [between + 1 + lines if lines else 0 for lines in wanted]
    for dropped in LEAVES_FIRST:
        if sum(least) > height:
            least[dropped] = 0
    given = []
    for number, count in enumerate(counts):
        lines = min(count, height - sum(least[number + 1 :]) - between - 1) if least[number] else 0
        given.append(lines)
        height -= between + 1 + lines if lines else 0
    return given


@dataclass(frozen=True)
class Bar:
    """KV pages of a worker: those that are held, those that are cached, those that are free."""

    kv: Kv

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, total = min(options.max_width, MOST_BAR_CELLS), max(self.kv["total"], 1)
        ends = [min(width * pages // total, width) for pages in (self.kv["held"], self.kv["held"] + self.kv["cached"])]
        marks = "#+." if options.ascii_only else "█▒·"
        counts = ends[0], ends[1] - ends[0], width - ends[1]
        styles = "cyan", "blue", "dim"
        yield Text.assemble(*((mark * n, style) for mark, n, style in zip(marks, counts, styles, strict=True)))


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A column of a table. Where not all fit, those with the largest `rank` are left out first."""

    title: str
    rank: int
    cell: Callable[[Row], str | Bar]
    left: bool = False
    style: Callable[[Row], str] = lambda row: ""
    bar: bool = False

    def width(self, rows: Sequence[Row]) -> int:
        """Of these rows, in cells of the terminal. A bar needs `BAR_CELLS`, and is given what is left over."""
        if self.bar:
            return BAR_CELLS
        return max(map(cell_len, (self.title, *(str(self.cell(row)) for row in rows))))


def _table(
    columns: Sequence[Column[Row]], rows: Sequence[Row], width: int, most: int, total: int = 0
) -> list[RenderableType]:
    """As many of `columns` and `rows` as fit into `width` cells and `most` lines; `total` counts the rows on the server
    where these are not all."""
    total = total or len(rows)
    shown = rows[:most] if total <= most else rows[: most - 1]
    kept = list(columns)
    while len(kept) > 1 and sum(column.width(shown) + GAP for column in kept) - GAP > width:
        kept.remove(max(kept, key=lambda column: column.rank))
    bars = any(column.bar for column in kept)
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold", expand=bars)
    for column in kept:
        justify: Literal["left", "right"] = "left" if column.left else "right"
        table.add_column(column.title, justify=justify, no_wrap=True, ratio=1 if column.bar else None)
    for row in shown:
        cells = [(column.cell(row), column.style(row)) for column in kept]
        table.add_row(*(Text(cell, style) if isinstance(cell, str) else cell for cell, style in cells))
    more = [Text(f"and {total - len(shown):,} more", style="dim")] if len(shown) < total else []
    return [table, *more]


WORKER_COLUMNS: Sequence[Column[WorkerCard]] = (
    Column("worker", 0, lambda w: clean(w["name"]), left=True),
    Column("role", 8, lambda w: w["role"], left=True),
    Column("epoch", 10, lambda w: str(w["epoch"]), style=lambda w: "yellow" if w["epoch"] > 1 else ""),
    Column("turns", 1, lambda w: f"{w['turns']:,}"),
    Column("run", 3, lambda w: f"{w['running']:,}"),
    Column("wait", 4, lambda w: f"{w['waiting']:,}", style=lambda w: "yellow" if w["waiting"] else ""),
    Column("backlog", 2, lambda w: f"{w['queued_prefill_tokens']:,}"),
    Column("prefills", 5, lambda w: f"{w['prefilling']:.0%}"),
    Column("512 tok.", 7, lambda w: _took(w["rates"]["prefill_512"])),
    Column("step", 6, lambda w: _took(w["rates"]["decode_step"])),
    Column("preempted", 9, lambda w: f"{w['preemptions']:,}"),
    Column(
        "heard",
        5,
        lambda w: _span(w["last_heard"]),
        style=lambda w: "red" if (w["last_heard"] or 0) > SILENT_SECONDS else "",
    ),
)
KV_COLUMNS: Sequence[Column[WorkerCard]] = (
    Column("KV pages", 0, lambda w: clean(w["name"]), left=True),
    Column("held, cached, free", 1, lambda w: Bar(w["kv"]), left=True, bar=True),
    Column("held", 2, lambda w: f"{w['kv']['held']:,}"),
    Column("cached", 4, lambda w: f"{w['kv']['cached']:,}"),
    Column("free", 3, lambda w: f"{w['kv']['free']:,}"),
    Column("reserved", 5, lambda w: f"{w['kv']['reserved']:,}"),
    Column("resident", 6, lambda w: f"{w['kv']['resident']:,}"),
    Column("on host", 7, lambda w: f"{w['kv']['host_used']:,}/{w['kv']['host_total']:,}"),
)
LINK_COLUMNS: Sequence[Column[LinkCard]] = (
    Column("KV moved", 0, lambda k: f"{clean(k['source'])} -> {clean(k['destination'])}", left=True),
    Column("moves", 1, lambda k: f"{k['moves']:,}"),
    Column("bytes", 2, lambda k: format_bytes(k["bytes"])),
    Column("GB/s", 3, lambda k: "" if k["bandwidth"] is None else f"{k['bandwidth'] / 1e9:.2f}"),
)
CONVERSATION_COLUMNS: Sequence[Column[ConversationCard]] = (
    Column("conversation", 0, lambda c: _short(clean(c["id"])), left=True),
    Column("state", 1, lambda c: c["state"], left=True, style=lambda c: STATES[c["state"]]),
    Column("home", 2, lambda c: clean(c["home"] or ""), left=True),
    Column("turns", 3, lambda c: f"{c['turns']:,}"),
    Column("tokens", 4, lambda c: f"{c['tokens']:,}"),
    Column("KV pages", 6, lambda c: f"{c['kv_pages']:,}"),
    Column("moves", 7, lambda c: f"{c['moves']:,}"),
    Column("edits", 8, lambda c: f"{c['edits']:,}"),
    Column("idle", 5, lambda c: _span(c["idle"]) if c["state"] == "idle" else ""),
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
