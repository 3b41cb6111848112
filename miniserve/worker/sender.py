"""The sender's side of handoffs: it prefills for another worker, publishes finished pages, and keeps them on lease."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from miniserve.cluster.messages import Fetch, FirstToken, Keep, Message, Peer, Prefill, PrefillRefused, Publish
from miniserve.kv.hashing import root_hash
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
    """A handoff under way: pages are kept for `destination`, those of a `sequence` that is prefilled for it, or the
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


class Sender:
    """The handoffs in which this worker gives KV. `abort_fetch` ends what a turn may be fetching itself; the other
    arguments are those of `Handoffs`."""

    def __init__(
        self,
        engine: Engine,
        peers: PeerTable,
        layout: str,
        patience: float,
        send: Callable[[str, Message], None],
        abort_fetch: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._peers = peers
        self._layout = layout
        self._patience = patience
        self._send = send
        self._abort_fetch = abort_fetch
        self._clock = clock
        self._leases: dict[str, Lease] = {}

    @property
    def num_leases(self) -> int:
        return len(self._leases)

    def release_the_dead(self) -> None:
        for turn, lease in list(self._leases.items()):
            if not self._peers.lives(lease.destination):
                self._end(turn)

    def on_prefill(self, message: Prefill, destination: str) -> None:
        """Queue a prefill for another worker, or refuse what can never fit."""
        peer = self._peers[destination]
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
            history_pages=message.have // size,
            keep=message.keep,
        )
        deadline = self._clock() + self._patience
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
        peer, transfer = self._peers[destination], self._peers.transfer(destination)
        now = self._clock()
        deadline = now + self._patience
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
        transfer = self._peers.transfer(lease.destination.name)
        fresh = pages[lease.published : ready]
        now = self._clock()
        lease.deadline = now + self._patience
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
        if turn in self._leases:
            self._end(turn)

    def expire(self) -> None:
        """End the leases whose deadline has passed; assure the receivers of unfinished prefills that these go on."""
        now = self._clock()
        for turn, lease in list(self._leases.items()):
            if (sequence := lease.unfinished) is not None:
                # Only while there is progress: two workers whose pages wait for each other must not do so for ever.
                late = now > lease.deadline - self._patience * (1 - 1 / SIGNS_OF_LIFE)
                if late and self._engine.has_work:
                    self._offer(turn, lease, sequence, [], lease.published, None)
            elif now > lease.deadline:
                log.warning("turn %s: %s did not fetch its pages in time", turn, lease.destination.name)
                self._end(turn)

    def _end(self, turn: str) -> None:
        """Give the pages back, and drop the work if it is not done."""
        lease = self._leases.pop(turn)
        if lease.unfinished is not None:
            self._abort_fetch(turn)
            self._engine.abort(turn)
        elif lease.sequence is None:
            self._engine.pool.release(lease.pages, Keep(), self._clock())
        elif lease.sequence.state is State.PUBLISHED:
            self._engine.unpublish(lease.sequence)
