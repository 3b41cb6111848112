"""Pages between two workers whose pools cannot be mapped: each direction is a connection of its own, on which the
receiver asks, and its `Line` carries the pages.

What is asked for is the numbers of pages of the owner's pool. A peer that dies breaks only its own pair: a connection
that breaks takes along what was asked for on it, then both sides meet again. The receiver notices that when it asks.
"""

import contextlib
import logging
import math
import socket
import struct
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch

from miniserve.cluster.messages import Peer
from miniserve.kv.memory import KVMemory
from miniserve.kv.side import Fence
from miniserve.kv.transfer.door import Door, TransferError, fill, receive

log = logging.getLogger("miniserve.transfer")

RETRY_SECONDS = 0.1
"""From the end of one connection to the next attempt."""
REQUEST = struct.Struct("<Id")
"""What comes before the numbers of the pages that are asked for: how many, and until when they are on lease."""


class Line:
    """Carries pages of `memory` in one direction: here as bytes over the connection itself, between CPU pools that are
    not mapped, and between two on one GPU, where NCCL has no way. All bytes of a publication are in host memory before
    one is written to the pool, beside a CPU's steps, after a GPU's present one. Unverified on a GPU (docs/gpu.md).

    The engine's thread makes it, and calls `follow` and `lead`; the direction's thread calls the others, which raise
    OSError or RuntimeError. `lock` guards what the two share of a copy.
    """

    def __init__(self, memory: KVMemory, timeout: float = 30.0) -> None:
        """A peer that has begun and does not end within `timeout` seconds is taken for hung."""
        self.memory, self.timeout, self.lock = memory, timeout, threading.Lock()
        # Not by torch: a thread that comes back from C++ while the interpreter is torn down ends the process.
        self._pool: Any = memory.bytes if memory.shared is None else memory.bytes.numpy()

    def follow(self) -> None:
        """What is asked for from now on is written after all that the engine's stream was given."""

    def lead(self) -> None:
        """What is being received, up to its copy's `fence`, was given up: the engine's stream goes on after it."""

    @contextlib.contextmanager
    def opened(self, channel: socket.socket, closed: threading.Event) -> Iterator[None]:
        """What it needs of a connection, until that breaks or `closed` is set."""
        yield

    def send(self, channel: socket.socket, pages: list[int]) -> None:
        """Give pages that the peer has asked for."""
        for page in pages:
            row = self._pool[page]
            channel.sendall(row.cpu().numpy().data if self.memory.shared is None else row.data)

    def receive(self, channel: socket.socket, copy: "PairCopy") -> None:
        """Write pages that were asked for to those of the copy; nowhere, if it is given up by then."""
        begun = time.monotonic()
        data = np.empty((len(copy.theirs), self.memory.shape.bytes), np.uint8)  # the kernel gives huge pages for it
        fill(channel, data.reshape(-1).data)
        with self.lock:
            for page, row in zip(copy.ours, data, strict=False):  # none if it is given up
                self._pool[page] = torch.from_numpy(row) if self.memory.shared is None else row
        copy.seconds = time.monotonic() - begun


@dataclass(eq=False)
class PairCopy:
    """A `Copy` over `line` of pages that the peer has on lease until its clock shows `lease`. When they are `over`,
    they `came`, or are lost. `ours`, empty when it is given up, and `fence`, the end of what a device writes, are
    guarded by the lock of the line."""

    line: Line
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
        with self.line.lock:
            self.ours = []
            if self.fence is not None and not self.over.is_set():
                self.line.lead()


