"""The native CPU kernels of `cpu.cpp` behind the `Ops` interface."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from miniserve.ops.batch import Batch, Sizes, State
from miniserve.ops.cpu_packed import Arena, FusedForward, PackedMatrix, Tables, address
from miniserve.ops.cpu_structs import BLOCK, GATES, ROWS, STRUCTS, NativePlan
from miniserve.ops.decoder import Weights
from miniserve.ops.group import Group
from miniserve.ops.native import NoKernels, load
from miniserve.ops.quantized import Quantized, Weight
from miniserve.ops.torch_ops import filter_sorted, rotary_tables


class CpuOps:
    """`FusedOps` for fp32, and for bf16 on a CPU that multiplies it in hardware."""

    draft_rows = 2 * ROWS
    """The matrix kernel computes `ROWS` rows at a time."""

    filter = staticmethod(filter_sorted)
    rotary = staticmethod(rotary_tables)

    def __init__(
        self, dtype: torch.dtype, sizes: Sizes, page_tokens: int, progress: Callable[[str], None] = lambda line: None
    ) -> None:
        """Raises `NoKernels` where they cannot be compiled, or are not made for this dtype or these sizes."""
        library = load(progress)
        name = str(dtype).removeprefix("torch.")
        if not hasattr(library, f"attention_{name}"):
            raise NoKernels(f"this CPU has no kernels for {name}")
        lanes = library.lanes()
        if sizes.head_dim % (2 * lanes) or any(width % (BLOCK // 2) for width in sizes.widths):
            rows = f"heads of {sizes.head_dim} or rows of {sizes.widths} numbers"
            raise NoKernels(f"{rows} do not fill vectors of {lanes} or {BLOCK // 2}")
        if any(size % lanes for size in sizes.state_dims):
            dims = " and ".join(map(str, sizes.state_dims))
            raise NoKernels(f"heads of a recurrent state of {dims} numbers do not fill vectors of {lanes}")
        if page_tokens % lanes:
            raise NoKernels(f"pages of {page_tokens} tokens do not fill vectors of {lanes} (--block-size)")
        self.layout = f"kv_head, vectors of {lanes} tokens"
        self._kernel: Callable[[str], Any] = lambda operation: getattr(library, f"{operation}_{name}")
        self._arena, self._dtype, self._library = Arena(), dtype, library

    def linear(self, weight: Weight, bias: Tensor | None = None) -> PackedMatrix:
        return self._packed("product", self._dtype, weight, bias)

    def head(self, weight: Weight) -> PackedMatrix:
        return self._packed("logits", torch.float32, weight, None)

    def _packed(self, kernel: str, out: torch.dtype, weight: Weight, bias: Tensor | None) -> PackedMatrix:
        packed = self._arena.pack(self._kernel("pack"), self._library.pack_codes, weight)
        native = STRUCTS["Matrix"](packed.data_ptr(), address(bias), *weight.shape)
        if isinstance(weight, Quantized):
            native.bits, native.minimums = weight.bits, weight.minimums is not None
        else:
            native.bits = 8 * weight.itemsize
        return PackedMatrix(self._kernel(kernel), out, native, packed, bias)

    def gated(self, weight: Weight, bias: Tensor | None = None, activation: str = "silu") -> PackedMatrix:
        """A block of columns is half gates, half their ups, so that a product has both at hand."""
        order = torch.arange(weight.shape[0]).view(2, -1, BLOCK // 2).transpose(0, 1).flatten()
        made = self.linear(weight[order], None if bias is None else bias[order])
        made.native.gate = GATES[activation]
        return made

    def fuse(self, weights: Weights, rotary: list[Tables], group: Group) -> FusedForward:
        return FusedForward(self._kernel("forward"), weights, rotary, group)

    def plan(self, batch: Batch, kv: Tensor, state: State | None = None) -> NativePlan:
        """The batch's page tables, one after the other, and where each begins; and where the recurrent state is."""
        count = len(batch.lengths)
        starts = [0, *accumulate(batch.lengths)]
        tables = [0, *accumulate(map(len, batch.pages))]
        pages = [page for table in batch.pages for page in table]
        by_sequence = *starts[:-1], *batch.lengths, *batch.contexts, *tables[:-1], *(batch.slots or [0] * count)
        numbers = torch.tensor([*by_sequence, *pages], dtype=torch.int32)
        at = range(numbers.data_ptr(), numbers.data_ptr() + 4 * numbers.numel() + 1, 4 * count)
        _, layers, _, page_tokens, kv_heads, dim = kv.shape
        native = STRUCTS["Batch"](count, *at[:6], kv.data_ptr(), layers, page_tokens, kv_heads, dim)
        if state is not None:
            native.conv, native.delta = state.conv.data_ptr(), state.delta.data_ptr()
            native.conv_slot, native.delta_slot = state.conv.stride(0), state.delta.stride(0)
        return NativePlan(native, numbers, state)
