"""Where turns wait for a placement: those with a home first come first served, newcomers behind them.

A turn that has to wait *claims* the workers that it waits for: its home, or all workers where its conversation has no
home and could get any. A turn behind it may only take a worker that is still open, one that no turn before it claims.
So later turns never take the room that an earlier one waits for.

A *newcomer* is a turn whose conversation has no home. A policy may give newcomers some patience: for so long they wait
in a queue of their own, which is served last and claims nothing, so that turns with a home pass them. When a
newcomer's patience is over it moves to the first queue and claims all workers.
"""

from collections import deque
from collections.abc import Callable, Set

from miniserve.scheduler.conversations import Conversation
from miniserve.scheduler.turns import Turn


class WaitingQueue:
    """Turns that wait. `has_patience(turn, now)` says whether a newcomer still lets others pass at a time."""

    def __init__(self, has_patience: Callable[[Turn, float], bool]) -> None:
        self._has_patience = has_patience
        self._turns: deque[Turn] = deque()
        self.newcomers: deque[Turn] = deque()
        """Newcomers that still have patience."""
        self.suspects: deque[Turn] = deque()
        """Suspected turns, which `Placer` tries one after the other."""

    def __len__(self) -> int:
        return len(self._turns) + len(self.newcomers) + len(self.suspects)

    def append(self, turn: Turn, now: float) -> None:
        self._queue_of(turn, now).append(turn)

    def appendleft(self, turn: Turn, now: float) -> None:
        """Let a turn that has lost its worker wait before the others."""
        self._queue_of(turn, now).appendleft(turn)

    def remove(self, turn: Turn) -> None:
        """A turn was cancelled; it may be in any queue."""
        for queue in (self._turns, self.newcomers, self.suspects):
            if turn in queue:
                queue.remove(turn)

    def homes_lost(self, now: float) -> None:
        """Some conversations have lost their home: their turns are newcomers again, and wait before the others."""
        turns, self._turns = self._turns, deque()
        self._turns.extend(turn for turn in turns if turn.conversation.home)
        for turn in reversed([turn for turn in turns if not turn.conversation.home]):
            self.appendleft(turn, now)

    def serve(
        self, place: Callable[[Turn, Set[str]], bool], workers: Set[str], homes: Set[str], now: float
    ) -> Set[str]:
        """Place the turns that can be placed, and return the workers that stay open: no waiting turn claims them.

        `place(turn, open_workers)` places a turn on open workers, or returns False if it has to wait; if it raises, no
        turn is lost. `homes` are the workers that any turn may get as its home. Once all of them and the homes of the
        waiting turns are claimed, the turns further behind are not tried: no long queue makes a decision slow.
        """
        open_workers = workers
        homes = homes | {turn.conversation.home for turn in self._turns if turn.conversation.home}
        unplaced: deque[Turn] = deque()
        try:
            while self._turns and not open_workers.isdisjoint(homes):
                placed = place(self._turns[0], open_workers)
                turn = self._turns.popleft()
                if not placed:
                    unplaced.append(turn)
                    open_workers = _without_claim(turn, open_workers)
            while self.newcomers and open_workers:
                placed = place(self.newcomers[0], open_workers)
                if not placed and self._queue_of(self.newcomers[0], now) is self.newcomers:
                    break  # It keeps its place, and those behind it wait for it.
                turn = self.newcomers.popleft()
                if placed:
                    self._bring_forward(turn.conversation)
                else:
                    unplaced.append(turn)
                    open_workers = _without_claim(turn, open_workers)
        finally:
            self._turns = unplaced + self._turns
        return open_workers

    def _bring_forward(self, conversation: Conversation) -> None:
        """A newcomer was placed. Other turns of its conversation now have a home too, so they are tried next."""
        if conversation.active > 1:
            its = [turn for turn in self.newcomers if turn.conversation is conversation]
            self.newcomers = deque([*its, *(turn for turn in self.newcomers if turn.conversation is not conversation)])

    def _queue_of(self, turn: Turn, now: float) -> deque[Turn]:
        if turn.suspected:
            return self.suspects
        newcomer = not turn.conversation.home
        return self.newcomers if newcomer and self._has_patience(turn, now) else self._turns


def _without_claim(turn: Turn, open_workers: Set[str]) -> Set[str]:
    home = turn.conversation.home
    return open_workers - {home} if home else frozenset()
