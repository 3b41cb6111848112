"""What a GPU copies beside its steps, with the calls to CUDA replaced: a stream that works when the test lets it.

`LazyStream` is as late as CUDA may be: its work runs when a test waits for it, not before. So a page that is
overwritten or read too early shows in its bytes. What the CPU does at once stands for the engine's stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import msgspec
import pytest
import torch

from miniserve.cluster.channels import decode
from miniserve.cluster.messages import CudaHandle, Envelope, Keep, Peer, Peers, PoolInfo
from miniserve.kv import swap as swapping
from miniserve.kv.eviction import ExpectedNeed
from miniserve.kv.host import HostPool
from miniserve.kv.memory import KVMemory
from miniserve.kv.pages import Evicted
from miniserve.kv.swap import SwapSpace
from miniserve.kv.transfer import mapped as mapping
from miniserve.kv.transfer.interface import connect, way
from miniserve.kv.transfer.mapped import MappedTransfer
from tests.support.doors import NO_DOOR
from tests.support.kv_pools import DEVICE_PAGES, DEVICE_SHAPE, device_memory
from tests.support.whole import check_pool

CPU = torch.device("cpu")
SHAPE, PAGES = DEVICE_SHAPE, DEVICE_PAGES


class LazyFence:
    def __init__(self, stream: LazyStream, number: int) -> None:
        self.stream, self.number = stream, number
        self.seconds = 3.0

    @property
    def done(self) -> bool:
        return self.stream.ran >= self.number

    def wait(self) -> None:
        while not self.done:
            self.stream.advance()


class LazyStream:
    """See `SideStream`."""

    made: list[LazyStream] = []

    def __init__(self, device: torch.device) -> None:
        assert device == CPU
        self.queue: deque[Callable[[], None]] = deque()
        self.given = self.ran = 0
        self.calls: list[str] = []
        self.made.append(self)

    def advance(self) -> None:
        self.queue.popleft()()
        self.ran += 1

    def run(self, work: Callable[[], None]) -> LazyFence:
        self.calls.append("run")
        self.queue.append(work)
        self.given += 1
        return LazyFence(self, self.given)

    def follow(self) -> None:
        self.calls.append("follow")

    def lead(self) -> None:
        self.calls.append("lead")
        self.drain()

    def drain(self) -> None:
        while self.queue:
            self.advance()


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> list[LazyStream]:
    monkeypatch.setattr(LazyStream, "made", [])
    monkeypatch.setattr(mapping, "SideStream", LazyStream)
    monkeypatch.setattr(swapping, "SideStream", LazyStream)
    monkeypatch.setattr(swapping, "pin", lambda memory: None)
    return LazyStream.made


def content(memory: KVMemory, *pages: int) -> bytes:
    return memory.bytes[list(pages)].numpy().tobytes()


# --- mapped ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> tuple[KVMemory, KVMemory, MappedTransfer]:
    ours, theirs = device_memory(1), device_memory(2)

    def map_pool(pool: PoolInfo, device: torch.device) -> torch.Tensor:
        return theirs.bytes[: pool.num_pages].view(torch.int64)

    monkeypatch.setattr(mapping, "map_pool", map_pool)
    before = content(ours, *range(PAGES))
    transfer = MappedTransfer(ours, Peer("p0", 1, "", PoolInfo(1, -1, PAGES, SHAPE.bytes, "L")))
    assert content(ours, *range(PAGES)) == before, "the first copy lands on the scratch page"
    assert content(ours, PAGES) == content(theirs, 0)
    transfer.side.calls.clear()
    return ours, theirs, transfer


def test_a_mapped_copy_is_stored_when_the_gpu_says_so(mapped: tuple[KVMemory, KVMemory, MappedTransfer]) -> None:
    ours, theirs, transfer = mapped
    copy = transfer.fetch([3, 1], [6, 0])
    assert not copy.stored
    transfer.side.advance()
    assert copy.stored
    assert copy.seconds == 3.0
    assert content(ours, 6, 0) == content(theirs, 3, 1)
    assert transfer.side.calls == ["follow", "run"], "it is not ordered before what the engine does next"


def test_a_mapped_copy_that_is_abandoned_overwrites_nothing(
    mapped: tuple[KVMemory, KVMemory, MappedTransfer],
) -> None:
    ours, _, transfer = mapped
    copy = transfer.fetch([3], [6])
    copy.abandon()
    ours.bytes[6] = 77  # the engine computes the page, or another copy writes it
    transfer.side.drain()
    assert content(ours, 6) == b"M" * SHAPE.bytes


def test_close_waits_for_readers(
    mapped: tuple[KVMemory, KVMemory, MappedTransfer],
) -> None:
    _, _, transfer = mapped
    assert transfer.side.calls == [], "what is published is complete"
    copy = transfer.fetch([3], [6])
    transfer.close()
    assert copy.stored


# --- which way ------------------------------------------------------------------------------------------------------


def on_gpu(device: int, reach: list[int], layout: str = "L") -> PoolInfo:
    return PoolInfo(1, -1, PAGES, SHAPE.bytes, layout, CudaHandle(device, reach, b"h", 10, 0, b"c", 0))


def test_the_way_between_two_pools() -> None:
    cpu = PoolInfo(1, 3, PAGES, SHAPE.bytes, "L")
    nowhere = PoolInfo(1, -1, PAGES, SHAPE.bytes, "L")
    same, near, far = on_gpu(0, [0, 1]), on_gpu(1, [1, 0]), on_gpu(2, [2])
    deaf = on_gpu(3, [3, 0])  # sees GPU 0, which does not see it
    expected = [
        (cpu, cpu, ("mapped", "sockets", "mapped")),
        (same, same, ("mapped", "sockets", "mapped")),
        (same, near, ("mapped", "nccl", "mapped")),
        (same, far, ("nccl", "nccl", None)),
        (same, deaf, ("nccl", "nccl", None)),
        (same, on_gpu(0, [0], "other"), (None, None, None)),
        (cpu, nowhere, (None, "sockets", None)),
        (cpu, same, (None, "sockets", None)),
    ]
    for one, other, ways in expected:
        assert tuple(way(one, other, how) for how in ("auto", "collective", "mapped")) == ways
        assert tuple(way(other, one, how) for how in ("auto", "collective", "mapped")) == ways


def test_a_pool_that_cannot_be_mapped_is_no_way(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = device_memory(1)

    def fail(pool: PoolInfo, device: torch.device) -> torch.Tensor:
        raise RuntimeError("CUDA error: invalid device context")

    monkeypatch.setattr(mapping, "map_pool", fail)
    assert connect(memory, on_gpu(0, [0]), NO_DOOR, Peer("p0", 1, "", on_gpu(0, [0])), "auto") is None


def test_a_handle_travels() -> None:
    peers = Peers([Peer("p0", 1, "a", on_gpu(1, [1, 0]))])
    assert decode(msgspec.msgpack.encode(Envelope("frontend", 0, peers))).body == peers


# --- host memory ----------------------------------------------------------------------------------------------------


def evicted(page: int) -> Evicted:
    return Evicted(page, bytes([page]) * 16, None, Keep(), 0.0)


def test_an_evicted_page_is_read_before_it_is_overwritten(streams: list[LazyStream]) -> None:
    memory = device_memory(1)
    swap = HostPool(SwapSpace(memory, 4), ExpectedNeed())
    kept = content(memory, 3)
    swap.store(evicted(3), 0.0)
    memory.bytes[3] = 0  # the next step writes to the page
    slots = swap.match([bytes([3]) * 16], Keep())
    swap.restore(slots, [6], 0.0)
    assert streams[0].calls == ["run", "lead", "follow", "run", "lead"]
    assert content(memory, 6) == kept, "the next step reads the page"
    assert (swap.offloaded, swap.restored) == (1, 1)
    check_pool(swap)


def test_a_peer_waits_for_what_is_being_restored(streams: list[LazyStream], monkeypatch: pytest.MonkeyPatch) -> None:
    memory = device_memory(1)
    swap = HostPool(SwapSpace(memory, 4), ExpectedNeed())
    kept = content(memory, 3)
    swap.store(evicted(3), 0.0)
    monkeypatch.setattr(LazyStream, "lead", lambda self: None)
    swap.restore(swap.match([bytes([3]) * 16], Keep()), [6], 0.0)
    assert content(memory, 6) != kept
    swap.slots.barrier()()
    assert content(memory, 6) == kept


def test_a_slot_is_restored_before_it_is_used_again(streams: list[LazyStream]) -> None:
    memory = device_memory(1)
    swap = HostPool(SwapSpace(memory, 1), ExpectedNeed())
    kept = content(memory, 3)
    swap.store(evicted(3), 0.0)
    swap.restore(swap.match([bytes([3]) * 16], Keep()), [6], 0.0)
    swap.store(evicted(4), 0.0)
    streams[0].drain()
    assert content(memory, 6) == kept


def test_copies_are_timed_by_the_gpu(streams: list[LazyStream], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LazyStream, "lead", lambda self: None)
    memory = device_memory(1)
    swap = HostPool(slots := SwapSpace(memory, 4), ExpectedNeed())
    slots.clock = lambda: pytest.fail("not the host's clock")
    swap.store(evicted(3), 0.0)
    assert swap.slots.page_seconds == 0.0
    assert swap.match([bytes([3]) * 16], Keep(page_seconds=1.0)), "not known yet: as good as computing"
    swap.release([0], Keep(), 0.0)
    streams[0].drain()
    assert not swap.match([bytes([3]) * 16], Keep(page_seconds=1.0))
    assert swap.slots.page_seconds == 3.0
