"""The server that is measured: what it reports of itself, how it is asked for tokens, what its events mean.

Any server with OpenAI's /v1/completions will do. miniserve and vLLM return the ids they generate when asked to
(`return_token_ids`); of llama.cpp's llama-server only its own /completion does, so that is used there.
"""

import contextlib
from collections import Counter, defaultdict
from itertools import chain
from typing import Any, NamedTuple

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from miniserve.config import ConfigError, Topology, problem

ASK_SECONDS = 10.0
"""How long a server may take to answer a question about itself."""


class Event(NamedTuple):
    """An event of a stream: `tokens` came with it; `ids` are theirs, None where the server does not send them; `done`
    marks the last one. `cached` and `output` are the server's own counts of the turn's tokens, None where it does not
    report them."""

    tokens: int = 0
    ids: list[int] | None = None
    cached: int | None = None
    output: int | None = None
    done: bool = False
    error: str = ""


class Totals(NamedTuple):
    """What a miniserve has counted since its start: turns by where they were prefilled and decoded (`p0->d0`, or `d0`
    for both), and bytes and seconds of KV that went between workers."""

    placements: Counter[str]
    bytes: int
    seconds: float

    def since(self, before: "Totals") -> "Totals":
        return Totals(self.placements - before.placements, self.bytes - before.bytes, self.seconds - before.seconds)


class TargetServer(msgspec.Struct, frozen=True, kw_only=True):
    """What a server reports of itself; None for what it does not report. `kind` is `miniserve`, `vllm`, `llama.cpp` or
    whatever else its model card has as the owner. Lengths are in tokens."""

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
        return self.kind == "llama.cpp"

    @property
    def generate_url(self) -> str:
        return f"{self.root}/completion" if self.native else f"{self.root}/v1/completions"

    def body(self, prompt: list[int], output: int, extra: dict[str, Any]) -> bytes:
        """A request for exactly `output` greedy tokens in a stream. `extra` fields go last; one that is None removes a
        field."""
        body: dict[str, Any] = {"prompt": prompt, "stream": True, "temperature": 0, "ignore_eos": True}
        if self.native:
            body |= {"n_predict": output, "return_tokens": True, "cache_prompt": True}
        else:
            body |= {"model": self.model, "max_tokens": output, "return_token_ids": True}
            body |= {"stream_options": {"include_usage": True}}
        return msgspec.json.encode({name: value for name, value in (body | extra).items() if value is not None})

    def event(self, data: bytes) -> Event:
        """From the data of a server-sent event. Raises `msgspec.DecodeError` if it is not one of this server's."""
        if data == b"[DONE]":
            return Event(done=True)
        chunk = _chunk.decode(data)
        error = error_message(chunk.error)
        if self.native:
            event = Event(len(chunk.tokens), chunk.tokens, error=error)
            cached, output = (chunk.timings or {}).get("cache_n"), chunk.tokens_predicted
            return event._replace(cached=cached, output=output, done=True) if chunk.stop else event
        tokens, ids = 0, None
        for choice in chunk.choices:
            ids = choice.token_ids
            tokens = len(ids) if ids is not None else int(bool(choice.text))
        if not (said := chunk.usage):
            return Event(tokens, ids, error=error)
        cached = (said.prompt_tokens_details or {}).get("cached_tokens")
        return Event(tokens, ids, cached, said.completion_tokens, error=error)


