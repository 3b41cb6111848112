"""How two workers meet whose pools cannot be mapped: each direction is a connection of its own, on which the receiver
asks.

What is asked for is the numbers of pages of the owner's pool. A peer that dies breaks only its own pair: a connection
that breaks takes along what was asked for on it, then both sides meet again. The receiver notices that when it asks.
"""

import contextlib
import logging
import socket
import struct
import threading
import time
from abc import ABC, abstractmethod
from array import array
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Generic, TypeVar

from miniserve.cluster.messages import Peer
from miniserve.kv.transfer.door import Door, receive
from miniserve.kv.transfer.interface import TransferError

log = logging.getLogger("miniserve.transfer")

RETRY_SECONDS = 0.1
"""From the end of one connection to the next attempt."""
REQUEST = struct.Struct("<Id")
"""What comes before the numbers of the pages that are asked for: how many, and until when they are on lease."""


class Direction(ABC):
    """One direction of a pair. Its thread, to be started by the one who makes it, meets the `peer` again and again
    until `close`."""

    def __init__(self, door: Door, peer: Peer, timeout: float) -> None:
        """A peer that has begun and does not end within `timeout` seconds is taken for hung."""
        self.door, self.peer, self.timeout = door, peer, timeout
        self.closed = threading.Event()
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self._channel: socket.socket | None = None

    def close(self) -> None:
        """The thread ends soon. What it has begun to write is complete or dropped by then."""
        self.closed.set()
        with self.lock:
            if self._channel is not None:
                with contextlib.suppress(OSError):
                    self._channel.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        while not self.closed.is_set():
            with contextlib.suppress(OSError, TransferError), self._meet() as channel:
                with self.lock:
                    self._channel = channel
                try:
                    if not self.closed.is_set():
                        self._converse(channel)
                except (OSError, RuntimeError) as error:  # RuntimeError: a `TransferError`, or what CUDA says
                    if not self.closed.is_set():
                        log.warning("the connection with %s broke: %s", self.peer.name, error)
                finally:
                    with self.lock:
                        self._channel = None
            self.closed.wait(RETRY_SECONDS)

    @abstractmethod
    def _meet(self) -> socket.socket:
        """A connection with the peer. Raises OSError or `TransferError` if it is not there."""

    @abstractmethod
    def _converse(self, channel: socket.socket) -> None:
        """Use the connection until it breaks, or the peer leaves. Raises OSError or RuntimeError."""


class Giving(Direction):
    """The direction in which we give what we are asked for, pages below `num_pages`."""

    def __init__(self, door: Door, peer: Peer, num_pages: int, timeout: float) -> None:
        super().__init__(door, peer, timeout)
        self._num_pages = num_pages
        self._guests: SimpleQueue[socket.socket | None] = SimpleQueue()
        door.expect((peer.name, peer.epoch), self._guests)

    def close(self) -> None:
        super().close()
        self.door.forget((self.peer.name, self.peer.epoch), self._guests)
        self._guests.put(None)

    def _meet(self) -> socket.socket:
        if (channel := self._guests.get()) is None:
            raise TransferError("closed")
        return channel

    def asked(self, channel: socket.socket) -> tuple[list[int], float]:
        """The pages that are asked for next, and until when they are on lease. Raises OSError or `TransferError`."""
        channel.settimeout(None)
        count, deadline = REQUEST.unpack(receive(channel, REQUEST.size))
        channel.settimeout(self.timeout)
        if not 0 < count <= self._num_pages:
            raise TransferError(f"it asks for {count} pages of {self._num_pages}")
        pages = array("i", receive(channel, 4 * count)).tolist()
        if not 0 <= min(pages) <= max(pages) < self._num_pages:
            raise TransferError(f"it asks for pages {min(pages)} to {max(pages)} of {self._num_pages}")
        return pages, deadline

    @staticmethod
    def judge(channel: socket.socket, deadline: float) -> None:
        """All are given: say whether they were still on lease, by our clock, which is the lease's."""
        channel.sendall(struct.pack("?", time.monotonic() <= deadline))


@dataclass(eq=False)
class Asked:
    """Pages of the peer's pool, which are on lease until its clock shows `lease`. When they are `over`, they `came`, or
    are lost."""

    theirs: list[int]
    lease: float
    over: threading.Event = field(default_factory=threading.Event, kw_only=True)
    came: bool = field(default=False, kw_only=True)


T = TypeVar("T", bound=Asked)


class Receiving(Direction, Generic[T]):
    """The direction in which we receive: pages of one `ask` after the other."""

    def __init__(self, door: Door, peer: Peer, timeout: float) -> None:
        super().__init__(door, peer, timeout)
        self._queue: SimpleQueue[T | None] = SimpleQueue()

    def ask(self, copy: T) -> None:
        """Get pages when it is their turn. Belongs to the thread that calls `close`."""
        if self.closed.is_set():
            copy.over.set()
        else:
            self._queue.put(copy)

    def close(self) -> None:
        super().close()
        self._queue.put(None)

    def _meet(self) -> socket.socket:
        return self.door.call(self.peer)

    def _converse(self, channel: socket.socket) -> None:
        channel.settimeout(self.timeout)
        while (copy := self._queue.get()) is not None:
            try:
                copy.came = self._receive(channel, copy)
            except BaseException:
                self._lose_all()  # before it shows that the connection broke: what is asked for then is not lost
                raise
            finally:
                copy.over.set()

    @abstractmethod
    def _receive(self, channel: socket.socket, copy: T) -> bool:
        """Ask for the pages, and return when they are here: whether they came in time. Raises OSError or
        RuntimeError."""

    @staticmethod
    def request(channel: socket.socket, copy: Asked) -> None:
        """Ask for the pages."""
        channel.sendall(REQUEST.pack(len(copy.theirs), copy.lease) + array("i", copy.theirs).tobytes())

    @staticmethod
    def judged(channel: socket.socket) -> bool:
        """What the owner says of the lease when all pages are here. Raises OSError or `TransferError`."""
        return receive(channel, 1) != b"\0"

    def _lose_all(self) -> None:
        while not self._queue.empty():
            if (copy := self._queue.get()) is not None:
                copy.over.set()

    def _run(self) -> None:
        super()._run()
        self._lose_all()
