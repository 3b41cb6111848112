"""A network of sockets in place of NCCL: pages come late, beside the caller, and never when the peer is stuck."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from miniserve.cluster.messages import Peer, PoolInfo
from miniserve.kv.memory import KVMemory, PageShape
from miniserve.kv.transfer.nccl import ID_BYTES, RECEIVER, nccl_transfer
from tests.support.doors import door

PAGES = 12
SHAPE = PageShape(layers=8, page_tokens=64, kv_heads=8, head_dim=64, dtype=torch.bfloat16)  # 1 MiB a page


class QuietSide:
    """A side stream that has nothing to order, and remembers its calls."""

    made: list[QuietSide] = []

    def __init__(self, device: torch.device) -> None:
        self.calls: list[str] = []
        self.made.append(self)

    def follow(self) -> None:
        self.calls.append("follow")

    def lead(self) -> None:
        self.calls.append("lead")


class SocketFence:
    """Done when its thread has ended well; never, if it has not."""

    seconds = 0.5

    def __init__(self, work: Callable[[], None]) -> None:
        self.done = False
        self.thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self.thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        with contextlib.suppress(OSError):
            work()
            self.done = True


class SocketNetwork:
    """Stands for `Nccl`: sockets that are as late as NCCL may be. `brake` is waited for before each page is sent."""

    def __init__(self, memory: KVMemory, brake: Callable[[], object] = lambda: None) -> None:
        self.memory = memory
        self.brake = brake
        self.listener: socket.socket | None = None
        self.communicators: list[SocketCommunicator] = []

    def enter_thread(self) -> None:
        self.thread = threading.current_thread()

    def identity(self) -> bytes:
        self.listener = socket.socket(socket.AF_UNIX)
        name = (b"\0" + uuid.uuid4().hex.encode()).ljust(100, b"-")  # as long as a path may be
        self.listener.bind(name)
        self.listener.listen()
        return name.ljust(ID_BYTES)

    def join(self, identity: bytes, rank: int, side: QuietSide, check: Callable[[], None]) -> SocketCommunicator:
        if rank == RECEIVER:
            channel = socket.socket(socket.AF_UNIX)
            channel.connect(identity.rstrip())
        else:
            assert self.listener is not None
            self.listener.settimeout(0.01)
            while True:
                check()
                with contextlib.suppress(TimeoutError):
                    channel = self.listener.accept()[0]
                    break
            self.listener.close()
        self.communicators.append(SocketCommunicator(self, channel))
        return self.communicators[-1]


class SocketCommunicator:
    """Stands for `NcclCommunicator` by one socket."""

    def __init__(self, network: SocketNetwork, channel: socket.socket) -> None:
        self.network = network
        self.channel = channel
        self.moved: list[list[int]] = []
        self.fences: list[SocketFence] = []
        shape = network.memory.shape
        self.pool = [*network.memory.bytes.numpy(), np.zeros(shape.bytes, np.uint8)]  # and a scratch page

    def send(self, pages: list[int]) -> SocketFence:
        def work() -> None:
            for page in pages:
                self.network.brake()
                self.channel.sendall(self.pool[page].tobytes())

        return self._begin(work, pages)

    def receive(self, pages: list[int]) -> SocketFence:
        def work() -> None:
            for page in pages:
                missing = memoryview(self.pool[page])
                while missing:
                    if not (got := self.channel.recv_into(missing)):
                        time.sleep(60)
                    missing = missing[got:]

        return self._begin(work, pages)

    def _begin(self, work: Callable[[], None], pages: list[int]) -> SocketFence:
        assert not self.fences or self.fences[-1].done, "one at a time, in their order"
        self.moved.append(pages)
        self.fences.append(SocketFence(work))
        return self.fences[-1]

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)
        self.channel.close()


def new_memory(seed: int) -> KVMemory:
    memory = KVMemory(SHAPE, PAGES, torch.device("cpu"))
    memory.shared.bytes.random_(0, 256, generator=torch.Generator().manual_seed(seed))
    return memory


def peer(name: str, epoch: int = 1) -> Peer:
    return Peer(name, epoch, "", PoolInfo(os.getpid(), -1, PAGES, SHAPE.bytes, ""))


class End:
    """One worker's end of the pair."""

    def __init__(self, us: str, them: str, run_dir: Path, seed: int, timeout: float = 30.0) -> None:
        self.memory = new_memory(seed)
        self.go = threading.Event()
        self.go.set()
        self.network = SocketNetwork(self.memory, self.go.wait)
        self.transfer = nccl_transfer(self.network, door((us, 1), str(run_dir)), peer(them), timeout)

    def content(self, *pages: int) -> bytes:
        return self.memory.bytes.numpy()[list(pages)].tobytes()

    @property
    def threads(self) -> list[threading.Thread]:
        return [self.transfer.receiving.thread, self.transfer.giving.thread]

    @property
    def asked(self) -> list[list[int]]:
        """Where what came was written, after the scratch page of the beginning."""
        return next(each.moved for each in self.network.communicators if each.moved[0] == [PAGES])[1:]
