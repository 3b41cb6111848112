"""The ledger of KV pages: what is promised to turns that run, and what idle conversations hold at their homes."""

from dataclasses import dataclass, field
from heapq import heappop, heappush

from miniserve.scheduler.conversation import Conversation, Forecast
from miniserve.scheduler.turns import Turn
from miniserve.scheduler.workers import Cluster, WorkerView

LATE_GAPS, LATE_SECONDS = 3.0, 1.0
"""A conversation that has not come back after so many of its gaps and so many seconds is not expected any more."""


@dataclass
class Ledger:
    """Keeps `reserved`, `resident` and `wanted` in the workers' views: the sums of what turns and conversations hold
    there. A worker that dies takes its view and these sums with it, so its entries need no settling."""

    cluster: Cluster
    forecast: Forecast
    late: list[tuple[float, int, Conversation]] = field(default_factory=list)
    """A heap of (time, id, conversation): if that is still its `expected_until`, it is not expected any more then."""

    def pages(self, tokens: int) -> int:
        """A turn leaves two snapshots of recurrent state."""
        return -(-tokens // self.cluster.page_tokens) + 2 * self.cluster.snapshot_pages

    def reserve(self, turn: Turn, now: float) -> None:
        """A turn was placed: its pages are reserved at its home, and those of its prompt at its prefiller."""
        if home := self._view(turn.home):
            home.change(1, turn.pages, now)
        if prefiller := self._view(turn.prefill_at):
            turn.lent_pages = self.pages(len(turn.tokens))
            prefiller.reserved += turn.lent_pages

    def end_prefill(self, turn: Turn) -> None:
        """The prompt is computed, or never will be: the prefiller has its pages back. Safe to call twice."""
        if prefiller := self._view(turn.prefill_at):
            prefiller.reserved -= turn.lent_pages
        turn.lent_pages = 0

    def grow(self, turn: Turn) -> None:
        """A turn that generates more than expected takes more of its home's pages: room for the next token."""
        if (pages := self.pages(len(turn.tokens) + 1)) > turn.pages:
            if home := self._view(turn.home):
                home.reserved += pages - turn.pages
            turn.pages = pages

    def release(self, turn: Turn, now: float) -> None:
        self.end_prefill(turn)
        if home := self._view(turn.home):
            home.change(-1, -turn.pages, now)

    def hold(self, conversation: Conversation, now: float) -> None:
        """The conversation is idle: it holds all its tokens at home, and is expected to come back for them."""
        self.let_go(conversation)
        pages = self.pages(conversation.tokens)
        if (home := self._view(conversation.home)) and pages:
            gap, chance = self.forecast.outlook(conversation.history, conversation.turns)
            conversation.resident, conversation.wanted = pages, pages * chance
            home.resident += conversation.resident
            home.wanted += conversation.wanted
            conversation.expected_until = now + LATE_GAPS * gap + LATE_SECONDS
            heappush(self.late, (conversation.expected_until, id(conversation), conversation))

    def let_go(self, conversation: Conversation) -> None:
        """The conversation holds nothing any more: it has a turn, or its home has died, or it is forgotten."""
        if home := self._view(conversation.home):
            home.resident -= conversation.resident
        conversation.resident = 0
        self._give_up(conversation)

    def give_up_late(self, now: float) -> None:
        """Conversations that have not come back in time are not expected any more."""
        while self.late and self.late[0][0] <= now:
            late, _, conversation = heappop(self.late)
            if conversation.expected_until == late:
                self._give_up(conversation)

    def _give_up(self, conversation: Conversation) -> None:
        if home := self._view(conversation.home):
            home.wanted = max(home.wanted - conversation.wanted, 0.0)  # Sums of floats do not cancel exactly.
        conversation.wanted, conversation.expected_until = 0.0, None

    def _view(self, worker: str | None) -> WorkerView | None:
        """A worker whose books change."""
        if (view := self.cluster.worker(worker)) is not None:
            self.cluster.touch(view.name)
            self.cluster.changed.add(view.name)
        return view
