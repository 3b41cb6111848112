"""The sender's side of handoffs: it prefills for another worker, publishes finished pages, and keeps them on lease."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from miniserve.cluster.messages import Fetch, FirstToken, Keep, Message, Peer, Prefill, PrefillRefused, Publish
from miniserve.worker.engine import Engine
from miniserve.worker.peers import PeerTable
from miniserve.worker.sequence import Sequence, State

log = logging.getLogger("miniserve.handoff")

PIECE = 32
"""Pages of history in one publication: the receiver stores one piece between two of its steps."""
SIGNS_OF_LIFE = 4
"""Publications without pages that P sends within the deadline, while a prefill waits or takes its time."""


@dataclass
class Lease:
    """The handoff of a `turn`: pages are kept for `destination`, those of a `sequence` that is prefilled for it, or the
    `pages` of a history it has fetched. The first `published` pages of the prompt are known to the receiver, which gets
    the pages of the recurrent `state` after them at the end."""

    turn: str
    destination: Peer
    pages: list[int]
    published: int
    deadline: float
    sequence: Sequence | None = None
    state: list[int] = field(default_factory=list)

    @property
    def unfinished(self) -> bool:
        """Whether the sequence is still prefilled."""
        return self.sequence is not None and self.sequence.state not in (State.PUBLISHED, State.FINISHED)


@dataclass(eq=False)
class Sender:
    """The handoffs in which this worker gives KV; `abort_fetch` ends what a turn fetches. See `Handoffs`."""

    engine: Engine
    peers: PeerTable
    layout: str
    patience: float
    send: Callable[[str, Message], None]
    abort_fetch: Callable[[str], None]
    clock: Callable[[], float]
    leases: dict[str, Lease] = field(default_factory=dict)
    """Those under way, by turn."""

    def release_the_dead(self) -> None:
        for turn, lease in list(self.leases.items()):
            if not self.peers.lives(lease.destination.name, lease.destination.epoch):
                self.on_release(turn)

    def on_prefill(self, message: Prefill, destination: str) -> None:
        """Queue a prefill for another worker, or refuse what can never fit."""
        peer = self.peers.living[destination]
        size = self.engine.page_tokens
        pages = -(-len(message.tokens) // size)
        if not 0 < len(message.tokens) < self.engine.max_model_len or pages > self.engine.pool.num_pages:
            self.send(peer.address, PrefillRefused(message.turn, f"{len(message.tokens)} tokens do not fit"))
            return
        sequence = Sequence.of(message, self.layout)
        sequence.prefill_for, sequence.history_pages = destination, message.have // size
        sequence.history_at = destination if message.share_history else None
        deadline = self.clock() + self.patience
        self.leases[message.turn] = Lease(message.turn, peer, [], message.have // size, deadline, sequence)
        self.engine.add(sequence)

    def publish(self, sequence: Sequence, first: FirstToken | None) -> None:
        """Publish to D the pages that a step has finished; the `first` token ends the prefill."""
        lease = self.leases.get(sequence.turn)
        if lease is None:
            return
        size, handed = self.engine.page_tokens, self.engine.handed(sequence)
        ready = -(-handed // size) if first else min(sequence.computed, handed) // size
        if ready <= lease.published and not first:
            return
        hashes = sequence.given_hashes(size)[lease.published : ready]
        pages = sequence.pages[lease.published : ready]
        lease.state = [page for at in sequence.snapshots if first and at.tokens == handed for page in at.pages]
        self._offer(lease, pages, hashes, last=first is not None, first=first)
        if first:
            self.engine.publish(sequence)

    def refuse(self, sequence: Sequence, reason: str) -> None:
        """The engine cannot finish a prefill for another worker: that one does it itself."""
        if lease := self.leases.pop(sequence.turn, None):
            self.send(lease.destination.address, PrefillRefused(sequence.turn, reason))

    def on_fetch(self, message: Fetch, destination: str) -> None:
        """Publish what is here of a conversation's history."""
        pages = self.engine.history(message.hashes)
        count, state = len(pages), list[int]()
        if (snapshots := self.engine.snapshots) is not None:
            # As far as there is a snapshot.
            while count and not (state := snapshots.match(message.hashes[count - 1])):
                count -= 1
        lease = Lease(message.turn, self.peers.living[destination], pages, message.first, 0.0, state=state)
        self.leases[message.turn] = lease
        for start in range(0, max(count, 1), PIECE):
            end = min(start + PIECE, count)
            self._offer(lease, pages[start:end], message.hashes[start:end], last=end == count, first=None)

    def _offer(self, lease: Lease, pages: list[int], hashes: list[bytes], last: bool, first: FirstToken | None) -> None:
        """Publish the next `pages` of a lease, which have these `hashes`, and with the `last` ones the state."""
        now, history, state = self.clock(), lease.sequence is None, lease.state if last else []
        lease.deadline = now + self.patience
        what = lease.turn, lease.published, pages, hashes, now, lease.deadline, last, first, history, state
        self.send(lease.destination.address, Publish(*what))
        lease.published += len(pages)

    def expire(self) -> None:
        """End the leases whose deadline has passed; assure the receivers of unfinished prefills that these go on."""
        now = self.clock()
        for turn, lease in list(self.leases.items()):
            if lease.unfinished:
                # Only while there is progress: two workers whose pages wait for each other must not do so for ever.
                late = now > lease.deadline - self.patience * (1 - 1 / SIGNS_OF_LIFE)
                if late and self.engine.has_work:
                    self._offer(lease, [], [], last=False, first=None)
            elif now > lease.deadline:
                log.warning("turn %s: %s did not fetch its pages in time", turn, lease.destination.name)
                self.on_release(turn)

    def on_release(self, turn: str) -> None:
        """The handoff is over, if there is one: give the pages back, and drop the work if it is not done."""
        if (lease := self.leases.pop(turn, None)) is None:
            return
        if lease.unfinished:
            self.abort_fetch(turn)
            self.engine.abort(turn)
        elif lease.sequence is None:
            self.engine.pool.release(lease.pages + lease.state, Keep(), self.clock())
        elif lease.sequence.state is State.PUBLISHED:
            self.engine.unpublish(lease.sequence)
