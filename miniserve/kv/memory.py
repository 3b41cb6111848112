"""The bytes of a KV pool: one page-major allocation that peers can map, shared memory on a CPU or by CUDA IPC."""

import mmap
import os
import weakref
from dataclasses import dataclass
from functools import cached_property

import torch

from miniserve.cluster.messages import CudaHandle, PoolInfo
from miniserve.kv.ipc import refusal


@dataclass(frozen=True)
class PageShape:
    """A page: contiguous `[layer, k/v, slot, kv_head, head_dim]` of `dtype`, the last three in the kernels' order."""

    layers: int
    page_tokens: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.token_bytes * self.page_tokens

    @property
    def token_bytes(self) -> int:
        return self.layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """A flat byte tensor of whole pages as `[page, layer, k/v, slot, kv_head, head_dim]`."""
        return flat.view(self.dtype).view(-1, self.layers, 2, self.page_tokens, self.kv_heads, self.head_dim)


class SharedMemory:
    """Writable memory of this process that other processes can map while it lives.

    An anonymous memory file (memfd) rather than a name under /dev/shm: the kernel frees it with its last user, so no
    crash, not even SIGKILL of everything at once, leaves a segment behind. A peer of the same user opens it as
    /proc/<pid>/fd/<fd>. Pages of memory are only taken when they are first written.
    """

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("miniserve-kv", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, size)
        self.bytes = torch.frombuffer(mmap.mmap(self.fd, size), dtype=torch.uint8)


class KVMemory:
    """One worker's pool of `num_pages` pages on `device`.

    `pages` is `[page, layer, k/v, slot, kv_head, head_dim]`; a snapshot of recurrent state takes `snapshot_pages`. On a
    CPU it lies in `shared`, memory that is only taken when it is first written; else `shared` is None.

    On a GPU `pages` has one page more, number `num_pages`: a scratch page for rows that have to write somewhere, like
    those that fill up the batch of a CUDA graph. No page table and no peer ever names it, so it is never read.
    """

    def __init__(self, shape: PageShape, num_pages: int, device: torch.device, snapshot_pages: int = 0) -> None:
        self.shape = shape
        self.snapshot_pages = snapshot_pages
        self.num_pages = num_pages
        self.shared = SharedMemory(num_pages * shape.bytes) if device.type == "cpu" else None
        if self.shared is not None:
            flat = self.shared.bytes
        else:
            # Zeros, not empty: stale bits that spell NaN would survive a masked attention as NaN * 0.
            flat = torch.zeros((num_pages + 1) * shape.bytes, dtype=torch.uint8, device=device)
        self.pages = shape.view(flat)

    @property
    def bytes(self) -> torch.Tensor:
        """`pages` as uint8 `[page, byte]`, the same memory."""
        return self.pages.view(torch.uint8).view(-1, self.shape.bytes)

    def info(self, layout: str) -> PoolInfo:
        """What other workers have to know of this pool; `layout` fingerprints model, dtype and page shape."""
        fd = self.shared.fd if self.shared is not None else -1
        return PoolInfo(os.getpid(), fd, self.num_pages, self.shape.bytes, layout, self._handle, self.snapshot_pages)

    @cached_property
    def _handle(self) -> CudaHandle | None:
        """How a peer maps this pool by CUDA IPC; None on a CPU. It is made once, since torch counts each export. The
        whole block that the driver gave is exported: the pool is one allocation that is never made again."""
        if self.pages.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.pages.device)  # a peer that maps it finds the zeros
        device = self.pages.device.index
        try:
            _, handle, size, offset, counter, counter_offset = self.pages.untyped_storage()._share_cuda_()[:6]
        except RuntimeError as error:
            return CudaHandle(device, [], b"", 0, 0, b"", 0, str(error).splitlines()[0])
        refused = refusal(device, handle)
        gpus = [] if refused else range(torch.cuda.device_count())
        reach = [gpu for gpu in gpus if gpu == device or torch.cuda.can_device_access_peer(device, gpu)]
        return CudaHandle(device, reach, handle, size, offset, counter, counter_offset, refused)
