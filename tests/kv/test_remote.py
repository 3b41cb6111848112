"""Pages that the receiver asks for, over a link that moves them by sockets as NCCL does between GPUs: late, beside the
caller, and stuck for ever when the peer is. And what of NCCL can be held to its rules without a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from miniserve.cluster.messages import Peer, PoolInfo
from miniserve.kv.memory import KVMemory, PageShape
from miniserve.kv.transfer import connect as transfer
from miniserve.kv.transfer import nccl, remote
from miniserve.kv.transfer.interface import TransferError
from miniserve.kv.transfer.nccl import Nccl
from miniserve.kv.transfer.remote import ASKS, OWNS, RemoteCopy, RemoteTransfer
from miniserve.worker.sequence import State
from tests.worker import test_handoff

PAGES = 12
SHAPE = PageShape(layers=8, page_tokens=64, kv_heads=8, head_dim=64, dtype=torch.bfloat16)  # 1 MiB a page
PROMPT = 2.0
"""Seconds that anything "at once" may take where other programs are busy too."""


class QuietSide:
    """A side stream that has nothing to order, and remembers what it was told."""

    made: list[QuietSide] = []

    def __init__(self, device: torch.device) -> None:
        self.calls: list[str] = []
        self.made.append(self)

    def follow(self) -> None:
        self.calls.append("follow")

    def lead(self) -> None:
        self.calls.append("lead")


class SocketMark:
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
    """See `Network`. `brake` is waited for before each page that is sent."""

    def __init__(self, memory: KVMemory, brake: Callable[[], object] = lambda: None) -> None:
        self.memory = memory
        self.brake = brake
        self.listener: socket.socket | None = None
        self.links: list[SocketLink] = []

    def enter_thread(self) -> None:
        self.thread = threading.current_thread()

    def identity(self) -> bytes:
        self.listener = socket.socket(socket.AF_UNIX)
        name = b"\0" + uuid.uuid4().bytes
        self.listener.bind(name)
        self.listener.listen()
        return name

    def join(self, identity: bytes, rank: int, side: QuietSide, check: Callable[[], None]) -> SocketLink:
        if rank == ASKS:
            channel = socket.socket(socket.AF_UNIX)
            channel.connect(identity)
        else:
            assert self.listener is not None
            self.listener.settimeout(0.01)
            while True:
                check()
                with contextlib.suppress(TimeoutError):
                    channel = self.listener.accept()[0]
                    break
            self.listener.close()
        self.links.append(SocketLink(self, channel))
        return self.links[-1]


class SocketLink:
    """See `Link`."""

    def __init__(self, network: SocketNetwork, channel: socket.socket) -> None:
        self.network = network
        self.channel = channel
        self.moved: list[list[int]] = []
        self.marks: list[SocketMark] = []
        shape = network.memory.shape
        self.pool = [*network.memory.shared.pages(shape.bytes), np.zeros(shape.bytes, np.uint8)]  # and a scratch page

    def send(self, pages: list[int]) -> SocketMark:
        def work() -> None:
            for page in pages:
                self.network.brake()
                self.channel.sendall(self.pool[page].tobytes())

        return self._begin(work, pages)

    def receive(self, pages: list[int]) -> SocketMark:
        def work() -> None:
            for page in pages:
                missing = memoryview(self.pool[page])
                while missing:
                    if not (got := self.channel.recv_into(missing)):
                        time.sleep(60)
                    missing = missing[got:]

        return self._begin(work, pages)

    def _begin(self, work: Callable[[], None], pages: list[int]) -> SocketMark:
        assert not self.marks or self.marks[-1].done, "one at a time, in their order"
        self.moved.append(pages)
        self.marks.append(SocketMark(work))
        return self.marks[-1]

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)
        self.channel.close()


@pytest.fixture(autouse=True)
def sides(monkeypatch: pytest.MonkeyPatch) -> list[QuietSide]:
    monkeypatch.setattr(QuietSide, "made", [])
    monkeypatch.setattr(remote, "SideStream", QuietSide)
    return QuietSide.made


def new_memory(seed: int) -> KVMemory:
    memory = KVMemory(SHAPE, PAGES, torch.device("cpu"))
    memory.shared.bytes.random_(0, 256, generator=torch.Generator().manual_seed(seed))
    return memory


def peer(name: str, epoch: int = 1) -> Peer:
    return Peer(name, epoch, "", PoolInfo(os.getpid(), -1, PAGES, SHAPE.bytes, ""))


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def store(copy: RemoteCopy, ours: list[int]) -> None:
    copy.store(ours)
    until(lambda: copy.stored)


class End:
    """One worker's end of the pair."""

    def __init__(self, us: str, them: str, run_dir: Path, seed: int, timeout: float = 30.0) -> None:
        self.memory = new_memory(seed)
        self.go = threading.Event()
        self.go.set()
        self.network = SocketNetwork(self.memory, self.go.wait)
        self.transfer = RemoteTransfer(self.network, self.memory, (us, 1), peer(them), str(run_dir), timeout)

    def content(self, *pages: int) -> bytes:
        return self.memory.shared.pages(SHAPE.bytes)[list(pages)].tobytes()

    @property
    def threads(self) -> list[threading.Thread]:
        return [self.transfer._asking.thread, self.transfer._owning.thread]

    @property
    def asked(self) -> list[list[int]]:
        """Where what came was written, after the scratch page of the beginning."""
        return next(link.moved for link in self.network.links if link.moved[0] == [PAGES])[1:]


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[End, End]]:
    both = End("p0", "d0", tmp_path, 1), End("d0", "p0", tmp_path, 2)
    yield both
    for end in both:
        end.go.set()
        end.transfer.close()
    for end in both:
        for thread in end.threads:
            thread.join(PROMPT)
            assert not thread.is_alive()


