"""The structs of `cpu.cpp` and its headers for ctypes, read from there, and what Python keeps beside them."""

import ctypes
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from miniserve.ops.decoder import State
from miniserve.ops.native import NUMBERS, read_sources

BLOCK = 64
"""Columns of a product whose weights are packed together: KEYS in cpu_vectors.h. Of gates and ups half are either."""
ROWS = 6
"""Rows of a product that vectors compute at once; tiles take 16."""
GATES = {"silu": 1, "gelu_tanh": 2}
"""`Gate` in cpu_packing.h."""
FIELDS = re.compile(r"^    (?:const )?(\w+)(?:<T>)?( ?\*)? ?(\w[\w, *]*);", re.MULTILINE)
"""A line of a struct: the type, whether it is a pointer, the names."""


def _structs(*names: str) -> dict[str, Any]:
    """Those of these `names`, each after what it contains. Their fields end where a blank line follows."""
    source, made = "\n".join(read_sources()), dict[str, Any]()
    for name in names:
        body = source.partition(f"struct {name} {{\n")[2].partition("\n}")[0].partition("\n\n")[0]
        fields = [
            (field.strip(" *"), ctypes.c_void_p if pointer else made.get(kind) or NUMBERS[kind])
            for kind, pointer, listed in FIELDS.findall(body)
            for field in listed.split(",")
        ]
        made[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return made


STRUCTS = _structs("Batch", "Matrix", "Attention", "DeltaNet", "Mlp", "Experts", "Layer", "Model", "Group")


@dataclass(frozen=True)
class NativePlan:
    """A batch as the kernels read it. `numbers` and `state` are the memory that `native`, a `Batch`, points into."""

    native: Any
    numbers: Tensor
    state: State | None
