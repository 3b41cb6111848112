"""The scheduler: pure. Turns and workers' reports in, commands out; no clock, no sockets, no tensors.

It owns what is true of a turn: which tokens the client has been given. A worker's output counts only as the next token
of its turn, so that nothing is repeated or skipped when a worker dies and another goes on.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from miniserve.cluster.messages import Abort, Message, Move, Peer, Peers, Report, Run, TurnOutput, WorkerStats
from miniserve.sampling import SamplingParams
from miniserve.scheduler.conversations import Conversation, Conversations
from miniserve.scheduler.policies import Policy, WorkerView

RESERVED_OUTPUT = 256
"""Output tokens a turn gets pages for in the ledger. Few turns use all of max_tokens; one that needs more grows, and in
the worst case a worker preempts."""


MOST_LOSSES = 3
"""Workers that may die under a turn before it is taken for what kills them."""
RECENT_ENDS = 64
"""Ends of turns that tell how fast the queue moves."""


class QueueIsFull(RuntimeError):
    """No more turns are taken; try again in `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting already (--max-num-queued-reqs).")
        self.retry_after = retry_after


class NoDecoder(RuntimeError):
    """No worker is left that could serve a turn."""


@dataclass(frozen=True)
class Send:
    """Command: send `message` to a worker."""

    worker: str
    message: Message


@dataclass(frozen=True)
class Deliver:
    """Command: give `output` to the client of `turn`."""

    turn: str
    output: TurnOutput


Command = Send | Deliver


@dataclass
class Turn:
    """A turn from `submit` to its end. `tokens` grows with what was delivered.

    `run` is what its workers call it. It may run more than once, on other workers, each time under another name.
    """

    id: str
    tokens: list[int]
    params: SamplingParams
    seed: int
    salt: str
    conversation: Conversation
    arrived: float
    pages: int
    given: int
    runs: int = 0
    losses: int = 0
    run: str = ""
    home: str = ""
    prefill_at: str = ""
    early: dict[int, TurnOutput] = field(default_factory=dict)
    """Outputs that overtook an earlier one: first tokens come from P, the next ones from D."""

    @property
    def delivered(self) -> int:
        """Output tokens the client has."""
        return len(self.tokens) - self.given


@dataclass
class HandoffTotals:
    """Totals of the KV that went from one worker to another."""

    count: int = 0
    pages: int = 0
    bytes: int = 0
    seconds: float = 0.0


class Scheduler:
    """Places conversations on workers. Every method takes the time in seconds where it needs it, and returns commands
    to be carried out in order."""

    def __init__(self, policy: Policy, page_tokens: int, max_turns: int, max_queued: int) -> None:
        self.stats: dict[str, WorkerStats] = {}
        self.handoffs: dict[tuple[str, str], HandoffTotals] = {}
        self.placements: dict[tuple[str, str], int] = {}
        self.conversations = Conversations(page_tokens)
        self._policy = policy
        self._page_tokens = page_tokens
        self._max_turns = max_turns
        self._max_queued = max_queued
        self._workers: dict[str, WorkerView] = {}
        self._peers: dict[str, Peer] = {}
        self._queue: deque[Turn] = deque()
        self._turns: dict[str, Turn] = {}
        self._runs: dict[str, Turn] = {}
        self._ends: deque[float] = deque(maxlen=RECENT_ENDS)
        self._expected: set[str] = set()
        """Decoders that are being started again."""

    @property
    def queued(self) -> int:
        """Turns that wait for a placement."""
        return len(self._queue)

    @property
    def active(self) -> int:
        """Turns that wait or run."""
        return len(self._turns)

    @property
    def decoders(self) -> list[WorkerView]:
        """The decoders that live."""
        return [w for w in self._workers.values() if not w.prefiller]

    @property
    def can_serve(self) -> bool:
        """Whether a turn will be served: by a decoder that lives, or by one that is being started again."""
        return bool(self.decoders or self._expected)

    # --- workers ----------------------------------------------------------------------------------------------------

    def worker_up(self, peer: Peer, *, prefiller: bool) -> list[Command]:
        """A worker is ready, or ready again: tell all, and place what waited for room."""
        self._expected.discard(peer.name)
        self._workers[peer.name] = WorkerView(peer.name, prefiller, peer.pool.num_pages, self._max_turns)
        self._peers[peer.name] = peer
        return [*self._announce(), *self._place_queued()]

    def worker_down(self, name: str, *, returns: bool) -> list[Command]:
        """A worker has died, and perhaps `returns`. Its turns go on elsewhere, from their tokens, or wait for a decoder
        to return; where none will, they end."""
        view = self._workers.pop(name, None)
        if not returns:
            self._expected.discard(name)
        elif view is not None and not view.prefiller:
            self._expected.add(name)
        self._peers.pop(name, None)
        self.stats.pop(name, None)
        commands = self._announce()
        for conversation in self.conversations:
            if conversation.home == name:
                conversation.home, conversation.resident = "", 0
        lost = [t for t in self._turns.values() if t.home == name]
        for turn in reversed(lost):
            self._run_again(turn)
            turn.losses += 1
            if turn.losses >= MOST_LOSSES:
                commands += self._fail(turn, f"{turn.losses} workers died while they served this request.")
        if not self.can_serve:
            for turn in list(self._turns.values()):
                commands += self._fail(turn, f"The worker {name} died and no decoder is left. Restart the server.")
        return [*commands, *self._place_queued()]

    def _announce(self) -> list[Command]:
        peers = list(self._peers.values())
        return [Send(name, Peers(peers)) for name in self._peers]

    # --- turns ------------------------------------------------------------------------------------------------------

    def check_room(self, now: float) -> None:
        """Raises `QueueIsFull` if no more turns should be submitted. Once for a request: one that was let in may
        submit all of its turns."""
        if len(self._queue) >= self._max_queued:
            raise QueueIsFull(len(self._queue), self._retry_after(now))

    def submit(
        self, turn: str, tokens: list[int], params: SamplingParams, seed: int, conversation: str, salt: str, now: float
    ) -> list[Command]:
        """Accept a turn: place it, or queue it. Raises `NoDecoder`, and then changes nothing."""
        if not self.can_serve:
            raise NoDecoder("No decoder is alive.")
        found = self.conversations.find(conversation, tokens, salt)
        found.active += 1
        output = min(params.max_tokens or RESERVED_OUTPUT, RESERVED_OUTPUT)
        self._rest(found, 0)
        accepted = Turn(
            turn, list(tokens), params, seed, salt, found, now, self._pages(len(tokens) + output), len(tokens)
        )
        self._turns[turn] = accepted
        self._queue.append(accepted)
        return self._place_queued()

    def cancel(self, turn: str, now: float) -> list[Command]:
        """The client has left: free everything at once. Unknown turns are ignored."""
        found = self._turns.get(turn)
        if found is None:
            return []
        commands = self._abort(found)
        self._end(found, now)
        return [*commands, *self._place_queued()]

    def on_report(self, worker: str, report: Report, now: float) -> list[Command]:
        """A worker has stepped: outputs for clients, finished handoffs, its state."""
        if worker not in self._workers:
            return []
        self.stats[worker] = report.stats
        self._workers[worker].queued_prefill_tokens = report.stats.queued_prefill_tokens
        for move in report.moves:
            self._count_move(worker, move)
        commands: list[Command] = []
        for output in report.outputs:
            if turn := self._runs.get(output.turn):  # else of a run that is over
                commands += self._take(turn, output, now)
        return [*commands, *self._place_queued()]

    def on_tick(self, now: float) -> list[Command]:
        """Once in a while: forget conversations nobody has continued."""
        for conversation in self.conversations.expire(now):
            self._rest(conversation, 0)
        return self._place_queued()

    def _take(self, turn: Turn, output: TurnOutput, now: float) -> list[Command]:
        """Deliver an output if it is the next one; keep it if it is early; drop it if it is known."""
        if output.finish == "error":
            return self._fail(turn, output.error)
        if output.index < turn.delivered:
            known = turn.tokens[turn.given + output.index :][: len(output.tokens)]
            if output.tokens == known:
                return []
            # A first token that P gave to the client and D does not know of, and D drew another one. D has to go on
            # from what the client has.
            commands = self._abort(turn)
            self._leave(turn)
            self._run_again(turn)
            return commands
        turn.early[output.index] = output
        commands = []
        while (ready := turn.early.pop(turn.delivered, None)) is not None:
            turn.tokens += ready.tokens
            commands.append(Deliver(turn.id, ready))
            if ready.finish:
                self._end(turn, now)
                break
            if not ready.tokens:
                break
        return commands

    def _abort(self, turn: Turn) -> list[Command]:
        return [Send(turn.home, Abort(turn.run))] if turn.home in self._workers else []

    def _fail(self, turn: Turn, reason: str) -> list[Command]:
        commands = self._abort(turn)
        self._end(turn, turn.arrived)
        failed = TurnOutput(turn.id, turn.delivered, [], finish="error", error=reason)
        return [*commands, Deliver(turn.id, failed)]

    def _leave(self, turn: Turn) -> None:
        """Give back what the ledger holds for a turn at its home."""
        if home := self._workers.get(turn.home):
            home.reserved -= turn.pages
            home.turns -= 1

    def _run_again(self, turn: Turn) -> None:
        """Put a turn that has lost its run at the head of the queue; it goes on from its tokens."""
        self._runs.pop(turn.run, None)
        turn.home = turn.prefill_at = turn.run = ""
        turn.early.clear()
        self._queue.appendleft(turn)

    def _end(self, turn: Turn, now: float) -> None:
        """Settle the ledger; the conversation's KV stays at home."""
        del self._turns[turn.id]
        self._runs.pop(turn.run, None)
        conversation = turn.conversation
        conversation.active -= 1
        if turn.home:
            self._leave(turn)
            conversation.turns += 1
            conversation.tokens = len(turn.tokens)
        else:
            self._queue.remove(turn)
        if not conversation.active:
            self._rest(conversation, self._pages(conversation.tokens))
        conversation.last_end = max(conversation.last_end, now)
        self._ends.append(now)

    # --- placement --------------------------------------------------------------------------------------------------

    def _place_queued(self) -> list[Command]:
        """Place waiting turns, first come first served: a turn that has to wait for a decoder keeps later ones from
        taking the room it waits for."""
        commands: list[Command] = []
        open_decoders = self.decoders
        waiting: deque[Turn] = deque()
        prefillers = [w for w in self._workers.values() if w.prefiller]
        while self._queue and open_decoders:
            turn = self._queue.popleft()
            placement = self._policy.place(turn.conversation, turn.pages, prefillers, open_decoders)
            if placement is None:
                waiting.append(turn)
                home = turn.conversation.home
                open_decoders = [d for d in open_decoders if home and d.name != home]
                continue
            turn.home, turn.prefill_at = placement.home, placement.prefill_at
            turn.conversation.home = placement.home
            home_view = self._workers[placement.home]
            home_view.reserved += turn.pages
            home_view.turns += 1
            key = (placement.prefill_at or placement.home, placement.home)
            self.placements[key] = self.placements.get(key, 0) + 1
            turn.runs += 1
            turn.run = f"{turn.id}.{turn.runs}"
            self._runs[turn.run] = turn
            run = Run(turn.run, turn.tokens, turn.params, turn.seed, turn.salt, turn.delivered, turn.prefill_at)
            if placement.prefill_at:
                # Until its next report tells: several turns may be placed before that.
                self._workers[placement.prefill_at].queued_prefill_tokens += len(turn.tokens)
            commands.append(Send(placement.home, run))
        self._queue = waiting + self._queue
        return commands

    def _rest(self, conversation: Conversation, pages: int) -> None:
        """Set what an idle conversation is thought to hold at home."""
        if home := self._workers.get(conversation.home):
            home.resident += pages - conversation.resident
            conversation.resident = pages
        else:
            conversation.resident = 0

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._page_tokens)

    def _count_move(self, worker: str, move: Move) -> None:
        total = self.handoffs.setdefault((move.source, worker), HandoffTotals())
        total.count += 1
        total.pages += move.pages
        total.bytes += move.bytes
        total.seconds += move.seconds

    def _retry_after(self, now: float) -> int:
        """Whole seconds until the queue is likely to have moved on, from the rate at which turns ended lately."""
        if not self._ends:
            return 5
        rate = len(self._ends) / max(now - self._ends[0], 0.1)
        return max(1, min(60, round(len(self._queue) / rate)))
