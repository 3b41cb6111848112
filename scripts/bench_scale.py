"""What one scheduler bears: 512 workers, 10,000 conversations, and a thousand turns that wait for one home.

    .venv/bin/python scripts/bench_scale.py [--topology 64P448D] [--conversations N] [--turns N] [--policies NAME ...]
        [--rates R ...] [--json FILE]

One process, no workers: the real Scheduler gets turns and made-up reports, each worker one for each step of 20 ms in
which it has turns.

"load" is what each call takes (submit, report, tick; "decision" is the part of a submit that places), how many turns
a second that makes, and for how long a turn waits for its decision where so many are offered a second and calls are
made one after the other. Python's garbage collector is held off meanwhile; "gc" is what it takes when it is not. All
seconds are CPU time of the thread, so that a busy machine disturbs them less.

"jam" is what a call takes while 1,000 turns wait for one worker: other workers are full, or have room but for smaller
turns, or may not be taken by conversations that have just moved.
"""

from __future__ import annotations

import gc
import random
import sys
import time
from array import array
from collections import defaultdict
from heapq import heappop, heappush
from itertools import count
from typing import Any

from miniserve.cluster.messages import Ended, FirstToken, Peer, PoolInfo, Report, Run, StepTime, Tokens, WorkerStats
from miniserve.config import Topology
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.baselines import POLICIES, make_policy
from miniserve.scheduler.scheduler import Scheduler
from miniserve.scheduler.turns import Command, Send
from scripts.harness import flags, write

PAGE, PAGES, STEP = 16, 8192, 0.02
STATS = WorkerStats(PAGES, PAGES, 0, 0, 0, 0, 0, 0)
SYSTEM = list(range(256))
"""Tokens that all first prompts begin with."""
OUTPUT = 12
"""Tokens of a turn."""


