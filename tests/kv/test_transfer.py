"""KV pages from one pool to another, by every backend; and what peers that die or hang do to the collective one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from miniserve.cluster.messages import Peer, PoolInfo
from miniserve.kv.memory import KVMemory, PageShape
from miniserve.kv.transfer import gloo
from miniserve.kv.transfer.collective import CollectiveCopy, CollectiveTransfer
from miniserve.kv.transfer.interface import Transfer, TransferError
from miniserve.kv.transfer.mapped import MappedTransfer
from tests.support.kv_pools import PAGES, SHAPES, content, new_memory, peer_of
from tests.support.waiting import PROMPT, stop, until

pytestmark = pytest.mark.slow


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
            sides.append(Side(names[us], CollectiveTransfer(names[us], (us, 7), peer, str(run_dir), **kwargs)))
    return sides[0], sides[1]


# --- any backend ----------------------------------------------------------------------------------------------------


@pytest.fixture(
    params=[(backend, shape) for backend in ("mapped", "collective") for shape in ("bf16", "odd")], ids="-".join
)
def sides(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Side, Side]]:
    backend, shape = request.param
    both = two_sides(backend, tmp_path, SHAPES[shape])
    assert [side.transfer.name for side in both] == [backend] * 2
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
    for chunk in chunks:
        tickets = [side.transfer.offer(chunk) for side in sides]
        copies.append([right.transfer.fetch(tickets[0], chunk), left.transfer.fetch(tickets[1], chunk)])
    for to_right, to_left in copies:
        until(lambda one=to_right, other=to_left: one.ready and other.ready)
    for (to_right, to_left), ours in zip(copies, landing, strict=True):
        to_left.store(ours)
        to_right.store(ours)
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
        copy = right.transfer.fetch(left.transfer.offer(chunk), chunk)
        if number % 3 == 0:
            continue  # the turn has ended, and it may still be on its way
        copy.store(ours)
        assert right.content(ours) == left.content(chunk), number


def test_a_queue_of_publications(sides: tuple[Side, Side]) -> None:
    left, right = sides
    tickets = [left.transfer.offer([page]) for page in range(12)]
    copies = [right.transfer.fetch(ticket, [page]) for page, ticket in enumerate(tickets)]
    for page in reversed(range(12)):
        copies[page].store([12 + page])
    assert right.content(list(range(12, 24))) == left.content(list(range(12)))


# --- collective, both sides here ------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Side, Side]]:
    both = two_sides("collective", tmp_path)
    yield both
    for side in both:
        side.transfer.close()


def test_the_lease_may_end_after_the_offer(pair: tuple[Side, Side]) -> None:
    left, right = pair
    offered = left.content([5])
    ticket = left.transfer.offer([5])
    left.memory.shared.bytes.zero_()
    right.transfer.fetch(ticket, [5]).store([0])
    assert right.content([0]) == offered


def test_a_peer_that_comes_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gloo, "CONNECT_SECONDS", 0.2)
    left, right = new_memory(SHAPES["bf16"], 1), new_memory(SHAPES["bf16"], 2)
    early = CollectiveTransfer(left, ("p0", 1), peer_of("d0", 1, right), str(tmp_path))
    ticket = early.offer([1, 2])
    time.sleep(1.5)
    late = CollectiveTransfer(right, ("d0", 1), peer_of("p0", 1, left), str(tmp_path))
    late.fetch(ticket, [1, 2]).store([3, 4])
    assert ticket[0] == 0
    assert content(right, [3, 4]) == content(left, [1, 2])
    early.close()
    late.close()


def test_what_does_not_come_in_time_is_given_up_and_taken_when_it_comes(tmp_path: Path) -> None:
    left, right = new_memory(SHAPES["bf16"], 1), new_memory(SHAPES["bf16"], 2)
    early = CollectiveTransfer(right, ("d0", 1), peer_of("p0", 1, left), str(tmp_path), timeout=1.0)
    copy = early.fetch((0, 0), [0])
    assert not copy.ready
    until(lambda: copy.ready, 1.0 + PROMPT)
    before = content(right, [3])
    with pytest.raises(TransferError, match="does not answer"):
        copy.store([3])
    late = CollectiveTransfer(left, ("p0", 1), peer_of("d0", 1, right), str(tmp_path))
    late.offer([0])
    until(lambda: early._group is not None)
    early.fetch(late.offer([1, 2]), [1, 2]).store([4, 5])
    assert content(right, [3, 4, 5]) == before + content(left, [1, 2])
    early.close()
    late.close()


def test_a_connection_that_breaks_begins_a_generation(pair: tuple[Side, Side]) -> None:
    left, right = pair
    right.transfer.fetch(left.transfer.offer([0]), [0]).store([12])
    # As if their offers had been lost with the connection; more of them than travel at a time.
    lost = [right.transfer.fetch((0, number), [1]) for number in range(1, 100)]
    ahead = right.transfer.fetch((1, 1), [1])  # as if we had not seen the break yet
    time.sleep(0.2)
    assert not any(copy.ready for copy in (*lost, ahead))
    left.transfer._group.shut()
    until(lambda: all(copy.ready for copy in lost), PROMPT)
    for copy in lost:
        with pytest.raises(TransferError, match="broke"):
            copy.store([13])
    until(lambda: left.transfer._generation == 1, PROMPT)
    assert left.transfer.offer([1]) == (1, 1)
    ahead.store([14])
    assert right.content([14]) == left.content([1])
    late = right.transfer.fetch((0, 0), [0])  # a publication from before
    assert late.ready
    with pytest.raises(TransferError):
        late.store([15])
    left.transfer.fetch(right.transfer.offer([2]), [2]).store([16])
    assert left.content([16]) == right.content([2])


def test_close_is_prompt(pair: tuple[Side, Side]) -> None:
    left, right = pair
    right.transfer.fetch(left.transfer.offer([0]), [0]).store([12])
    waiting = right.transfer.fetch((0, 1), [1]), right.transfer.fetch((0, 2), [1]), right.transfer.fetch((0, 3), [1])
    ahead = right.transfer.fetch((1, 0), [1])
    until(lambda: len(right.transfer._receives) == 2)  # two are posted
    started = time.monotonic()
    right.transfer.close()
    assert time.monotonic() - started < 0.25
    for copy in (*waiting, ahead, right.transfer.fetch((0, 4), [1])):
        until(lambda copy=copy: copy.ready, PROMPT)
        with pytest.raises(TransferError):
            copy.store([13])
    until(lambda: not any(thread.is_alive() for thread in right.transfer._threads), PROMPT)
    assert right.transfer.offer([0])  # into the void
    assert not right.transfer._sends
    assert right.transfer.fetch((9, 0), [0]).ready


# --- collective, with real peers ------------------------------------------------------------------------------------


def be_a_peer(control: Connection, shape: str, us: tuple[str, int], peer: Peer, run_dir: str, timeout: float) -> None:
    """Another process: obeys commands until it is killed."""
    torch.set_num_threads(1)
    memory = new_memory(SHAPES[shape], us[1])
    transfer = CollectiveTransfer(memory, us, peer, run_dir, timeout)
    control.send(None)
    while True:
        match control.recv():
            case ("offer", pages):
                control.send((transfer.offer(pages), content(memory, pages[:2])))  # a pool takes long through a pipe
            case ("fetch", ticket, pages):
                transfer.fetch(ticket, pages).store(pages)
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
        self.transfer = CollectiveTransfer(self.memory, ("d0", 1), them, str(run_dir), timeout)

    def ask(self, *command: object):
        self.control.send(command)
        assert self.control.poll(20)
        return self.control.recv()

    def check(self) -> int:
        """Pages get through in both directions; the generation."""
        until(lambda: self.transfer._group is not None)
        (generation, number), expected = self.ask("offer", [1, 2])
        self.transfer.fetch((generation, number), [1, 2]).store([3, 4])
        assert content(self.memory, [3, 4]) == expected
        assert self.ask("fetch", self.transfer.offer([5]), [5]) == content(self.memory, [5])
        return generation

    def fetch_a_part(self) -> tuple[tuple[int, int], CollectiveCopy]:
        """All pages of the peer, of which only the first bytes are here when this returns."""
        ticket, expected = self.ask("offer", list(range(PAGES)))
        copy = self.transfer.fetch(ticket, list(range(PAGES)))
        arriving, end = copy.incoming.data.numpy(), time.monotonic() + 20
        while arriving[0, :16].tobytes() != expected[:16]:  # without a pause, in which all might come
            assert time.monotonic() < end
        return ticket, copy

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[[int, float], Child]]:
    """Starts peers: epoch, timeout, shape."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["miniserve.kv.transfer.collective"])
    children = []

    def start(epoch: int, timeout: float = 30.0, shape: str = "bf16") -> Child:
        children.append(Child(context, tmp_path, epoch, timeout, shape))
        return children[-1]

    yield start
    for each in children:
        each.transfer.close()
        each.process.kill()
        each.process.join()


