"""KV pages between GPUs that cannot map each other's memory: the receiver asks, and NCCL carries the pages from
pool to pool, each straight to its place.

Each direction of a pair has a communicator of its own beside its socket, so a send never waits for a receive. The
receiver posts its receive when the sender has said that it sends, so no kernel waits on a GPU for a peer that is slow
to begin.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from miniserve.cluster.messages import Peer
from miniserve.kv.side import Fence, SideStream
from miniserve.kv.transfer.door import Door, receive
from miniserve.kv.transfer.interface import TransferError
from miniserve.kv.transfer.nccl import ID_BYTES, POLL_SECONDS, RECEIVER, SENDER, Nccl
from miniserve.kv.transfer.pair import Line, PairCopy, PairTransfer

ABANDONED_SECONDS = 0.5
"""How long abandoned pages may still be on their way: the engine's next step waits for their end."""
COMING = b"!"
"""What the sender says before it sends."""


class NcclLine(Line):
    """Our end of one direction: `rank` is SENDER or RECEIVER, and a page may be on its way for `timeout` seconds. What
    is given up while the peer is asked for it is written to our page `scratch`."""

    def __init__(self, network: Nccl, rank: int, timeout: float) -> None:
        super().__init__(network.memory)
        self._network, self._rank, self._timeout = network, rank, timeout
        self._side = SideStream(network.memory.pages.device)
        self._scratch = network.memory.num_pages
        self._deadline = 0.0

    def follow(self) -> None:
        self._side.follow()

    def lead(self) -> None:
        self._deadline = min(self._deadline, time.monotonic() + ABANDONED_SECONDS)
        self._side.lead()

    @contextmanager
    def opened(self, channel: socket.socket, closed: threading.Event) -> Iterator[None]:
        hangup = select.poll()
        hangup.register(channel, select.POLLRDHUP)

        def check() -> None:
            if closed.is_set() or hangup.poll(0):
                raise TransferError("the peer has left")

        self._check = check
        self._network.enter_thread()
        if self._rank == SENDER:
            identity = self._network.identity()
            channel.sendall(identity)
        else:
            identity = receive(channel, ID_BYTES)
        self._communicator = self._network.join(identity, self._rank, self._side, check)
        try:
            # Proves that the way is open, and sets it up before a turn needs it. No step reads the scratch page.
            self._deadline, one = time.monotonic() + self._timeout, self._communicator
            self._finish(one.send([0]) if self._rank == SENDER else one.receive([self._scratch]))
            yield
        finally:
            self._communicator.abort()

    def send(self, channel: socket.socket, pages: list[int]) -> None:
        channel.sendall(COMING)
        self._deadline = time.monotonic() + self._timeout
        self._finish(self._communicator.send(pages))

    def receive(self, channel: socket.socket, copy: PairCopy) -> None:
        receive(channel, len(COMING))
        with copy.receiving.lock:
            self._deadline = time.monotonic() + self._timeout
            copy.fence = self._communicator.receive(copy.ours or [self._scratch] * len(copy.theirs))
        self._finish(copy.fence)
        copy.seconds = copy.fence.seconds

    def _finish(self, fence: Fence) -> None:
        """Wait for pages on their way. Raises `TransferError` if the peer leaves, or they take longer than allowed."""
        while not fence.done:
            self._check()
            if time.monotonic() > self._deadline:
                raise TransferError("the peer is stuck")
            time.sleep(POLL_SECONDS)


class RemoteTransfer(PairTransfer):
    """Pages between pools on GPUs."""

    def __init__(self, network: Nccl, door: Door, peer: Peer, timeout: float = 30.0) -> None:
        super().__init__(NcclLine(network, SENDER, timeout), NcclLine(network, RECEIVER, timeout), door, peer, timeout)
