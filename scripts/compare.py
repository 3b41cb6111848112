"""Compare policies over rates and seeds, simulated or on real workers of this machine; print tables, draw figures.

    .venv/bin/python scripts/compare.py swe-agent --policies colocated,conserve,observe --rates 0.5,1 --out FOLDER

Each run of the grid is a `miniserve simulate` or `replay` of its own, with its command in the result: it can be
repeated alone. Figures need matplotlib, and --serve aiohttp: both are in the extra `bench`.
"""

import asyncio
import json
import os
import shlex
import signal
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import product
from typing import Any, NamedTuple

from rich.console import Console

from miniserve.bench.replay.generators import WorkloadConfig
from miniserve.bench.simulate.cluster import SimulationConfig
from miniserve.bench.simulate.hardware import load_roles
from miniserve.cli.evaluate import counting
from miniserve.cli.flags import VALUES, Parser, add_flags, filled
from miniserve.config import ConfigError, Topology, parse_seconds, tables
from miniserve.scheduler.baselines import POLICIES
from scripts.figures.tables import markdown, print_tables


class GridCell(NamedTuple):
    policy: str
    topology: Topology
    mispredict: float
    rate: float
    seed: int

    @property
    def label(self) -> str:
        return f"{self.policy} {self.topology}"


def compare(args: Namespace, workload: WorkloadConfig) -> int:
    """Run the grid that the command's flags ask for: every policy at every rate with every seed, ampd with every share
    of wrong predictions; print tables, write files. 1 if a run failed. Raises `ConfigError`."""
    if args.out is not None and not args.out.is_dir():
        raise ConfigError(f"{args.out} is not a folder: create it first.")
    if args.window is not None and (args.serve or args.out is None):
        raise ConfigError("--window draws simulated workers: use it with --out and without --serve.")
    if args.out is not None:
        from scripts.figures.plots import draw  # before the runs: matplotlib may be missing
        from scripts.figures.timeline import timeline
        from scripts.figures.timeline_plot import draw_timeline
    grid = list(_grid(args))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no server outlives this process
    try:
        results = asyncio.run(_run_all(args, workload, grid))
    finally:
        signal.signal(signal.SIGTERM, before)
    print_tables(results, Console())
    if args.out is not None:
        (args.out / "cells.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        (args.out / "tables.md").write_text(markdown(results), "utf-8")
        paths = draw(results, args.out)
        for cell in grid if args.window else []:
            if (cell.rate, cell.seed) == (max(args.rates), args.seeds[0]):
                shown = timeline(_simulation(args, workload, cell), *args.window)
                paths += draw_timeline(shown, args.out, f"timeline-{cell.label.replace(' ', '-')}")
        for path in paths:
            print(path)
    return 1 if any(result["errors"] for result in results) else 0


def _simulation(args: Namespace, workload: WorkloadConfig, cell: GridCell) -> SimulationConfig:
    return SimulationConfig(
        workload=workload.load(cell.rate, cell.seed),
        topology=cell.topology,
        hardware=load_roles(args.hardware, args.tensor_parallel_size, args.swap_space, args.kv_disk_size),
        policy=cell.policy,
        mispredict=cell.mispredict,
        enable_prefix_caching=args.enable_prefix_caching,
    )


def workload_flags(workload: WorkloadConfig, rate: float, seed: int) -> list[str]:
    """The flags of `miniserve replay` and `simulate` that name the workload that its `load` returns."""
    named = {"rate": rate, "seed": seed, **asdict(workload)}
    return [named.pop("trace"), *flags(**named)]


def flags(**given: object) -> list[str]:
    """Flags by their names: a switch for True, nothing for False and None."""
    found = []
    for name, value in given.items():
        if value is not None and value is not False:
            found.append("--" + name.replace("_", "-"))
            found += [] if value is True else [f"{value:g}" if isinstance(value, float) else str(value)]
    return found


def chosen(args: Namespace) -> Iterator[tuple[str, Topology]]:
    """The policies that are asked for, each with its topology. Raises `ConfigError`."""
    for text in args.policies or POLICIES:
        policy, _, own = text.partition("@")
        if policy not in POLICIES:
            raise ConfigError(f"--policies: {policy!r} is not one of {', '.join(POLICIES)}.")
        topology = Topology.parse(own) if own else args.topology
        if policy in ("colocated", "affinity", "cache-aware") and not own:
            topology = Topology(0, topology.prefillers + topology.decoders)
        yield policy, topology


def cluster_flags(args: Namespace, policy: str, topology: Topology, **more: object) -> list[str]:
    """The flags of `miniserve simulate` that name the simulated cluster."""
    without = not args.enable_prefix_caching
    names = ("hardware", "tensor_parallel_size", "warm_up", "swap_space", "kv_disk_size")
    same = {name: getattr(args, name) for name in names}
    return flags(policy=policy, topology=topology, **same, no_enable_prefix_caching=without, **more)


def _grid(args: Namespace) -> Iterator[GridCell]:
    for policy, topology in chosen(args):
        for wrong, rate, seed in product(args.mispredict if policy == "ampd" else [0.0], args.rates, args.seeds):
            yield GridCell(policy, topology, wrong, rate, seed)


async def _run_all(args: Namespace, workload: WorkloadConfig, grid: list[GridCell]) -> list[dict[str, Any]]:
    """Several simulations at once; or cells one after the other, each on a server of its own: nothing is cached from
    the one before."""
    room = asyncio.Semaphore(args.jobs or os.cpu_count() or 1)
    with counting("runs" if args.serve else "simulations", len(grid)) as progress:

        async def one(cell: GridCell) -> dict[str, Any]:
            named = workload_flags(workload, cell.rate, cell.seed)
            async with room:
                if args.serve:
                    wrong = cell.mispredict if cell.policy == "ampd" else None
                    how = flags(policy=cell.policy, topology=cell.topology, port=0, mispredict=wrong)
                    serve = ["serve", args.serve, *how, *args.serve_args]
                    result = {**await _on_server(serve, ["replay", *named]), "mispredict": cell.mispredict}
                else:
                    how = cluster_flags(args, cell.policy, cell.topology, mispredict=cell.mispredict)
                    result = await run(["simulate", *named, *how])
            progress()
            return {**result, "label": cell.label}

        return [await one(cell) for cell in grid] if args.serve else await asyncio.gather(*map(one, grid))


async def _start(command: list[str], stderr: int) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "miniserve", *command, stdout=asyncio.subprocess.PIPE, stderr=stderr
    )


