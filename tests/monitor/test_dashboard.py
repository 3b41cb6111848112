"""The dashboard: its events over a real scheduler whose workers' reports are made up, and its page in a browser."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import time
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

from miniserve.api import dashboard
from miniserve.cluster.messages import Move, Peer, PoolInfo, Report
from miniserve.hub import resolve as hub
from miniserve.monitor import events, views
from miniserve.monitor.events import Feed, Listener
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.baselines import make_policy
from miniserve.scheduler.scheduler import Command, Note, Scheduler
from miniserve.text.tokenizer import Tokenizer
from tests.support.api import Api, error_of, make_app, serving
from tests.support.fake_engine import EOS, STATS, FakeClient, spell
from tests.support.outputs import outputs

FILES = sorted(path.name for path in dashboard.FOLDER.iterdir())
SECRET = "sécret"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(hub.resolve("smollm2-135m", load_format="dummy").folder)


class LiveClient(FakeClient):
    """Has a scheduler of its own, under `policy`, whose notes go to listeners."""

    def __init__(self, policy: str = "observe", **play: Any) -> None:
        super().__init__(**play)
        self.scheduler = Scheduler(make_policy(policy), 16, max_turns=600, max_queued=600, policy_name=policy)
        self.feed = Feed(self.scheduler, policy)
        self.policy_name = policy
        for name in ("p0", "d0"):
            self.up(name)

    def up(self, name: str, epoch: int = 1) -> None:
        peer = Peer(name, epoch, name, PoolInfo(1, 1, 4000, 4096, ""))
        self.carry_out(self.scheduler.worker_up(peer, prefiller=name == "p0", now=time.monotonic()))

    def carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Note):
                self.feed.tell(command.record)

    def begin(self, turn: str, conversation: str, tokens: int = 600) -> None:
        prompt = [len(self.scheduler.turns) % 1000, *range(tokens - 1)]
        params = SamplingParams(max_tokens=16)
        self.carry_out(self.scheduler.submit(turn, prompt, params, 0, conversation, "", time.monotonic()))

    def report(self, turn: str, index: int, tokens: list[int], finish: Any = None, **more: Any) -> None:
        """From the home of `turn`; with the first token come the pages that were moved."""
        (found,) = [t for t in self.scheduler.turns if t.id == turn]
        moves = [Move(f"{turn}.1", "p0", 4, 4 * 4096, 0.002, 0.001)] if found.prefill_at and index == 0 else []
        cached = 0 if index == 0 else None
        report = Report(outputs(f"{turn}.1", index, tokens, finish=finish, cached_tokens=cached, **more), moves, STATS)
        self.carry_out(self.scheduler.on_report(found.home, report, time.monotonic()))

    def whole(self, turn: str, conversation: str) -> None:
        """A turn from its beginning to its end."""
        self.begin(turn, conversation)
        self.report(turn, 0, [7], prefill=0.01)
        self.report(turn, 1, [8, 9], "stop")


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


async def test_how_things_stand_comes_first(tokenizer: Tokenizer) -> None:
    engine = LiveClient()
    engine.begin("a", "c1")
    engine.report("a", 0, [7])
    async with listening(make_app(tokenizer, engine)) as stream:
        start = await until(stream, "start")
        assert start["policy"] == "observe"
        assert start["unix_time"] == pytest.approx(time.time(), abs=5)
        expected = views.worker_list(engine.scheduler, "observe", start["time"])
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


async def test_no_prompt_is_told(tokenizer: Tokenizer) -> None:
    """Numbers of tokens, but never which."""
    engine = LiveClient()
    async with listening(make_app(tokenizer, engine)) as stream:
        await until(stream, "turns")
        engine.whole("a", "c1")
        for kind in ("decision", "outcome", "turns"):
            told = await until(stream, kind)
            lists = [v for v in (*told.values(), *told.get("workers", {}).values()) if isinstance(v, list)]
            assert not any(isinstance(item, int | str) for values in lists for item in values)


async def test_nothing_is_noted_while_nobody_listens() -> None:
    engine = LiveClient()
    assert not engine.scheduler.notes
    with engine.feed.listener(), engine.feed.listener():
        assert engine.scheduler.notes
    assert not engine.scheduler.notes
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == 1, "snapshots are made no longer"
    engine.scheduler.notes = True  # as with --decision-log
    feed = Feed(engine.scheduler, "observe")
    with feed.listener():
        pass
    assert engine.scheduler.notes


async def test_a_listener_that_goes_is_forgotten(tokenizer: Tokenizer) -> None:
    engine = LiveClient()
    async with listening(make_app(tokenizer, engine)) as stream:
        await until(stream, "turns")
        assert engine.scheduler.notes
    assert not engine.scheduler.notes


async def test_who_does_not_keep_up_loses_the_oldest_and_is_told() -> None:
    listener = Listener()
    for number in range(events.MOST_WAITING + 7):
        listener.put(events.encoded("n", number))
    first, *rest = (await listener.take()).split(b"\n\n")[:-1]
    assert first == b'event: lost\ndata: {"events":7}'
    assert rest == [b"event: n\ndata: %d" % number for number in range(7, events.MOST_WAITING + 7)]
    listener.put(b"later")
    assert await listener.take() == b"later", "it is told once"
    listener.end()
    assert await listener.take() == b""


async def test_a_reader_that_stops_holds_up_nobody(tokenizer: Tokenizer) -> None:
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


async def test_only_so_many_listen(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("path", ["/v1/events", "/v1/workers", "/v1/conversations", "/v1/models", "/dashboard"])
async def test_what_needs_the_key(tokenizer: Tokenizer, path: str) -> None:
    engine = LiveClient()
    api = Api(make_app(tokenizer, engine, api_key=SECRET), engine)
    assert error_of(await api.http.get(path), 401)["code"] == "invalid_api_key"


async def test_with_the_key(tokenizer: Tokenizer) -> None:
    async with listening(make_app(tokenizer, LiveClient(), api_key=SECRET), SECRET) as stream:
        await until(stream, "turns")


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", *(f"/dashboard/{name}" for name in FILES)])
async def test_files_of_the_page(tokenizer: Tokenizer, path: str) -> None:
    engine = LiveClient()
    http = Api(make_app(tokenizer, engine, api_key="k"), engine).http
    response = await http.get(path)
    assert response.status_code == 200
    name = path.rpartition("/")[2] or "index.html"
    assert response.content == (dashboard.FOLDER / name).read_bytes()
    assert response.headers["content-type"] == dashboard.TYPES[Path(name).suffix] + (
        "" if name.endswith(".svg") else "; charset=utf-8"
    )
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "connect", "img")} == {"'self'"}
    again = await http.get(path, headers={"If-None-Match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == response.headers["etag"]


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fpage.py", "%2e%2e/app.py", ".", "style.css/", "x" * 5000])
async def test_no_other_files(tokenizer: Tokenizer, name: str) -> None:
    engine = LiveClient()
    response = await Api(make_app(tokenizer, engine), engine).http.get(f"/dashboard/{name}")
    assert response.status_code == 404


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for name in FILES:
        text = (dashboard.FOLDER / name).read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text, name
        assert "https:" not in text, name
        assert "innerHTML" not in text, name


# --- in a browser ---------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
async def browser() -> AsyncIterator[Any]:
    """Chromium without a window; skipped where there is none."""
    playwright = pytest.importorskip("playwright.async_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed here (Debian: apt-get install chromium)")
    async with playwright.async_playwright() as play:
        # Its sandbox does not work for root. It opens nothing but our own page.
        launched = await play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        await launched.close()


@contextlib.asynccontextmanager
async def opened(browser: Any, app: Any, **options: Any) -> AsyncIterator[Any]:
    """The dashboard of a server; nothing may go wrong in the page, its content security policy included."""
    async with serving(app) as port:
        tab = await browser.new_page(**options)
        wrong: list[str] = []
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("console", lambda line: wrong.append(line.text) if line.type in ("error", "warning") else None)
        tab.set_default_timeout(10_000)
        await tab.goto(f"http://127.0.0.1:{port}/")
        tab.wrong = wrong
        yield tab
        await tab.close()
    assert wrong == []


async def says(tab: Any, selector: str, text: str) -> None:
    """Waits until an element says so."""
    await tab.wait_for_function(
        "([s, t]) => [...document.querySelectorAll(s)].some((e) => e.textContent.includes(t))", arg=[selector, text]
    )


async def test_a_turn_from_its_decision_to_its_end(tokenizer: Tokenizer, browser: Any) -> None:
    engine = LiveClient()
    engine.whole("before", "early")
    async with opened(browser, make_app(tokenizer, engine)) as tab:
        await says(tab, "#status", "live")
        await says(tab, "#about", "tiny, policy observe")
        assert await tab.locator(".worker").count() == 2
        await says(tab, ".lane .name", "early")  # from GET /v1/conversations: nobody listened then
        engine.begin("a", "<b>c1</b>")
        await says(tab, ".lane .name", "<b>c1</b>")
        await says(tab, "#detail h3", "<b>c1</b> · turn 1")
        await says(tab, "#detail .chosen th", "✓")
        engine.report("a", 0, [7], prefill=0.01)
        await asyncio.sleep(0.1)
        engine.report("a", 1, [8, 9], "stop")
        await says(tab, "figure p", "2 turns")
        await says(tab, "figure p", "2 conversations")
        turn = tab.locator('.turn[aria-label^="<b>c1</b>, turn 1"]')
        await turn.hover()
        await says(tab, "#detail .real", "–")  # harm is not measured
        assert "stop" in await turn.get_attribute("aria-label")
        await tab.mouse.move(5, 5)
        await turn.focus()
        await says(tab, "#detail-which", "of the turn you point at")
        await tab.keyboard.press("ArrowUp")
        await says(tab, "#detail h3", "early · turn 1")
        await tab.keyboard.press("Escape")
        await says(tab, "#detail-which", "the latest")


async def test_what_waits_and_what_is_cancelled(tokenizer: Tokenizer, browser: Any) -> None:
    engine = LiveClient("conserve")
    engine.begin("big", "first", tokens=60_000)
    engine.begin("next", "second", tokens=60_000)
    async with opened(browser, make_app(tokenizer, engine)) as tab:
        await says(tab, ".lane .name", "second")
        assert "is queued" in await tab.locator('.turn[aria-label^="second"]').get_attribute("aria-label")
        engine.carry_out(engine.scheduler.cancel("next", time.monotonic()))
        await tab.wait_for_function("() => !document.querySelector('.turn[aria-label^=\"second\"]')")
        engine.carry_out(engine.scheduler.cancel("big", time.monotonic()))
        await says(tab, ".turn .failed", "✕")


async def test_many_conversations(tokenizer: Tokenizer, browser: Any) -> None:
    engine = LiveClient()
    async with opened(browser, make_app(tokenizer, engine)) as tab:
        await says(tab, "#status", "live")
        for number in range(500):
            engine.begin(f"t{number}", f"conversation-{number}", tokens=16)
        await says(tab, "#count", "20 of 500 shown; 500 turns under way")
        for number in range(500):
            engine.report(f"t{number}", 0, [7], "stop")
        await says(tab, "#count", "20 of 500 shown; 0 turns under way")
        assert await tab.locator(".lane").count() == 20
        assert await tab.locator(".turn").count() <= 20
        await says(tab, "figure p", "500 turns")


async def test_chat(tokenizer: Tokenizer, browser: Any) -> None:
    engine = LiveClient(steps=[*spell("Hello"), [EOS]], stop_token=EOS)
    async with opened(browser, make_app(tokenizer, engine)) as tab:
        for text in ("Hi", "And?"):
            await tab.fill("#chat-text", text)
            await tab.keyboard.press("Enter")
            await tab.wait_for_function(
                "() => document.querySelector('#chat-log p:last-child').textContent === 'Hello'"
            )
            await says(tab, "#chat-send", "Send")
        id = await tab.text_content("#chat-id")
        assert [turn.conversation for turn in engine.turns] == [id, id]
        assert bytes(engine.turns[1].tokens).decode() == "user: Hi\nassistant: Hello\nuser: And?\nassistant:"
        await tab.click("#chat-new")
        assert await tab.text_content("#chat-id") != id
        assert await tab.text_content("#chat-log") == ""


async def test_stopping_a_chat(tokenizer: Tokenizer, browser: Any) -> None:
    engine = LiveClient(steps=[[65]] * 400, pause=0.05)
    async with opened(browser, make_app(tokenizer, engine)) as tab:
        await tab.fill("#chat-text", "Hi")
        await tab.click("#chat-send")
        await says(tab, "#chat-log .model", "AA")
        await tab.click("#chat-send")
        await says(tab, "#chat-log .error", "stopped")
        async with asyncio.timeout(5):
            await engine.turns[0].cancelled.wait()


async def test_the_key_is_asked_for_once(tokenizer: Tokenizer, browser: Any) -> None:
    async with opened(browser, make_app(tokenizer, LiveClient(), api_key=SECRET)) as tab:
        await says(tab, "#status", "an API key is needed")
        await tab.fill("#key-input", "wrong")
        await tab.keyboard.press("Enter")
        await says(tab, "#status", "the API key is wrong")
        assert await tab.locator(".worker").count() == 0
        await tab.fill("#key-input", SECRET)
        await tab.keyboard.press("Enter")
        await says(tab, "#status", "live")
        assert not await tab.is_visible("#key")
        await tab.reload()
        await says(tab, "#status", "live")
        # What the browser itself says of a 401.
        assert all("401" in line for line in tab.wrong)
        tab.wrong.clear()


async def test_a_server_that_goes_and_returns(tokenizer: Tokenizer, browser: Any) -> None:
    engine = LiveClient()
    async with opened(browser, make_app(tokenizer, engine)) as tab:
        await says(tab, "#status", "live")
        engine.carry_out(engine.scheduler.worker_down("d0", returns=True, now=time.monotonic()))
        await says(tab, ".worker.gone", "d0 is gone")
        engine.up("d0", epoch=2)
        await says(tab, ".worker:not(.gone)", "d0 decoder, started 2 times")
        engine.feed.close()
        await says(tab, "#status", "the server has ended; trying again in")
        engine.feed._closed = False
        await says(tab, "#status", "live")


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (800, "dark"), (1600, "light")])
async def test_it_fits(tokenizer: Tokenizer, browser: Any, width: int, scheme: str) -> None:
    """Nothing has to be scrolled sideways, and nothing moves when there is more to show."""
    engine = LiveClient()
    size = {"width": width, "height": 900}
    async with opened(browser, make_app(tokenizer, engine), viewport=size, color_scheme=scheme) as tab:
        await says(tab, "#status", "live")
        tops = "[...document.querySelectorAll('section')].map((e) => e.getBoundingClientRect().top)"
        before = await tab.evaluate(tops)
        for number in range(30):
            engine.whole(f"t{number}", f"a-conversation-with-a-rather-long-name-{number}")
        await says(tab, "figure p", "30 turns")
        assert await tab.evaluate(tops) == before
        assert await tab.evaluate("document.documentElement.scrollWidth") <= width
        dark = await tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 23)"
        assert dark == (scheme == "dark")
