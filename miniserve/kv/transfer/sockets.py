"""KV pages as bytes through sockets: between CPU pools that are not mapped, and between two on one GPU, where NCCL has
no way.

The receiver asks as soon as it knows of a publication, in a thread of its own, and has the bytes in host memory when
the engine comes to store them. Nothing is copied beside the steps of a GPU: `store` waits for the one that runs.
Unverified on a GPU (docs/gpu.md).
"""

import socket
import time
from dataclasses import dataclass

import numpy as np
import torch

from miniserve.cluster.messages import Peer
from miniserve.kv.memory import KVMemory
from miniserve.kv.transfer.interface import TransferError
from miniserve.kv.transfer.pair import Asked, Direction, Receiving, paths, request, requested

PACKET_BYTES = 2**16
"""What is sent at a time. A socket's buffer has room for three of them."""


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
        for page, row in zip(ours, torch.from_numpy(self.data), strict=True):
            self.memory.bytes[page] = row

    def abandon(self) -> None:
        """What was stored is written."""


class SocketReceiving(Receiving[SocketCopy]):
    def _receive(self, channel: socket.socket, copy: SocketCopy) -> None:
        begun = time.monotonic()
        if begun > copy.deadline:
            return  # it was given up before the peer had come
        request(channel, copy.theirs)
        data = np.empty((len(copy.theirs), copy.memory.shape.bytes), np.uint8)  # the kernel gives huge pages for it
        missing = data.reshape(-1).data
        while missing:
            if not (got := channel.recv_into(missing)):
                raise TransferError("the peer has left")
            missing = missing[got:]
        copy.data, copy.seconds = data, time.monotonic() - begun


class SocketSending(Direction):
    """The direction in which we send what we are asked for."""

    def __init__(self, memory: KVMemory, path: str, timeout: float) -> None:
        """Raises OSError."""
        super().__init__(path, timeout, owner=True)
        self._num_pages = memory.num_pages
        if memory.shared is not None:
            # Not by torch: a thread that comes back from C++ while the interpreter is torn down ends the process.
            self._read = memory.bytes.numpy().__getitem__
        else:
            self._read = lambda page: memory.bytes[page].cpu().numpy()
        self.thread.start()

    def _converse(self, channel: socket.socket) -> None:
        while asked := channel.recv(4 * self._num_pages):
            channel.settimeout(self.timeout)
            for page in requested(asked, self._num_pages):
                row = self._read(page).data
                for start in range(0, len(row), PACKET_BYTES):
                    channel.send(row[start : start + PACKET_BYTES])
            channel.settimeout(None)


class SocketTransfer:
    """A `Transfer`, made once for each pair of incarnations."""

    name = "collective"

    def __init__(self, memory: KVMemory, us: tuple[str, int], peer: Peer, run_dir: str, timeout: float = 30.0) -> None:
        """`us` is our name and epoch; a peer that does not answer for `timeout` seconds is taken for hung. Raises
        OSError if there can be no socket in `run_dir`."""
        here, there = paths(us, peer, run_dir)
        self._memory = memory
        self._sending = SocketSending(memory, here, timeout)
        self._receiving = SocketReceiving(there, timeout)
        self._receiving.thread.start()

    def fetch(self, pages: list[int]) -> SocketCopy:
        copy = SocketCopy(pages, self._memory, time.monotonic() + self._receiving.timeout)
        self._receiving.ask(copy)
        return copy

    def close(self) -> None:
        """Nothing waits for the threads: what has not come by now is lost."""
        self._receiving.close()
        self._sending.close()
