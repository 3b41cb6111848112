"""The dashboard: its files, and its page in a browser."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from miniserve.api import dashboard
from miniserve.hub import resolve as hub
from miniserve.text.tokenizer import Tokenizer
from tests.support.agents import AgentEngine
from tests.support.api import Api, make_app, serving
from tests.support.fake_engine import EOS, spell
from tests.support.live_engine import LiveClient

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = sorted(path.name for path in dashboard.FOLDER.iterdir())
SECRET = "sécret"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(hub.resolve("smollm2-135m", load_format="dummy").folder)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", *(f"/dashboard/{name}" for name in FILES)])
async def test_files_of_the_page(tokenizer: Tokenizer, path: str) -> None:
    engine = LiveClient()
    http = Api(make_app(tokenizer, engine, api_key="k"), engine).http
    response = await http.get(path)
    assert response.status_code == 200
    name = path.rpartition("/")[2] or "index.html"
    assert response.content == (dashboard.FOLDER / name).read_bytes()
    assert response.headers["content-type"] == TYPES[Path(name).suffix] + (
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
        await says(tab, ".lane .name", "early")  # from GET /conversations: there was no listener then
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


# --- groups and prefixes --------------------------------------------------------------------------------------------

HOSTILE = "<img src=x onerror=document.title='owned'>"
TOOLS = [{"type": "function", "function": {"name": "read", "parameters": {"type": "object", "properties": {}}}}]


async def said_by_opencode(app: Any, session: str, *texts: str, parent: str = "", tools: bool = True) -> None:
    """A turn of a session; `texts` are its system prompt, and what its user and the model have said in turn."""
    roles = ["system", *["user", "assistant"] * len(texts)]
    body = {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}
    named = {"x-session-id": session, "x-parent-session-id": parent}
    headers = {"user-agent": "opencode"} | {name: value for name, value in named.items() if value}
    sent = await Api(app, AgentEngine()).http.post(
        "/v1/chat/completions", json={**body, **({"tools": TOOLS} if tools else {})}, headers=headers
    )
    assert sent.status_code == 200, sent.text


async def test_a_group_stands_together(hermes: Tokenizer, browser: Any) -> None:
    app = make_app(hermes, AgentEngine())
    async with opened(browser, app) as tab:
        await says(tab, "#status", "live")
        await said_by_opencode(app, "main", "Be of help.", "Fix it.")
        await says(tab, ".lane .name", "main")
        await said_by_opencode(app, "other", "Be brief.", "Hi")
        await says(tab, ".lane .name", "other")
        await tab.locator('.turn[aria-label^="other"]').focus()
        await said_by_opencode(app, "sub-1", "Search for it.", "Where?", parent="main")
        await said_by_opencode(app, HOSTILE, "Test it.", "How?", parent="main")
        await said_by_opencode(app, "main", "Write a title.", "Fix it.", tools=False)
        await says(tab, ".lane .name small", "side request: not counted as a turn")
        lanes = tab.locator(".lane", has=tab.locator(".name span:not(:empty)"))
        names = await lanes.locator(".name span").all_text_contents()
        assert names[:3] + names[4:] == ["main", "sub-1", HOSTILE, "other"]
        assert names[3].startswith("main~")
        labels = await lanes.locator(".name small").all_text_contents()
        assert labels[:3] + labels[4:] == ["opencode", "sub-agent", "sub-agent", "opencode"]
        box = "(lanes) => lanes.map((lane) => lane.querySelector('.name').getBoundingClientRect().left)"
        lefts = await lanes.evaluate_all(box)
        assert lefts[0] == lefts[4] < lefts[1] == lefts[2] == lefts[3]
        assert await tab.locator(".lane.child").count() == 3
        assert (await tab.evaluate("document.activeElement.ariaLabel")).startswith("other, turn 1")
        await tab.keyboard.press("ArrowUp")
        await tab.keyboard.press("ArrowUp")
        await says(tab, "#detail p", "opencode, sub-agent, parent main")
        await says(tab, "#detail h3", HOSTILE)
        assert await tab.locator("main img").count() == 0
        assert await tab.title() == "miniserve"


async def test_a_guess_comes_and_goes(hermes: Tokenizer, browser: Any) -> None:
    engine = AgentEngine()
    app = make_app(hermes, engine)
    system = "Read the files that matter before you change any of them."
    async with opened(browser, app) as tab:
        await says(tab, "#status", "live")
        await said_by_opencode(app, "", system, "Fix it.")
        await said_by_opencode(app, "", system, "Search for it.")
        await said_by_opencode(app, "", system, "Fix it.", "Fine.", "Go on.")
        await says(tab, ".lane.child .name", "2perhaps a sub-agent")
        parent = engine.scheduler.conversations.get(1)
        assert parent is not None
        parent.last_end = 0.0  # as if it had not gone on
        await tab.wait_for_function("() => !document.querySelector('.lane.child')")
        await says(tab, ".lane .name", "2opencode")


async def test_which_lanes_there_are(tokenizer: Tokenizer, browser: Any) -> None:
    """The latest groups, the last of them cut; parents in a circle, unknown ones, and a guess that is taken back."""
    shown = """async ([rows, order, shown]) => {
      const { arrange } = await import("./dashboard/groups.js");
      const all = new Map();
      for (const [began, [id, parent, end, group = parent ?? id]] of rows.entries()) {
        all.set(id, { id, parent, group, began, turns: [{ end }] });
      }
      const { lanes } = arrange(all, order, new Set(shown.map((id) => all.get(id))), "own", 100);
      return lanes.map(({ conversation, depth, up }) => `${conversation.id} ${depth} ${up}`);
    }"""
    async with opened(browser, make_app(tokenizer, LiveClient())) as tab:

        async def lanes(rows: list[Any], order: tuple[str, ...] = (), kept: tuple[str, ...] = ()) -> list[str]:
            return await tab.evaluate(shown, [rows, order, kept])

        family = [["a", None, 50], ["b", None, 300], ["a1", "a", 200], ["a2", "a", 90], ["a11", "a1", 201]]
        assert await lanes(family) == ["b 0 0", "a 0 0", "a1 1 1", "a11 2 1"]
        assert await lanes(family, ("a", "b"), ("a2",)) == ["a 0 0", "a1 1 1", "a11 2 1", "a2 1 3", "b 0 0"]
        alone = [[id, None if id == "a1" else parent, end] for id, parent, end in family]
        assert await lanes(alone, ("a", "b")) == ["a1 0 0", "a11 1 1", "b 0 0"]
        circle = [["x", "y", 200, "y"], ["y", "x", 200, "y"], ["z", "gone", 200]]
        assert await lanes(circle) == ["x 0 0", "y 1 1", "z 1 0"]
        assert await lanes([row[:3] for row in circle]) == ["x 1 0", "y 1 0", "z 1 0"]
        many = [["a", None, 101]] + [[f"a{n}", "a", 102 + n] for n in range(15)]
        found = await lanes(many + [[f"b{n}", None, 500 + n] for n in range(8)] + [["own", None, 1]])
        assert len(found) == 20
        assert found[:2] == ["own 0 0", "b7 0 0"]
        assert found[9:] == ["a 0 0", *[f"a{n} 1 {n - 4}" for n in range(5, 15)]]


@pytest.mark.parametrize("consent", [True, False])
async def test_a_miss_is_shown(hermes: Tokenizer, browser: Any, consent: bool) -> None:
    app = make_app(hermes, AgentEngine(), log_prompts=consent)
    more = "Read the files that matter before you change any of them. " * 3
    async with opened(browser, app) as tab:
        await says(tab, "#prefixes-which", "no turn has ended yet")
        await said_by_opencode(app, "s", f"It is <b>10:00:00</b> now. {more}", "Hi")
        await says(tab, "#prefixes-which", "all is well")
        assert await tab.locator(".turn.missed").count() == 0
        await said_by_opencode(app, "s", f"It is <b>11:30:09</b> now. {more}", "Hi", "Fine.", "And?")
        await tab.locator(".turn.missed").focus()
        assert "tokens computed again" in await tab.evaluate("document.activeElement.ariaLabel")
        await says(tab, "#detail p", "in messages[0]: the time of day stands in it")
        texts = await tab.locator("#detail pre").all_text_contents()
        assert len(texts) == 2
        for text, time in zip(texts, ("10:00:00", "11:30:09"), strict=True):
            assert (f"<b>{time}</b>" in text) == consent
            assert text.startswith("hash ") != consent
        assert await tab.locator("#detail pre b").count() == 0
        await says(tab, "#prefixes p", "of that because the time of day stands in the system prompt.")
        await says(tab, "#prefixes p", "opencode: 2 turns, ")


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
