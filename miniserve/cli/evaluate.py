"""The commands of the evaluation: the flags of `miniserve replay`, `simulate`, `compare` and `profile`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniserve.bench.replay.workload import ARRIVALS
from miniserve.cli import flags
from miniserve.cli.flags import add_command, filled
from miniserve.config import ConfigError, EngineConfig, Topology
from miniserve.scheduler.baselines import POLICIES

if TYPE_CHECKING:
    from miniserve.bench.replay.generators import WorkloadConfig

positive, rate, share, span, whole = flags.positive, flags.rate, flags.share, flags.span, flags.whole


def _add_workload(parser: argparse.ArgumentParser, *, rates: bool = False) -> None:
    parser.add_argument(
        "trace",
        metavar="TRACE",
        help="a trace (CSV, or Mooncake's JSONL), or a workload made up: swe-agent, chat, deep-research, "
        "mix:swe-agent=0.5,chat=0.5",
    )
    add = parser.add_argument_group("workload").add_argument
    if not rates:
        add("--rate", type=rate, help="conversations that arrive a second; default: as the trace says, else 1")
    add("--arrivals", choices=ARRIVALS, default="poisson", help="how they arrive, with --rate; default: %(default)s")
    add("--conversations", type=positive, help="how many, drawn from the trace; default: all of it (255 made up)")
    add("--max-turns", type=positive, help="turns of each at most")
    add("--scale-tokens", type=flags.scale, default=1.0, metavar="F", help="times all token counts")
    add(
        "--gap",
        type=_distribution,
        metavar="DIST",
        help="seconds between turns, instead of the trace's: 5, 0..30 (uniform), exp:10 (mean)",
    )
    add("--append", type=_distribution, metavar="DIST", help="new tokens of later turns, instead: 67, log:67..8000")
    add(
        "--same-prompt",
        action="store_true",
        help="all first prompts are beginnings of one: their KV is cached once for all, as in the paper's artifact",
    )
    if not rates:
        add("--seed", type=whole, default=0, help="of all that is drawn; default: %(default)s")


def _workload(args: argparse.Namespace) -> WorkloadConfig:
    from miniserve.bench.replay.generators import WorkloadConfig

    return filled(WorkloadConfig, args)


def _add_replay(commands: Any) -> None:
    parser = add_command(commands, _replay, "replay agents against a running server")
    add = parser.add_argument
    _add_workload(parser)
    flags.add_url(parser, "http://127.0.0.1:8000")
    add("--model", help="default: the server's first")
    add(
        "--standalone",
        type=whole,
        metavar="N",
        help="how many conversations are first replayed alone, to normalise by; default: all; 0: none",
    )
    add("--vocab", type=positive, help="size of the vocabulary, where the server does not tell")
    add("--timeout", type=flags.seconds, default=600.0, metavar="SECONDS", help="of one turn; default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write the result here; default: print it")


def _replay(args: argparse.Namespace) -> int:
    """Replay agents against an OpenAI-compatible server (miniserve, vLLM, llama.cpp): each waits for its answer, runs
    its tool, sends the grown conversation. Prompts are made-up token ids."""
    try:
        from miniserve.bench.replay.driver import ReplayConfig, replay
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing: pip install 'miniserve[bench]'.") from error

    workload = _workload(args).load(args.rate, args.seed)
    alone = len(workload.scripts) if args.standalone is None else args.standalone
    config = filled(ReplayConfig, args, workload=workload, api_key=flags.api_key(args), standalone=alone)
    return _write(replay(config), args.json)


def _add_simulate(commands: Any) -> None:
    parser = add_command(commands, _simulate, "simulate a cluster under the same scheduler")
    add = parser.add_argument
    _add_workload(parser)
    _add_cluster(parser)
    add("--topology", type=flags.checked(Topology.parse), default="1P3D", help="default: %(default)s")
    add("--policy", choices=tuple(POLICIES), default="observe", help="default: %(default)s")
    add("--mispredict", type=share, default=0.0, metavar="FRACTION", help="with ampd: share of decisions turned around")
    add("--window", type=span, metavar="START..END", help="seconds of which the JSON gets a timeline, like 20..60")
    add("--json", type=Path, metavar="FILE", help="write the result here; default: print it")


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hardware",
        default="a40-qwen3-0.6b",
        help="a preset (a40-qwen3-0.6b, a40-qwen3-0.6b-graphs, a40-qwen3-0.6b-200w), a file of `miniserve profile`, or "
        "P=...,D=... for the roles; default: %(default)s",
    )
    parser.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="find KV of known prefixes; default: on",
    )


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


def _add_compare(commands: Any) -> None:
    parser = add_command(commands, _compare, "compare policies over rates, with tables and figures")
    add = parser.add_argument
    _add_workload(parser, rates=True)
    _add_cluster(parser)
    add(
        "--policies",
        default=",".join(POLICIES),
        help="which, each perhaps with a topology of its own, like colocated@4D,conserve; default: all",
    )
    add(
        "--topology",
        type=flags.checked(Topology.parse),
        default="1P3D",
        help="of those that have none of their own; colocated has as many workers, all decoders; default: %(default)s",
    )
    add("--rates", type=_list(rate), default=[1.0], help="conversations a second, like 0.5,1,1.5")
    add("--seeds", type=_list(whole), default=[0], help="like 1,2,3; default: 0")
    add("--mispredict", type=_list(share), default=[0.1], help="shares of ampd's wrong predictions; default: 0.1")
    add("--serve", metavar="MODEL", help="run real servers of this model here instead of simulating")
    add("--serve-args", default="", metavar="ARGS", help="more flags for `miniserve serve`")
    add(
        "--window",
        type=span,
        metavar="START..END",
        help="draw what workers did in these seconds, simulated, at the highest rate; with --out",
    )
    add("--jobs", type=positive, default=os.cpu_count() or 1, help="simulations at once")
    add("--out", type=Path, metavar="FOLDER", help="write cells.json, tables.md and the figures there")


def _compare(args: argparse.Namespace) -> int:
    """Run a grid of policies, rates and seeds, simulated or (with --serve) on real workers of this machine; print
    tables, draw figures."""
    from miniserve.bench.compare import CompareConfig, compare

    lists = {"policies": args.policies.split(","), "serve_args": shlex.split(args.serve_args)}
    return compare(filled(CompareConfig, args, workload=_workload(args), **lists))


def _add_profile(commands: Any) -> None:
    add = add_command(commands, _profile, "measure this machine's step times for `simulate`").add_argument
    add("model", nargs="?", help="as for serve; default: smollm2-135m")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--dtype", default="auto", help="as for serve")
    add("--threads", type=positive, default=0, help="CPU threads of a worker; default: all cores. One for 1P1D on two")
    add("--workers", type=positive, default=1, help="workers that share this machine, all kept busy")
    add("--out", type=Path, required=True, metavar="FILE")


def _profile(args: argparse.Namespace) -> int:
    """Measure how long steps of a model take here, and write a hardware profile for `simulate`."""
    from miniserve.bench.simulate.profile import profile
    from miniserve.hub.fetch import DEFAULT_MODEL

    profile(filled(EngineConfig, args, model=args.model or DEFAULT_MODEL), args.out)
    return 0


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


def _distribution(text: str) -> Any:
    from miniserve.bench.replay.distributions import Distribution

    return flags.checked(Distribution.parse)(text)


def _list(item: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [item(part) for part in text.split(",")]


COMMANDS = _add_replay, _add_simulate, _add_compare, _add_profile
"""Each adds its command to the parser of all."""
