"""KV pages between GPUs that cannot map each other's memory: the receiver asks, and a `Communicator` carries the pages
from pool to pool, each straight to its place.

As with `mapped`, the publisher does nothing more for its pages; the lease keeps them whole. Each direction of a pair is
by itself: a socket on which the receiver asks, and a communicator of these two. So a send never waits for a receive,
and a peer that dies breaks only its own pair. The receiver posts its receive when the sender has said that it sends, so
no kernel waits on a GPU for a peer that is slow to begin. A connection that breaks takes along what was under way on
it; then both sides meet again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from abc import ABC, abstractmethod
from array import array
from collections import deque
from dataclasses import dataclass, field

from miniserve.cluster.messages import Peer
from miniserve.kv.memory import KVMemory
from miniserve.kv.side import FencedCopy, SideStream
from miniserve.kv.transfer.interface import TransferError
from miniserve.kv.transfer.network import RECEIVER, SENDER, Communicator, Connection, Network

log = logging.getLogger("miniserve.transfer")

ABANDONED_SECONDS = 0.5
"""How long abandoned pages may still be on their way: the engine's next step waits for their end."""
RETRY_SECONDS = 0.1
"""From the end of one connection to the next attempt."""
COMING = b"!"
"""What the sender says before it sends."""


class Direction(ABC):
    """One direction of a pair. Its thread meets the peer, again and again until `close`."""

    def __init__(self, network: Network, side: SideStream, path: str, timeout: float) -> None:
        """The owner of the pages listens at `path`. A peer that has begun and does not end within `timeout` seconds is
        taken for hung."""
        self.network = network
        self.side = side
        self.path = path
        self.timeout = timeout
        self.closed = threading.Event()
        self.lock = threading.Lock()
        self.connection: Connection | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def close(self) -> None:
        """The thread ends soon. What it has begun to write is complete or dropped by then."""
        self.closed.set()
        with self.lock:
            if self.connection is not None:
                self.connection.close()

    def _run(self) -> None:
        self.network.enter_thread()
        while not self.closed.is_set():
            with contextlib.suppress(OSError), self._meet() as channel:
                connection = Connection(channel)
                with self.lock:
                    self.connection = connection
                    connection.closed = self.closed.is_set()
                try:
                    self._converse(connection)
                except RuntimeError as error:  # a `TransferError`, or what CUDA says
                    if not self.closed.is_set():
                        log.warning("the connection %s broke: %s", os.path.basename(self.path), error)
                finally:
                    with self.lock:
                        self.connection = None
            self.closed.wait(RETRY_SECONDS)

    @abstractmethod
    def _meet(self) -> socket.socket:
        """Raises OSError if the peer is not there."""

    @abstractmethod
    def _converse(self, connection: Connection) -> None:
        """Use the connection until it breaks."""


class Receiving(Direction):
    """The direction in which we receive: what was asked for comes in that order."""

    def __init__(self, network: Network, side: SideStream, scratch: int, path: str, timeout: float) -> None:
        """What is abandoned before it comes is written to our page `scratch`."""
        super().__init__(network, side, path, timeout)
        self._scratch = scratch
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
            self.side.follow()
            if self._communicator is None:
                self._early.append(copy)
            else:
                self._ask(copy)

    def _ask(self, copy: RemoteCopy) -> None:
        assert self.connection is not None
        try:
            self.connection.channel.send(array("i", copy.theirs).tobytes(), socket.MSG_DONTWAIT)
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
                assert self.connection is not None
                self.connection.allow(ABANDONED_SECONDS, at_most=True)
                self.side.lead()

    def _meet(self) -> socket.socket:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            channel.connect(self.path)
        except OSError:
            channel.close()
            raise
        return channel

    def _converse(self, connection: Connection) -> None:
        if not (identity := connection.channel.recv(1024)):
            return
        communicator = self.network.join(identity, RECEIVER, self.side, connection.check)
        try:
            # Proves that the way is open, and sets it up before a turn needs it. No step reads the scratch page.
            connection.allow(self.timeout)
            connection.finish(communicator.receive([self._scratch]))
            with self.lock:
                self._communicator = communicator
                while self._early:
                    self._ask(self._early[0])
                    self._early.popleft()
            while connection.channel.recv(len(COMING)):
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
        super().__init__(network, side, path, timeout)
        self._num_pages = num_pages
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # of a pair that was parted and meets again
        self._listener.bind(path)
        self._listener.listen()
        self.thread.start()

    def close(self) -> None:
        super().close()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`

    def _meet(self) -> socket.socket:
        return self._listener.accept()[0]

    def _converse(self, connection: Connection) -> None:
        identity = self.network.identity()
        connection.channel.send(identity)
        communicator = self.network.join(identity, SENDER, self.side, connection.check)
        try:
            connection.allow(self.timeout)
            connection.finish(communicator.send([0]))
            while asked := connection.channel.recv(4 * self._num_pages):
                pages = array("i", asked).tolist()
                if not 0 <= min(pages) <= max(pages) < self._num_pages:
                    raise TransferError(f"it asks for pages {min(pages)} to {max(pages)} of {self._num_pages}")
                connection.channel.send(COMING)
                connection.allow(self.timeout)
                connection.finish(communicator.send(pages))
        finally:
            communicator.abort()

    def _run(self) -> None:
        with self._listener:
            super()._run()


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

        def path(owner: tuple[str, int], asks: tuple[str, int]) -> str:
            return f"{run_dir}/pages-{owner[0]}.{owner[1]}-{asks[0]}.{asks[1]}"

        them = (peer.name, peer.epoch)
        device = memory.pages.device
        self._sending = Sending(network, SideStream(device), memory.num_pages, path(us, them), timeout)
        self._receiving = Receiving(network, SideStream(device), memory.num_pages, path(them, us), timeout)

    def offer(self, pages: list[int]) -> tuple[int, int]:
        """What is published is complete on the device: the peer may have it at once."""
        return (0, 0)

    def fetch(self, ticket: tuple[int, int], pages: list[int]) -> RemoteCopy:
        """Pages that are never stored are never asked for."""
        return RemoteCopy(self._receiving, pages)

    def close(self) -> None:
        """Nothing waits for the threads: a copy under way is lost when its communicator has been aborted."""
        self._receiving.close()
        self._sending.close()
