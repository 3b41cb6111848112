"""What the measuring scripts share: their flags, variants that take turns, medians, JSON, engines and clusters."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from miniserve.bench.replay.server import TargetServer, describe
from miniserve.client import ApiClient
from miniserve.config import ConfigError, EngineConfig, ServeConfig, Topology
from miniserve.dispatcher import Dispatcher
from miniserve.hub.resolve import resolve

if TYPE_CHECKING:
    import aiohttp

Variant = TypeVar("Variant")
Result = TypeVar("Result")


def flags(description: str | None) -> argparse.ArgumentParser:
    """The flags of a script that its docstring describes; all of them have --json."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser


def write(path: Path | None, figures: Any) -> None:
    """Write figures to --json's file, if there is one."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n")


def show(row: dict[str, Any]) -> None:
    """Print a row as one line of JSON, its numbers rounded."""
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)


def medians(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The median of each figure over rows that have the same ones; None where a row has none."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def in_turns(
    variants: Iterable[Variant], rounds: int, measure: Callable[[Variant], Result], warm_up: int = 0
) -> dict[Variant, list[Result]]:
    """What `measure` returns, `rounds` times for each variant, after `warm_up` rounds that do not count.

    Variants take turns, every other round in reverse, so that a noisy machine is noisy for all of them alike.
    """
    found: dict[Variant, list[Result]] = {variant: [] for variant in variants}
    for number in range(-warm_up, rounds):
        for variant in list(found) if number % 2 == 0 else reversed(list(found)):
            result = measure(variant)
            if number >= 0:
                found[variant].append(result)
    return found


@asynccontextmanager
async def cluster(engine: EngineConfig, topology: str, policy: str) -> AsyncIterator[Dispatcher]:
    """Workers of this machine with their scheduler, stopped at the end."""
    config = ServeConfig(engine=engine, topology=Topology.parse(topology), policy=policy)
    client = Dispatcher(config, resolve(engine.model))
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


@asynccontextmanager
async def running(argv: list[str], url: str, http: aiohttp.ClientSession) -> AsyncIterator[TargetServer]:
    """The server at `url` that `argv` starts, once it is up; ended by SIGINT. Raises `ConfigError` if it fails."""
    import aiohttp  # of the extra `bench`, which most scripts do without

    with tempfile.TemporaryFile() as log:
        server = await asyncio.create_subprocess_exec(*argv, stdout=log, stderr=log)
        try:
            while True:
                await asyncio.sleep(0.2)
                if server.returncode is not None:
                    log.seek(0)
                    raise ConfigError(log.read().decode()[-2000:])
                try:
                    async with http.get(f"{url}/health") as answer:
                        if answer.status == 200:
                            break
                except aiohttp.ClientError:
                    continue
            yield await asyncio.to_thread(describe, ApiClient.around(url, None), None)
        finally:
            if server.returncode is None:
                server.send_signal(signal.SIGINT)
            await server.wait()
