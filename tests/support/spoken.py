"""miniserve's own app over a fake engine that answers each prompt with another text, for clients that measure."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn

from miniserve.api.app import create_app
from miniserve.api.service import Service
from miniserve.bench.replay.server import TargetServer
from miniserve.bench.replay.workload import Script, Text, TurnSize
from miniserve.config import EngineConfig, ServeConfig
from miniserve.sampling_params import SamplingParams
from miniserve.text.grammar import Compiler
from miniserve.text.tokenizer import Tokenizer
from tests.support.fake_engine import FakeClient, FakeTurn

VOCAB = 49152


def spoken(prompt: list[int], count: int) -> list[int]:
    """What the fake engine answers: another text for each prompt, half of its tokens the first half of an "é"."""
    return [195 if i % 2 else 65 + (sum(prompt) + i) % 26 for i in range(count)]


class SpokenEngine(FakeClient):
    """Answers with `spoken`, one token at a time; `trouble` changes that. The first id of a prompt says whose it is."""

    def __init__(self, pause: float = 0.002) -> None:
        super().__init__()
        self.max_model_len = 4096
        self.times: list[float] = []
        self.trouble: Callable[[list[int]], dict[str, Any]] = lambda tokens: {}
        self.play = lambda tokens, params: {
            "steps": [[token] for token in spoken(tokens, params.max_tokens or 0)],
            "pause": pause,
            "finish": "length",
            "cached": 0,
            **self.trouble(tokens),
        }

    def submit(self, tokens: list[int], params: SamplingParams, **given: Any) -> FakeTurn:
        turn = super().submit(tokens, params, **given)
        self.times.append(time.monotonic())
        return turn

    def conversation(self, first_id: int) -> list[FakeTurn]:
        return [turn for turn in self.turns if turn.tokens[0] == first_id]


@contextmanager
def asking_for(ids: str) -> Iterator[None]:
    """Clients ask for `ids` to be returned, or for anything else they do not: as from a server that returns none."""
    asked = TargetServer.body

    def body(server: TargetServer, prompt: list[int], output: int) -> bytes:
        return asked(server, prompt, output).replace(b'"return_token_ids":true', b'"return_token_ids":false')

    with pytest.MonkeyPatch.context() as patch:
        if ids != "returned":
            patch.setattr(TargetServer, "body", body)
        yield


@contextmanager
def listening() -> Iterator[socket.socket]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        yield listener


@contextmanager
def serving(engine: FakeClient, tokenizer: Tokenizer) -> Iterator[str]:
    """miniserve's app over `engine` in a thread: its URL."""
    config = ServeConfig(engine=EngineConfig(model="tiny"), served_model_names=["tiny"])
    app = create_app(Service(config, engine, tokenizer, {}, Compiler(tokenizer)), engine.feed)  # type: ignore[arg-type]
    http = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    with listening() as listener:
        thread = threading.Thread(target=lambda: asyncio.run(http.serve(sockets=[listener])))
        thread.start()
        while not http.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            http.should_exit = True
            thread.join()


def script(key: str, *turns: tuple[int, int, float]) -> Script:
    return Script(key, tuple(TurnSize(*turn) for turn in turns))


def first_id(of: Script, seed: int = 0) -> int:
    return Text(of, seed, (1000, VOCAB)).take(1)[0]
