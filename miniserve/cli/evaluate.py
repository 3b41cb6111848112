"""The commands of the evaluation: `miniserve replay`, `simulate`, `compare` and `profile`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniserve.cli.flags import add_command, api_key, filled
from miniserve.config import ConfigError, EngineConfig
from miniserve.scheduler.baselines import POLICIES

if TYPE_CHECKING:
    from miniserve.bench.replay.generators import WorkloadConfig


def add_commands(commands: Any) -> None:
    """Add the four to the parser of all."""
    add_command(commands, _replay, "replay agents against a running server", "workload", "run", "server")
    add_command(commands, _simulate, "simulate a cluster under the same scheduler", "workload", "run", "cluster")
    add_command(commands, _compare, "compare policies over rates, with tables and figures", "workload", "cluster")
    add_command(commands, _profile, "measure this machine's step times for `simulate`")


def _replay(args: argparse.Namespace) -> int:
    """Replay agents against an OpenAI-compatible server (miniserve, vLLM, llama.cpp): each waits for its answer, runs
    its tool, sends the grown conversation. Prompts are made-up token ids."""
    try:
        from miniserve.bench.replay.driver import ReplayConfig, replay
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing: pip install 'miniserve[bench]'.") from error

    workload = _workload(args).load(args.rate, args.seed)
    alone = len(workload.scripts) if args.standalone is None else args.standalone
    config = filled(ReplayConfig, args, workload=workload, api_key=api_key(args), standalone=alone)
    return _write(replay(config), args.json)


def _simulate(args: argparse.Namespace) -> int:
    """Simulate a cluster on a virtual clock: the server's scheduler, its workers' batching, paging and handoffs, with
    the step times of a hardware profile."""
    from miniserve.bench.replay.progress import counting
    from miniserve.bench.simulate.cluster import SimulationConfig
    from miniserve.bench.simulate.hardware import load_roles
    from miniserve.bench.simulate.run import simulate

    workload, hardware = _workload(args).load(args.rate, args.seed), load_roles(args.hardware)
    config = filled(SimulationConfig, args, workload=workload, hardware=hardware)
    with counting("conversations", len(config.workload.scripts)) as progress:
        result = simulate(config, progress)
    return _write(result, args.json)


def _compare(args: argparse.Namespace) -> int:
    """Run a grid of policies, rates and seeds, simulated or (with --serve) on real workers of this machine; print
    tables, draw figures."""
    from miniserve.bench.compare import CompareConfig, compare

    chosen = {"policies": args.policies or list(POLICIES), "jobs": args.jobs or os.cpu_count() or 1}
    return compare(filled(CompareConfig, args, workload=_workload(args), **chosen))


def _profile(args: argparse.Namespace) -> int:
    """Measure how long steps of a model take here, and write a hardware profile for `simulate`."""
    from miniserve.bench.simulate.profile import profile
    from miniserve.hub.fetch import DEFAULT_MODEL

    profile(filled(EngineConfig, args, model=args.model or DEFAULT_MODEL), args.out)
    return 0


def _workload(args: argparse.Namespace) -> WorkloadConfig:
    from miniserve.bench.replay.generators import WorkloadConfig

    return filled(WorkloadConfig, args)


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
