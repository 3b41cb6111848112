"""An engine client that needs no engine: it plays given tokens, and notes what it was asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from miniserve.cluster.messages import (
    Ended,
    Move,
    PoolInfo,
    Ready,
    Report,
    StepTime,
    TokenLogprob,
    TurnOutput,
    WorkerStats,
)
from miniserve.monitor.events import Feed
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.baselines import make_policy
from miniserve.scheduler.conversation import UNSAID, Change, Said
from miniserve.scheduler.scheduler import Scheduler
from miniserve.scheduler.turns import Command
from tests.support.outputs import outputs
from tests.support.peers import peer

STATS = WorkerStats(
    total_pages=100,
    free_pages=60,
    cached_pages=15,
    held_pages=25,
    running=1,
    waiting=0,
    queued_prefill_tokens=0,
    leases=0,
    preemptions=3,
    prefix_queries=640,
    prefix_hits=320,
)
READY = Ready("bfloat16", "cpu", "torch", 1, 0, 16, 512, 49152, {}, "", pool=PoolInfo(1, 1, 100, 4096, ""))
"""A worker's facts."""
EOS = 2


def made_up(tokens: list[int], logprob: float, count: int | None) -> list[TokenLogprob] | None:
    """The likeliest ones are the token itself and those of the next ids."""
    if count is None:
        return None
    return [TokenLogprob(t, logprob, 1, [(t + i, logprob - i) for i in range(count)]) for t in tokens]


@dataclass
class FakeTurn:
    """Plays `steps` (the tokens of each output), `pause` seconds before each one; then ends with `finish`."""

    id: str
    tokens: list[int]
    params: SamplingParams
    conversation: str | int
    salt: str
    said: Said = UNSAID
    number: int = 0
    change: Change | None = None
    steps: Sequence[list[int]] = ()
    pause: float = 0.0
    finish: str = "stop"
    stop_token: int | None = None
    error: str = ""
    invalid: bool = False
    cached: int = 0
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    given: int = 0

    def cancel(self) -> None:
        self.cancelled.set()

    async def __aiter__(self) -> AsyncIterator[TurnOutput]:
        steps = list(self.steps)
        for number, tokens in enumerate(steps):
            try:
                if self.pause:
                    await asyncio.wait_for(self.cancelled.wait(), self.pause)
            except TimeoutError:
                pass
            if self.cancelled.is_set():
                yield Ended(self.id, -1, [], "abort")
                return
            room = (10**9 if self.params.max_tokens is None else self.params.max_tokens) - self.given
            out, last = tokens[:room], number == len(steps) - 1
            finish = "length" if len(tokens) >= room and not last else self.finish if last else None
            logprobs = made_up(out, -0.5, self.params.logprobs)
            first, self.given = self.given, self.given + len(out)
            for output in outputs(
                self.id,
                first,
                out,
                finish=finish,
                stop_token=self.stop_token if last else None,
                cached_tokens=self.cached if number == 0 else None,
                logprobs=logprobs,
                prompt_logprobs=made_up(self.tokens[1:], -2.0, self.params.prompt_logprobs),
                error=self.error,
                invalid=self.invalid,
            ):
                yield output
            if finish:
                return


