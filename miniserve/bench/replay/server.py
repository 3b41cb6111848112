"""The server that is measured: what it says of itself, and how it is asked for tokens.

Any server with OpenAI's /v1/completions will do. miniserve and vLLM return the ids they generate when asked to
(`return_token_ids`); of llama.cpp's llama-server only its own /completion does, so that is used there.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import aiohttp
import msgspec

from miniserve.config import ConfigError, Topology

T = TypeVar("T")
ASK_SECONDS = 10.0
"""How long a server may take to say something of itself."""
LEAST_WAIT = 0.05
"""Seconds between two requests to a server that says it is full, though it may say 0."""


class Event(NamedTuple):
    """What an event of a stream tells. `tokens` came with it, `ids` are theirs, None where the server does not tell;
    `usage` is (prompt, cached, output) in tokens, cached -1 where it does not tell; `done` is the last one."""

    tokens: int = 0
    ids: list[int] | None = None
    usage: tuple[int, int, int] | None = None
    done: bool = False
    error: str = ""


class Totals(NamedTuple):
    """What a miniserve has counted since it started: turns by where they were prefilled and decoded (`p0->d0`, or `d0`
    for both), and bytes and seconds of KV that went between workers."""

    placements: Counter[str]
    bytes: int
    seconds: float

    def since(self, before: Totals) -> Totals:
        """What came after `before`."""
        return Totals(self.placements - before.placements, self.bytes - before.bytes, self.seconds - before.seconds)


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """What a server says of itself; None for what it does not say. `kind` is `miniserve`, `vllm`, `llama.cpp` or
    what else it names as the owner of its model. Lengths are in tokens."""

    root: str
    kind: str
    model: str
    max_model_len: int | None = None
    vocab: int | None = None
    policy: str | None = None
    topology: str | None = None
    version: str | None = None

    @property
    def native(self) -> bool:
        """Whether it is asked at llama-server's own /completion."""
        return self.kind == "llama.cpp"

    @property
    def generate_url(self) -> str:
        """Where tokens are asked for."""
        return f"{self.root}/completion" if self.native else f"{self.root}/v1/completions"

    def body(self, prompt: list[int], output: int, extra: dict[str, Any]) -> bytes:
        """A request for exactly `output` tokens, greedily, in a stream. `extra` fields go last; one that is None takes
        a field out."""
        body: dict[str, Any] = {"prompt": prompt, "stream": True, "temperature": 0, "ignore_eos": True}
        if self.native:
            body |= {"n_predict": output, "return_tokens": True, "cache_prompt": True}
        else:
            body |= {"model": self.model, "max_tokens": output, "return_token_ids": True}
            body |= {"stream_options": {"include_usage": True}}
        return msgspec.json.encode({name: value for name, value in (body | extra).items() if value is not None})

    def event(self, data: bytes) -> Event:
        """From the data of an event. Raises `msgspec.DecodeError` for what is none."""
        if self.native:
            chunk = _native.decode(data)
            usage = None
            if chunk.stop:
                cached = chunk.timings.cache_n if chunk.timings else -1
                usage = (chunk.tokens_evaluated, cached, chunk.tokens_predicted)
            return Event(len(chunk.tokens), chunk.tokens, usage, chunk.stop, _message(chunk.error))
        if data == b"[DONE]":
            return Event(done=True)
        said = _chunk.decode(data)
        tokens, ids = 0, None
        for choice in said.choices:
            ids = choice.token_ids
            tokens = len(ids) if ids is not None else int(bool(choice.text))
        usage = None
        if said.usage is not None:
            details = said.usage.prompt_tokens_details
            cached = details.cached_tokens if details and details.cached_tokens is not None else -1
            usage = (said.usage.prompt_tokens, cached, said.usage.completion_tokens)
        return Event(tokens, ids, usage, False, _message(said.error))


class TurnError(Exception):
    """A turn failed; the message says of what."""


