"""KV pages as bytes through sockets: between CPU pools that are not mapped, and between two on one GPU, where NCCL has
no way.

The receiver asks as soon as it knows of a publication, in a thread of its own, and has the bytes in host memory when
the engine comes to store them. Nothing is copied beside the steps of a GPU: `store` waits for the one that runs.
Unverified on a GPU (docs/gpu.md).
"""

import socket
import threading
import time
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np
import torch

from miniserve.cluster.messages import Peer
from miniserve.kv.memory import KVMemory
from miniserve.kv.transfer.interface import TransferError
from miniserve.kv.transfer.pair import Direction, paths, request, requested

PACKET_BYTES = 2**16
"""What is sent at a time. A socket's buffer has room for three of them."""


@dataclass(eq=False)
class SocketCopy:
    """A `Copy`. `data` is `[page, byte]` once its bytes have come; `over` is set then, and when they are lost."""

    memory: KVMemory
    theirs: list[int]
    deadline: float
    data: np.ndarray | None = None
    seconds: float = 0.0
    over: threading.Event = field(default_factory=threading.Event)
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


class Receiving(Direction):
    """The direction in which we receive: one publication after the other, in the order of `ask`."""

    def __init__(self, page_bytes: int, path: str, timeout: float) -> None:
        super().__init__(path, timeout, owner=False)
        self._page_bytes = page_bytes
        self._asked: SimpleQueue[SocketCopy | None] = SimpleQueue()
        self.thread.start()

    def ask(self, copy: SocketCopy) -> None:
        if self.closed.is_set():
            copy.over.set()
        else:
            self._asked.put(copy)

    def close(self) -> None:
        super().close()
        self._asked.put(None)

    def _converse(self, channel: socket.socket) -> None:
        channel.settimeout(self.timeout)
        try:
            while (copy := self._asked.get()) is not None:
                try:
                    if not copy.ready:  # else it was given up before the peer had come
                        self._receive(channel, copy)
                finally:
                    copy.over.set()
        finally:
            self._lose_all()

    def _receive(self, channel: socket.socket, copy: SocketCopy) -> None:
        begun = time.monotonic()
        channel.send(request(copy.theirs))
        data = np.empty((len(copy.theirs), self._page_bytes), np.uint8)  # the kernel gives huge pages for it
        missing = data.reshape(-1).data
        while missing:
            if not (got := channel.recv_into(missing)):
                raise TransferError("the peer has left")
            missing = missing[got:]
        copy.data, copy.seconds = data, time.monotonic() - begun

    def _lose_all(self) -> None:
        while not self._asked.empty():
            if (copy := self._asked.get()) is not None:
                copy.over.set()

    def _run(self) -> None:
        super()._run()
        self._lose_all()


class Sending(Direction):
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
        self._sending = Sending(memory, here, timeout)
        self._receiving = Receiving(memory.shape.bytes, there, timeout)

    def fetch(self, pages: list[int]) -> SocketCopy:
        copy = SocketCopy(self._memory, pages, time.monotonic() + self._receiving.timeout)
        self._receiving.ask(copy)
        return copy

    def close(self) -> None:
        """Nothing waits for the threads: what has not come by now is lost."""
        self._receiving.close()
        self._sending.close()
