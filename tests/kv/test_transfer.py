"""KV pages from one pool to another, by every backend; and what peers that die or hang do to the sockets."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from miniserve.cluster.messages import Peer, PoolInfo
from miniserve.kv.memory import KVMemory, PageShape
from miniserve.kv.transfer import pair as pairs
from miniserve.kv.transfer.door import TransferError
from miniserve.kv.transfer.interface import Transfer
from miniserve.kv.transfer.mapped import MappedTransfer
from miniserve.kv.transfer.pair import PairCopy, PairTransfer
from tests.support.doors import door
from tests.support.kv_pools import PAGES, SHAPES, content, device_memory, new_memory, peer_of, socket_transfer
from tests.support.waiting import PROMPT, stop, until

pytestmark = pytest.mark.slow


def store(transfer: Transfer, theirs: list[int], ours: list[int]) -> None:
    copy = transfer.fetch(theirs, ours)
    until(lambda: copy.stored)


class Side:
    """One pool and the way from it to the other's."""

    def __init__(self, memory: KVMemory, transfer: Transfer) -> None:
        self.memory = memory
        self.transfer = transfer

    def content(self, pages: list[int]) -> bytes:
        return content(self.memory, pages)


def two_sides(backend: str, run_dir: Path, shape: PageShape = SHAPES["bf16"], **kwargs) -> tuple[Side, Side]:
    """Two workers in this process."""
    left, right = new_memory(shape, 1), new_memory(shape, 2)
    names = {"p0": left, "d0": right}
    sides = []
    for us, them in (("p0", "d0"), ("d0", "p0")):
        peer = peer_of(them, 7, names[them])
        if backend == "mapped":
            sides.append(Side(names[us], MappedTransfer(names[us], peer)))
        else:
            sides.append(Side(names[us], socket_transfer(names[us], door((us, 7), str(run_dir)), peer, **kwargs)))
    return sides[0], sides[1]


# --- any backend ----------------------------------------------------------------------------------------------------


@pytest.fixture(
    params=[(backend, shape) for backend in ("mapped", "collective") for shape in ("bf16", "odd")], ids="-".join
)
def sides(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Side, Side]]:
    backend, shape = request.param
    both = two_sides(backend, tmp_path, SHAPES[shape])
    yield both
    for side in both:
        side.transfer.close()


def test_both_directions_at_once(sides: tuple[Side, Side]) -> None:
    left, right = sides
    chunks = [[3, 1], [0, 2, 9, 4], [7]]
    landing = [[20, 12], [13, 19, 14, 15], [16]]
    before = {side: side.content(list(range(12))) for side in sides}
    rest = {side: side.content([17, 18, 21, 22, 23]) for side in sides}
    copies = []
    for chunk, ours in zip(chunks, landing, strict=True):
        copies += [right.transfer.fetch(chunk, ours), left.transfer.fetch(chunk, ours)]
    for copy in copies:
        until(lambda copy=copy: copy.stored)
    for chunk, ours in zip(chunks, landing, strict=True):
        assert right.content(ours) == left.content(chunk)
        assert left.content(ours) == right.content(chunk)
    for side in sides:  # and nothing else was touched
        assert side.content(list(range(12))) == before[side]
        assert side.content([17, 18, 21, 22, 23]) == rest[side]


def test_many_publications_arrive_in_order_and_unwanted_ones_do_not_disturb(sides: tuple[Side, Side]) -> None:
    left, right = sides
    for number in range(60):
        chunk = [(number + i) % 12 for i in range(1 + number % 5)]
        ours = [12 + page for page in chunk]
        if number % 3 == 0:
            right.transfer.fetch(chunk, ours).abandon()  # the turn has ended, and it may still be on its way
            continue
        store(right.transfer, chunk, ours)
        assert right.content(ours) == left.content(chunk), number


def test_a_queue_of_publications(sides: tuple[Side, Side]) -> None:
    left, right = sides
    copies = [right.transfer.fetch([page], [12 + page]) for page in range(12)]
    for page in reversed(range(12)):
        until(lambda copy=copies[page]: copy.stored)
    assert right.content(list(range(12, 24))) == left.content(list(range(12)))


# --- sockets, both sides here -----------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Side, Side]]:
    both = two_sides("collective", tmp_path)
    yield both
    for side in both:
        side.transfer.close()


def lost(copy: PairCopy, seconds: float = PROMPT) -> bool:
    """Whether it fails in so many seconds."""
    until(copy.over.is_set, seconds)
    with pytest.raises(TransferError, match="broke"):
        _ = copy.stored
    return True


def threads(transfer: PairTransfer) -> list[threading.Thread]:
    return [transfer.receiving.thread, transfer.giving.thread]


