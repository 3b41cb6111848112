"""What scheduling conversations does, on real workers with the default model.

    .venv/bin/python scripts/bench_conversations.py interference [--repeats 5] [--json FILE]
    .venv/bin/python scripts/bench_conversations.py pressure [--json FILE]
    .venv/bin/python scripts/bench_conversations.py recovery [--json FILE]

interference: four streams decode; the first turn of a conversation, 2,000 tokens, arrives. Gaps between the tokens of
the streams while it is computed, against gaps without it, for several topologies and policies.
pressure: twice as many conversations as the KV pool holds, some with short gaps and some with long ones, come back
turn after turn. Tokens recomputed and times to first tokens, by the order of eviction, with and without host memory.
recovery: eight streams on 1P1D. The prefiller is killed, then the decoder: longest silence of a stream, time until the
worker serves again, and whether every text is what it is without deaths.

Configurations run one after the other in one process, in rounds, so that what else the machine does hits all alike.
`scripts/compare.py --serve` compares policies under load.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise

from miniserve.bench.replay.metrics import percentile
from miniserve.cluster.messages import Failed, FirstToken
from miniserve.config import EngineConfig
from miniserve.dispatcher import Dispatcher
from miniserve.sampling_params import SamplingParams
from scripts.harness import cluster, flags, medians, show, write

MODEL, VOCAB = "smollm2-135m", 40_000


@dataclass
class Stream:
    """One turn as its client sees it: when each token came, and what it was."""

    sent: float
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    cached: int = 0

    @property
    def first(self) -> float:
        return self.times[0] - self.sent

    def gaps(self, start: float, end: float) -> list[float]:
        """Seconds between tokens of which the later one came in this time."""
        return [b - a for a, b in pairwise(self.times) if start < b <= end]


async def read(
    client: Dispatcher, prompt: list[int], tokens: int, key: str, into: Stream | None = None, salt: str = ""
) -> Stream:
    stream = into or Stream(0.0)
    stream.sent = time.monotonic()
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    async for output in client.submit(prompt, params, conversation=key, salt=salt):
        if isinstance(output, Failed):
            raise RuntimeError(output.error)
        stream.times += [time.monotonic()] * len(output.tokens)
        stream.tokens += output.tokens
        if isinstance(output, FirstToken):
            stream.cached = output.cached_tokens
    return stream


def prompt(pick: random.Random, length: int) -> list[int]:
    """Tokens that are in no cache."""
    return [pick.randrange(100, VOCAB) for _ in range(length)]


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
    homes = [turn.home for turn in client.scheduler.turns.values() if turn.home]
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
    before = sorted(1e3 * gap for stream in streams for gap in stream.gaps(quiet, begun))
    during = sorted(1e3 * gap for stream in streams for gap in stream.gaps(begun, ended))
    return {
        "undisturbed_p50_ms": percentile(before, 0.5),
        "undisturbed_p95_ms": percentile(before, 0.95),
        "disturbed_p50_ms": percentile(during, 0.5),
        "disturbed_p95_ms": percentile(during, 0.95),
        "disturbed_max_ms": during[-1],
        "newcomer_ttft_s": newcomer.first,
        "streams_at_prefillers": sum(home.startswith("p") for home in homes),
    }


async def interference(repeats: int) -> list[dict]:
    """All layouts, each with `repeats` rounds after one that does not count."""
    rows = []
    for topology, policy, engine in LAYOUTS:
        pick = random.Random(len(rows))
        async with cluster(EngineConfig(model=MODEL, max_model_len=4200, **engine), topology, policy) as client:
            rounds = [await disturbed(client, pick) for _ in range(repeats + 1)][1:]
        row = medians(rounds)
        row["ratio_p95"] = row["disturbed_p95_ms"] / row["undisturbed_p95_ms"]
        rows.append({"topology": topology, "policy": policy, **engine, **row})
        show(rows[-1])
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


async def pressure() -> list[dict]:
    rows = []
    for order, host in KEEPING:
        turns: list[dict] = []
        page_bytes = 30 * 2 * 16 * 3 * 64 * 2
        size = POOL_TOKENS // 16 * page_bytes
        engine = EngineConfig(
            model=MODEL, max_model_len=2048, kv_cache_memory=size, swap_space=4 * size * host, kv_eviction=order
        )
        async with cluster(engine, "1D", "colocated") as client:
            await asyncio.gather(*(talk(client, n, turns) for n in range(TALKS)))
            await asyncio.sleep(1.2)
            stats = client.scheduler.stats["d0"]
        row = {"eviction": order, "swap_space": bool(host), "turns": len(turns)}
        for name, some in (("all", turns), ("short", [t for t in turns if t["short"]])):
            ttft = sorted(t["ttft"] for t in some)
            row |= {
                f"{name}_ttft_mean_s": statistics.mean(ttft),
                f"{name}_ttft_p50_s": percentile(ttft, 0.5),
                f"{name}_ttft_p95_s": percentile(ttft, 0.95),
                f"{name}_recomputed_tokens": sum(t["recomputed"] for t in some),
            }
        rows.append(row | {"offloaded": stats.offloaded, "restored": stats.restored})
        show(rows[-1])
    return rows


# --- recovery -------------------------------------------------------------------------------------------------------


async def recovery() -> list[dict]:
    """Kill p0, later d0, under eight streams."""
    rows = []
    async with cluster(EngineConfig(model=MODEL, max_model_len=4096), "1P1D", "conserve") as client:
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
            # Under another salt nothing is cached: the same prompts once more, without deaths.
            plain = await asyncio.gather(
                *(read(client, p, 150, f"again{victim}{n}", salt="again") for n, p in enumerate(prompts))
            )
            silence = max(b - a for s in streams for a, b in pairwise([s.sent, *s.times]) if b > killed)
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
            show(rows[-1])
            await asyncio.sleep(2)
    return rows


def main() -> int:
    parser = flags(__doc__)
    parser.add_argument("what", choices=("interference", "pressure", "recovery"))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    run = {"interference": lambda: interference(args.repeats), "pressure": pressure, "recovery": recovery}[args.what]
    write(args.json, asyncio.run(run()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
