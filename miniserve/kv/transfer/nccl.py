"""KV pages between GPUs that cannot map each other's memory: the receiver asks, and NCCL carries the pages from
pool to pool, each straight to its place.

Each direction of a pair has a communicator of its own beside its socket, so a send never waits for a receive. The
receiver posts its receive when the sender says that it sends, so no kernel waits for a peer that is slow to begin.

This declares only the functions of NCCL that it takes, by ctypes, as nccl.h has them since 2.18; torch brings the
library along. torch's own process groups have one communicator for both directions of a pair, and end the process when
a peer is late. Not run on two GPUs yet (docs/gpu.md).
"""

import ctypes
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from miniserve.cluster.messages import Peer
from miniserve.kv.memory import KVMemory
from miniserve.kv.side import Fence, SideStream
from miniserve.kv.transfer.door import Door, TransferError, receive
from miniserve.kv.transfer.pair import Line, PairCopy, PairTransfer

ABANDONED_SECONDS = 0.5
"""How long abandoned pages may still be on their way: the engine's next step waits for their end."""
COMING = b"!"
"""What the sender says before it sends."""
POLL_SECONDS = 100e-6
"""How often a thread looks whether pages have come: a small part of the milliseconds that a publication takes."""
RECEIVER, SENDER = 0, 1
"""Ranks in a communicator."""
SUCCESS, IN_PROGRESS = 0, 7  # ncclResult_t
UINT8 = 1  # ncclDataType_t
ID_BYTES = 128
UNDEFINED = -(2**31)

_int, _size, _pointer = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p


class UniqueId(ctypes.Structure):
    """ncclUniqueId, which is passed by value."""

    _fields_ = [("internal", ctypes.c_char * ID_BYTES)]


class Config(ctypes.Structure):
    """ncclConfig_t as of 2.17: by `size` and `version` a later library takes its defaults for the fields it added."""

    _fields_ = [
        ("size", _size),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        *((name, _int) for name in ("blocking", "cgaClusterSize", "minCTAs", "maxCTAs")),
        ("netName", ctypes.c_char_p),
        ("splitShare", _int),
    ]


FUNCTIONS = {
    "ncclGetUniqueId": [ctypes.POINTER(UniqueId)],
    "ncclCommInitRankConfig": [ctypes.POINTER(_pointer), _int, UniqueId, _int, ctypes.POINTER(Config)],
    "ncclCommGetAsyncError": [_pointer, ctypes.POINTER(_int)],
    "ncclCommAbort": [_pointer],
    "ncclGroupStart": [],
    "ncclGroupEnd": [],
    "ncclSend": [_pointer, _size, _int, _int, _pointer, _pointer],
    "ncclRecv": [_pointer, _size, _int, _int, _pointer, _pointer],
}


class Nccl:
    """The library that torch uses, which makes communicators over our pool."""

    def __init__(self, memory: KVMemory) -> None:
        """Raises OSError if there is no NCCL."""
        self.memory, self.library = memory, ctypes.CDLL("libnccl.so.2")
        for name, arguments in FUNCTIONS.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = arguments, _int
        self.library.ncclGetErrorString.argtypes, self.library.ncclGetErrorString.restype = [_int], ctypes.c_char_p

    def enter_thread(self) -> None:
        """The calling thread will use communicators. Its current GPU is number 0 before, where it would take memory."""
        torch.cuda.set_device(self.memory.pages.device)

    def identity(self) -> bytes:
        """What both sides of a new communicator need to find each other: the place of a thread of NCCL's here."""
        identity = UniqueId()
        self.call("ncclGetUniqueId", ctypes.byref(identity))
        return bytes(identity)

    def join(self, identity: bytes, rank: int, side: SideStream, check: Callable[[], None]) -> "NcclCommunicator":
        """Our end of a communicator that works on `side`, once both ends are there; raises `TransferError`. Whenever it
        has to wait for the peer, also later, `check` is called; what that raises ends the wait."""
        return NcclCommunicator(self, identity, rank, side, check)

    def call(self, function: str, *arguments: object) -> None:
        """Call a function of NCCL's, which may go on. Raises `TransferError`."""
        self.expect(getattr(self.library, function)(*arguments), function)

    def expect(self, result: int, function: str) -> None:
        """Raises `TransferError` unless the function has succeeded or goes on."""
        if result not in (SUCCESS, IN_PROGRESS):
            text = str(self.library.ncclGetErrorString(result), "ascii", "replace")
            raise TransferError(f"NCCL: {function}: {text}")


