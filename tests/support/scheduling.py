"""A scheduler whose workers are made up: what it sends, and reports that these workers might give."""

from __future__ import annotations

from typing import Any

from miniserve.cluster.messages import Abort, Message, Report, Run, StepTime, WorkerStats
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.baselines import make_policy
from miniserve.scheduler.conversation import UNSAID, Said
from miniserve.scheduler.scheduler import Scheduler
from miniserve.scheduler.turns import Command, Deliver, Send
from tests.support.outputs import outputs
from tests.support.peers import peer

PAGE = 16
"""Tokens."""
STATS = WorkerStats(100, 100, 0, 0, 0, 0, 0, 0)


def scheduler(*workers: str, policy: str = "conserve", max_turns: int = 4, max_queued: int = 4, **more) -> Scheduler:
    """With workers of 100 pages each; names that begin with p are prefillers."""
    made = Scheduler(make_policy(policy), PAGE, max_turns, max_queued, **more)
    for name in workers:
        join(made, name)
    return made


def join(made: Scheduler, name: str, epoch: int = 1, now: float = 0.0) -> list[Command]:
    """A worker comes up."""
    return made.worker_up(peer(name, epoch, page_bytes=1), now=now)


def submit(
    made: Scheduler, turn: str, tokens: list[int], key: str | int = "", now: float = 0.0, said: Said = UNSAID
) -> list[Command]:
    """A turn that generates 16 tokens at most."""
    return made.submit(turn, tokens, SamplingParams(max_tokens=16), 0, key, "", now, said=said)


def report(
    made: Scheduler, worker: str, run: str, index: int, token: int, now: float = 0.0, **more: Any
) -> list[Command]:
    """A worker reports one output token."""
    return made.on_report(worker, Report(outputs(run, index, [token], **more), [], STATS), now)


def report_steps(made: Scheduler, worker: str, *steps: StepTime, now: float = 0.0) -> list[Command]:
    """A worker reports how long its steps took, and no output."""
    return made.on_report(worker, Report([], [], STATS, list(steps)), now)


def report_stopped(made: Scheduler, commands: list[Command]) -> list[Command]:
    """Workers report that they have stopped what they were told to stop."""
    return [
        command
        for worker, abort in sent(commands, Abort)
        for command in made.on_report(worker, Report([], [], STATS, stopped=[abort.turn]), 0.0)
    ]


def end(made: Scheduler, worker: str, run: str, now: float = 0.0) -> list[Command]:
    """A run ends with its first token."""
    return report(made, worker, run, 0, 5, now, finish="stop")


def sent(commands: list[Command], kind: type) -> list[tuple[str, Message]]:
    """(worker, message) for all messages of a kind."""
    return [(c.worker, c.message) for c in commands if isinstance(c, Send) and isinstance(c.message, kind)]


def run_of(commands: list[Command]) -> tuple[str, Run]:
    """(home, message) of the one turn that was placed."""
    ((worker, run),) = sent(commands, Run)
    assert isinstance(run, Run)
    return worker, run


def delivered(commands: list[Command]) -> list[tuple[str, list[int]]]:
    """(turn, tokens) for all outputs that clients get."""
    return [(c.turn, c.output.tokens) for c in commands if isinstance(c, Deliver)]


def returning(made: Scheduler, key: str, tokens: list[int], gap: float) -> float:
    """A conversation that has had three turns, `gap` seconds apart; when the last one ended."""
    now = 0.0
    for n in range(3):
        home, run = run_of(submit(made, f"{key}{n}", tokens, key=key, now=now))
        report(made, home, run.turn, 0, 5, now + 1, finish="stop", cached_tokens=0)
        now += 1 + gap
    return now - gap