def test_a_killed_peer_fails_its_copies_at_once_and_no_others(child: Callable[..., Child]) -> None:
    before, waiting, midway, bystander = child(1), child(2), child(3, shape="big"), child(4)
    for each in (before, waiting, midway, bystander):
        assert each.check() == 0
    # One dies before anything is fetched.
    ticket, _ = before.ask("offer", [1])
    before.kill()
    before.process.join()
    killed = time.monotonic()
    with pytest.raises(TransferError):
        before.transfer.fetch(ticket, [1]).store([7])
    assert time.monotonic() - killed < PROMPT
    # One dies while it is waited for.
    ticket, _ = waiting.ask("offer", [1])
    stop(waiting.process.pid)
    copies = [waiting.transfer.fetch(ticket, [1]), waiting.transfer.fetch((0, ticket[1] + 1), [1])]
    waiting.transfer.offer([0])
    until(lambda: not waiting.transfer._receives and not waiting.transfer._sends)  # all are posted
    assert not any(copy.ready for copy in copies)
    waiting.kill()
    # One dies in the middle of its pages.
    copies.append(midway.fetch_a_part()[1])
    midway.kill()
    for copy in copies:
        until(lambda copy=copy: copy.ready, PROMPT)
        with pytest.raises(TransferError, match="broke"):
            copy.store([1])
    assert not waiting.transfer._sends
    assert bystander.check() == 0


