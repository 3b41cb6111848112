"""The ranks of a worker: what each computes of the same batch is added up, or laid side by side."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any, Protocol

import torch

from miniserve.ops import native
from miniserve.ops.cpu_structs import NativeGroup

LINE, PIECE = 64, 2**19
"""Bytes that each rank has of the memory for what it says, and twice for what it gives: `PIECE` in cpu_group.h."""


class Group(Protocol):
    """All ranks make the same calls in the same order, with tensors of the same sizes."""

    rank: int
    ranks: int

    @property
    def address(self) -> int | None:
        """Of the `Group` of the native kernels, which then call it themselves."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' `x`, the same bits on each, perhaps in its place."""

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """On rank 0 the float32 `x` `[rows, width]` of all ranks side by side, `[rows, ranks * width]`; elsewhere `x`.
        Without rows the ranks wait for each other."""


class Alone:
    """The one rank of a worker."""

    rank, ranks, address = 0, 1, None

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x


class SharedGroup:
    """Ranks on the CPUs of one host, which all map the file at `path`, at first empty."""

    def __init__(self, path: str, rank: int, ranks: int) -> None:
        """Raises `NoKernels`, or OSError where the process that made the file is gone."""
        library = native.load()
        self.rank, self.ranks = rank, ranks
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        size = ranks * (LINE + 2 * PIECE)
        os.ftruncate(handle, size)
        self._memory = mmap.mmap(handle, size)
        os.close(handle)
        place = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._native = NativeGroup(rank=rank, ranks=ranks, memory=place)
        self.address = ctypes.addressof(self._native)
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._sums: dict[torch.dtype, Any] = {}
        for dtype, function in (
            (torch.float32, library.group_sum_float32),
            (torch.bfloat16, library.group_sum_bfloat16),
        ):
            function.argtypes, function.restype = [pointer, pointer, number], None
            self._sums[dtype] = function
        self._gather = library.group_gather
        self._gather.argtypes, self._gather.restype = [pointer, pointer, number, number, pointer], None

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype not in self._sums:
            return self.sum(x.float()).to(x.dtype)
        x = x.contiguous()
        self._sums[x.dtype](self.address, x.data_ptr(), x.numel())
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        out = x if self.rank else x.new_empty(len(x), self.ranks * x.shape[1])
        self._gather(self.address, x.data_ptr(), len(x), x[:1].nbytes, None if self.rank else out.data_ptr())
        return out


class TorchGroup:
    """Ranks by torch.distributed, which meet at the file `path`: NCCL between GPUs, unverified (docs/gpu.md), and Gloo
    on CPUs without a compiler."""

    address = None

    def __init__(self, path: str, rank: int, ranks: int, device: torch.device) -> None:
        self.rank, self.ranks = rank, ranks
        backend = "nccl" if device.type == "cuda" else "gloo"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.distributed.init_process_group(backend, init_method=f"file://{path}", rank=rank, world_size=ranks)
        self._one = torch.zeros(1, device=device)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(x)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        if not len(x):
            self.sum(self._one)
        every = x.new_empty(self.ranks * len(x), x.shape[1])
        torch.distributed.all_gather_into_tensor(every, x)
        return every.view(self.ranks, *x.shape).transpose(0, 1).flatten(1)


def make_group(device: torch.device, region: str, meeting: str, rank: int, ranks: int) -> Group:
    """The group of a worker of `ranks` ranks: by the memory `region` on a CPU, or at the file `meeting`."""
    if ranks == 1:
        return Alone()
    if device.type == "cpu":
        try:
            return SharedGroup(region, rank, ranks)
        except native.NoKernels:
            pass
    return TorchGroup(meeting, rank, ranks, device)