def cluster(policy: str, topology: Topology, max_turns: int = 256) -> Scheduler:
    """Workers that have made some steps."""
    scheduler = Scheduler(make_policy(policy), PAGE, max_turns, 10**6, kept_bytes=0)
    hosts = len(topology.roles) // 8
    for name, role in topology.roles.items():
        pool = PoolInfo(1, 1, PAGES, 2**18, "", host=f"h{int(name[1:]) % hosts}")
        scheduler.worker_up(Peer(name, 1, name, pool, role))
        steps = [StepTime(n, n * n // 2, 0, 0, n * 1e-4) for n in (64, 512, 512)]
        steps += [StepTime(0, 0, b, b * 500, 0.01 + b * 1e-3) for b in (1, 2, 4, 8)]
        scheduler.on_report(name, Report([], [], STATS, steps), 1.0)
    return scheduler


class Load:
    """Conversations of five turns each, as many as live at a time; a new one begins when one is over."""

    def __init__(self, scheduler: Scheduler, conversations: int, gap: float) -> None:
        self.scheduler, self.gap, self.pick = scheduler, gap, random.Random(1)
        self.calls: list[tuple[str, float, float]] = []
        """What was called, its virtual time, the seconds that it took."""
        self.turns = 0
        self._order, self._keys = count(), count()
        self._events: list[tuple[float, int, Any]] = []
        self._running: dict[str, dict[str, int]] = defaultdict(dict)
        """By worker: runs and the next token of each."""
        self._prompts: dict[str, tuple[str, array[int], int]] = {}
        self._prefillers: dict[str, str] = {}
        for _ in range(conversations):
            self._at(2.0 + self.pick.random() * gap * 2, lambda now: self.begin(now))
        self._at(2.0, self.tick)

    def _at(self, when: float, happen: Any) -> None:
        heappush(self._events, (when, next(self._order), happen))

    def run(self, turns: int) -> None:
        end = self.turns + turns
        while self.turns < end:
            when, _, happen = heappop(self._events)
            happen(when)

    def timed(self, kind: str, now: float, call: Any, *args: Any, **named: Any) -> None:
        started = time.thread_time()
        commands = call(*args, **named)
        self.calls.append((kind, now, time.thread_time() - started))
        self.take(commands, now)

    def take(self, commands: list[Command], now: float) -> None:
        for command in commands:
            if isinstance(command, Send) and isinstance(run := command.message, Run):
                at = run.prefill_at or command.worker
                self._prefillers[run.turn] = command.worker
                if not self._running[at]:
                    self._at(now + STEP, lambda now, at=at: self.step(at, now))
                self._running[at][run.turn] = 0

    def tick(self, now: float) -> None:
        self.timed("tick", now, self.scheduler.on_tick, now)
        self._at(now + 0.5, self.tick)

    def begin(self, now: float) -> None:
        prompt = array("i", SYSTEM + self.pick.choices(range(50_000), k=self.pick.choice((100, 500, 1500))))
        self.ask(f"c{next(self._keys)}", prompt, 1, now)

    def ask(self, key: str, prompt: array[int], turn: int, now: float) -> None:
        name = f"{key}:{turn}"
        self._prompts[name] = key, prompt, turn
        params = SamplingParams(max_tokens=OUTPUT)
        self.timed("submit", now, self.scheduler.submit, name, prompt.tolist(), params, 0, key, "", now)

    def step(self, worker: str, now: float) -> None:
        """Each turn there gets a token; the first one of a turn comes from its prefiller, which then has it no more."""
        running, outputs, ended = self._running[worker], [], []
        for run, index in list(running.items()):
            name = run.rpartition(".")[0]
            if index == 0:
                outputs.append(FirstToken(run, 0, [7], cached_tokens=0, prefill=STEP))
                home = self._prefillers.pop(run)
                if home != worker:
                    del running[run]
                    if not self._running[home]:
                        self._at(now + STEP, lambda now, at=home: self.step(at, now))
                self._running[home][run] = 1
            elif index < OUTPUT - 1:
                outputs.append(Tokens(run, index, [7]))
                running[run] = index + 1
            else:
                outputs.append(Ended(run, index, [7], "length"))
                del running[run]
                ended.append(name)
        steps = [StepTime(0, 0, len(outputs), 500 * len(outputs), 0.01 + 1e-3 * len(outputs))]
        self.timed("report", now, self.scheduler.on_report, worker, Report(outputs, [], STATS, steps), now)
        self.turns += len(ended)
        for name in ended:
            key, prompt, turn = self._prompts.pop(name)
            later = now + self.pick.expovariate(1 / self.gap)
            if turn == 5:
                self._at(later, self.begin)
            else:
                more = prompt + array("i", [7] * OUTPUT + self.pick.choices(range(50_000), k=60))
                self._at(later, lambda now, a=(key, more, turn + 1): self.ask(*a, now))
        if running:
            self._at(now + STEP, lambda now: self.step(worker, now))


def micro(took: list[float]) -> dict[str, float]:
    took = sorted(took)
    at = {"p50": took[len(took) // 2], "p99": took[int(0.99 * len(took))], "max": took[-1]}
    return {"n": len(took), "mean": sum(took) / len(took) * 1e6} | {name: value * 1e6 for name, value in at.items()}


def collected(made: Load, turns: int) -> dict[str, float]:
    """Microseconds that the collector takes while `turns` end: for each of them, and at most at once."""
    pauses: list[float] = []

    def seen(phase: str, info: dict[str, int]) -> None:
        pauses.append(time.thread_time() if phase == "start" else time.thread_time() - pauses.pop())

    gc.callbacks.append(seen)
    made.run(turns)
    gc.callbacks.remove(seen)
    return {"us_per_turn": sum(pauses) / turns * 1e6, "max": max(pauses, default=0.0) * 1e6}


def load(policy: str, topology: Topology, conversations: int, turns: int, rates: list[float]) -> dict[str, Any]:
    """Microseconds of each kind of call, and of a turn's decision where `rates` turns are offered a second."""
    gap = 1.0
    made = Load(cluster(policy, topology), conversations, gap)
    made.run(min(turns, 2 * conversations))
    place, decisions = made.scheduler._place_queued, []

    def timed(*args: Any, **named: Any) -> list[Command]:
        started = time.thread_time()
        commands = place(*args, **named)
        if any(isinstance(command, Send) and isinstance(command.message, Run) for command in commands):
            decisions.append(time.thread_time() - started)
        return commands

    made.scheduler._place_queued = timed  # type: ignore[method-assign]
    made.calls.clear()
    gc.collect()
    gc.disable()
    made.run(turns)
    calls = made.calls.copy()
    gc.enable()
    pauses = collected(made, turns // 10)
    made.calls = calls
    kinds = sorted({kind for kind, *_ in made.calls})
    busy = sum(took for *_, took in made.calls)
    result: dict[str, Any] = {k: micro([took for kind, _, took in made.calls if kind == k]) for k in kinds}
    result["decision"], result["gc"] = micro(decisions), pauses
    result |= {"turns_per_s": turns / busy, "us_per_turn": busy / turns * 1e6}
    result["virtual_turns_per_s"] = turns / (made.calls[-1][1] - made.calls[0][1])
    result["queued"], result["moves"] = made.scheduler.queued, sum(c.moves for c in made.scheduler.conversations)
    for rate in rates:
        stretch, free, waits = result["virtual_turns_per_s"] / rate, 0.0, []
        for kind, now, took in made.calls:
            free = max(free, now * stretch) + took
            if kind == "submit":
                waits.append(free - now * stretch)
        result[f"offered {rate:g}/s"] = micro(waits)
    return result


def jam(policy: str, topology: Topology, waiting: int, case: str) -> dict[str, Any]:
    """Calls while turns wait for the first decoder; the others are `full`, have `some` room, or room that turns which
    have `just moved` may not take."""
    scheduler, names, params = cluster(policy, topology), list(topology.roles), SamplingParams(max_tokens=64)
    home = next(name for name in names if name.startswith("d"))
    for n in range(waiting + 1):
        said = [Ended(f"t{n}.1", 0, [1], "stop")]
        commands = scheduler.submit(f"t{n}", [n] * 100, params, 0, f"k{n}", "", 2.0)
        at = next(c.worker for c in commands if isinstance(c, Send))
        scheduler.on_report(at, Report(said, [], STATS), 2.5)
        conversation = scheduler.conversations.get(f"k{n}")
        assert conversation is not None
        scheduler._ledger.let_go(conversation)
        conversation.home = home
        conversation.moved_at = conversation.turns if case == "just moved" else 0
    for name, view in scheduler.workers.items():
        taken = PAGES - 12 if name == home else PAGES * 9 // 10 - 12 if case != "full" else PAGES
        view.change(1, taken, 3.0)
        if case == "full":
            view.turns = 256
    scheduler.submit("head", [waiting] * 1600, params, 0, f"k{waiting}", "", 3.0)
    small = 100 if case == "just moved" else 200
    for n in range(waiting):
        scheduler.submit(f"w{n}", [n] * (small + n % 50), params, 0, f"k{n}", "", 3.0)
    queued = scheduler.queued
    took: dict[str, list[float]] = defaultdict(list)

    def timed(kind: str, call: Any, *args: Any) -> None:
        started = time.thread_time()
        call(*args)
        took[kind].append(time.thread_time() - started)

    gc.collect()
    gc.freeze()
    for n in range(200):
        now = 4.0 + n * 1e-2
        timed("report of home", scheduler.on_report, home, Report([], [], STATS), now)
        timed("report of another", scheduler.on_report, names[-1], Report([], [], STATS), now)
        timed("submit", scheduler.submit, f"s{n}", [n % waiting] * (small + 10), params, 0, f"k{n % waiting}", "", now)
        timed("submit of a newcomer", scheduler.submit, f"n{n}", [n, 2] * 200, params, 0, "", "", now)
        timed("tick", scheduler.on_tick, now)
    gc.unfreeze()
    return {"queued": queued} | {kind: micro(times) for kind, times in took.items()}


def main() -> int:
    parser = flags(__doc__)
    parser.add_argument("--topology", type=Topology.parse, nargs="+", default=[Topology(64, 448), Topology(0, 512)])
    parser.add_argument("--conversations", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=20_000)
    parser.add_argument("--queued", type=int, default=1000)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--rates", type=float, nargs="+", default=[1000, 2000, 5000, 10_000])
    parser.add_argument("--cases", nargs="*", default=["full", "some", "just moved"])
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for topology in args.topology:
        for policy in args.policies:
            row = results.setdefault(str(topology), {}).setdefault(policy, {})
            if args.turns:
                row["load"] = load(policy, topology, args.conversations, args.turns, args.rates)
            row["jam"] = {case: jam(policy, topology, args.queued, case) for case in args.cases}
            for name, figures in [*row.get("load", {}).items()] + [
                (f"{case}: {kind}", f) for case, of in row["jam"].items() for kind, f in of.items()
            ]:
                shown = (
                    " ".join(f"{key} {value:.0f}" for key, value in figures.items())
                    if isinstance(figures, dict)
                    else f"{figures:.0f}"
                )
                print(f"{topology} {policy:<13} {name:<34} {shown}", flush=True)
    write(args.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
