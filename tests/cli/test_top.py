"""`miniserve top`: what is drawn of given answers, and how it bears servers that go, hang, refuse and come back."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from miniserve.cli import main as cli
from miniserve.cli import top as terminal_top
from miniserve.cli.screen import Bar, Snapshot, clean, screen
from miniserve.cli.top import Polled
from miniserve.config import ConfigError
from miniserve.hub import resolve as hub
from miniserve.monitor.conversation_views import conversation_list
from miniserve.monitor.worker_views import worker_list
from miniserve.text.tokenizer import Tokenizer
from tests.api.test_openai import make_app, serving
from tests.support.fake_engine import FakeClient, played

URL = "http://here/v1"


def snapshot(now: float = 1000.0) -> Snapshot:
    scheduler = played(now)
    return Snapshot(worker_list(scheduler, "conserve", now), conversation_list(scheduler, now, 100))


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


def draw(seen: Snapshot | None, width: int = 100, height: int = 30, **more: Any) -> list[str]:
    """The lines, without colours."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    console.print(screen(URL, seen, width, height, **more))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def row(lines: list[str], begins: str) -> list[str]:
    """The words of the one line that begins so."""
    (line,) = [line for line in lines if line.startswith(begins + " ")]
    return line.split()


# --- drawing --------------------------------------------------------------------------------------------------------


def test_all_there_is_fits_on_a_usual_terminal() -> None:
    lines = draw(snapshot())
    assert lines[:3] == [f"miniserve at {URL}, policy conserve", "2 workers, 1 turn queued, 5 conversations known", ""]
    titles = "worker role epoch turns run wait backlog prefills 512 tok. step preempted heard"
    assert row(lines, "worker") == titles.split()
    workers = lines.index(next(line for line in lines if line.startswith("worker")))
    assert lines[workers + 2].split()[:8] == ["d0", "decoder", "1", "1", "1", "0", "0", "1%"]
    assert lines[workers + 2].split()[-3:] == ["3", "1.5", "s"]
    kv = lines.index(next(line for line in lines if line.startswith("KV pages")))
    assert lines[kv].split()[-5:] == ["held", "cached", "free", "reserved", "resident"]
    assert lines[kv + 2].split()[2:] == ["25", "15", "60", "4", "14"]
    assert row(lines, "KV moved")[2:] == ["moves", "bytes", "GB/s"]
    assert row(lines, "p0 -> d0")[3:] == ["4", "64KiB", "0.00"]
    titles = "conversation state home turns tokens KV pages moves edits idle"
    assert row(lines, "conversation") == titles.split()
    assert row(lines, "late") == ["late", "queued", "0", "0", "0", "0", "0"]
    assert row(lines, "busy") == ["busy", "running", "d0", "0", "0", "4", "0", "0"]
    assert row(lines, "c1") == ["c1", "idle", "d0", "2", "86", "6", "0", "0", "1", "min"]


@pytest.mark.parametrize("width", [200, 100, 80, 60, 40, 20, 8])
@pytest.mark.parametrize("height", [40, 30, 24, 20, 12, 8, 4])
@pytest.mark.parametrize("seen", [snapshot(), many(1, 2), many(5, 100)], ids=["usual", "small", "large"])
def test_nothing_is_wider_or_longer_than_the_terminal(seen: Snapshot, width: int, height: int) -> None:
    lines = draw(seen, width, height)
    assert max(map(cell_len, lines)) <= width
    if width >= 40:
        assert len(lines) <= max(height, 3)
        assert height < 8 or any(line.startswith("conversation ") for line in lines)
        assert height < 12 or any(line.startswith("worker ") for line in lines)


def test_what_matters_least_leaves_first() -> None:
    head = row(draw(snapshot(), 60, 20), "worker")
    assert head[:2] == ["worker", "turns"]
    assert not {"preempted", "epoch", "role"} & set(head)
    lines = draw(snapshot(), 60, 20)
    assert row(lines, "KV pages")[-2:] == ["free", "reserved"]
    assert row(lines, "conversation")[:5] == ["conversation", "state", "home", "turns", "tokens"]
    assert [line.split()[0] for line in draw(snapshot(), 80, 8)][2:] == [
        "worker",
        "p0",
        "d0",
        *["conversation", "late"],
        "and",
    ]


