"""KV pages between GPU workers of one host: the receiver maps the sender's pool by CUDA IPC and copies pages itself.

Unverified on a GPU (docs/gpu.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from miniserve.cluster.messages import Peer, PoolInfo
from miniserve.kv.memory import KVMemory
from miniserve.kv.side import Fence, SideStream

CopyPages = Callable[[torch.Tensor, list[int], torch.Tensor, list[int]], None]
"""See `page_copy.copy_pages`."""


class CudaMappedTransfer:
    """See `Transfer`. The peer's pool is mapped into this process once. It may be on another GPU that ours can read."""

    name = "mapped"

    def __init__(self, memory: KVMemory, peer: Peer) -> None:
        """Raises RuntimeError if the pool cannot be mapped: the peer is gone, or the driver will not."""
        self._ours = memory.bytes.view(torch.int64)
        self._theirs = map_pool(peer.pool, memory.pages.device)
        self._copy_pages = kernel()
        self.side = SideStream(memory.pages.device)
        # Proves that the way is open and compiles the kernel before a turn needs it. Nobody reads the scratch page.
        self.pull([0], [memory.num_pages]).wait()

    def offer(self, pages: list[int]) -> tuple[int, int]:
        """See `Transfer`. What is published is complete on the device: the peer may read it at once."""
        return (0, 0)

    def fetch(self, ticket: tuple[int, int], pages: list[int]) -> CudaMappedCopy:
        """See `Transfer`."""
        return CudaMappedCopy(self, pages)

    def close(self) -> None:
        """See `Transfer`. The mapping goes with its last reader, which must not be a kernel that still runs."""
        self.side.drain()

    def pull(self, theirs: list[int], ours: list[int]) -> Fence:
        """Begin to copy page `theirs[i]` of the peer to `ours[i]`, when nothing given to the engine's stream before can
        still read or write those."""
        self.side.follow()
        return self.side.run(lambda: self._copy_pages(self._theirs, theirs, self._ours, ours))


class CudaMappedCopy:
    """See `Copy`: pages that can be read at any time, by one kernel beside our steps."""

    ready = True

    def __init__(self, transfer: CudaMappedTransfer, pages: list[int]) -> None:
        self._transfer = transfer
        self._pages = pages
        self._fence: Fence | None = None

    def store(self, ours: list[int]) -> None:
        """See `Copy`."""
        self._fence = self._transfer.pull(self._pages, ours)

    @property
    def stored(self) -> bool:
        """See `Copy`."""
        return self._fence is not None and self._fence.done

    @property
    def seconds(self) -> float:
        """See `Copy`: as the GPU measures it."""
        return self._fence.seconds if self._fence is not None else 0.0

    def abandon(self) -> None:
        """See `Copy`."""
        self._transfer.side.lead()


def map_pool(pool: PoolInfo, device: torch.device) -> torch.Tensor:
    """A peer's pool as int64 `[page, word]` that `device`, ours, can read.

    The handle is opened with our own device current, also for the memory of another GPU: CUDA then maps it there, and
    lets our device access it. The peer has waited for its own writes before it exported, so there is no event to open.
    """
    assert pool.cuda is not None
    assert device.index is not None
    peer = pool.cuda
    storage = torch.UntypedStorage._new_shared_cuda(
        device.index, peer.handle, peer.size, peer.offset, peer.counter, peer.counter_offset, b"", False
    )
    return words_of(storage, pool)


def words_of(storage: torch.UntypedStorage, pool: PoolInfo) -> torch.Tensor:
    """The pages that peers may read as int64 `[page, word]`."""
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    words = flat[: pool.num_pages * pool.page_bytes].view(torch.int64)
    return words.view(pool.num_pages, -1)


def kernel() -> CopyPages:
    """The kernel that copies; triton is imported with it."""
    from miniserve.kv.transfer.page_copy import copy_pages

    return copy_pages
