"""Random conversations on random clusters while workers are killed, for as long as you like.

    .venv/bin/python scripts/soak.py [--seconds 600] [--seed N] [--json FILE]

Each round starts real worker processes with a tiny random model: any topology from 1D to 2P2D, any policy (and one that
places at random), either transfer backend, a pool that is too small for all conversations, with or without host memory.
Conversations take turns with gaps, forks, edited histories and aborts; meanwhile random workers get SIGKILL, each in a
phase that was drawn: while a turn waits, while it is prefilled or handed over, while it decodes, between turns. Every
text must be what transformers makes of the same prompt, every turn must end, no page may be held at the end. The first
violation ends the soak with exit code 1 and prints the seed of its round: `--seed N --rounds 1` runs it again (timing
is the machine's).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from miniserve.cluster.messages import Ended, Failed
from miniserve.config import EngineConfig
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.baselines import POLICIES
from scripts.harness import cluster, flags, write
from tests.support import tiny
from tests.support.anywhere import Anywhere

TOPOLOGIES = ("1D", "2D", "1P1D", "1P2D", "2P1D", "2P2D")
PHASES = ("waiting", "prefill", "handoff", "decode", "rest")
LONGEST, VOCAB, PAGE_BYTES = 512, 320, 2 * 2 * 16 * 2 * 32 * 4
TURN_SECONDS = 120.0
"""No turn takes so long, whatever dies under it: it hangs."""


class Violation(AssertionError):
    """Something that must never happen."""


@dataclass
class Round:
    """One cluster and what is done to it. All choices come from `pick`."""

    folder: Path
    seed: int
    pick: random.Random = field(init=False)
    seen: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.pick = random.Random(self.seed)

    async def run(self) -> None:
        """Raises `Violation`."""
        pick = self.pick
        topology, policy = pick.choice(TOPOLOGIES), pick.choice([*POLICIES, "anywhere"])
        pages = pick.choice([40, 60, 120])
        swap, shared = pick.choice([0, 30, 200]), self.folder / "kv"  # on disk, all rounds find what others have left
        engine = EngineConfig(
            model=str(self.folder),
            threads=1,
            max_num_batched_tokens=pick.choice([24, 48, 96]),
            kv_cache_memory=pages * PAGE_BYTES,
            swap_space=swap * PAGE_BYTES,
            kv_disk=str(shared) if swap and pick.random() < 0.5 else None,
            kv_disk_size=2000 * PAGE_BYTES,
            kv_eviction=pick.choice(["expected", "lru"]),
            kv_transfer=pick.choice(["mapped", "collective"]),
            handoff_deadline=pick.choice([1.0, 30.0]),
        )
        self.kills = pick.choice([0, 1, 2, 3, 4])
        self.what = f"{topology} {policy} {engine.kv_transfer} {pages} pages, swap {swap}"
        self.what += ", disk" * bool(engine.kv_disk)
        async with cluster(engine, topology, "observe" if policy == "anywhere" else policy) as self.client:
            if policy == "anywhere":
                self.client.scheduler.policy = Anywhere(random.Random(self.seed))
            killer = asyncio.create_task(self.killer())
            talks = [self.conversation(random.Random(self.seed * 1000 + n)) for n in range(pick.randint(6, 16))]
            await asyncio.gather(*talks)
            killer.cancel()
            await self.settled()
            self.seen["handoffs"] += sum(link.count for link in self.client.scheduler.links.values())
            self.seen["pages moved"] += sum(link.pages for link in self.client.scheduler.links.values())
            self.seen["moves of a home"] += sum(c.moves for c in self.client.scheduler.conversations)
            for stats in self.client.scheduler.stats.values():
                self.seen["preemptions"] += stats.preemptions
                self.seen["pages restored"] += stats.restored
                self.seen["pages from disk"] += stats.loaded

    async def conversation(self, pick: random.Random) -> None:
        """One agent: turns, gaps, and what agents do to their history."""
        key = f"c{pick.random()}" if pick.random() < 0.5 else ""
        history = [pick.randrange(VOCAB - 3) for _ in range(pick.randint(3, 150))]
        for _ in range(pick.randint(1, 6)):
            await asyncio.sleep(pick.choice([0, 0, 0.05, 0.3, 1.0]))
            if pick.random() < 0.15 and len(history) > 40:
                history = history[: pick.randint(20, len(history))]
                self.seen["edits"] += 1
            history += [pick.randrange(VOCAB - 3) for _ in range(pick.choice([2, 5, 20, 80]))]
            if len(history) > LONGEST - 60:
                return
            forks = 2 if pick.random() < 0.15 else 1
            self.seen["forks"] += forks - 1
            answers = await asyncio.gather(*(self.turn(pick, history, key) for _ in range(forks)))
            history += answers[0]

    async def turn(self, pick: random.Random, history: list[int], key: str) -> list[int]:
        """One turn, whose text is compared; a few are aborted."""
        tokens = list(history)
        length = pick.choice([1, 4, 20, 50])
        stop_after = pick.randrange(length) if pick.random() < 0.15 else None
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        got: list[int] = []
        turn = self.client.submit(tokens, params, conversation=key)
        self.seen["turns"] += 1
        try:
            async with asyncio.timeout(TURN_SECONDS):
                async for output in turn:
                    if isinstance(output, Failed):
                        if "workers died" not in output.error:  # a turn is given up after three deaths
                            raise Violation(f"a turn ended with {output.error!r}")
                        self.seen["given up"] += 1
                        break
                    if output.tokens and output.index != len(got):
                        raise Violation(f"token {output.index} came after {len(got)}")
                    got += output.tokens
                    if stop_after is not None and len(got) > stop_after and not isinstance(output, Ended):
                        turn.cancel()
                        self.seen["aborts"] += 1
                        stop_after = None
        except TimeoutError:
            raise Violation(
                f"a turn of {len(tokens)} tokens hangs after {len(got)}: {self.client.scheduler.turns}"
            ) from None
        try:
            wanted = (await asyncio.to_thread(tiny.reference, self.folder, [tokens], max(len(got), 1)))[0]
        except ValueError:  # a tie: rounding decides
            self.seen["ties"] += 1
        else:
            if got != wanted[: len(got)]:
                raise Violation(f"{tokens} was continued with {got}, not with {wanted}")
            self.seen["tokens compared"] += len(got)
        return got

    async def killer(self) -> None:
        """SIGKILL to random workers, each in its phase."""
        for _ in range(self.kills):
            await asyncio.sleep(self.pick.choice([0.1, 0.5, 1.5]))
            phase = self.pick.choice(PHASES)
            deadline = time.monotonic() + 3
            while not (victims := self.victims(phase)) and time.monotonic() < deadline:
                await asyncio.sleep(0.002)
            process = self.client.workers.processes[
                self.pick.choice(victims or list(self.client.scheduler.workers or ["d0"]))
            ]
            os.kill(process.pid, signal.SIGKILL)
            self.seen[f"killed in {phase}" if victims else "killed"] += 1

    def victims(self, phase: str) -> list[str]:
        """Workers that a turn in this phase depends on."""
        found: list[str] = []
        for turn in self.client.scheduler.turns.values():
            if phase == "waiting" and not turn.home:
                found += list(self.client.scheduler.workers)
            elif phase == "prefill" and turn.home and not turn.delivered:
                found.append(turn.prefill_at or turn.home)
            elif phase == "handoff" and turn.prefill_at and not turn.delivered:
                found += [turn.prefill_at, turn.home]
            elif phase == "decode" and turn.delivered > 1 and turn.home:
                found.append(turn.home)
        if phase == "rest" and not self.client.scheduler.turns:
            found = list(self.client.scheduler.workers)
        return found

    async def settled(self) -> None:
        """All workers are back, and nothing is held."""
        client, deadline = self.client, time.monotonic() + 60
        while time.monotonic() < deadline:
            await asyncio.sleep(0.2)
            stats = client.scheduler.stats
            if len(stats) == len(client.workers.processes) and not any(
                s.held_pages or s.leases for s in stats.values()
            ):
                break
        else:
            raise Violation(f"pages are held, or a worker did not come back: {stats}, {client.workers.failed}")
        for name, s in client.scheduler.stats.items():
            if s.free_pages + s.cached_pages + s.held_pages != s.total_pages:
                raise Violation(f"{name} has lost pages: {s}")
        for view in client.scheduler.workers.values():
            if view.reserved or view.turns:
                raise Violation(f"the ledger of {view.name} holds {view.reserved} pages for {view.turns} turns")


def soak(seconds: float, seed: int, *, rounds: int = 0, quiet: bool = False) -> dict:
    """Rounds until `seconds` are over, or so many; what was done. Raises `Violation` with the seed of its round."""
    started, seen, done = time.monotonic(), Counter(), 0
    with tempfile.TemporaryDirectory() as made:
        arch = ("llama", "qwen3", "mistral")
        folders = [tiny.make_model(Path(made) / name, name, head_dim=32, seed=n) for n, name in enumerate(arch)]
        while time.monotonic() - started < seconds and (not rounds or done < rounds):
            current = Round(folders[(seed + done) % len(folders)], seed + done, seen=seen)
            began = time.monotonic()
            try:
                asyncio.run(current.run())
            except Exception as error:
                raise Violation(f"--seed {current.seed} ({current.what}): {type(error).__name__}: {error}") from error
            done += 1
            if not quiet:
                print(f"round {current.seed}: {current.what}, {time.monotonic() - began:.1f} s", flush=True)
    return {"seconds": round(time.monotonic() - started), "rounds": done, "seed": seed, **dict(sorted(seen.items()))}


def main() -> int:
    """0 if nothing was violated."""
    parser = flags(__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    try:
        result = soak(args.seconds, args.seed, rounds=args.rounds)
    except Violation as violation:
        print(f"VIOLATION {violation}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=1))
    write(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