async def run(command: list[str]) -> dict[str, Any]:
    """The JSON that a command of miniserve prints, with the command itself. Raises `ConfigError` if it fails."""
    process = await _start(command, asyncio.subprocess.PIPE)
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    if not out:
        raise ConfigError(f"`miniserve {shlex.join(command)}` failed: {err.decode(errors='replace').strip()}")
    return {"command": f"miniserve {shlex.join(command)}", **json.loads(out)}


async def _on_server(serve: list[str], command: list[str]) -> dict[str, Any]:
    """Run a command against a server that lives as long as the command."""
    process = await _start(serve, asyncio.subprocess.STDOUT)
    assert process.stdout is not None
    output = []
    try:
        async for line in process.stdout:
            output.append(line.decode(errors="replace"))
            if (start := output[-1].find("http://")) >= 0:
                url = output[-1][start:].split()[0].removesuffix("/v1")
                break
        else:
            raise ConfigError(f"`miniserve {shlex.join(serve)}` did not start: {''.join(output).strip()}")
        draining = asyncio.create_task(process.stdout.read())  # a full pipe would block the server
        result = await run([*command, "--url", url])
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
            await process.wait()
    await draining
    return {"server_command": f"miniserve {shlex.join(serve)}", **result}


# --- the command line -----------------------------------------------------------------------------------------------


def _span(text: str) -> tuple[float, float]:
    """A time span in seconds, like 20..60."""
    low, dots, high = text.partition("..")
    start, end = parse_seconds(low), parse_seconds(high) if dots else 0.0
    if not start < end:
        raise ConfigError(f"{text!r} is not a time span, like 20..60")
    return start, end


def listed(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [parse(part) for part in text.split(",")]


FLAGS: dict[str, Any] = {
    "--policies": {
        "type": listed(str),
        "help": "which, each perhaps with a topology of its own, like colocated@4D,conserve; default: all",
    },
    "--topology": {
        "type": "topology",
        "default": "1P3D",
        "help": "of those without one of their own; colocated ones have as many decoders; default: %(default)s",
    },
    "--rates": {
        "type": listed(VALUES["rate"]),
        "default": "1",
        "help": "conversations a second, like 0.5,1,1.5; default: %(default)s",
    },
    "--seeds": {"type": listed(VALUES["whole"]), "default": "0", "help": "like 1,2,3; default: %(default)s"},
    "--mispredict": {
        "type": listed(VALUES["share"]),
        "default": "0.1",
        "help": "shares of ampd's wrong predictions; default: %(default)s",
    },
    "--serve": {"metavar": "MODEL", "help": "run real servers of this model here instead of simulating"},
    "--serve-args": {
        "type": shlex.split,
        "default": "",
        "metavar": "ARGS",
        "help": "more flags for `miniserve serve`",
    },
    "--window": {
        "type": _span,
        "metavar": "START..END",
        "help": "draw what workers did in these seconds, simulated, at the highest rate; with --out",
    },
    "--jobs": {"type": "positive", "help": "simulations at once; default: one on each core"},
    "--out": {"type": "path", "metavar": "FOLDER", "help": "write cells.json, tables.md and the figures there"},
}


def make_parser() -> Parser:
    """Those of a workload and of a simulated cluster are the flags of `miniserve simulate`."""
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    given = tables("cli/commands.toml")["flags"]
    for title in ("workload", "cluster"):
        add_flags(parser.add_argument_group(title), given[title])
    add_flags(parser, FLAGS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The exit code. 1: a run failed, or what was asked for cannot be done."""
    args = make_parser().parse_args(argv)
    try:
        return compare(args, filled(WorkloadConfig, args))
    except ConfigError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
