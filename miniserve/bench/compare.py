"""`miniserve compare`: a grid of runs, each a command of its own that anybody can repeat, and what is told of them."""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import signal
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.console import Console

from miniserve.bench.figures.tables import markdown, print_tables
from miniserve.bench.replay.progress import counting
from miniserve.config import ConfigError, Topology
from miniserve.scheduler.baselines import POLICIES


class Series(NamedTuple):
    """A line in the figures."""

    policy: str
    topology: Topology
    mispredict: float

    @property
    def label(self) -> str:
        """What it is called there."""
        return f"{self.policy} {self.topology}"


def compare(args: argparse.Namespace) -> int:
    """Run the grid that the flags of `evaluate.py` describe. 1 if a run failed."""
    if args.out is not None and not args.out.is_dir():
        raise ConfigError(f"{args.out} is not a folder: create it first.")
    if args.window is not None and (args.serve or args.out is None):
        raise ConfigError("--window draws simulated workers: use it with --out and without --serve.")
    if args.out is not None:
        from miniserve.bench.figures.plots import draw, draw_timeline  # says at once if matplotlib is missing
    grid = [(s, rate, seed) for s in series(args) for rate in args.rates for seed in args.seeds]
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no server outlives us
    try:
        cells = asyncio.run(_serve_all(args, grid) if args.serve else _simulate_all(args, grid))
    finally:
        signal.signal(signal.SIGTERM, before)
    print_tables(cells, Console())
    timelines = {cell["label"]: timeline for cell in cells if (timeline := cell.pop("timeline", None))}
    if args.out is not None:
        (args.out / "cells.json").write_text(json.dumps(cells, indent=1) + "\n", "utf-8")
        (args.out / "tables.md").write_text(markdown(cells), "utf-8")
        paths = draw(cells, args.out)
        for label, timeline in timelines.items():
            paths += draw_timeline(timeline, args.out, f"timeline-{label.replace(' ', '-')}")
        for path in paths:
            print(path)
    return 1 if any(cell["errors"] for cell in cells) else 0


def series(args: argparse.Namespace) -> Iterator[Series]:
    """The series of --policies. Raises `ConfigError`."""
    for text in args.policies.split(","):
        policy, _, own = text.partition("@")
        if policy not in POLICIES:
            raise ConfigError(f"--policies: {policy!r} is not one of {', '.join(POLICIES)}.")
        topology = Topology.parse(own) if own else args.topology
        if policy == "colocated" and not own:
            topology = Topology(0, topology.prefillers + topology.decoders)
        for wrong in args.mispredict if policy == "ampd" else [0.0]:
            yield Series(policy, topology, wrong)


def workload_flags(args: argparse.Namespace, rate: float, seed: int) -> list[str]:
    """The flags of `replay` and `simulate` that stand for one cell of the grid."""
    flags = [args.trace, "--rate", f"{rate:g}", "--arrivals", args.arrivals, "--seed", str(seed)]
    given = {"--conversations": args.conversations, "--max-turns": args.max_turns}
    flags += [str(part) for name, value in given.items() if value is not None for part in (name, value)]
    spreads = {"--gap": args.gap, "--append": args.append}
    flags += [str(part) for name, value in spreads.items() if value is not None for part in (name, value)]
    flags += ["--same-prompt"] if args.same_prompt else []
    return [*flags, "--scale-tokens", f"{args.scale_tokens:g}"]


# --- simulated ------------------------------------------------------------------------------------------------------


async def _simulate_all(args: argparse.Namespace, grid: list[tuple[Series, float, int]]) -> list[dict[str, Any]]:
    """Every cell, `--jobs` at once."""
    room = asyncio.Semaphore(args.jobs)
    done = 0
    with counting("simulations", len(grid)) as progress:

        async def one(cell: Series, rate: float, seed: int) -> dict[str, Any]:
            nonlocal done
            caching = [] if args.enable_prefix_caching else ["--no-enable-prefix-caching"]
            flags = ["--policy", cell.policy, "--topology", str(cell.topology), "--mispredict", f"{cell.mispredict:g}"]
            if args.window is not None and (rate, seed) == (max(args.rates), args.seeds[0]):
                flags += ["--window", f"{args.window[0]:g}..{args.window[1]:g}"]
            async with room:
                result = await _run(
                    ["simulate", *workload_flags(args, rate, seed), *flags, "--hardware", args.hardware, *caching]
                )
            done += 1
            progress(done)
            return {**result, "label": cell.label}

        return await asyncio.gather(*(one(*cell) for cell in grid))


async def _run(command: list[str]) -> dict[str, Any]:
    """The JSON that a command of miniserve's prints, with the command itself. Raises `ConfigError` if it fails."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "miniserve",
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    if not out:
        raise ConfigError(f"`miniserve {shlex.join(command)}` failed: {err.decode(errors='replace').strip()}")
    return {"command": f"miniserve {shlex.join(command)}", **json.loads(out)}


# --- real -----------------------------------------------------------------------------------------------------------


async def _serve_all(args: argparse.Namespace, grid: list[tuple[Series, float, int]]) -> list[dict[str, Any]]:
    """Every cell, one after the other, each on a server of its own: nothing is cached from the one before."""
    cells = []
    with counting("runs", len(grid)) as progress:
        for done, (cell, rate, seed) in enumerate(grid, 1):
            serve = ["serve", args.serve, "--policy", cell.policy, "--topology", str(cell.topology), "--port", "0"]
            if cell.policy == "ampd":
                serve += ["--mispredict", f"{cell.mispredict:g}"]
            result = await _on_server(
                [*serve, *shlex.split(args.serve_args)], ["replay", *workload_flags(args, rate, seed)]
            )
            cells.append({**result, "label": cell.label, "mispredict": cell.mispredict})
            progress(done)
    return cells


async def _on_server(serve: list[str], command: list[str]) -> dict[str, Any]:
    """Run a command against a server that lives as long as it takes."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "miniserve",
        *serve,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert process.stdout is not None
    said = []
    try:
        async for line in process.stdout:
            said.append(line.decode(errors="replace"))
            if (start := said[-1].find("http://")) >= 0:
                url = said[-1][start:].split()[0].removesuffix("/v1")
                break
        else:
            raise ConfigError(f"`miniserve {shlex.join(serve)}` did not start: {''.join(said).strip()}")
        listening = asyncio.create_task(process.stdout.read())  # or it would block one day
        result = await _run([*command, "--url", url])
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
            await process.wait()
    await listening
    return {"server_command": f"miniserve {shlex.join(serve)}", **result}
