"""Weights in the order in which the matrix kernel of `cpu.cpp` reads them."""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass
from typing import Any

import torch

from miniserve.ops.cpu_structs import BLOCK, NativeMatrix, address

ARENA_BYTES = 64 * 2**20


class Arena:
    """Memory for weights, one after the other in huge pages where the system has them: every step reads all of it, and
    finding 4 KiB at a time takes a sixth of a decode's time."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def pack(self, function: Any, weight: torch.Tensor) -> torch.Tensor:
        """`weight` `[columns, size]` in blocks of `BLOCK` columns, by the kernel `function`."""
        columns, size = weight.shape
        packed = self._take((-(-columns // BLOCK) * BLOCK, size), weight.dtype)
        function(weight.contiguous().data_ptr(), columns, size, packed.data_ptr())
        return packed

    def _take(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor with undefined content."""
        size = shape[0] * shape[1] * dtype.itemsize
        if size > len(self._rest):
            memory = mmap.mmap(-1, max(size, ARENA_BYTES), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError, AttributeError):  # this system has none: only slower
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._rest = torch.frombuffer(memory, dtype=torch.uint8)
        taken, self._rest = self._rest[:size], self._rest[-(-size // 64) * 64 :]
        return taken.view(dtype).view(shape)


@dataclass(frozen=True)
class PackedLinear:
    """A `Linear` by the kernel `product`."""

    product: Any
    packed: torch.Tensor
    columns: int
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        out = torch.empty((x.shape[0], self.columns), dtype=x.dtype)
        self.product(
            x.data_ptr(),
            *x.shape,
            self.packed.data_ptr(),
            self.columns,
            address(self.bias),
            address(residual),
            out.data_ptr(),
        )
        return out

    @property
    def native(self) -> NativeMatrix:
        """The same for a `NativeLayer`."""
        return NativeMatrix(self.packed.data_ptr(), address(self.bias))


@dataclass(frozen=True)
class PackedHead:
    """The last matrix, by the kernel `logits`: sums stay in float32. A bf16 logit of 20 has steps of 0.125, and many
    ties."""

    logits: Any
    packed: torch.Tensor
    vocab: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty((x.shape[0], self.vocab), dtype=torch.float32)
        self.logits(x.data_ptr(), *x.shape, self.packed.data_ptr(), self.vocab, out.data_ptr())
        return out
