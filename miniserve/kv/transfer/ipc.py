"""KV pages between GPU workers of one host: the receiver maps the sender's pool by CUDA IPC and copies pages itself.

Unverified on a GPU (docs/gpu.md).
"""

from collections.abc import Callable

import torch

from miniserve.cluster.messages import Peer, PoolInfo
from miniserve.kv.memory import KVMemory
from miniserve.kv.side import Fence, SideStream
from miniserve.kv.transfer.mapped import PulledTransfer


class CudaMappedTransfer(PulledTransfer):
    """The peer's pool is mapped into this process once; one kernel beside our steps copies the pages of a publication.
    The pool may be on another GPU that ours can read."""

    side: SideStream

    def __init__(self, memory: KVMemory, peer: Peer) -> None:
        """Raises RuntimeError if the pool cannot be mapped: the peer is gone, or the driver will not."""
        self._ours = memory.bytes.view(torch.int64)
        self._theirs = map_pool(peer.pool, memory.pages.device)
        self._copy_pages = kernel()
        self.side = SideStream(memory.pages.device)
        # Proves that the way is open and compiles the kernel before a turn needs it. No step reads the scratch page.
        self.pull([0], [memory.num_pages]).wait()

    def pull(self, theirs: list[int], ours: list[int]) -> Fence:
        """The copy begins when nothing given to the engine's stream before can still read or write our pages."""
        self.side.follow()
        return self.side.run(lambda: self._copy_pages(self._theirs, theirs, self._ours, ours))


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
    return flat[: pool.num_pages * pool.page_bytes].view(torch.int64).view(pool.num_pages, -1)


def kernel() -> Callable[[torch.Tensor, list[int], torch.Tensor, list[int]], None]:
    """The kernel that copies; triton is imported with it."""
    from miniserve.kv.transfer.page_copy import copy_pages

    return copy_pages
