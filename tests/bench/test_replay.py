"""`miniserve replay` against real servers: miniserve's own app over a fake engine, a stand-in for llama-server, and a
tiny model in real workers.

What the driver itself takes, at 32 streams and 490 tokens a second (a server in another process that writes a chunk for
each token and stream every 64 ms; prompts of 1,000 to 3,120 ids): 2 % of one core of an EPYC, all of it counted. The
same bare loop of aiohttp takes 1.3 %, and 2.7 % on asyncio's own event loop.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from miniserve.bench.replay.driver import ALONE, ReplayConfig, replay
from miniserve.bench.replay.workload import Script, Text, TurnSize, Workload
from miniserve.cli import main as cli
from miniserve.config import ConfigError
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.scheduler import QueueFull
from miniserve.scheduler.workers import Link
from miniserve.text.tokenizer import Tokenizer
from tests.support.fake_engine import FakeTurn
from tests.support.server_process import server as real_server
from tests.support.spoken import VOCAB, SpokenEngine, asking_for, first_id, listening, script, serving, spoken

pytestmark = pytest.mark.slow


def config(
    url: str,
    scripts: list[Script],
    *,
    starts: list[float] | None = None,
    rate: float | None = None,
    seed: int = 0,
    **given: Any,
) -> ReplayConfig:
    workload = Workload(scripts=scripts, starts=starts or [0.0] * len(scripts), rate=rate, seed=seed)
    return ReplayConfig(**{"url": url, "workload": workload, "vocab": VOCAB} | given)


# --- against miniserve ----------------------------------------------------------------------------------------------

SCRIPTS = [
    script("a", (30, 5, 0), (7, 6, 0.3), (1, 1, 0)),
    script("b", (40, 4, 0), (9, 12, 0.1)),
    script("c", (20, 3, 0)),
]


@pytest.mark.parametrize("ids", ["returned", "made up"])
def test_conversations_grow_and_every_token_is_served_once(tokenizer: Tokenizer, ids: str) -> None:
    engine = SpokenEngine()

    def count(tokens: list[int]) -> dict[str, Any]:
        engine.scheduler.placements["p0", "d0"] += 1
        link = engine.scheduler.links["p0", "d0"]
        engine.scheduler.links["p0", "d0"] = Link(link.count + 1, link.pages, link.bytes + 100, link.seconds + 0.25)
        return {"cached": len(tokens) // 16 * 16 if len(tokens) > 40 else 0}

    engine.trouble = count
    with serving(engine, tokenizer) as url, asking_for(ids):
        began = time.monotonic()
        report = replay(config(url, SCRIPTS, starts=[0.0, 0.2, 0.1], seed=3, rate=10.0))

    cached = prompts = 0
    for of, start in zip(SCRIPTS, (0.0, 0.2, 0.1), strict=True):
        text = Text(of, 3, (1000, VOCAB))
        want: list[int] = []
        due = began + start
        turns = engine.conversation(first_id(of, 3))
        assert len(turns) == len(of.turns)
        for n, (size, turn) in enumerate(zip(of.turns, turns, strict=True)):
            want += text.take(size.new)
            assert turn.tokens == want
            assert turn.params.max_tokens == turn.given == size.output
            assert turn.params.ignore_eos
            assert turn.params.temperature == 0
            at = engine.times[engine.turns.index(turn)]
            assert at >= due
            if n + 1 < len(of.turns):  # its answer took 2 ms a token
                due = at + 0.002 * size.output + of.turns[n + 1].gap
            want += spoken(want, size.output) if ids == "returned" else text.take(size.output)
            prompts += len(turn.tokens)
            cached += len(turn.tokens) // 16 * 16 if len(turn.tokens) > 40 else 0
    assert report["output_tokens"] == 31
    assert (report["conversations"], report["turns"], report["errors"], report["unfinished"]) == (3, 6, 0, 0)
    assert (report["prompt_tokens"], report["cached_tokens"]) == (prompts, cached)
    assert report["output_ids"] == ids
    assert report["short_turns"] == report["stale_cached_tokens"] == 0
    assert (report["policy"], report["topology"]) == ("conserve", "1P1D")
    assert (report["rate"], report["seed"]) == (10.0, 3)
    assert report["server"]["kind"] == "miniserve"
    assert report["placements"] == {"p0->d0": 6}
    assert report["kv_transfer"] == {"bytes": 600, "seconds": pytest.approx(1.5)}
    # What the tools took is in no latency; a token takes 2 ms or more, but several may be read at once.
    assert 0.01 < report["e2e_s"]["p50"] < report["e2e_s"]["p99"] < 0.3 < report["duration_s"]
    assert report["last_turn_tbt_s"]["p50"] > 0.0002
    assert report["ttft_norm"] is None
    msgspec.json.encode(report)


FAMILY = Script(
    "p",
    (TurnSize(40, 6), TurnSize(10, 5, 0.05, keep=25), TurnSize(8, 4, 0.05)),
    agents=(
        replace(script("p/0", (12, 8, 0.1), (5, 3, 0.1)), prefix=43),
        replace(script("p/1", (20, 60, 0)), until=2),
        replace(script("p/2", (9, 100, 0)), after=2, until=3),
    ),
)


@pytest.mark.parametrize("ids", ["returned", "made up"])
def test_kept_prefixes_and_sub_agents(tokenizer: Tokenizer, ids: str) -> None:
    """A sub-agent begins with the very tokens of its parent, answers too; the parent waits for those that it joins."""
    engine = SpokenEngine()
    with serving(engine, tokenizer) as url, asking_for(ids):
        report = replay(config(url, [FAMILY], seed=3))

    def said(text: Text, turn: TurnSize) -> list[int]:
        prompt = text.prompt(turn).tolist()
        text.said.fromlist(spoken(prompt, turn.output) if ids == "returned" else text.take(turn.output))
        return prompt

    parent = Text(FAMILY, 3, (1000, VOCAB))
    prompts = {"p": [said(parent, FAMILY.turns[0])]}
    for one in FAMILY.agents:
        text = Text(one, 3, (1000, VOCAB), parent.said[: one.prefix])
        prompts[one.key] = [said(text, turn) for turn in one.turns]
    assert len(prompts["p/0"][0]) == 43 + 12, "40 tokens of the prompt, 3 of the answer"
    prompts["p"] += [said(parent, turn) for turn in FAMILY.turns[1:]]
    assert [len(prompt) for prompt in prompts["p"]] == [40, 35, 48]
    at = {tuple(turn.tokens): time for turn, time in zip(engine.turns, engine.times, strict=True)}
    assert sorted(at) == sorted(tuple(prompt) for each in prompts.values() for prompt in each)
    times = {key: [at[tuple(prompt)] for prompt in each] for key, each in prompts.items()}
    assert times["p/0"][0] >= times["p"][0] + 6 * 0.002 + 0.1
    assert times["p/1"][0] < times["p/0"][0], "each after its own gap"
    assert times["p"][1] >= times["p/0"][1] + 3 * 0.002, "the next turn waits for the first one"
    assert times["p"][2] >= max(times["p"][1] + 5 * 0.002 + 0.05, times["p/1"][0] + 60 * 0.002)
    assert times["p/2"][0] >= times["p"][2] + 4 * 0.002, "this one is not waited for"
    assert (report["conversations"], report["turns"], report["unfinished"], report["errors"]) == (4, 7, 0, 0)
    assert report["stale_cached_tokens"] == 0
    assert report["e2e_s"]["p99"] < report["group_e2e_s"]["p50"] < report["duration_s"]
    assert {(turn.conversation, turn.said.parent, turn.said.client) for turn in engine.turns} == {("", "", "python")}


def test_groups_are_named_where_that_is_asked_for(tokenizer: Tokenizer) -> None:
    engine = SpokenEngine()
    with serving(engine, tokenizer) as url:
        report = replay(config(url, [FAMILY, SCRIPTS[2]], name_groups=True, standalone=1))
    alone, turns = engine.turns[:7], engine.turns[7:]
    assert [len(turn.tokens) for turn in alone] == [40, 35, 48, 55, 68, 20, 9], "each alone, with a prefix of its own"
    assert {turn.conversation for turn in alone} == {""}
    assert not {turn.tokens[0] for turn in alone} & {turn.tokens[0] for turn in turns}
    named = Counter((turn.conversation, turn.said.parent) for turn in turns)
    assert named == {("p", ""): 3, ("p/0", "p"): 2, ("p/1", "p"): 1, ("p/2", "p"): 1, ("c", ""): 1}
    assert {turn.said.client for turn in turns} == {"miniserve-replay"}
    assert not any(turn.said.side for turn in turns)
    assert report["e2e_norm"]["gmean"] > 0


def test_a_parent_that_fails_starts_no_more_sub_agents(tokenizer: Tokenizer) -> None:
    engine = SpokenEngine()
    engine.trouble = lambda tokens: {"finish": "error", "error": "out of luck"} if len(tokens) == 48 else {}
    with serving(engine, tokenizer) as url:
        report = replay(config(url, [FAMILY]))
    assert (report["conversations"], report["errors"], report["unfinished"]) == (3, 1, 1)
    assert report["group_e2e_s"] is None


def test_failures_stay_with_their_conversation(tokenizer: Tokenizer) -> None:
    engine = SpokenEngine()
    scripts = [script(key, (20, 4, 0), (5, 4, 0)) for key in ("good", "bad", "slow", "broken")]
    bad, slow, broken = (first_id(of) for of in scripts[1:])

    def trouble(tokens: list[int]) -> dict[str, Any]:
        if tokens[0] == bad and len(tokens) > 20:
            return {"steps": [[65], [66]], "finish": "error", "error": "out of luck"}
        return {"pause": 5.0} if tokens[0] == slow else {}

    engine.trouble = trouble
    submit = engine.submit

    def fragile(tokens: list[int], params: SamplingParams, **given: Any) -> FakeTurn:
        if tokens[0] == broken and len(tokens) > 20:
            raise RuntimeError("a bug")
        return submit(tokens, params, **given)

    engine.submit = fragile  # type: ignore[method-assign]
    with serving(engine, tokenizer) as url:
        report = replay(config(url, scripts, timeout=0.5))
    assert report["errors"] == 3
    assert report["output_tokens"] == 8 + (4 + 1) + 0 + 4
    assert sorted(report["failures"]) == [
        "HTTP 500: The server failed to answer this request; its log says why.",
        "The server did not finish within 0.5 s",
        "The server failed after 1 tokens: out of luck",
    ]
    assert len(engine.conversation(first_id(scripts[0]))) == 2
    assert len(engine.conversation(slow)) == len(engine.conversation(broken)) == 1
    assert engine.conversation(slow)[0].cancelled.is_set()


def test_a_full_server_is_asked_again(tokenizer: Tokenizer) -> None:
    class FullOnce(SpokenEngine):
        def check_room(self) -> None:
            refuse, self.refuse = self.refuse, None
            if refuse is not None:
                raise refuse

    engine: SpokenEngine = FullOnce()
    engine.refuse = QueueFull("full", 1)
    with serving(engine, tokenizer) as url:
        report = replay(config(url, SCRIPTS[2:]))
        assert (report["errors"], report["output_tokens"]) == (0, 3)
        assert 1.0 <= report["ttft_s"]["p50"] < 3
        engine.refuse = QueueFull("full", 30)
        report = replay(config(url, SCRIPTS[2:], timeout=0.2))
    assert list(report["failures"]) == ["The server did not finish within 0.2 s: it was full"]
    assert report["ttft_s"] is None


def test_ctrl_c_frees_the_server_and_keeps_what_was_measured(tokenizer: Tokenizer) -> None:
    engine = SpokenEngine(pause=0.02)
    scripts = [script("short", (20, 3, 0)), script("long", (20, 2000, 0)), script("gap", (20, 1, 0), (5, 1, 60))]
    scripts.append(script("late", (20, 1, 0)))

    def interrupt() -> None:
        while sum(turn.given for n in (0, 2) for turn in engine.conversation(first_id(scripts[n]))) < 4:
            time.sleep(0.01)
        time.sleep(0.2)  # their clients have read the ends, too
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with serving(engine, tokenizer) as url:
        report = replay(config(url, scripts, starts=[0, 0, 0, 60]))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert report["interrupted"]
        assert report["duration_s"] < 10
        assert (report["conversations"], report["unfinished"], report["output_tokens"]) == (1, 3, 3)
        assert report["ttft_s"]["p50"] > 0
        (running,) = engine.conversation(first_id(scripts[1]))
        deadline = time.monotonic() + 2
        while not running.cancelled.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert running.cancelled.is_set()


@pytest.mark.parametrize(("standalone", "alone"), [(3, 4), (1, 3)])
def test_standalone(tokenizer: Tokenizer, standalone: int, alone: int) -> None:
    """Each kind of script once, in order, without gaps, with ids of its own; then all of them as ever."""
    engine = SpokenEngine()
    scripts = [SCRIPTS[0], SCRIPTS[2], script("c too", (20, 3, 0))]
    with serving(engine, tokenizer) as url:
        report = replay(config(url, scripts, standalone=standalone))
    assert len(engine.turns) == alone + 5
    before, after = engine.turns[:alone], engine.turns[alone:]
    assert [len(turn.tokens) for turn in before] == [30, 42, 49, 20][:alone]
    assert engine.times[1] - engine.times[0] < 0.2 < 0.3 <= report["duration_s"]
    assert before[0].tokens == Text(SCRIPTS[0], ALONE, (1000, VOCAB)).take(30)
    assert not {turn.tokens[0] for turn in before} & {turn.tokens[0] for turn in after}
    assert report["turns"] == 5
    assert 0.1 < report["e2e_norm"]["gmean"] < 10
    assert report["ttft_norm"].keys() == {"gmean", "p50", "p95"}


def test_what_should_be_put_right_before(tokenizer: Tokenizer) -> None:
    engine = SpokenEngine()
    with serving(engine, tokenizer) as url:
        with pytest.raises(ConfigError, match=r"10,030 tokens.*4,096: --scale-tokens 0\.2 would fit"):
            replay(config(url, [*SCRIPTS, script("d", (10_000, 30, 0))], scale_tokens=0.5))
        with pytest.raises(ConfigError, match="no model 'x': it has tiny"):
            replay(config(f"{url}/v1", SCRIPTS, model="x"))
        engine.trouble = lambda tokens: {"finish": "error", "error": "out of luck"}
        with pytest.raises(ConfigError, match=r"'a' failed even alone.*out of luck"):
            replay(config(url, SCRIPTS, standalone=3))
        with pytest.raises(ConfigError, match="nothing at GET"):
            replay(config(f"{url}/health", SCRIPTS))
    with pytest.raises(ConfigError, match="Start one with"):
        replay(config(url, SCRIPTS))
    with pytest.raises(ConfigError, match="is no address"):
        replay(config("localhost", SCRIPTS))
    with pytest.raises(ConfigError, match="nothing to replay"):
        replay(config(url, []))


# --- against others -------------------------------------------------------------------------------------------------


def test_llama_server_and_streams_that_break_off() -> None:
    """A stand-in for llama-server: its own /completion returns ids, but not that of half a character."""
    prompts: list[dict[str, Any]] = []

    def event(fields: dict[str, Any]) -> bytes:
        return b"data: " + msgspec.json.encode(fields) + b"\n\n"

    async def models(request: web.Request) -> web.Response:
        card = {"id": "m.gguf", "owned_by": "llamacpp", "meta": {"n_vocab": 5000}}
        return web.json_response({"object": "list", "data": [card]})

    async def props(request: web.Request) -> web.Response:
        return web.json_response({"default_generation_settings": {"n_ctx": 300}, "build_info": "b1"})

    async def completion(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompts.append(body)
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        for token in (7, 8):
            await reply.write(event({"content": "x", "tokens": [token], "stop": False}))
        if len(prompts) == 3:
            return reply
        counts = {"tokens_predicted": 3, "tokens_evaluated": len(body["prompt"]), "timings": {"cache_n": 16}}
        await reply.write(event({"content": "", "tokens": [], "stop": True, **counts}))
        return reply

    async def run(listener: socket.socket, started: threading.Event, stop: asyncio.Event) -> None:
        app = web.Application()
        app.add_routes([web.get("/v1/models", models), web.get("/props", props), web.post("/completion", completion)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.SockSite(runner, listener).start()
        started.set()
        await stop.wait()
        await runner.cleanup()

    loop, stop, started = asyncio.new_event_loop(), asyncio.Event(), threading.Event()
    with listening() as listener:
        thread = threading.Thread(target=lambda: loop.run_until_complete(run(listener, started, stop)))
        thread.start()
        started.wait(5)
        try:
            of = script("a", (20, 3, 0), (4, 3, 0), (4, 3, 0))
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            report = replay(config(url, [of], vocab=None))
            with pytest.raises(ConfigError, match="context 300"):
                replay(config(url, [script("b", (400, 1, 0))]))
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()
            loop.close()
    text = Text(of, 0, (1000, 5000))
    want = text.take(20)
    assert prompts[0] == {
        "prompt": want,
        "stream": True,
        "temperature": 0,
        "ignore_eos": True,
        "n_predict": 3,
        "return_tokens": True,
        "cache_prompt": True,
    }
    made_up = text.take(1)
    assert prompts[1]["prompt"] == [*want, 7, 8, *made_up, *text.take(4)]
    assert report["output_ids"] == "made up"
    assert list(report["failures"]) == ["The stream broke off after 2 tokens"]
    assert (report["output_tokens"], report["cached_tokens"], report["stale_cached_tokens"]) == (8, 32, 16)
    assert report["policy"] is report["topology"] is report["placements"] is None
    assert report["kv_transfer"] == {"bytes": None, "seconds": None}


# --- a real model ---------------------------------------------------------------------------------------------------


def test_a_real_server(tiny_folder: Path, tmp_path: Path) -> None:
    scripts = [script(f"t{n}", (64, 8, 0), (16, 9, 0.05), (16, 10, 0)) for n in range(4)]
    with real_server(tiny_folder, "--topology", "1P1D", "--policy", "conserve", runtime=tmp_path) as running:
        report = replay(config(running.url, scripts, vocab=300))
        assert running.metric("vllm:generation_tokens_total") == report["output_tokens"] == 4 * 27
        until = time.monotonic() + 10
        while running.metric("miniserve:kv_pages", state="held") and time.monotonic() < until:
            time.sleep(0.1)  # idle workers report once a second
        assert running.metric("miniserve:kv_pages", state="held") == 0
    assert report["errors"] == report["stale_cached_tokens"] == report["short_turns"] == 0
    assert report["output_ids"] == "returned"
    assert report["placements"] == {"p0->d0": 4, "d0": 8}
    assert report["kv_transfer"]["bytes"] > 0
    # Turns 2 and 3 find all that came before, but the last page and the token that was never an input.
    assert report["cached_tokens"] == 4 * (64 + 96)


def test_the_command(tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, out = tmp_path / "t.csv", tmp_path / "out.json"
    rows = [f"{c},{t},{40 if t == 0 else 8},5,{t * 0.1}" for c in range(4) for t in range(3)]
    trace.write_text("\n".join(["conversation_id,turn,new_input_tokens,output_tokens,gap_s", *rows]) + "\n")
    with serving(SpokenEngine(), tokenizer) as url:
        command = f"replay {trace} --url {url} --rate 20 --conversations 3 --max-turns 2 --seed 7 --json {out}"
        assert cli.main(command.split()) == 0
        report = json.loads(out.read_text())
        assert (report["conversations"], report["turns"], report["output_tokens"]) == (3, 6, 30)
        assert (report["rate"], report["seed"], report["errors"]) == (20.0, 7, 0)
        assert 0.02 < report["ttfet_norm"]["gmean"] < 50
        assert cli.main([*command.split(), "--standalone", "0", "--scale-tokens", "0.5"]) == 0
        report = json.loads(out.read_text())
        assert (report["output_tokens"], report["ttfet_norm"]) == (12, None)
        assert cli.main([*command.split(), "--scale-tokens", "1000"]) == 1
        assert "--scale-tokens" in capsys.readouterr().err
    assert cli.main(command.split()) == 1
    assert "No server answers" in capsys.readouterr().err
