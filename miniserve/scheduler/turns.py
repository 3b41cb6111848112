"""A turn from `submit` to its end, and the times of its phases."""

from __future__ import annotations

from dataclasses import dataclass, field

from miniserve.cluster.messages import Ended, FirstToken, Tokens
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.conversations import Conversation
from miniserve.scheduler.placement import Option


@dataclass
class Phases:
    """Of the run that gave the first token: seconds, and tokens found and moved. See `history.TurnRecord`."""

    prefill: float = 0.0
    transfer: float = 0.0
    exposed: float = 0.0
    cached: int = 0
    moved_pages: int = 0


@dataclass
class Turn:
    """`tokens` grows with what was delivered. Times are in seconds of the scheduler's clock, 0 for what was not yet.

    `run` is what its workers call it. It may run more than once, on other workers, each time under another name.
    """

    id: str
    tokens: list[int]
    params: SamplingParams
    seed: int
    salt: str
    conversation: Conversation
    chain: list[bytes]
    """The prompt's `page_chain`, until it is placed for the first time."""
    known: int
    """Tokens of the prompt that the conversation had before."""
    arrived: float
    gap: float
    tool: bool
    output: int
    """Tokens it is expected to generate."""
    pages: int
    """What the ledger holds for it at its home."""
    given: int
    number: int
    """Which turn of its conversation this is, from 1."""
    runs: int = 0
    losses: int = 0
    run: str = ""
    home: str = ""
    prefill_at: str = ""
    lent_pages: int = 0
    """What the ledger holds for it at `prefill_at`, until its first token."""
    placed: float = 0.0
    """When the run began that gave the first token."""
    first_token: float = 0.0
    phases: Phases = field(default_factory=Phases)
    chosen: Option | None = None
    early: dict[int, FirstToken | Tokens | Ended] = field(default_factory=dict)
    """Outputs that overtook an earlier one: first tokens come from P, the next ones from D."""

    def waited(self, now: float) -> float:
        """Seconds between the placement and the first token in which its prompt was not computed."""
        return max((self.first_token or now) - self.placed - self.phases.prefill, 0.0)

    @property
    def delivered(self) -> int:
        """Output tokens the client has."""
        return len(self.tokens) - self.given
