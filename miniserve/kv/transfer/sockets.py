"""KV pages as bytes through sockets: between CPU pools that are not mapped, and between two on one GPU, where NCCL has
no way.

The receiver's thread has all bytes of a publication in host memory before it writes any to the pool, beside the steps
of a CPU; on a GPU the copy waits for the step that runs. Unverified on a GPU (docs/gpu.md).
"""

from __future__ import annotations

import socket
import time
from typing import Any

import numpy as np
import torch

from miniserve.cluster.messages import Peer
from miniserve.kv.memory import KVMemory
from miniserve.kv.transfer.door import Door, fill
from miniserve.kv.transfer.pair import Line, PairCopy, PairTransfer


class SocketLine(Line):
    """Carries pages over the connection itself."""

    def __init__(self, memory: KVMemory) -> None:
        super().__init__(memory)
        # Not by torch: a thread that comes back from C++ while the interpreter is torn down ends the process.
        self._pool: Any = memory.bytes if memory.shared is None else memory.bytes.numpy()

    def send(self, channel: socket.socket, pages: list[int]) -> None:
        for page in pages:
            row = self._pool[page]
            channel.sendall(row.cpu().numpy().data if self.memory.shared is None else row.data)

    def receive(self, channel: socket.socket, copy: PairCopy) -> None:
        begun = time.monotonic()
        data = np.empty((len(copy.theirs), self.memory.shape.bytes), np.uint8)  # the kernel gives huge pages for it
        fill(channel, data.reshape(-1).data)
        with copy.receiving.lock:
            for page, row in zip(copy.ours, data, strict=False):  # none if it is given up
                self._pool[page] = torch.from_numpy(row) if self.memory.shared is None else row
        copy.seconds = time.monotonic() - begun


class SocketTransfer(PairTransfer):
    """Pages through sockets; a peer that does not answer for `timeout` seconds is taken for hung."""

    def __init__(self, memory: KVMemory, door: Door, peer: Peer, timeout: float = 30.0) -> None:
        super().__init__(SocketLine(memory), SocketLine(memory), door, peer, timeout)
