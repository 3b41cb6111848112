#!/usr/bin/env python3
"""What tiers of memory do for agents that come back, on real servers, with a restart in the middle.

  scripts/bench_tiers.py --model FOLDER [--llama LLAMA_SERVER GGUF] [--variants none,host,disk,llama] [--json FILE]

The made-up workload `coding-agent`, scaled to this machine and without its sub-agents, runs against one server after
the other: `none` (the pool alone), `host` (and host memory), `disk` (and a disk below a smaller host memory), `llama`
(llama.cpp with as many tokens of KV; its client restores a conversation's slot from a file before a turn and saves it
after). All conversations run half of their turns; then the server is stopped and started again, and they go on. Rows
say, of all turns but first ones before the restart (`later`) and of the first turns after it (`restarted`): times to
first tokens as the agent sees them, and tokens of the history that were computed again.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from miniserve.bench.replay.answer import Answer, TurnError, ask
from miniserve.bench.replay.generators import WorkloadConfig
from miniserve.bench.replay.metrics import percentile
from miniserve.bench.replay.server import TargetServer
from miniserve.bench.replay.workload import Script, Text
from scripts.harness import flags, running, show, write

PORT = 8377
URL = f"http://127.0.0.1:{PORT}"
PAGE = 23_040
"""Bytes of KV of a token of the default model in bf16."""
SLOTS = 2
"""Of llama.cpp: each holds a conversation of the longest kind."""
TIMEOUT = 300.0


@dataclass(eq=False)
class Agent:
    """A conversation: what it will do, what was said, and its turns as (turn, TTFT, tokens computed again)."""

    script: Script
    text: Text
    at: int = 0
    turns: list[tuple[int, float, int]] = field(default_factory=list)


@dataclass(eq=False)
class Slots:
    """The client's care for llama.cpp's slots: which are free, and whose state each has."""

    free: asyncio.Queue[int] = field(default_factory=asyncio.Queue)
    holds: dict[int, str] = field(default_factory=dict)
    saved: set[str] = field(default_factory=set)


def command(variant: str, args: Any, folder: Path) -> list[str]:
    """What starts the server. All have a pool of as many tokens."""
    if variant == "llama":
        binary, model = args.llama
        given = ["-m", model, "-t", "2", "-tb", "2", "-np", str(SLOTS), "-c", str(args.pool), "--no-webui"]
        return [binary, *given, "--port", str(PORT), "--slot-save-path", str(folder)]
    tiers = {
        "none": [],
        "host": ["--swap-space", str(args.host)],
        "disk": ["--swap-space", str(args.staging), "--kv-disk", str(folder)],
    }
    sizes = ["--kv-cache-memory", str(args.pool * PAGE), "--max-model-len", str(args.pool // SLOTS)]
    return [sys.executable, "-m", "miniserve", "serve", args.model, "--port", str(PORT), *sizes, *tiers[variant]]


async def slot(http: aiohttp.ClientSession, number: int, action: str, key: str) -> None:
    url = f"{URL}/slots/{number}?action={action}"
    async with http.post(url, json={"filename": f"{key}.bin"}) as answer:
        if answer.status != 200:
            raise RuntimeError(await answer.text())


async def turn(http: aiohttp.ClientSession, server: TargetServer, agent: Agent, slots: Slots) -> None:
    """The next turn of an agent."""
    size, sent = agent.script.turns[agent.at], time.monotonic()
    known = min(len(agent.text.said), size.keep)
    prompt = list(agent.text.prompt(size))
    body = server.body(prompt, size.output)
    if server.native:
        number, key = await slots.free.get(), str(id(agent))
        body = msgspec.json.encode(msgspec.json.decode(body) | {"id_slot": number})
        if slots.holds.get(number) != key and key in slots.saved:
            await slot(http, number, "restore", key)
    answer = Answer(len(prompt))
    post = partial(http.post, server.generate_url, data=body)
    times = await ask(post, server, answer, TIMEOUT)
    if times.error:
        raise TurnError(times.error)
    if server.native:
        await slot(http, number, "save", key)
        slots.saved.add(key)
        slots.holds[number] = key
        slots.free.put_nowait(number)
    agent.turns.append((agent.at, answer.times[0] - sent, max(known - (times.cached or 0), 0)))
    agent.text.said.fromlist(answer.ids)
    agent.at += 1


async def go(http: aiohttp.ClientSession, server: TargetServer, agent: Agent, start: float, slots: Slots) -> None:
    """Half of an agent's turns, or what is left of them; it begins after `start` seconds."""
    await asyncio.sleep(start)
    end = len(agent.script.turns) if agent.at else (len(agent.script.turns) + 1) // 2
    while agent.at < end:
        if agent.turns:
            await asyncio.sleep(agent.script.turns[agent.at].gap)
        await turn(http, server, agent, slots)


