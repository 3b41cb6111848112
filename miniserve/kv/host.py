"""Host memory for pages that the device's pool evicts, from where they come back; the bytes are in `kv/swap.py`."""

from collections.abc import Callable
from typing import Literal, Protocol

from miniserve.cluster.messages import Keep
from miniserve.kv.eviction import UNKNOWN, ExpectedNeed
from miniserve.kv.pages import Evicted, PagePool

RESTORED = Keep(conversation="\0restored", gap=1.0, chance=0.0)
"""Of slots whose content is on the device as well: until it is evicted there again no turn needs them, so they go
first; those still here at that time spare a copy."""


class Slots(Protocol):
    """`num_pages` slots for pages, which take `page_seconds` to be copied as far as is known, else 0."""

    num_pages: int

    @property
    def page_seconds(self) -> float: ...

    def copy(self, what: Literal["offload", "restore"], sources: list[int], targets: list[int]) -> None:
        """Copy page or slot `sources[i]` to slot or page `targets[i]`, before anything that the engine does next."""

    def barrier(self) -> Callable[[], None]:
        """What blocks until all copies so far are made: for peers and disks, beside the steps, on any thread."""


class HostPool(PagePool):
    """`slots` for evicted pages: a `PagePool` with an `order` of its own, which drops for good what is needed least."""

    def __init__(self, slots: Slots, order: ExpectedNeed) -> None:
        super().__init__(slots.num_pages, order)
        self.slots = slots
        self.offloaded = self.restored = 0
        """Pages copied here, and back."""

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
            self.offload([evicted.page], slots)
            self.register(slots[0], evicted.digest, evicted.parent)
        self.release(slots, evicted.keep, evicted.end)

    def offload(self, pages: list[int], slots: list[int]) -> None:
        """Copy `pages` of the device to `slots`."""
        # Beside the step that runs now: the pages are complete. A restore may still read a slot, on this stream.
        self.slots.copy("offload", pages, slots)
        self.offloaded += len(pages)

    def match(self, hashes: list[bytes], keep: Keep = UNKNOWN) -> list[int]:
        """Slots of the longest prefix of the chain `hashes` that is here, pinned until `restore` or `release`; no slots
        where copying a page takes longer than computing it, as far as both are known."""
        if keep.page_seconds and self.slots.page_seconds > keep.page_seconds:
            return []
        return super().match(hashes)

    def restore(self, slots: list[int], pages: list[int], now: float) -> None:
        """Copy the matched `slots` to `pages` of the device, after all that was launched on those before."""
        self.slots.copy("restore", slots, pages)
        self.restored += len(slots)
        self.release(slots, RESTORED, now)

    def clear(self) -> None:
        """Forget what is here, and the counters. Only while nothing is pinned."""
        super().clear()
        self.offloaded = self.restored = 0
