"""Pages that the receiver asks for, over a network of sockets that is as late as NCCL may be."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from miniserve.cluster.messages import Peer, PoolInfo
from miniserve.kv.memory import KVMemory
from miniserve.kv.transfer import nccl
from miniserve.kv.transfer.door import Door, TransferError
from miniserve.kv.transfer.nccl import nccl_transfer
from miniserve.kv.transfer.pair import PairCopy, PairTransfer
from miniserve.worker.sequence import State
from tests.support.doors import door
from tests.support.handoff_pair import Pair
from tests.support.socket_network import PAGES, SHAPE, End, QuietSide, SocketCommunicator, SocketFence, SocketNetwork
from tests.support.waiting import PROMPT, stop, until


@pytest.fixture(autouse=True)
def sides(monkeypatch: pytest.MonkeyPatch) -> list[QuietSide]:
    monkeypatch.setattr(QuietSide, "made", [])
    monkeypatch.setattr(nccl, "SideStream", QuietSide)
    return QuietSide.made


def lost(copy: PairCopy) -> bool:
    return copy.over.is_set() and not copy.came


def store(transfer: PairTransfer, theirs: list[int], ours: list[int]) -> None:
    copy = transfer.fetch(theirs, ours)
    until(lambda: copy.stored)


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
        for here in (left, right):
            copies.append(here.transfer.fetch(chunk, ours))
    until(lambda: all(copy.stored for copy in copies))
    assert [copy.seconds for copy in copies] == [0.5] * 6
    for chunk, ours in zip(chunks, landing, strict=True):
        assert right.content(*ours) == left.content(*chunk)
        assert left.content(*ours) == right.content(*chunk)


def test_what_is_stored_follows_the_engine(ends: tuple[End, End], sides: list[QuietSide]) -> None:
    _, right = ends
    store(right.transfer, [1], [7])
    assert sides[3].calls == ["follow"], "the side stream of what comes to the second end"


def test_what_is_abandoned_goes_elsewhere_or_is_waited_for(ends: tuple[End, End], sides: list[QuietSide]) -> None:
    left, right = ends
    store(right.transfer, [0], [11])
    left.go.clear()
    before = right.content(8, 9)
    coming, asked = right.transfer.fetch([1, 2], [6, 7]), right.transfer.fetch([3, 4], [8, 9])
    until(lambda: coming.fence)
    sides[3].calls.clear()
    asked.abandon()
    assert sides[3].calls == []
    coming.abandon()
    assert sides[3].calls == ["lead"], "the engine's next step begins when the pages have come"
    left.go.set()
    until(lambda: coming.stored and asked.over.is_set())
    assert right.content(6, 7) == left.content(1, 2)
    assert right.content(8, 9) == before
    assert right.asked == [[11], [6, 7]], "what was given up in time is not asked for"
    coming.abandon()
    assert sides[3].calls == ["lead"]


def test_what_is_abandoned_and_stuck_is_not_waited_for_long(
    ends: tuple[End, End], sides: list[QuietSide], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine waits on the GPU for the end of what is being written: then a stuck peer must not hold it."""
    monkeypatch.setattr(nccl, "ABANDONED_SECONDS", 0.1)
    left, right = ends
    store(right.transfer, [0], [11])
    left.go.clear()
    copy = right.transfer.fetch([1], [7])
    until(lambda: copy.fence)
    copy.abandon()
    assert sides[3].calls == ["follow", "follow", "lead"]
    until(lambda: lost(copy), PROMPT)
    left.go.set()
    store(right.transfer, [2], [8])
    assert right.content(8) == left.content(2)


