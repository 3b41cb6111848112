"""The scheduler: pure. Turns and workers' reports in, commands out; no clock, no sockets, no tensors.

It owns what is true of a turn: which tokens the client has been given. A worker's output counts only as the next token
of its turn, so that nothing is repeated or skipped when a worker dies and another goes on.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from miniserve.cluster.messages import (
    Abort,
    Ended,
    Failed,
    FirstToken,
    Keep,
    Message,
    Move,
    Peer,
    Peers,
    Report,
    Run,
    TurnOutput,
    WorkerStats,
)
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.conversations import Conversations
from miniserve.scheduler.fleet import Fleet
from miniserve.scheduler.observations import Speed
from miniserve.scheduler.placement import Need, Placement, Policy
from miniserve.scheduler.prefixes import Prefixes
from miniserve.scheduler.prompts import page_chain
from miniserve.scheduler.queue import Lines
from miniserve.scheduler.records import Record, decision, outcome, remembered
from miniserve.scheduler.rest import Rest
from miniserve.scheduler.turns import Phases, Turn
from miniserve.scheduler.workers import Cluster, Link, WorkerView

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


@dataclass(frozen=True)
class Note:
    """Command: tell `record` to whoever wants to know: the decision log, listeners."""

    record: Record


Command = Send | Deliver | Note


class Scheduler:
    """Places conversations on workers. Every method takes the time in seconds where it needs it, and returns commands
    to be carried out in order. `policy_name` is for notes of its decisions, made only while `notes` is set."""

    def __init__(
        self,
        policy: Policy,
        page_tokens: int,
        max_turns: int,
        max_queued: int,
        *,
        policy_name: str = "",
        notes: bool = False,
    ) -> None:
        self.links: dict[tuple[str, str], Link] = {}
        self.placements: dict[tuple[str, str], int] = {}
        self.conversations = Conversations(page_tokens)
        self.workers: dict[str, WorkerView] = {}
        """Those that live."""
        self.names: list[str] = []
        """All workers that ever were, in the order of their numbers in `History`."""
        self.fleet = Fleet()
        self._policy = policy
        self._policy_name = policy_name
        self.notes = notes
        """Whether somebody reads notes; may change at any time."""
        self._page_tokens = page_tokens
        self._max_turns = max_turns
        self._max_queued = max_queued
        self._speed = Speed()
        self._prefixes = Prefixes()
        self._peers: dict[str, Peer] = {}
        self._lines = Lines(self._lets_pass)
        self._rest = Rest(self.workers, self.fleet)
        self._turns: dict[str, Turn] = {}
        self._runs: dict[str, Turn] = {}
        self._ends: deque[float] = deque(maxlen=RECENT_ENDS)
        self._expected: set[str] = set()
        """Decoders that are being started again."""

    @property
    def queued(self) -> int:
        """Turns that wait for a placement."""
        return len(self._lines)

    @property
    def active(self) -> int:
        """Turns that wait or run."""
        return len(self._turns)

    @property
    def turns(self) -> list[Turn]:
        """The turns that wait or run."""
        return list(self._turns.values())

    @property
    def stats(self) -> dict[str, WorkerStats]:
        """The latest snapshot of each worker that lives."""
        return {name: view.stats for name, view in self.workers.items() if view.stats is not None}

    @property
    def decoders(self) -> list[WorkerView]:
        """The decoders that live."""
        return [w for w in self.workers.values() if not w.prefiller]

    @property
    def can_serve(self) -> bool:
        """Whether a turn will be served: by a decoder that lives, or by one that is being started again."""
        return bool(self.decoders or self._expected)

    # --- workers ----------------------------------------------------------------------------------------------------

    def worker_up(self, peer: Peer, *, prefiller: bool, now: float = 0.0) -> list[Command]:
        """A worker is ready, or ready again: tell all, and place what waited for room."""
        self._expected.discard(peer.name)
        self.workers[peer.name] = WorkerView(
            name=peer.name,
            prefiller=prefiller,
            total_pages=peer.pool.num_pages,
            max_turns=self._max_turns,
            page_tokens=self._page_tokens,
            epoch=peer.epoch,
            page_bytes=peer.pool.page_bytes,
            speed=Speed(self._speed),
            heard=now,
        )
        if peer.name not in self.names:
            self.names.append(peer.name)
        self._peers[peer.name] = peer
        return [*self._announce(), *self._place_queued(now)]

    def worker_down(self, name: str, *, returns: bool, now: float = 0.0) -> list[Command]:
        """A worker has died, and perhaps `returns`. Its turns go on elsewhere, from their tokens, or wait for a decoder
        to return; where none will, they end."""
        view = self.workers.pop(name, None)
        if not returns:
            self._expected.discard(name)
        elif view is not None and not view.prefiller:
            self._expected.add(name)
        self._peers.pop(name, None)
        self._prefixes.drop(name)
        commands = self._announce()
        for conversation in self.conversations:
            if conversation.home == name:
                conversation.home = ""
                self._rest.forget(conversation)
            if conversation.copy_at == name:
                conversation.copy_at, conversation.copy_tokens = "", 0
        for turn in self._turns.values():
            if turn.prefill_at == name:  # which has nothing of it when it returns
                turn.prefill_at, turn.lent_pages = "", 0
        self._lines.sort(now)
        lost = [t for t in self._turns.values() if t.home == name]
        for turn in reversed(lost):
            self._run_again(turn, now)
            turn.losses += 1
            if turn.losses >= MOST_LOSSES:
                commands += self._fail(turn, f"{turn.losses} workers died while they served this request.", now)
        if not self.can_serve:
            # Those at home on a prefiller have all they need.
            for turn in [t for t in self._turns.values() if t.home not in self.workers]:
                reason = f"The worker {name} died and no decoder is left. Restart the server."
                commands += self._fail(turn, reason, now)
        return [*commands, *self._place_queued(now)]

    def _announce(self) -> list[Command]:
        peers = list(self._peers.values())
        return [Send(name, Peers(peers)) for name in self._peers]

    # --- turns ------------------------------------------------------------------------------------------------------

    def check_room(self, now: float) -> None:
        """Raises `QueueIsFull` if no more turns should be submitted. Once for a request: one that was let in may
        submit all of its turns."""
        if self.queued >= self._max_queued:
            raise QueueIsFull(self.queued, self._retry_after(now))

    def submit(
        self,
        turn: str,
        tokens: list[int],
        params: SamplingParams,
        seed: int,
        conversation: str | int,
        salt: str,
        now: float,
        *,
        tool: bool = False,
    ) -> list[Command]:
        """Accept a turn: place it, or queue it. `tool` is whether its prompt ends in a tool's result.

        Raises `NoDecoder`, and then changes nothing.
        """
        if not self.can_serve:
            raise NoDecoder("No decoder is alive.")
        chain = page_chain(tokens, salt, self._page_tokens)
        found = self.conversations.find(conversation, tokens, chain, now)
        of = found.conversation
        gap = max(now - of.last_end, 0.0) if len(of.history) and not of.active else -1.0
        self.fleet.arrived(of, gap)
        of.active += 1
        self._rest.set(of, 0, now)
        output = self.fleet.output(of, params.max_tokens)
        accepted = Turn(
            id=turn,
            tokens=list(tokens),
            params=params,
            seed=seed,
            salt=salt,
            conversation=of,
            chain=chain,
            known=found.known,
            arrived=now,
            gap=gap,
            tool=tool,
            output=output,
            pages=self._pages(len(tokens) + output),
            given=len(tokens),
            number=of.turns + 1,
        )
        self._turns[turn] = accepted
        self._lines.append(accepted, now)
        return self._place_queued(now)

    def conversation_of(self, turn: str) -> str | int:
        """The key of the conversation that a turn belongs to; "" when that has ended."""
        return found.conversation.key if (found := self._turns.get(turn)) else ""

    def cancel(self, turn: str, now: float) -> list[Command]:
        """The client has left: free everything at once. Unknown turns are ignored."""
        found = self._turns.get(turn)
        if found is None:
            return []
        return [*self._abort(found), *self._end(found, "abort", now), *self._place_queued(now)]

    def on_report(self, worker: str, report: Report, now: float) -> list[Command]:
        """A worker has stepped: outputs for clients, finished handoffs, its state."""
        view = self.workers.get(worker)
        if view is None:
            return []
        view.observe(report, now)
        for move in report.moves:
            self._count_move(worker, move)
        commands: list[Command] = []
        for output in report.outputs:
            if turn := self._runs.get(output.turn):  # else of a run that is over
                commands += self._take(turn, output, worker, now)
        return [*commands, *self._place_queued(now)]

    def on_tick(self, now: float) -> list[Command]:
        """Once in a while: forget conversations nobody has continued."""
        self._rest.give_up_late(now)
        for conversation in self.conversations.expire(now):
            self._rest.set(conversation, 0, now)
        return self._place_queued(now)

    def _take(self, turn: Turn, output: TurnOutput, worker: str, now: float) -> list[Command]:
        """Deliver an output if it is the next one; keep it if it is early; drop it if it is known."""
        if isinstance(output, Failed):
            return self._fail(turn, output.error, now, output.invalid)
        if output.index < turn.delivered:
            known = turn.tokens[turn.given + output.index :][: len(output.tokens)]
            if output.tokens == known or worker != turn.home:
                return []  # nobody goes on from what a prefiller says late
            # A first token that P gave to the client and D does not know of, and D drew another one. D has to go on
            # from what the client has.
            commands = self._abort(turn)
            self._leave(turn, now)
            self._run_again(turn, now)
            return commands
        turn.early[output.index] = output
        commands = []
        while (ready := turn.early.pop(turn.delivered, None)) is not None:
            turn.tokens += ready.tokens
            commands.append(Deliver(turn.id, ready))
            if isinstance(ready, FirstToken):
                self._begun(turn, ready, now)
            elif isinstance(ready, Ended):
                commands += self._end(turn, ready.finish, now)
                break
            self._grow(turn)
        return commands

    def _begun(self, turn: Turn, first: FirstToken, now: float) -> None:
        """A run has given its first token: its prompt is computed."""
        self._return_lent(turn)
        if not turn.first_token:
            turn.first_token = now
            turn.phases.prefill, turn.phases.cached = first.prefill, first.cached_tokens
        if turn.prefill_at:
            turn.conversation.copy_at, turn.conversation.copy_tokens = turn.prefill_at, turn.given
            self._prefixes.add(turn.chain, turn.prefill_at)
        self._prefixes.add(turn.chain, turn.home)
        turn.chain = []

    def _grow(self, turn: Turn) -> None:
        """A turn that generates more than expected takes more of its home's pages, in the ledger too."""
        if (pages := self._pages(len(turn.tokens) + 1)) > turn.pages:
            if home := self.workers.get(turn.home):
                home.reserved += pages - turn.pages
            turn.pages = pages

    def _abort(self, turn: Turn) -> list[Command]:
        return [Send(turn.home, Abort(turn.run))] if turn.home in self.workers else []

    def _fail(self, turn: Turn, reason: str, now: float, invalid: bool = False) -> list[Command]:
        failed = Failed(turn.id, turn.delivered, reason, invalid)
        return [*self._abort(turn), *self._end(turn, "error", now), Deliver(turn.id, failed)]

    def _leave(self, turn: Turn, now: float) -> None:
        """Give back what the ledger holds for a turn."""
        self._return_lent(turn)
        if home := self.workers.get(turn.home):
            home.drop_turn(turn.pages, now)

    def _return_lent(self, turn: Turn) -> None:
        if prefiller := self.workers.get(turn.prefill_at):
            prefiller.reserved -= turn.lent_pages
        turn.lent_pages = 0

    def _run_again(self, turn: Turn, now: float) -> None:
        """Put a turn that has lost its run at the head of the queue; it goes on from its tokens."""
        self._return_lent(turn)
        self._runs.pop(turn.run, None)
        turn.home = turn.prefill_at = turn.run = ""
        turn.early.clear()
        self._lines.appendleft(turn, now)

    def _end(self, turn: Turn, finish: str, now: float) -> list[Command]:
        """Settle the ledger; the conversation's KV stays at home."""
        del self._turns[turn.id]
        self._runs.pop(turn.run, None)
        conversation = turn.conversation
        conversation.active -= 1
        if turn.home:
            self._leave(turn, now)
            conversation.turns += 1
            conversation.tokens = len(turn.tokens)
            if turn.first_token:
                record = remembered(turn, self.names, finish, now)
                conversation.history.append(record)
                self.fleet.ended(record)
        else:
            self._lines.remove(turn)
        if not conversation.active:
            self._rest.set(conversation, self._pages(conversation.tokens), now)
        conversation.last_end = max(conversation.last_end, now)
        self._ends.append(now)
        return [Note(outcome(turn, finish, now))] if self.notes and turn.runs else []

    # --- placement --------------------------------------------------------------------------------------------------

    def _lets_pass(self, turn: Turn, now: float) -> bool:
        """Whether a newcomer may still be passed by others."""
        need = self._need(turn, now)
        return need.waited < self._policy.patience(need, self._cluster())

    def _cluster(self) -> Cluster:
        """What a policy may look at."""
        prefillers = [w for w in self.workers.values() if w.prefiller]
        return Cluster(prefillers, self.decoders, set(self.workers), self.links)

    def _place_queued(self, now: float) -> list[Command]:
        """Place the waiting turns that can be placed."""
        if not self.queued:
            return []
        self._rest.give_up_late(now)
        commands: list[Command] = []
        cluster = self._cluster()

        def place(turn: Turn) -> bool:
            placed = self._try(turn, cluster, now)
            commands.extend(placed)
            return bool(placed)

        homes = {w.name for w in self.workers.values() if not w.prefiller or w.turns or w.resident}
        self._lines.serve(place, cluster.open, homes if self.decoders else set(self.workers), now)
        return commands

    def _try(self, turn: Turn, cluster: Cluster, now: float) -> list[Command]:
        """Place a turn; no commands if it has to wait."""
        need = self._need(turn, now)
        placement = self._policy.place(need, cluster)
        if placement is None:
            return []
        commands: list[Command] = []
        if self.notes:
            commands.append(Note(decision(self._policy_name, turn, need, placement, cluster)))
        return [*commands, Send(placement.home, self._begin(turn, need, placement, now))]

    def _need(self, turn: Turn, now: float) -> Need:
        """What a policy is told of a turn. A run after the first one finds nothing that was not there before."""
        conversation = turn.conversation
        known = {name: pages * self._page_tokens for name, pages in self._prefixes.find(turn.chain).items()}
        if conversation.copy_at:
            copied = min(conversation.copy_tokens, turn.known)
            known[conversation.copy_at] = max(known.get(conversation.copy_at, 0), copied)
        if conversation.home:
            known[conversation.home] = max(known.get(conversation.home, 0), turn.known)
        return Need(conversation, len(turn.tokens), turn.output, turn.pages, known, now, now - turn.arrived)

    def _begin(self, turn: Turn, need: Need, placement: Placement, now: float) -> Run:
        """Enter a placement into the ledger; what its home has to be told."""
        conversation, home = turn.conversation, self.workers[placement.home]
        turn.home, turn.prefill_at = placement.home, placement.prefill_at
        if conversation.home not in ("", home.name):
            conversation.moves += 1
            conversation.moved_at = conversation.turns + 1
        conversation.home = home.name
        home.add_turn(turn.pages, now)
        key = (placement.prefill_at or home.name, home.name)
        self.placements[key] = self.placements.get(key, 0) + 1
        turn.runs += 1
        turn.run = f"{turn.id}.{turn.runs}"
        if not turn.first_token:
            turn.placed, turn.phases = now, Phases()
        turn.chosen = next(
            (o for o in placement.options if (o.home, o.prefill_at) == (home.name, placement.prefill_at)), None
        )
        self._runs[turn.run] = turn
        # Until its next report tells: several turns may be placed before that.
        prefills = self.workers[placement.prefill_at] if placement.prefill_at else home
        prefills.queued_prefill_tokens += need.new(prefills.name)
        if prefills is not home:
            turn.lent_pages = self._pages(len(turn.tokens))
            prefills.reserved += turn.lent_pages
        return Run(
            turn.run,
            turn.tokens,
            turn.params,
            turn.seed,
            turn.salt,
            turn.delivered,
            placement.prefill_at,
            placement.share_history,
            placement.history_at,
            self._keep(turn, home),
        )

    def _keep(self, turn: Turn, home: WorkerView) -> Keep:
        """What the home should know when it runs out of pages between this conversation's turns."""
        gap, chance = self.fleet.outlook(turn.conversation, turn.number)
        last_page = max(len(turn.tokens) - self._page_tokens, 0)
        seconds = home.speed.prefill(self._page_tokens, last_page)
        return Keep(str(turn.conversation.key), gap, chance, seconds)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._page_tokens)

    def _count_move(self, worker: str, move: Move) -> None:
        self.links.setdefault((move.source, worker), Link()).observe(move)
        if turn := self._runs.get(move.turn):
            turn.phases.transfer += move.seconds
            turn.phases.exposed += move.exposed
            turn.phases.moved_pages += move.pages

    def _retry_after(self, now: float) -> int:
        """Whole seconds until the queue is likely to have moved on, from the rate at which turns ended lately."""
        if not self._ends:
            return 5
        rate = len(self._ends) / max(now - self._ends[0], 0.1)
        return max(1, min(60, round(self.queued / rate)))
