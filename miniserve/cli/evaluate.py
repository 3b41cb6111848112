"""The commands of the evaluation: `miniserve replay` and `simulate`."""

import gc
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from miniserve.bench.replay.generators import WorkloadConfig
from miniserve.cli.flags import api_key, filled
from miniserve.config import ConfigError


def replay(args: Namespace) -> int:
    try:
        from miniserve.bench.replay import driver
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing: pip install 'miniserve[bench]'.") from error

    workload = filled(WorkloadConfig, args).load(args.rate, args.seed)
    alone = len(workload.scripts) if args.standalone is None else args.standalone
    config = filled(driver.ReplayConfig, args, workload=workload, api_key=api_key(args), standalone=alone)
    return _write(driver.replay(config), args.json)


def simulate(args: Namespace) -> int:
    from miniserve.bench.simulate import run
    from miniserve.bench.simulate.cluster import SimulationConfig
    from miniserve.bench.simulate.hardware import load_roles

    workload = filled(WorkloadConfig, args).load(args.rate, args.seed)
    hardware = load_roles(args.hardware, args.tensor_parallel_size, args.swap_space, args.kv_disk_size)
    config = filled(SimulationConfig, args, workload=workload, hardware=hardware)
    gc.disable()  # hardly anything of a simulation is a circle, and looking for some takes a tenth of the time
    try:
        with counting("conversations", len(workload.conversations)) as progress:
            return _write(run.simulate(config, progress), args.json)
    finally:
        gc.enable()


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar that is called at the end of each of `total`; nothing is shown where stderr is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield partial(bar.advance, bar.add_task(what, total=total))


def _write(result: dict[str, Any], path: Path | None) -> int:
    """Write or print a result. 1 if something in it failed."""
    text = json.dumps(result, indent=1) + "\n"
    if path is None:
        sys.stdout.write(text)
    else:
        try:
            path.write_text(text, "utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error
    return 1 if result["errors"] else 0
