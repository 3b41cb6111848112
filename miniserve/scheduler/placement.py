"""What a policy is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from miniserve.scheduler.conversations import Conversation
from miniserve.scheduler.workers import Cluster, WorkerView


@dataclass(frozen=True)
class Need:
    """A turn that wants a place: `tokens` of prompt, `output` tokens expected, which take `pages` in all. `known` says
    how many tokens of the prompt a worker is thought to hold. It has `waited` for so many seconds; `now` is in seconds
    too."""

    conversation: Conversation
    tokens: int
    output: int
    pages: int
    known: Mapping[str, int]
    now: float
    waited: float = 0.0

    def new(self, worker: str) -> int:
        """Tokens that this worker would have to compute: the last one always, for its logits."""
        return max(self.tokens - self.known.get(worker, 0), 1)


class Option(msgspec.Struct, frozen=True):
    """One way to serve a turn, and what it is expected to cost, in seconds.

    To this turn: `queue` before its prefill, the `prefill`, `transfer` of KV that nothing hides, and `decode`. To
    others: `harm`, the delay of all streams beside it, added up.
    """

    home: str
    prefill_at: str = ""
    history_at: str = ""
    queue: float = 0.0
    prefill: float = 0.0
    transfer: float = 0.0
    decode: float = 0.0
    harm: float = 0.0
    cost: float = 0.0
    """All of it; computed."""

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "cost", self.first_token + self.decode + self.harm)

    @property
    def first_token(self) -> float:
        """Seconds until the first token."""
        return self.queue + self.prefill + self.transfer


@dataclass(frozen=True)
class Placement:
    """`home` decodes; `prefill_at` is "" where home prefills too. `history_at` is the worker from which home fetches
    the KV of earlier turns, "" for none; with `share_history` the prefiller may fetch it from home. `options` are what
    was compared, `reason` says in a word why this one."""

    home: str
    prefill_at: str = ""
    history_at: str = ""
    share_history: bool = False
    reason: str = ""
    options: tuple[Option, ...] = field(default=(), compare=False)


class Policy(Protocol):
    """One decision: see `place`."""

    step_stretch: float
    """How many times longer than the step of a lone stream a step may take in which prompts are computed beside
    streams; 0 for as long as it takes."""

    def place(self, need: Need, cluster: Cluster) -> Placement | None:
        """Place a turn; None if it has to wait."""
        ...

    def patience(self, need: Need, cluster: Cluster) -> float:
        """For how many seconds a conversation that waits for its first home lets those pass that have one; then it
        keeps room from them. 0 for policies that serve strictly in order."""
        ...


class InOrder:
    """What most policies have in common: nobody passes anybody, and steps take as long as they take."""

    step_stretch = 0.0

    def patience(self, need: Need, cluster: Cluster) -> float:
        """See `Policy`."""
        return 0.0


def at_home(need: Need, cluster: Cluster) -> WorkerView | None:
    """The decoder of the turn: home, or for a conversation without one the decoder with the most free KV that fits."""
    home = need.conversation.home
    candidates = [d for d in cluster.decoders if d.name in cluster.open and home in ("", d.name) and d.fits(need.pages)]
    return max(candidates, key=lambda d: d.free, default=None)


def least_queued(cluster: Cluster) -> WorkerView:
    """The prefiller with the shortest queue."""
    return min(cluster.prefillers, key=lambda p: p.queued_prefill_tokens)
