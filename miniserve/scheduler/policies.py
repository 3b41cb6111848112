"""Where a turn is prefilled and where it is decoded. A policy is a pure function of what was observed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from miniserve.scheduler.conversations import Conversation


@dataclass
class WorkerView:
    """What the scheduler knows of a worker. KV is counted in pages.

    `reserved` is promised to turns that run, `resident` held by conversations between turns (the worker may evict it).
    """

    name: str
    prefiller: bool
    total_pages: int
    max_turns: int
    reserved: int = 0
    resident: int = 0
    turns: int = 0
    queued_prefill_tokens: int = 0

    @property
    def free(self) -> int:
        """Pages nobody runs in and no conversation rests in; below zero when more rests than fits."""
        return self.total_pages - self.reserved - self.resident

    def fits(self, pages: int) -> bool:
        """Whether a turn that needs `pages` can start here now. One turn alone always can."""
        if self.turns == 0:
            return True
        return self.turns < self.max_turns and self.reserved + pages <= self.total_pages


@dataclass(frozen=True)
class Placement:
    """`home` decodes; `prefill_at` is "" where home prefills too."""

    home: str
    prefill_at: str = ""


class Policy(Protocol):
    """One decision: see `place`."""

    def place(
        self, conversation: Conversation, pages: int, prefillers: list[WorkerView], decoders: list[WorkerView]
    ) -> Placement | None:
        """Place the next turn of `conversation`, which needs `pages`; None if it has to wait."""
        ...


def at_home(conversation: Conversation, pages: int, decoders: list[WorkerView]) -> WorkerView | None:
    """The decoder of the turn: home, or for a conversation without one the decoder with the most free KV that fits."""
    if conversation.home:
        candidates = [d for d in decoders if d.name == conversation.home]
    else:
        candidates = sorted(decoders, key=lambda d: -d.free)
    return next((d for d in candidates if d.fits(pages)), None)


class Colocated:
    """Every turn is prefilled and decoded at home."""

    def place(
        self, conversation: Conversation, pages: int, prefillers: list[WorkerView], decoders: list[WorkerView]
    ) -> Placement | None:
        """See `Policy`."""
        home = at_home(conversation, pages, decoders)
        return Placement(home.name) if home else None


class Conserve:
    """The paper's rule: the first turn is prefilled by a prefiller and its KV moves once, the rest stays at home."""

    def place(
        self, conversation: Conversation, pages: int, prefillers: list[WorkerView], decoders: list[WorkerView]
    ) -> Placement | None:
        """See `Policy`."""
        home = at_home(conversation, pages, decoders)
        if home is None:
            return None
        # One whose home has died begins anew. A turn beside the first one finds its KV on the way to that home.
        if conversation.home or not prefillers:
            return Placement(home.name)
        return Placement(home.name, min(prefillers, key=lambda p: p.queued_prefill_tokens).name)


POLICIES: dict[str, type[Policy]] = {"colocated": Colocated, "conserve": Conserve}
