"""How a worker gets pages out of a peer's pool. One interface; which backend serves a pair is chosen at start."""

from __future__ import annotations

from typing import Protocol

from miniserve.cluster.messages import PoolInfo
from miniserve.kv.memory import KVMemory, SharedMemory


class Transfer(Protocol):
    """A way from one peer's pool into our own."""

    name: str

    def pull(self, theirs: list[int], ours: list[int]) -> None:
        """Copy whole pages, `theirs[i]` of the peer to `ours[i]`; complete on return."""
        ...


class MappedTransfer:
    """The peer's pool is mapped into this process once; a pull is a memcpy a page. Same host, CPU memory."""

    name = "mapped"

    def __init__(self, memory: KVMemory, peer: PoolInfo) -> None:
        """Raises OSError if the peer's process is gone."""
        assert memory.shared is not None
        self._ours = memory.shared.pages(memory.shape.bytes)
        self._theirs = SharedMemory.attach(peer.pid, peer.fd, peer.num_pages * peer.page_bytes).reshape(
            peer.num_pages, peer.page_bytes
        )

    def pull(self, theirs: list[int], ours: list[int]) -> None:
        """See `Transfer`."""
        for source, destination in zip(theirs, ours, strict=True):
            self._ours[destination] = self._theirs[source]


def connect(memory: KVMemory, layout: str, peer: PoolInfo) -> Transfer | None:
    """The way to `peer`'s pages; None if there is none (another layout, device memory, or the process is gone)."""
    if peer.layout != layout or peer.fd < 0 or memory.shared is None:
        return None
    try:
        return MappedTransfer(memory, peer)
    except (OSError, ValueError):  # the number of a dead process may be another one's by now
        return None