def test_a_peer_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    left, right = new_memory(SHAPES["bf16"], 1), new_memory(SHAPES["bf16"], 2)
    early = socket_transfer(right, door(("d0", 1), str(tmp_path)), peer_of("p0", 1, left))
    copy = early.fetch([1, 2], [3, 4])
    time.sleep(0.3)
    assert not copy.stored
    late = socket_transfer(left, door(("p0", 1), str(tmp_path)), peer_of("d0", 1, right))
    until(lambda: copy.stored)
    assert content(right, [3, 4]) == content(left, [1, 2])
    early.close()
    late.close()


def test_what_is_given_up_before_the_peer_comes_is_not_asked_for(tmp_path: Path) -> None:
    left, right = new_memory(SHAPES["bf16"], 1), new_memory(SHAPES["bf16"], 2)
    early = socket_transfer(right, door(("d0", 1), str(tmp_path)), peer_of("p0", 1, left))
    before = content(right, [3])
    given_up = early.fetch([0], [3])
    given_up.abandon()
    late = socket_transfer(left, door(("p0", 1), str(tmp_path)), peer_of("d0", 1, right))
    store(early, [1, 2], [4, 5])
    assert content(right, [3, 4, 5]) == before + content(left, [1, 2])
    assert given_up.seconds == 0
    early.close()
    late.close()


