"""What `miniserve top` draws of given answers."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from miniserve.cli.screen import Snapshot, bar, clean, screen
from tests.support.scripted import snapshot

URL = "http://here/v1"


def many(workers: int, conversations: int) -> Snapshot:
    """A large server: links between all workers, long ids and numbers."""
    seen = snapshot()
    one = copy.deepcopy(seen.workers["data"][1])
    one["kv"] |= {"total": 10**6, "free": 10**6 - 7, "host_total": 10**6, "host_used": 12_345}
    names = [f"d{i}" for i in range(workers)]
    seen.workers["data"] = [{**one, "name": name} for name in names]
    link = seen.workers["links"][0]
    seen.workers["links"] = [{**link, "source": a, "destination": b} for a in names for b in names if a != b]
    card = seen.conversations["data"][0]
    seen.conversations["data"] = [{**card, "id": f"{i:08}" * 8, "tokens": 10**6} for i in range(conversations)]
    seen.conversations["total"] = conversations
    return seen


def draw(seen: Snapshot | None, width: int = 100, most: int | None = None, **more: Any) -> list[str]:
    """The lines, without colours."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    console.print(screen(URL, seen, most, **more))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def row(lines: list[str], begins: str) -> list[str]:
    """The words of the one line that begins so."""
    (line,) = [line for line in lines if line.startswith(begins + " ")]
    return line.split()


def test_all_there_is_fits_on_a_usual_terminal() -> None:
    lines = draw(snapshot(), 80)
    assert lines[:3] == [f"miniserve at {URL}, policy conserve", "2 workers, 1 turn queued, 5 conversations known", ""]
    titles = "worker epoch turns run wait backlog prefills 512 tok. step preempted heard"
    assert row(lines, "worker") == titles.split()
    workers = lines.index(next(line for line in lines if line.startswith("worker")))
    assert lines[workers + 2].split()[:7] == ["d0", "1", "1", "1", "0", "0", "1%"]
    assert lines[workers + 2].split()[-3:] == ["3", "1.5", "s"]
    kv = lines.index(next(line for line in lines if line.startswith("KV pages")))
    assert lines[kv].split()[-7:] == ["held", "cached", "free", "reserved", "resident", "on", "host"]
    assert lines[kv + 2].split()[1:] == ["####++..........", "25", "15", "60", "4", "14", "0/0"]
    assert row(lines, "KV moved")[2:] == ["moves", "bytes", "GB/s"]
    assert row(lines, "p0 -> d0")[3:] == ["4", "64KiB", "0.00"]
    titles = "conversation state home turns tokens KV pages moves edits idle"
    assert row(lines, "conversation") == titles.split()
    assert row(lines, "late") == ["late", "queued", "0", "0", "0", "0", "0"]
    assert row(lines, "busy") == ["busy", "running", "d0", "0", "0", "4", "0", "0"]
    assert row(lines, "c1") == ["c1", "idle", "d0", "2", "86", "6", "0", "0", "1", "min"]


@pytest.mark.parametrize("width", [200, 100, 80, 60, 40, 20])
@pytest.mark.parametrize("seen", [snapshot(), many(1, 2), many(5, 100)], ids=["usual", "small", "large"])
def test_nothing_is_wider_than_the_terminal(seen: Snapshot, width: int) -> None:
    lines = draw(seen, width)
    assert max(map(cell_len, lines)) <= width
    assert width < 80 or not any("…" in line for line in lines if not line.startswith("0000"))


def test_what_is_not_shown_is_counted() -> None:
    lines = draw(many(5, 100), most=2)
    assert sum(line.startswith("0000") for line in lines) == 100
    assert lines.count("and 3 more") == 2, "of five workers two are left, in both tables"
    assert "and 18 more" in lines, "of 20 links two are left"
    assert not any("more" in line for line in draw(many(5, 100))), "paper has no end"
    seen = many(2, 20)
    seen.conversations["total"] = 5000
    assert draw(seen)[-1] == "and 4,980 more", "those that were not sent are counted"


def test_no_workers_and_no_conversations() -> None:
    seen = snapshot()
    seen.workers["data"].clear()
    seen.workers["links"].clear()
    seen.conversations.update({"data": [], "total": 0})
    assert draw(seen)[1:] == ["0 workers, 1 turn queued, 0 conversations known"]


