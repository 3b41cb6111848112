"""The bytes of evicted pages in host memory."""

import mmap
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

import torch

from miniserve.cluster.rank_messages import Copied
from miniserve.kv.memory import KVMemory
from miniserve.kv.side import Fence, PassedFence, SideStream, copy_pages, pin


class SwapSpace:
    """The `Slots` of `memory`. On a CPU copies are synchronous, `clock` counts their seconds, and the memory is only
    taken when it is first written. Beside a GPU the memory is pinned, which takes all of it at once, and copies run on
    a side stream: the next step waits for them on the GPU, the host does not wait. `tell` hears of each copy before it
    is made. Unverified on a GPU (docs/gpu.md)."""

    def __init__(self, memory: KVMemory, num_pages: int, tell: Callable[[Copied], None] = lambda copied: None) -> None:
        self.num_pages = num_pages
        self._page_seconds = 0.0
        """A running average over both directions; 0 before the first."""
        self._tell, self.clock = tell, time.perf_counter
        self._device = memory.pages
        self._side = SideStream(self._device.device) if memory.shared is None else None
        self._uncounted: deque[tuple[Fence, int]] = deque()
        """Copies on the side stream that the average does not contain yet, and of how many pages."""
        self._last: Fence = PassedFence()
        flat = torch.frombuffer(mmap.mmap(-1, num_pages * memory.shape.bytes, mmap.MAP_PRIVATE), dtype=torch.uint8)
        if self._side is not None:
            pin(flat)
        self.pages = memory.shape.view(flat)

    @property
    def page_seconds(self) -> float:
        while self._uncounted and self._uncounted[0][0].done:
            fence, pages = self._uncounted.popleft()
            self._observe(fence.seconds, pages)
        return self._page_seconds

    def copy(self, what: Literal["offload", "restore"], sources: list[int], targets: list[int]) -> None:
        self._tell(Copied(what, sources, targets))
        pools = (self._device, self.pages) if what == "offload" else (self.pages, self._device)
        if self._side is None:
            started = self.clock()
            copy_pages(pools[0], sources, pools[1], targets)
            self._observe(self.clock() - started, len(sources))
            return
        if what == "restore":  # after all that was launched on those pages before
            self._side.follow()
        fence = self._side.run(lambda: copy_pages(pools[0], sources, pools[1], targets))
        self._side.lead()
        self._uncounted.append((fence, len(sources)))
        self._last = fence

    def barrier(self) -> Callable[[], None]:
        return self._last.wait  # copies are made in their order

    def _observe(self, seconds: float, pages: int) -> None:
        self._page_seconds += (seconds / pages - self._page_seconds) / (8 if self._page_seconds else 1)