def test_what_the_device_says_breaks_the_connection_too(ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = ends
    store(right.transfer, [0], [11])
    receive = SocketCommunicator.receive

    def fail(communicator: SocketCommunicator, pages: list[int]) -> SocketFence:
        monkeypatch.setattr(SocketCommunicator, "receive", receive)
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(SocketCommunicator, "receive", fail)
    copy = right.transfer.fetch([1], [7])
    until(lambda: lost(copy), PROMPT)
    store(right.transfer, [1], [7])
    assert right.content(7) == left.content(1)


def test_a_peer_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    early = End("d0", "p0", tmp_path, 1)
    unwanted, wanted = early.transfer.fetch([3], [5]), early.transfer.fetch([1, 2], [3, 4])
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
    store(right.transfer, [0], [11])
    left.go.clear()
    copies = [right.transfer.fetch([page], [6]) for page in range(3)]
    until(lambda: copies[0].fence)
    started = time.monotonic()
    right.transfer.close()
    assert time.monotonic() - started < 0.25
    for copy in copies:
        until(lambda copy=copy: lost(copy), PROMPT)
        with pytest.raises(TransferError, match="broke"):
            _ = copy.stored
    late = right.transfer.fetch([1], [6])
    assert lost(late)
    for thread in right.threads:
        thread.join(PROMPT)
        assert not thread.is_alive()


def test_close_before_the_peer_has_come(tmp_path: Path) -> None:
    alone = End("d0", "p0", tmp_path, 1)
    copy = alone.transfer.fetch([1], [2])
    alone.transfer.close()
    until(lambda: lost(copy), PROMPT)
    for thread in alone.threads:
        thread.join(PROMPT)
        assert not thread.is_alive()


def test_a_pair_that_was_parted_meets_again(ends: tuple[End, End], tmp_path: Path) -> None:
    left, right = ends
    for end in ends:
        store(end.transfer, [0], [11])
    right.transfer.close()
    again = End("d0", "p0", tmp_path, 3)
    store(again.transfer, [1], [10])
    assert again.content(10) == left.content(1)
    over_the_old = left.transfer.fetch([2], [9])
    until(lambda: lost(over_the_old))
    store(left.transfer, [2], [9])
    assert left.content(9) == again.content(2)
    again.transfer.close()


@pytest.mark.parametrize("pages", [[PAGES], [-1], [0, 1000]])
def test_pages_that_are_not_the_peers_are_refused(
    ends: tuple[End, End], pages: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    left, right = ends
    copy = right.transfer.fetch(pages, [7] * len(pages))
    until(lambda: lost(copy))
    assert f"of {PAGES}" in caplog.text
    store(right.transfer, [1], [7])  # over the next connection
    assert right.content(7) == left.content(1)


def test_a_peer_that_is_stuck_in_the_middle_breaks_the_connection(tmp_path: Path) -> None:
    stuck, waits = End("p0", "d0", tmp_path, 1, timeout=0.4), End("d0", "p0", tmp_path, 2)
    store(waits.transfer, [0], [11])
    stuck.go.clear()
    started = time.monotonic()
    copies = [waits.transfer.fetch([1, 2], [6, 7]), waits.transfer.fetch([3], [6])]
    until(lambda: all(lost(copy) for copy in copies), 0.4 + PROMPT)
    assert time.monotonic() - started > 0.3
    stuck.go.set()
    store(waits.transfer, [3], [7])
    assert waits.content(7) == stuck.content(3)
    for end in (stuck, waits):
        end.transfer.close()


def test_a_handoff(tiny_folder: Path, tmp_path: Path) -> None:
    ways = []

    def connect(memory: KVMemory, ours: PoolInfo, us: Door, peer: Peer, how: str) -> PairTransfer:
        name = "d0" if peer.name == "p0" else "p0"
        ways.append(nccl_transfer(SocketNetwork(memory), door((name, 1), str(tmp_path)), peer))
        return ways[-1]

    pair = Pair(tiny_folder, connect=connect)
    pair.now = time.monotonic()
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
    nccl.SideStream = QuietSide  # type: ignore[misc,assignment]
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
    store(end.transfer, [3], [7])
    assert end.content(7) == content[3 * SHAPE.bytes : 4 * SHAPE.bytes]
    if midway:
        control.send(None)
        control.recv()
    else:
        stop(process.pid)
    copies = [end.transfer.fetch([1, 2], [8, 9]), end.transfer.fetch([3], [8])]
    if midway:
        until(lambda: copies[0].fence)
    assert not any(copy.stored for copy in copies)
    os.kill(process.pid, signal.SIGKILL)
    for copy in copies:
        until(lambda copy=copy: lost(copy), PROMPT)
    end.transfer.close()


def test_a_stopped_peer_blocks_no_call_and_goes_on(child, tmp_path: Path) -> None:
    process, _, content = child
    end = End("d0", "p0", tmp_path, 2)
    store(end.transfer, [3], [7])
    stop(process.pid)
    started, copies = time.monotonic(), []
    for number in range(5000):
        copies.append(end.transfer.fetch([number % PAGES], [8]))
    assert time.monotonic() - started < PROMPT
    before = end.content(8)
    time.sleep(0.1)  # the first one is asked for
    for copy in copies:
        copy.abandon()  # out of patience
    os.kill(process.pid, signal.SIGCONT)
    until(lambda: all(copy.over.is_set() for copy in copies))
    assert end.content(8) == before
    assert end.asked == [[7], [PAGES]]
    store(end.transfer, [0], [8])
    assert end.content(8) == content[: SHAPE.bytes]
    end.transfer.close()
