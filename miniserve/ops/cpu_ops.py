"""The native CPU kernels of `cpu.cpp` behind the `Ops` interface."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from miniserve.ops import Compute
from miniserve.ops.batch import Batch
from miniserve.ops.native import NoKernels, load
from miniserve.ops.torch_ops import filter_sorted, rotary_tables

if TYPE_CHECKING:
    from miniserve.model.config import ModelConfig
    from miniserve.model.transformer import Weights

_int, _long, _float, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


ARENA_BYTES = 64 * 2**20
BLOCK = 64
"""Columns of a product whose weights are packed together: KEYS in cpu.cpp."""


class NativeBatch(ctypes.Structure):
    """`Batch` in cpu.cpp, field by field."""

    _fields_ = [
        ("sequences", _int),
        *((name, _pointer) for name in ("starts", "lengths", "contexts", "tables", "pages", "pool")),
        *((name, _int) for name in ("layers", "page_tokens", "kv_heads", "dim")),
    ]


class NativeMatrix(ctypes.Structure):
    """`Matrix` in cpu.cpp."""

    _fields_ = [("packed", _pointer), ("bias", _pointer)]


NORMS = ("input_norm", "q_norm", "k_norm", "post_norm")
MATRICES = ("qkv", "out", "gate_up", "down")


class NativeLayer(ctypes.Structure):
    """`Layer` in cpu.cpp."""

    _fields_ = [*((name, _pointer) for name in NORMS), *((name, NativeMatrix) for name in MATRICES)]


class NativeModel(ctypes.Structure):
    """`Model` in cpu.cpp."""

    _fields_ = [
        *((name, _long) for name in ("hidden", "inner", "heads", "layers", "vocab")),
        *((name, _float) for name in ("eps", "scale")),
        *((name, _pointer) for name in ("embedding", "cos", "sin", "norm", "head", "layer")),
    ]


ARGUMENTS: dict[str, list[Any]] = {
    "forward": [_pointer, _pointer, _long, _pointer, _pointer, _long, _pointer, _pointer],
    "attention": [_pointer, _int, _int, _float, _pointer, _long, _pointer, _long, _pointer, _long, _pointer],
    "rms_norm": [_pointer, _long, _long, _long, _long, _pointer, _float, _pointer],
    "rope": [_pointer, _long, _long, _long, _long, _pointer, _pointer, _pointer],
    "pack": [_pointer, _long, _long, _pointer],
    "product": [_pointer, _long, _long, _pointer, _long, _pointer, _pointer, _pointer],
    "logits": [_pointer, _long, _long, _pointer, _long, _pointer],
    "silu_mul": [_pointer, _long, _long, _pointer],
}


@dataclass(frozen=True)
class Rotary:
    """See `rotary_tables`."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the kernel reads."""
        return positions, self.cos, self.sin


@dataclass(frozen=True)
class NativePlan:
    """A batch as the kernels read it. `numbers` is the memory that `native` points into."""

    native: NativeBatch
    numbers: torch.Tensor