@dataclass
class Played:
    """A real scheduler with the workers p0 and d0, whose reports are made up. `now` is its clock, in seconds; one turn
    runs at a time."""

    now: float
    notes: bool = False

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(make_policy("conserve"), 16, max_turns=1, max_queued=8)
        self.scheduler.notes = self.notes
        self.commands: list[Command] = []
        for name in ("p0", "d0"):
            self.commands += self.scheduler.worker_up(peer(name), now=self.now)

    def submit(self, turn: str, tokens: list[int], key: str = "", said: Said = UNSAID) -> None:
        params = SamplingParams(max_tokens=16)
        self.commands += self.scheduler.submit(turn, tokens, params, 0, key, "", self.now, said)

    def report(
        self, worker: str, said: Sequence[TurnOutput] = (), moves: Sequence[Move] = (), steps: Sequence[StepTime] = ()
    ) -> None:
        report = Report(list(said), list(moves), STATS, list(steps))
        self.commands += self.scheduler.on_report(worker, report, self.now)

    def first(self, turn: str, *, waited: float, prefill: float, exposed: float = 0.0, cached: int = 0) -> None:
        """The first token, `waited + prefill` seconds from now. With `exposed`, p0 has prefilled, and four pages went
        to d0."""
        self.now += waited + prefill
        run = f"{turn}.1"
        moves = [Move(run, "p0", 4, 4 * 4096, 2 * exposed, exposed)] if exposed else []
        said = outputs(run, 0, [7], cached_tokens=cached, prefill=prefill)
        self.report("d0", said, moves=moves, steps=[StepTime(64, 2048, 0, 0, prefill)])

    def end(self, turn: str, *, decode: float) -> None:
        """Two more tokens, the last one `decode` seconds from now."""
        self.now += decode
        self.report("d0", outputs(f"{turn}.1", 1, [8, 9], finish="stop"), steps=[StepTime(0, 0, 1, 64, decode / 2)])


def played(now: float) -> Scheduler:
    """What has come to pass by `now`: conversation "c1" has had two turns, "team/a" and number 3, which has no key, one
    each; one of "busy" runs, and one of "late" is queued."""
    play = Played(now - 100)
    play.submit("a", [1] * 60, "c1")
    play.first("a", waited=0.25, prefill=1.0, exposed=0.5)
    play.now += 0.25
    play.submit("b", [2] * 60, "team/a")  # waits until a has ended
    play.end("a", decode=0.75)
    play.first("b", waited=0.0, prefill=1.0, exposed=0.25)
    play.end("b", decode=1.0)
    play.now += 10
    play.submit("c", [1] * 60 + [7, 8, 9] + [3] * 20, "c1", Said(tool_result=True))
    play.first("c", waited=0.5, prefill=0.25, cached=48)
    play.end("c", decode=1.0)
    play.submit("d", [4] * 60)
    play.first("d", waited=0.0, prefill=1.0, exposed=0.25)
    play.end("d", decode=1.0)
    play.now = now - 2
    play.submit("e", [5] * 60, "busy")
    play.first("e", waited=0.0, prefill=0.5, exposed=0.25)
    play.submit("f", [6] * 60, "late")
    play.report("p0")
    return play.scheduler


class FakeClient:
    """The interface of `Dispatcher`. `play` are keyword arguments of the turns to come, or makes them."""

    def __init__(self, **play: Any) -> None:
        self.play: Callable[[list[int], SamplingParams], dict[str, Any]] = lambda tokens, params: play
        self.turns: list[FakeTurn] = []
        self.refuse: Exception | None = None
        self.max_model_len = 512
        self.vocab_size = 49152
        self.unhealthy_reason = ""
        self.watchers: list[Callable[[str, Report], None]] = []
        self.ready = dict.fromkeys(("p0", "d0"), READY)
        self.scheduler = played(time.monotonic())
        self.feed = Feed(self.scheduler)

    def check_room(self) -> None:
        if self.refuse is not None:
            raise self.refuse

    def submit(
        self,
        tokens: list[int],
        params: SamplingParams,
        *,
        conversation: str | int = "",
        salt: str = "",
        request_id: str = "",
        said: Said = UNSAID,
    ) -> FakeTurn:
        if self.refuse is not None:
            raise self.refuse
        turn = FakeTurn(request_id, tokens, params, conversation, salt, said=said, **self.play(tokens, params))
        self.turns.append(turn)
        return turn


def spell(text: str) -> list[list[int]]:
    """Steps of one byte each: with the dummy tokenizer a byte is a token (but 1 and 2 are special)."""
    return [[byte] for byte in text.encode()]
