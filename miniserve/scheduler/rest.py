"""What idle conversations are thought to hold at home, and until when they are expected back."""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import count

from miniserve.scheduler.conversations import Conversation
from miniserve.scheduler.fleet import Fleet
from miniserve.scheduler.workers import WorkerView

LATE_GAPS, LATE_SECONDS = 3.0, 1.0
"""A conversation that has not come back after so many of its gaps and so many seconds is not expected any more."""


class Rest:
    """The ledger of conversations between their turns: `resident` and `wanted` pages of each, and their sums in the
    views of `workers`, those that live."""

    def __init__(self, workers: dict[str, WorkerView], fleet: Fleet) -> None:
        self._workers = workers
        self._fleet = fleet
        self.late: list[tuple[float, int, Conversation]] = []
        """A heap of (when, number of the expectation, conversation): who has not come back by then is not expected any
        more."""
        self._expectations = count(1)

    def set(self, conversation: Conversation, pages: int, now: float) -> None:
        """The conversation is thought to hold so many pages at home while it is idle; none while it has a turn."""
        home = self._workers.get(conversation.home)
        if home is None:
            self.forget(conversation)
            return
        home.resident += pages - conversation.resident
        conversation.resident = pages
        self._want(conversation, 0.0)
        if pages:
            gap, chance = self._fleet.outlook(conversation, conversation.turns)
            self._want(conversation, pages * chance, next(self._expectations))
            late = now + LATE_GAPS * gap + LATE_SECONDS
            heappush(self.late, (late, conversation.expectation, conversation))

    def forget(self, conversation: Conversation) -> None:
        """The conversation's home is gone, and its view with all sums."""
        conversation.resident, conversation.wanted, conversation.expectation = 0, 0.0, 0

    def give_up_late(self, now: float) -> None:
        """Conversations that have not come back in time are not expected any more."""
        while self.late and self.late[0][0] <= now:
            _, expectation, conversation = heappop(self.late)
            if conversation.expectation == expectation:
                self._want(conversation, 0.0)

    def _want(self, conversation: Conversation, pages: float, expectation: int = 0) -> None:
        if home := self._workers.get(conversation.home):
            home.wanted = max(home.wanted + pages - conversation.wanted, 0.0)
        conversation.wanted, conversation.expectation = pages, expectation
