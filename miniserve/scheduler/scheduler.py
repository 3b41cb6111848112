"""The scheduler: pure. Turns and workers' reports go in, commands come out; no clock, no sockets, no tensors.

It owns what is true of a turn: which tokens the client has been given. A worker's output counts only as the next token
of its turn, so that nothing is repeated or skipped when a worker dies and another one goes on.

`Scheduler` keeps the lives of workers and turns. As a `Placer` it decides which turn goes where: by the policies in
`observe.py` and `baselines.py`, in the order of `queue.py`; `ledger.py` counts the pages.
"""

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from miniserve.cluster.messages import Abort, Ended, Failed, FirstToken, Peer, Peers, Report, TurnOutput, WorkerStats
from miniserve.config import Role, problem
from miniserve.kv.hashing import token_bytes
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.conversation import UNSAID, Conversation, Said, TurnEnd
from miniserve.scheduler.conversations import Conversations
from miniserve.scheduler.observations import Speed
from miniserve.scheduler.placement import Policy
from miniserve.scheduler.placer import Placer
from miniserve.scheduler.prompts import KEPT_BYTES, page_chain
from miniserve.scheduler.turns import Command, Deliver, Note, Send, Turn, TurnState
from miniserve.scheduler.workers import WorkerView

RECENT_ENDS = 64
"""Ends of turns from which the speed of the queue is estimated."""
MOST_CLIENTS = 64
"""Programs whose turns are counted apart; a client may send any name."""


