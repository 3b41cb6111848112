"""How long a placement takes, with few and with many conversations alive, and what an idle conversation costs.

    .venv/bin/python scripts/bench_scheduler.py [--json FILE]

One process, no workers: the real Scheduler gets turns and made-up reports. "decision" is the policy and the ledger for
a turn whose conversation is known; "submit" is all of a turn's arrival, with the hashing of its prompt (2,000 tokens).
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
import time
import tracemalloc

from miniserve.cluster.messages import Ended, FirstToken, Peer, PoolInfo, Report, StepTime, WorkerStats
from miniserve.config import Role
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.baselines import POLICIES, make_policy
from miniserve.scheduler.commands import Send
from miniserve.scheduler.scheduler import Scheduler
from scripts.harness import flags, write

PAGE, PAGES, TURNS = 16, 4_000_000, 5
STATS = WorkerStats(PAGES, PAGES, 0, 0, 0, 0, 0, 0)
PARAMS = SamplingParams(max_tokens=64)
WORKERS = ("p0", "d0", "d1", "d2")


def cluster(policy: str) -> Scheduler:
    """1P3D that has seen some steps."""
    scheduler = Scheduler(make_policy(policy), PAGE, 100_000, 1000)
    for name in WORKERS:
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
        tokens = [pick.randrange(50_000)] * 2000
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


def main() -> int:
    parser = flags(__doc__)
    parser.add_argument("--alive", type=int, nargs="+", default=[10, 10_000, 100_000])
    args = parser.parse_args()
    results = {policy: {alive: measure(policy, alive) for alive in args.alive} for policy in POLICIES}
    print(f"{'policy':<14} {'alive':>8} {'decision':>10} {'p99':>8} {'submit':>9}  us   {'bytes each':>10}")
    for policy, rows in results.items():
        for alive, row in rows.items():
            print(
                f"{policy:<14} {alive:>8,} {row['decision_us']:>10.1f} {row['decision_p99_us']:>8.1f} "
                f"{row['submit_us']:>9.1f}       {row['bytes_per_conversation']:>10.0f}"
            )
    write(args.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