class NcclCommunicator:
    """One direction of a pair, beside the engine's steps. Both sides name as many pages, in the same order. Its calls
    do not block: one that has to wait for the peer returns, and `_settle` waits, until that comes or leaves."""

    def __init__(self, network: Nccl, identity: bytes, rank: int, side: SideStream, check: Callable[[], None]) -> None:
        self._network, self._call = network, network.call
        self._base, self._page_bytes = network.memory.pages.data_ptr(), network.memory.shape.bytes
        self._peer, self._side, self._check = 1 - rank, side, check
        self._communicator = _pointer()
        config = Config(size=ctypes.sizeof(Config), magic=0xCAFEBEEF, version=21700, blocking=0)
        for option in ("cgaClusterSize", "minCTAs", "maxCTAs", "splitShare"):
            setattr(config, option, UNDEFINED)
        try:
            handle, unique = ctypes.byref(self._communicator), UniqueId.from_buffer_copy(identity)
            self._call("ncclCommInitRankConfig", handle, 2, unique, rank, ctypes.byref(config))
            self._settle()
        except TransferError:
            self.abort()
            raise

    def send(self, pages: list[int]) -> Fence:
        """Begin to send pages of our pool, which are complete."""
        return self._side.run(lambda: self._move("ncclSend", pages))

    def receive(self, pages: list[int]) -> Fence:
        """Begin to write what the peer sends to pages of our pool."""
        return self._side.run(lambda: self._move("ncclRecv", pages))

    def abort(self) -> None:
        """Nothing more is read or written when this returns, whatever was under way."""
        if self._communicator:
            self._network.library.ncclCommAbort(self._communicator)
            self._communicator = _pointer()
            self._side.drain()

    def _move(self, function: str, pages: list[int]) -> None:
        """One kernel for all pages, on the current stream. A page is one run of bytes over all layers."""
        stream = torch.cuda.current_stream().cuda_stream
        self._call("ncclGroupStart")
        try:
            for page in pages:
                address = self._base + page * self._page_bytes
                self._call(function, address, self._page_bytes, UINT8, self._peer, self._communicator, stream)
        finally:
            self._call("ncclGroupEnd")
        self._settle()  # only then has the stream got it, and a fence can follow

    def _settle(self) -> None:
        """Wait until the communicator has done what it was asked for. Raises `TransferError`."""
        state = _int(IN_PROGRESS)
        while True:
            self._call("ncclCommGetAsyncError", self._communicator, ctypes.byref(state))
            self._network.expect(state.value, "the communicator")
            if state.value == SUCCESS:
                return
            self._check()
            time.sleep(POLL_SECONDS)


class NcclLine(Line):
    """Our end of one direction: `rank` is SENDER or RECEIVER, and a page may be on its way for `timeout` seconds. What
    is given up while the peer is asked for it is written to our page `scratch`."""

    def __init__(self, network: Nccl, rank: int, timeout: float) -> None:
        super().__init__(network.memory, timeout)
        self._network, self._rank = network, rank
        self._side = SideStream(network.memory.pages.device)
        self._scratch = network.memory.num_pages
        self._deadline = 0.0

    def follow(self) -> None:
        self._side.follow()

    def lead(self) -> None:
        self._deadline = min(self._deadline, time.monotonic() + ABANDONED_SECONDS)
        self._side.lead()

    @contextmanager
    def opened(self, channel: socket.socket, closed: threading.Event) -> Iterator[None]:
        hangup = select.poll()
        hangup.register(channel, select.POLLRDHUP)

        def check() -> None:
            if closed.is_set() or hangup.poll(0):
                raise TransferError("the peer has left")

        self._check = check
        self._network.enter_thread()
        identity = self._network.identity() if self._rank == SENDER else receive(channel, ID_BYTES)
        if self._rank == SENDER:
            channel.sendall(identity)
        self._communicator = self._network.join(identity, self._rank, self._side, check)
        try:
            # Proves that the way is open, and sets it up before a turn needs it. No step reads the scratch page.
            self._deadline, one = time.monotonic() + self.timeout, self._communicator
            self._finish(one.send([0]) if self._rank == SENDER else one.receive([self._scratch]))
            yield
        finally:
            self._communicator.abort()

    def send(self, channel: socket.socket, pages: list[int]) -> None:
        channel.sendall(COMING)
        self._deadline = time.monotonic() + self.timeout
        self._finish(self._communicator.send(pages))

    def receive(self, channel: socket.socket, copy: PairCopy) -> None:
        receive(channel, len(COMING))
        with self.lock:
            self._deadline = time.monotonic() + self.timeout
            copy.fence = self._communicator.receive(copy.ours or [self._scratch] * len(copy.theirs))
        self._finish(copy.fence)
        copy.seconds = copy.fence.seconds

    def _finish(self, fence: Fence) -> None:
        """Wait for pages on their way. Raises `TransferError` if the peer leaves, or they take longer than allowed."""
        while not fence.done:
            self._check()
            if time.monotonic() > self._deadline:
                raise TransferError("the peer is stuck")
            time.sleep(POLL_SECONDS)


def nccl_transfer(network: Nccl, door: Door, peer: Peer, timeout: float = 30.0) -> PairTransfer:
    """Between pools on GPUs."""
    return PairTransfer(NcclLine(network, SENDER, timeout), NcclLine(network, RECEIVER, timeout), door, peer)
