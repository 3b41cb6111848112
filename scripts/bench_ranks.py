#!/usr/bin/env python3
"""How long a worker's steps take with its model in one process and divided among ranks, and what a message costs.

Each case runs in a process of its own, in turns; medians of the steps, then over the rounds. The model has random
weights. A message is what `Settle` takes: to the rank, its wake-up, and one meeting of all ranks.

    scripts/bench_ranks.py qwen3-0.6b [--cases 1x2 2x1] [--rounds 3] [--steps 15] [--context 512] [--dtype bfloat16]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from miniserve.cluster.launch import DEFAULTS

os.environ.update(DEFAULTS | os.environ)  # as a worker has it, and read when torch is imported

import zmq

from miniserve.cluster.channels import Inbox, Keys, Outboxes
from miniserve.cluster.launch import Launcher, RunDir, WorkerSpec
from miniserve.cluster.messages import Settle
from miniserve.config import EngineConfig
from miniserve.hub.resolve import resolve
from miniserve.worker.build import build
from miniserve.worker.ranks import Ranks
from scripts.harness import flags, in_turns, medians, write
from scripts.profile_step import measure

STEPS = {"1 decode": (1, 0), "8 decodes": (8, 0), "prompt of 512": (0, 512)}


def one(model: str, ranks: int, threads: int, steps: int, context: int, dtype: str) -> dict[str, float]:
    """Milliseconds of each kind of step, and microseconds of a message."""
    config = EngineConfig(
        model=str(resolve(model, load_format="dummy").folder),
        load_format="dummy",
        dtype=dtype,
        threads=threads,
        tensor_parallel_size=ranks,
        max_num_batched_tokens=512,
        step_stretch=0.0,
        prompt_lookup=False,
        workers=ranks,
    )
    run_dir, messages, keys = RunDir(Launcher().base), zmq.Context(), Keys.make()
    spec = WorkerSpec("d0", 1, str(run_dir.path), run_dir.address("d0.1"), run_dir.address("frontend"), config, keys)
    inbox, outboxes = Inbox(messages, spec.address, keys), Outboxes(messages, "d0", 1, keys)
    others = Ranks(spec, outboxes)
    try:
        built = build(config, spec=others.spec, tell=others.tell)
        others.meet(inbox)
        found = {
            name: measure(built, None, decodes, context, chunk, steps)["step"]
            for name, (decodes, chunk) in STEPS.items()
        }
        waits = []
        for _ in range(300 if ranks > 1 else 0):
            time.sleep(0.002)
            begun = time.perf_counter()
            others.tell(Settle())
            built.runner.settle()
            waits.append(time.perf_counter() - begun)
        return found | {"message, us": 1e6 * sorted(waits)[150] if waits else 0.0}
    finally:
        others.close()
        run_dir.remove()


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("model")
    parser.add_argument("--cases", nargs="+", default=["1x2", "2x1"], metavar="RANKSxTHREADS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--one", action="store_true", help="the first case alone, in this process")
    arguments = parser.parse_args()
    if arguments.one:
        ranks, threads = map(int, arguments.cases[0].split("x"))
        print(json.dumps(one(arguments.model, ranks, threads, arguments.steps, arguments.context, arguments.dtype)))
        return

    def run(case: str) -> dict[str, float]:
        same = [f"--{name}={getattr(arguments, name)}" for name in ("steps", "context", "dtype")]
        command = [sys.executable, __file__, arguments.model, "--one", f"--cases={case}", *same]
        found: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        print(case, found, flush=True)
        return found

    rounds = in_turns(arguments.cases, arguments.rounds, run)
    table = {case: medians(found) for case, found in rounds.items()}
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    print(
        f"\n{cpu.partition(': ')[2]}, {os.cpu_count()} cores\n| ranks x threads | {' | '.join(STEPS)} | message, us |"
    )
    print("|---|---|---|---|---|")
    for case, row in table.items():
        print(f"| {case} | " + " | ".join(f"{row[name]:.2f}" for name in STEPS) + f" | {row['message, us']:.0f} |")
    write(arguments.json, rounds)


if __name__ == "__main__":
    main()
