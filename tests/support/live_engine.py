"""A dispatcher with a real scheduler whose workers' reports are made up, turn by turn."""

from __future__ import annotations

import time
from typing import Any

from miniserve.cluster.messages import Move, Report
from miniserve.monitor.events import Feed
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.baselines import make_policy
from miniserve.scheduler.scheduler import Scheduler
from miniserve.scheduler.turns import Command, Note
from tests.support.fake_engine import STATS, FakeClient
from tests.support.outputs import outputs
from tests.support.peers import peer


class LiveClient(FakeClient):
    """Has a scheduler of its own, under `policy`, whose records go to listeners."""

    def __init__(self, policy: str = "observe", **play: Any) -> None:
        super().__init__(**play)
        self.scheduler = Scheduler(make_policy(policy), 16, max_turns=600, max_queued=600)
        self.feed = Feed(self.scheduler)
        for name in ("p0", "d0"):
            self.up(name)

    def up(self, name: str, epoch: int = 1) -> None:
        self.carry_out(self.scheduler.worker_up(peer(name, epoch, pages=4000), now=time.monotonic()))

    def carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Note):
                self.feed.note(command.record)

    def begin(self, turn: str, conversation: str, tokens: int = 600) -> None:
        prompt = [len(self.scheduler.turns) % 1000, *range(tokens - 1)]
        params = SamplingParams(max_tokens=16)
        self.carry_out(self.scheduler.submit(turn, prompt, params, 0, conversation, "", time.monotonic()))

    def report(self, turn: str, index: int, tokens: list[int], finish: Any = None, **more: Any) -> None:
        """From the home of `turn`; with the first token come the pages that were moved."""
        found = self.scheduler.turns[turn]
        moves = [Move(f"{turn}.1", "p0", 4, 4 * 4096, 0.002, 0.001)] if found.prefill_at and index == 0 else []
        cached = 0 if index == 0 else None
        said = outputs(f"{turn}.1", index, tokens, finish=finish, cached_tokens=cached, **more)
        self.carry_out(self.scheduler.on_report(found.home, Report(said, moves, STATS), time.monotonic()))

    def whole(self, turn: str, conversation: str) -> None:
        """A turn from its beginning to its end."""
        self.begin(turn, conversation)
        self.report(turn, 0, [7], prefill=0.01)
        self.report(turn, 1, [8, 9], "stop")
