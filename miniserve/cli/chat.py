"""`miniserve chat`: a conversation in the terminal, over the OpenAI API of a running server."""

from __future__ import annotations

import http.client
import json
import sys
import time
import urllib.parse
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from miniserve.config import ConfigError

HELP = "/reset begins anew, /system TEXT sets a system message, /exit or Ctrl-D leaves, Ctrl-C ends an answer."
CONNECT_SECONDS = 10.0
BROKEN = (OSError, http.client.HTTPException)


@dataclass
class Server:
    """An OpenAI API at `url` (ends in /v1)."""

    url: str
    api_key: str | None

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        """Send a request; the reply is open. Raises `ConfigError` if no server answers, or with the server's words."""
        connection, base = self._connection()
        headers = {"Content-Type": "application/json", **(headers or {})}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            connection.connect()
            connection.sock.settimeout(None)  # to be there is one thing, to answer may take its time
            connection.request(method, base + path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                said = _message(response.read()) or response.reason
                if response.status == 404 and not base.endswith("/v1"):
                    said = f"{said.rstrip('.')}. Does --url end in /v1?"
                raise ConfigError(f"The server says: {said}")
        except BROKEN as error:
            connection.close()
            raise ConfigError(
                f"No server answers at {self.url} ({getattr(error, 'strerror', None) or error}). Start one with "
                "`miniserve serve`, or name another with --url."
            ) from error
        except BaseException:  # Ctrl-C too: the server sees that nobody waits
            connection.close()
            raise
        return Reply(connection, response)

    def _connection(self) -> tuple[http.client.HTTPConnection, str]:
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        try:
            parts = urllib.parse.urlsplit(self.url)
            kind = kinds[parts.scheme if parts.hostname else ""]
            return kind(parts.hostname or "", parts.port, timeout=CONNECT_SECONDS), parts.path.rstrip("/")
        except (ValueError, KeyError) as error:
            raise ConfigError(f"--url {self.url!r} is no address: write it like http://127.0.0.1:8000/v1.") from error

    def first_model(self) -> str:
        """The first model it serves. Raises `ConfigError`."""
        with self.request("GET", "/models") as reply:
            try:
                return str(json.loads(reply.response.read())["data"][0]["id"])
            except (*BROKEN, ValueError, LookupError, TypeError) as error:
                raise ConfigError(f"{self.url} is no OpenAI API: it names no model. Does --url end in /v1?") from error


@dataclass
class Reply:
    """An open reply. Closing it ends the request on the server too."""

    connection: http.client.HTTPConnection
    response: http.client.HTTPResponse

    def events(self) -> Iterator[Any]:
        """Server-sent events until [DONE]. Raises `ConfigError` for an error in the stream, or a stream without end."""
        for data in self._data():
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                raise ConfigError(f"The server says: {_message(data)}")
            yield event
        raise ConfigError("The answer broke off: the server has gone. Is it still running?")

    def _data(self) -> Iterator[bytes]:
        try:
            for line in self.response:
                if line.startswith(b"data:"):
                    yield line[5:].strip()
        except BROKEN:
            return  # no [DONE] has come: that says it

    def __enter__(self) -> Reply:
        return self

    def __exit__(self, *error: object) -> None:
        self.response.close()  # it, not the connection, holds the socket where a server does not keep connections
        self.connection.close()


@dataclass
class Conversation:
    """What was said so far, and the id the server knows it by."""

    system: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.system:
            self.messages.append({"role": "system", "content": self.system})


def chat(url: str, api_key: str | None, system: str, options: dict[str, Any]) -> int:
    """Read lines, print answers, until the input ends. Raises `ConfigError` if there is no server.

    `options` go into each request; without a "model" it is the server's first.
    """
    server = Server(url, api_key)
    options = {"model": server.first_model(), **options} if "model" not in options else options
    person = sys.stdin.isatty()
    if person:
        import readline  # noqa: F401 (line editing and history for input())

        print(f"{options['model']} at {url}. {HELP}")
    conversation = Conversation(system)
    while True:
        try:
            line = input("\n> " if person else "").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print()
            continue
        command, _, rest = line.partition(" ")
        if command in ("/exit", "/quit"):
            return 0
        elif command == "/help":
            print(HELP)
        elif command == "/reset":
            conversation = Conversation(conversation.system)
        elif command == "/system":
            conversation = Conversation(rest.strip())
        elif command.rfind("/") == 0:  # a path has more of them
            print(f"There is no {command}. {HELP}")
        elif line:
            _turn(server, conversation, options, line, person)


def _turn(server: Server, conversation: Conversation, options: dict[str, Any], line: str, person: bool) -> None:
    """Say `line` and print the answer. A person is told what went wrong; without one, raises `ConfigError`."""
    conversation.messages.append({"role": "user", "content": line})
    try:
        answer, summary = _answer(server, conversation, options)
    except ConfigError as error:
        del conversation.messages[-1]
        if not person:
            raise
        print(f"\n{error}")
        return
    if answer:
        conversation.messages.append({"role": "assistant", "content": answer})
    else:
        del conversation.messages[-1]  # templates want roles to alternate
    print(f"\n\033[2m{summary}\033[0m" if sys.stdout.isatty() else f"\n[{summary}]")


def _answer(server: Server, conversation: Conversation, options: dict[str, Any]) -> tuple[str, str]:
    """Stream an answer to the terminal; the text (what there is of it after Ctrl-C), and a line about its speed.
    Reasoning is shown, but is no part of the text."""
    body = {**options, "messages": conversation.messages, "stream": True, "stream_options": {"include_usage": True}}
    text: list[str] = []
    times: list[float] = []
    usage: dict[str, Any] = {}
    thinking = False
    started = time.perf_counter()
    try:
        with server.request("POST", "/chat/completions", body, {"X-Conversation-ID": conversation.id}) as reply:
            for event in reply.events():
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    piece, thought = (choice["delta"].get(key) or "" for key in ("content", "reasoning"))
                    if not (piece or thought):
                        continue
                    times.append(time.perf_counter() - started)
                    text.append(piece)
                    print("\n\n" * bool(thinking and piece) + piece + thought, end="", flush=True)
                    thinking = bool(thought)
    except KeyboardInterrupt:
        print(" [ended]", end="")
    return "".join(text), _summary(times, usage)


def _summary(times: list[float], usage: dict[str, Any]) -> str:
    """`times`: seconds at which pieces of text came."""
    parts = [f"first token {times[0]:.2f} s" if times else "no text"]
    if usage:
        output = usage["completion_tokens"]
        if output > 1 and times[-1:] > times[:1]:
            parts.append(f"{(output - 1) / (times[-1] - times[0]):.1f} tok/s")
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        parts += [f"{output} tokens", f"prompt {usage['prompt_tokens']} tokens", f"{cached} cached"]
    return ", ".join(parts)


def _message(data: bytes) -> str:
    try:
        return str(json.loads(data)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return data.decode("utf-8", "replace")[:300]
