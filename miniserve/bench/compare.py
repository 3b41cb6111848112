"""`miniserve compare`: a grid of runs, each a command of its own that can be repeated, with tables and figures."""

import asyncio
import json
import shlex
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from miniserve.bench.figures.tables import markdown, print_tables
from miniserve.bench.replay.generators import WorkloadConfig, flags
from miniserve.bench.replay.progress import counting
from miniserve.config import ConfigError, Topology
from miniserve.scheduler.baselines import POLICIES


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """The grid: every policy at every rate with every seed. `jobs` simulations run at once."""

    workload: WorkloadConfig
    policies: list[str]
    """Each perhaps with a topology of its own, like `colocated@4D`."""
    topology: Topology
    """Of those without one. `colocated` has as many workers then, all of them decoders."""
    rates: list[float]
    seeds: list[int]
    mispredict: list[float]
    """Shares of ampd's predictions that are made wrong; ampd runs with each of them."""
    hardware: str
    enable_prefix_caching: bool = True
    jobs: int = 1
    serve: str | None = None
    """The model of real servers; None: runs are simulated."""
    serve_args: list[str]
    window: tuple[float, float] | None = None
    """Seconds of which a timeline is drawn, at the highest rate, with the first seed."""
    out: Path | None = None


class GridCell(NamedTuple):
    policy: str
    topology: Topology
    mispredict: float
    rate: float
    seed: int

    @property
    def label(self) -> str:
        return f"{self.policy} {self.topology}"


def compare(config: CompareConfig) -> int:
    """Run the grid, print tables, write files. 1 if a run failed."""
    if config.out is not None and not config.out.is_dir():
        raise ConfigError(f"{config.out} is not a folder: create it first.")
    if config.window is not None and (config.serve or config.out is None):
        raise ConfigError("--window draws simulated workers: use it with --out and without --serve.")
    if config.out is not None:
        from miniserve.bench.figures.plots import draw  # before the runs: matplotlib may be missing
        from miniserve.bench.figures.timeline_plot import draw_timeline
    grid = list(_grid(config))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no server outlives this process
    try:
        results = asyncio.run(_serve_all(config, grid) if config.serve else _simulate_all(config, grid))
    finally:
        signal.signal(signal.SIGTERM, before)
    print_tables(results, Console())
    timelines = {result["label"]: timeline for result in results if (timeline := result.pop("timeline", None))}
    if config.out is not None:
        (config.out / "cells.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        (config.out / "tables.md").write_text(markdown(results), "utf-8")
        paths = draw(results, config.out)
        for label, timeline in timelines.items():
            paths += draw_timeline(timeline, config.out, f"timeline-{label.replace(' ', '-')}")
        for path in paths:
            print(path)
    return 1 if any(result["errors"] for result in results) else 0


def _grid(config: CompareConfig) -> Iterator[GridCell]:
    for text in config.policies:
        policy, _, own = text.partition("@")
        if policy not in POLICIES:
            raise ConfigError(f"--policies: {policy!r} is not one of {', '.join(POLICIES)}.")
        topology = Topology.parse(own) if own else config.topology
        if policy == "colocated" and not own:
            topology = Topology(0, topology.prefillers + topology.decoders)
        for wrong, rate, seed in product(config.mispredict if policy == "ampd" else [0.0], config.rates, config.seeds):
            yield GridCell(policy, topology, wrong, rate, seed)


async def _simulate_all(config: CompareConfig, grid: list[GridCell]) -> list[dict[str, Any]]:
    room = asyncio.Semaphore(config.jobs)
    with counting("simulations", len(grid)) as progress:

        async def one(cell: GridCell) -> dict[str, Any]:
            window = None
            if config.window is not None and (cell.rate, cell.seed) == (max(config.rates), config.seeds[0]):
                window = f"{config.window[0]:g}..{config.window[1]:g}"
            command = ["simulate", *config.workload.flags(cell.rate, cell.seed)]
            command += flags(policy=cell.policy, topology=cell.topology, mispredict=cell.mispredict, window=window)
            command += flags(hardware=config.hardware, no_enable_prefix_caching=not config.enable_prefix_caching)
            async with room:
                result = await _run(command)
            progress()
            return {**result, "label": cell.label}

        return await asyncio.gather(*map(one, grid))


async def _start(command: list[str], stderr: int) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "miniserve", *command, stdout=asyncio.subprocess.PIPE, stderr=stderr
    )


async def _run(command: list[str]) -> dict[str, Any]:
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


async def _serve_all(config: CompareConfig, grid: list[GridCell]) -> list[dict[str, Any]]:
    """Every cell, one after the other, each on a server of its own: nothing is cached from the one before."""
    assert config.serve is not None
    results = []
    with counting("runs", len(grid)) as progress:
        for cell in grid:
            wrong = cell.mispredict if cell.policy == "ampd" else None
            serve = flags(policy=cell.policy, topology=cell.topology, port=0, mispredict=wrong)
            replay = ["replay", *config.workload.flags(cell.rate, cell.seed)]
            result = await _on_server(["serve", config.serve, *serve, *config.serve_args], replay)
            results.append({**result, "label": cell.label, "mispredict": cell.mispredict})
            progress()
    return results


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
        result = await _run([*command, "--url", url])
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
            await process.wait()
    await draining
    return {"server_command": f"miniserve {shlex.join(serve)}", **result}
