"""`miniserve chat`: a conversation in the terminal, over the OpenAI API of a running server."""

import contextlib
import json
import sys
import time
import uuid
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import httpx

from miniserve.cli.flags import api_key
from miniserve.client import ApiClient, message
from miniserve.config import ConfigError

HELP = "/reset begins anew, /system TEXT sets a system message, /exit or Ctrl-D leaves, Ctrl-C ends an answer."


class Transcript:
    """The messages so far, and the id by which the server knows the conversation."""

    def __init__(self, system: str) -> None:
        self.system, self.id = system, uuid.uuid4().hex
        self.messages = [{"role": "system", "content": system}] if system else []


def chat(args: Namespace) -> int:
    """Read lines, print answers, until the input ends. Raises `ConfigError` if there is no server."""
    client = ApiClient(args.url, api_key(args))
    given = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    options["model"] = args.model or client.models()[0].id
    person = sys.stdin.isatty()
    if person:
        import readline  # noqa: F401 (line editing and history for input())

        print(f"{options['model']} at {args.url}. {HELP}")
    transcript = Transcript(args.system)
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
            transcript = Transcript(transcript.system)
        elif command == "/system":
            transcript = Transcript(rest.strip())
        elif command.rfind("/") == 0:  # a path has more of them
            print(f"There is no {command}. {HELP}")
        elif line:
            _turn(client, transcript, options, line, person)


def _turn(client: ApiClient, transcript: Transcript, options: dict[str, Any], line: str, person: bool) -> None:
    """Send `line` and print the answer. What goes wrong is printed for a `person`, else raised as `ConfigError`."""
    asked = {"role": "user", "content": line}
    body = {**options, "messages": [*transcript.messages, asked]}
    try:
        answer, summary = _answer(client, transcript.id, body)
    except ConfigError as error:
        if not person:
            raise
        print(f"\n{error}")
        return
    if answer:  # else the question is not kept either: templates want roles to alternate
        transcript.messages += [asked, {"role": "assistant", "content": answer}]
    print(f"\n\033[2m{summary}\033[0m" if sys.stdout.isatty() else f"\n[{summary}]")


def _answer(client: ApiClient, conversation: str, body: dict[str, Any]) -> tuple[str, str]:
    """Stream an answer to the terminal; its text, up to a Ctrl-C and without the reasoning, and a line on its speed."""
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    text: list[str] = []
    times: list[float] = []
    usage: dict[str, Any] = {}
    thinking = False
    started = time.perf_counter()
    try:
        with client.open("POST", "/chat/completions", body, {"X-Conversation-ID": conversation}) as response:
            for event in _events(response):
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


def _events(response: httpx.Response) -> Iterator[Any]:
    """Server-sent events until [DONE]. Raises `ConfigError` for an error in the stream, or a stream without end."""
    rest = b""
    with contextlib.suppress(httpx.HTTPError):  # a stream that breaks off has no [DONE]
        for piece in response.iter_bytes():
            # Not `iter_lines`, whose lines end at U+2028 within a text too.
            *lines, rest = (rest + piece).split(b"\n")
            for data in (line[5:].strip() for line in lines if line.startswith(b"data:")):
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise ConfigError(f"The server says: {message(data)}")
                yield event
    raise ConfigError("The answer broke off: the server has gone. Is it still running?")


def _summary(times: list[float], usage: dict[str, Any]) -> str:
    """A line about an answer whose pieces came at `times` (seconds after the request)."""
    parts = [f"first token {times[0]:.2f} s" if times else "no text"]
    if usage:
        output = usage["completion_tokens"]
        if output > 1 and times[-1:] > times[:1]:
            parts.append(f"{(output - 1) / (times[-1] - times[0]):.1f} tok/s")
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        parts += [f"{output} tokens", f"prompt {usage['prompt_tokens']} tokens", f"{cached} cached"]
    return ", ".join(parts)