class Direction:
    """One direction of a pair. Its thread, to be started by the one who makes it, meets the `peer` again and again
    until `close`: `meet` makes a connection, and `converse` uses it until it breaks, or the peer leaves. Both raise
    OSError or `TransferError`, the second one also what CUDA says."""

    def __init__(
        self, line: Line, peer: Peer, meet: Callable[[], socket.socket], converse: Callable[[socket.socket], None]
    ) -> None:
        self.line, self._peer, self._meet, self._converse = line, peer, meet, converse
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self._channel: socket.socket | None = None

    def close(self) -> None:
        """The thread ends soon. What it has begun to write is complete or dropped by then."""
        self.closed.set()
        with self.line.lock:
            if self._channel is not None:
                with contextlib.suppress(OSError):
                    self._channel.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        while not self.closed.is_set():
            with contextlib.suppress(OSError, TransferError), self._meet() as channel:
                with self.line.lock:
                    self._channel = channel
                try:
                    if not self.closed.is_set():
                        with self.line.opened(channel, self.closed):
                            self._converse(channel)
                except (OSError, RuntimeError) as error:  # RuntimeError: a `TransferError`, or what CUDA says
                    if not self.closed.is_set():
                        log.warning("the connection with %s broke: %s", self._peer.name, error)
                finally:
                    with self.line.lock:
                        self._channel = None
            self.closed.wait(RETRY_SECONDS)


class PairTransfer:
    """A `Transfer` over a `Line` for each direction, made for one pair of incarnations. One thread uses it."""

    def __init__(self, sends: Line, receives: Line, door: Door, peer: Peer) -> None:
        self._door, self._who = door, (peer.name, peer.epoch)
        self._guests: SimpleQueue[socket.socket | None] = SimpleQueue()
        """Connections of the peer, which asks over them; None when all is over."""
        self._copies: SimpleQueue[PairCopy | None] = SimpleQueue()
        """What we ask for, one after the other; None when all is over."""
        self.giving = Direction(sends, peer, self._next_guest, self._give)
        self.receiving = Direction(receives, peer, lambda: door.call(peer), self._receive)
        door.expect(self._who, self._guests)
        for direction in (self.giving, self.receiving):
            direction.thread.start()

    def fetch(self, theirs: list[int], ours: list[int], lease: float = math.inf) -> PairCopy:
        copy = PairCopy(self.receiving.line, theirs, ours, lease)
        copy.line.follow()
        if self.receiving.closed.is_set():
            copy.over.set()
        else:
            self._copies.put(copy)
        return copy

    def close(self) -> None:
        """Nothing waits for the threads: what has not come by now is lost."""
        self.receiving.close()
        self._lose_all()
        self._copies.put(None)
        self.giving.close()
        self._door.forget(self._who, self._guests)
        self._guests.put(None)

    def _next_guest(self) -> socket.socket:
        if (channel := self._guests.get()) is None:
            raise TransferError("closed")
        return channel

    def _give(self, channel: socket.socket) -> None:
        """Give what the peer asks for over the connection."""
        line, most = self.giving.line, self.giving.line.memory.num_pages
        while True:
            channel.settimeout(None)
            count, deadline = REQUEST.unpack(receive(channel, REQUEST.size))
            channel.settimeout(line.timeout)
            if not 0 < count <= most:
                raise TransferError(f"it asks for {count} pages of {most}")
            pages = array("i", receive(channel, 4 * count)).tolist()
            if not 0 <= min(pages) <= max(pages) < most:
                raise TransferError(f"it asks for pages {min(pages)} to {max(pages)} of {most}")
            line.send(channel, pages)
            # Whether they were still on lease, by our clock, which is the lease's.
            channel.sendall(struct.pack("?", time.monotonic() <= deadline))

    def _receive(self, channel: socket.socket) -> None:
        """Ask for one copy after the other over the connection."""
        line = self.receiving.line
        channel.settimeout(line.timeout)
        while (copy := self._copies.get()) is not None:
            try:
                if copy.ours:
                    channel.sendall(REQUEST.pack(len(copy.theirs), copy.lease) + array("i", copy.theirs).tobytes())
                    line.receive(channel, copy)
                    copy.came = receive(channel, 1) != b"\0"
            except BaseException:
                self._lose_all()  # before it shows that the connection broke: what is asked for then is not lost
                raise
            finally:
                copy.over.set()

    def _lose_all(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                if (copy := self._copies.get_nowait()) is not None:
                    copy.over.set()
