"""Moving a turn's KV from one worker to another. Both sides of every handoff are here.

Prefill: D reserves pages, then asks P. After each chunk P publishes the finished pages; D checks their hashes against
its own chain and copies them between steps. The last publication is the commit and carries the first token.
History: whoever lacks the KV of earlier turns fetches it from the worker that has it; the answer is publications too.
So P gets what D holds of a conversation, and a new home what the old one holds.

The receiver ends a handoff with a release. The sender's lease on the published pages ends by that release, by the
receiver's death, or at the deadline; the receiver's patience ends with the sender's death, or when nothing has come for
as long. Whatever goes wrong, the receiver computes what it lacks itself. A turn that runs again elsewhere has another
name there: handoffs are never mixed up.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from miniserve.cluster.messages import (
    Fetch,
    FirstToken,
    Keep,
    Message,
    Move,
    Peer,
    Prefill,
    PrefillRefused,
    Publish,
    Release,
    TurnOutput,
)
from miniserve.kv.hashing import root_hash
from miniserve.kv.transfer.interface import Copy, Transfer, TransferError
from miniserve.worker.engine import Engine
from miniserve.worker.sequence import Sequence, State

log = logging.getLogger("miniserve.handoff")

PIECE = 32
"""Pages of history in one publication: the receiver stores one piece between two of its steps."""
SIGNS_OF_LIFE = 4
"""Publications without pages that P sends within the deadline, while a prefill waits or takes its time."""


@dataclass
class Pull:
    """The receiver's side: `sequence` is filled from `source`, at most until `deadline`. The first of `arriving` may be
    `storing`: being written to the pages of `sequence`."""

    sequence: Sequence
    source: Peer
    transfer: Transfer
    history: bool
    deadline: float
    pages: int = 0
    seconds: float = 0.0
    arriving: deque[tuple[Publish, Copy | None]] = field(default_factory=deque)
    storing: Copy | None = None


@dataclass
class Lease:
    """The sender's side: pages are kept for `destination`, those of a `sequence` that is prefilled for it, or the
    `pages` of a history it has fetched. The first `published` pages of the prompt are known to the receiver."""

    destination: Peer
    pages: list[int]
    published: int
    deadline: float
    sequence: Sequence | None = None

    @property
    def unfinished(self) -> Sequence | None:
        """The sequence while it is still prefilled."""
        if self.sequence is None or self.sequence.state in (State.PUBLISHED, State.FINISHED):
            return None
        return self.sequence


class Handoffs:
    """All handoffs of one worker, whose pages have `page_bytes` bytes. `send` takes a peer's address and a message;
    `patience` is the deadline in seconds.

    `connect` finds the way to a peer's pages, None if there is none. `clock` is the host's monotonic clock, which both
    sides read.
    """

    def __init__(
        self,
        engine: Engine,
        page_bytes: int,
        layout: str,
        patience: float,
        send: Callable[[str, Message], None],
        connect: Callable[[Peer], Transfer | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.moves: list[Move] = []
        """Handoffs that ended well since somebody last took them."""
        self.outputs: list[TurnOutput] = []
        """First tokens that came with a commit, likewise."""
        self._engine = engine
        self._page_bytes = page_bytes
        self._layout = layout
        self.patience = patience
        self._send = send
        self._connect = connect
        self._clock = clock
        self._peers: dict[str, tuple[Peer, Transfer | None]] = {}
        self._announced: dict[str, int] = {}
        self._pulls: dict[str, Pull] = {}
        self._leases: dict[str, Lease] = {}
        self._salts: dict[str, str] = {}
        """Cache salts of turns that will be prefilled elsewhere, until they are."""

    @property
    def num_leases(self) -> int:
        """Turns whose pages are kept for another worker."""
        return len(self._leases)

    @property
    def copying(self) -> bool:
        """Whether pages are on their way here: `poll` should be called soon."""
        return any(pull.arriving for pull in self._pulls.values())

    def epoch(self, name: str) -> int:
        """The living incarnation of a peer, -1 if there is none."""
        return self._peers[name][0].epoch if name in self._peers else -1

    def announced(self, name: str) -> int:
        """The latest incarnation of a peer that we were ever told of, -1 if none: what a later one sends is early."""
        return self._announced.get(name, -1)

    def set_peers(self, peers: list[Peer]) -> None:
        """The workers that live now. What was shared with others is settled at once."""
        known, self._peers = self._peers, {}
        for peer in peers:
            self._announced[peer.name] = peer.epoch
            old = known.get(peer.name)
            self._peers[peer.name] = known.pop(peer.name) if old and old[0] == peer else (peer, self._connect(peer))
        for _, transfer in known.values():
            if transfer is not None:
                transfer.close()
        for turn, pull in list(self._pulls.items()):
            if self.epoch(pull.source.name) != pull.source.epoch:
                self._give_up(turn, f"{pull.source.name} is gone")
        for turn, lease in list(self._leases.items()):
            if self.epoch(lease.destination.name) != lease.destination.epoch:
                self._end(turn)

    # --- the receiver -----------------------------------------------------------------------------------------------

    def expect(self, turn: str, salt: str) -> None:
        """A turn has come that will be prefilled elsewhere, under this cache salt."""
        self._salts[turn] = salt

    def request(self, sequence: Sequence) -> None:
        """`sequence` has just got all its pages: ask for what others are to fill them with, the history first."""
        turn, size = sequence.turn, self._engine.page_tokens
        # What D has told that it holds, or all but the page of the last token, which is always computed.
        most = self._leases[turn].published if sequence.prefill_for else (len(sequence.tokens) - 1) // size
        wanted = sequence.hashes(size)[sequence.computed // size : most]
        if sequence.history_at and wanted and (pull := self._begin(sequence, sequence.history_at, history=True)):
            self._send(pull.source.address, Fetch(turn, sequence.computed // size, wanted))
            return
        salt = self._salts.pop(turn, "")
        if sequence.prefill_at and (pull := self._begin(sequence, sequence.prefill_at, history=False)):
            if sequence.state is State.FETCHING:
                sequence.move(State.RECEIVING)
            self._send(
                pull.source.address,
                Prefill(
                    turn=turn,
                    tokens=sequence.tokens,
                    params=sequence.params,
                    seed=sequence.seed,
                    salt=salt,
                    prior=sequence.prior,
                    have=sequence.computed,
                    share_history=sequence.share_history,
                    keep=sequence.keep,
                ),
            )
            return
        self._engine.resume(sequence)

    def _begin(self, sequence: Sequence, source: str, *, history: bool) -> Pull | None:
        """Prepare for pages of `source`; None if there is no way to them."""
        peer, transfer = self._peers.get(source, (None, None))
        if peer is None or transfer is None:
            log.warning("turn %s: no way to pages of %s, computing them here", sequence.turn, source)
            return None
        pull = Pull(sequence, peer, transfer, history, self._clock() + self.patience)
        self._pulls[sequence.turn] = pull
        return pull

    def on_publish(self, message: Publish, sender: str) -> None:
        """Begin to copy what the sender has finished; with the last publication the sequence is ours."""
        _, transfer = self._peers.get(sender, (None, None))
        # Wanted or not: what was offered has to be taken, or the next pages would be mistaken for these.
        copy = transfer.fetch(message.ticket, message.pages) if transfer and message.pages else None
        pull = self._pulls.get(message.turn)
        if pull is None or pull.source.name != sender or pull.history != message.history:
            return
        pull.deadline = self._clock() + self.patience
        pull.arriving.append((message, copy))
        self._store(pull)

    def poll(self) -> None:
        """Store what has arrived, and give up what will not come any more. Call it between steps."""
        now = self._clock()
        for turn, pull in list(self._pulls.items()):
            self._store(pull)
            if self._pulls.get(turn) is pull and now > pull.deadline:
                self._give_up(turn, f"nothing has come for {self.patience:g} s")

    def _store(self, pull: Pull) -> None:
        """Put what has arrived where it belongs, in its order, as far as that goes without waiting."""
        while pull.arriving and self._pulls.get(pull.sequence.turn) is pull:
            message, copy = pull.arriving[0]
            failure = ""
            if pull.storing is None:
                if copy is not None and not copy.ready:
                    return
                if reason := self._misfit(pull.sequence, message):
                    self._give_up(message.turn, reason)
                    return
                if copy is not None:
                    failure = self._begin_store(pull, message, copy)
            if pull.storing is not None:
                try:
                    if not pull.storing.stored:
                        return
                except TransferError as error:
                    failure = str(error)
            pull.arriving.popleft()
            pull.storing = None
            self._take(pull, message, copy, failure)

    def _misfit(self, sequence: Sequence, message: Publish) -> str:
        """Why the pages of a publication are not what `sequence` needs next; empty if they are."""
        size, end = self._engine.page_tokens, message.first + len(message.pages)
        if not message.pages and not message.last:
            return ""  # a sign of life
        if message.first * size != sequence.computed or end > len(sequence.pages):
            return f"pages {message.first} to {end} do not follow {sequence.computed} tokens"
        if message.hashes != sequence.given_hashes(size)[message.first : end]:
            return "the pages hold other tokens than ours"
        return ""

    def _begin_store(self, pull: Pull, message: Publish, copy: Copy) -> str:
        """Let `copy` write to the pages of the sequence; why it cannot, empty if it does."""
        started = self._clock()
        try:
            copy.store(pull.sequence.pages[message.first : message.first + len(message.pages)])
        except TransferError as error:
            return str(error)
        finally:
            pull.seconds += self._clock() - started
        pull.storing = copy
        return ""

    def _take(self, pull: Pull, message: Publish, copy: Copy | None, failure: str) -> None:
        """The pages of one publication are stored, or there was a failure."""
        sequence, size = pull.sequence, self._engine.page_tokens
        end = message.first + len(message.pages)
        if copy is not None:
            pull.seconds += copy.seconds
            if self._clock() > message.deadline:
                failure = "the lease ended before the pages were copied"  # the sender may have reused one by then
            if not failure:
                pull.pages += len(message.pages)
                sequence.computed = min(end * size, sequence.given)
                sequence.register(self._engine.pool, size)
        if message.commit is not None and end == len(sequence.pages):
            # The client may have this token already: we go on from it even if we have to compute the pages.
            self.outputs += self._engine.commit(sequence, message.commit)
        if failure:
            self._give_up(message.turn, failure)
        elif message.last:
            self._complete(pull, self._clock() - message.finished_at)

    def _complete(self, pull: Pull, exposed: float) -> None:
        """All that the sender had is here."""
        sequence = pull.sequence
        if not pull.history and sequence.computed != sequence.given:
            self._give_up(sequence.turn, f"the commit came at {sequence.computed} of {sequence.given} tokens")
            return
        del self._pulls[sequence.turn]
        self._send(pull.source.address, Release(sequence.turn))
        if pull.pages or not pull.history:
            self.moves.append(
                Move(
                    turn=sequence.turn,
                    source=pull.source.name,
                    pages=pull.pages,
                    bytes=pull.pages * self._page_bytes,
                    seconds=pull.seconds,
                    exposed=max(exposed, 0.0),
                    history=pull.history,
                )
            )
        self._go_on(pull)

    def _go_on(self, pull: Pull) -> None:
        """The rest of the turn is ours, if there is any, or the prefiller's."""
        sequence = pull.sequence
        if pull.history:
            sequence.cached = max(sequence.cached or 0, sequence.computed)
            sequence.history_at = None
            self.request(sequence)
        elif sequence.finish:
            self._engine.finish(sequence)
        else:
            self._engine.resume(sequence)

    def on_refused(self, message: PrefillRefused) -> None:
        """P will not do it."""
        if message.turn in self._pulls:
            self._give_up(message.turn, message.reason)

    def abort(self, turn: str) -> None:
        """The client has left: the sender need not go on."""
        self._salts.pop(turn, None)
        if turn in self._pulls:
            pull = self._drop(turn)
            self._send(pull.source.address, Release(turn))

    def _drop(self, turn: str) -> Pull:
        """Nothing more is stored for this pull: its pages may be computed here, or be another's, at once."""
        pull = self._pulls.pop(turn)
        if pull.storing is not None:
            pull.storing.abandon()
        return pull

    def _give_up(self, turn: str, reason: str) -> None:
        """Go on alone from the last token that was verified."""
        pull = self._drop(turn)
        log.warning("turn %s: handoff from %s failed (%s), computing here", turn, pull.source.name, reason)
        if self.epoch(pull.source.name) == pull.source.epoch:
            self._send(pull.source.address, Release(turn))
        self._go_on(pull)

    # --- the sender -------------------------------------------------------------------------------------------------

    def on_prefill(self, message: Prefill, destination: str) -> None:
        """Queue a prefill for another worker, or refuse what can never fit."""
        peer = self._peers[destination][0]
        size = self._engine.page_tokens
        pages = -(-len(message.tokens) // size)
        if not 0 < len(message.tokens) < self._engine.max_model_len or pages > self._engine.pool.num_pages:
            self._send(peer.address, PrefillRefused(message.turn, f"{len(message.tokens)} tokens do not fit"))
            return
        sequence = Sequence(
            message.turn,
            message.tokens,
            message.params,
            message.seed,
            root_hash(self._layout, message.salt),
            prior=message.prior,
            prefill_for=destination,
            history_at=destination if message.share_history else None,
            keep=message.keep,
        )
        deadline = self._clock() + self.patience
        self._leases[message.turn] = Lease(peer, [], message.have // size, deadline, sequence)
        self._engine.add(sequence)

    def publish(self, sequence: Sequence, first: FirstToken | None) -> None:
        """Publish to D the pages that a step has finished; the `first` token ends the prefill."""
        lease = self._leases.get(sequence.turn)
        if lease is None:
            return
        ready = len(sequence.pages) if first else sequence.computed // self._engine.page_tokens
        if ready <= lease.published and not first:
            return
        self._offer(sequence.turn, lease, sequence, sequence.pages, ready, first)
        if first:
            self._engine.publish(sequence)

    def refuse(self, sequence: Sequence, reason: str) -> None:
        """The engine cannot finish a prefill for another worker: that one does it itself."""
        if lease := self._leases.pop(sequence.turn, None):
            self._send(lease.destination.address, PrefillRefused(sequence.turn, reason))

    def on_fetch(self, message: Fetch, destination: str) -> None:
        """Publish what is here of a conversation's history."""
        pages = self._engine.pool.match(message.hashes)
        if self._engine.host is not None:
            self._engine.host.settle()  # a page may be known that is only on its way back from there
        peer, transfer = self._peers[destination]
        now = self._clock()
        deadline = now + self.patience
        self._leases[message.turn] = Lease(peer, pages, message.first, deadline)
        for start in range(0, max(len(pages), 1), PIECE):
            piece = pages[start : start + PIECE]
            self._send(
                peer.address,
                Publish(
                    turn=message.turn,
                    first=message.first + start,
                    pages=piece,
                    hashes=message.hashes[start : start + len(piece)],
                    finished_at=now,
                    deadline=deadline,
                    last=start + PIECE >= len(pages),
                    history=True,
                    ticket=transfer.offer(piece) if transfer and piece else (0, 0),
                ),
            )

    def _offer(
        self, turn: str, lease: Lease, sequence: Sequence, pages: list[int], ready: int, commit: FirstToken | None
    ) -> None:
        """Publish the pages of a prefill up to `ready`."""
        _, transfer = self._peers[lease.destination.name]
        fresh = pages[lease.published : ready]
        now = self._clock()
        lease.deadline = now + self.patience
        self._send(
            lease.destination.address,
            Publish(
                turn=turn,
                first=lease.published,
                pages=fresh,
                hashes=sequence.given_hashes(self._engine.page_tokens)[lease.published : ready],
                finished_at=now,
                deadline=lease.deadline,
                last=commit is not None,
                commit=commit,
                ticket=transfer.offer(fresh) if transfer and fresh else (0, 0),
            ),
        )
        lease.published = max(ready, lease.published)

    def on_release(self, turn: str) -> None:
        """The receiver has what it wants, or wants no more."""
        if turn in self._leases:
            self._end(turn)

    def expire(self) -> None:
        """End the leases whose deadline has passed; assure the receivers of unfinished prefills that these go on."""
        now = self._clock()
        for turn, lease in list(self._leases.items()):
            if (sequence := lease.unfinished) is not None:
                # Only while there is progress: two workers whose pages wait for each other must not do so for ever.
                late = now > lease.deadline - self.patience * (1 - 1 / SIGNS_OF_LIFE)
                if late and self._engine.has_work:
                    self._offer(turn, lease, sequence, [], lease.published, None)
            elif now > lease.deadline:
                log.warning("turn %s: %s did not fetch its pages in time", turn, lease.destination.name)
                self._end(turn)

    def _end(self, turn: str) -> None:
        """Give the pages back, and drop the work if it is not done."""
        lease = self._leases.pop(turn)
        if lease.unfinished is not None:
            self.abort(turn)  # what it may be fetching
            self._engine.abort(turn)
        elif lease.sequence is None:
            self._engine.pool.release(lease.pages, Keep(), self._clock())
        elif lease.sequence.state is State.PUBLISHED:
            self._engine.unpublish(lease.sequence)