def test_what_does_not_fit_is_counted() -> None:
    lines = draw(many(5, 100), 100, 30)
    shown = sum(line.startswith("0000") for line in lines)
    assert shown >= 5
    assert lines[-1] == f"and {100 - shown} more"
    assert len(lines) == 30
    assert "and 18 more" in lines, "of 20 links two are left"
    assert all(len(draw(many(5, n), 100, 2**31)) == 40 + n for n in (1, 100)), "paper has no end"
    seen = many(2, 20)
    seen.conversations["total"] = 5000
    for height in (2**31, 40):
        *_, last, more = draw(seen, 100, height)
        assert int(last[:8]) + 1 + int(more.split()[1].replace(",", "")) == 5000, "those that were not sent are counted"


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
    assert row(lines, "KV pages")[-2:] == ["on", "host"]
    assert [line.split()[-1] for line in lines if line.startswith(("p0 ", "d0 "))][2:4] == ["1,200/4,000", "0/0"]


@pytest.mark.parametrize(
    ("held", "cached", "total", "bar"),
    [
        (25, 50, 100, "███▒▒▒▒▒▒···"),
        (0, 0, 100, "············"),
        (100, 0, 100, "████████████"),
        (0, 100, 100, "▒▒▒▒▒▒▒▒▒▒▒▒"),
        (0, 0, 0, "············"),
        (300, 300, 100, "████████████"),
    ],
)
def test_the_bar_is_to_scale(held: int, cached: int, total: int, bar: str) -> None:
    kv = snapshot().workers["data"][0]["kv"]
    console = Console(file=io.StringIO(), width=12, color_system=None)
    console.print(Bar({**kv, "held": held, "cached": cached, "total": total}))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == bar + "\n"


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
        ("0123456789" * 5, "0123456789012…67890123456789"),
        ("x" * 250 + "y" * 6, "x" * 13 + "…" + "x" * 8 + "y" * 6),
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
        console.print(screen(URL, seen, width, 30))
        assert isinstance(console.file, io.StringIO)
        plain = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())
        assert all(c == "\n" or c.isprintable() for c in plain)
        (line,) = [line for line in plain.splitlines() if "  running" in line]
        assert line.startswith(shown[:10])
        if width == 100:
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


def test_a_server_that_is_not_there_yet() -> None:
    assert draw(None) == [f"miniserve at {URL}", "Asking it for the first time."]
    assert draw(None, problem="Nobody [b]answers\x1b.")[1:] == ["Nobody [b]answers\ufffd. Still trying."]


def test_a_server_that_has_gone() -> None:
    """What was seen of it stays, and is told to be old."""
    lines = draw(snapshot(), problem="No server answers.", age=75)
    assert lines[1] == "No server answers. Still trying; what follows is 1 min old."
    assert lines[2:] == draw(snapshot())[2:]
    narrow = draw(snapshot(), 40, 20, problem="No server answers at http://somewhere/v1 (Connection refused).", age=3)
    assert narrow[1:4] == [
        "No server answers at http://somewhere/v1",
        "(Connection refused). Still trying; what",
        "follows is 3.0 s old.",
    ]
    assert len(narrow) <= 20


# --- polling --------------------------------------------------------------------------------------------------------


class Scripted:
    """A server with the answers of `snapshot()`, or what `reply` gives: a status and a body."""

    def __init__(self, port: int = 0) -> None:
        seen = snapshot()
        bodies = {"/v1/workers": seen.workers, "/v1/conversations": seen.conversations}
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.reply: Callable[[str], tuple[int, bytes]] = lambda path: (200, json.dumps(bodies[path]).encode())
        script = self

        class Replies(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                script.paths.append(self.path)
                script.keys.append(self.headers["Authorization"])
                status, body = script.reply(self.path.partition("?")[0])
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(OSError):  # nobody waits for it any more
                    self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Replies)
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MINISERVE_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Scripted]:
    scripted = Scripted()
    yield scripted
    scripted.close()


