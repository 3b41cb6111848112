"""What `cpu.cpp` declares, for ctypes: its structs field by field, and the arguments of its functions."""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch

from miniserve.ops.batch import State

_int, _long, _float, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p

BLOCK = 64
"""Columns of a product whose weights are packed together: KEYS in cpu_vectors.h. Of gates and ups half are either."""
ROWS = 6
"""Rows of a product that vectors compute at once; tiles take 16."""


class NativeBatch(ctypes.Structure):
    """`Batch` in cpu_attention.h."""

    _fields_ = [
        ("sequences", _int),
        *((name, _pointer) for name in ("starts", "lengths", "contexts", "tables", "pages", "pool")),
        *((name, _int) for name in ("layers", "page_tokens", "kv_heads", "dim")),
    ]


class NativeMatrix(ctypes.Structure):
    """`Matrix` in cpu_products.h."""

    _fields_ = [("packed", _pointer), ("bias", _pointer), *((name, _int) for name in ("bits", "minimums", "gated"))]


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
        *((name, _pointer) for name in ("embedding", "cos", "sin", "norm")),
        ("head", NativeMatrix),
        ("layer", _pointer),
    ]


PACK_CODES: list[Any] = [_pointer, _pointer, _pointer, _long, _long, _int, _pointer]
"""Arguments of `pack_codes`, which is the same for all dtypes."""
ARGUMENTS: dict[str, list[Any]] = {
    "forward": [_pointer, _pointer, _long, _pointer, _pointer, _long, _pointer, _pointer],
    "attention": [_pointer, _int, _int, _float, _pointer, _long, _pointer, _long, _pointer, _long, _pointer],
    "rms_norm": [_pointer, _long, _long, _long, _long, _pointer, _float, _pointer],
    "rope": [_pointer, _long, _long, _long, _long, _pointer, _pointer, _pointer],
    "pack": [_pointer, _long, _long, _pointer],
    "product": [_pointer, _long, _long, _pointer, _long, _pointer, _pointer],
    "logits": [_pointer, _long, _long, _pointer, _long, _pointer, _pointer],
}


@dataclass(frozen=True)
class NativePlan:
    """A batch as the kernels read it. `numbers` is the memory that `native` points into. `pieces` has the slot and the
    rows of each sequence, if the model has a recurrent `state`."""

    native: NativeBatch
    numbers: torch.Tensor
    state: State | None
    pieces: list[tuple[int, slice]]


@dataclass(frozen=True)
class Rotary:
    """The tables of `torch_ops.rotary_tables`, `[positions, D]`."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return positions, self.cos, self.sin
