"""KV pages between GPUs that cannot map each other's memory: the receiver asks, and a `Link` carries the pages from
pool to pool, each straight to its place.

As with `mapped`, whoever has published pages does nothing more; the lease keeps them whole. Each direction of a pair is
by itself: a socket on which one side asks, and a link of these two. So a send never waits for a receive, and a peer
that dies breaks nothing but its own. Nobody receives before the sender has said that it sends, so no kernel waits on a
GPU for a peer that is slow to begin. A connection that breaks takes along what was under way on it; then both sides
meet again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from abc import ABC, abstractmethod
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

from miniserve.cluster.messages import Peer
from miniserve.kv.memory import KVMemory
from miniserve.kv.side import Fence, SideStream
from miniserve.kv.transfer.interface import TransferError

log = logging.getLogger("miniserve.transfer")

ASKS, OWNS = 0, 1
"""Ranks in a link."""
ABANDONED_SECONDS = 0.5
"""How long pages may still be on their way that nobody wants any more: the engine's next step waits for their end."""
RETRY_SECONDS = 0.1
"""From the end of one connection to the next attempt."""
POLL_SECONDS = 100e-6
"""How often a thread looks whether pages have come: a small part of the milliseconds that a publication takes."""
COMING = b"!"
"""What the owner says before it sends."""


class Link(Protocol):
    """One direction of a pair, beside the engine's steps. Both sides name as many pages, in the same order."""

    def send(self, pages: list[int]) -> Fence:
        """Begin to send pages of our pool, which are complete."""
        ...

    def receive(self, pages: list[int]) -> Fence:
        """Begin to write what the peer sends to pages of our pool."""
        ...

    def abort(self) -> None:
        """Nothing more is read or written when this returns, whatever was under way."""
        ...


class Network(Protocol):
    """Makes links over our pool."""

    def enter_thread(self) -> None:
        """The thread that calls will make links and use them."""
        ...

    def identity(self) -> bytes:
        """What both sides of a new link need to find each other."""
        ...

    def join(self, identity: bytes, rank: int, side: SideStream, check: Callable[[], None]) -> Link:
        """Our end of a link that works on `side`, once both ends are there; raises `TransferError`. Whenever it has to
        wait for the peer, also later, `check` is called; what that raises ends the wait."""
        ...


