"""The native CPU kernels of `cpu.cpp` behind the `Ops` interface."""

import ctypes
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch

from miniserve.ops.batch import Batch, Sizes, State
from miniserve.ops.cpu_packed import Arena, FusedForward, PackedMatrix, Structs, address
from miniserve.ops.cpu_structs import BLOCK, GATES, ROWS, STRUCTS, NativePlan, Rotary
from miniserve.ops.decoder import DeltaNet, Experts, Weights
from miniserve.ops.group import Group
from miniserve.ops.native import NoKernels, load
from miniserve.ops.quantized import Quantized, Weight
from miniserve.ops.torch_ops import filter_sorted, rotary_tables


class CpuOps:
    """`Ops` for fp32, and for bf16 on a CPU that multiplies it in hardware."""

    draft_rows = 2 * ROWS
    """The matrix kernel computes `ROWS` rows at a time."""

    filter = staticmethod(filter_sorted)

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
        self._attention, self._rms_norm, self._rope = map(self._kernel, ("attention", "rms_norm", "rope"))
        self._arena, self._dtype, self._library = Arena(), dtype, library

    def linear(self, weight: Weight, bias: torch.Tensor | None = None) -> PackedMatrix:
        return self._packed("product", self._dtype, weight, bias)

    def head(self, weight: Weight) -> PackedMatrix:
        return self._packed("logits", torch.float32, weight, None)

    def _packed(self, kernel: str, out: torch.dtype, weight: Weight, bias: torch.Tensor | None) -> PackedMatrix:
        native = STRUCTS["Matrix"](bias=address(bias), columns=weight.shape[0], size=weight.shape[1])
        if isinstance(weight, Quantized):
            packed = self._arena.pack_codes(self._library.pack_codes, weight)
            native.bits, native.minimums = weight.bits, weight.minimums is not None
        else:
            packed = self._arena.pack(self._kernel("pack"), weight)
            native.bits = 8 * weight.itemsize
        native.packed = packed.data_ptr()
        return PackedMatrix(self._kernel(kernel), out, native, packed, bias)

    def gated(self, weight: Weight, bias: torch.Tensor | None = None, activation: str = "silu") -> PackedMatrix:
        """A block of columns is half gates, half their ups, so that a product has both at hand."""
        order = torch.arange(weight.shape[0]).view(2, -1, BLOCK // 2).transpose(0, 1).flatten()
        made = self.linear(weight[order], None if bias is None else bias[order])
        made.native.gate = GATES[activation]
        return made

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = torch.empty(x.shape, dtype=x.dtype)
        group, size = (x.shape[1] if x.dim() == 3 else 1), x.shape[-1]
        self._rms_norm(x.data_ptr(), x.stride(0), x.shape[0], group, size, weight.data_ptr(), eps, out.data_ptr())
        return out

    def rotary(self, angles: torch.Tensor, dtype: torch.dtype) -> Rotary:
        return Rotary(*rotary_tables(angles, dtype))

    def rope(
        self, q: torch.Tensor, k: torch.Tensor, cos_sin: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tables = [table.data_ptr() for table in cos_sin]
        for x in (q, k):
            self._rope(x.data_ptr(), x.stride(0), *x.shape, cos_sin[1].shape[1], *tables)
        return q, k

    def plain(self, weight: torch.Tensor) -> PackedMatrix:
        """What it makes is not rounded: float32."""
        return self.head(weight)

    def mixture(self, part: Experts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        structs, out = Structs(), torch.empty_like(x)
        ids, weights = ids.int(), weights.float().contiguous()
        of = structs.experts(part), x.data_ptr(), len(x)
        self._kernel("mixture")(*of, ids.data_ptr(), weights.data_ptr(), out.data_ptr())
        return out

    def delta(self, plan: NativePlan, part: DeltaNet, qkv: torch.Tensor, ba: torch.Tensor) -> torch.Tensor:
        structs, ba = Structs(), ba.float()
        out = torch.empty((len(qkv), part.v_heads, part.v_dim), dtype=qkv.dtype)
        of = structs.delta(part), ctypes.byref(plan.native), len(qkv)
        self._kernel("delta")(*of, qkv.data_ptr(), qkv.stride(0), ba.data_ptr(), out.data_ptr())
        return out

    def fuse(self, weights: Weights, rotary: list[Rotary], group: Group) -> FusedForward:
        return FusedForward(self._kernel("forward"), weights, rotary, group)

    def plan(self, batch: Batch, kv: torch.Tensor, state: State | None = None) -> NativePlan:
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

    def attention(
        self,
        plan: NativePlan,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        window: int = 0,
    ) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=q.dtype)
        inputs = [number for x in (q, k, v) for number in (x.data_ptr(), x.stride(0))]
        self._attention(ctypes.byref(plan.native), layer, q.shape[1], scale, window, *inputs, out.data_ptr())
        return out
