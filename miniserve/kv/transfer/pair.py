"""How two workers meet whose pools cannot be mapped: each direction is a socket of its own, on which the receiver asks.

What is asked for is the numbers of pages of the owner's pool. A peer that dies breaks only its own pair: a connection
that breaks takes along what was asked for on it, then both sides meet again. The receiver notices that when it asks.
"""

import contextlib
import logging
import os
import socket
import threading
from abc import ABC, abstractmethod
from array import array
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Generic, TypeVar

from miniserve.cluster.messages import Peer
from miniserve.kv.transfer.interface import TransferError

log = logging.getLogger("miniserve.transfer")

RETRY_SECONDS = 0.1
"""From the end of one connection to the next attempt."""


class Direction(ABC):
    """One direction of a pair. Its thread, to be started by the one who makes it, meets the peer again and again until
    `close`."""

    def __init__(self, path: str, timeout: float, *, owner: bool) -> None:
        """The `owner` of the pages listens at `path`. A peer that has begun and does not end within `timeout` seconds
        is taken for hung. Raises OSError."""
        self.timeout = timeout
        self.closed = threading.Event()
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self._path = path
        self._channel: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) if owner else None
        if self._listener is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # of a pair that was parted and meets again
            self._listener.bind(path)
            self._listener.listen()

    def close(self) -> None:
        """The thread ends soon. What it has begun to write is complete or dropped by then."""
        self.closed.set()
        with self.lock:
            for waits in (self._channel, self._listener):
                if waits is not None:
                    with contextlib.suppress(OSError):
                        waits.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        while not self.closed.is_set():
            with contextlib.suppress(OSError), self._meet() as channel:
                with self.lock:
                    self._channel = channel
                try:
                    if not self.closed.is_set():
                        self._converse(channel)
                except (OSError, RuntimeError) as error:  # RuntimeError: a `TransferError`, or what CUDA says
                    if not self.closed.is_set():
                        log.warning("the connection %s broke: %s", os.path.basename(self._path), error)
                finally:
                    with self.lock:
                        self._channel = None
            self.closed.wait(RETRY_SECONDS)
        if self._listener is not None:
            self._listener.close()

    def _meet(self) -> socket.socket:
        """A connection to the peer. Raises OSError if it is not there."""
        if self._listener is not None:
            return self._listener.accept()[0]
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            channel.connect(self._path)
        except OSError:
            channel.close()
            raise
        return channel

    @abstractmethod
    def _converse(self, channel: socket.socket) -> None:
        """Use the connection until it breaks, or the peer leaves. Raises OSError or RuntimeError."""


@dataclass(eq=False)
class Asked:
    """Pages of the peer's pool. When they are `over`, they `came`, or are lost."""

    theirs: list[int]
    over: threading.Event = field(default_factory=threading.Event, kw_only=True)
    came: bool = field(default=False, kw_only=True)


T = TypeVar("T", bound=Asked)


class Receiving(Direction, Generic[T]):
    """The direction in which we receive: pages of one `ask` after the other."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__(path, timeout, owner=False)
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

    def _converse(self, channel: socket.socket) -> None:
        channel.settimeout(self.timeout)
        while (copy := self._queue.get()) is not None:
            try:
                self._receive(channel, copy)
                copy.came = True
            finally:
                if not copy.came:
                    self._lose_all()  # before it shows that the connection broke: what is asked for then is not lost
                copy.over.set()

    @abstractmethod
    def _receive(self, channel: socket.socket, copy: T) -> None:
        """Ask for the pages, and return when they are here. Raises OSError or RuntimeError."""

    def _lose_all(self) -> None:
        while not self._queue.empty():
            if (copy := self._queue.get()) is not None:
                copy.over.set()

    def _run(self) -> None:
        super()._run()
        self._lose_all()


def request(channel: socket.socket, pages: list[int]) -> None:
    """Ask for pages of the peer's pool."""
    channel.send(array("i", pages).tobytes())


def requested(asked: bytes, num_pages: int) -> list[int]:
    """The pages that a `request` asks for. Raises `TransferError` for pages that are not below `num_pages`."""
    pages = array("i", asked).tolist()
    if not 0 <= min(pages) <= max(pages) < num_pages:
        raise TransferError(f"it asks for pages {min(pages)} to {max(pages)} of {num_pages}")
    return pages


def paths(us: tuple[str, int], peer: Peer, run_dir: str) -> tuple[str, str]:
    """Where we listen for `peer`, and where it listens for us. `us` is our name and epoch."""
    here, there = f"{us[0]}.{us[1]}", f"{peer.name}.{peer.epoch}"
    return f"{run_dir}/pages-{here}-{there}", f"{run_dir}/pages-{there}-{here}"