@pytest.fixture
def nobody() -> Iterator[str]:
    """A URL where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{free.getsockname()[1]}/v1"


def told(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line of a failure."""
    assert cli.main(["top", *flags]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line


@pytest.mark.parametrize("flags", [["--once"], []])
def test_one_snapshot_is_printed(server: Scripted, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    """Without --once too: nobody looks at a terminal."""
    assert cli.main(["top", "--url", server.url, "--api-key", "k", *flags]) == 0
    out, err = capsys.readouterr()
    assert (err, "\x1b" in out) == ("", False)
    lines = [line.rstrip() for line in out.splitlines()]
    assert lines[0] == f"miniserve at {server.url}, policy conserve"
    assert row(lines, "team/a")[:4] == ["team/a", "idle", "d0", "1"]
    assert server.paths == ["/v1/workers", "/v1/conversations?limit=20"]
    assert server.keys == ["Bearer k"] * 2


def test_characters_that_a_terminal_has_not(server: Scripted) -> None:
    command = [sys.executable, "-m", "miniserve", "top", "--url", server.url]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "100"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "####" in done.stdout


def test_no_server_says_how_to_start_one(nobody: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = told(capsys, "--url", nobody, "--once")
    assert line.startswith(f"miniserve: No server answers at {nobody} (Connection refused).")
    assert "`miniserve serve`" in line


@pytest.mark.parametrize("flags", [["--once"], []])
def test_what_is_no_url(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    assert "write it like http://127.0.0.1:8000/v1" in told(capsys, "--url", "127.0.0.1:8000", *flags)


async def test_a_server_that_asks_for_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    """The real API."""
    tokenizer = Tokenizer.load(hub.resolve("smollm2-135m", load_format="dummy").folder)
    async with serving(make_app(tokenizer, FakeClient(), api_key="k")) as port:
        flags = ["--url", f"http://127.0.0.1:{port}/v1", "--once"]
        assert "--api-key" in await asyncio.to_thread(told, capsys, *flags)
        assert "--api-key" in await asyncio.to_thread(told, capsys, *flags, "--api-key", "other")
        assert await asyncio.to_thread(cli.main, ["top", *flags, "--api-key", "k"]) == 0
    assert "5 conversations known" in capsys.readouterr().out


@pytest.mark.parametrize("body", [b"<html>", b"\xff", b"[]", b'{"object": "list", "data": []}', b""])
def test_what_is_no_miniserve(server: Scripted, capsys: pytest.CaptureFixture[str], body: bytes) -> None:
    server.reply = lambda path: (200, body)
    line = told(capsys, "--url", server.url, "--once")
    assert line.startswith(f"miniserve: {server.url} is no miniserve of this version: what GET /workers gives")


def test_a_url_without_v1(server: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    server.reply = lambda path: (404, b'{"error": {"message": "There is nothing at GET /workers."}}')
    line = told(capsys, "--url", server.url.removesuffix("/v1"), "--once")
    assert line == "miniserve: The server says: There is nothing at GET /workers. Does --url end in /v1?"


def test_a_server_that_does_not_answer(
    server: Scripted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = threading.Event()
    server.reply = lambda path: (200, b"late" if hangs.wait(10) else b"")
    monkeypatch.setattr(terminal_top, "PATIENCE_SECONDS", 0.2)
    assert "has not answered for 0.2 s" in told(capsys, "--url", server.url, "--once")
    hangs.set()


def test_an_answer_that_nobody_waits_for_any_more(server: Scripted) -> None:
    hangs, polled = threading.Event(), Polled(server.url, None)
    server.reply = lambda path: (200, b"late" if hangs.wait(10) else b"")
    polled.hang_up()  # before there is anything
    asked = terminal_top._ask(polled, 10)
    while not server.paths:
        time.sleep(0.01)
    polled.hang_up()
    error = asked.exception(5)
    hangs.set()
    assert isinstance(error, ConfigError)
    assert "has not answered" in str(error)


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "often", "1e9"])
def test_how_often_may_be_asked(interval: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["top", "--interval", interval])
    assert end.value.code == 2
    assert "is not a number of seconds from 0.1 to 3600" in capsys.readouterr().err


def test_help_needs_no_heavy_import() -> None:
    heavy = "{'torch', 'transformers', 'fastapi', 'uvicorn', 'zmq', 'numpy', 'rich'}"
    program = (
        "import sys, miniserve.cli.main as cli\ntry:\n    cli.main(['top', '--help'])\n"
        f"except SystemExit as end:\n    sys.exit(end.code or sorted({heavy} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "backlog" in done.stdout


# --- a terminal -----------------------------------------------------------------------------------------------------


class Terminal:
    """`miniserve top` at a terminal of its own."""

    def __init__(self, url: str, columns: int = 100, lines: int = 30) -> None:
        self.controller, self.terminal = pty.openpty()
        self.resize(columns, lines)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "miniserve", "top", "--url", url, "--interval", "0.1"],
            stdin=self.terminal,
            stdout=self.terminal,
            stderr=self.terminal,
            env=os.environ | {"TERM": "xterm-256color"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # its Ctrl-C is a signal to it
        )
        self.written = b""

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read(self) -> None:
        while select.select([self.controller], [], [], 0.1)[0]:
            self.written += os.read(self.controller, 65536)

    def frame(self) -> list[str]:
        """The lines of the last screen that was drawn to its end."""
        last = self.written.decode("utf-8", "replace").split("\x1b[H")[-1]
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", last).split("\r\n")

    def see(self, text: str) -> list[str]:
        """Wait for a screen with `text`; its lines."""
        deadline = time.monotonic() + 30
        while text not in "\n".join(self.frame()):
            assert time.monotonic() < deadline, self.frame()
            self.read()
        self.read()
        return self.frame()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.controller)
        os.close(self.terminal)


@pytest.fixture
def at() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_at(*args: Any) -> Terminal:
        opened.append(Terminal(*args))
        return opened[-1]

    yield open_at
    for terminal in opened:
        terminal.close()


@pytest.mark.parametrize("key", [b"\x03", b"q", b"xyzQ"], ids=["Ctrl-C", "q", "keys"])
def test_it_leaves_the_terminal_as_it_was(server: Scripted, at: Callable[..., Terminal], key: bytes) -> None:
    terminal = at(server.url)
    before = termios.tcgetattr(terminal.terminal)
    lines = terminal.see("team/a")
    assert len(lines) == 30
    assert {len(line) for line in lines} == {100}
    assert b"\x1b[?1049h" in terminal.written, "a screen of its own"
    assert b"\x1b[2J" not in terminal.written, "which is never cleared, as that would flicker"
    os.write(terminal.controller, key)
    assert terminal.process.wait(10) == 0
    terminal.read()
    assert terminal.written.rstrip().endswith(b"\x1b[?25h\x1b[?1049l"), "the cursor, and the screen from before"
    assert b"xyz" not in terminal.written
    assert termios.tcgetattr(terminal.terminal) == before


def test_sigterm_gives_the_terminal_back(server: Scripted, at: Callable[..., Terminal]) -> None:
    terminal = at(server.url)
    terminal.see("team/a")
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.process.wait(10) == 143
    terminal.read()
    assert b"\x1b[?1049l" in terminal.written


def test_the_terminal_changes_its_size(server: Scripted, at: Callable[..., Terminal]) -> None:
    terminal = at(server.url, 60, 20)
    assert (len(terminal.see("team/a")), len(terminal.frame()[0])) == (20, 60)
    terminal.resize(120, 40)
    terminal.see("epoch")
    assert (len(terminal.frame()), len(terminal.frame()[0])) == (40, 120)
    assert "/v1/conversations?limit=40" in server.paths
    terminal.resize(30, 6)
    terminal.see("and 4 more")
    assert (len(terminal.frame()), len(terminal.frame()[0])) == (6, 30)


def test_a_server_goes_and_comes_back(nobody: str, at: Callable[..., Terminal]) -> None:
    server = Scripted()
    terminal = at(server.url)
    terminal.see("5 conversations known")
    server.close()
    lines = terminal.see("No server answers")
    assert any("Still trying" in line for line in lines)
    assert any(line.startswith("team/a") for line in lines), "what was seen stays"
    again = Scripted(server.port)
    terminal.see("5 conversations known")
    again.reply = lambda path: (401, b'{"error": {"message": "send the one given to --api-key"}}')
    terminal.see("The server says: send the one given to --api-key")
    assert terminal.process.poll() is None
    os.write(terminal.controller, b"\x03")
    assert terminal.process.wait(10) == 0
    again.close()


def test_it_waits_for_a_server_that_is_not_there_yet(nobody: str, at: Callable[..., Terminal]) -> None:
    terminal = at(nobody)
    terminal.see("Still trying.")
    os.write(terminal.controller, b"\x03")
    assert terminal.process.wait(10) == 0
