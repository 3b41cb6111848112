"""The goodput of policies in steady state: the highest rate at which fewer than 1 % of the counted conversations break
each SLO, found by bisection for each seed, with its interval over seeds and its share of the bound.

    .venv/bin/python scripts/goodput.py swe-agent --policies colocated,observe --conversations 1400 --seeds 7,8,9

Every run is a `miniserve simulate` of its own. The arrivals of a seed are the same at each rate, only closer together.
"""

import asyncio
import json
import math
import os
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from statistics import mean, stdev
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from miniserve.bench.replay.generators import WorkloadConfig
from miniserve.cli.evaluate import counting
from miniserve.cli.flags import VALUES, Parser, add_flags, filled
from miniserve.config import ConfigError, Topology, tables
from scripts.compare import chosen, cluster_flags, listed, run, workload_flags
from scripts.figures.tables import GOOD, SLOS

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 0.975 quantiles of Student's t, from one degree of freedom on."""


class Found(NamedTuple):
    """Of one policy and seed: `good` is the highest rate that was, `bad` the lowest that was not; all `cells` of it."""

    policy: str
    topology: str
    seed: int
    good: float
    bad: float
    bound: float
    cells: list[dict[str, Any]]


def interval(values: list[float]) -> tuple[float, float | None]:
    """The mean, and half of its 95 % interval by Student's t; None with one value."""
    if len(values) < 2:
        return values[0], None
    return mean(values), STUDENT[min(len(values) - 2, len(STUDENT) - 1)] * stdev(values) / math.sqrt(len(values))


def is_good(cell: dict[str, Any]) -> bool:
    """Whether fewer than 1 % of the conversations broke each SLO."""
    return all((cell["slo_violation"][name] or 0.0) < GOOD for name in SLOS) and not cell["errors"]


async def bisect(args: Namespace, workload: WorkloadConfig, policy: str, topology: Topology, seed: int) -> Found:
    """Halve `args.low..args.high` until it is no wider than `args.within`."""
    low, high, cells = args.low, args.high, []

    async def at(rate: float) -> bool:
        command = ["simulate", *workload_flags(workload, rate, seed), *cluster_flags(args, policy, topology)]
        async with args.room:
            cells.append(await run(command))
        return is_good(cells[-1])

    if not await at(low):
        low, high = 0.0, low
    while low and high - low > args.within:
        middle = round((low + high) / 2, 4)
        low, high = (middle, high) if await at(middle) else (low, middle)
    return Found(policy, str(topology), seed, low, high, cells[0]["bound"]["conversations_per_s"], cells)


async def search(args: Namespace, workload: WorkloadConfig) -> list[Found]:
    args.room = asyncio.Semaphore(args.jobs or os.cpu_count() or 1)
    wanted = [(*each, seed) for each in chosen(args) for seed in args.seeds]
    with counting("searches", len(wanted)) as progress:

        async def one(policy: str, topology: Topology, seed: int) -> Found:
            found = await bisect(args, workload, policy, topology, seed)
            progress()
            return found

        return await asyncio.gather(*(one(*each) for each in wanted))


def show(found: list[Found], console: Console) -> None:
    table = Table("policy", "goodput, conversations/s", "of the bound", box=None)
    for policy, topology in dict.fromkeys((one.policy, one.topology) for one in found):
        mine = [one for one in found if (one.policy, one.topology) == (policy, topology)]
        rate, half = interval([one.good for one in mine])
        share, share_half = interval([one.good / one.bound for one in mine])
        spread, share_spread = (f" ± {h:.2f}" if h is not None else "" for h in (half, share_half))
        table.add_row(f"{policy} {topology}", f"{rate:.2f}{spread}", f"{share:.2f}{share_spread}")
    console.print(table)


FLAGS: dict[str, Any] = {
    "--policies": {"type": listed(str), "help": "like colocated@4D,observe; default: all"},
    "--topology": {"type": "topology", "default": "1P3D", "help": "colocated ones have as many decoders instead"},
    "--seeds": {"type": listed(VALUES["whole"]), "default": "0", "help": "like 1,2,3; default: %(default)s"},
    "--low": {"type": "rate", "default": 0.5, "help": "a rate that is expected to be good; default: %(default)s"},
    "--high": {"type": "rate", "default": 1.5, "help": "one that is not; default: %(default)s"},
    "--within": {"type": "rate", "default": 0.02, "help": "how far apart both are at the end; default: %(default)s"},
    "--jobs": {"type": "positive", "help": "simulations at once; default: one on each core"},
    "--json": {"type": "path", "metavar": "FILE", "help": "write all cells there"},
}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    given = tables("cli/commands.toml")["flags"]
    for title in ("workload", "cluster"):
        add_flags(parser.add_argument_group(title), given[title])
    add_flags(parser, FLAGS)
    args = parser.parse_args(argv)
    try:
        found = asyncio.run(search(args, filled(WorkloadConfig, args)))
    except ConfigError as error:
        print(f"goodput.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    show(found, Console(width=100))
    if args.json is not None:
        args.json.write_text(json.dumps([one._asdict() for one in found], indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
