"""KV pages by shared memory: the receiver maps the sender's pool and copies pages itself."""

from __future__ import annotations

from miniserve.cluster.messages import Peer
from miniserve.kv.memory import KVMemory, SharedMemory


class MappedTransfer:
    """The peer's pool is mapped into this process once; the copy is a memcpy a page, made when it is stored."""

    name = "mapped"

    def __init__(self, memory: KVMemory, peer: Peer) -> None:
        """Raises OSError if the peer's process is gone."""
        assert memory.shared is not None
        pool = peer.pool
        self._ours = memory.shared.pages(memory.shape.bytes)
        self._theirs = SharedMemory.attach(pool.pid, pool.fd, pool.num_pages * pool.page_bytes).reshape(
            pool.num_pages, pool.page_bytes
        )

    def offer(self, pages: list[int]) -> tuple[int, int]:
        """See `Transfer`."""
        return (0, 0)

    def fetch(self, ticket: tuple[int, int], pages: list[int]) -> MappedCopy:
        """See `Transfer`."""
        return MappedCopy(self, pages)

    def close(self) -> None:
        """See `Transfer`. The mapping goes with its last reader."""

    def pull(self, theirs: list[int], ours: list[int]) -> None:
        """Copy page `theirs[i]` of the peer to `ours[i]`."""
        for source, destination in zip(theirs, ours, strict=True):
            self._ours[destination] = self._theirs[source]


class MappedCopy:
    """See `Copy`."""

    ready = stored = True
    seconds = 0.0

    def __init__(self, transfer: MappedTransfer, pages: list[int]) -> None:
        self._transfer = transfer
        self._pages = pages

    def store(self, ours: list[int]) -> None:
        """See `Copy`."""
        self._transfer.pull(self._pages, ours)

    def abandon(self) -> None:
        """See `Copy`."""
