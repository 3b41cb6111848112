"""Host memory for the KV of pages that the device's pool evicts, from where a page can come back by copy."""

import mmap
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

import torch

from miniserve.cluster.messages import Keep
from miniserve.cluster.rank_messages import Copied
from miniserve.kv.eviction import UNKNOWN, ExpectedNeed
from miniserve.kv.memory import KVMemory
from miniserve.kv.pages import Evicted, PagePool
from miniserve.kv.side import Fence, PassedFence, SideStream, copy_pages, pin

RESTORED = Keep(conversation="\0restored", gap=1.0, chance=0.0)
"""Of slots whose content is on the device as well: until it is evicted there again no turn needs them, so they go
first; those still here at that time spare a copy."""


class HostPool(PagePool):
    """`num_pages` slots for evicted pages of `memory`, found by their hashes.

    It is a `PagePool` with an `order` of its own: what is dropped for good is what is needed least. On a CPU copies are
    synchronous, `clock` counts their seconds, and the memory is only taken when it is first written. Beside a GPU the
    memory is pinned, which takes all of it at once, and copies run on a side stream: the next step waits for them on
    the GPU, the host does not wait. `tell` hears of each copy before it is made. Unverified on a GPU (docs/gpu.md).
    """

    def __init__(
        self,
        memory: KVMemory,
        num_pages: int,
        order: ExpectedNeed,
        *,
        clock: Callable[[], float] = time.perf_counter,
        tell: Callable[[Copied], None] = lambda copied: None,
    ) -> None:
        super().__init__(num_pages, order)
        self.offloaded = self.restored = 0
        """Pages copied here, and back."""
        self.page_seconds = 0.0
        """Seconds to copy a page, a running average over both directions; 0 before the first."""
        self._clock, self._tell = clock, tell
        self._device = memory.pages
        self._side = SideStream(self._device.device) if memory.shared is None else None
        self._uncounted: deque[tuple[Fence, int]] = deque()
        """Copies on the side stream that `page_seconds` does not contain yet, and of how many pages."""
        self._restoring: Fence = PassedFence()
        flat = torch.frombuffer(mmap.mmap(-1, num_pages * memory.shape.bytes, mmap.MAP_PRIVATE), dtype=torch.uint8)
        if self._side is not None:
            pin(flat)
        self._host = memory.shape.view(flat)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def store(self, evicted: Evicted, now: float) -> None:
        """Keep a copy of a page that is about to be evicted, in place of the copy that is needed least."""
        slots = super().match([evicted.digest])
        if not slots:
            if not self.num_available:
                return  # all slots are about to be restored
            slots = self.allocate(1, now)
            # Beside the step that runs now: the page is complete. A restore may still read the slot, on this stream.
            self.copy("offload", [evicted.page], slots)
            self.register(slots[0], evicted.digest, evicted.parent)
            self.offloaded += 1
        self.release(slots, evicted.keep, evicted.end)

    def match(self, hashes: list[bytes], keep: Keep = UNKNOWN) -> list[int]:
        """Slots of the longest prefix of the chain `hashes` that is here, pinned until `restore` or `release`; no slots
        where copying a page takes longer than computing it, as far as both are known."""
        self._count()
        if keep.page_seconds and self.page_seconds > keep.page_seconds:
            return []
        return super().match(hashes)

    def restore(self, slots: list[int], pages: list[int], now: float) -> None:
        """Copy the matched `slots` to `pages` of the device, after all that was launched on those before."""
        self.copy("restore", slots, pages)
        self.restored += len(slots)
        self.release(slots, RESTORED, now)

    def settle(self) -> None:
        """Block until what was restored is on the device. The engine's steps wait for it there; a peer does not."""
        self._restoring.wait()

    def clear(self) -> None:
        """Forget what is here, and the counters. Only while nothing is pinned."""
        super().clear()
        self.offloaded = self.restored = 0

    def copy(self, what: Literal["offload", "restore"], sources: list[int], targets: list[int]) -> None:
        """Copy page or slot `sources[i]` to slot or page `targets[i]`, before anything that the engine does next."""
        self._tell(Copied(what, sources, targets))
        pools = (self._device, self._host) if what == "offload" else (self._host, self._device)
        if self._side is None:
            started = self._clock()
            copy_pages(pools[0], sources, pools[1], targets)
            self._observe(self._clock() - started, len(sources))
            return
        self._count()
        if what == "restore":  # after all that was launched on those pages before
            self._side.follow()
        fence = self._side.run(lambda: copy_pages(pools[0], sources, pools[1], targets))
        self._side.lead()
        self._uncounted.append((fence, len(sources)))
        if what == "restore":
            self._restoring = fence

    def _count(self) -> None:
        """Add the copies that have ended on the side stream to `page_seconds`."""
        while self._uncounted and self._uncounted[0][0].done:
            fence, pages = self._uncounted.popleft()
            self._observe(fence.seconds, pages)

    def _observe(self, seconds: float, pages: int) -> None:
        self.page_seconds += (seconds / pages - self.page_seconds) / (8 if self.page_seconds else 1)
