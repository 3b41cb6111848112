"""The queue of waiting turns as its rules say it: everything is tried at each event, nothing is remembered."""

from __future__ import annotations

from bisect import insort
from collections.abc import Set

from miniserve.scheduler.conversation import Conversation
from miniserve.scheduler.queue import Group, Place, WaitingQueue
from miniserve.scheduler.turns import Turn


class PlainQueue(WaitingQueue):
    """All turns without patience in one line."""

    def __init__(self, of: WaitingQueue) -> None:
        super().__init__(of.has_patience, of.fits, of.elsewhere, set())
        self.all: list[tuple[int, Turn]] = []

    def __len__(self) -> int:
        return len(self.all) + super().__len__()

    def __bool__(self) -> bool:
        return len(self) > 0

    def _line_up(self, where: str | Group, waiting: tuple[int, Turn]) -> None:
        if where in (Group.NEWCOMERS, Group.SUSPECTS):
            super()._line_up(where, waiting)
        else:
            insort(self.all, waiting)

    def remove(self, turn: Turn, *, served: bool = False) -> None:
        left = [waiting for waiting in self.all if waiting[1] is not turn]
        if len(left) < len(self.all):
            self.all[:] = left
            self._shares.end(turn, served)
        super().remove(turn, served=served)

    def homes_lost(self, now: float) -> None:
        lost = [turn for _, turn in self.all if not turn.conversation.home]
        for turn in reversed(lost):
            self.remove(turn)
            self.append(turn, now, first=True)

    def follow(self, conversation: Conversation, before: str | Group) -> None:
        newcomers = self.line(Group.NEWCOMERS)
        for waiting in [w for w in newcomers if w[1].conversation is conversation and conversation.home]:
            self._leave(Group.NEWCOMERS, waiting)
            insort(self.all, waiting)

    def serve(self, place: Place, workers: Set[str], now: float) -> None:
        while self._place_one(place, set(workers), now):
            pass

    def _place_one(self, place: Place, open_workers: set[str], now: float) -> bool:
        """Place the first turn that can be placed; returns whether there was one."""
        for _, turn in self.all:
            if open_workers and place(turn, open_workers):
                return self._placed(turn)
            open_workers = open_workers - {turn.conversation.home} if turn.conversation.home else set()
        newcomers = self.line(Group.NEWCOMERS)
        if not newcomers or not open_workers:
            return False
        newcomer = newcomers[0]
        turn = newcomer[1]
        if place(turn, open_workers):
            return self._placed(turn)
        if not self.has_patience(turn, now):
            self._leave(Group.NEWCOMERS, newcomer)
            insort(self.all, self._out_of_patience(newcomer))
        return False

    def _placed(self, turn: Turn) -> bool:
        self.remove(turn, served=True)
        self.follow(turn.conversation, Group.NEWCOMERS)
        return True
