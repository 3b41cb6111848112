"""The bytes of a KV pool: one page-major allocation, in anonymous shared memory on a CPU so that peers can map it."""

from __future__ import annotations

import mmap
import os
import weakref
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class PageShape:
    """What one page holds: `[layer, k/v, slot, kv_head, head_dim]` of `dtype`, contiguous."""

    layers: int
    page_tokens: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """Numbers in a page."""
        return self.layers * 2 * self.page_tokens * self.kv_heads * self.head_dim

    @property
    def bytes(self) -> int:
        """Bytes of a page, over all layers."""
        return self.elements * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes one token takes."""
        return self.bytes // self.page_tokens

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """A flat byte tensor of whole pages as `[page, layer, k/v, slot, kv_head, head_dim]`."""
        return flat.view(self.dtype).view(-1, self.layers, 2, self.page_tokens, self.kv_heads, self.head_dim)


class SharedMemory:
    """A writable memory of this process that others can map while it lives.

    An anonymous memory file (memfd) rather than a name under /dev/shm: the kernel frees it with its last user, so no
    crash, not even SIGKILL of everything at once, leaves a segment behind. A peer of the same user opens it as
    /proc/<pid>/fd/<fd>. Pages of memory are only taken when they are first written.
    """

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("miniserve-kv", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, size)
        self._map = mmap.mmap(self.fd, size)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def pages(self, page_bytes: int) -> np.ndarray:
        """The memory as writable bytes `[page, page_bytes]`."""
        return np.frombuffer(self._map, dtype=np.uint8).reshape(-1, page_bytes)

    @staticmethod
    def attach(pid: int, fd: int, size: int) -> np.ndarray:
        """The memory another process made, as read-only bytes `[size]`. Raises OSError if that process is gone."""
        handle = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return np.frombuffer(mmap.mmap(handle, size, access=mmap.ACCESS_READ), dtype=np.uint8)
        finally:
            os.close(handle)


class KVMemory:
    """One worker's pool of `num_pages` pages on `device`.

    `pages` is `[page, layer, k/v, slot, kv_head, head_dim]`. On a CPU it lies in `shared`, memory that is only taken
    when it is first written; else `shared` is None.
    """

    def __init__(self, shape: PageShape, num_pages: int, device: torch.device) -> None:
        self.shape = shape
        self.num_pages = num_pages
        size = num_pages * shape.bytes
        self.shared = SharedMemory(size) if device.type == "cpu" else None
        if self.shared is not None:
            flat = self.shared.bytes
        else:
            # Zeros, not empty: stale bits that spell NaN would survive a masked attention as NaN * 0.
            flat = torch.zeros(size, dtype=torch.uint8, device=device)
        self.pages = shape.view(flat)
