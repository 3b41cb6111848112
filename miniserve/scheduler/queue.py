"""Where turns wait for a placement: those with a home first come first served, newcomers behind them.

A turn that has to wait *claims* the workers that it waits for: its home, or all workers where its conversation has no
home and could get any. A turn behind it may only take a worker that is still open, one that no turn before it claims.
So later turns never take the room that an earlier one waits for. A policy may place a turn away from a home that is
claimed; turns that it would not, by `Policy.elsewhere`, are passed over without a question.

A *newcomer* is a turn whose conversation has no home. A policy may give newcomers some patience: for so long they wait
in a queue of their own, which is served last and claims nothing, so that turns with a home pass them. When a
newcomer's patience is over it moves to the first queue and claims all workers.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Set
from heapq import merge
from itertools import count
from operator import itemgetter

from miniserve.scheduler.conversation import Conversation
from miniserve.scheduler.turns import Turn

PRIORITY = 2**48
"""More turns than will ever wait: those of a lower `priority` have lower numbers, whenever they came."""
Line = list[tuple[int, Turn]]
"""Turns that wait, with their numbers in the order of all."""


class WaitingQueue:
    """Turns that wait. `has_patience(turn, now)` says whether a newcomer still lets others pass at a time."""

    def __init__(self, has_patience: Callable[[Turn, float], bool]) -> None:
        self._has_patience = has_patience
        self._lines: dict[str | None, Line] = {}
        self._numbers, self._numbers_before = count(), count(-1, -1)
        self.newcomers: Line = []
        """Newcomers that still have patience."""
        self.suspects: Line = []
        """Suspected turns, which `Placer` tries one after the other."""

    def __len__(self) -> int:
        return sum(map(len, self._lines.values())) + len(self.newcomers) + len(self.suspects)

    def append(self, turn: Turn, now: float) -> None:
        insort(self._line_of(turn, now), (next(self._numbers) + turn.said.priority * PRIORITY, turn))

    def appendleft(self, turn: Turn, now: float) -> None:
        """Let a turn that has lost its worker wait before the others."""
        insort(self._line_of(turn, now), (next(self._numbers_before), turn))

    def remove(self, turn: Turn) -> None:
        """A turn was cancelled; it may be in any queue."""
        for line in (*self._lines.values(), self.newcomers, self.suspects):
            line[:] = [waiting for waiting in line if waiting[1] is not turn]

    def homes_lost(self, now: float) -> None:
        """Some conversations have lost their home: their turns are newcomers again, and wait before the others."""
        lost = sorted(waiting for line in self._lines.values() for waiting in line if not waiting[1].conversation.home)
        for line in self._lines.values():
            line[:] = [waiting for waiting in line if waiting[1].conversation.home]
        for _, turn in reversed(lost):
            self.appendleft(turn, now)

    def serve(
        self,
        place: Callable[[Turn, Set[str]], bool],
        elsewhere: Callable[[str, Set[str]], float],
        workers: Set[str],
        homes: Set[str],
        now: float,
    ) -> Set[str]:
        """Place the turns that can be placed, and return the workers that stay open: no waiting turn claims them.

        `place(turn, open_workers)` places a turn on open workers, or returns False if it has to wait; if it raises, no
        turn is lost. `elsewhere(home, open_workers)` is that of the policy. `homes` are the workers that any turn may
        get as its home. Once all of them and the homes of the waiting turns are claimed, no more turns are tried. So no
        long queue makes a decision slow.
        """
        open_workers = workers
        homes = homes | {home for home, line in self._lines.items() if home and line}

        def candidates(home: str | None, line: Line) -> Iterator[tuple[int, Turn, Line]]:
            """A line's turns, until its home is claimed; then those that may leave it."""
            tried = None
            while line and (home is None or home in open_workers):
                tried = line[0][0]
                yield *line[0], line
            if line and home and (limit := elsewhere(home, open_workers)) > 0:
                for number, turn in line.copy():
                    if turn.pages <= limit and turn.conversation.active == 1 and number != tried:
                        yield number, turn, line

        for number, turn, line in merge(*(candidates(*line) for line in self._lines.items())):
            if open_workers.isdisjoint(homes):
                break
            placed = place(turn, open_workers)
            del line[bisect_left(line, number, key=itemgetter(0))]
            if not placed:
                insort(self._line(turn), (number, turn))
                open_workers = _without_claim(turn, open_workers)
        while self.newcomers and open_workers:
            turn = self.newcomers[0][1]
            placed = place(turn, open_workers)
            if not placed and self._line_of(turn, now) is self.newcomers:
                break  # It keeps its place, and those behind it wait for it.
            del self.newcomers[0]
            if placed:
                self._bring_forward(turn.conversation)
            else:
                self.append(turn, now)
                open_workers = _without_claim(turn, open_workers)
        return open_workers

    def _line(self, turn: Turn) -> Line:
        return self._lines.setdefault(turn.conversation.home, [])

    def _bring_forward(self, conversation: Conversation) -> None:
        """A newcomer was placed. Other turns of its conversation now have a home too, so they are tried next."""
        if conversation.active > 1:
            for _, turn in reversed([waiting for waiting in self.newcomers if waiting[1].conversation is conversation]):
                self.remove(turn)
                insort(self.newcomers, (next(self._numbers_before), turn))

    def _line_of(self, turn: Turn, now: float) -> Line:
        if turn.suspected:
            return self.suspects
        return self.newcomers if not turn.conversation.home and self._has_patience(turn, now) else self._line(turn)


def _without_claim(turn: Turn, open_workers: Set[str]) -> Set[str]:
    home = turn.conversation.home
    return open_workers - {home} if home else frozenset()
