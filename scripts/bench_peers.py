#!/usr/bin/env python3
"""Compare servers that already run, fairly on a noisy machine: they take turns within each scenario.

  scripts/bench_peers.py --tokenizer MODEL_FOLDER --rounds 3 --json FILE.json \
      miniserve=http://127.0.0.1:8201,smollm2-135m,PID vllm=http://127.0.0.1:8202,smollm2,PID

All servers have the same model, whose tokenizer makes the prompts; its weights may be in another format on each. Prints
medians, and the ratio of the first server to each other one. All servers stay loaded throughout; none may spin when
idle. A run during which other processes took more than a little of the machine is repeated (PID is the server's
process). Memory is that of all of a server's processes, before the first scenario and after the last. A median that
rests on a round without enough undisturbed runs has a `!` behind it.

--json holds what each server reports of itself and, after each scenario, every run with its other figures, such as the
tokens that a prefix cache had, and `others_cpu`, the share of the machine that other processes took.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
import psutil

from miniserve.bench.replay.answer import TurnError
from miniserve.bench.replay.server import TargetServer, describe
from miniserve.client import ApiClient
from scripts.harness import flags, in_turns, write
from scripts.scenarios import Figures, RandomPrompts, Scenarios

REPEATS = 2
"""Undisturbed runs of a scenario on a server in each round."""
MOST_DISTURBED = 0.06
"""The share of the machine's CPU time that other processes may take during a run."""


class Scenario(NamedTuple):
    """One row of the table."""

    name: str
    run: Callable[[Scenarios], Awaitable[Figures]]
    figure: str
    more_is_better: bool = True


SCENARIOS = (
    Scenario("prefill 512, tok/s", lambda on: on.prefill(512), "prefill_tok_s"),
    Scenario("prefill 2048, tok/s", lambda on: on.prefill(2048), "prefill_tok_s"),
    Scenario("decode, 1 stream, tok/s", lambda on: on.decode(), "decode_tok_s"),
    Scenario("output, 8 streams, tok/s", lambda on: on.concurrent(8), "output_tok_s"),
    Scenario("output, 16 streams, tok/s", lambda on: on.concurrent(16), "output_tok_s"),
    Scenario("turn-2 TTFT, s", lambda on: on.turn2(), "turn2_ttft_s", more_is_better=False),
)


class ComparedServer(NamedTuple):
    """A server that is compared."""

    url: str
    model: str
    pid: int

    @classmethod
    def parse(cls, text: str) -> tuple[str, ComparedServer]:
        """Its name and itself, from NAME=URL,MODEL,PID."""
        name, _, rest = text.partition("=")
        url, model, pid = rest.split(",")
        return name, cls(url, model, int(pid))


def processes(pid: int) -> list[psutil.Process]:
    """A server's process and those it has started."""
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def memory(pid: int) -> float:
    """MB that a server's processes take, what they share counted once (PSS). A decoder maps the KV pools of prefillers:
    the sum of resident sizes would count what it has read there twice."""
    return sum(process.memory_full_info().pss for process in processes(pid)) / 1e6


class Meter:
    """CPU time of this machine that neither the server (with its children) nor this process takes."""

    def __init__(self, pid: int) -> None:
        self._mine = [psutil.Process(), *processes(pid)]
        self._begun = time.monotonic()
        self._before = self._seconds()

    def share(self) -> float:
        """The share of all CPUs since the start; time that a hypervisor gave to others counts."""
        return (self._seconds() - self._before) / (time.monotonic() - self._begun) / (os.cpu_count() or 1)

    def _seconds(self) -> float:
        total = psutil.cpu_times()
        mine = sum(sum(process.cpu_times()[:2]) for process in self._mine)
        return sum(total[:8]) - total.idle - total.iowait - mine


def fresh_connections() -> aiohttp.ClientSession:
    """One connection a request, for all servers alike: llama-server says keep-alive, yet closes when a stream ends, and
    a request that goes out at that moment is lost."""
    return aiohttp.ClientSession(
        headers={"Content-Type": "application/json"}, connector=aiohttp.TCPConnector(limit=0, force_close=True)
    )


class Round(NamedTuple):
    """A scenario's runs on one server, one after the other: `value` is the median of the undisturbed ones, of all if
    none is; `clean` says whether there were enough undisturbed ones."""

    value: float
    clean: bool
    runs: list[Figures]


