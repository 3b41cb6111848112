"""GET /v1/events over a real scheduler whose workers' reports are made up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

import httpx
import pytest

from miniserve.hub import resolve as hub
from miniserve.monitor import events
from miniserve.monitor.events import Feed, Listener, feed_event
from miniserve.monitor.views import worker_list
from miniserve.text.tokenizer import Tokenizer
from tests.support.api import Api, error_of, make_app, serving
from tests.support.live_engine import LiveClient

SECRET = "sécret"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(hub.resolve("smollm2-135m", load_format="dummy").folder)


Event = tuple[str, Any]


async def read(response: httpx.Response) -> AsyncIterator[Event]:
    """The events of a stream."""
    assert response.status_code == 200, await response.aread()
    assert response.headers["content-type"].startswith("text/event-stream")
    kind = ""
    async for line in response.aiter_lines():
        name, _, value = line.partition(": ")
        if name == "event":
            kind = value
        elif name == "data":
            yield kind, json.loads(value)


@contextlib.asynccontextmanager
async def listening(app: Any, key: str | None = None) -> AsyncIterator[AsyncIterator[Event]]:
    """The events of an app that is served, from the first on."""
    headers = {"Authorization": f"Bearer {key}".encode()} if key else {}
    async with (
        asyncio.timeout(20),
        serving(app) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers) as http,
        http.stream("GET", "/v1/events", timeout=5) as response,
    ):
        yield read(response)


async def until(stream: AsyncIterator[Event], kind: str) -> Any:
    """What the next event of this kind says."""
    async for found, data in stream:
        if found == kind:
            return data
    raise AssertionError(f"no {kind!r} came")


# --- events ---------------------------------------------------------------------------------------------------------


async def test_the_state_of_workers_and_turns_comes_first(tokenizer: Tokenizer) -> None:
    engine = LiveClient()
    engine.begin("a", "c1")
    engine.report("a", 0, [7])
    async with listening(make_app(tokenizer, engine)) as stream:
        start = await until(stream, "start")
        assert start["policy"] == "observe"
        assert start["unix_time"] == pytest.approx(time.time(), abs=5)
        expected = worker_list(engine.scheduler, start["time"])
        workers = await until(stream, "workers")
        assert [(w["name"], w["kv"]) for w in workers["data"]] == [(w["name"], w["kv"]) for w in expected["data"]]
        turns = await until(stream, "turns")
        assert (turns["time"], turns["total"], turns["conversations"]) == (start["time"], 1, 1)
        (turn,) = turns["data"]
        assert (turn["conversation"], turn["turn"], turn["state"], turn["output_tokens"]) == ("c1", 1, "decode", 1)
        assert turn["arrived"] == turn["placed"] <= turn["first_token"] <= start["time"]


async def test_decisions_and_outcomes_come_as_they_are_made(tokenizer: Tokenizer) -> None:
    engine = LiveClient()
    async with listening(make_app(tokenizer, engine)) as stream:
        await until(stream, "turns")
        engine.begin("a", "c1")
        decision = await until(stream, "decision")
        assert (decision["kind"], decision["run"], decision["conversation"]) == ("decision", "a.1", "c1")
        assert decision["workers"].keys() == {"p0", "d0"}
        chosen = [
            o for o in decision["options"] if (o["home"], o["prefill_at"]) == (decision["home"], decision["prefill_at"])
        ]
        assert len(chosen) == 1
        assert chosen[0]["cost"] == min(o["cost"] for o in decision["options"])
        engine.report("a", 0, [7], "length", prefill=0.01)
        outcome = await until(stream, "outcome")
        assert (outcome["run"], outcome["finish"], outcome["output"]) == ("a.1", "length", 1)
        assert (await until(stream, "turns"))["total"] == 0


async def test_a_snapshot_comes_again(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "SNAPSHOT_SECONDS", 0.02)
    async with listening(make_app(tokenizer, LiveClient())) as stream:
        times = [(await until(stream, "turns"))["time"] for _ in range(4)]
    assert times == sorted(set(times))


async def test_no_event_holds_a_prompt(tokenizer: Tokenizer) -> None:
    """Numbers of tokens, but never which."""
    engine = LiveClient()
    async with listening(make_app(tokenizer, engine)) as stream:
        await until(stream, "turns")
        engine.whole("a", "c1")
        for kind in ("decision", "outcome", "turns"):
            data = await until(stream, kind)
            lists = [v for v in (*data.values(), *data.get("workers", {}).values()) if isinstance(v, list)]
            assert not any(isinstance(item, int | str) for values in lists for item in values)


async def test_no_records_are_made_without_a_listener() -> None:
    engine = LiveClient()
    assert not engine.scheduler.notes
    with engine.feed.listener(), engine.feed.listener():
        assert engine.scheduler.notes
    assert not engine.scheduler.notes
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == 1, "snapshots are made no longer"
    engine.scheduler.notes = True  # as with --decision-log
    feed = Feed(engine.scheduler)
    with feed.listener():
        pass
    assert engine.scheduler.notes


async def test_a_listener_that_goes_is_forgotten(tokenizer: Tokenizer) -> None:
    engine = LiveClient()
    async with listening(make_app(tokenizer, engine)) as stream:
        await until(stream, "turns")
        assert engine.scheduler.notes
    assert not engine.scheduler.notes


async def test_a_slow_listener_loses_the_oldest_events_and_gets_their_number() -> None:
    listener = Listener()
    for number in range(events.MOST_WAITING + 7):
        listener.put(feed_event("n", number))
    first, *rest = await listener.take()
    assert first == b'event: lost\ndata: {"events":7}\n\n'
    assert rest == [feed_event("n", number) for number in range(7, events.MOST_WAITING + 7)]
    listener.put(feed_event("later", None))
    assert await listener.take() == [b"event: later\ndata: null\n\n"], "the loss is counted once"
    listener.end()
    assert await listener.take() == []


async def test_a_reader_that_stops_holds_up_no_other_client(tokenizer: Tokenizer) -> None:
    engine = LiveClient()
    async with serving(make_app(tokenizer, engine)) as port:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # else the kernel reads on for us
        connection.connect(("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=connection, limit=2**16)
        writer.write(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"event: start")
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            began = time.monotonic()
            (listener,) = engine.feed._listeners
            for number in count():
                engine.whole(f"t{number}", f"c{number % 50}")
                if number % 100 == 0:  # the server sends what it can, and serves others
                    assert (await http.get("/health")).status_code == 200
                    if listener._lost:
                        break
            assert time.monotonic() - began < 15
        assert len(listener._waiting) == events.MOST_WAITING
        while b"event: lost" not in await reader.readline():
            pass
        writer.close()


async def test_too_many_listeners_are_refused(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MOST_LISTENERS", 1)
    engine = LiveClient()
    api = Api(make_app(tokenizer, engine), engine)
    with engine.feed.listener():
        response = await api.http.get("/v1/events")
        assert error_of(response, 503)["code"] == "too_many_listeners"
        assert response.headers["retry-after"]


async def test_streams_end_with_the_server(tokenizer: Tokenizer) -> None:
    engine = LiveClient()
    async with listening(make_app(tokenizer, engine)) as stream:
        await until(stream, "turns")
        engine.whole("a", "c1")
        engine.feed.close()
        assert [kind async for kind, _ in stream] == ["decision", "outcome"]


@pytest.mark.parametrize("path", ["/v1/events", "/v1/workers", "/conversations", "/v1/models", "/dashboard"])
async def test_what_needs_the_key(tokenizer: Tokenizer, path: str) -> None:
    engine = LiveClient()
    api = Api(make_app(tokenizer, engine, api_key=SECRET), engine)
    assert error_of(await api.http.get(path), 401)["code"] == "invalid_api_key"


async def test_with_the_key(tokenizer: Tokenizer) -> None:
    async with listening(make_app(tokenizer, LiveClient(), api_key=SECRET), SECRET) as stream:
        await until(stream, "turns")
