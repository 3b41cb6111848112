"""Moving a turn's KV from one worker to another.

Prefill: the home D reserves pages, then asks the prefiller P. After each chunk P publishes the finished pages; D checks
their hashes against its own chain and copies them between steps. The last publication is the commit and carries the
first token. History: a worker that lacks the KV of earlier turns fetches it from the worker that has it; the answer is
publications too. So P gets what D holds of a conversation, and a new home what the old one holds.

The receiver (`receiver.py`) ends a handoff with a `Release`. The lease of the sender (`sender.py`) on the published
pages ends by that release, by the receiver's death, or at the deadline. The receiver gives up when the sender dies, or
when nothing has come for as long. Whatever goes wrong, the receiver computes what it lacks itself. A turn that runs
again elsewhere has another name there: handoffs are never mixed up.
"""

import time
from collections.abc import Callable

from miniserve.cluster.messages import Fetch, Message, Peer, PeerMessage, Prefill, PrefillRefused, Publish, Release
from miniserve.kv.transfer.interface import Transfer
from miniserve.worker.engine import Engine
from miniserve.worker.peers import PeerTable
from miniserve.worker.receiver import Receiver
from miniserve.worker.sender import Sender


class Handoffs:
    """All handoffs of one worker, whose pages have `page_bytes` bytes: it may be the receiver of some and the sender of
    others. `layout` is the root of all page hashes.

    `send` takes a peer's address and a message; `patience` is the deadline in seconds. `connect` finds the way to a
    peer's pages, None if there is none. `clock` is the host's monotonic clock, which both sides read.
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
        self.patience = patience
        self.peers = PeerTable(connect)
        self.receiver = Receiver(engine, self.peers, page_bytes, patience, send, clock)
        self.sender = Sender(engine, self.peers, layout, patience, send, self.receiver.abort, clock)

    def set_peers(self, peers: list[Peer]) -> None:
        """The workers that live now. What was shared with others is settled at once."""
        self.peers.replace(peers)
        self.receiver.give_up_the_dead()
        self.sender.release_the_dead()

    def handle(self, peer: str, message: PeerMessage) -> None:
        """Act on a message of a peer that lives."""
        match message:
            case Prefill():
                self.sender.on_prefill(message, peer)
            case Fetch():
                self.sender.on_fetch(message, peer)
            case Publish():
                self.receiver.on_publish(message, peer)
            case Release(turn):
                self.sender.on_release(turn)
            case PrefillRefused():
                self.receiver.on_refused(message)
