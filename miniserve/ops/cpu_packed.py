"""Weights in the order in which `cpu.cpp` reads them, and the whole model in one call over them."""

import contextlib
import ctypes
import mmap
from dataclasses import dataclass
from typing import Any

import torch

from miniserve.ops.cpu_structs import BLOCK, MATRICES, NORMS, NativeLayer, NativeMatrix, NativeModel, NativePlan, Rotary
from miniserve.ops.decoder import Weights

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
        size = shape[0] * shape[1] * dtype.itemsize
        if size > len(self._rest):
            memory = mmap.mmap(-1, max(size, ARENA_BYTES), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError, AttributeError):  # this system has none: only slower
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._rest = torch.frombuffer(memory, dtype=torch.uint8)
        taken, self._rest = self._rest[:size], self._rest[-(-size // 64) * 64 :]
        return taken.view(dtype).view(shape)


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's numbers begin; a null pointer for None."""
    return None if tensor is None else tensor.data_ptr()


@dataclass(frozen=True)
class PackedLinear:
    """A `Linear` by the kernel `product`."""

    product: Any
    packed: torch.Tensor
    columns: int
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        out = torch.empty((x.shape[0], self.columns), dtype=x.dtype)
        weight = self.packed.data_ptr(), self.columns, address(self.bias)
        self.product(x.data_ptr(), *x.shape, *weight, address(residual), out.data_ptr())
        return out

    @property
    def native(self) -> NativeMatrix:
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


class FusedForward:
    """A `Compute` by the kernel `forward`: a step of a hundred and more kernels whose threads never go to sleep."""

    def __init__(self, forward: Any, weights: Weights, rotary: Rotary, heads: int, eps: float, scale: float) -> None:
        head, gate_up = weights.head, weights.layers[0].gate_up
        assert isinstance(head, PackedHead)
        assert isinstance(gate_up, PackedLinear)
        self._forward = forward
        self._vocab = head.vocab
        layers = (NativeLayer * len(weights.layers))()
        for native, layer in zip(layers, weights.layers, strict=True):
            for name in NORMS:
                setattr(native, name, address(getattr(layer, name)))
            for name in MATRICES:
                setattr(native, name, getattr(layer, name).native)
        self._model = NativeModel(
            hidden=weights.embedding.shape[1],
            inner=gate_up.columns // 2,
            heads=heads,
            layers=len(layers),
            vocab=head.vocab,
            eps=eps,
            scale=scale,
            embedding=weights.embedding.data_ptr(),
            cos=rotary.cos.data_ptr(),
            sin=rotary.sin.data_ptr(),
            norm=weights.norm.data_ptr(),
            head=head.packed.data_ptr(),
            layer=ctypes.addressof(layers),
        )
        self._kept = layers, weights, rotary  # `_model` points into them

    def __call__(
        self, plan: NativePlan, tokens: torch.Tensor, positions: torch.Tensor, outputs: torch.Tensor
    ) -> torch.Tensor:
        logits = torch.empty((len(outputs), self._vocab), dtype=torch.float32)
        new = len(tokens), tokens.data_ptr(), positions.data_ptr()
        wanted = len(outputs), outputs.data_ptr(), logits.data_ptr()
        self._forward(ctypes.byref(self._model), ctypes.byref(plan.native), *new, *wanted)
        return logits
