"""KV pages between GPUs that cannot map each other's memory: the receiver asks, and NCCL carries the pages from
pool to pool, each straight to its place.

Each direction of a pair has a communicator of its own beside its socket, so a send never waits for a receive. The
receiver posts its receive when the sender has said that it sends, so no kernel waits on a GPU for a peer that is slow
to begin.
"""

from __future__ import annotations

import math
import select
import socket
import threading
import time
from dataclasses import dataclass, field

from miniserve.cluster.messages import Peer
from miniserve.kv.side import Fence, FencedCopy, SideStream
from miniserve.kv.transfer.door import Door, receive
from miniserve.kv.transfer.interface import TransferError
from miniserve.kv.transfer.nccl import ID_BYTES, POLL_SECONDS, RECEIVER, SENDER, Nccl
from miniserve.kv.transfer.pair import Asked, Giving, Receiving

ABANDONED_SECONDS = 0.5
"""How long abandoned pages may still be on their way: the engine's next step waits for their end."""
COMING = b"!"
"""What the sender says before it sends."""


class Connection:
    """One meeting of a pair: a socket, until either side leaves; ours does when `closed` is set."""

    def __init__(self, channel: socket.socket, closed: threading.Event) -> None:
        self.channel = channel
        self._closed = closed
        self._deadline = 0.0
        self._hangup = select.poll()
        self._hangup.register(channel, select.POLLRDHUP)

    def check(self) -> None:
        """Raise `TransferError` if a side has left."""
        if self._closed.is_set() or self._hangup.poll(0):
            raise TransferError("the peer has left")

    def allow(self, seconds: float, at_most: bool = False) -> None:
        """How long pages may be on their way from now on; with `at_most`, if they were allowed longer before."""
        end = time.monotonic() + seconds
        self._deadline = min(self._deadline, end) if at_most else end

    def finish(self, fence: Fence) -> None:
        """Wait for pages on their way. Raises `TransferError` if the peer leaves, or they take longer than allowed."""
        while not fence.done:
            self.check()
            if time.monotonic() > self._deadline:
                raise TransferError("the peer is stuck")
            time.sleep(POLL_SECONDS)


class RemoteReceiving(Receiving["RemoteCopy"]):
    """What is given up while the peer is asked for it is written to our page `scratch`."""

    def __init__(self, network: Nccl, side: SideStream, door: Door, peer: Peer, timeout: float) -> None:
        super().__init__(door, peer, timeout)
        self._network = network
        self._side = side
        self._scratch = network.memory.num_pages
        self.thread.start()

    def ask(self, copy: RemoteCopy) -> None:
        # Here, in the thread whose stream is the engine's: the pages come when that is done with ours.
        self._side.follow()
        super().ask(copy)

    def abandon(self, copy: RemoteCopy) -> None:
        with self.lock:
            copy.ours = []
            if copy.fence is not None and not copy.over.is_set():
                self._connection.allow(ABANDONED_SECONDS, at_most=True)
                self._side.lead()

    def _converse(self, channel: socket.socket) -> None:
        self._network.enter_thread()
        identity = receive(channel, ID_BYTES)
        self._connection = Connection(channel, self.closed)
        self._communicator = self._network.join(identity, RECEIVER, self._side, self._connection.check)
        try:
            # Proves that the way is open, and sets it up before a turn needs it. No step reads the scratch page.
            self._connection.allow(self.timeout)
            self._connection.finish(self._communicator.receive([self._scratch]))
            super()._converse(channel)
        finally:
            self._communicator.abort()

    def _receive(self, channel: socket.socket, copy: RemoteCopy) -> bool:
        if not copy.ours:
            return True
        self.request(channel, copy)
        receive(channel, len(COMING))
        with self.lock:
            self._connection.allow(self.timeout)
            copy.fence = self._communicator.receive(copy.ours or [self._scratch] * len(copy.theirs))
        self._connection.finish(copy.fence)
        return self.judged(channel)


class RemoteSending(Giving):
    """The direction in which we send what we are asked for."""

    def __init__(self, network: Nccl, side: SideStream, door: Door, peer: Peer, timeout: float) -> None:
        super().__init__(door, peer, network.memory.num_pages, timeout)
        self._network = network
        self._side = side
        self.thread.start()

    def _converse(self, channel: socket.socket) -> None:
        self._network.enter_thread()
        identity = self._network.identity()
        channel.sendall(identity)
        connection = Connection(channel, self.closed)
        communicator = self._network.join(identity, SENDER, self._side, connection.check)
        try:
            connection.allow(self.timeout)
            connection.finish(communicator.send([0]))
            while True:
                pages, deadline = self.asked(channel)
                channel.sendall(COMING)
                connection.allow(self.timeout)
                connection.finish(communicator.send(pages))
                self.judge(channel, deadline)
        finally:
            communicator.abort()


@dataclass(eq=False)
class RemoteCopy(FencedCopy, Asked):
    """A `Copy`. `ours`, empty when it is given up, and `fence` are guarded by the lock of the direction."""

    receiving: RemoteReceiving
    ours: list[int] = field(default_factory=list)
    ready = True

    def store(self, ours: list[int]) -> None:
        self.ours = ours
        self.receiving.ask(self)

    @property
    def stored(self) -> bool:
        if self.over.is_set() and not self.came:
            raise TransferError("the lease ended before the pages were copied, or the connection to the peer broke")
        return self.came

    def abandon(self) -> None:
        self.receiving.abandon(self)


class RemoteTransfer:
    """A `Transfer` between pools on GPUs, made once for each pair of incarnations."""

    def __init__(self, network: Nccl, door: Door, peer: Peer, timeout: float = 30.0) -> None:
        """`door` is ours."""
        device = network.memory.pages.device
        self._sending = RemoteSending(network, SideStream(device), door, peer, timeout)
        self._receiving = RemoteReceiving(network, SideStream(device), door, peer, timeout)

    def fetch(self, pages: list[int], lease: float = math.inf) -> RemoteCopy:
        """Pages that are never stored are never asked for."""
        return RemoteCopy(pages, lease, self._receiving)

    def close(self) -> None:
        """Nothing waits for the threads: a copy under way is lost when its communicator has been aborted."""
        self._receiving.close()
        self._sending.close()