@dataclass(eq=False)
class Answer:
    """A turn's answer so far. `first` and `last` are when tokens came (`time.monotonic`), None before one did; `usage`
    is the server's own count: (prompt, cached, output) in tokens, cached -1 where it does not tell."""

    ids: list[int] = field(default_factory=list)
    tokens: int = 0
    first: float | None = None
    last: float | None = None
    usage: tuple[int, int, int] | None = None

    @property
    def output(self) -> int:
        """Tokens generated: as the server says, else as they came."""
        return self.usage[2] if self.usage else self.tokens

    def take(self, event: Event, now: float) -> None:
        """Take in an event that came `now`. Raises `TurnError`."""
        if event.error:
            raise TurnError(f"The server failed after {self.tokens} tokens: {event.error}")
        if event.tokens:
            self.first = now if self.first is None else self.first
            self.last = now
            self.tokens += event.tokens
        if event.ids:
            self.ids += event.ids
        self.usage = event.usage or self.usage


async def ask(http: aiohttp.ClientSession, server: Server, body: bytes, answer: Answer, timeout: float) -> None:
    """Send `body` and fill in `answer` until it is whole, within `timeout` seconds. A server that is full is asked
    again when it says. Raises `TurnError`."""
    full = ""
    try:
        async with asyncio.timeout(timeout):
            while wait := await _stream(http, server, body, answer):
                full = ": it was full"
                await asyncio.sleep(wait)
    except aiohttp.ClientError as error:
        reason = str(error) or type(error).__name__
        raise TurnError(f"The connection broke after {answer.tokens} tokens: {reason}") from error
    except TimeoutError as error:
        raise TurnError(f"The server did not finish within {timeout:g} s{full}") from error
    except msgspec.DecodeError as error:
        raise TurnError(f"The stream holds what is no chunk: {error}") from error


async def _stream(http: aiohttp.ClientSession, server: Server, body: bytes, answer: Answer) -> float:
    """Ask once: 0, or the seconds after which to ask again."""
    async with http.post(server.generate_url, data=body) as reply:
        if reply.status in (429, 503) and (after := reply.headers.get("Retry-After", "")).isdigit():
            await reply.read()
            return max(float(after), LEAST_WAIT)
        if reply.status != 200:
            raise TurnError(f"HTTP {reply.status}: {_error_message(await reply.read())}")
        done = False
        rest = b""
        async for data in reply.content.iter_any():
            now = time.monotonic()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    event = server.event(line[5:].strip())
                    answer.take(event, now)
                    done = done or event.done
    if not done:
        raise TurnError(f"The stream broke off after {answer.tokens} tokens")
    return 0.0


async def describe(http: aiohttp.ClientSession, url: str, model: str | None) -> Server:
    """The server at `url`, with or without its /v1, where `model` is asked for (None: its first one).

    Raises `ConfigError` if it does not answer or has no such model.
    """
    root = url.rstrip("/").removesuffix("/v1")
    try:
        status, answer = await _get(http, f"{root}/v1/models")
    except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
        raise ConfigError(f"--url {url!r} is no address: write it like http://127.0.0.1:8000.") from error
    except (aiohttp.ClientError, OSError) as error:
        raise ConfigError(
            f"No server answers at {url} ({str(error) or type(error).__name__}). Start one with `miniserve serve`, or "
            "name another with --url."
        ) from error
    if status in (401, 403):
        raise ConfigError(f"The server at {url} wants an API key: give it with --api-key.")
    try:
        models = msgspec.json.decode(answer, type=_Models).data if status == 200 else []
    except msgspec.DecodeError:
        models = []
    if not models:
        raise ConfigError(f"{url} is no OpenAI API: GET {root}/v1/models names no model (HTTP {status}).")
    card = next((card for card in models if model in (None, card.id)), None)
    if card is None:
        raise ConfigError(f"The server has no model {model!r}: it has {', '.join(card.id for card in models)}.")
    told: dict[str, Any] = {}
    if card.owned_by == "miniserve":
        workers = await _maybe(http, f"{root}/v1/workers", _Workers)
        version = await _maybe(http, f"{root}/version", _Version)
        if workers is not None:
            roles = Counter(worker.role for worker in workers.data)
            told = {
                "policy": workers.policy,
                "topology": str(Topology(roles["prefiller"], roles["decoder"])),
            }
        told["version"] = version.version if version else None
    elif card.owned_by == "vllm":
        version = await _maybe(http, f"{root}/version", _Version)
        told["version"] = version.version if version else None
    elif card.owned_by == "llamacpp":
        props = await _maybe(http, f"{root}/props", _Props)
        if props is not None:
            told = {"max_model_len": props.default_generation_settings.n_ctx, "version": props.build_info}
    vocab = card.vocab_size or (card.meta.n_vocab if card.meta else None)
    kind = "llama.cpp" if card.owned_by == "llamacpp" else card.owned_by
    return Server(
        **{"root": root, "kind": kind, "model": card.id, "max_model_len": card.max_model_len, "vocab": vocab, **told}
    )


