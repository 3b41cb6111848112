"""KV pages between GPUs that cannot map each other's memory: the receiver asks, and a `Communicator` carries the pages
from pool to pool, each straight to its place.

Each direction of a pair has a communicator of its own beside its socket, so a send never waits for a receive. The
receiver posts its receive when the sender has said that it sends, so no kernel waits on a GPU for a peer that is slow
to begin.
"""

from __future__ import annotations

import socket
from collections import deque
from dataclasses import dataclass, field

from miniserve.cluster.messages import Peer
from miniserve.kv.memory import KVMemory
from miniserve.kv.side import FencedCopy, SideStream
from miniserve.kv.transfer.interface import TransferError
from miniserve.kv.transfer.network import RECEIVER, SENDER, Communicator, Connection, Network
from miniserve.kv.transfer.pair import Direction, paths, request, requested

ABANDONED_SECONDS = 0.5
"""How long abandoned pages may still be on their way: the engine's next step waits for their end."""
COMING = b"!"
"""What the sender says before it sends."""


class Receiving(Direction):
    """The direction in which we receive: what was asked for comes in that order."""

    def __init__(self, network: Network, side: SideStream, scratch: int, path: str, timeout: float) -> None:
        """What is abandoned before it comes is written to our page `scratch`."""
        super().__init__(path, timeout, owner=False)
        self._network = network
        self._side = side
        self._scratch = scratch
        self._connection: Connection | None = None
        self._communicator: Communicator | None = None
        self._early: deque[RemoteCopy] = deque()  # to be asked for as soon as there is a communicator
        self._asked: deque[RemoteCopy] = deque()
        self.thread.start()

    def ask(self, copy: RemoteCopy) -> None:
        """Ask for the pages of `copy`. Raises `TransferError` if the peer is gone, or leaves too much unanswered."""
        with self.lock:
            if self.closed.is_set():
                raise TransferError("the peer is gone")
            # Here, in the thread whose stream is the engine's: the pages come when that is done with ours.
            self._side.follow()
            if self._communicator is None:
                self._early.append(copy)
            else:
                self._ask(copy)

    def _ask(self, copy: RemoteCopy) -> None:
        assert self._connection is not None
        try:
            self._connection.channel.send(request(copy.theirs), socket.MSG_DONTWAIT)
        except OSError as error:
            raise TransferError(f"the peer does not answer ({error.strerror})") from error
        self._asked.append(copy)

    def abandon(self, copy: RemoteCopy) -> None:
        with self.lock:
            if copy in self._early:
                self._early.remove(copy)
            elif copy.fence is None:
                copy.ours = [self._scratch] * len(copy.theirs)
            elif copy in self._asked:
                assert self._connection is not None
                self._connection.allow(ABANDONED_SECONDS, at_most=True)
                self._side.lead()

    def _converse(self, channel: socket.socket) -> None:
        self._network.enter_thread()
        if not (identity := channel.recv(1024)):
            return
        connection = Connection(channel, self.closed)
        communicator = self._network.join(identity, RECEIVER, self._side, connection.check)
        try:
            # Proves that the way is open, and sets it up before a turn needs it. No step reads the scratch page.
            connection.allow(self.timeout)
            connection.finish(communicator.receive([self._scratch]))
            with self.lock:
                self._communicator, self._connection = communicator, connection
                while self._early:
                    self._ask(self._early[0])
                    self._early.popleft()
            while channel.recv(len(COMING)):
                with self.lock:
                    copy = self._asked[0]
                    connection.allow(self.timeout)
                    copy.fence = communicator.receive(copy.ours)
                connection.finish(copy.fence)
                with self.lock:
                    copy.over = True
                    self._asked.popleft()
        finally:
            communicator.abort()
            with self.lock:
                self._communicator = None
                while self._asked:
                    self._asked.popleft().lost = True

    def _run(self) -> None:
        super()._run()
        with self.lock:
            while self._early:
                self._early.popleft().lost = True


class Sending(Direction):
    """The direction in which we send what we are asked for."""

    def __init__(self, network: Network, side: SideStream, num_pages: int, path: str, timeout: float) -> None:
        """Pages below `num_pages` can be had. Raises OSError."""
        super().__init__(path, timeout, owner=True)
        self._network = network
        self._side = side
        self._num_pages = num_pages
        self.thread.start()

    def _converse(self, channel: socket.socket) -> None:
        self._network.enter_thread()
        identity = self._network.identity()
        channel.send(identity)
        connection = Connection(channel, self.closed)
        communicator = self._network.join(identity, SENDER, self._side, connection.check)
        try:
            connection.allow(self.timeout)
            connection.finish(communicator.send([0]))
            while asked := channel.recv(4 * self._num_pages):
                pages = requested(asked, self._num_pages)
                channel.send(COMING)
                connection.allow(self.timeout)
                connection.finish(communicator.send(pages))
        finally:
            communicator.abort()


@dataclass(eq=False)
class RemoteCopy(FencedCopy):
    """A `Copy`. All but `theirs` is guarded by the lock of the direction."""

    receiving: Receiving
    theirs: list[int]
    ours: list[int] = field(default_factory=list)
    over: bool = False
    lost: bool = False
    ready = True

    def store(self, ours: list[int]) -> None:
        self.ours = ours
        self.receiving.ask(self)

    @property
    def stored(self) -> bool:
        if self.lost:
            raise TransferError("the connection to the peer broke")
        return self.over

    def abandon(self) -> None:
        self.receiving.abandon(self)


class RemoteTransfer:
    """A `Transfer` between pools on GPUs, made once for each pair of incarnations."""

    name = "collective"

    def __init__(
        self, network: Network, memory: KVMemory, us: tuple[str, int], peer: Peer, run_dir: str, timeout: float = 30.0
    ) -> None:
        """`us` is our name and epoch; the sockets are in `run_dir`. Raises OSError if there can be none."""
        here, there = paths(us, peer, run_dir)
        device = memory.pages.device
        self._sending = Sending(network, SideStream(device), memory.num_pages, here, timeout)
        self._receiving = Receiving(network, SideStream(device), memory.num_pages, there, timeout)

    def fetch(self, pages: list[int]) -> RemoteCopy:
        """Pages that are never stored are never asked for."""
        return RemoteCopy(self._receiving, pages)

    def close(self) -> None:
        """Nothing waits for the threads: a copy under way is lost when its communicator has been aborted."""
        self._receiving.close()
        self._sending.close()
