"""How two workers meet whose pools cannot be mapped: each direction is a connection of its own, on which the receiver
asks, and its `Line` carries the pages.

What is asked for is the numbers of pages of the owner's pool. A peer that dies breaks only its own pair: a connection
that breaks takes along what was asked for on it, then both sides meet again. The receiver notices that when it asks.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import struct
import threading
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue

from miniserve.cluster.messages import Peer
from miniserve.kv.memory import KVMemory
from miniserve.kv.side import Fence
from miniserve.kv.transfer.door import Door, receive
from miniserve.kv.transfer.interface import TransferError

log = logging.getLogger("miniserve.transfer")

RETRY_SECONDS = 0.1
"""From the end of one connection to the next attempt."""
REQUEST = struct.Struct("<Id")
"""What comes before the numbers of the pages that are asked for: how many, and until when they are on lease."""


class Line:
    """Carries pages of `memory` in one direction. The engine's thread makes it, and calls `follow` and `lead`; the
    direction's thread calls the others, which raise OSError or RuntimeError."""

    def __init__(self, memory: KVMemory) -> None:
        self.memory = memory

    def follow(self) -> None:
        """What is asked for from now on is written after all that the engine's stream was given."""

    def lead(self) -> None:
        """What is being received, up to the `fence` of its copy, was given up: it comes before all that the engine's
        stream is given next."""

    @contextlib.contextmanager
    def opened(self, channel: socket.socket, closed: threading.Event) -> Iterator[None]:
        """What it needs of a connection, until that breaks or `closed` is set."""
        yield

    def send(self, channel: socket.socket, pages: list[int]) -> None:
        """Give pages that the peer has asked for."""
        raise NotImplementedError

    def receive(self, channel: socket.socket, copy: PairCopy) -> None:
        """Write pages that were asked for to those of the copy; nowhere, if it is given up by then."""
        raise NotImplementedError


class Direction(ABC):
    """One direction of a pair. Its thread, to be started by the one who makes it, meets the `peer` again and again
    until `close`."""

    def __init__(self, line: Line, door: Door, peer: Peer, timeout: float) -> None:
        """A peer that has begun and does not end within `timeout` seconds is taken for hung."""
        self.line, self.door, self.peer, self.timeout = line, door, peer, timeout
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
                        with self.line.opened(channel, self.closed):
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
    """The direction in which we give what we are asked for."""

    def __init__(self, line: Line, door: Door, peer: Peer, timeout: float) -> None:
        super().__init__(line, door, peer, timeout)
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

    def _converse(self, channel: socket.socket) -> None:
        most = self.line.memory.num_pages
        while True:
            channel.settimeout(None)
            count, deadline = REQUEST.unpack(receive(channel, REQUEST.size))
            channel.settimeout(self.timeout)
            if not 0 < count <= most:
                raise TransferError(f"it asks for {count} pages of {most}")
            pages = array("i", receive(channel, 4 * count)).tolist()
            if not 0 <= min(pages) <= max(pages) < most:
                raise TransferError(f"it asks for pages {min(pages)} to {max(pages)} of {most}")
            self.line.send(channel, pages)
            # Whether they were still on lease, by our clock, which is the lease's.
            channel.sendall(struct.pack("?", time.monotonic() <= deadline))


@dataclass(eq=False)
class PairCopy:
    """A `Copy` of pages that the peer has on lease until its clock shows `lease`. When they are `over`, they `came`, or
    are lost. `ours`, empty when it is given up, and `fence`, the end of what a device writes, are guarded by the lock
    of the direction."""

    receiving: Receiving
    theirs: list[int]
    ours: list[int]
    lease: float
    over: threading.Event = field(default_factory=threading.Event)
    came: bool = False
    seconds: float = 0.0
    fence: Fence | None = None

    @property
    def stored(self) -> bool:
        if self.over.is_set() and not self.came:
            raise TransferError("the lease ended before the pages were copied, or the connection to the peer broke")
        return self.came

    def abandon(self) -> None:
        with self.receiving.lock:
            self.ours = []
            if self.fence is not None and not self.over.is_set():
                self.receiving.line.lead()


class Receiving(Direction):
    """The direction in which we receive: pages of one `ask` after the other."""

    def __init__(self, line: Line, door: Door, peer: Peer, timeout: float) -> None:
        super().__init__(line, door, peer, timeout)
        self._queue: SimpleQueue[PairCopy | None] = SimpleQueue()

    def ask(self, copy: PairCopy) -> None:
        """Get pages when it is their turn. Belongs to the thread that calls `close`."""
        self.line.follow()
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
                if copy.ours:
                    channel.sendall(REQUEST.pack(len(copy.theirs), copy.lease) + array("i", copy.theirs).tobytes())
                    self.line.receive(channel, copy)
                    copy.came = receive(channel, 1) != b"\0"
            except BaseException:
                self._lose_all()  # before it shows that the connection broke: what is asked for then is not lost
                raise
            finally:
                copy.over.set()

    def _lose_all(self) -> None:
        while not self._queue.empty():
            if (copy := self._queue.get()) is not None:
                copy.over.set()

    def _run(self) -> None:
        super()._run()
        self._lose_all()


class PairTransfer:
    """A `Transfer` over a `Line` for each direction, made once for each pair of incarnations. `door` is ours."""

    def __init__(self, sends: Line, receives: Line, door: Door, peer: Peer, timeout: float) -> None:
        self.giving, self.receiving = Giving(sends, door, peer, timeout), Receiving(receives, door, peer, timeout)
        for direction in (self.giving, self.receiving):
            direction.thread.start()

    def fetch(self, theirs: list[int], ours: list[int], lease: float = math.inf) -> PairCopy:
        copy = PairCopy(self.receiving, theirs, ours, lease)
        self.receiving.ask(copy)
        return copy

    def close(self) -> None:
        """Nothing waits for the threads: what has not come by now is lost."""
        self.receiving.close()
        self.giving.close()
