"""NCCL's communicators of two, between pools.

This declares only the functions of NCCL that they take, by ctypes, as nccl.h has them since 2.18; torch brings the
library along. torch's own process groups have one communicator for both directions of a pair, and end the process when
a peer is late. Not run on two GPUs yet (docs/gpu.md).
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import partial

import torch

from miniserve.kv.memory import KVMemory
from miniserve.kv.side import Fence, SideStream
from miniserve.kv.transfer.interface import TransferError

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


def load() -> ctypes.CDLL:
    """The library that torch uses. Raises OSError if there is none."""
    library = ctypes.CDLL("libnccl.so.2")
    for name, arguments in FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, _int
    library.ncclGetErrorString.argtypes, library.ncclGetErrorString.restype = [_int], ctypes.c_char_p
    return library


class Nccl:
    """Makes communicators over our pool."""

    def __init__(self, memory: KVMemory) -> None:
        """Raises OSError if there is no NCCL."""
        self.library = load()
        self.memory = memory

    def enter_thread(self) -> None:
        """The calling thread will make communicators and use them. It begins with GPU 0 as its current one, and would
        take memory there."""
        torch.cuda.set_device(self.memory.pages.device)

    def identity(self) -> bytes:
        """What both sides of a new communicator need to find each other: the place of a thread of NCCL's here."""
        identity = UniqueId()
        call(self.library, "ncclGetUniqueId", ctypes.byref(identity))
        return bytes(identity)

    def join(self, identity: bytes, rank: int, side: SideStream, check: Callable[[], None]) -> NcclCommunicator:
        """Our end of a communicator that works on `side`, once both ends are there; raises `TransferError`. Whenever it
        has to wait for the peer, also later, `check` is called; what that raises ends the wait."""
        return NcclCommunicator(self, identity, rank, side, check)


class NcclCommunicator:
    """One direction of a pair, beside the engine's steps. Both sides name as many pages, in the same order.

    Its calls do not block: one that has to wait for the peer returns at once, and `_settle` waits, so that a peer that
    leaves can end it.
    """

    def __init__(self, network: Nccl, identity: bytes, rank: int, side: SideStream, check: Callable[[], None]) -> None:
        self._library = network.library
        self._call = partial(call, network.library)
        self._base, self._page_bytes = network.memory.pages.data_ptr(), network.memory.shape.bytes
        self._peer = 1 - rank
        self._side = side
        self._check = check
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
            self._library.ncclCommAbort(self._communicator)
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
            if state.value == SUCCESS:
                return
            if state.value != IN_PROGRESS:
                raise TransferError(f"NCCL: {text(self._library, state.value)}")
            self._check()
            time.sleep(POLL_SECONDS)


def call(library: ctypes.CDLL, function: str, *arguments: object) -> None:
    """Call a function of NCCL's. Raises `TransferError`."""
    result = getattr(library, function)(*arguments)
    if result not in (SUCCESS, IN_PROGRESS):
        raise TransferError(f"NCCL: {function}: {text(library, result)}")


def text(library: ctypes.CDLL, result: int) -> str:
    return str(library.ncclGetErrorString(result), "ascii", "replace")