class Arena:
    """Memory for weights, one after the other in huge pages where the system has them: every step reads all of it, and
    finding 4 KiB at a time takes a sixth of a decode's time."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor that is not filled with anything."""
        size = shape[0] * shape[1] * dtype.itemsize
        if size > len(self._rest):
            memory = mmap.mmap(-1, max(size, ARENA_BYTES), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError, AttributeError):  # not known here: only slower
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._rest = torch.frombuffer(memory, dtype=torch.uint8)
        taken, self._rest = self._rest[:size], self._rest[-(-size // 64) * 64 :]
        return taken.view(dtype).view(shape)


@dataclass(frozen=True)
class Packed:
    """See `Linear`."""

    product: Any
    packed: torch.Tensor
    columns: int
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """See `Linear`."""
        out = torch.empty((x.shape[0], self.columns), dtype=x.dtype)
        self.product(
            x.data_ptr(),
            *x.shape,
            self.packed.data_ptr(),
            self.columns,
            _address(self.bias),
            _address(residual),
            out.data_ptr(),
        )
        return out

    @property
    def native(self) -> NativeMatrix:
        """The same for a `NativeLayer`."""
        return NativeMatrix(self.packed.data_ptr(), _address(self.bias))


@dataclass(frozen=True)
class PackedHead:
    """See `Ops.head`."""

    logits: Any
    packed: torch.Tensor
    vocab: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Ops.head`."""
        out = torch.empty((x.shape[0], self.vocab), dtype=torch.float32)
        self.logits(x.data_ptr(), *x.shape, self.packed.data_ptr(), self.vocab, out.data_ptr())
        return out


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class CpuOps:
    """See `miniserve.ops.Ops`."""

    draft_rows = 12  # two of the six rows that the matrix kernel computes at a time

    def __init__(
        self,
        dtype: torch.dtype,
        head_dim: int,
        widths: tuple[int, ...],
        page_tokens: int,
        tell: Callable[[str], None],
    ) -> None:
        """Raises `NoKernels` where they cannot be compiled, or are not made for this dtype or these sizes."""
        library = load(tell)
        name = str(dtype).removeprefix("torch.")
        if not hasattr(library, f"attention_{name}"):
            raise NoKernels(f"this CPU has no kernels for {name}")
        lanes = library.lanes()
        if head_dim % (2 * lanes) or any(width % lanes for width in widths):
            raise NoKernels(f"heads of {head_dim} or rows of {widths} numbers do not fill vectors of {lanes}")
        if page_tokens % lanes:
            raise NoKernels(f"pages of {page_tokens} tokens do not fill vectors of {lanes} (--block-size)")
        self.layout = f"kv_head, vectors of {lanes} tokens"

        def kernel(operation: str) -> Any:
            function = library[f"{operation}_{name}"]
            function.argtypes, function.restype = ARGUMENTS[operation], None
            return function

        self._attention, self._rms_norm = kernel("attention"), kernel("rms_norm")
        self._rope, self._silu_mul = kernel("rope"), kernel("silu_mul")
        self._pack_rows, self._product, self._logits = kernel("pack"), kernel("product"), kernel("logits")
        self._forward = kernel("forward")
        self._arena = Arena()

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Packed:
        """Pack a weight; it can be freed afterwards."""
        return Packed(self._product, self._pack(weight), weight.shape[0], bias)

    def _pack(self, weight: torch.Tensor) -> torch.Tensor:
        """The blocks that the product reads."""
        rows, size = weight.shape
        packed = self._arena.take((-(-rows // BLOCK) * BLOCK, size), weight.dtype)
        self._pack_rows(weight.contiguous().data_ptr(), rows, size, packed.data_ptr())
        return packed

    def head(self, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Prepare the last matrix. Its sums stay in float32: a bf16 logit of 20 has steps of 0.125, and many ties."""
        return PackedHead(self._logits, self._pack(weight), weight.shape[0])

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root mean square norm over the last dimension of `[T, size]` or `[T, H, size]`."""
        out = torch.empty(x.shape, dtype=x.dtype)
        group, size = (x.shape[1] if x.dim() == 3 else 1), x.shape[-1]
        self._rms_norm(x.data_ptr(), x.stride(0), x.shape[0], group, size, weight.data_ptr(), eps, out.data_ptr())
        return out

    def rotary(self, angles: torch.Tensor, dtype: torch.dtype) -> Rotary:
        """The kernel looks the positions up itself."""
        return Rotary(*rotary_tables(angles, dtype))

    def rope(
        self, q: torch.Tensor, k: torch.Tensor, turns: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn both in place."""
        tables = [table.data_ptr() for table in turns]
        for x in (q, k):
            self._rope(x.data_ptr(), x.stride(0), *x.shape, *tables)
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

    def fuse(self, config: ModelConfig, weights: Weights, rotary: Rotary) -> Compute:
        """See `Ops.fuse`."""
        head = weights.head
        assert isinstance(head, PackedHead)
        layers = (NativeLayer * config.layers)()
        for native, layer in zip(layers, weights.layers, strict=True):
            for name in NORMS:
                setattr(native, name, _address(getattr(layer, name)))
            for name in MATRICES:
                setattr(native, name, getattr(layer, name).native)
        model = NativeModel(
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            heads=config.heads,
            layers=config.layers,
            vocab=head.vocab,
            eps=config.norm_eps,
            scale=config.head_dim**-0.5,
            embedding=weights.embedding.data_ptr(),
            cos=rotary.cos.data_ptr(),
            sin=rotary.sin.data_ptr(),
            norm=weights.norm.data_ptr(),
            head=head.packed.data_ptr(),
            layer=ctypes.addressof(layers),
        )

        def forward(
            plan: NativePlan, tokens: torch.Tensor, positions: torch.Tensor, outputs: torch.Tensor
        ) -> torch.Tensor:
            logits = torch.empty((len(outputs), head.vocab), dtype=torch.float32)
            self._forward(
                ctypes.byref(model),
                ctypes.byref(plan.native),
                len(tokens),
                tokens.data_ptr(),
                positions.data_ptr(),
                len(outputs),
                outputs.data_ptr(),
                logits.data_ptr(),
            )
            return logits

        self._kept = layers, weights, rotary  # `model` points into them
        return forward

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