class Connection:
    """One meeting of a pair: a socket, until either side leaves."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.closed = False
        self._hangup = select.poll()
        self._hangup.register(channel, select.POLLRDHUP)

    def check(self) -> None:
        """Raise `TransferError` if a side has left."""
        if self.closed or self._hangup.poll(0):
            raise TransferError("the peer has left")

    def finish(self, fence: Fence, deadline: Callable[[], float]) -> None:
        """Wait for pages on their way. Raises `TransferError` if the peer leaves, or after the deadline, which may
        change."""
        while not fence.done:
            self.check()
            if time.monotonic() > deadline():
                raise TransferError("the peer is stuck")
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """Leave, from another thread."""
        self.closed = True
        with contextlib.suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)


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

    def deadline(self) -> Callable[[], float]:
        """Of what begins now."""
        end = time.monotonic() + self.timeout
        return lambda: end

    def _run(self) -> None:
        self.network.enter_thread()
        while not self.closed.is_set():
            with contextlib.suppress(OSError), self._connected() as connection:
                try:
                    self._converse(connection)
                except RuntimeError as error:  # a `TransferError`, or what CUDA says
                    if not self.closed.is_set():
                        log.warning("the connection %s broke: %s", os.path.basename(self.path), error)
            self.closed.wait(RETRY_SECONDS)
        self._leave()

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Connection]:
        """A new connection, which `close` can end."""
        with self._meet() as channel:
            connection = Connection(channel)
            with self.lock:
                self.connection = connection
                connection.closed = self.closed.is_set()
            try:
                yield connection
            finally:
                with self.lock:
                    self.connection = None

    @abstractmethod
    def _meet(self) -> socket.socket:
        """Raises OSError if the peer is not there."""

    @abstractmethod
    def _converse(self, connection: Connection) -> None:
        """Use the connection until it breaks."""

    @abstractmethod
    def _leave(self) -> None:
        """The thread ends."""


class Asking(Direction):
    """The direction in which we receive: what was asked for comes in that order."""

    def __init__(self, network: Network, side: SideStream, scratch: int, path: str, timeout: float) -> None:
        """What nobody wants any more by the time it comes is written to our page `scratch`."""
        super().__init__(network, side, path, timeout)
        self._scratch = scratch
        self._link: Link | None = None
        self._early: deque[RemoteCopy] = deque()  # to be asked for as soon as there is a link
        self._asked: deque[RemoteCopy] = deque()
        self.thread.start()

    def ask(self, copy: RemoteCopy) -> None:
        """Ask for the pages of `copy`. Raises `TransferError` if the peer is gone, or leaves too much unanswered."""
        with self.lock:
            if self.closed.is_set():
                raise TransferError("the peer is gone")
            # Now, by the thread whose stream is the engine's: the pages come when that is done with ours.
            self.side.follow()
            if self._link is None:
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
        """See `Copy`."""
        with self.lock:
            if copy in self._early:
                self._early.remove(copy)
            elif copy.fence is None:
                copy.ours = [self._scratch] * len(copy.theirs)
            elif copy in self._asked:
                copy.deadline = min(copy.deadline, time.monotonic() + ABANDONED_SECONDS)
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
        link = self.network.join(identity, ASKS, self.side, connection.check)
        try:
            # Proves that the way is open, and sets it up before a turn needs it. Nobody reads the scratch page.
            connection.finish(link.receive([self._scratch]), self.deadline())
            with self.lock:
                self._link = link
                while self._early:
                    self._ask(self._early[0])
                    self._early.popleft()
            while connection.channel.recv(len(COMING)):
                with self.lock:
                    copy = self._asked[0]
                    copy.deadline = time.monotonic() + self.timeout
                    copy.fence = link.receive(copy.ours)
                connection.finish(copy.fence, copy.due)
                with self.lock:
                    copy.over = True
                    self._asked.popleft()
        finally:
            link.abort()
            with self.lock:
                self._link = None
                while self._asked:
                    self._asked.popleft().lost = True

    def _leave(self) -> None:
        with self.lock:
            while self._early:
                self._early.popleft().lost = True


class Owning(Direction):
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
        """See `Direction`."""
        super().close()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes who waits for the peer

    def _meet(self) -> socket.socket:
        return self._listener.accept()[0]

    def _converse(self, connection: Connection) -> None:
        identity = self.network.identity()
        connection.channel.send(identity)
        link = self.network.join(identity, OWNS, self.side, connection.check)
        try:
            connection.finish(link.send([0]), self.deadline())
            while asked := connection.channel.recv(4 * self._num_pages):
                pages = array("i", asked).tolist()
                if not 0 <= min(pages) <= max(pages) < self._num_pages:
                    raise TransferError(f"it asks for pages {min(pages)} to {max(pages)} of {self._num_pages}")
                connection.channel.send(COMING)
                connection.finish(link.send(pages), self.deadline())
        finally:
            link.abort()

    def _leave(self) -> None:
        self._listener.close()


class RemoteCopy:
    """See `Copy`. All but `theirs` is guarded by the lock of the direction."""

    ready = True

    def __init__(self, asking: Asking, theirs: list[int]) -> None:
        self.theirs = theirs
        self.ours: list[int] = []
        self.fence: Fence | None = None
        """Of the pages, once they are coming, until `deadline`."""
        self.deadline = 0.0
        self.over = self.lost = False
        self._asking = asking

    def due(self) -> float:
        """`deadline`, as of now."""
        return self.deadline

    def store(self, ours: list[int]) -> None:
        """See `Copy`."""
        self.ours = ours
        self._asking.ask(self)

    @property
    def stored(self) -> bool:
        """See `Copy`."""
        if self.lost:
            raise TransferError("the connection to the peer broke")
        return self.over

    @property
    def seconds(self) -> float:
        """See `Copy`."""
        return self.fence.seconds if self.fence is not None else 0.0

    def abandon(self) -> None:
        """See `Copy`."""
        self._asking.abandon(self)


class RemoteTransfer:
    """See `Transfer`; made once for each pair of incarnations, of pools on GPUs."""

    name = "collective"

    def __init__(
        self, network: Network, memory: KVMemory, us: tuple[str, int], peer: Peer, run_dir: str, timeout: float = 30.0
    ) -> None:
        """`us` is our name and epoch; the sockets are in `run_dir`. Raises OSError if there can be none."""

        def path(owner: tuple[str, int], asks: tuple[str, int]) -> str:
            return f"{run_dir}/pages-{owner[0]}.{owner[1]}-{asks[0]}.{asks[1]}"

        them = (peer.name, peer.epoch)
        device = memory.pages.device
        self._owning = Owning(network, SideStream(device), memory.num_pages, path(us, them), timeout)
        self._asking = Asking(network, SideStream(device), memory.num_pages, path(them, us), timeout)

    def offer(self, pages: list[int]) -> tuple[int, int]:
        """See `Transfer`. What is published is complete on the device: the peer may have it at once."""
        return (0, 0)

    def fetch(self, ticket: tuple[int, int], pages: list[int]) -> RemoteCopy:
        """See `Transfer`. Pages that nobody stores are never asked for."""
        return RemoteCopy(self._asking, pages)

    def close(self) -> None:
        """See `Transfer`. Nothing waits for the threads: a copy under way is lost when its link has been aborted."""
        self._asking.close()
        self._owning.close()
