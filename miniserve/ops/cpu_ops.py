"""The native CPU kernels of `cpu.cpp` behind the `Ops` interface: weights in the order in which they read them, and the
whole model in one call over these."""

import contextlib
import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from miniserve.ops.decoder import Attention, Batch, DeltaNet, Experts, Layer, Mlp, Sizes, State, Weights
from miniserve.ops.group import Group
from miniserve.ops.native import STRUCTS, NoKernels, load
from miniserve.ops.quantized import GROUP, Quantized, Weight
from miniserve.ops.torch_ops import draw, filter_sorted, rotary_tables

BLOCK = 64
"""Columns of a product whose weights are packed together: KEYS in cpu_vectors.h. Of gates and ups half are either."""
GATES = {"silu": 1, "gelu_tanh": 2}
"""`Gate` in cpu_packing.h."""
ARENA_BYTES = 64 * 2**20
Tables = tuple[Tensor, Tensor]
"""Those of `torch_ops.rotary_tables`, `[positions, R]`."""


class Arena:
    """Memory for weights, one after the other in huge pages where the system has them: every step reads all of it, and
    finding 4 KiB at a time takes a sixth of a decode's time."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        if size > len(self._rest):
            memory = mmap.mmap(-1, max(size, ARENA_BYTES), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError, AttributeError):  # this system has none: only slower
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._rest = torch.frombuffer(memory, dtype=torch.uint8)
        taken, self._rest = self._rest[:size], self._rest[-(-size // 64) * 64 :]
        return taken


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers begin; a null pointer for None."""
    return None if tensor is None else tensor.data_ptr()


@dataclass(frozen=True)
class PackedMatrix:
    """A `Linear` by the kernel `product`, or by `logits` with sums that stay in float32: a bf16 logit of 20 has steps
    of 0.125, and many ties. `packed` and `bias` are what `native`, a `Matrix`, points into."""

    kernel: Any
    dtype: torch.dtype
    native: Any
    packed: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        columns = self.native.columns // 2 if self.native.gate else self.native.columns
        out = torch.empty((x.shape[0], columns), dtype=self.dtype)
        self.kernel(x.data_ptr(), x.shape[0], ctypes.byref(self.native), address(residual), out.data_ptr())
        return out


