"""What scheduling conversations does, on real workers with the default model.

    .venv/bin/python scripts/bench_conversations.py interference [--repeats 5] [--json FILE]
    .venv/bin/python scripts/bench_conversations.py pressure [--json FILE]
    .venv/bin/python scripts/bench_conversations.py recovery [--json FILE]
    .venv/bin/python scripts/bench_conversations.py policies [--rate 0.5] [--repeats 3] [--json FILE]

interference: four streams decode; the first turn of a conversation, 2,000 tokens, arrives. Gaps between the tokens of
the streams while it is computed, against gaps without it, for several topologies and policies.
pressure: twice as many conversations as the KV pool holds, some with short gaps and some with long ones, come back
turn after turn. Tokens recomputed and times to first tokens, by the order of eviction, with and without host memory.
recovery: eight streams on 1P1D. The prefiller is killed, then the decoder: longest silence of a stream, time until the
worker serves again, and whether every text is what it is without deaths.
policies: agents arrive at random (Poisson), each with four turns and gaps between them, on 1P1D; every policy gets the
same agents at the same moments. Time to the first token of the first turn and of later ones, from an agent's arrival to
the first token of its last turn (TTFET), gaps between tokens, and the whole. `colocated` has two decoders instead.

Configurations run one after the other in one process, in rounds, so that what else the machine does hits all alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from miniserve.config import EngineConfig, ServeConfig, Topology
from miniserve.dispatcher import Dispatcher
from miniserve.hub.resolve import ModelFiles, resolve
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.baselines import POLICIES

VOCAB = 40_000


@asynccontextmanager
async def cluster(files: ModelFiles, topology: str, policy: str, **engine) -> AsyncIterator[Dispatcher]:
    """A running client."""
    config = ServeConfig(
        engine=EngineConfig(model=str(files.folder), **engine), topology=Topology.parse(topology), policy=policy
    )
    client = Dispatcher(config, files)
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


@dataclass
class Stream:
    """One turn as its client sees it: when each token came, and what it was."""

    sent: float
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    cached: int = 0

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent

    def gaps(self, start: float, end: float) -> list[float]:
        """Seconds between tokens of which the later one came in this time."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False) if start < b <= end]


async def read(
    client: Dispatcher, prompt: list[int], tokens: int, key: str, into: Stream | None = None, salt: str = ""
) -> Stream:
    """Run one turn to its end."""
    stream = into or Stream(0.0)
    stream.sent = time.monotonic()
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    async for output in client.submit(prompt, params, conversation=key, salt=salt):
        if output.finish == "error":
            raise RuntimeError(output.error)
        stream.times += [time.monotonic()] * len(output.tokens)
        stream.tokens += output.tokens
        stream.cached = output.cached_tokens or stream.cached
    return stream


def prompt(pick: random.Random, length: int) -> list[int]:
    """Tokens that nobody has cached."""
    return [pick.randrange(100, VOCAB) for _ in range(length)]


def percentile(values: list[float], q: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


# --- interference ---------------------------------------------------------------------------------------------------

LAYOUTS = [
    ("1D", "colocated", {}),
    ("1D", "colocated", {"max_num_batched_tokens": 128}),
    ("2D", "colocated", {}),
    ("1P1D", "colocated", {}),
    ("1P1D", "conserve", {}),
    ("1P1D", "observe", {}),
]
STREAMS, NEWCOMER, QUIET_SECONDS = 4, 2000, 3.0


async def disturbed(client: Dispatcher, pick: random.Random) -> dict[str, float]:
    """One round: gaps without and with the newcomer, in milliseconds."""
    streams = [Stream(0.0) for _ in range(STREAMS)]
    reading = []
    for stream in streams:
        reading.append(asyncio.create_task(read(client, prompt(pick, 100), 4000, f"s{pick.random()}", stream)))
        while not stream.times:
            await asyncio.sleep(0.01)
    homes = [turn.home for turn in client.scheduler.turns if turn.home]
    quiet = time.monotonic()
    await asyncio.sleep(QUIET_SECONDS)
    begun = time.monotonic()
    newcomer = await read(client, prompt(pick, NEWCOMER), 1, f"n{pick.random()}")
    ended = newcomer.times[0]
    for task in reading:
        task.cancel()
    for turn in list(client._streams.values()):
        turn.cancel()
    await asyncio.gather(*reading, return_exceptions=True)
    before = [1e3 * gap for stream in streams for gap in stream.gaps(quiet, begun)]
    during = [1e3 * gap for stream in streams for gap in stream.gaps(begun, ended)]
    return {
        "undisturbed_p50_ms": percentile(before, 0.5),
        "undisturbed_p95_ms": percentile(before, 0.95),
        "disturbed_p50_ms": percentile(during, 0.5),
        "disturbed_p95_ms": percentile(during, 0.95),
        "disturbed_max_ms": max(during),
        "newcomer_ttft_s": newcomer.first,
        "streams_at_prefillers": sum(home.startswith("p") for home in homes),
    }


async def interference(files: ModelFiles, repeats: int) -> list[dict]:
    """All layouts, each with `repeats` rounds after one that does not count."""
    rows = []
    for topology, policy, engine in LAYOUTS:
        pick = random.Random(len(rows))
        async with cluster(files, topology, policy, max_model_len=4200, **engine) as client:
            rounds = [await disturbed(client, pick) for _ in range(repeats + 1)][1:]
        row = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        row["ratio_p95"] = row["disturbed_p95_ms"] / row["undisturbed_p95_ms"]
        rows.append({"topology": topology, "policy": policy, **engine, **row})
        print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}), flush=True)
    return rows


