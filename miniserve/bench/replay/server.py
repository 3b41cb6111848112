"""The server that is measured: what it reports of itself, how it is asked for tokens, what its events mean.

Any server with OpenAI's /v1/completions will do. miniserve and vLLM return the ids they generate when asked to
(`return_token_ids`); of llama.cpp's llama-server only its own /completion does, so that is used there.
"""

import contextlib
from collections import Counter
from typing import Any, NamedTuple

import msgspec

from miniserve.client import ApiClient, message
from miniserve.config import ConfigError, Topology


class Event(NamedTuple):
    """An event of a stream: `tokens` came with it, which have these `ids`; `done` marks the last one. `cached` and
    `output` are the server's own counts of the turn's tokens. None is what the server does not report."""

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

    def body(self, prompt: list[int], output: int) -> bytes:
        """A request for exactly `output` greedy tokens in a stream."""
        body: dict[str, Any] = {"prompt": prompt, "stream": True, "temperature": 0, "ignore_eos": True}
        if self.native:
            body |= {"n_predict": output, "return_tokens": True, "cache_prompt": True}
        else:
            body |= {"model": self.model, "max_tokens": output, "return_token_ids": True}
            body |= {"stream_options": {"include_usage": True}}
        return msgspec.json.encode(body)

    def event(self, data: bytes) -> Event:
        """From the data of a server-sent event. Raises `msgspec.DecodeError` if it is not one of this server's."""
        if data == b"[DONE]":
            return Event(done=True)
        chunk = _chunk.decode(data)
        error = "" if chunk.error is None else message(data)
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


def describe(client: ApiClient, model: str | None) -> TargetServer:
    """The server of `client`, asked for `model` (None: its first). Raises `ConfigError` without answer or model."""
    models = client.models()
    card = next((card for card in models if model in (None, card.id)), None)
    if card is None:
        raise ConfigError(f"The server has no model {model!r}: it has {', '.join(card.id for card in models)}.")
    about: dict[str, Any] = {"max_model_len": card.max_model_len}
    kind = "llama.cpp" if card.owned_by == "llamacpp" else card.owned_by
    if kind in ("miniserve", "vllm"):
        about["version"] = _object(client, "/version").get("version")
    if kind == "miniserve" and (workers := _object(client, "/v1/workers")):
        roles = Counter(worker["role"] for worker in workers["data"])
        about |= {"policy": workers["policy"], "topology": str(Topology(roles["prefiller"], roles["decoder"]))}
    elif kind == "llama.cpp" and (props := _object(client, "/props")):
        settings = props.get("default_generation_settings", {})
        about |= {"max_model_len": settings.get("n_ctx"), "version": props.get("build_info")}
    vocab = card.vocab_size or (card.meta or {}).get("n_vocab")
    return TargetServer(root=client.url.removesuffix("/v1"), kind=kind, model=card.id, vocab=vocab, **about)


def totals(client: ApiClient, server: TargetServer) -> Totals | None:
    """What the server has counted so far; None where it is no miniserve, or does not answer."""
    if server.kind != "miniserve" or not (found := _object(client, "/v1/workers")):
        return None
    links = found["links"]
    moved = sum(link["bytes"] for link in links), sum(link["seconds"] for link in links)
    return Totals(Counter(found.get("placements", {})), *moved)


def _object(client: ApiClient, path: str) -> dict[str, Any]:
    """The JSON object at `path`, which need not be below /v1; empty where there is none."""
    with contextlib.suppress(ConfigError, msgspec.DecodeError):
        return msgspec.json.decode(client.read(f"/..{path}"), type=dict[str, Any])
    return {}


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


_chunk = msgspec.json.Decoder(_Chunk)
