"""A turn from `submit` to its end: its state, its phases and their times, and the commands that get it served."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from miniserve.cluster.messages import Ended, FirstToken, Message, Tokens, TurnOutput
from miniserve.config import tables
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.conversation import FINISHES, UNSAID, Change, Conversation, Said, TurnEnd, TurnRecord
from miniserve.scheduler.placement import Option
from miniserve.states import follow, transitions

Record = dict[str, Any]
"""A `Decision` or an `Outcome` of monitor/views.toml, which says what is in it: a line of the decision log."""
TRIED_AFTER = 2
"""Workers that die under a turn before it is suspected: they may have died of it."""
PROOF = 16
"""Output tokens by which a suspected turn has to go on, tried alone, until it is not suspected any more: more than may
be lost with a worker, so that it gets past the point where that one died. Twice as many after each further death."""


class TurnState(StrEnum):
    QUEUED = "queued"
    """Waits for a placement: for its first one, or for another one when its run was lost."""
    PREFILL = "prefill"
    """Runs; the first token of this run has not come."""
    DECODE = "decode"
    """Runs; its prompt is computed."""
    ENDED = "ended"


TRANSITIONS = transitions(TurnState, tables("states.toml")["turn"])


@dataclass
class Phases:
    """Of the run that gave the first token: seconds, tokens found and pages moved, as in `TurnRecord`."""

    prefill: float = 0.0
    transfer: float = 0.0
    exposed: float = 0.0
    cached: int = 0
    moved_pages: int = 0


@dataclass
class Turn:
    """One request. `tokens` is its prompt and grows with the output that was delivered. Times are in seconds of the
    scheduler's clock, None for what has not happened yet.

    A turn may run more than once, on other workers when some have died. Each run has a name of its own, by which its
    workers call it. `run`, `home` and `prefill_at` belong to the present run: they are None while the turn is queued.
    """

    id: str
    tokens: list[int]
    params: SamplingParams
    seed: int
    conversation: Conversation
    chain: list[bytes]
    """The prompt's `page_chain`, until it is computed for the first time; then empty."""
    known: int
    """Tokens of the prompt that the conversation had before."""
    arrived: float
    gap: float | None
    """Seconds since the conversation's turn before; None if there was none, or if it still ran."""
    output: int
    """Tokens it is expected to generate."""
    pages: int
    """What the ledger holds for it at its home."""
    said: Said = UNSAID
    change: Change | None = None
    """How the prompt differs from what it could have begun with."""
    state: TurnState = TurnState.QUEUED
    runs: int = 0
    losses: int = 0
    """Workers that died under it: its home, or its prefiller before the first token."""
    proven: int = 0
    """Output tokens from which on it is not suspected."""
    run: str | None = None
    home: str | None = None
    prefill_at: str | None = None
    """None also if home prefills, or if the prefiller has died."""
    lent_pages: int = 0
    """What the ledger holds for it at `prefill_at`, until its first token."""
    placed: float | None = None
    """When the run began that gave the first token, or the latest run before there is one."""
    first_token: float | None = None
    phases: Phases = field(default_factory=Phases)
    chosen: Option | None = None
    """The option that was placed, where the policy gave any."""
    early: dict[int, FirstToken | Tokens | Ended] = field(default_factory=dict)
    """Outputs that overtook an earlier one: first tokens come from P, the next ones from D."""

    def __post_init__(self) -> None:
        self.given = len(self.tokens)
        self.number = self.conversation.turns + 1
        """Which turn of its conversation this is, from 1."""

    def move(self, state: TurnState) -> None:
        """Go to another state. Raises `IllegalTransition`."""
        self.state = follow(TRANSITIONS, self.state, state)

    @property
    def service(self) -> int:
        """What it takes, in tokens: an output counts twice a prompt's new one, as in VTC (arXiv 2401.00588)."""
        return self.given - self.known + 2 * self.output

    def runs_on(self, worker: str) -> bool:
        return worker == self.home or (worker == self.prefill_at and self.state is TurnState.PREFILL)

    def lose(self) -> None:
        """A worker has died under it."""
        self.losses += 1
        if self.losses >= TRIED_AFTER:
            self.proven = self.delivered + PROOF * 2 ** (self.losses - TRIED_AFTER)

    @property
    def suspected(self) -> bool:
        """Whether it has to run alone, to show whether workers die of it."""
        return self.delivered < self.proven

    @property
    def delivered(self) -> int:
        """Output tokens the client has."""
        return len(self.tokens) - self.given

    def outcome(self, finish: TurnEnd, now: float) -> Record:
        """Of a turn that has ended and was placed at least once."""
        return {
            "kind": "outcome",
            "time": now,
            "run": f"{self.id}.{self.runs}",
            "conversation": self.conversation.key,
            "finish": finish,
            "tokens": self.given,
            "expected_first_token": self.chosen.first_token if self.chosen else None,
            **self._measured(now),
        }

    def remembered(self, names: list[str], finish: TurnEnd, now: float) -> TurnRecord:
        """Of a turn that has ended on a worker, for its conversation's history; `names` numbers all workers."""
        assert self.home is not None
        assert self.placed is not None
        assert self.first_token is not None
        measured = self._measured(now) | {"first_token": self.first_token - self.arrived}
        return TurnRecord(
            arrived=self.arrived - self.conversation.began,
            gap=self.gap,
            prompt=self.given,
            new=self.given - self.known,
            queued=self.placed - self.arrived,
            home=names.index(self.home),
            prefill_at=names.index(self.prefill_at) if self.prefill_at else None,
            tool=self.said.tool_result,
            finish=FINISHES.index(finish),
            **measured,
        )

    def _measured(self, now: float) -> Record:
        """What both say. Seconds of the run until the `first_token` (`now` if none has come), and of these the ones in
        which it `waited`: its prompt was not computed."""
        assert self.placed is not None
        first = now if self.first_token is None else self.first_token
        return {
            "turn": self.number,
            "runs": self.runs,
            "output": self.delivered,
            "first_token": first - self.placed,
            "waited": max(first - self.placed - self.phases.prefill, 0.0),
            "decode": now - first,
            **vars(self.phases),
        }


class Send(NamedTuple):
    worker: str
    message: Message


class Deliver(NamedTuple):
    """Give `output` to the client of `turn`."""

    turn: str
    output: TurnOutput


class Note(NamedTuple):
    """Show `record` to the observers: the decision log, and listeners of events."""

    record: Record


Command = Send | Deliver | Note
"""What the scheduler wants done. The server and the simulator carry commands out in their order."""