# --- pressure -------------------------------------------------------------------------------------------------------

POOL_TOKENS, TALKS, FIRST, APPEND, OUTPUT = 4096, 16, 400, 40, 12
SHORT, LONG = (6.0, 10), (18.0, 4)
"""Mean gap in seconds and turns of the two kinds of conversations."""
KEEPING = [("lru", 0), ("expected", 0), ("lru", 1), ("expected", 1)]


async def talk(client: Dispatcher, number: int, rows: list[dict]) -> None:
    """One conversation; even ones come back soon, odd ones late."""
    pick = random.Random(number)
    gap, turns = LONG if number % 2 else SHORT
    await asyncio.sleep(pick.uniform(0, 8))
    history = prompt(pick, FIRST)
    for turn in range(turns):
        stream = await read(client, history, OUTPUT, f"talk{number}")
        if turn:
            known = len(history) - APPEND
            rows.append({"ttft": stream.first, "recomputed": max(known - stream.cached, 0), "short": number % 2 == 0})
        history = history + stream.tokens + prompt(pick, APPEND)
        await asyncio.sleep(gap * pick.uniform(0.8, 1.2))


async def pressure(files: ModelFiles) -> list[dict]:
    """All ways to keep KV."""
    rows = []
    for order, host in KEEPING:
        turns: list[dict] = []
        page_bytes = 30 * 2 * 16 * 3 * 64 * 2
        size = POOL_TOKENS // 16 * page_bytes
        kwargs = {"kv_cache_memory": size, "swap_space": 4 * size * host, "kv_eviction": order}
        async with cluster(files, "1D", "colocated", max_model_len=2048, **kwargs) as client:
            await asyncio.gather(*(talk(client, n, turns) for n in range(TALKS)))
            await asyncio.sleep(1.2)
            stats = client.scheduler.stats["d0"]
        row = {"eviction": order, "swap_space": bool(host), "turns": len(turns)}
        for name, some in (("all", turns), ("short", [t for t in turns if t["short"]])):
            ttft = [t["ttft"] for t in some]
            row |= {
                f"{name}_ttft_mean_s": statistics.mean(ttft),
                f"{name}_ttft_p50_s": percentile(ttft, 0.5),
                f"{name}_ttft_p95_s": percentile(ttft, 0.95),
                f"{name}_recomputed_tokens": sum(t["recomputed"] for t in some),
            }
        rows.append(row | {"offloaded": stats.offloaded, "restored": stats.restored})
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}), flush=True)
    return rows


# --- recovery -------------------------------------------------------------------------------------------------------


async def recovery(files: ModelFiles) -> list[dict]:
    """Kill p0, later d0, under eight streams."""
    rows = []
    async with cluster(files, "1P1D", "conserve", max_model_len=4096) as client:
        for victim, wait in (("p0", 1.0), ("d0", 0.0)):
            prompts = [prompt(random.Random(f"{victim}{n}"), 300) for n in range(8)]
            streams = [Stream(0.0) for _ in prompts]
            reading = [
                asyncio.create_task(read(client, p, 150, f"{victim}{n}", s))
                for n, (p, s) in enumerate(zip(prompts, streams, strict=True))
            ]
            while wait == 0.0 and not all(len(s.times) > 10 for s in streams):
                await asyncio.sleep(0.01)
            await asyncio.sleep(wait)
            epoch = client.workers.processes[victim].spec.epoch
            os.kill(client.workers.processes[victim].pid, signal.SIGKILL)
            killed = time.monotonic()
            while not (view := client.scheduler.workers.get(victim)) or view.epoch == epoch:
                await asyncio.sleep(0.01)
            back = time.monotonic() - killed
            await asyncio.gather(*reading)
            # Under another salt nothing is cached: the same prompts once more, and nobody dies.
            plain = await asyncio.gather(
                *(read(client, p, 150, f"again{victim}{n}", salt="again") for n, p in enumerate(prompts))
            )
            silence = max(
                b - a for s in streams for a, b in zip([s.sent, *s.times], s.times, strict=False) if b > killed
            )
            next_token = [min(t for t in s.times if t > killed) - killed for s in streams if s.times[-1] > killed]
            rows.append(
                {
                    "victim": victim,
                    "worker_back_s": back,
                    "first_stream_goes_on_s": min(next_token),
                    "all_streams_go_on_s": max(next_token),
                    "longest_silence_s": silence,
                    "same_text": [s.tokens for s in streams] == [s.tokens for s in plain],
                }
            )
            print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}), flush=True)
            await asyncio.sleep(2)
    return rows


