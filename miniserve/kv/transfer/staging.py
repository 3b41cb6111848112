"""Pages that travel as bytes: read from our pool into host memory to be sent, and written to it when they have come."""

import numpy as np
import torch

from miniserve.kv.memory import KVMemory
from miniserve.kv.side import Fence, PassedFence, SideStream, copy_each


class HostStaging:
    """Moves pages of a pool in host memory, as bytes `[page, byte]`: every copy is made at once.

    Numpy asks for huge pages for what it copies to, and malloc, as a worker sets it, keeps it for the next one: there
    is nothing to gain by keeping buffers here.
    """

    def __init__(self, memory: KVMemory) -> None:
        self._pool = memory.bytes.numpy()

    def room(self, count: int) -> torch.Tensor:
        return torch.from_numpy(np.empty((count, self._pool.shape[1]), np.uint8))

    def read(self, pages: list[int]) -> tuple[torch.Tensor, Fence]:
        """A copy of our pages, whole at the fence. What is written to the pages from now on does not reach it."""
        return torch.from_numpy(self._pool[pages]), PassedFence()

    def write(self, data: torch.Tensor, pages: list[int]) -> Fence:
        self._pool[pages] = data.numpy()
        return PassedFence()

    def abandon(self) -> None:
        """What is still being written is written before all that the engine does with the pages from now on."""


class DeviceStaging:
    """The same for a pool on a GPU: pages go through pinned host memory, on a stream beside the engine's.

    torch keeps pinned memory that was freed, in powers of two, and gives none out again that a copy still uses, which
    it knows by the tensor (so these are never made from numpy's arrays). Only the first publications of a size wait for
    the driver to pin theirs. Unverified on a GPU (docs/gpu.md).
    """

    def __init__(self, memory: KVMemory) -> None:
        self._pool = memory.bytes
        self._side = SideStream(memory.pages.device)

    def room(self, count: int) -> torch.Tensor:
        return torch.empty((count, self._pool.shape[1]), dtype=torch.uint8, pin_memory=self._pool.is_cuda)

    def read(self, pages: list[int]) -> tuple[torch.Tensor, Fence]:
        """The pages are complete, so this does not wait for the step that runs; the engine's next step
        waits for it on the GPU, since the pages may belong to another sequence then."""
        data = self.room(len(pages))
        fence = self._side.run(lambda: copy_each((self._pool[page] for page in pages), data))
        self._side.lead()
        return data, fence

    def write(self, data: torch.Tensor, pages: list[int]) -> Fence:
        self._side.follow()
        return self._side.run(lambda: copy_each(data, (self._pool[page] for page in pages)))

    def abandon(self) -> None:
        self._side.lead()


Staging = HostStaging | DeviceStaging
