"""Where turns wait for a placement: those with a home first come first served, newcomers behind them.

A turn that has to wait *claims* the workers that it waits for: its home, or all workers where its conversation has no
home and could get any. A turn behind it may only take a worker that is still open, one that no turn before it claims.
So later turns never take the room that an earlier one waits for. A policy may place a turn away from a home that is
claimed, where by `Policy.elsewhere` another worker has room for it.

A *newcomer* is a turn whose conversation has no home. A policy may give newcomers some patience: for so long they wait
in a queue of their own, which is served last and claims nothing, so that turns with a home pass them. When a
newcomer's patience is over it moves to the first queue and claims all workers.

What a worker has refused it refuses until it changes. So a turn is tried when it comes, and after that only when a
worker has changed: if it is the first that waits for that one, or could move there. No long queue makes that slow.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Set
from heapq import heappop, heappush
from itertools import count, takewhile
from math import inf

from miniserve.scheduler.conversation import Conversation
from miniserve.scheduler.turns import Turn

PRIORITY = 2**48
"""More turns than will ever wait: those of a lower `priority` have lower numbers, whenever they came."""
Waiting = tuple[int, Turn]
"""A turn that waits, with its number in the order of all."""
Place = Callable[[Turn, Set[str]], bool]


class WaitingQueue:
    """Turns that wait. `has_patience(turn, now)` says whether a newcomer still lets others pass at a time, `fits(turn)`
    whether its home has room for it, `elsewhere(worker)` is that of the policy."""

    def __init__(
        self,
        has_patience: Callable[[Turn, float], bool],
        fits: Callable[[Turn], bool],
        elsewhere: Callable[[str], float],
    ) -> None:
        self._has_patience, self._fits, self._elsewhere = has_patience, fits, elsewhere
        self._lines: dict[str | None, list[Waiting]] = {}
        """By their homes; no line is empty."""
        self._sizes: list[tuple[int, int, Turn]] = []
        """(pages, number, turn) of those with a home, the smallest first."""
        self._numbers, self._numbers_before = count(), count(-1, -1)
        self.newcomers: list[Waiting] = []
        """Newcomers that still have patience."""
        self.suspects: list[Waiting] = []
        """Suspected turns, which `Placer` tries one after the other."""
        self._fresh: dict[int, Turn] = {}
        """Those with a home that were not tried since they came."""
        self._refused: set[int] = set()
        """Those without a home that every worker has refused."""
        self._held: set[str] = set()
        """Workers that have changed while one of these claims all: those behind it were not tried there."""

    def __len__(self) -> int:
        return sum(map(len, self._lines.values())) + len(self.newcomers) + len(self.suspects)

    def __bool__(self) -> bool:
        return bool(self._lines or self.newcomers or self.suspects)

    def append(self, turn: Turn, now: float) -> None:
        self._add((next(self._numbers) + turn.said.priority * PRIORITY, turn), now)

    def appendleft(self, turn: Turn, now: float) -> None:
        """Let a turn that has lost its worker wait before the others."""
        self._add((next(self._numbers_before), turn), now)

    def _add(self, waiting: Waiting, now: float) -> None:
        turn = waiting[1]
        if turn.suspected:
            insort(self.suspects, waiting)
        elif not turn.conversation.home and self._has_patience(turn, now):
            insort(self.newcomers, waiting)
        else:
            self._line_up(waiting)

    def _line_up(self, waiting: Waiting) -> None:
        number, turn = waiting
        insort(self._lines.setdefault(turn.conversation.home, []), waiting)
        if turn.conversation.home:
            insort(self._sizes, (turn.pages, *waiting))
            self._fresh[number] = turn

    def _leave(self, home: str | None, waiting: Waiting) -> None:
        """A turn leaves the line of a home, or the newcomers."""
        number, turn = waiting
        line = self._lines.get(home, [])
        if (at := bisect_left(line, (number,))) < len(line) and line[at][1] is turn:
            del line[at]
            if home:
                del self._sizes[bisect_left(self._sizes, (turn.pages, number))]
            if not line:
                del self._lines[home]
        else:
            self.newcomers.remove(waiting)
        self._fresh.pop(number, None)
        self._refused.discard(number)

    def remove(self, turn: Turn, changed: set[str]) -> None:
        """A turn was cancelled; it may be in any queue. A worker that it claimed has `changed`."""
        self.suspects[:] = [waiting for waiting in self.suspects if waiting[1] is not turn]
        home = turn.conversation.home
        for waiting in [w for w in (*self._lines.get(home, ()), *self.newcomers) if w[1] is turn]:
            self._leave(home, waiting)
            changed.update([home] if home else [])

    def homes_lost(self, now: float) -> None:
        """Some conversations have lost their home: their turns are newcomers again, and wait before the others."""
        waiting = sorted(waiting for line in self._lines.values() for waiting in line)
        self._lines, self._sizes, self._fresh, self._refused = {}, [], {}, set()
        for each in waiting:
            if each[1].conversation.home:
                self._line_up(each)
        for _, turn in reversed([each for each in waiting if not each[1].conversation.home]):
            self.appendleft(turn, now)

    def serve(self, place: Place, workers: Set[str], changed: set[str], now: float) -> None:
        """Place the turns that can be placed. `changed` names the workers that may have room now for what they have
        refused; it is cleared.

        `place(turn, open_workers)` places a turn on open ones of the `workers`, or returns False if it has to wait; if
        it raises, no turn is lost.
        """
        while everyone := self._lines.get(None):
            first = everyone[0]
            if first[0] not in self._refused:
                self._let_go(changed)
            self._serve_lines(place, workers, changed, first[0])
            if not self._place_anywhere(first, place, self._open(workers, first[0]), changed):
                self._held |= changed | {str(turn.conversation.home) for turn in self._fresh.values()}
                changed.clear()
                self._fresh.clear()
                return
            self._let_go(changed)
        self._let_go(changed)
        self._serve_lines(place, workers, changed, inf)
        while self.newcomers and (open_workers := self._open(workers, inf)):
            waiting = self.newcomers[0]
            turn = waiting[1]
            if self._place_anywhere(waiting, place, open_workers, changed):
                if turn.conversation.active > 1:  # Others that have found a home with it are tried next.
                    self._serve_lines(place, workers, changed, inf)
                continue
            if not self._has_patience(turn, now):
                self._leave(None, waiting)
                self.append(turn, now)
                return
            break  # It keeps its place, and those behind it wait for it.
        changed.clear()

    def _let_go(self, changed: set[str]) -> None:
        """No turn claims all workers any more, or another one does."""
        changed |= self._held
        self._held = set()

    def _serve_lines(self, place: Place, workers: Set[str], changed: set[str], until: float) -> None:
        """Place turns that have a home, and come before number `until`."""
        due: dict[int, Turn] = {}
        order: list[int] = []

        def try_too(waiting: Iterable[Waiting], after: float = -inf) -> None:
            for number, turn in waiting:
                if after < number < until and turn.conversation.home and number not in due:
                    due[number] = turn
                    heappush(order, number)

        spare = {name: self._elsewhere(name) for name in workers & changed} if self._sizes else {}
        try_too(line[0] for home in changed if (line := self._lines.get(home)))
        try_too(self._fresh.items())
        try_too(self._up_to(max(spare.values(), default=0.0)))
        while order:
            number = heappop(order)
            turn, home = due[number], due[number].conversation.home
            line = self._lines[home]
            fits = line[0][0] == number and home in workers and self._fits(turn)
            if not (self._fresh.pop(number, None) or fits or self._could_move(number, turn, spare)):
                continue
            if not self._place(home, (number, turn), place, self._open(workers, number)):
                continue
            for name in spare.keys() & {home, turn.conversation.home}:
                spare[name] = self._elsewhere(name)
            if home in self._lines:
                try_too(line[:1], number)
            elif home is not None and home in workers:  # Nobody claims it any more.
                changed.add(home)
                spare[home] = self._elsewhere(home)
                try_too(self._up_to(spare[home]), number)

    def _up_to(self, pages: float) -> Iterator[Waiting]:
        """Turns that could move to a worker with room for so many pages."""
        return ((number, turn) for _, number, turn in takewhile(lambda size: size[0] <= pages, self._sizes))

    def _could_move(self, number: int, turn: Turn, spare: dict[str, float]) -> bool:
        return turn.conversation.active == 1 and any(
            turn.pages <= pages and name != turn.conversation.home and self._is_open(name, number)
            for name, pages in spare.items()
        )

    def _is_open(self, worker: str, number: float) -> bool:
        line = self._lines.get(worker)
        return line is None or line[0][0] >= number

    def _open(self, workers: Set[str], number: float) -> Set[str]:
        claimed = {home for home, line in self._lines.items() if line[0][0] < number}
        return workers - claimed if claimed else workers

    def _place_anywhere(self, waiting: Waiting, place: Place, open_workers: Set[str], changed: set[str]) -> bool:
        """Place a turn that has no home; what has refused it is asked again when it has changed."""
        asked = open_workers & changed if waiting[0] in self._refused else open_workers
        self._refused.add(waiting[0])
        return bool(asked) and self._place(None, waiting, place, asked)

    def _place(self, home: str | None, waiting: Waiting, place: Place, open_workers: Set[str]) -> bool:
        if not place(waiting[1], open_workers):
            return False
        self._leave(home, waiting)
        self.follow(waiting[1].conversation, home)
        return True

    def follow(self, conversation: Conversation, before: str | None) -> None:
        """A turn was placed, and its conversation may have another home than before: its other turns wait for that."""
        if conversation.home != before and conversation.active > 1:
            others = (*self._lines.get(before, ()), *(self.newcomers if before is None else ()))
            for other in [other for other in others if other[1].conversation is conversation]:
                self._leave(before, other)
                self._line_up(other)