# --- policies -------------------------------------------------------------------------------------------------------

AGENTS, AGENT_FIRST, AGENT_APPENDS, AGENT_OUTPUT, AGENT_GAP = 24, (400, 1200), (40, 40, 400), (20, 60), (0.3, 1.5)


async def agent(client: Dispatcher, seed: str, at: float, rows: list[dict]) -> None:
    """One conversation, which arrives `at` seconds from now; the third append is ten times as long as the others."""
    pick = random.Random(seed)
    history = prompt(pick, pick.randint(*AGENT_FIRST))
    lengths = [pick.randint(*AGENT_OUTPUT) for _ in range(len(AGENT_APPENDS) + 1)]
    await asyncio.sleep(at)
    arrived, firsts, gaps = time.monotonic(), [], []
    for turn, length in enumerate(lengths):
        stream = await read(client, history, length, seed)
        firsts.append(stream.first)
        gaps += stream.gaps(0.0, float("inf"))
        if turn < len(AGENT_APPENDS):
            history = history + stream.tokens + prompt(pick, AGENT_APPENDS[turn])
            await asyncio.sleep(pick.uniform(*AGENT_GAP))
    last = stream.times[0] - arrived
    rows.append(
        {"first": firsts[0], "later": firsts[1:], "ttfet": last, "gaps": gaps, "e2e": stream.times[-1] - arrived}
    )


async def policies(files: ModelFiles, rate: float, repeats: int) -> list[dict]:
    """All policies in turns, `repeats` times; medians over the repeats."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in POLICIES}
    for repeat in range(repeats):
        for policy in POLICIES:
            pick, rows, at, tasks = random.Random(repeat), [], 0.0, []
            topology = "2D" if policy == "colocated" else "1P1D"  # two workers for everybody
            async with cluster(files, topology, policy, max_model_len=4096) as client:
                await read(client, prompt(random.Random(7), 600), 30, "warm")
                for n in range(AGENTS):
                    at += pick.expovariate(rate)
                    tasks.append(agent(client, f"{repeat}-{n}", at, rows))
                await asyncio.gather(*tasks)
                moved = sum(link.bytes for link in client.scheduler.links.values())
                placed = dict(client.scheduler.placements)
            later = [x for r in rows for x in r["later"]]
            gaps = [x for r in rows for x in r["gaps"]]
            result = {
                "first_ttft_mean_s": statistics.mean(r["first"] for r in rows),
                "first_ttft_p95_s": percentile([r["first"] for r in rows], 0.95),
                "later_ttft_mean_s": statistics.mean(later),
                "later_ttft_p95_s": percentile(later, 0.95),
                "ttfet_mean_s": statistics.mean(r["ttfet"] for r in rows),
                "ttfet_p95_s": percentile([r["ttfet"] for r in rows], 0.95),
                "gap_mean_ms": 1e3 * statistics.mean(gaps),
                "gap_p95_ms": 1e3 * percentile(gaps, 0.95),
                "gap_p99_ms": 1e3 * percentile(gaps, 0.99),
                "e2e_mean_s": statistics.mean(r["e2e"] for r in rows),
                "e2e_p95_s": percentile([r["e2e"] for r in rows], 0.95),
                "moved_mib": moved / 2**20,
            }
            found[policy].append(result)
            shown = {k: round(v, 3) for k, v in result.items()}
            print(
                json.dumps({"policy": policy, **shown, "placed": {f"{p}->{h}": n for (p, h), n in placed.items()}}),
                flush=True,
            )
    return [
        {"policy": name, "rate": rate} | {key: statistics.median(r[key] for r in results) for key in results[0]}
        for name, results in found.items()
    ]


def main() -> int:
    """Run one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("interference", "pressure", "recovery", "policies"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rate", type=float, default=0.5, help="agents a second")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    files = resolve("smollm2-135m")
    run = {
        "interference": lambda: interference(files, args.repeats),
        "pressure": lambda: pressure(files),
        "recovery": lambda: recovery(files),
        "policies": lambda: policies(files, args.rate, args.repeats),
    }[args.what]
    rows = asyncio.run(run())
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
