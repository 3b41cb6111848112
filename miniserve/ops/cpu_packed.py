"""Weights in the order in which `cpu.cpp` reads them, and the whole model in one call over them."""

import contextlib
import ctypes
import mmap
from dataclasses import dataclass
from typing import Any

import torch

from miniserve.ops.cpu_structs import BLOCK, MATRICES, NORMS, NativeLayer, NativeMatrix, NativeModel, NativePlan, Rotary
from miniserve.ops.decoder import Attention, Mlp, Weights
from miniserve.ops.quantized import GROUP, Quantized

ARENA_BYTES = 64 * 2**20


class Arena:
    """Memory for weights, one after the other in huge pages where the system has them: every step reads all of it, and
    finding 4 KiB at a time takes a sixth of a decode's time."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def pack(self, function: Any, weight: torch.Tensor) -> torch.Tensor:
        """`weight` `[columns, size]` in blocks of `BLOCK` columns, by the kernel `function`."""
        columns, size = weight.shape
        packed = self._take(-(-columns // BLOCK) * BLOCK * size * weight.itemsize)
        function(weight.contiguous().data_ptr(), columns, size, packed.data_ptr())
        return packed

    def pack_codes(self, function: Any, weight: Quantized) -> torch.Tensor:
        """The same for a quantized weight."""
        columns, size = weight.shape
        blocks, halves = -(-columns // BLOCK), 2 if weight.minimums is None else 4
        packed = self._take(blocks * BLOCK * size * weight.bits // 8 + blocks * BLOCK * (size // GROUP) * halves)
        parts = weight.codes.data_ptr(), weight.scales.data_ptr(), address(weight.minimums)
        function(*parts, columns, size, weight.bits, packed.data_ptr())
        return packed

    def _take(self, size: int) -> torch.Tensor:
        if size > len(self._rest):
            memory = mmap.mmap(-1, max(size, ARENA_BYTES), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError, AttributeError):  # this system has none: only slower
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._rest = torch.frombuffer(memory, dtype=torch.uint8)
        taken, self._rest = self._rest[:size], self._rest[-(-size // 64) * 64 :]
        return taken


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's numbers begin; a null pointer for None."""
    return None if tensor is None else tensor.data_ptr()


@dataclass(frozen=True)
class PackedMatrix:
    """A `Linear` by the kernel `product`, or by `logits` with sums that stay in float32: a bf16 logit of 20 has steps
    of 0.125, and many ties. `packed` and `bias` are what `native` points into."""

    kernel: Any
    dtype: torch.dtype
    columns: int
    native: NativeMatrix
    packed: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        out = torch.empty((x.shape[0], self.columns // 2 if self.native.gated else self.columns), dtype=self.dtype)
        weight = ctypes.byref(self.native), self.columns
        self.kernel(x.data_ptr(), *x.shape, *weight, address(residual), out.data_ptr())
        return out


class FusedForward:
    """A `Compute` by the kernel `forward`: a step of a hundred and more kernels whose threads never go to sleep."""

    def __init__(self, forward: Any, weights: Weights, rotary: list[Rotary]) -> None:
        head, first = weights.head, weights.layers[0]
        assert isinstance(first.mixer, Attention)
        assert isinstance(first.mlp, Mlp)
        gate_up = first.mlp.gate_up
        assert isinstance(head, PackedMatrix)
        assert isinstance(gate_up, PackedMatrix)
        self._forward = forward
        self._vocab = head.columns
        layers = (NativeLayer * len(weights.layers))()
        for native, layer in zip(layers, weights.layers, strict=True):
            parts = {**vars(layer), **vars(layer.mixer), **vars(layer.mlp)}
            for name in NORMS:
                setattr(native, name, address(parts[name]))
            for name in MATRICES:
                setattr(native, name, parts[name].native)
        self._model = NativeModel(
            hidden=weights.embedding.shape[1],
            inner=gate_up.columns // 2,
            heads=first.mixer.heads,
            layers=len(layers),
            vocab=self._vocab,
            eps=weights.eps,
            scale=first.mixer.scale,
            embedding=weights.embedding.data_ptr(),
            cos=rotary[0].cos.data_ptr(),
            sin=rotary[0].sin.data_ptr(),
            norm=weights.norm.data_ptr(),
            head=head.native,
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
