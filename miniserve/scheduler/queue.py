"""Where turns wait for a placement: those with a home first come first served, newcomers behind them.

A turn that has to wait *claims* the workers that it waits for: its home, or all workers where its conversation has no
home and could get any. A turn behind it may only take a worker that is still open, one that no turn before it claims.
So later turns never take the room that an earlier one waits for. A policy may place a turn away from a home that is
claimed, where by `Policy.elsewhere` another worker has room for it.

A *newcomer* is a turn whose conversation has no home. A policy may give newcomers some patience: for so long they wait
in a queue of their own, which is served last and claims nothing, so that turns with a home pass them. When a
newcomer's patience is over it moves to the first queue and claims all workers.

Turns of one *group*, an agent and its sub-agents, do not all count from when they came: `Shares` gives each a place as
if groups were served side by side. So an agent with fifty sub-agents does not hold up another one with a single turn.

What a worker has refused it refuses until it changes. So a turn is tried when it comes, and after that only when a
worker has changed: if it is the first that waits for that one, or could move there. No long queue makes that slow.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from enum import Enum
from heapq import heappop, heappush
from itertools import count, takewhile
from math import inf
from operator import itemgetter

from miniserve.scheduler.conversation import Conversation
from miniserve.scheduler.turns import Turn

PRIORITY, SHARE = 2**80, 2**32
"""In numbers of turns a lower `priority` counts before all else, then `Shares`, then when they came."""
Waiting = tuple[int, Turn]
"""A turn that waits, with its number in the order of all."""
Place = Callable[[Turn, Set[str]], bool]


class Group(Enum):
    """Turns that wait for no home of their own."""

    NEWCOMERS = "newcomers that still have patience"
    ANYWHERE = "those whose patience is over"
    SUSPECTS = "suspected turns, which `Placer` tries one after the other"

    __hash__ = object.__hash__  # Enum's own is Python code, run at each look into a table.


class Shares:
    """Which service, in tokens, a turn begins at: start-time fair queueing (Goyal, Vin and Cheng, 1996) between the
    groups that have turns waiting. One whose group has no other begins at the present, and so in the order of arrival;
    others begin where the one before them ends. `now`, the present, moves on by what is served, divided by the
    groups."""

    def __init__(self) -> None:
        self.now = 0.0
        self._ends: dict[tuple[str | int, int], float] = {}
        """By group and priority: where the service of its waiting turns ends."""
        self._waiting: Counter[tuple[str | int, int]] = Counter()

    def begin(self, turn: Turn) -> float:
        """A turn waits."""
        group = turn.conversation.group, turn.said.priority
        start = max(self.now, self._ends.get(group, 0.0))
        self._ends[group] = start + turn.service
        self._waiting[group] += 1
        return start

    def end(self, turn: Turn, served: bool) -> None:
        """It does not wait any more; its group is not charged for what is not served."""
        group = turn.conversation.group, turn.said.priority
        if served:
            self.now += turn.service / len(self._waiting)
        else:
            self._ends[group] -= turn.service
        self._waiting[group] -= 1
        if not self._waiting[group]:
            del self._waiting[group], self._ends[group]


@dataclass(eq=False)
class WaitingQueue:
    """Turns that wait. `has_patience(turn, now)` says whether a newcomer still lets others pass at a time, `fits(turn)`
    whether its home has room for it, `elsewhere(worker)` is that of the policy. `changed` names the workers that may
    have room now for what they have refused: others add to it too."""

    has_patience: Callable[[Turn, float], bool]
    fits: Callable[[Turn], bool]
    elsewhere: Callable[[str], float]
    changed: set[str]

    def __post_init__(self) -> None:
        self._lines: dict[str | Group, list[Waiting]] = {}  # by their homes, or by groups; no line is empty
        self._sizes: list[tuple[int, int, Turn]] = []  # (pages, number, turn) of those with a home, the smallest first
        self._numbers, self._numbers_before, self._shares = count(), count(-1, -1), Shares()
        self._fresh: dict[int, Turn] = {}  # those with a home that were not tried since they came
        self._refused: set[int] = set()  # those without a home that every worker has refused
        self._held: set[str] = set()
        """Workers that have changed while one of these claims all: those behind it were not tried there."""

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __bool__(self) -> bool:
        return bool(self._lines)

    def line(self, of: str | Group) -> Sequence[Waiting]:
        """Those that wait for a home, or are of a group, in their order."""
        return self._lines.get(of, ())

    def append(self, turn: Turn, now: float, *, first: bool = False) -> None:
        """Let a turn wait: `first`, before all others, if it has lost its worker."""
        after = self._number(turn, self._shares.begin(turn))
        number = next(self._numbers_before) if first else after
        where = Group.SUSPECTS if turn.suspected else turn.conversation.home
        if not where:
            where = Group.NEWCOMERS if self.has_patience(turn, now) else Group.ANYWHERE
        self._line_up(where, (number, turn))

    def _number(self, turn: Turn, start: float) -> int:
        return turn.said.priority * PRIORITY + int(start) * SHARE + next(self._numbers)

    def _out_of_patience(self, newcomer: Waiting) -> Waiting:
        """It keeps its place among groups, if that has not passed while it let others pass."""
        number, turn = newcomer
        return max(number, self._number(turn, self._shares.now)), turn

    def _line_up(self, where: str | Group, waiting: Waiting) -> None:
        number, turn = waiting
        insort(self._lines.setdefault(where, []), waiting)
        if isinstance(where, str):
            insort(self._sizes, (turn.pages, *waiting))
            self._fresh[number] = turn

    def _leave(self, where: str | Group, waiting: Waiting) -> None:
        number, turn = waiting
        line = self._lines[where]
        del line[bisect_left(line, (number,))]
        if not line:
            del self._lines[where]
        if isinstance(where, str):
            del self._sizes[bisect_left(self._sizes, (turn.pages, number))]
        self._fresh.pop(number, None)
        self._refused.discard(number)

    def remove(self, turn: Turn, *, served: bool = False) -> None:
        """A turn does not wait any more, since it is `served` or has ended. A worker that it claimed has changed."""
        home = turn.conversation.home
        lines: list[str | Group] = [*Group, *([home] if home else [])]
        for where in lines:
            for waiting in [waiting for waiting in self.line(where) if waiting[1] is turn]:
                self._leave(where, waiting)
                self._shares.end(turn, served)
                self.changed.update([home] if home else [])
                if where is Group.ANYWHERE:
                    self._let_go()

    def homes_lost(self, now: float) -> None:
        """Some conversations have lost their home: their turns are newcomers again, and wait before the others."""
        lost = [
            (waiting, where)
            for where, line in self._lines.items()
            if where is Group.ANYWHERE or (isinstance(where, str) and not line[0][1].conversation.home)
            for waiting in line
        ]
        for waiting, where in sorted(lost, reverse=True, key=itemgetter(0)):
            self._leave(where, waiting)
            self._shares.end(waiting[1], served=False)
            self.append(waiting[1], now, first=True)

    def serve(self, place: Place, workers: Set[str], now: float) -> None:
        """Place the turns that can be placed. Then no worker counts as changed any more. `place(turn, open_workers)`
        places a turn on open ones of the `workers`, or returns False if it has to wait; if it raises, no turn is
        lost."""
        while everyone := self.line(Group.ANYWHERE):
            number, _ = first = everyone[0]
            if number not in self._refused:
                self._let_go()
            self._serve_lines(place, workers, number)
            if not self._place_anywhere(Group.ANYWHERE, first, place, self._open(workers, number)):
                self._held |= self.changed | {str(turn.conversation.home) for turn in self._fresh.values()}
                self.changed.clear()
                self._fresh.clear()
                return
            self._let_go()
        self._let_go()
        self._serve_lines(place, workers, inf)
        while (newcomers := self.line(Group.NEWCOMERS)) and (open_workers := self._open(workers, inf)):
            _, turn = first = newcomers[0]
            if self._place_anywhere(Group.NEWCOMERS, first, place, open_workers):
                if turn.conversation.active > 1:  # Others that have found a home with it are tried next.
                    self._serve_lines(place, workers, inf)
                continue
            if not self.has_patience(turn, now):
                self._leave(Group.NEWCOMERS, first)
                self._line_up(Group.ANYWHERE, self._out_of_patience(first))
                return
            break  # It keeps its place, and those behind it wait for it.
        self.changed.clear()

    def _let_go(self) -> None:
        """No turn claims all workers any more, or another one does."""
        self.changed |= self._held
        self._held = set()

    def _serve_lines(self, place: Place, workers: Set[str], until: float) -> None:
        """Place turns that have a home, and come before number `until`."""
        due: dict[int, Turn] = {}
        order: list[int] = []

        def try_too(waiting: Iterable[Waiting], after: float = -inf, before: float = until) -> None:
            for number, turn in waiting:
                if after < number < before and number not in due:
                    due[number] = turn
                    heappush(order, number)

        spare = {name: self.elsewhere(name) for name in workers & self.changed} if self._sizes else {}
        try_too(line[0] for home in self.changed if (line := self._lines.get(home)))
        try_too(self._fresh.items())
        try_too(self._up_to(max(spare.values(), default=0.0)))
        while order:
            number = heappop(order)
            turn = due[number]
            home = str(turn.conversation.home)
            line = self._lines[home]
            is_first = line[0][0] == number
            fits = is_first and home in workers and self.fits(turn)
            if not (self._fresh.pop(number, None) or fits or self._could_move(number, turn, spare)):
                continue
            if not self._place(home, (number, turn), place, self._open(workers, number)):
                continue
            for name in spare.keys() & {home, turn.conversation.home}:
                spare[name] = self.elsewhere(name)
            if is_first and home in workers:  # It is open now to those before the next one in this line.
                self.changed.add(home)
                spare[home] = self.elsewhere(home)
                try_too(self._up_to(spare[home]), number, min(line[0][0], until) if line else until)
            try_too(line[:1], number)

    def _up_to(self, pages: float) -> Iterator[Waiting]:
        """Turns that could move to a worker with room for so many pages."""
        return ((number, turn) for _, number, turn in takewhile(lambda size: size[0] <= pages, self._sizes))

    def _could_move(self, number: int, turn: Turn, spare: dict[str, float]) -> bool:
        return turn.conversation.active == 1 and any(
            turn.pages <= pages and name != turn.conversation.home
            for name, pages in spare.items()
            if name not in self._lines or self._lines[name][0][0] >= number
        )

    def _open(self, workers: Set[str], number: float) -> Set[str]:
        return workers - {home for home, line in self._lines.items() if line[0][0] < number}

    def _place_anywhere(self, group: Group, waiting: Waiting, place: Place, open_workers: Set[str]) -> bool:
        """Place a turn that has no home; what has refused it is asked again when it has changed."""
        asked = open_workers & self.changed if waiting[0] in self._refused else open_workers
        self._refused.add(waiting[0])
        return bool(asked) and self._place(group, waiting, place, asked)

    def _place(self, where: str | Group, waiting: Waiting, place: Place, open_workers: Set[str]) -> bool:
        if not place(waiting[1], open_workers):
            return False
        self._leave(where, waiting)
        self._shares.end(waiting[1], served=True)
        self.follow(waiting[1].conversation, where)
        return True

    def follow(self, conversation: Conversation, before: str | Group) -> None:
        """A turn was placed, and its conversation may have another home than before: its other turns wait for that."""
        home = conversation.home
        if home and home != before and conversation.active > 1:
            for where in (before,) if isinstance(before, str) else (Group.ANYWHERE, Group.NEWCOMERS):
                for other in [other for other in self.line(where) if other[1].conversation is conversation]:
                    self._leave(where, other)
                    self._line_up(home, other)
