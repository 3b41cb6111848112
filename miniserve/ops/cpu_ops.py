"""The native CPU kernels of `cpu.cpp` behind the `Ops` interface."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from miniserve.ops import Linear
from miniserve.ops.batch import Batch
from miniserve.ops.native import NoKernels, load
from miniserve.ops.torch_ops import Turns, filter_sorted, rotary_tables

_int, _long, _float, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


BLOCK = 64
"""Columns of a product whose weights are packed together: KEYS in cpu.cpp."""


class NativeBatch(ctypes.Structure):
    """`Batch` in cpu.cpp, field by field."""

    _fields_ = [
        ("sequences", _int),
        *((name, _pointer) for name in ("starts", "lengths", "contexts", "tables", "pages", "pool")),
        *((name, _int) for name in ("layers", "page_tokens", "kv_heads", "dim")),
    ]


ARGUMENTS: dict[str, list[Any]] = {
    "attention": [_pointer, _int, _int, _float, _pointer, _long, _pointer, _long, _pointer, _long, _pointer],
    "rms_norm": [_pointer, _long, _long, _long, _long, _pointer, _float, _pointer],
    "rope": [_pointer, _long, _long, _long, _long, _pointer, _pointer],
    "pack": [_pointer, _long, _long, _pointer],
    "product": [_pointer, _long, _long, _pointer, _long, _pointer, _pointer, _pointer],
    "logits": [_pointer, _long, _long, _pointer, _long, _pointer],
    "silu_mul": [_pointer, _long, _long, _pointer],
}


@dataclass(frozen=True)
class NativePlan:
    """A batch as the kernels read it. `numbers` is the memory that `native` points into."""

    native: NativeBatch
    numbers: torch.Tensor


class CpuOps:
    """See `miniserve.ops.Ops`."""

    def __init__(self, dtype: torch.dtype, head_dim: int, widths: tuple[int, ...], tell: Callable[[str], None]) -> None:
        """Raises `NoKernels` where they cannot be compiled, or are not made for this dtype or these sizes."""
        library = load(tell)
        name = str(dtype).removeprefix("torch.")
        if not hasattr(library, f"attention_{name}"):
            raise NoKernels(f"this CPU has no kernels for {name}")
        lanes = library.lanes()
        if head_dim % (2 * lanes) or any(width % lanes for width in widths):
            raise NoKernels(f"heads of {head_dim} or rows of {widths} numbers do not fill vectors of {lanes}")

        def kernel(operation: str) -> Any:
            function = library[f"{operation}_{name}"]
            function.argtypes, function.restype = ARGUMENTS[operation], None
            return function

        self._attention, self._rms_norm = kernel("attention"), kernel("rms_norm")
        self._rope, self._silu_mul = kernel("rope"), kernel("silu_mul")
        self._pack_rows, self._product, self._logits = kernel("pack"), kernel("product"), kernel("logits")

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        """Pack a weight; it can be freed afterwards."""
        columns = weight.shape[0]
        packed = self._pack(weight)

        def product(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            out = torch.empty((x.shape[0], columns), dtype=x.dtype)
            self._product(
                x.data_ptr(),
                *x.shape,
                packed.data_ptr(),
                columns,
                None if bias is None else bias.data_ptr(),
                None if residual is None else residual.data_ptr(),
                out.data_ptr(),
            )
            return out

        return product

    def _pack(self, weight: torch.Tensor) -> torch.Tensor:
        """The blocks that the product reads."""
        rows, size = weight.shape
        packed = torch.empty((-(-rows // BLOCK) * BLOCK, size), dtype=weight.dtype)
        self._pack_rows(weight.contiguous().data_ptr(), rows, size, packed.data_ptr())
        return packed

    def head(self, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Prepare the last matrix. Its sums stay in float32: a bf16 logit of 20 has steps of 0.125, and many ties."""
        vocab = weight.shape[0]
        packed = self._pack(weight)

        def logits(x: torch.Tensor) -> torch.Tensor:
            out = torch.empty((x.shape[0], vocab), dtype=torch.float32)
            self._logits(x.data_ptr(), x.shape[0], x.shape[1], packed.data_ptr(), vocab, out.data_ptr())
            return out

        return logits

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root mean square norm over the last dimension of `[T, size]` or `[T, H, size]`."""
        out = torch.empty(x.shape, dtype=x.dtype)
        group, size = (x.shape[1] if x.dim() == 3 else 1), x.shape[-1]
        self._rms_norm(x.data_ptr(), x.stride(0), x.shape[0], group, size, weight.data_ptr(), eps, out.data_ptr())
        return out

    def rotary(self, angles: torch.Tensor, dtype: torch.dtype) -> Callable[[torch.Tensor], Turns]:
        """See `rotary_tables`."""
        return rotary_tables(angles, dtype)

    def rope(self, q: torch.Tensor, k: torch.Tensor, turns: Turns) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn both in place."""
        cos, sin = turns
        for x in (q, k):
            rows, heads, dim = x.shape
            self._rope(x.data_ptr(), x.stride(0), rows, heads, dim, cos.data_ptr(), sin.data_ptr())
        return q, k

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(first half) * second half."""
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((rows, size), dtype=gate_up.dtype)
        self._silu_mul(gate_up.data_ptr(), rows, size, out.data_ptr())
        return out

    def filter(
        self, probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `filter_sorted`."""
        return filter_sorted(probs, top_k, top_p, min_p)

    def plan(self, batch: Batch, kv: torch.Tensor) -> NativePlan:
        """The batch's page tables, one after the other, and where each begins."""
        count = len(batch.lengths)
        starts = [0, *accumulate(batch.lengths)]
        tables = [0, *accumulate(map(len, batch.pages))]
        pages = [page for table in batch.pages for page in table]
        numbers = torch.tensor([*starts[:-1], *batch.lengths, *batch.contexts, *tables[:-1], *pages], dtype=torch.int32)
        at = range(numbers.data_ptr(), numbers.data_ptr() + 4 * numbers.numel() + 1, 4 * count)
        _, layers, _, page_tokens, kv_heads, dim = kv.shape
        native = NativeBatch(
            count, at[0], at[1], at[2], at[3], at[4], kv.data_ptr(), layers, page_tokens, kv_heads, dim
        )
        return NativePlan(native, numbers)

    def attention(
        self, plan: NativePlan, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Store the new keys and values in their pages, then attend over the pages where they lie."""
        out = torch.empty(q.shape, dtype=q.dtype)
        self._attention(
            ctypes.byref(plan.native),
            layer,
            q.shape[1],
            scale,
            q.data_ptr(),
            q.stride(0),
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            out.data_ptr(),
        )
        return out
