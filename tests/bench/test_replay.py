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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvicorn
from aiohttp import web

from miniserve.api.app import create_app
from miniserve.bench.replay.driver import ALONE, ReplayConfig, replay
from miniserve.bench.replay.energy import Energy
from miniserve.bench.replay.server import Event, Server
from miniserve.bench.replay.workload import Task, Text, TurnSize
from miniserve.cli import main as cli
from miniserve.config import ConfigError, EngineConfig, ServeConfig
from miniserve.hub import resolve as hub
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.scheduler import QueueFull
from miniserve.scheduler.workers import Link
from miniserve.text.tokenizer import Tokenizer
from tests.e2e.test_server import server as real_server
from tests.support.fake_engine import FakeClient, FakeTurn

VOCAB = 49152


def spoken(prompt: list[int], count: int) -> list[int]:
    """What the fake engine answers: another text for each prompt, half of its tokens the first half of an "é"."""
    return [195 if i % 2 else 65 + (sum(prompt) + i) % 26 for i in range(count)]


class Engine(FakeClient):
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
def listening() -> Iterator[socket.socket]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        yield listener


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(hub.resolve("smollm2-135m", load_format="dummy").folder)


@contextmanager
def serving(engine: FakeClient, tokenizer: Tokenizer) -> Iterator[str]:
    """miniserve's app over `engine` in a thread: its URL."""
    config = ServeConfig(engine=EngineConfig(model="tiny"), served_model_names=["tiny"])
    app = create_app(config, engine, engine.feed, tokenizer, {})  # type: ignore[arg-type]
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


def task(key: str, *turns: tuple[int, int, float]) -> Task:
    return Task(key, tuple(TurnSize(*turn) for turn in turns))


def first_id(of: Task, seed: int = 0) -> int:
    return Text(of, seed, 1000, VOCAB).take(1)[0]


def config(url: str, tasks: list[Task], **given: Any) -> ReplayConfig:
    return ReplayConfig(**{"url": url, "tasks": tasks, "starts": [0.0] * len(tasks), "vocab": VOCAB} | given)


# --- against miniserve ----------------------------------------------------------------------------------------------

TASKS = [
    task("a", (30, 5, 0), (7, 6, 0.3), (1, 1, 0)),
    task("b", (40, 4, 0), (9, 12, 0.1)),
    task("c", (20, 3, 0)),
]


