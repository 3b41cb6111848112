"""Compiles the kernels of `ops/cuda_fused.py` for a GPU that is not there, and says what each needs of it."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from itertools import product
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from miniserve.ops import cuda_fused
from miniserve.ops.cuda_fused import BLOCK, STAGES, Shape

SHAPES = {"llama": Shape(32, 8, 128, 128, 16, 2**20, 2**14), "gemma": Shape(8, 4, 256, 64, 16, 2**20, 2**14)}
FLOATS = {"eps": "fp32", "table": "*fp32"}
DRAWS = {"temperature": "*fp32", "points": "*fp64", "sums": "*fp64", "tops": "*fp32", "out": "*i64", "blocks": "i32"}
VIEWS = dict.fromkeys(cuda_fused.VIEWS, "*i32")
SIZES = dict.fromkeys(("rows", "columns", "stride", "width"), "i32")


def compiled(kernel: Any, dtype: str, stages: int, **constants: Any) -> dict[str, int]:
    """Registers of a thread, bytes that it spills, bytes of shared memory of a program, and copies to there of 16 bytes
    and of fewer."""
    names = kernel.arg_names
    known = FLOATS | VIEWS | SIZES | (DRAWS if "sums" in names else {})
    types = {name: known.get(name, f"*{dtype}") for name in names}
    signature = types | dict.fromkeys(constants, "constexpr")
    aligned = [at for at, name in enumerate(names) if name not in {"rows", "eps", *VIEWS, *constants}]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(at,): [["tt.divisibility", 16]] for at in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_stages": stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert numbers is not None
    registers, stack, local = map(int, numbers.groups())
    sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?0x(\w+)", made.asm["ptx"])
    return {"registers": registers, "spilt": stack + local, "shared": made.metadata.shared, "wide": sizes.count("10")}


def main() -> None:
    found: dict[str, Any] = {}
    for dtype, size in product(("bf16", "fp16"), (4096, 576)):
        for width, gate, norm in product((32, 64), ("", "silu", "gelu_tanh"), (False, True)):
            without = {"bias": None, "plus": None} if gate else {"bias": None}
            without |= {} if norm else {"norm": None}
            name = f"product of {size}, {width} columns {gate or 'added'}{', normed' * norm}, {dtype}"
            found[name] = compiled(cuda_fused._product, dtype, STAGES, K=size, N=width, GATE=gate, **without)
        for width, (family, shape) in product((32, 64), SHAPES.items()):
            name = f"queries of {family}, {size}, {width} columns, {dtype}"
            found[name] = compiled(cuda_fused._queries, dtype, STAGES, K=size, N=width, shape=shape)
    for dtype, (family, shape), norm in product(("bf16", "fp16"), SHAPES.items(), (False, True)):
        without = {} if norm else {"q_norm": None, "k_norm": None}
        found[f"heads of {family}{', normed' * norm}, {dtype}"] = compiled(
            cuda_fused._heads, dtype, 3, shape=shape, **without
        )
    for without in ({}, {"temperature": None}):
        drawn = f"{'weights' if without else 'logits'}"
        found[f"sums of {drawn}"] = compiled(cuda_fused._sum_blocks, "fp32", 3, BLOCK=BLOCK, **without)
        found[f"draws from {drawn}"] = compiled(cuda_fused._pick, "fp32", 3, BLOCK=BLOCK, MOST=256, **without)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