async def describe(http: aiohttp.ClientSession, url: str, model: str | None) -> TargetServer:
    """The server at `url`, with or without its /v1, where `model` is asked for (None: its first one).

    Raises `ConfigError` if it does not answer or has no such model.
    """
    root = url.rstrip("/").removesuffix("/v1")
    try:
        status, answer = await _get(http, f"{root}/v1/models")
    except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
        raise ConfigError(f"--url {url!r} is no address: write it like http://127.0.0.1:8000.") from error
    except (aiohttp.ClientError, OSError) as error:
        raise ConfigError(problem("cli.no_server", url=url, cause=str(error) or type(error).__name__)) from error
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
    about: dict[str, Any] = {"max_model_len": card.max_model_len}
    kind = "llama.cpp" if card.owned_by == "llamacpp" else card.owned_by
    if kind in ("miniserve", "vllm"):
        about["version"] = (await _object(http, f"{root}/version")).get("version")
    if kind == "miniserve" and (workers := await _object(http, f"{root}/v1/workers")):
        roles = Counter(worker["role"] for worker in workers["data"])
        about |= {"policy": workers["policy"], "topology": str(Topology(roles["prefiller"], roles["decoder"]))}
    elif kind == "llama.cpp" and (props := await _object(http, f"{root}/props")):
        settings = props.get("default_generation_settings", {})
        about |= {"max_model_len": settings.get("n_ctx"), "version": props.get("build_info")}
    vocab = card.vocab_size or (card.meta or {}).get("n_vocab")
    return TargetServer(root=root, kind=kind, model=card.id, vocab=vocab, **about)


async def totals(http: aiohttp.ClientSession, server: TargetServer) -> Totals | None:
    """What the server has counted so far; None where it is no miniserve, or does not answer."""
    if server.kind != "miniserve" or not (answer := await _maybe(http, f"{server.root}/metrics")):
        return None
    placements: Counter[str] = Counter()
    sums: defaultdict[str, float] = defaultdict(float)
    for sample in chain.from_iterable(family.samples for family in text_string_to_metric_families(answer.decode())):
        sums[sample.name] += sample.value
        if sample.name == "miniserve:placements_total":
            prefiller, home = sample.labels["prefill_worker"], sample.labels["home"]
            placements[home if prefiller == home else f"{prefiller}->{home}"] += round(sample.value)
    return Totals(placements, round(sums["miniserve:handoff_bytes_total"]), sums["miniserve:handoff_seconds_total"])


async def _get(http: aiohttp.ClientSession, url: str) -> tuple[int, bytes]:
    async with http.get(url, timeout=aiohttp.ClientTimeout(ASK_SECONDS)) as reply:
        return reply.status, await reply.read()


async def _maybe(http: aiohttp.ClientSession, url: str) -> bytes:
    """What is at `url`; empty where there is nothing."""
    with contextlib.suppress(aiohttp.ClientError, OSError):
        status, answer = await _get(http, url)
        return answer if status == 200 else b""
    return b""


async def _object(http: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """The JSON object at `url`; empty where there is none."""
    try:
        return msgspec.json.decode(await _maybe(http, url), type=dict[str, Any])
    except msgspec.DecodeError:
        return {}


def error_message(error: Any) -> str:
    """The text of an error in OpenAI's shape, or of whatever comes in its place; "" of None."""
    if isinstance(error, dict):
        error = error.get("message") or error
    return "" if error is None else str(error)


def body_message(body: bytes) -> str:
    try:
        return error_message(_chunk.decode(body).error) or body[:200].decode(errors="replace")
    except msgspec.DecodeError:
        return body[:200].decode(errors="replace")


class _Usage(msgspec.Struct):
    completion_tokens: int = 0
    prompt_tokens_details: dict[str, int | None] | None = None


class _Choice(msgspec.Struct):
    text: str = ""
    token_ids: list[int] | None = None


class _Chunk(msgspec.Struct):
    """An event of any server's: those after `usage` are llama-server's own."""

    error: Any = None
    choices: list[_Choice] = []
    usage: _Usage | None = None
    tokens: list[int] = []
    stop: bool = False
    tokens_predicted: int = 0
    timings: dict[str, Any] | None = None


class _Card(msgspec.Struct):
    id: str
    owned_by: str = "unknown"
    max_model_len: int | None = None
    vocab_size: int | None = None
    meta: dict[str, Any] | None = None


class _Models(msgspec.Struct):
    data: list[_Card] = []


_chunk = msgspec.json.Decoder(_Chunk)
