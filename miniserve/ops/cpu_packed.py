"""Weights in the order in which `cpu.cpp` reads them, and the whole model in one call over them."""

import contextlib
import ctypes
import mmap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miniserve.ops.cpu_structs import BLOCK, STRUCTS, NativePlan
from miniserve.ops.decoder import Attention, DeltaNet, Experts, Layer, Mlp, Weights
from miniserve.ops.group import Group
from miniserve.ops.quantized import GROUP, Quantized, Weight

ARENA_BYTES = 64 * 2**20


class Arena:
    """Memory for weights, one after the other in huge pages where the system has them: every step reads all of it, and
    finding 4 KiB at a time takes a sixth of a decode's time."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def pack(self, plain: Any, codes: Any, weight: Weight) -> Tensor:
        """`weight` `[columns, size]` in blocks of `BLOCK` columns, by a kernel for `plain` ones or for `codes`."""
        columns, size = weight.shape
        rows = -(-columns // BLOCK) * BLOCK
        if isinstance(weight, Quantized):
            halves = size // GROUP * (2 if weight.minimums is None else 4)
            packed = self._take(rows * (size * weight.bits // 8 + halves))
            parts = weight.codes.data_ptr(), weight.scales.data_ptr(), address(weight.minimums)
            codes(*parts, columns, size, weight.bits, packed.data_ptr())
        else:
            packed = self._take(rows * size * weight.itemsize)
            plain(weight.contiguous().data_ptr(), columns, size, packed.data_ptr())
        return packed

    def _take(self, size: int) -> Tensor:
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


Tables = tuple[Tensor, Tensor]
"""Those of `torch_ops.rotary_tables`, `[positions, R]`."""


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
