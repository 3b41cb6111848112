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
GATES = {"silu": 1, "gelu_tanh": 2}
"""`Gate` in cpu_packing.h."""


def _each(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class NativeBatch(ctypes.Structure):
    """`Batch` in cpu_attention.h."""

    _fields_ = [
        ("sequences", _int),
        *_each(_pointer, "starts lengths contexts tables slots pages pool"),
        *_each(_int, "layers page_tokens kv_heads dim"),
        *_each(_pointer, "conv delta"),
        *_each(_long, "conv_slot delta_slot"),
    ]


class NativeMatrix(ctypes.Structure):
    """`Matrix` in cpu_packing.h."""

    _fields_ = [*_each(_pointer, "packed bias"), *_each(_int, "columns size bits minimums gate")]


class NativeAttention(ctypes.Structure):
    """`Attention` in cpu.cpp."""

    _fields_ = [
        *_each(_int, "index heads window gated rotary"),
        ("scale", _float),
        *_each(_pointer, "cos sin q_norm k_norm"),
        *_each(NativeMatrix, "qkv out"),
    ]


class NativeDeltaNet(ctypes.Structure):
    """`DeltaNet` in cpu_delta.h."""

    _fields_ = [
        *_each(_int, "index k_heads v_heads k_dim v_dim taps"),
        *_each(_pointer, "conv rate bias norm"),
        *_each(NativeMatrix, "qkvz ba out"),
    ]


class NativeMlp(ctypes.Structure):
    """`Mlp` in cpu_experts.h."""

    _fields_ = [*_each(NativeMatrix, "gate_up down")]


class NativeExperts(ctypes.Structure):
    """`Experts` in cpu_experts.h."""

    _fields_ = [
        *_each(_int, "count chosen renormed shared"),
        *_each(NativeMatrix, "router shared_gate"),
        ("experts", _pointer),
    ]


class NativeLayer(ctypes.Structure):
    """`Layer` in cpu.cpp."""

    _fields_ = [*_each(_pointer, "input_norm mixer_norm post_norm mlp_norm attention delta mlp experts")]


class NativeModel(ctypes.Structure):
    """`Model` in cpu.cpp."""

    _fields_ = [
        *_each(_long, "hidden layers"),
        *_each(_float, "eps scale"),
        *_each(_pointer, "embedding norm"),
        ("head", NativeMatrix),
        *_each(_pointer, "layer group"),
    ]


class NativeGroup(ctypes.Structure):
    """`Group` in cpu_group.h."""

    _fields_ = [*_each(_int, "rank ranks round"), ("memory", _pointer)]


PACK_CODES: list[Any] = [_pointer, _pointer, _pointer, _long, _long, _int, _pointer]
"""Arguments of `pack_codes`, which is the same for all dtypes."""
ARGUMENTS: dict[str, list[Any]] = {
    "forward": [_pointer, _pointer, _long, _pointer, _pointer, _long, _pointer, _pointer],
    "attention": [_pointer, _int, _int, _float, _int, _pointer, _long, _pointer, _long, _pointer, _long, _pointer],
    "delta": [_pointer, _pointer, _long, _pointer, _long, _pointer, _pointer],
    "mixture": [_pointer, _pointer, _long, _pointer, _pointer, _pointer],
    "rms_norm": [_pointer, _long, _long, _long, _long, _pointer, _float, _pointer],
    "rope": [_pointer, _long, _long, _long, _long, _long, _pointer, _pointer, _pointer],
    "pack": [_pointer, _long, _long, _pointer],
    "product": [_pointer, _long, _pointer, _pointer, _pointer],
    "logits": [_pointer, _long, _pointer, _pointer, _pointer],
}


@dataclass(frozen=True)
class NativePlan:
    """A batch as the kernels read it. `numbers` and `state` are the memory that `native` points into."""

    native: NativeBatch
    numbers: torch.Tensor
    state: State | None


@dataclass(frozen=True)
class Rotary:
    """The tables of `torch_ops.rotary_tables`, `[positions, R]`."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return positions, self.cos, self.sin
