"""KV pages as bytes through sockets: between CPU pools that are not mapped, and between two on one GPU, where NCCL has
no way.

The receiver asks as soon as it knows of a publication, in a thread of its own, and has the bytes in host memory when
the engine comes to store them. Nothing is copied beside the steps of a GPU: `store` waits for the one that runs.
Unverified on a GPU (docs/gpu.md).
"""

import math
import socket
import time
from dataclasses import dataclass

import numpy as np
import torch

from miniserve.cluster.messages import Peer
from miniserve.kv.memory import KVMemory
from miniserve.kv.transfer.door import Door, fill
from miniserve.kv.transfer.interface import TransferError
from miniserve.kv.transfer.pair import Asked, Giving, Receiving


@dataclass(eq=False)
class SocketCopy(Asked):
    """A `Copy`. `data` is `[page, byte]` once its bytes have come."""

    memory: KVMemory
    deadline: float
    data: np.ndarray | None = None
    seconds: float = 0.0
    stored = True

    @property
    def ready(self) -> bool:
        return self.over.is_set() or time.monotonic() > self.deadline

    def store(self, ours: list[int]) -> None:
        """As `Copy.store`; it waits for what is not `ready` yet."""
        if not self.over.wait(max(0.0, self.deadline - time.monotonic())):
            raise TransferError("the peer does not answer")
        if self.data is None:
            raise TransferError("the connection to the peer broke")
        if not self.came:
            raise TransferError("the lease ended before the pages were copied")
        for page, row in zip(ours, torch.from_numpy(self.data), strict=True):
            self.memory.bytes[page] = row

    def abandon(self) -> None:
        """What was stored is written."""


class SocketReceiving(Receiving[SocketCopy]):
    def _receive(self, channel: socket.socket, copy: SocketCopy) -> bool:
        begun = time.monotonic()
        if begun > copy.deadline:
            return False  # it was given up before the peer had come
        self.request(channel, copy)
        data = np.empty((len(copy.theirs), copy.memory.shape.bytes), np.uint8)  # the kernel gives huge pages for it
        fill(channel, data.reshape(-1).data)
        in_time = self.judged(channel)
        copy.data, copy.seconds = data, time.monotonic() - begun
        return in_time


class SocketSending(Giving):
    """The direction in which we send what we are asked for."""

    def __init__(self, memory: KVMemory, door: Door, peer: Peer, timeout: float) -> None:
        super().__init__(door, peer, memory.num_pages, timeout)
        if memory.shared is not None:
            # Not by torch: a thread that comes back from C++ while the interpreter is torn down ends the process.
            self._read = memory.bytes.numpy().__getitem__
        else:
            self._read = lambda page: memory.bytes[page].cpu().numpy()
        self.thread.start()

    def _converse(self, channel: socket.socket) -> None:
        while True:
            pages, deadline = self.asked(channel)
            for page in pages:
                channel.sendall(self._read(page).data)
            self.judge(channel, deadline)


class SocketTransfer:
    """A `Transfer`, made once for each pair of incarnations."""

    def __init__(self, memory: KVMemory, door: Door, peer: Peer, timeout: float = 30.0) -> None:
        """`door` is ours; a peer that does not answer for `timeout` seconds is taken for hung."""
        self._memory = memory
        self._sending = SocketSending(memory, door, peer, timeout)
        self._receiving = SocketReceiving(door, peer, timeout)
        self._receiving.thread.start()

    def fetch(self, pages: list[int], lease: float = math.inf) -> SocketCopy:
        copy = SocketCopy(pages, lease, self._memory, time.monotonic() + self._receiving.timeout)
        self._receiving.ask(copy)
        return copy

    def close(self) -> None:
        """Nothing waits for the threads: what has not come by now is lost."""
        self._receiving.close()
        self._sending.close()
