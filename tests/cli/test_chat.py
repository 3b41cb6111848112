"""`miniserve chat` against a scripted server: what it sends, what it shows, and how it bears what goes wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from miniserve.cli import main as cli
from tests.support.scripted import Replies, ScriptedServer
from tests.support.terminal import PATIENCE_SECONDS, Terminal, environment

USAGE = {"prompt_tokens": 40, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 32}}


def chunk(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


def send(handler: Replies, *events: Any) -> None:
    """Some events, as chunks of HTTP."""
    for event in events:
        data = b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n"
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))


def answer(handler: Replies) -> None:
    send(handler, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}, chunk("Grüß"))
    time.sleep(0.02)
    send(handler, chunk(" Gott"), {"choices": [], "usage": USAGE}, b"[DONE]")
    handler.wfile.write(b"0\r\n\r\n")


class ChatServer(ScriptedServer):
    """A server that notes requests and lets `play` write the body of a stream."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.play: Callable[[Replies], None] = answer
        self.before_headers: Callable[[Replies], None] = lambda handler: None
        self.refuse: tuple[int, bytes] | None = None
        self.models = b'{"data": [{"id": "tiny"}, {"id": "other"}]}'
        script = self

        class Answers(Replies):
            def do_GET(self) -> None:
                if self.path != "/v1/models":
                    return self.nothing()
                self.reply(200, script.models)

            def do_POST(self) -> None:
                script.headers.append({name.lower(): value for name, value in self.headers.items()})
                script.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                if self.path != "/v1/chat/completions":
                    return self.nothing()
                if script.refuse is not None:
                    return self.reply(*script.refuse)
                script.before_headers(self)
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.send_header("Connection", "close")
                self.end_headers()
                script.play(self)
                self.close_connection = True

            def nothing(self) -> None:
                message = f"There is nothing at {self.command} {self.path}."
                self.reply(404, json.dumps({"error": {"message": message}}).encode())

        super().__init__(Answers)

    def chat(self, lines: str, *flags: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Say `lines` to it through a pipe; `more` is added to the environment."""
        return say(self.url, lines, *flags, **more)

    def said(self, number: int) -> list[tuple[str, str]]:
        """The messages of a request: (role, content)."""
        return [(message["role"], message["content"]) for message in self.bodies[number]["messages"]]


def command(url: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", "miniserve", "chat", "--url", url, *flags]


def say(url: str, lines: str, *flags: str, **more: str) -> subprocess.CompletedProcess[str]:
    env = environment(PYTHONIOENCODING="utf-8", **more)
    return subprocess.run(
        command(url, *flags), input=lines, capture_output=True, text=True, timeout=PATIENCE_SECONDS, env=env
    )


@pytest.fixture
def server() -> Iterator[ChatServer]:
    scripted = ChatServer()
    yield scripted
    scripted.close()


# --- a conversation -------------------------------------------------------------------------------------------------


def test_history_grows_under_one_conversation_id(server: ChatServer) -> None:
    done = server.chat("Hello\n\nAgain\n/reset\nAnew\n/exit\nnever\n", "--system", "Be brief.")
    assert (done.returncode, done.stderr) == (0, "")
    system, said = ("system", "Be brief."), ("assistant", "Grüß Gott")
    assert [server.said(i) for i in range(len(server.bodies))] == [
        [system, ("user", "Hello")],
        [system, ("user", "Hello"), said, ("user", "Again")],
        [system, ("user", "Anew")],
    ]
    first, second, third = (headers["x-conversation-id"] for headers in server.headers)
    assert first == second != third
    assert done.stdout.count("Grüß Gott\n[first token ") == 3


def test_speed_and_usage_follow_an_answer(server: ChatServer) -> None:
    shown = server.chat("Hello\n").stdout.splitlines()[1]
    assert shown.startswith("[first token 0.")
    assert " tok/s, 3 tokens, prompt 40 tokens, 32 cached]" in shown


def test_system_message_and_help(server: ChatServer) -> None:
    done = server.chat("/help\n/system Rhyme.\nHello\n/system\nHello\n")
    assert done.stdout.startswith("/reset begins anew")
    assert [server.said(i)[0] for i in (0, 1)] == [("system", "Rhyme."), ("user", "Hello")]


@pytest.mark.parametrize("line", ["/bogus", "/exti", "/Reset", "/systm Rhyme.", "/"])
def test_a_mistyped_command_is_not_sent(server: ChatServer, line: str) -> None:
    done = server.chat(f"{line}\nHello\n")
    assert done.stdout.startswith(f"There is no {line.split()[0]}. /reset begins anew")
    assert [body["messages"] for body in server.bodies] == [[{"role": "user", "content": "Hello"}]]


def test_a_path_is_no_command(server: ChatServer) -> None:
    server.chat("/etc/hosts: what is it?\n")
    assert server.said(0) == [("user", "/etc/hosts: what is it?")]


def test_options_are_sent_only_when_given(server: ChatServer) -> None:
    server.chat("Hello\n")
    server.chat("Hello\n", "--model", "other", "--temperature", "0", "--max-tokens", "5", "--api-key", "secret")
    always = {"messages", "stream", "stream_options", "model"}
    assert server.bodies[0].keys() == always
    assert server.bodies[0]["model"] == "tiny"
    assert "authorization" not in server.headers[0]
    assert server.bodies[1].keys() == always | {"temperature", "max_tokens"}
    assert [server.bodies[1][name] for name in ("model", "temperature", "max_tokens")] == ["other", 0.0, 5]
    assert server.headers[1]["authorization"] == "Bearer secret"


def test_an_answer_without_text_leaves_no_trace(server: ChatServer) -> None:
    server.play = lambda handler: send(handler, {"choices": [], "usage": USAGE | {"completion_tokens": 1}}, b"[DONE]")
    done = server.chat("Hello\nAgain\n")
    assert done.stdout.splitlines()[1] == "[no text, 1 tokens, prompt 40 tokens, 32 cached]"
    assert server.said(1) == [("user", "Again")]


# --- what goes wrong ------------------------------------------------------------------------------------------------


def failure(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a failure."""
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_no_server_says_how_to_start_one(port: int) -> None:
    url = f"http://127.0.0.1:{port}/v1"
    line = failure(say(url, ""))
    assert line.startswith(f"miniserve: No server answers at {url} (Connection refused).")
    assert "`miniserve serve`" in line


def test_proxies_of_the_environment_are_not_asked(server: ChatServer, port: int) -> None:
    proxies = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY"), f"http://127.0.0.1:{port}")
    assert "Grüß Gott" in server.chat("Hello\n", **proxies).stdout


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://x/v1", "http://", "http://x:port/v1", "http://x:99999/v1", "http://[x/v1"]
)
def test_an_address_that_is_none_is_refused(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "--url", url]) == 1
    assert "write it like http://127.0.0.1:8000/v1" in capsys.readouterr().err


