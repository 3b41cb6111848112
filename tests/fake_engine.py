"""An engine client that needs no engine: it plays given tokens, and notes what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from miniserve.cluster.messages import TokenLogprob, TurnOutput, WorkerStats
from miniserve.sampling import SamplingParams
from miniserve.scheduler.views import Link

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
EOS = 2


@dataclass
class FakeTurn:
    """Plays `steps` (the tokens of each output), `pause` seconds before each one; then ends with `finish`."""

    id: str
    tokens: list[int]
    params: SamplingParams
    conversation: str
    salt: str
    steps: Sequence[list[int]] = ()
    pause: float = 0.0
    finish: str = "stop"
    stop_token: int | None = None
    error: str = ""
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
                yield TurnOutput(self.id, -1, [], finish="abort")
                return
            room = (self.params.max_tokens or 10**9) - self.given
            out, last = tokens[:room], number == len(steps) - 1
            finish = "length" if len(tokens) >= room and not last else self.finish if last else None
            logprobs = None
            if (count := self.params.logprobs) is not None:
                logprobs = [TokenLogprob(t, -0.5, 1, [(t + i, -0.5 - i) for i in range(count)]) for t in out]
            first, self.given = self.given, self.given + len(out)
            yield TurnOutput(
                self.id,
                first,
                out,
                logprobs,
                finish,  # type: ignore[arg-type]
                self.stop_token if last else None,
                self.cached if number == 0 else None,
                error=self.error,
            )
            if finish:
                return


class FakeClient:
    """The interface of `EngineClient`. `play` are keyword arguments of the turns to come, or makes them."""

    def __init__(self, **play: Any) -> None:
        self.play: Callable[[list[int], SamplingParams], dict[str, Any]] = lambda tokens, params: play
        self.turns: list[FakeTurn] = []
        self.refuse: Exception | None = None
        self.max_model_len = 512
        self.vocab_size = 49152
        self.healthy = True
        self.unhealthy_reason = ""
        self.stats = {"p0": STATS, "d0": STATS}
        self.handoffs = {("p0", "d0"): Link(count=2, pages=10, bytes=4096, seconds=0.5)}
        self.placements = {("p0", "d0"): 2, ("d0", "d0"): 1}
        self.queued, self.running, self.active = 4, 5, 9
        self.policy_name = "conserve"

    def check_room(self) -> None:
        if self.refuse is not None:
            raise self.refuse

    def submit(
        self,
        tokens: list[int],
        params: SamplingParams,
        *,
        conversation: str = "",
        salt: str = "",
        request_id: str = "",
        tool: bool = False,
    ) -> FakeTurn:
        if self.refuse is not None:
            raise self.refuse
        turn = FakeTurn(request_id, tokens, params, conversation, salt, **self.play(tokens, params))
        self.turns.append(turn)
        return turn


def spell(text: str) -> list[list[int]]:
    """Steps of one byte each: with the dummy tokenizer a byte is a token (but 1 and 2 are special)."""
    return [[byte] for byte in text.encode()]
