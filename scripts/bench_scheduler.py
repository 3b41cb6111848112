"""How long a placement takes, with few and with many conversations alive, and what an idle conversation costs.

    .venv/bin/python scripts/bench_scheduler.py [--alive N ...] [--queued N ...] [--json FILE]

One process, no workers: the real Scheduler gets turns and made-up reports. "decision" is the policy and the ledger for
a turn whose conversation is known; "submit" is all of a turn's arrival, with the hashing of its prompt (2,000 tokens).
"report" is a worker's report that places nothing, while turns wait for homes that are full: for the only one, for ten,
or all for one of ten.
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Sequence

from miniserve.cluster.messages import Ended, FirstToken, Peer, PoolInfo, Report, StepTime, WorkerStats
from miniserve.config import Role
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.baselines import POLICIES, make_policy
from miniserve.scheduler.scheduler import Scheduler
from miniserve.scheduler.turns import Send
from scripts.harness import flags, write

PAGE, PAGES, TURNS = 16, 4_000_000, 5
STATS = WorkerStats(PAGES, PAGES, 0, 0, 0, 0, 0, 0)
PARAMS = SamplingParams(max_tokens=64)
WORKERS = ("p0", "d0", "d1", "d2")


def cluster(policy: str, workers: Sequence[str] = WORKERS, max_turns: int = 100_000) -> Scheduler:
    """A cluster that has seen some steps."""
    scheduler = Scheduler(make_policy(policy), PAGE, max_turns, 1000)
    for name in workers:
        pool = PoolInfo(1, 1, PAGES, 2**18, "")
        role = Role.PREFILLER if name.startswith("p") else Role.DECODER
        scheduler.worker_up(Peer(name, 1, name, pool, role))
        steps = [StepTime(n, n * n // 2, 0, 0, n * 1e-4) for n in (64, 512, 512)]
        steps += [StepTime(0, 0, b, b * 500, 0.01 + b * 1e-3) for b in (1, 2, 4, 8)]
        scheduler.on_report(name, Report([], [], STATS, steps), 1.0)
    return scheduler


def serve(scheduler: Scheduler, name: str, tokens: list[int], key: str, now: float) -> None:
    """A turn from its arrival to its end."""
    commands = scheduler.submit(name, tokens, PARAMS, 0, key, "", now)
    ((home, run),) = ((c.worker, c.message) for c in commands if isinstance(c, Send))
    said = [FirstToken(run.turn, 0, [1], cached_tokens=0, prefill=0.1), Ended(run.turn, 1, [2, 3], "stop")]
    scheduler.on_report(home, Report(said, [], STATS), now + 0.5)


def measure(policy: str, alive: int) -> dict[str, float]:
    """Medians in microseconds; bytes for each conversation."""
    scheduler, pick = cluster(policy), random.Random(1)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for n in range(alive):
        tokens = [pick.randrange(50_000) for _ in range(20)]
        for turn in range(TURNS if alive <= 10_000 else 1):
            serve(scheduler, f"t{n}.{turn}", tokens * (turn + 1), "", n * 0.01)
    size = (tracemalloc.get_traced_memory()[0] - before) / alive
    tracemalloc.stop()
    decide: list[float] = []
    place = scheduler._place_queued

    def timed(now: float) -> list:
        started = time.perf_counter()
        commands = place(now)
        if any(isinstance(c, Send) for c in commands):
            decide.append(time.perf_counter() - started)
        return commands

    scheduler._place_queued = timed  # type: ignore[method-assign]
    submits = []
    gc.freeze()
    for n in range(2000):
        tokens = [n % 10] * (2000 + n // 10)
        started = time.perf_counter()
        commands = scheduler.submit(f"m{n}", tokens, PARAMS, 0, f"k{n % 10}", "", 2e3 + n)
        submits.append(time.perf_counter() - started)
        ((home, run),) = ((c.worker, c.message) for c in commands if isinstance(c, Send))
        said = [FirstToken(run.turn, 0, [], cached_tokens=0, prefill=0.1), Ended(run.turn, 0, [1], "stop")]
        scheduler.on_report(home, Report(said, [], STATS), 2e3 + n + 0.5)
    gc.unfreeze()
    return {
        "decision_us": statistics.median(decide) * 1e6,
        "decision_p99_us": sorted(decide)[int(0.99 * len(decide))] * 1e6,
        "submit_us": statistics.median(submits) * 1e6,
        "bytes_per_conversation": size,
    }


def measure_report(policy: str, waiting: int, decoders: int, homes: int) -> float:
    """The median time of a report in microseconds while turns wait for `homes` of `decoders` workers, which all have as
    many turns as they may."""
    names = [f"d{n}" for n in range(decoders)]
    scheduler = cluster(policy, names, max_turns=1)
    for n in range(waiting):
        serve(scheduler, f"t{n}", [n] * 100, f"k{n}", 2.0 + n)
        scheduler.conversations.get(f"k{n}").home = names[n % homes]  # type: ignore[union-attr]
    for n in range(decoders):
        scheduler.submit(f"b{n}", [n, 1] * 100, PARAMS, 0, f"b{n}", "", 3e3)
    for n in range(waiting):
        scheduler.submit(f"w{n}", [n] * (200 + n % 300), PARAMS, 0, f"k{n}", "", 3e3)
    assert scheduler.queued == waiting
    took = []
    for n in range(200):
        started = time.perf_counter()
        commands = scheduler.on_report("d0", Report([], [], STATS), 3e3 + n * 1e-3)
        took.append(time.perf_counter() - started)
        assert not commands
    return statistics.median(took) * 1e6


def main() -> int:
    parser = flags(__doc__)
    parser.add_argument("--alive", type=int, nargs="+", default=[10, 10_000, 100_000])
    parser.add_argument("--queued", type=int, nargs="*", default=[100, 1000, 10_000])
    args = parser.parse_args()
    results = {policy: {alive: measure(policy, alive) for alive in args.alive} for policy in POLICIES}
    reports = {
        policy: {n: [measure_report(policy, n, *case) for case in ((1, 1), (10, 10), (10, 1))] for n in args.queued}
        for policy in POLICIES
    }
    print(f"{'policy':<14} {'alive':>8} {'decision':>10} {'p99':>8} {'submit':>9}  us   {'bytes each':>10}")
    for policy, rows in results.items():
        for alive, row in rows.items():
            print(
                f"{policy:<14} {alive:>8,} {row['decision_us']:>10.1f} {row['decision_p99_us']:>8.1f} "
                f"{row['submit_us']:>9.1f}       {row['bytes_per_conversation']:>10.0f}"
            )
    print(f"{'policy':<14} {'queued':>8} {'1 of 1':>10} {'10 of 10':>10} {'1 of 10':>10}  us a report")
    for policy, by_queued in reports.items():
        for queued, took in by_queued.items():
            print(f"{policy:<14} {queued:>8,} " + " ".join(f"{us:>10.1f}" for us in took))
    write(args.json, {"placements": results, "reports": reports})
    return 0


if __name__ == "__main__":
    sys.exit(main())
