"""The queue of waiting turns as its rules say it: everything is tried at each event, nothing is remembered."""

from __future__ import annotations

from bisect import insort
from collections.abc import Set

from miniserve.scheduler.conversation import Conversation
from miniserve.scheduler.queue import Place, WaitingQueue
from miniserve.scheduler.turns import Turn


class PlainQueue(WaitingQueue):
    """All turns without patience in one line."""

    def __init__(self, of: WaitingQueue) -> None:
        super().__init__(of._has_patience, of._fits, of._elsewhere)
        self.line: list[tuple[int, Turn]] = []

    def __len__(self) -> int:
        return len(self.line) + len(self.newcomers) + len(self.suspects)

    def __bool__(self) -> bool:
        return len(self) > 0

    def _line_up(self, waiting: tuple[int, Turn]) -> None:
        insort(self.line, waiting)

    def remove(self, turn: Turn, changed: set[str]) -> None:
        for those in (self.line, self.newcomers, self.suspects):
            those[:] = [waiting for waiting in those if waiting[1] is not turn]

    def homes_lost(self, now: float) -> None:
        lost = [turn for _, turn in self.line if not turn.conversation.home]
        for turn in reversed(lost):
            self.remove(turn, set())
            self.appendleft(turn, now)

    def follow(self, conversation: Conversation, before: str | None) -> None:
        for waiting in [w for w in self.newcomers if w[1].conversation is conversation and conversation.home]:
            self.newcomers.remove(waiting)
            insort(self.line, waiting)

    def serve(self, place: Place, workers: Set[str], changed: set[str], now: float) -> None:
        while self._place_one(place, set(workers), now):
            pass

    def _place_one(self, place: Place, open_workers: set[str], now: float) -> bool:
        """Place the first turn that can be placed; returns whether there was one."""
        for _, turn in self.line:
            if open_workers and place(turn, open_workers):
                return self._placed(turn)
            open_workers = open_workers - {turn.conversation.home} if turn.conversation.home else set()
        if not self.newcomers or not open_workers:
            return False
        turn = self.newcomers[0][1]
        if place(turn, open_workers):
            return self._placed(turn)
        if not self._has_patience(turn, now):
            self.remove(turn, set())
            self.append(turn, now)
        return False

    def _placed(self, turn: Turn) -> bool:
        self.remove(turn, set())
        self.follow(turn.conversation, None)
        return True
