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


@dataclass
class Server:
    """An OpenAI API at `url` (ends in /v1)."""

    url: str
    api_key: str | None

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        """Send a request; the reply is open. Raises `ConfigError` if no server answers, or with the server's words."""
        parts = urllib.parse.urlsplit(self.url)
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        if parts.scheme not in kinds or not parts.hostname:
            raise ConfigError(f"--url {self.url!r} is not understood: give something like http://127.0.0.1:8000/v1.")
        connection = kinds[parts.scheme](parts.hostname, parts.port)
        headers = {"Content-Type": "application/json", **(headers or {})}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, parts.path.rstrip("/") + path, data, headers)
            response = connection.getresponse()
        except OSError as error:
            raise ConfigError(
                f"No server answers at {self.url} ({error.strerror or error}). Start one with `miniserve serve`, or "
                "name another with --url."
            ) from error
        if response.status != 200:
            raise ConfigError(f"The server says: {_message(response.read())}")
        return Reply(connection, response)


@dataclass
class Reply:
    """An open reply. Closing it ends the request on the server too."""

    connection: http.client.HTTPConnection
    response: http.client.HTTPResponse

    def json(self) -> Any:
        """All of it."""
        with self:
            return json.loads(self.response.read())

    def events(self) -> Iterator[Any]:
        """Server-sent events until [DONE]. Raises `ConfigError` with an error in the stream."""
        for line in self.response:
            if line.startswith(b"data: ") and (data := line[6:].strip()) != b"[DONE]":
                event = json.loads(data)
                if "error" in event:
                    raise ConfigError(f"The server says: {_message(data)}")
                yield event

    def __enter__(self) -> Reply:
        return self

    def __exit__(self, *error: object) -> None:
        self.connection.close()


@dataclass
class Conversation:
    """What was said so far, and the id the server knows it by."""

    system: str | None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.system:
            self.messages.append({"role": "system", "content": self.system})


def chat(
    url: str,
    model: str | None,
    system: str | None,
    temperature: float | None,
    max_tokens: int | None,
    api_key: str | None,
) -> int:
    """Read lines, print answers, until the input ends. Raises `ConfigError` if there is no server."""
    server = Server(url, api_key)
    model = model or server.request("GET", "/models").json()["data"][0]["id"]
    options = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
    options = {name: value for name, value in options.items() if value is not None}
    person = sys.stdin.isatty()
    if person:
        import readline  # noqa: F401 (line editing and history for input())

        print(f"{model} at {url}. {HELP}")
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
            conversation = Conversation(rest.strip() or None)
        elif line:
            conversation.messages.append({"role": "user", "content": line})
            try:
                answer, summary = _answer(server, conversation, options)
            except ConfigError as error:
                if not person:
                    raise
                del conversation.messages[-1]
                print(error)
                continue
            conversation.messages.append({"role": "assistant", "content": answer})
            print(f"\n\033[2m{summary}\033[0m" if sys.stdout.isatty() else f"\n[{summary}]")


def _answer(server: Server, conversation: Conversation, options: dict[str, Any]) -> tuple[str, str]:
    """Stream an answer to the terminal; the text, and a line about its speed."""
    body = {
        **options,
        "messages": conversation.messages,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text: list[str] = []
    usage: dict[str, Any] = {}
    started = time.perf_counter()
    first = last = 0.0
    with server.request("POST", "/chat/completions", body, {"X-Conversation-ID": conversation.id}) as reply:
        try:
            for event in reply.events():
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    if piece := choice["delta"].get("content"):
                        last = time.perf_counter()
                        first = first or last
                        text.append(piece)
                        print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [ended]", end="")
    return "".join(text), _summary(first - started, last - first, usage)


def _summary(ttft: float, decoding: float, usage: dict[str, Any]) -> str:
    if not usage:
        return f"first token {max(ttft, 0):.2f} s"
    output = usage["completion_tokens"]
    rate = f", {(output - 1) / decoding:.1f} tok/s" if output > 1 and decoding > 0 else ""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return f"first token {ttft:.2f} s{rate}, {output} tokens; prompt {usage['prompt_tokens']} tokens, {cached} cached"


def _message(data: bytes) -> str:
    try:
        return str(json.loads(data)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return data.decode("utf-8", "replace")[:300]