@pytest.mark.parametrize("pages", [[PAGES], [-1], [0, 1000]])
def test_pages_that_are_not_the_peers_are_refused(
    pair: tuple[Side, Side], pages: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    left, right = pair
    with pytest.raises(TransferError, match="broke"):
        store(right.transfer, pages, [12] * len(pages))
    assert f"of {PAGES}" in caplog.text
    store(right.transfer, [1], [14])  # over the next connection
    assert right.content([14]) == left.content([1])
    store(left.transfer, [2], [16])
    assert left.content([16]) == right.content([2])


def test_close_is_prompt(pair: tuple[Side, Side], tmp_path: Path) -> None:
    left, right = pair
    store(right.transfer, [0], [12])
    alone = socket_transfer(right.memory, door(("d1", 1), str(tmp_path)), peer_of("p1", 1, left.memory))
    waiting = alone.fetch([1], [13]), alone.fetch([2], [13])
    started = time.monotonic()
    for transfer in (right.transfer, alone):
        transfer.close()
    assert time.monotonic() - started < 0.25
    for copy in (*waiting, right.transfer.fetch([1], [13])):
        assert lost(copy)
    for transfer in (right.transfer, alone):
        until(lambda transfer=transfer: not any(thread.is_alive() for thread in threads(transfer)), PROMPT)


def test_a_pair_that_was_parted_meets_again(pair: tuple[Side, Side], tmp_path: Path) -> None:
    left, right = pair
    store(right.transfer, [0], [12])
    store(left.transfer, [0], [12])
    right.transfer.close()
    again = socket_transfer(right.memory, door(("d0", 7), str(tmp_path)), peer_of("p0", 7, left.memory))
    store(again, [1], [13])
    assert right.content([13]) == left.content([1])
    with pytest.raises(TransferError, match="broke"):
        store(left.transfer, [2], [14])  # over the old connection
    store(left.transfer, [2], [14])
    assert left.content([14]) == right.content([2])
    again.close()


def test_pages_of_a_gpu_come_by_way_of_host_memory(tmp_path: Path) -> None:
    """Laid out as on a GPU, with a scratch page and no shared memory."""
    memories = {"p0": device_memory(1), "d0": device_memory(2)}
    ends = {
        us: socket_transfer(memories[us], door((us, 1), str(tmp_path)), Peer(them, 1, "", PoolInfo(1, -1, 8, 512, "")))
        for us, them in (("p0", "d0"), ("d0", "p0"))
    }
    store(ends["d0"], [1, 4], [7, 3])
    assert memories["d0"].bytes[[7, 3]].equal(memories["p0"].bytes[[1, 4]])
    for end in ends.values():
        end.close()


# --- sockets, with real peers -----------------------------------------------------------------------------------------


def be_a_peer(control: Connection, shape: str, us: tuple[str, int], peer: Peer, run_dir: str, timeout: float) -> None:
    """Another process: obeys commands until it is killed."""
    torch.set_num_threads(1)
    memory = new_memory(SHAPES[shape], us[1])
    transfer = socket_transfer(memory, door(us, run_dir), peer, timeout)
    control.send(None)
    while True:
        match control.recv():
            case ("show", pages):
                control.send(content(memory, pages))
            case ("fetch", pages):
                store(transfer, pages, pages)
                control.send(content(memory, pages))


class Child:
    """That other process, and our way to it."""

    def __init__(self, context, run_dir: Path, epoch: int, timeout: float, shape: str) -> None:
        self.memory = new_memory(SHAPES[shape], 0)
        peer = peer_of("d0", 1, self.memory)
        self.control, theirs = context.Pipe()
        arguments = (theirs, shape, ("p0", epoch), peer, str(run_dir), timeout)
        self.process = context.Process(target=be_a_peer, args=arguments, daemon=True)
        self.process.start()
        self.control.recv()
        them = Peer("p0", epoch, "", PoolInfo(self.process.pid, -1, PAGES, self.memory.shape.bytes, ""))
        self.transfer = socket_transfer(self.memory, door(("d0", 1), str(run_dir)), them, timeout)

    def ask(self, *command: object):
        self.control.send(command)
        assert self.control.poll(20)
        return self.control.recv()

    def check(self) -> None:
        """Pages get through in both directions."""
        store(self.transfer, [1, 2], [3, 4])
        assert content(self.memory, [3, 4]) == self.ask("show", [1, 2])
        assert self.ask("fetch", [5]) == content(self.memory, [5])

    def fetch_a_part(self, monkeypatch: pytest.MonkeyPatch) -> PairCopy:
        """All pages of the peer, of which only the first bytes are here when this returns."""
        room: list[np.ndarray] = []

        def empty(*arguments: object) -> np.ndarray:
            room.append(np.zeros(*arguments))
            return room[-1]

        with monkeypatch.context() as patch:
            patch.setattr(pairs.np, "empty", empty)
            everything, end = list(range(PAGES)), time.monotonic() + 20
            copy = self.transfer.fetch(everything, everything)
            while not (room and room[0][0].any()):  # without a pause, in which all might come
                assert time.monotonic() < end
        return copy

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[[int, float], Child]]:
    """Starts peers: epoch, timeout, shape."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["miniserve.kv.transfer.pair"])
    children = []

    def start(epoch: int, timeout: float = 30.0, shape: str = "bf16") -> Child:
        children.append(Child(context, tmp_path, epoch, timeout, shape))
        return children[-1]

    yield start
    for each in children:
        each.transfer.close()
        each.process.kill()
        each.process.join()


def test_a_killed_peer_fails_its_copies_at_once_and_no_others(
    child: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, waiting, midway, bystander = child(1), child(2), child(3, shape="big"), child(4)
    for each in (before, waiting, midway, bystander):
        each.check()
    # One dies before anything is fetched.
    before.kill()
    before.process.join()
    killed = time.monotonic()
    with pytest.raises(TransferError):
        store(before.transfer, [1], [7])
    assert time.monotonic() - killed < PROMPT
    # One dies while it is waited for.
    stop(waiting.process.pid)
    copies = [waiting.transfer.fetch([1], [1]), waiting.transfer.fetch([2], [1])]
    time.sleep(0.1)
    assert not any(copy.stored for copy in copies)
    waiting.kill()
    # One dies in the middle of its pages.
    copies.append(midway.fetch_a_part(monkeypatch))
    midway.kill()
    assert all(lost(copy) for copy in copies)
    bystander.check()


@pytest.mark.parametrize("midway", [False, True])
def test_a_stopped_peer_times_out_and_comes_back(
    child: Callable[..., Child], midway: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = child(1, 1.5, "big")
    peer.check()
    if midway:
        copy = peer.fetch_a_part(monkeypatch)
    stop(peer.process.pid)
    started = time.monotonic()
    copies = [copy] if midway else []
    copies += [peer.transfer.fetch([1], [7]) for _ in range(20)]
    assert time.monotonic() - started < 0.5  # no call waits for the peer
    assert not copies[0].stored
    assert all(lost(copy, 1.5 + PROMPT) for copy in copies)
    assert 1.0 < time.monotonic() - started < 1.5 + PROMPT
    os.kill(peer.process.pid, signal.SIGCONT)
    peer.check()
    peer.check()


EXIT = """
import os, signal, sys, time
import torch
sys.path.insert(0, sys.argv[2])
from tests.support.doors import door
from tests.support.kv_pools import SHAPES, new_memory, peer_of, socket_transfer
ours, theirs = new_memory(SHAPES["bf16"], 1), new_memory(SHAPES["bf16"], 2)
child = os.fork()
if child == 0:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    there = socket_transfer(theirs, door(("p0", 1), sys.argv[1]), peer_of("d0", 1, ours))
    time.sleep(60)
connected = socket_transfer(ours, door(("d0", 1), sys.argv[1]), peer_of("p0", 1, theirs))
first = connected.fetch([0], [1])
while not first.stored:
    time.sleep(0.01)
os.kill(child, signal.SIGSTOP)
waiting = connected.fetch([0], [1])
alone = socket_transfer(ours, door(("d0", 1), sys.argv[1]), peer_of("p1", 1, theirs))
alone.fetch([0], [1])

class Last:
    def __del__(self):  # while the interpreter is torn down, a thread finds out that its peer is gone
        os.kill(child, signal.SIGKILL)
        time.sleep(0.3)

last = Last()
print("leaving", flush=True)
"""


def test_the_process_can_exit_whatever_the_threads_do(tmp_path: Path) -> None:
    command = [sys.executable, "-c", EXIT, str(tmp_path), str(Path(__file__).parents[2])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "leaving\n", process.stderr.read()
        started = time.monotonic()
        process.wait(30)
        assert time.monotonic() - started < PROMPT + 0.3
        assert (process.returncode, process.stderr.read()) == (0, "")
