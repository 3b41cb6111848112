"""Where turns wait for a placement: two lines, first come first served in each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from miniserve.scheduler.turns import Turn


class Lines:
    """Turns that wait, and newcomers, which have no home yet, in a line of their own as long as they let others pass.

    `lets_pass` says whether a newcomer still does at a time.
    """

    def __init__(self, lets_pass: Callable[[Turn, float], bool]) -> None:
        self._lets_pass = lets_pass
        self._queue: deque[Turn] = deque()
        self.newcomers: deque[Turn] = deque()
        """Those who let others pass."""

    def __len__(self) -> int:
        return len(self._queue) + len(self.newcomers)

    def append(self, turn: Turn, now: float) -> None:
        """Let a turn wait behind others."""
        self._line(turn, now).append(turn)

    def appendleft(self, turn: Turn, now: float) -> None:
        """Let a turn that has lost its place wait before others."""
        self._line(turn, now).appendleft(turn)

    def remove(self, turn: Turn) -> None:
        """A turn waits no longer."""
        for line in (self._queue, self.newcomers):
            if turn in line:
                line.remove(turn)

    def sort(self, now: float) -> None:
        """Homes may be gone: who has none any more is a newcomer again."""
        queued, self._queue = self._queue, deque()
        homeless = [t for t in queued if not t.conversation.home]
        self._queue.extend(t for t in queued if t.conversation.home)
        for turn in reversed(homeless):
            self.appendleft(turn, now)

    def serve(self, place: Callable[[Turn], bool], open_workers: set[str], homes: set[str], now: float) -> None:
        """Place those whom `place` can. Who has to wait for a decoder keeps later ones from taking the room it waits
        for: its decoders are taken out of `open_workers`. Nobody goes on when none of `homes`, nor one that somebody
        here has already, is open. Newcomers that let others pass come last."""
        waiting: deque[Turn] = deque()
        homes = homes | {turn.conversation.home for turn in self._queue}
        try:
            while self._queue and not open_workers.isdisjoint(homes):
                placed = place(self._queue[0])
                turn = self._queue.popleft()
                if not placed:
                    waiting.append(turn)
                    home = turn.conversation.home
                    open_workers.intersection_update(name for name in tuple(open_workers) if home and name != home)
            while self.newcomers and open_workers:
                placed = place(self.newcomers[0])
                if not placed and self._line(self.newcomers[0], now) is self.newcomers:
                    break
                turn = self.newcomers.popleft()
                home = turn.conversation.home
                if placed and turn.conversation.active > 1:  # the others of it, which have a home now, come next
                    of = turn.conversation
                    here = [t for t in self.newcomers if t.conversation is of]
                    self.newcomers = deque([*here, *(t for t in self.newcomers if t.conversation is not of)])
                elif not placed:
                    waiting.append(turn)
                    if not home:  # it has waited long enough: from now on it keeps room from others
                        break
                    open_workers.discard(home)
        finally:
            self._queue = waiting + self._queue

    def _line(self, turn: Turn, now: float) -> deque[Turn]:
        return self.newcomers if not turn.conversation.home and self._lets_pass(turn, now) else self._queue