async def measure(peer: ComparedServer, scenario: Scenario, prompts: RandomPrompts) -> Round:
    """Run a scenario on a server until enough runs are undisturbed, or three times as many were tried.

    Raises `TurnError` if a stream fails: what the others do without it is no figure of the scenario.
    """
    async with fresh_connections() as http:
        scenarios = Scenarios(http, describe(ApiClient.around(peer.url, None), peer.model), prompts)
        await scenarios.warm_up()
        runs: list[Figures] = []
        every: list[float] = []
        clean: list[float] = []
        while len(clean) < REPEATS and len(every) < 3 * REPEATS:
            meter = Meter(peer.pid)
            figures = await scenario.run(scenarios)
            others = meter.share()
            if figures.get("errors"):
                raise TurnError(f"{figures['errors']} of {figures['streams']} streams failed at {peer.url}")
            value = figures[scenario.figure]
            assert value is not None
            runs.append(figures | {"others_cpu": others})
            every.append(value)
            if others <= MOST_DISTURBED:
                clean.append(value)
            else:
                await asyncio.sleep(1.0)
    return Round(statistics.median(clean or every), len(clean) == REPEATS, runs)


def introduce(peers: dict[str, ComparedServer]) -> dict[str, TargetServer]:
    """What each server reports of itself. Raises `ConfigError` for one that does not answer or has no such model, and
    `psutil.NoSuchProcess` for one whose process does not exist."""
    found = {name: describe(ApiClient.around(peer.url, None), peer.model) for name, peer in peers.items()}
    for peer in peers.values():
        psutil.Process(peer.pid)
    return found


def compare(scenario: Scenario, rounds: dict[str, list[Round]], first: str) -> dict[str, Any]:
    """A scenario's row of the table: medians of the rounds, and the ratio of `first` to each; above 1, it is better."""
    median = {name: statistics.median(one.value for one in own) for name, own in rounds.items()}
    ratio = {n: median[first] / m if scenario.more_is_better else m / median[first] for n, m in median.items()}
    return {
        "runs": {name: [one.value for one in own] for name, own in rounds.items()},
        "median": median,
        "ratio": ratio,
        "disturbed": [name for name, own in rounds.items() if not all(one.clean for one in own)],
        "figures": {name: [figures for one in own for figures in one.runs] for name, own in rounds.items()},
    }


def main(argv: list[str] | None = None) -> int:
    parser = flags(__doc__)
    parser.add_argument("servers", nargs="+", type=ComparedServer.parse, metavar="NAME=URL,MODEL,PID")
    parser.add_argument("--tokenizer", required=True, type=Path, metavar="MODEL_FOLDER")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="scenarios whose name contains this")
    args = parser.parse_args(argv)
    peers: dict[str, ComparedServer] = dict(args.servers)
    prompts = RandomPrompts(args.tokenizer, seed=time.time_ns())
    first = next(iter(peers))
    servers = introduce(peers)
    for name, server in servers.items():
        print(f"{name}: {server.kind} {server.version}, {server.model}, {server.max_model_len} tokens", flush=True)
    table: dict[str, dict[str, Any]] = {}
    taken = {name: [memory(server.pid)] for name, server in peers.items()}
    for scenario in (scenario for scenario in SCENARIOS if args.only in scenario.name):
        run = partial(measure, scenario=scenario, prompts=prompts)
        rounds = in_turns(peers, args.rounds, lambda name, run=run: asyncio.run(run(peers[name])))
        row = table[scenario.name] = compare(scenario, rounds, first)
        figures = "  ".join(f"{n} {value:.4g}{'!' * (n in row['disturbed'])}" for n, value in row["median"].items())
        beside = "  ".join(f"{value:.2f}x {name}" for name, value in row["ratio"].items() if name != first)
        print(f"{scenario.name:<28}{figures}   {first} is {beside}", flush=True)
        reported = {name: msgspec.to_builtins(server) for name, server in servers.items()}
        write(args.json, {"servers": reported, "scenarios": table, "memory, MB": taken})
    for name, server in peers.items():
        taken[name].append(memory(server.pid))
        print(f"memory of {name}: {taken[name][0]:.0f} MB before, {taken[name][1]:.0f} MB after", flush=True)
    write(args.json, {"servers": reported, "scenarios": table, "memory, MB": taken})
    return 0


if __name__ == "__main__":
    sys.exit(main())