@pytest.mark.parametrize("models", [b"<html>", b"[]", b'{"data": []}'])
def test_another_api_is_recognized(server: ChatServer, models: bytes) -> None:
    server.models = models
    assert "Does --url end in /v1?" in failure(server.chat("Hello\n"))


@pytest.mark.parametrize("flags", [[], ["--model", "tiny"]])
def test_a_url_without_v1_is_suspected(server: ChatServer, flags: list[str]) -> None:
    server.url = server.url.removesuffix("/v1")
    line = failure(server.chat("Hello\n", *flags))
    where = "POST /chat/completions" if flags else "GET /models"
    assert line == f"miniserve: The server says: There is nothing at {where}. Does --url end in /v1?"


def test_another_404_does_not_blame_the_url(server: ChatServer) -> None:
    server.refuse = (404, b'{"error": {"message": "There is no model x here."}}')
    assert failure(server.chat("Hello\n", "--model", "x")) == "miniserve: The server says: There is no model x here."


def test_the_servers_own_words_are_shown(server: ChatServer) -> None:
    server.refuse = (400, b'{"error": {"message": "too long", "code": "context_length_exceeded"}}')
    assert failure(server.chat("Hello\n")) == "miniserve: The server says: too long"
    server.refuse = (502, b"")
    assert failure(server.chat("Hello\n")) == "miniserve: The server says: Bad Gateway"


