"""The ranks of a worker: what each makes of the same batch is added up, or laid side by side."""

import atexit
import ctypes
import mmap
import os

import torch

from miniserve.cluster.launch import WorkerSpec
from miniserve.config import ConfigError
from miniserve.ops import native

LINE, PIECE = 64, 2**19
"""Bytes that each rank has of the memory for what it says, and twice for what it gives: `PIECE` in cpu_group.h."""


class Group:
    """The ranks of a worker that has one. All ranks make the same calls in the same order, with tensors of the same
    sizes."""

    rank, ranks = 0, 1
    address: int | None = None
    """Of the `Group` of the native kernels, which then call it themselves."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' `x`, the same bits on each, perhaps in its place."""
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """On rank 0 the float32 `x` `[rows, width]` of all ranks side by side, `[rows, ranks * width]`; elsewhere
        anything. Without rows the ranks wait for each other."""
        return x


class SharedGroup(Group):
    """Ranks on the CPUs of one host, which all map the file at `path`, at first empty."""

    def __init__(self, path: str, rank: int, ranks: int) -> None:
        """Raises `NoKernels`, or OSError where the process that made the file is gone."""
        self._library, self.rank, self.ranks = native.load(), rank, ranks
        with open(path, "r+b", buffering=0) as file:
            size = ranks * (LINE + 2 * PIECE)
            os.ftruncate(file.fileno(), size)
            self._memory = mmap.mmap(file.fileno(), size)
        place = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._native = native.STRUCTS["Group"](rank=rank, ranks=ranks, memory=place)
        self.address = ctypes.addressof(self._native)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype not in (torch.float32, torch.bfloat16):
            return self.sum(x.float()).to(x.dtype)
        x = x.contiguous()
        add = self._library.group_sum_float32 if x.dtype is torch.float32 else self._library.group_sum_bfloat16
        add(self.address, x.data_ptr(), x.numel())
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(0 if self.rank else len(x), self.ranks * x.shape[1])
        there = None if self.rank else out.data_ptr()
        width = x.itemsize * x.shape[1]
        self._library.group_gather(self.address, x.contiguous().data_ptr(), len(x), width, there)
        return out


class TorchGroup(Group):
    """Ranks by torch.distributed, which meet at the file `path`: NCCL between GPUs, unverified (docs/gpu.md), and Gloo
    on CPUs without a compiler."""

    def __init__(self, path: str, rank: int, ranks: int, device: torch.device) -> None:
        self.rank, self.ranks, self._one = rank, ranks, torch.zeros(1, device=device)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, init_method=f"file://{path}", rank=rank, world_size=ranks)
        atexit.register(torch.distributed.destroy_process_group)  # its threads must not outlive the interpreter

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(x)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        if not len(x):
            self.sum(self._one)
        parts = [torch.empty_like(x) for _ in range(self.ranks)]
        torch.distributed.all_gather(parts, x)
        return torch.cat(parts, 1)


def make_group(device: torch.device, spec: WorkerSpec | None, ranks: int) -> Group:
    """The group of the `ranks` of a worker, of which `spec` is one."""
    if ranks == 1:
        return Group()
    if spec is None:
        raise ConfigError("Ranks are processes, which `miniserve serve` starts: leave tensor_parallel_size out.")
    if device.type == "cpu":
        try:
            return SharedGroup(spec.region, spec.rank, ranks)
        except native.NoKernels:
            pass
    return TorchGroup(f"{spec.run_dir}/ranks-{spec.name}.{spec.epoch}", spec.rank, ranks, device)