async def totals(http: aiohttp.ClientSession, server: Server) -> Totals | None:
    """What it has counted so far; None where it is no miniserve, or does not answer."""
    if server.kind != "miniserve":
        return None
    try:
        status, answer = await _get(http, f"{server.root}/metrics")
    except (aiohttp.ClientError, OSError):
        return None
    if status != 200:
        return None
    text = answer.decode()
    placements: Counter[str] = Counter()
    for labels, count in re.findall(r"^miniserve:placements_total\{(.*)\} (\S+)$", text, re.MULTILINE):
        label = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        prefiller, home = label["prefill_worker"], label["home"]
        placements[home if prefiller == home else f"{prefiller}->{home}"] += round(float(count))

    def total(name: str) -> float:
        return sum(map(float, re.findall(rf"^miniserve:{name}_total\{{.*\}} (\S+)$", text, re.MULTILINE)))

    return Totals(placements, round(total("handoff_bytes")), total("handoff_seconds"))


async def _get(http: aiohttp.ClientSession, url: str) -> tuple[int, bytes]:
    async with http.get(url, timeout=aiohttp.ClientTimeout(ASK_SECONDS)) as reply:
        return reply.status, await reply.read()


async def _maybe(http: aiohttp.ClientSession, url: str, kind: type[T]) -> T | None:
    """What is there, if it is there and looks like that."""
    try:
        return msgspec.json.decode((await _get(http, url))[1], type=kind)
    except (aiohttp.ClientError, OSError, msgspec.DecodeError):
        return None


def _message(error: Any) -> str:
    """The words of an error as OpenAI's API has it, or of what comes instead."""
    if isinstance(error, dict):
        error = error.get("message") or error
    return "" if error is None else str(error)


def _error_message(body: bytes) -> str:
    """The words of the body of an answer that is an error."""
    try:
        return _message(_chunk.decode(body).error) or body[:200].decode(errors="replace")
    except msgspec.DecodeError:
        return body[:200].decode(errors="replace")


# --- what is read of answers, and no more ---------------------------------------------------------------------------


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Choice(msgspec.Struct):
    text: str = ""
    token_ids: list[int] | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _Timings(msgspec.Struct):
    cache_n: int = -1


class _Native(msgspec.Struct):
    tokens: list[int] = []
    stop: bool = False
    tokens_evaluated: int = 0
    tokens_predicted: int = 0
    timings: _Timings | None = None
    error: Any = None


class _Meta(msgspec.Struct):
    n_vocab: int | None = None


class _Card(msgspec.Struct):
    id: str
    owned_by: str = "unknown"
    max_model_len: int | None = None
    vocab_size: int | None = None
    meta: _Meta | None = None


class _Models(msgspec.Struct):
    data: list[_Card] = []


class _Worker(msgspec.Struct):
    role: str


class _Workers(msgspec.Struct):
    policy: str
    data: list[_Worker]


class _Version(msgspec.Struct):
    version: str


class _Settings(msgspec.Struct):
    n_ctx: int | None = None


class _Props(msgspec.Struct):
    default_generation_settings: _Settings
    build_info: str | None = None


_chunk = msgspec.json.Decoder(_Chunk)
_native = msgspec.json.Decoder(_Native)