def test_both_directions_at_once(ends: tuple[End, End]) -> None:
    left, right = ends
    chunks, landing = [[3, 1], [0, 2, 4], [5]], [[7, 6], [8, 11, 9], [10]]
    copies = []
    for chunk, ours in zip(chunks, landing, strict=True):
        for here, there in ((left, right), (right, left)):
            ticket = there.transfer.offer(chunk)
            copies.append(here.transfer.fetch(ticket, chunk))
            assert copies[-1].ready
            copies[-1].store(ours)
    until(lambda: all(copy.stored for copy in copies))
    assert [copy.seconds for copy in copies] == [0.5] * 6
    for chunk, ours in zip(chunks, landing, strict=True):
        assert right.content(*ours) == left.content(*chunk)
        assert left.content(*ours) == right.content(*chunk)


def test_pages_that_nobody_stores_are_not_asked_for(ends: tuple[End, End]) -> None:
    left, right = ends
    for number in range(9):
        copy = right.transfer.fetch(left.transfer.offer([number]), [number])
        if number % 3 == 0:
            store(copy, [11])
            assert right.content(11) == left.content(number)
    assert right.asked == [[11]] * 3


def test_what_is_stored_follows_the_engine(ends: tuple[End, End], sides: list[QuietSide]) -> None:
    _, right = ends
    store(right.transfer.fetch((0, 0), [1]), [7])
    assert sides[3].calls == ["follow"], "the side stream of what comes to the second end"


def test_what_is_abandoned_goes_elsewhere_or_is_waited_for(ends: tuple[End, End], sides: list[QuietSide]) -> None:
    left, right = ends
    store(right.transfer.fetch((0, 0), [0]), [11])
    left.go.clear()
    coming, asked = right.transfer.fetch((0, 0), [1, 2]), right.transfer.fetch((0, 0), [3, 4])
    before = right.content(8, 9)
    coming.store([6, 7])
    asked.store([8, 9])
    until(lambda: coming.mark)
    sides[3].calls.clear()
    asked.abandon()
    assert sides[3].calls == []
    coming.abandon()
    assert sides[3].calls == ["lead"], "the engine's next step begins when the pages have come"
    left.go.set()
    until(lambda: coming.stored and asked.stored)
    assert right.content(6, 7) == left.content(1, 2)
    assert right.content(8, 9) == before
    assert right.asked == [[11], [6, 7], [PAGES, PAGES]]
    coming.abandon()
    assert sides[3].calls == ["lead"]