class QueueFull(RuntimeError):
    """Too many turns wait already; try again in `retry_after` whole seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NoDecoder(RuntimeError):
    """No worker is left that could serve a turn."""


@dataclass(slots=True)
class Reuse:
    """Of one client: turns whose prompts were computed, the tokens of these prompts, those that were found."""

    turns: int = 0
    prompt: int = 0
    cached: int = 0


class Scheduler(Placer):
    """Places conversations on workers. Methods take the time in seconds where they need it, and return commands to be
    carried out in order. `kept_bytes` are for prompts, to compare later ones with."""

    def __init__(
        self, policy: Policy, page_tokens: int, max_turns: int, max_queued: int, *, kept_bytes: int = KEPT_BYTES
    ) -> None:
        super().__init__(policy, page_tokens)
        self.conversations = Conversations(page_tokens, kept_bytes=kept_bytes)
        self.workers, self.links = self.cluster.workers, self.cluster.links
        self.names: list[str] = []
        """All workers that ever lived, in the order of their numbers in `TurnRecord`."""
        self.reuse: dict[str, Reuse] = {}
        """By the name of a client; those above `MOST_CLIENTS` are ""."""
        self._max_turns, self._max_queued = max_turns, max_queued
        self._speed = Speed()  # of all workers together
        self._ends: deque[float] = deque(maxlen=RECENT_ENDS)
        self._returning: set[str] = set()  # decoders that are being started again
        self._moves: dict[str, tuple[str, str]] = {}
        """Conversations on their way from a worker that is to go: from where, and to where."""
        self._moved = 0

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def stats(self) -> dict[str, WorkerStats]:
        return {name: view.stats for name, view in self.workers.items() if view.stats is not None}

    @property
    def can_serve(self) -> bool:
        """Whether a turn will be served: by a decoder that lives, or by one that is being started again."""
        return bool(self.cluster.decoders or self._returning)

    def worker_up(self, peer: Peer, *, now: float = 0.0) -> list[Command]:
        """A worker is ready, or ready again: announce it to all, and place the turns that it has room for."""
        self._returning.discard(peer.name)
        self.cluster.join(WorkerView(peer, self._max_turns, self.cluster.page_tokens, Speed(self._speed), now))
        if peer.name not in self.names:
            self.names.append(peer.name)
        self._announce()
        return self._place_queued(now, everywhere=True)

    def worker_down(self, name: str, *, returns: bool, now: float = 0.0) -> list[Command]:
        """A worker has died, and perhaps `returns`. Its turns go on elsewhere, from their tokens, or wait for a decoder
        to return; where none will, they end. So does one that was tried there alone: workers die of it."""
        view = self.workers.get(name)
        self.cluster.leave(name)
        if not returns:
            self._returning.discard(name)
        elif view is not None and view.role is Role.DECODER:
            self._returning.add(name)
        self._announce()
        under = [turn for turn in self.turns.values() if turn.runs_on(name)]
        self._forget_worker(name)
        self._queue.homes_lost(now)
        for turn in reversed(under):
            tried = turn.suspected  # It ran, so it was tried.
            turn.lose()
            if turn.home == name or turn.suspected:
                self._run_again(turn, now)
            if tried:
                self._fail(turn, problem("scheduler.deadly", losses=turn.losses), now)
        if not self.can_serve:
            # Turns whose home is a prefiller that lives have all they need.
            for turn in [turn for turn in self.turns.values() if turn.state is TurnState.QUEUED]:
                self._fail(turn, problem("scheduler.last_died", name=name), now)
        return self._place_queued(now, everywhere=True)

    def retire(self, name: str, now: float) -> list[Command]:
        """A worker is to go: nothing more is placed there, and conversations move to other homes as soon as none of
        their turns runs there. `retired` says when it has nothing left to do. Raises `NoDecoder` for the last one."""
        if not [decoder for decoder in self.cluster.decoders if decoder.name != name]:
            raise NoDecoder(f"{name} is the last decoder: add another one before it goes.")
        self.cluster.retire(name)
        running = {turn.conversation.key for turn in self.turns.values() if turn.home == name}
        for conversation in self.conversations:
            if conversation.home == name and conversation.key not in running:
                self._move(conversation, now)
        return self._place_queued(now, everywhere=True)

    def retired(self, name: str) -> bool:
        """Whether no turn runs on a worker, no other one has its pages on lease, and no conversation moves away."""
        if (view := self.workers.get(name)) and view.stats is not None and view.stats.leases:
            return False
        moving = {source for source, _ in self._moves.values()}
        return name not in moving and not any(turn.runs_on(name) for turn in self.turns.values())

    def _leave_retired(self, conversation: Conversation, now: float) -> None:
        """Move a conversation whose home is to go, as soon as none of its turns runs."""
        if conversation.home in self.cluster.retired and not any(
            other.conversation is conversation and other.home for other in self.turns.values()
        ):
            self._move(conversation, now)

    def _move(self, conversation: Conversation, now: float) -> None:
        """Move the KV of a conversation to the decoder with the most room; where there is none, it is computed anew."""
        before, tokens = conversation.home, self.conversations.tokens(conversation)
        pages = self._ledger.pages(len(tokens))
        self._ledger.let_go(conversation)
        queued = [t for t in self.turns.values() if t.conversation is conversation and t.state is TurnState.QUEUED]
        for turn in queued:
            self._queue.remove(turn)
        home = max(self.cluster.decoders, key=lambda decoder: decoder.room, default=None)
        if home is not None and not (conversation.turns and tokens and home.room >= pages):
            home = None
        conversation.home = home.name if home else None
        for turn in reversed(queued):
            self._queue.append(turn, now, first=True)
        if home is None or before is None:
            return
        self._moved += 1
        move = f"move-{self._moved}"
        self._moves[move] = before, home.name
        if not conversation.active:
            self._ledger.hold(conversation, now)
        self._commands.append(self._bring(move, conversation, tokens, before, home))

    def _forget_worker(self, name: str) -> None:
        """A worker that returns has nothing of what it had."""
        self._moves = {move: way for move, way in self._moves.items() if name not in way}
        for conversation in self.conversations:
            if conversation.home == name:
                conversation.home = None
                self._ledger.let_go(conversation)
            if conversation.copy_at == name:
                conversation.copy_at, conversation.copy_tokens = None, 0
        for turn in self.turns.values():
            if turn.prefill_at == name:
                turn.prefill_at, turn.lent_pages = None, 0

    def _announce(self) -> None:
        peers = Peers([view.peer for view in self.workers.values()])
        self._commands += [Send(name, peers) for name in self.workers]

    def check_room(self, now: float) -> None:
        """Raises `QueueFull` if no more turns should be submitted. Call it once for a request, before all its turns."""
        if self.queued >= self._max_queued:
            # The queue is likely to move on at the rate at which turns ended lately.
            seconds = self.queued * max(now - self._ends[0], 0.1) / len(self._ends) if self._ends else 5
            raise QueueFull(problem("scheduler.full", queued=self.queued), max(1, min(60, round(seconds))))

    def submit(
        self,
        turn: str,
        tokens: Sequence[int],
        params: SamplingParams,
        seed: int,
        conversation: str | int,
        salt: str,
        now: float,
        said: Said = UNSAID,
    ) -> list[Command]:
        """Accept a turn: place it, or queue it. `conversation` is a key, or "" for none; `said` is what else the client
        says of it. Raises `NoDecoder`, and then changes nothing."""
        if not self.can_serve:
            raise NoDecoder("No decoder is alive.")
        prompt = token_bytes(tokens)
        chain = page_chain(array("i", prompt), salt, self.cluster.page_tokens)
        of, known, change = self.conversations.find(conversation, prompt, chain, now, said)
        gap = max(now - of.last_end, 0.0) if len(of.history) and not of.active else None
        self._forecast.arrived(of.turns, gap)
        if of.home in self.cluster.retired and not of.active:  # a fork of one that runs there
            of.home = None
        of.active, of.salt = of.active + 1, salt
        self._ledger.let_go(of)
        output = self._forecast.output(of.history, params.max_tokens, said.osl)
        pages = self._ledger.pages(len(tokens) + output)
        asked = turn, list(tokens), params, seed
        self.turns[turn] = accepted = Turn(*asked, of, chain, known, now, gap, output, pages, said, change)
        self._queue.append(accepted, now)
        return self._place_queued(now)

    def cancel(self, turn: str, now: float) -> list[Command]:
        """The client has left: free everything at once. Unknown turns are ignored."""
        if found := self.turns.get(turn):
            self._abort(found)
            self._end(found, "abort", now)
        return self._place_queued(now)

    def on_report(self, worker: str, report: Report, now: float) -> list[Command]:
        """A worker has stepped: outputs for clients, finished handoffs, its state."""
        if (view := self.workers.get(worker)) is None:
            return []
        view.observe(report, now)
        self.cluster.touch(worker)
        for move in report.moves:
            self.cluster.moved(move, worker)
            if turn := self._turn_of(move.turn):
                turn.phases.transfer += move.seconds
                turn.phases.exposed += move.exposed
                turn.phases.moved_pages += move.pages
        for output in report.outputs:
            if turn := self._turn_of(output.turn):
                self._take(turn, output, worker, now)
            else:
                self._moves.pop(output.turn, None)
        return self._place_queued(now)

    def on_tick(self, now: float) -> list[Command]:
        """Time has passed: forget conversations that have been idle too long, and what is late."""
        self._ledger.give_up_late(now)
        for conversation in self.conversations.expire(now):
            self._ledger.let_go(conversation)
        return self._place_queued(now, everywhere=True)

    def _turn_of(self, run: str) -> Turn | None:
        turn = self.turns.get(run.rpartition(".")[0])
        return turn if turn is not None and turn.run == run else None

    def _take(self, turn: Turn, output: TurnOutput, worker: str, now: float) -> None:
        """Deliver an output if it is the next one; keep it if it is early; drop it if the client has it."""
        if isinstance(output, Failed):
            self._fail(turn, output.error, now, output.invalid)
            return
        if output.index < turn.delivered:
            known = turn.tokens[turn.given + output.index :][: len(output.tokens)]
            # What a prefiller reports late is not what the home decodes on from.
            if output.tokens != known and worker == turn.home:
                # P gave the client a first token and died; D, which does not know of it, drew another one. D has to go
                # on from what the client has.
                self._run_again(turn, now)
            return
        turn.early[output.index] = output
        while (ready := turn.early.pop(turn.delivered, None)) is not None:
            turn.tokens += ready.tokens
            self._commands.append(Deliver(turn.id, ready))
            if isinstance(ready, FirstToken) and turn.state is TurnState.PREFILL:
                self._prefilled(turn, ready, now)
            elif isinstance(ready, Ended):
                self._end(turn, ready.finish, now)
                return
            self._ledger.grow(turn)

    def _prefilled(self, turn: Turn, first: FirstToken, now: float) -> None:
        turn.move(TurnState.DECODE)
        self._ledger.end_prefill(turn)
        if turn.first_token is None:
            turn.first_token = now
            turn.phases.prefill, turn.phases.cached = first.prefill, first.cached_tokens
            client = turn.said.client if turn.said.client in self.reuse or len(self.reuse) < MOST_CLIENTS else ""
            reuse = self.reuse.setdefault(client, Reuse())
            reuse.turns += 1
            reuse.prompt += turn.given
            reuse.cached += first.cached_tokens
        # Of a prefix that others share only what was found once has a snapshot for sure.
        whole = not self.cluster.snapshot_pages
        prefix = turn.chain if whole else turn.chain[: first.cached_tokens // self.cluster.page_tokens + 1]
        for worker in (turn.prefill_at, turn.home):
            if worker is not None:
                self.cluster.prefixes.add(prefix, worker)
        if turn.prefill_at is not None:
            turn.conversation.copy_at, turn.conversation.copy_tokens = turn.prefill_at, turn.given
        turn.chain = []

    def _abort(self, turn: Turn) -> None:
        if (home := self.cluster.worker(turn.home)) and turn.run:
            home.leaving.add(turn.run)
            self._commands.append(Send(home.name, Abort(turn.run)))

    def _fail(self, turn: Turn, reason: str, now: float, invalid: bool = False) -> None:
        self._abort(turn)
        self._end(turn, "error", now)
        self._commands.append(Deliver(turn.id, Failed(turn.id, turn.delivered, reason, invalid)))

    def _run_again(self, turn: Turn, now: float) -> None:
        """End the turn's run, if its worker lives, and put it at the head of the queue; it goes on from its tokens."""
        self._abort(turn)
        self._ledger.release(turn, now)
        turn.move(TurnState.QUEUED)
        turn.run = turn.home = turn.prefill_at = None
        turn.early.clear()
        self._queue.append(turn, now, first=True)
        self._leave_retired(turn.conversation, now)

    def _end(self, turn: Turn, finish: TurnEnd, now: float) -> None:
        """Settle the ledger; the conversation's KV stays at home."""
        del self.turns[turn.id]
        conversation = turn.conversation
        conversation.active -= 1
        if turn.state is TurnState.QUEUED:
            self._queue.remove(turn)
        else:
            self._ledger.release(turn, now)
            conversation.turns += 1
            conversation.tokens = len(turn.tokens)
            conversation.ends = turn.given, len(turn.tokens) - 1
            self.conversations.answered(conversation, turn.tokens[turn.given :])
            if turn.first_token is not None:
                record = turn.remembered(self.names, finish, now)
                conversation.history.append(record)
                self._forecast.ended(record)
        turn.move(TurnState.ENDED)
        if not conversation.active:
            self._ledger.hold(conversation, now)
        conversation.last_end = max(conversation.last_end, now)
        self._ends.append(now)
        if self.notes and turn.runs:
            self._commands.append(Note(turn.outcome(finish, now)))
        self._leave_retired(conversation, now)