@pytest.mark.parametrize("ids", ["returned", "made up"])
def test_conversations_grow_and_every_token_is_served_once(tokenizer: Tokenizer, ids: str) -> None:
    engine = Engine()

    def count(tokens: list[int]) -> dict[str, Any]:
        engine.scheduler.placements["p0", "d0"] += 1
        link = engine.scheduler.links["p0", "d0"]
        engine.scheduler.links["p0", "d0"] = Link(link.count + 1, link.pages, link.bytes + 100, link.seconds + 0.25)
        return {"cached": len(tokens) // 16 * 16 if len(tokens) > 40 else 0}

    engine.trouble = count
    extra = {"return_token_ids": None} if ids == "made up" else {}
    with serving(engine, tokenizer) as url:
        began = time.monotonic()
        report = replay(config(url, TASKS, starts=[0.0, 0.2, 0.1], seed=3, rate=10.0, extra=extra))

    cached = prompts = 0
    for of, start in zip(TASKS, (0.0, 0.2, 0.1), strict=True):
        text = Text(of, 3, 1000, VOCAB)
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


def test_failures_stay_with_their_conversation(tokenizer: Tokenizer) -> None:
    engine = Engine()
    tasks = [task(key, (20, 4, 0), (5, 4, 0)) for key in ("good", "bad", "slow", "broken")]
    bad, slow, broken = (first_id(of) for of in tasks[1:])

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
        report = replay(config(url, tasks, timeout=0.5))
    assert report["errors"] == 3
    assert report["output_tokens"] == 8 + (4 + 1) + 0 + 4
    assert sorted(report["failures"]) == [
        "HTTP 500: The server failed to answer this request; its log says why.",
        "The server did not finish within 0.5 s",
        "The server failed after 1 tokens: out of luck",
    ]
    assert len(engine.conversation(first_id(tasks[0]))) == 2
    assert len(engine.conversation(slow)) == len(engine.conversation(broken)) == 1
    assert engine.conversation(slow)[0].cancelled.is_set()


def test_a_full_server_is_asked_again(tokenizer: Tokenizer) -> None:
    engine = Engine()
    engine.refuse = QueueFull("full", 1)
    threading.Timer(0.4, lambda: setattr(engine, "refuse", None)).start()
    with serving(engine, tokenizer) as url:
        report = replay(config(url, TASKS[2:]))
        assert (report["errors"], report["output_tokens"]) == (0, 3)
        assert 1.0 <= report["ttft_s"]["p50"] < 1.5
        engine.refuse = QueueFull("full", 30)
        report = replay(config(url, TASKS[2:], timeout=0.2))
    assert list(report["failures"]) == ["The server did not finish within 0.2 s: it was full"]
    assert report["ttft_s"] is None


def test_ctrl_c_frees_the_server_and_keeps_what_was_measured(tokenizer: Tokenizer) -> None:
    engine = Engine(pause=0.02)
    tasks = [task("short", (20, 3, 0)), task("long", (20, 2000, 0)), task("gap", (20, 1, 0), (5, 1, 60))]
    tasks.append(task("late", (20, 1, 0)))
    threading.Timer(0.6, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with serving(engine, tokenizer) as url:
        report = replay(config(url, tasks, starts=[0, 0, 0, 60]))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert report["interrupted"]
        assert report["duration_s"] < 1
        assert (report["conversations"], report["unfinished"], report["output_tokens"]) == (1, 3, 3)
        assert report["ttft_s"]["p50"] > 0
        (running,) = engine.conversation(first_id(tasks[1]))
        deadline = time.monotonic() + 2
        while not running.cancelled.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert running.cancelled.is_set()


@pytest.mark.parametrize(("standalone", "alone"), [(True, 4), (1, 3)])
def test_standalone(tokenizer: Tokenizer, standalone: bool | int, alone: int) -> None:
    """Each kind of task once, in order, without gaps, with ids of its own; then all of them as ever."""
    engine = Engine()
    tasks = [TASKS[0], TASKS[2], task("c too", (20, 3, 0))]
    with serving(engine, tokenizer) as url:
        report = replay(config(url, tasks, standalone=standalone))
    assert len(engine.turns) == alone + 5
    before, after = engine.turns[:alone], engine.turns[alone:]
    assert [len(turn.tokens) for turn in before] == [30, 42, 49, 20][:alone]
    assert engine.times[1] - engine.times[0] < 0.2 < 0.3 <= report["duration_s"]
    assert before[0].tokens == Text(TASKS[0], ALONE, 1000, VOCAB).take(30)
    assert not {turn.tokens[0] for turn in before} & {turn.tokens[0] for turn in after}
    assert report["turns"] == 5
    assert 0.1 < report["e2e_norm"]["gmean"] < 10
    assert report["ttft_norm"].keys() == {"gmean", "p50", "p95"}


def test_what_should_be_put_right_before(tokenizer: Tokenizer) -> None:
    engine = Engine()
    with serving(engine, tokenizer) as url:
        with pytest.raises(ConfigError, match=r"10,030 tokens.*4,096: --scale-tokens 0\.2 would fit"):
            replay(config(url, [*TASKS, task("d", (10_000, 30, 0))], scale=0.5))
        with pytest.raises(ConfigError, match="no model 'x': it has tiny"):
            replay(config(f"{url}/v1", TASKS, model="x"))
        engine.trouble = lambda tokens: {"finish": "error", "error": "out of luck"}
        with pytest.raises(ConfigError, match=r"'a' failed even alone.*out of luck"):
            replay(config(url, TASKS, standalone=True))
        with pytest.raises(ConfigError, match="no OpenAI API"):
            replay(config(f"{url}/health", TASKS))
    with pytest.raises(ConfigError, match="Start one with"):
        replay(config(url, TASKS))
    with pytest.raises(ConfigError, match="is no address"):
        replay(config("localhost", TASKS))
    with pytest.raises(ConfigError, match="nothing to replay"):
        replay(config(url, []))


# --- against others -------------------------------------------------------------------------------------------------


def test_llama_server_and_streams_that_break_off() -> None:
    """A stand-in for llama-server: it tells ids at its own /completion, but not that of half a character."""
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
            of = task("a", (20, 3, 0), (4, 3, 0), (4, 3, 0))
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            report = replay(config(url, [of], vocab=None, extra={"id_slot": 0}))
            with pytest.raises(ConfigError, match="context 300"):
                replay(config(url, [task("b", (400, 1, 0))]))
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()
            loop.close()
    text = Text(of, 0, 1000, 5000)
    want = text.take(20)
    assert prompts[0] == {
        "prompt": want,
        "stream": True,
        "temperature": 0,
        "ignore_eos": True,
        "n_predict": 3,
        "return_tokens": True,
        "cache_prompt": True,
        "id_slot": 0,
    }
    made_up = text.take(1)
    assert prompts[1]["prompt"] == [*want, 7, 8, *made_up, *text.take(4)]
    assert report["output_ids"] == "made up"
    assert list(report["failures"]) == ["The stream broke off after 2 tokens"]
    assert (report["output_tokens"], report["cached_tokens"], report["stale_cached_tokens"]) == (8, 32, 16)
    assert report["policy"] is report["topology"] is report["placements"] is None
    assert report["kv_transfer"] == {"bytes": None, "seconds": None}


def test_events_of_vllm_and_of_servers_without_ids() -> None:
    about = Server(root="", kind="vllm", model="m")
    choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": None, "prompt_token_ids": None}
    assert about.event(msgspec.json.encode({"choices": [choice | {"token_ids": [5, 6]}]})) == Event(2, [5, 6])
    assert about.event(b'{"choices": [{"text": "ab"}]}') == Event(1)
    assert about.event(b'{"choices": [{"text": ""}], "usage": null}') == Event()
    usage = b'"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": '
    assert about.event(b'{"choices": [], "usage": {%snull}}' % usage) == Event(usage=(9, -1, 2))
    assert about.event(b'{"choices": [], "usage": {%s{"cached_tokens": 4}}}' % usage) == Event(usage=(9, 4, 2))
    assert about.event(b'{"error": {"message": "no", "code": 500}}') == Event(error="no")
    assert about.event(b"[DONE]") == Event(done=True)


# --- a real model ---------------------------------------------------------------------------------------------------


def test_a_real_server(tiny_folder: Path, tmp_path: Path) -> None:
    tasks = [task(f"t{n}", (64, 8, 0), (16, 9, 0.05), (16, 10, 0)) for n in range(4)]
    with real_server(tiny_folder, "--topology", "1P1D", "--policy", "conserve", runtime=tmp_path) as running:
        report = replay(config(running.url, tasks, vocab=300))
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
    with serving(Engine(), tokenizer) as url:
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


# --- energy ---------------------------------------------------------------------------------------------------------


def test_energy_of_rapl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miniserve.bench.replay.energy._gpus", list)

    def zone(folder: str, name: str, energy: int, limit: int = 1_000_000_000) -> Path:
        (tmp_path / folder).mkdir(exist_ok=True)
        for file, content in {"name": name, "energy_uj": energy, "max_energy_range_uj": limit}.items():
            (tmp_path / folder / file).write_text(f"{content}\n")
        return tmp_path / folder

    assert Energy(tmp_path / "nothing").joules() is None
    zone("intel-rapl:0", "package-0", 5_000_000)
    zone("intel-rapl:0:0", "core", 1)
    zone("intel-rapl:0:1", "dram", 999_000_000)
    zone("intel-rapl:1", "psys", 1)
    energy = Energy(tmp_path)
    assert energy.source == "rapl"
    energy.start()
    zone("intel-rapl:0", "package-0", 7_500_000)
    zone("intel-rapl:0:0", "core", 900_000_000)
    zone("intel-rapl:0:1", "dram", 1_000_000)  # wrapped around
    zone("intel-rapl:1", "psys", 900_000_000)
    assert energy.joules() == pytest.approx(2.5 + 2.0)
    assert energy.joules() == pytest.approx(4.5)
    energy.start()
    assert energy.joules() == 0
