"""What the stand-in has to complain of: each thing once."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable

import torch

from miniserve.worker.graphs import CudaRecorder
from tests.support.fake_cuda.device import let_fail


class Dim3(ctypes.Structure):
    """As CUDA passes it by value."""

    _fields_ = [(name, ctypes.c_uint) for name in "xyz"]


runtime = ctypes.CDLL(None)
runtime.cudaLaunchKernel.argtypes = [ctypes.c_void_p, Dim3, Dim3, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def launch(grid: tuple[int, ...], block: tuple[int, ...], shared: int = 0) -> int:
    """CUDA's error."""
    return runtime.cudaLaunchKernel(0, Dim3(*grid), Dim3(*block), None, shared, None)


def recorded(work: Callable[[], object]) -> str:
    """The error of what is done while a graph is recorded."""
    try:
        CudaRecorder()(lambda: work() if torch.cuda.is_current_stream_capturing() else None)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def main() -> None:
    found = {
        "fine": launch((70000, 1, 1), (1024, 1, 1), 48 << 10),
        "grid": launch((1, 70000, 1), (32, 1, 1)),
        "block": launch((1, 1, 1), (1024, 2, 1)),
        "empty": launch((0, 1, 1), (32, 1, 1)),
        "shared": launch((1, 1, 1), (32, 1, 1), 49 << 10),
    }
    runtime.cudaGetLastError()
    x, side = torch.zeros(8, device="cuda"), torch.cuda.Stream()
    found["recorded"] = recorded(lambda: x + 1)
    found["waited"] = recorded(torch.cuda.synchronize)
    early, late = (torch.empty(8, dtype=torch.int64, pin_memory=True) for _ in range(2))
    with torch.cuda.stream(side):
        early.copy_(torch.zeros(8, dtype=torch.int64, device="cuda"), non_blocking=True)
    found["too early"] = early.tolist()
    side.synchronize()
    found["after waiting"] = early.tolist()
    device = late.fill_(1).to("cuda", non_blocking=True)
    late.fill_(2)
    torch.cuda.synchronize()
    found["copied"] = device.tolist()
    let_fail("alloc", 0, 3)  # torch gives back what it has cached, and tries again
    found["allocations"] = []
    for _ in range(2):
        try:
            torch.empty(2**26, device="cuda")
            found["allocations"].append("")
        except torch.cuda.OutOfMemoryError as error:
            found["allocations"].append(str(error).split(".")[0])
    let_fail("launch", 1, 1)
    x += 1
    try:
        x += 1
        torch.cuda.synchronize()
    except RuntimeError as error:
        found["launch"] = str(error).splitlines()[0]
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        found["ever after"] = str(error).splitlines()[0]
    print(json.dumps(found), flush=True)
    os._exit(0)  # after such an error torch aborts the process when pinned memory is freed


if __name__ == "__main__":
    main()