@pytest.mark.parametrize("midway", [False, True])
def test_a_stopped_peer_times_out_and_comes_back_in_the_next_generation(
    child: Callable[..., Child], midway: bool
) -> None:
    peer = child(1, 1.5, "big")
    assert peer.check() == 0
    if midway:
        old, copy = peer.fetch_a_part()
    else:
        old, _ = peer.ask("offer", [1])
    stop(peer.process.pid)
    started = time.monotonic()
    if not midway:
        copy = peer.transfer.fetch(old, [1])
    for _ in range(20):
        peer.transfer.offer([0])
    assert time.monotonic() - started < 0.5  # no call waits for the peer
    assert not copy.ready
    until(lambda: copy.ready)
    with pytest.raises(TransferError):
        copy.store([7])
    assert 1.0 < time.monotonic() - started < 1.5 + PROMPT
    until(lambda: peer.transfer._generation == 1, PROMPT)
    assert peer.transfer.fetch(old, [1]).ready  # lost, and known to be
    os.kill(peer.process.pid, signal.SIGCONT)
    # The peer finds out by itself.
    until(lambda: peer.transfer._group is not None)
    assert peer.check() == 1
    assert peer.check() == 1


EXIT = """
import os, signal, sys, time
import torch
sys.path.insert(0, sys.argv[2])
from miniserve.kv.transfer.collective import CollectiveTransfer
from tests.support.kv_pools import SHAPES, new_memory, peer_of
ours, theirs = new_memory(SHAPES["bf16"], 1), new_memory(SHAPES["bf16"], 2)
child = os.fork()
if child == 0:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    CollectiveTransfer(theirs, ("p0", 1), peer_of("d0", 1, ours), sys.argv[1]).offer([0])
    time.sleep(60)
connected = CollectiveTransfer(ours, ("d0", 1), peer_of("p0", 1, theirs), sys.argv[1])
connected.fetch((0, 0), [0]).store([1])
waiting = connected.fetch((0, 1), [0])
connected.offer([0])
alone = CollectiveTransfer(ours, ("d0", 1), peer_of("p1", 1, theirs), sys.argv[1])
alone.offer([0])
alone.fetch((0, 0), [0])

class Last:
    def __del__(self):  # while the interpreter is torn down, threads that come back from C++ find nothing to return to
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
