"""Host memory for the KV of pages that the device's pool evicts: dropped there, a page can still come back by copy."""

from __future__ import annotations

import mmap
import time
from collections import deque
from collections.abc import Callable

import torch

from miniserve.cluster.messages import Keep
from miniserve.kv.memory import KVMemory
from miniserve.kv.pages import UNKNOWN, Evicted, Order, PagePool
from miniserve.kv.side import Mark, beside, pin

RESTORED = Keep(conversation="\0restored", gap=1.0, chance=0.0)
"""Of slots whose content is on the device as well: nobody needs them until it is evicted there again, so they go first
but spare that copy if they are still here by then."""


class HostPool:
    """`num_pages` slots for evicted pages of `memory`, found by their hashes.

    A `PagePool` of its own does the bookkeeping, so that what is dropped for good goes in the same `order` as what is
    evicted. On a CPU copies are synchronous, `clock` counts their seconds, and the memory is only taken when it is
    first written. Beside a GPU the memory is pinned, which takes all of it at once, and copies run on a stream of their
    own: the next step waits for them on the GPU, nobody here does. Unverified on a GPU (docs/gpu.md).
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
        self._side = beside(self._device.device)
        self._marks: deque[tuple[Mark, int]] = deque()
        """Copies on the side stream that have not been counted yet, and of how many pages."""
        self._restoring: Mark | None = None
        flat = torch.frombuffer(mmap.mmap(-1, num_pages * memory.shape.bytes, mmap.MAP_PRIVATE), dtype=torch.uint8)
        if self._side is not None:
            pin(flat)
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
            # Beside whatever runs now: the page is complete. Its slot may still be read by a restore, on this stream.
            self._copy(self._device, [evicted.page], self._host, slots)
            self.pool.register(slots[0], evicted.digest, evicted.parent)
            self.offloaded += 1
        self.pool.release(slots, evicted.keep, evicted.end)

    def match(self, hashes: list[bytes], keep: Keep) -> list[int]:
        """Slots of the longest prefix of the chain `hashes` that is here, pinned until `restore` or `release`; no slots
        where copying a page takes longer than computing it, as far as both are known.
        """
        self._count()
        if keep.page_seconds and self.page_seconds > keep.page_seconds:
            return []
        return self.pool.match(hashes)

    def restore(self, slots: list[int], pages: list[int]) -> None:
        """Copy the matched `slots` to `pages` of the device; whatever was to be done with those is done before."""
        if self._side is not None:
            self._side.follow()
        self._restoring = self._copy(self._host, slots, self._device, pages)
        self.restored += len(slots)
        self.pool.release(slots, RESTORED)

    def settle(self) -> None:
        """Block until what was restored is on the device. The engine's steps wait for it there; a peer would not."""
        if self._restoring is not None:
            self._restoring.wait()
            self._restoring = None

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

    def _copy(self, source: torch.Tensor, froms: list[int], target: torch.Tensor, tos: list[int]) -> Mark | None:
        """Copy page `froms[i]` of `source` to `tos[i]` of `target`, before anything that the engine does next. None if
        that is done."""

        def copy() -> None:
            for one, other in zip(froms, tos, strict=True):
                target[other].copy_(source[one], non_blocking=True)

        if self._side is None:
            started = self._clock()
            copy()
            self._observe(self._clock() - started, len(froms))
            return None
        self._count()
        mark = self._side.run(copy)
        self._side.lead()
        self._marks.append((mark, len(froms)))
        return mark

    def _count(self) -> None:
        """How long the copies took that have ended on the side stream."""
        while self._marks and self._marks[0][0].done:
            mark, pages = self._marks.popleft()
            self._observe(mark.seconds, pages)

    def _observe(self, seconds: float, pages: int) -> None:
        self.page_seconds += (seconds / pages - self.page_seconds) / (8 if self.page_seconds else 1)
