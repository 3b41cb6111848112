"""Host memory for the KV of pages that the device's pool evicts: dropped there, a page can still come back by copy."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable

import torch

from miniserve.cluster.messages import Keep
from miniserve.kv.memory import KVMemory
from miniserve.kv.pages import UNKNOWN, Evicted, Order, PagePool

RESTORED = Keep(conversation="\0restored", gap=1.0, chance=0.0)
"""Of slots whose content is on the device as well: nobody needs them until it is evicted there again, so they go first
but spare that copy if they are still here by then."""


class HostPool:
    """`num_pages` slots for evicted pages of `memory`, found by their hashes.

    A `PagePool` of its own does the bookkeeping, so that what is dropped for good goes in the same `order` as what is
    evicted. Copies are synchronous; `clock` counts their seconds. On a CPU the memory is only taken when it is first
    written; beside a GPU it is pinned.
    """

    def __init__(
        self,
        memory: KVMemory,
        num_pages: int,
        *,
        order: Order = "expected",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.pool = PagePool(num_pages, order=order)
        self.offloaded = 0
        """Pages copied here."""
        self.restored = 0
        """Pages copied back."""
        self.page_seconds = 0.0
        """Seconds to copy a page, a running average over both directions; 0 before the first."""
        self._clock = clock
        self._device = memory.pages
        size = num_pages * memory.shape.bytes
        if self._device.device.type == "cpu":
            flat = torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE), dtype=torch.uint8)
        else:
            flat = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self._host = memory.shape.view(flat)

    @property
    def num_pages(self) -> int:
        """Slots in all."""
        return self.pool.num_pages

    @property
    def num_used(self) -> int:
        """Slots that hold a page."""
        return self.pool.num_pages - self.pool.num_free

    def store(self, evicted: Evicted, now: float) -> None:
        """Keep a copy of a page that is about to be evicted, at the cost of those needed least here."""
        slots = self.pool.match([evicted.digest])
        if not slots:
            if not self.pool.num_available:
                return  # all slots are about to be restored
            slots = self.pool.allocate(1, now)
            self._copy(self._device, [evicted.page], self._host, slots)
            self.pool.register(slots[0], evicted.digest, evicted.parent)
            self.offloaded += 1
        self.pool.release(slots, evicted.keep, evicted.end)

    def match(self, hashes: list[bytes], keep: Keep) -> list[int]:
        """Slots of the longest prefix of the chain `hashes` that is here, pinned until `restore` or `release`; no slots
        where copying a page takes longer than computing it, as far as both are known.
        """
        if keep.page_seconds and self.page_seconds > keep.page_seconds:
            return []
        return self.pool.match(hashes)

    def restore(self, slots: list[int], pages: list[int]) -> None:
        """Copy the matched `slots` to `pages` of the device."""
        self._copy(self._host, slots, self._device, pages)
        self.restored += len(slots)
        self.pool.release(slots, RESTORED)

    def release(self, slots: list[int], keep: Keep = UNKNOWN, now: float = 0.0) -> None:
        """Unpin matched slots that were not restored; see `PagePool.release`."""
        self.pool.release(slots, keep, now)

    def clear(self) -> None:
        """Forget what is here, and the counters. Only while nothing is pinned."""
        self.pool.clear()
        self.offloaded = self.restored = 0

    def check(self) -> None:
        """Raise AssertionError if a slot is lost, or pinned by nobody (for tests, between admissions)."""
        self.pool.check()
        assert self.pool.num_held == 0

    def _copy(self, source: torch.Tensor, froms: list[int], target: torch.Tensor, tos: list[int]) -> None:
        started = self._clock()
        for one, other in zip(froms, tos, strict=True):
            target[other].copy_(source[one])
        seconds = (self._clock() - started) / len(froms)
        self.page_seconds += (seconds - self.page_seconds) / (8 if self.page_seconds else 1)
