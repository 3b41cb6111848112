"""KV pages of a peer whose pool this process can read: on a CPU by shared memory, on a GPU by CUDA IPC (`ipc.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from miniserve.cluster.messages import Peer
from miniserve.kv.memory import KVMemory, SharedMemory
from miniserve.kv.side import Fence, FencedCopy, PassedFence, SideStream


class PulledTransfer(ABC):
    """A `Transfer` in which the receiver copies the pages itself; the sender does nothing, and its lease keeps the
    pages as they are. Copies are made on `side`; without one they are complete when `pull` returns."""

    name = "mapped"
    side: SideStream | None = None

    def offer(self, pages: list[int]) -> tuple[int, int]:
        """What is published is complete on the device: the peer may read it at once."""
        return (0, 0)

    def fetch(self, ticket: tuple[int, int], pages: list[int]) -> PulledCopy:
        return PulledCopy(self, pages)

    @abstractmethod
    def pull(self, theirs: list[int], ours: list[int]) -> Fence:
        """Begin to copy page `theirs[i]` of the peer to our page `ours[i]`."""

    def close(self) -> None:
        """The mapping goes with its last reader, which must not be a kernel that still runs."""
        if self.side is not None:
            self.side.drain()


@dataclass(eq=False)
class PulledCopy(FencedCopy):
    """A `Copy` of pages that can be read at any time."""

    transfer: PulledTransfer
    pages: list[int]
    ready = True

    def store(self, ours: list[int]) -> None:
        self.fence = self.transfer.pull(self.pages, ours)

    def abandon(self) -> None:
        if self.transfer.side is not None:
            self.transfer.side.lead()


class MappedTransfer(PulledTransfer):
    """The peer's shared memory is mapped into this process once; a page is copied by one memcpy."""

    def __init__(self, memory: KVMemory, peer: Peer) -> None:
        """Raises OSError if the peer's process is gone."""
        pool = peer.pool
        self._ours = memory.bytes.numpy()
        theirs = SharedMemory.attach(pool.pid, pool.fd, pool.num_pages * pool.page_bytes)
        self._theirs = theirs.reshape(pool.num_pages, pool.page_bytes)

    def pull(self, theirs: list[int], ours: list[int]) -> Fence:
        for source, destination in zip(theirs, ours, strict=True):
            self._ours[destination] = self._theirs[source]
        return PassedFence()