def test_an_error_within_the_stream_is_shown(server: ChatServer) -> None:
    server.play = lambda handler: send(handler, chunk("Gr"), {"error": {"message": "the worker died"}}, b"[DONE]")
    assert failure(server.chat("Hello\n")) == "miniserve: The server says: the worker died"


def test_an_event_ends_at_a_newline_alone(server: ChatServer) -> None:
    """JSON may hold U+2028 and its like as they are."""
    text = "a\u2028b\x85c\u2029d"
    event = json.dumps(chunk(text), ensure_ascii=False).encode()
    server.play = lambda handler: send(handler, event, b"[DONE]")
    assert server.chat("Hello\n").stdout.startswith(text + "\n[first token")


@pytest.mark.parametrize("tail", [b"", b"50\r\ndata: {", b"0\r\n\r\n"], ids=["closed", "within a chunk", "no DONE"])
def test_a_stream_that_breaks_off_is_an_error(server: ChatServer, tail: bytes) -> None:
    def play(handler: Replies) -> None:
        send(handler, chunk("Gr"))
        handler.wfile.write(tail)

    server.play = play
    done = server.chat("Hello\n")
    assert done.stdout == "Gr"
    assert "broke off" in failure(done)


@pytest.mark.parametrize("when", ["before the first token", "within the answer"])
def test_ctrl_c_ends_the_answer_and_not_the_chat(server: ChatServer, when: str) -> None:
    """The server sees the connection close, which is what frees the KV."""
    waiting, gone = threading.Event(), threading.Event()

    def until_gone(handler: Replies) -> None:
        waiting.set()
        handler.connection.settimeout(PATIENCE_SECONDS)
        if handler.connection.recv(1) == b"":
            gone.set()

    def play(handler: Replies) -> None:
        send(handler, chunk("Once upon"))
        until_gone(handler)

    server.play = play
    if when == "before the first token":
        server.before_headers = until_gone
    process = subprocess.Popen(
        command(server.url), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"Tell me a story\n")
    process.stdin.flush()
    if when == "within the answer":
        assert process.stdout.read(9) == b"Once upon"
    assert waiting.wait(PATIENCE_SECONDS)
    process.send_signal(signal.SIGINT)
    assert gone.wait(PATIENCE_SECONDS)
    server.play, server.before_headers = answer, lambda handler: None
    out, errors = process.communicate(b"Hello\n", timeout=PATIENCE_SECONDS)
    assert (process.returncode, errors) == (0, b"")
    assert b" [ended]\n" in out
    assert "Grüß Gott".encode() in out
    story = [("user", "Tell me a story"), ("assistant", "Once upon")]
    assert server.said(1) == [*(story if when == "within the answer" else []), ("user", "Hello")]


def test_a_person_at_a_terminal_may_try_again(server: ChatServer, tmp_path: Path) -> None:
    server.refuse = (503, b'{"error": {"message": "queue full"}}')
    terminal = Terminal("chat", "--url", server.url, HOME=str(tmp_path), TERM="dumb", PYTHONIOENCODING="utf-8")
    try:
        terminal.read_until("tiny at ")
        terminal.read_until("> ")
        terminal.press(b"Hello\n")
        terminal.read_until("The server says: queue full")
        terminal.read_until("> ")
        server.refuse = None
        terminal.press(b"Hello\n")
        terminal.read_until("Grüß Gott")
        terminal.read_until("32 cached")
        terminal.read_until("> ")
        assert server.said(1) == [("user", "Hello")]
        terminal.press(b"\x04")
        assert terminal.ends() == 0
    finally:
        terminal.close()
