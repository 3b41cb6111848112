"""What `remote.py` needs of a network: communicators of two (`nccl.py`), and how long pages may be on their way."""

import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol

from miniserve.kv.side import Fence, SideStream
from miniserve.kv.transfer.interface import TransferError

POLL_SECONDS = 100e-6
"""How often a thread looks whether pages have come: a small part of the milliseconds that a publication takes."""
RECEIVER, SENDER = 0, 1
"""Ranks in a communicator."""


class Communicator(Protocol):
    """One direction of a pair, beside the engine's steps. Both sides name as many pages, in the same order."""

    def send(self, pages: list[int]) -> Fence:
        """Begin to send pages of our pool, which are complete."""

    def receive(self, pages: list[int]) -> Fence:
        """Begin to write what the peer sends to pages of our pool."""

    def abort(self) -> None:
        """Nothing more is read or written when this returns, whatever was under way."""


class Network(Protocol):
    """Makes communicators over our pool."""

    def enter_thread(self) -> None:
        """The calling thread will make communicators and use them."""

    def identity(self) -> bytes:
        """What both sides of a new communicator need to find each other."""

    def join(self, identity: bytes, rank: int, side: SideStream, check: Callable[[], None]) -> Communicator:
        """Our end of a communicator that works on `side`, once both ends are there; raises `TransferError`. Whenever it
        has to wait for the peer, also later, `check` is called; what that raises ends the wait."""


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