async def measure(variant: str, seed: int, args: Any) -> dict[str, Any]:
    load = WorkloadConfig(
        trace="coding-agent",
        conversations=args.agents,
        max_turns=args.turns,
        scale_tokens=args.scale_tokens,
        max_gap=args.max_gap,
    ).load(args.rate, seed)
    longest = args.pool // SLOTS
    agents = [Agent(script, Text(script, seed)) for script in load.scripts if script.tokens < longest]
    folder = Path(tempfile.mkdtemp(prefix="tiers-", dir=args.folder))
    slots = Slots()
    row: dict[str, Any] = {"variant": variant, "seed": seed, "agents": len(agents)}
    try:
        async with aiohttp.ClientSession(
            headers={"Content-Type": "application/json"}, connector=aiohttp.TCPConnector(force_close=True)
        ) as http:
            for phase in range(2):
                slots.holds.clear()
                while not slots.free.empty():
                    slots.free.get_nowait()
                for number in range(SLOTS):
                    slots.free.put_nowait(number)
                before = [len(agent.turns) for agent in agents]
                async with running(command(variant, args, folder), URL, http) as server:
                    starts = [0.0 if phase else start for start in load.starts]
                    began = time.monotonic()
                    await asyncio.gather(
                        *(go(http, server, *pair, slots) for pair in zip(agents, starts, strict=False))
                    )
                    row[f"seconds_{phase}"] = time.monotonic() - began
                    await asyncio.sleep(2.0)  # the last turn's KV reaches the disk
                new = [agent.turns[n:] for agent, n in zip(agents, before, strict=True)]
                some = [t for turns in new for t in turns if t[0]]
                if phase:
                    row |= figures("restarted", [turns[0] for turns in new if turns])
                row |= figures("after" if phase else "later", some)
        row["disk_bytes"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    finally:
        shutil.rmtree(folder)
    return row


def figures(name: str, turns: list[tuple[int, float, int]]) -> dict[str, Any]:
    ttft = sorted(t for _, t, _ in turns)
    return {
        f"{name}_turns": len(turns),
        f"{name}_ttft_p50_s": percentile(ttft, 0.5),
        f"{name}_ttft_p95_s": percentile(ttft, 0.95),
        f"{name}_recomputed": sum(again for *_, again in turns),
    }


def main() -> int:
    parser = flags(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--llama", nargs=2, metavar=("LLAMA_SERVER", "GGUF"))
    parser.add_argument("--variants", default="none,host,disk")
    parser.add_argument("--agents", type=int, default=24)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--scale-tokens", type=float, default=0.02)
    parser.add_argument("--max-gap", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--pool", type=int, default=8192, help="tokens of KV on the device")
    parser.add_argument("--host", type=int, default=1 << 30, help="bytes of host memory with `host`")
    parser.add_argument("--staging", type=int, default=256 << 20, help="bytes of host memory with `disk`")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--folder", default=os.environ.get("TMPDIR", "/tmp"), help="where the disk's folders are made")
    args = parser.parse_args()
    rows = []
    for number, seed in enumerate(args.seeds.split(",")):
        variants = args.variants.split(",")
        for variant in variants if number % 2 == 0 else reversed(variants):
            rows.append(asyncio.run(measure(variant, int(seed), args)))
            show(rows[-1])
    write(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