def test_host_memory_is_shown_where_there_is_any() -> None:
    seen = snapshot()
    seen.workers["data"][0]["kv"] |= {"host_total": 4000, "host_used": 1200}
    lines = draw(seen)
    assert [line.split()[-1] for line in lines if line.startswith(("p0 ", "d0 "))][2:4] == ["1,200/4,000", "0/0"]


@pytest.mark.parametrize(
    ("held", "cached", "total", "drawn"),
    [
        (25, 50, 100, "####++++++++...."),
        (0, 0, 100, "................"),
        (100, 0, 100, "################"),
        (0, 100, 100, "++++++++++++++++"),
        (0, 0, 0, "................"),
        (300, 300, 100, "################"),
    ],
)
def test_the_bar_is_to_scale(held: int, cached: int, total: int, drawn: str) -> None:
    kv = snapshot().workers["data"][0]["kv"]
    assert bar({**kv, "held": held, "cached": cached, "total": total}).plain == drawn


@pytest.mark.parametrize(
    ("id", "shown"),
    [
        ("[red]x[/red]", "[red]x[/red]"),
        ("[/nothing]", "[/nothing]"),
        (":smile: [link=x]", ":smile: [link=x]"),
        ("\x1b[2J\x1b]0;title\x07", "\ufffd[2J\ufffd]0;title\ufffd"),
        ("a\r\nb\tc\x7f\x9b1m", "a\ufffd\ufffdb\ufffdc\ufffd\ufffd1m"),
        ("\u202eevil\u200b", "\ufffdevil\ufffd"),
        ("e\u0301" + "\u0334" * 3, "é" + "\ufffd" * 3),
        ("日本語😀", "日本語😀"),
        ("0123456789" * 5, "01234567890…890123456789"),
        ("x" * 250 + "y" * 6, "x" * 11 + "…" + "x" * 6 + "y" * 6),
        (" ", " "),
    ],
)
def test_ids_are_only_text(id: str, shown: str) -> None:
    seen = snapshot()
    seen.conversations["data"][1]["id"] = id
    for width in (100, 40):
        console = Console(
            file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor", legacy_windows=False
        )
        console.print(screen(URL, seen))
        assert isinstance(console.file, io.StringIO)
        plain = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())
        assert all(c == "\n" or c.isprintable() for c in plain)
        if width == 100:
            (line,) = [line for line in plain.splitlines() if " running" in line]
            assert line.startswith(shown + " ")


def test_names_of_workers_are_only_text() -> None:
    seen = snapshot()
    seen.workers["policy"] = "[bold]\x1b[2J"
    seen.workers["data"][0]["name"] = seen.workers["links"][0]["source"] = "[p0]\x1b"
    seen.conversations["data"][1]["home"] = "[d0]\x1b"
    text = "\n".join(draw(seen))
    assert "\x1b" not in text
    assert "policy [bold]\ufffd[2J" in text
    assert text.count("[p0]\ufffd") == 3
    assert text.count("[d0]\ufffd") == 1


def test_no_more_than_asked_is_cleaned() -> None:
    assert clean("x" * 10**6, 50) == "x" * 50


def test_the_header_alone_before_the_first_answer() -> None:
    assert draw(None) == [f"miniserve at {URL}", "Asking it for the first time."]
    assert draw(None, problem="Nobody [b]answers\x1b.")[1:] == ["Nobody [b]answers\ufffd. Still trying."]


def test_the_last_answer_stays_when_the_server_has_gone() -> None:
    """What was seen of it stays, and is called old."""
    lines = draw(snapshot(), problem="No server answers.", age=75)
    assert lines[1] == "No server answers. Still trying; what follows is 1 min old."
    assert lines[2:] == draw(snapshot())[2:]
    narrow = draw(snapshot(), 40, problem="No server answers at http://somewhere/v1 (Connection refused).", age=3)
    assert narrow[1:4] == [
        "No server answers at http://somewhere/v1",
        "(Connection refused). Still trying; what",
        "follows is 3.0 s old.",
    ]
