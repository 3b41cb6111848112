"""Moving a turn's KV from the worker that prefilled it (P) to the one that decodes it (D). Both sides are here.

D reserves pages, then asks P. After each chunk P publishes the finished pages; D checks their hashes against its own
chain and copies them between steps. The last publication is the commit and carries the first token; D answers with a
release. P's lease on the published pages ends by that release, by D's death, or at the deadline. Whatever goes wrong,
D computes what it lacks itself. A turn that runs again elsewhere has another name there: handoffs are never mixed up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from miniserve.cluster.messages import (
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
from miniserve.kv.memory import KVMemory
from miniserve.kv.transfer import Transfer, connect
from miniserve.worker.engine import Engine
from miniserve.worker.sequence import Sequence, Status

log = logging.getLogger("miniserve.handoff")


@dataclass
class Pull:
    """D's side: `sequence` is filled from `source`."""

    sequence: Sequence
    source: Peer
    transfer: Transfer
    pages: int = 0
    seconds: float = 0.0


@dataclass
class Lease:
    """P's side: pages of `sequence` are kept for `destination`. `published` pages are known to D."""

    sequence: Sequence
    destination: Peer
    published: int
    deadline: float = float("inf")


class Handoffs:
    """All handoffs of one worker. `send` takes a peer's address and a message; `deadline` is in seconds.

    `clock` is the host's monotonic clock, which both sides read.
    """

    def __init__(
        self,
        engine: Engine,
        memory: KVMemory,
        layout: str,
        deadline: float,
        send: Callable[[str, Message], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.moves: list[Move] = []
        """Handoffs that ended well since somebody last took them."""
        self.outputs: list[TurnOutput] = []
        """First tokens that came with a commit, likewise."""
        self._engine = engine
        self._memory = memory
        self._layout = layout
        self._deadline = deadline
        self._send = send
        self._clock = clock
        self._peers: dict[str, tuple[Peer, Transfer | None]] = {}
        self._announced: dict[str, int] = {}
        self._pulls: dict[str, Pull] = {}
        self._leases: dict[str, Lease] = {}

    @property
    def num_leases(self) -> int:
        """Turns whose pages are kept for another worker."""
        return len(self._leases)

    def epoch(self, name: str) -> int:
        """The living incarnation of a peer, -1 if there is none."""
        return self._peers[name][0].epoch if name in self._peers else -1

    def announced(self, name: str) -> int:
        """The latest incarnation of a peer that we were ever told of, -1 if none: what a later one sends is early."""
        return self._announced.get(name, -1)

    def set_peers(self, peers: list[Peer]) -> None:
        """The workers that live now. What was shared with others is settled at once."""
        known = self._peers
        self._peers = {}
        for peer in peers:
            self._announced[peer.name] = peer.epoch
            old = known.get(peer.name)
            same = old is not None and old[0] == peer
            self._peers[peer.name] = old if same and old else (peer, connect(self._memory, self._layout, peer.pool))
        for turn, pull in list(self._pulls.items()):
            if self.epoch(pull.source.name) != pull.source.epoch:
                self._give_up(turn, f"{pull.source.name} is gone")
        for turn, lease in list(self._leases.items()):
            if self.epoch(lease.destination.name) != lease.destination.epoch:
                self._end(turn)

    # --- D ----------------------------------------------------------------------------------------------------------

    def request(self, sequence: Sequence, salt: str) -> None:
        """`sequence` has just got all its pages: ask its prefiller to fill them."""
        peer, transfer = self._peers.get(sequence.prefill_at, (None, None))
        if peer is None or transfer is None:
            log.warning("turn %s: no way to pages of %s, prefilling here", sequence.turn, sequence.prefill_at)
            self._engine.resume(sequence)
            return
        self._pulls[sequence.turn] = Pull(sequence, peer, transfer)
        self._send(
            peer.address,
            Prefill(
                turn=sequence.turn,
                tokens=sequence.tokens,
                params=sequence.params,
                seed=sequence.seed,
                salt=salt,
                prior=sequence.prior,
                have=sequence.computed,
            ),
        )

    def on_publish(self, message: Publish) -> None:
        """Copy what P has finished; with the commit the sequence is ours."""
        pull = self._pulls.get(message.turn)
        if pull is None or pull.sequence.status is not Status.RECEIVING:
            return
        sequence, size = pull.sequence, self._engine.page_tokens
        end = message.first + len(message.pages)
        if message.first * size != sequence.computed or end > len(sequence.pages):
            self._give_up(message.turn, f"pages {message.first} to {end} do not follow {sequence.computed} tokens")
            return
        if message.hashes != sequence.given_hashes(size)[message.first : end]:
            self._give_up(message.turn, "the pages hold other tokens than ours")
            return
        started = self._clock()
        pull.transfer.pull(message.pages, sequence.pages[message.first : end])
        copied = self._clock()
        pull.seconds += copied - started
        late = copied > message.deadline
        if not late:
            pull.pages += len(message.pages)
            sequence.computed = min(end * size, sequence.given)
            self._engine.register(sequence)
        if message.commit is not None and end == len(sequence.pages):
            # The client may have this token already: we go on from it even if we have to compute the pages.
            sequence.tokens += message.commit.tokens
            sequence.finish = message.commit.finish
            self.outputs.append(message.commit)
        if late:
            self._give_up(message.turn, "the lease ended before the pages were copied")  # P may have reused one by then
        elif message.commit is not None:
            self._complete(pull)

    def _complete(self, pull: Pull) -> None:
        """All that P had is here."""
        sequence = pull.sequence
        if sequence.computed != sequence.given:
            self._give_up(sequence.turn, f"the commit came at {sequence.computed} of {sequence.given} tokens")
            return
        del self._pulls[sequence.turn]
        self._send(pull.source.address, Release(sequence.turn))
        self.moves.append(
            Move(
                turn=sequence.turn,
                source=pull.source.name,
                pages=pull.pages,
                bytes=pull.pages * self._memory.shape.bytes,
                seconds=pull.seconds,
            )
        )
        self._go_on(sequence)

    def _go_on(self, sequence: Sequence) -> None:
        """The rest of the turn is ours, if there is any."""
        if sequence.finish:
            self._engine.finish(sequence)
        else:
            self._engine.resume(sequence)

    def on_refused(self, message: PrefillRefused) -> None:
        """P will not do it."""
        if message.turn in self._pulls:
            self._give_up(message.turn, message.reason)

    def abort(self, turn: str) -> None:
        """The client has left: P need not go on."""
        if pull := self._pulls.pop(turn, None):
            self._send(pull.source.address, Release(turn))

    def _give_up(self, turn: str, reason: str) -> None:
        """Go on alone from the last token that was verified."""
        pull = self._pulls.pop(turn)
        log.warning("turn %s: handoff from %s failed (%s), prefilling here", turn, pull.source.name, reason)
        if self.epoch(pull.source.name) == pull.source.epoch:
            self._send(pull.source.address, Release(turn))
        self._go_on(pull.sequence)

    # --- P ----------------------------------------------------------------------------------------------------------

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
        )
        self._leases[message.turn] = Lease(sequence, peer, message.have // size)
        self._engine.add(sequence)

    def publish(self, sequence: Sequence, first_token: TurnOutput | None) -> None:
        """Tell D which pages a step has finished; `first_token` (what is reported of it) ends the prefill."""
        lease = self._leases.get(sequence.turn)
        if lease is None:
            return
        size = self._engine.page_tokens
        ready = len(sequence.pages) if first_token else sequence.computed // size
        if ready <= lease.published and not first_token:
            return
        deadline = self._clock() + self._deadline
        self._send(
            lease.destination.address,
            Publish(
                turn=sequence.turn,
                first=lease.published,
                pages=sequence.pages[lease.published : ready],
                hashes=sequence.given_hashes(size)[lease.published : ready],
                deadline=deadline,
                commit=first_token,
            ),
        )
        lease.published = ready
        if first_token:
            lease.deadline = deadline
            self._engine.finish(sequence, keep_pages=True)

    def on_release(self, turn: str) -> None:
        """D has what it wants, or wants no more."""
        if turn in self._leases:
            self._end(turn)

    def expire(self) -> None:
        """End the leases whose deadline has passed."""
        now = self._clock()
        for turn in [turn for turn, lease in self._leases.items() if now > lease.deadline]:
            log.warning("turn %s: %s did not fetch its pages in time", turn, self._leases[turn].destination.name)
            self._end(turn)

    def _end(self, turn: str) -> None:
        """Give the pages back, and drop the work if it is not done."""
        sequence = self._leases.pop(turn).sequence
        if sequence.status is Status.FINISHED:
            self._engine.pool.release(sequence.pages)
            sequence.pages = []
        else:
            self._engine.abort(turn)
