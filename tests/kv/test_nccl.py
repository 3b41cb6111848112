"""What of NCCL can be held to its rules without a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from miniserve.kv.transfer import interface, nccl
from miniserve.kv.transfer.door import TransferError
from miniserve.kv.transfer.nccl import RECEIVER, SENDER, Nccl
from tests.support.doors import door
from tests.support.socket_network import SHAPE, QuietSide, new_memory, peer


class FakeLibrary:
    """Answers as a library of NCCL whose every call takes two looks to settle; `fails` does."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.calls: list[tuple] = []
        self.looks = 0

    def __getattr__(self, name: str):
        if not name.startswith("nccl"):
            raise AttributeError(name)

        def function(*arguments):
            if name == "ncclGetErrorString":
                return b"unhandled system error"
            if name == "ncclCommGetAsyncError":
                self.looks += 1
                arguments[1]._obj.value = nccl.SUCCESS if self.looks % 3 == 0 else nccl.IN_PROGRESS
                return nccl.SUCCESS
            if name == "ncclCommInitRankConfig":
                arguments[0]._obj.value = 77
                config = arguments[4]._obj
                arguments = (*arguments[1:4:2], bytes(arguments[2]), config.blocking, config.version, config.size)
            self.calls.append((name, *(getattr(one, "value", one) for one in arguments)))
            return 2 if name == self.fails else nccl.IN_PROGRESS

        return function


class NowSide(QuietSide):
    """Runs work at once."""

    def run(self, work: Callable[[], None]) -> str:
        self.calls.append("run")
        work()
        return "fence"

    def drain(self) -> None:
        self.calls.append("drain")


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch):
    """Joins a communicator over a fake library."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"cuda_stream": 5}))

    def join(library: FakeLibrary, rank: int, check: Callable[[], None] = lambda: None):
        monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
        memory = new_memory(1)
        side = NowSide(torch.device("cpu"))
        return Nccl(memory).join(bytes(range(128)), rank, side, check), memory, side

    return join


@pytest.mark.parametrize(("rank", "function"), [(RECEIVER, "ncclRecv"), (SENDER, "ncclSend")])
def test_nccl_moves_whole_pages_in_one_group(joined, rank: int, function: str) -> None:
    library = FakeLibrary()
    communicator, memory, side = joined(library, rank)
    assert library.calls == [("ncclCommInitRankConfig", 2, rank, bytes(range(128)), 0, 21700, 48)]
    assert library.looks == 3
    library.calls.clear()
    assert (communicator.receive if rank == RECEIVER else communicator.send)([4, 1]) == "fence"
    base = memory.pages.data_ptr()
    pages = [(function, base + page * SHAPE.bytes, SHAPE.bytes, nccl.UINT8, 1 - rank, 77, 5) for page in (4, 1)]
    assert library.calls == [("ncclGroupStart",), *pages, ("ncclGroupEnd",)]
    assert library.looks == 6, "the stream has it when the communicator says so"
    library.calls.clear()
    communicator.abort()
    communicator.abort()
    assert library.calls == [("ncclCommAbort", 77)]
    assert side.calls == ["run", "drain"]


def test_nccl_says_what_failed_and_leaves_no_communicator(joined) -> None:
    library = FakeLibrary("ncclCommInitRankConfig")
    with pytest.raises(TransferError, match="ncclCommInitRankConfig: unhandled system error"):
        joined(library, RECEIVER)
    assert library.calls[-1] == ("ncclCommAbort", 77)
    library = FakeLibrary("ncclRecv")
    communicator, _, _ = joined(library, RECEIVER)
    with pytest.raises(TransferError, match="ncclRecv"):
        communicator.receive([1])
    assert library.calls[-1] == ("ncclGroupEnd",), "the thread's group is closed"


def test_nccl_ends_its_wait_when_the_peer_leaves(joined) -> None:
    def check() -> None:
        raise TransferError("the peer has left")

    library = FakeLibrary()
    with pytest.raises(TransferError, match="left"):
        joined(library, SENDER, check)
    assert library.calls[-1] == ("ncclCommAbort", 77)


def test_without_nccl_there_is_no_way_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def load(name: str) -> ctypes.CDLL:
        raise OSError("libnccl.so.2: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(interface, "way", lambda one, other, how: "nccl")
    assert (
        interface.connect(new_memory(1), new_memory(1).info(""), door(("d0", 1), str(tmp_path)), peer("p0"), "auto")
        is None
    )
    assert "no way to the pool of p0: libnccl.so.2: cannot open" in caplog.text


def test_nccl_as_it_is() -> None:
    """Its own library, where that is installed: what we declare exists, and an identity fills its bytes."""
    try:
        network = Nccl(new_memory(1))
    except OSError:
        pytest.skip("no libnccl.so.2 here (the nvidia-nccl wheel, 300 MB, has it)")
    assert any(network.identity())
