"""KV pages of a peer whose pool this process can read: on a CPU by shared memory, on a GPU by CUDA IPC."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from miniserve.cluster.messages import Peer, PoolInfo
from miniserve.kv.memory import KVMemory
from miniserve.kv.side import Fence, PassedFence, SideStream, copy_pages


@dataclass(frozen=True)
class MappedCopy:
    """A `Copy` that is made on `side`, up to `fence`; on a CPU it has been made."""

    fence: Fence
    side: SideStream | None

    @property
    def stored(self) -> bool:
        return self.fence.done

    @property
    def seconds(self) -> float:
        return self.fence.seconds

    def abandon(self) -> None:
        if self.side is not None:
            self.side.lead()


class MappedTransfer:
    """A `Transfer` in which the receiver copies the pages itself. On a CPU the peer's shared memory is mapped into this
    process once; a page is copied by one memcpy. Of a pool on a GPU, ours or another that ours can read, pages are
    copied beside our steps, on `side`: unverified (docs/gpu.md)."""

    def __init__(self, memory: KVMemory, peer: Peer) -> None:
        """Raises OSError or RuntimeError if the pool cannot be mapped: the peer is gone, or the driver will not."""
        pool, self.side = peer.pool, None if memory.shared is not None else SideStream(memory.pages.device)
        if self.side is None:
            at, shape = f"/proc/{pool.pid}/fd/{pool.fd}", (pool.num_pages, pool.page_bytes)
            self._theirs: Any = np.asarray(np.memmap(at, np.uint8, "r", shape=shape))
            self._ours: Any = memory.bytes.numpy()
        else:
            self._theirs, self._ours = map_pool(pool, memory.pages.device), memory.bytes.view(torch.int64)
            # Proves that the way is open before a turn needs it. No step reads the scratch page.
            self.fetch([0], [memory.num_pages]).fence.wait()

    def fetch(self, theirs: list[int], ours: list[int], lease: float = math.inf) -> MappedCopy:
        """As `Transfer.fetch`. A GPU begins when the engine's stream has done all that it was given before."""
        if self.side is None:
            for source, destination in zip(theirs, ours, strict=True):
                self._ours[destination] = self._theirs[source]
            return MappedCopy(PassedFence(), None)
        self.side.follow()
        return MappedCopy(self.side.run(lambda: copy_pages(self._theirs, theirs, self._ours, ours)), self.side)

    def close(self) -> None:
        """The mapping goes with its last reader, which must not be a kernel that still runs."""
        if self.side is not None:
            self.side.drain()


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
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return flat[: pool.num_pages * pool.page_bytes].view(torch.int64).view(pool.num_pages, -1)