class Structs:
    """Parts of a model as structs, which live as long as this."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def delta(self, part: DeltaNet) -> int:
        """Where the struct of a part is."""
        return self._at("DeltaNet", part, taps=part.conv.shape[0])

    def experts(self, part: Experts) -> int:
        """The shared expert is the last in the array of all."""
        mlps = self._all("Mlp", [_struct("Mlp", mlp) for mlp in (*part.experts, part.shared) if mlp is not None])
        return self._at("Experts", part, experts=mlps, count=len(part.experts), shared=part.shared is not None)

    def layers(self, layers: list[Layer], rotary: list[Tables]) -> int:
        return self._all("Layer", [self._layer(layer, rotary) for layer in layers])

    def _layer(self, layer: Layer, rotary: list[Tables]) -> Any:
        mixer, mlp = layer.mixer, layer.mlp
        made = {"mlp": self._at("Mlp", mlp)} if isinstance(mlp, Mlp) else {"mlp": None, "experts": self.experts(mlp)}
        if isinstance(mixer, Attention):
            cos, sin = rotary[mixer.rope]
            made["attention"] = self._at("Attention", mixer, cos=cos, sin=sin, rotary=cos.shape[1])
        else:
            made["delta"] = self.delta(mixer)
        return _struct("Layer", layer, **made)

    def _at(self, kind: str, part: Any, **more: Any) -> int:
        return self._all(kind, [_struct(kind, part, **more)])

    def _all(self, kind: str, made: list[Any]) -> int:
        self._kept.append((STRUCTS[kind] * len(made))(*made))
        return ctypes.addressof(self._kept[-1])


def _struct(name: str, part: Any, **more: Any) -> Any:
    """A struct of what is found under the names of its fields in `more` or else in `part`: numbers, tensors, matrices;
    zeros where there is nothing."""
    kind = STRUCTS[name]
    found = {name: more.get(name, getattr(part, name, None)) for name, _ in kind._fields_}
    for name, value in found.items():
        if isinstance(value, Tensor | PackedMatrix):
            found[name] = address(value) if isinstance(value, Tensor) else value.native
    return kind(**{name: value for name, value in found.items() if value is not None})


@dataclass(frozen=True)
class NativePlan:
    """A batch as the kernels read it. `numbers` and `state` are the memory that `native`, a `Batch`, points into."""

    native: Any
    numbers: Tensor
    state: State | None


class FusedForward:
    """A `Compute` by the kernel `forward`: a step of a hundred and more kernels whose threads never go to sleep."""

    def __init__(self, forward: Any, weights: Weights, rotary: list[Tables], group: Group) -> None:
        assert isinstance(weights.head, PackedMatrix)
        self._forward = forward
        self._vocab, self._dtype = weights.head.native.columns, weights.embedding.dtype
        structs, layers = Structs(), len(weights.layers)
        layer = structs.layers(weights.layers, rotary)
        hidden = self._hidden = weights.embedding.shape[1]
        self._model = _struct("Model", weights, hidden=hidden, layers=layers, layer=layer, group=group.address)
        self._kept = structs, weights, rotary, group  # `_model` points into them

    def __call__(self, plan: NativePlan, tokens: Tensor, positions: Tensor, outputs: Tensor, headless: bool) -> Tensor:
        order = outputs.argsort() if headless else None
        outputs = outputs if order is None else outputs[order]  # the kernel wants rising rows, as those of logits are
        width, dtype = (self._hidden, self._dtype) if headless else (self._vocab, torch.float32)
        made = torch.empty((len(outputs), width), dtype=dtype)
        new = len(tokens), tokens.data_ptr(), positions.data_ptr()
        there = (None, made.data_ptr()) if headless else (made.data_ptr(), None)
        of = ctypes.byref(self._model), ctypes.byref(plan.native), *new
        self._forward(*of, len(outputs), outputs.data_ptr(), *there)
        return made if order is None else made[order.argsort()]


class CpuOps:
    """`FusedOps` for fp32, and for bf16 on a CPU that multiplies it in hardware."""

    filter = staticmethod(filter_sorted)
    draw = staticmethod(draw)
    rotary = staticmethod(rotary_tables)

    def __init__(self, dtype: torch.dtype, sizes: Sizes, page_tokens: int, progress: Callable[[str], None]) -> None:
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
        """`weight` `[columns, size]` in blocks of `BLOCK` columns."""
        columns, size = weight.shape
        rows, native = -(-columns // BLOCK) * BLOCK, STRUCTS["Matrix"](None, address(bias), columns, size)
        if isinstance(weight, Quantized):
            native.bits, native.minimums = weight.bits, weight.minimums is not None
            packed = self._arena.take(rows * (size * weight.bits // 8 + size // GROUP * 2 * (1 + native.minimums)))
            parts = weight.codes.data_ptr(), weight.scales.data_ptr(), address(weight.minimums)
            self._library.pack_codes(*parts, columns, size, weight.bits, packed.data_ptr())
        else:
            native.bits = 8 * weight.itemsize
            packed = self._arena.take(rows * size * weight.itemsize)
            self._kernel("pack")(weight.contiguous().data_ptr(), columns, size, packed.data_ptr())
        native.packed = packed.data_ptr()
        return PackedMatrix(self._kernel(kernel), out, native, packed, bias)

    def gated(self, weight: Weight, bias: Tensor | None = None, activation: str = "silu") -> PackedMatrix:
        """A block of columns is half gates, half their ups, so that a product has both at hand."""
        order = torch.arange(weight.shape[0]).view(2, -1, BLOCK // 2).transpose(0, 1).flatten()
        made = self.linear(weight[order], None if bias is None else bias[order])
        made.native.gate = GATES[activation]
        return made

    def stack(self, experts: list[Mlp]) -> list[Mlp]:
        return experts

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