def test_what_is_abandoned_and_stuck_is_not_waited_for_long(
    ends: tuple[End, End], sides: list[QuietSide], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine waits on the GPU for the end of what is being written: then a stuck peer must not hold it."""
    monkeypatch.setattr(remote, "ABANDONED_SECONDS", 0.1)
    left, right = ends
    store(right.transfer.fetch((0, 0), [0]), [11])
    left.go.clear()
    copy = right.transfer.fetch((0, 0), [1])
    copy.store([7])
    until(lambda: copy.mark)
    copy.abandon()
    assert sides[3].calls == ["follow", "follow", "lead"]
    until(lambda: copy.lost, PROMPT)
    left.go.set()
    store(right.transfer.fetch((0, 0), [2]), [8])
    assert right.content(8) == left.content(2)


def test_what_the_device_says_breaks_the_connection_too(ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = ends
    store(right.transfer.fetch((0, 0), [0]), [11])
    receive = SocketLink.receive

    def fail(link: SocketLink, pages: list[int]) -> SocketMark:
        monkeypatch.setattr(SocketLink, "receive", receive)
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(SocketLink, "receive", fail)
    copy = right.transfer.fetch((0, 0), [1])
    copy.store([7])
    until(lambda: copy.lost, PROMPT)
    store(right.transfer.fetch((0, 0), [1]), [7])
    assert right.content(7) == left.content(1)


def test_a_peer_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    early = End("d0", "p0", tmp_path, 1)
    wanted, unwanted = early.transfer.fetch((0, 0), [1, 2]), early.transfer.fetch((0, 0), [3])
    unwanted.store([5])
    wanted.store([3, 4])
    unwanted.abandon()
    time.sleep(0.3)
    assert not wanted.stored
    late = End("p0", "d0", tmp_path, 2)
    until(lambda: wanted.stored)
    assert early.content(3, 4) == late.content(1, 2)
    assert early.asked == [[3, 4]]
    early.transfer.close()
    late.transfer.close()


def test_close_is_prompt_and_loses_what_is_under_way(ends: tuple[End, End]) -> None:
    left, right = ends
    store(right.transfer.fetch((0, 0), [0]), [11])
    left.go.clear()
    copies = [right.transfer.fetch((0, 0), [page]) for page in range(3)]
    for copy in copies:
        copy.store([6])
    until(lambda: copies[0].mark)
    started = time.monotonic()
    right.transfer.close()
    assert time.monotonic() - started < 0.25
    for copy in copies:
        until(lambda copy=copy: copy.lost, PROMPT)
        with pytest.raises(TransferError, match="broke"):
            _ = copy.stored
    with pytest.raises(TransferError, match="gone"):
        right.transfer.fetch((0, 0), [1]).store([6])
    for thread in right.threads:
        thread.join(PROMPT)
        assert not thread.is_alive()


def test_close_before_the_peer_has_come(tmp_path: Path) -> None:
    alone = End("d0", "p0", tmp_path, 1)
    copy = alone.transfer.fetch((0, 0), [1])
    copy.store([2])
    alone.transfer.close()
    until(lambda: copy.lost, PROMPT)
    for thread in alone.threads:
        thread.join(PROMPT)
        assert not thread.is_alive()


def test_a_pair_that_was_parted_meets_again(ends: tuple[End, End], tmp_path: Path) -> None:
    left, right = ends
    store(right.transfer.fetch((0, 0), [0]), [11])
    right.transfer.close()
    again = End("d0", "p0", tmp_path, 3)
    store(again.transfer.fetch((0, 0), [1]), [10])
    assert again.content(10) == left.content(1)
    store(left.transfer.fetch((0, 0), [2]), [9])
    assert left.content(9) == again.content(2)
    again.transfer.close()


@pytest.mark.parametrize("pages", [[PAGES], [-1], [0, 1000]])
def test_pages_that_are_not_the_peers_are_refused(
    ends: tuple[End, End], pages: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    left, right = ends
    copy = right.transfer.fetch((0, 0), pages)
    copy.store([7] * len(pages))
    until(lambda: copy.lost)
    assert f"of {PAGES}" in caplog.text
    store(right.transfer.fetch((0, 0), [1]), [7])  # over the next connection
    assert right.content(7) == left.content(1)


def test_a_peer_that_is_stuck_in_the_middle_breaks_the_connection(tmp_path: Path) -> None:
    stuck, waits = End("p0", "d0", tmp_path, 1, timeout=0.4), End("d0", "p0", tmp_path, 2)
    store(waits.transfer.fetch((0, 0), [0]), [11])
    stuck.go.clear()
    copies = [waits.transfer.fetch((0, 0), [1, 2]), waits.transfer.fetch((0, 0), [3])]
    started = time.monotonic()
    for copy in copies:
        copy.store([6, 7][: len(copy.theirs)])
    until(lambda: all(copy.lost for copy in copies), 0.4 + PROMPT)
    assert time.monotonic() - started > 0.3
    stuck.go.set()
    store(waits.transfer.fetch((0, 0), [3]), [7])
    assert waits.content(7) == stuck.content(3)
    for end in (stuck, waits):
        end.transfer.close()


def test_a_handoff(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = []

    def connect(memory: KVMemory, layout: str, us: tuple[str, int], peer: Peer, *rest: str) -> RemoteTransfer:
        ways.append(RemoteTransfer(SocketNetwork(memory), memory, us, peer, str(tmp_path)))
        return ways[-1]

    monkeypatch.setattr(test_handoff, "connect", connect)
    pair = test_handoff.Pair(tiny_folder)
    sequence = pair.ask()
    for message in pair.publications():
        pair.d.handoffs.receiver.on_publish(message, "p0")

    def arrived() -> bool:
        pair.d.handoffs.receiver.poll()
        return sequence.state is not State.RECEIVING

    until(arrived)
    pair.p.handoffs.sender.on_release("t")
    assert pair.finish() == pair.text
    assert pair.d.engine.counters.prompt_tokens == 0, "D has computed no part of the prompt"
    pair.check()
    for each in ways:
        each.close()


# --- peers that die -------------------------------------------------------------------------------------------------


def be_a_peer(control: Connection, run_dir: str) -> None:
    """Another process, in which there are pages until it is killed."""
    remote.SideStream = QuietSide  # type: ignore[misc,assignment]
    end = End("p0", "d0", Path(run_dir), 1)
    control.send(end.content(*range(PAGES)))
    while True:
        control.recv()
        end.go.clear()
        control.send(None)


@pytest.fixture
def child(tmp_path: Path) -> Iterator[tuple[multiprocessing.process.BaseProcess, Connection, bytes]]:
    context = multiprocessing.get_context("forkserver")
    control, theirs = context.Pipe()
    process = context.Process(target=be_a_peer, args=(theirs, str(tmp_path)), daemon=True)
    process.start()
    yield process, control, control.recv()
    process.kill()
    process.join()


@pytest.mark.parametrize("midway", [False, True])
def test_a_killed_peer_fails_its_copies_at_once(child, midway: bool, tmp_path: Path) -> None:
    process, control, content = child
    end = End("d0", "p0", tmp_path, 2)
    store(end.transfer.fetch((0, 0), [3]), [7])
    assert end.content(7) == content[3 * SHAPE.bytes : 4 * SHAPE.bytes]
    copies = [end.transfer.fetch((0, 0), [1, 2]), end.transfer.fetch((0, 0), [3])]
    if midway:
        control.send(None)
        control.recv()
    else:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.1)
    for copy in copies:
        copy.store([8, 9][: len(copy.theirs)])
    if midway:
        until(lambda: copies[0].mark)
    assert not any(copy.stored for copy in copies)
    os.kill(process.pid, signal.SIGKILL)
    for copy in copies:
        until(lambda copy=copy: copy.lost, PROMPT)
    end.transfer.close()


def test_a_stopped_peer_keeps_nobody_waiting_and_goes_on(child, tmp_path: Path) -> None:
    process, _, content = child
    end = End("d0", "p0", tmp_path, 2)
    store(end.transfer.fetch((0, 0), [3]), [7])
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(0.1)
    started, copies = time.monotonic(), []

    def ask_for_ever() -> None:
        while len(copies) < 5000:
            copies.append(end.transfer.fetch((0, 0), [len(copies) % PAGES]))
            copies[-1].store([8])

    with pytest.raises(TransferError, match="does not answer"):
        ask_for_ever()
    assert time.monotonic() - started < PROMPT
    for copy in copies[1:]:
        copy.abandon()  # out of patience
    os.kill(process.pid, signal.SIGCONT)
    until(lambda: copies[0].stored)
    assert end.content(8) == content[: SHAPE.bytes]
    end.transfer.close()


# --- NCCL -----------------------------------------------------------------------------------------------------------


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
        return "mark"

    def drain(self) -> None:
        self.calls.append("drain")


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch):
    """Joins a link over a fake library."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"cuda_stream": 5}))

    def join(library: FakeLibrary, rank: int, check: Callable[[], None] = lambda: None):
        monkeypatch.setattr(nccl, "load", lambda: library)
        memory = new_memory(1)
        side = NowSide(torch.device("cpu"))
        return Nccl(memory).join(bytes(range(128)), rank, side, check), memory, side

    return join


@pytest.mark.parametrize(("rank", "function"), [(ASKS, "ncclRecv"), (OWNS, "ncclSend")])
def test_nccl_moves_whole_pages_in_one_group(joined, rank: int, function: str) -> None:
    library = FakeLibrary()
    link, memory, side = joined(library, rank)
    assert library.calls == [("ncclCommInitRankConfig", 2, rank, bytes(range(128)), 0, 21700, 48)]
    assert library.looks == 3
    library.calls.clear()
    assert (link.receive if rank == ASKS else link.send)([4, 1]) == "mark"
    base = memory.pages.data_ptr()
    pages = [(function, base + page * SHAPE.bytes, SHAPE.bytes, nccl.UINT8, 1 - rank, 77, 5) for page in (4, 1)]
    assert library.calls == [("ncclGroupStart",), *pages, ("ncclGroupEnd",)]
    assert library.looks == 6, "the stream has it when the communicator says so"
    library.calls.clear()
    link.abort()
    link.abort()
    assert library.calls == [("ncclCommAbort", 77)]
    assert side.calls == ["run", "drain"]


def test_nccl_says_what_failed_and_leaves_no_communicator(joined) -> None:
    library = FakeLibrary("ncclCommInitRankConfig")
    with pytest.raises(TransferError, match="ncclCommInitRankConfig: unhandled system error"):
        joined(library, ASKS)
    assert library.calls[-1] == ("ncclCommAbort", 77)
    library = FakeLibrary("ncclRecv")
    link, _, _ = joined(library, ASKS)
    with pytest.raises(TransferError, match="ncclRecv"):
        link.receive([1])
    assert library.calls[-1] == ("ncclGroupEnd",), "the thread's group is closed"


def test_nccl_ends_its_wait_when_the_peer_leaves(joined) -> None:
    def check() -> None:
        raise TransferError("the peer has left")

    library = FakeLibrary()
    with pytest.raises(TransferError, match="left"):
        joined(library, OWNS, check)
    assert library.calls[-1] == ("ncclCommAbort", 77)


def test_without_nccl_there_is_no_way_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def load() -> ctypes.CDLL:
        raise OSError("libnccl.so.2: cannot open shared object file")

    monkeypatch.setattr(nccl, "load", load)
    monkeypatch.setattr(transfer, "way", lambda one, other, how: "nccl")
    assert transfer.connect(new_memory(1), "", ("d0", 1), peer("p0"), str(tmp_path), "auto") is None
    assert "no way to the pool of p0: libnccl.so.2: cannot open" in caplog.text


def test_nccl_as_it_is() -> None:
    """Its own library, where that is installed: what we declare exists, and an identity fills its bytes."""
    try:
        library = nccl.load()
    except OSError:
        pytest.skip("no libnccl.so.2 here (the nvidia-nccl wheel, 300 MB, has it)")
    identity = nccl.UniqueId()
    nccl.call(library, "ncclGetUniqueId", ctypes.byref(identity))
    assert any(bytes(identity))
