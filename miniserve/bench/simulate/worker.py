"""A worker without a device: the engine, the page pool, the handoffs and the loop of a real one, on a virtual clock.

Only what a device does is replaced: the worker is its engine's runner, which has no model but lets the time of a step
pass and asks for the next token, and its host memory; there and on a `SimulatedLink` the time of a copy passes, and no
bytes are moved.

While nothing comes and every sequence decodes, a worker's steps differ by their length alone. It is then called once
for several of them, as many as have been made until a message comes or a turn ends: to the engine that is one step with
drafts that hold.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Literal

from msgspec.structs import replace

from miniserve.bench.simulate.hardware import Hardware
from miniserve.cluster.messages import Envelope, Message, Peer, PoolInfo, StepTime
from miniserve.config import Role
from miniserve.kv.disk import Disk, Piece, Pieces
from miniserve.kv.eviction import make_order
from miniserve.kv.host import HostPool
from miniserve.kv.pages import PagePool
from miniserve.worker.batching import Pace
from miniserve.worker.drafts import Drafter
from miniserve.worker.engine import Engine
from miniserve.worker.handoff import Handoffs
from miniserve.worker.process import Worker
from miniserve.worker.sequence import Sequence, State
from miniserve.worker.step import Launched, Sampled, Work

LAYOUT = "simulated"
PATIENCE = 30.0
"""Seconds of a handoff's lease: the default of `serve`."""
LONGEST_STRIDE = 32
"""Steps of a stride at most: their tokens are reported at its end."""


@dataclass
class HostDisk:
    """The disk of a host, which all its workers use: what is there, and when it is free again."""

    pieces: Pieces = field(default_factory=Pieces)
    free: float = 0.0


Send = Callable[[str, str, float, Message], None]
"""Sender, receiver, the time of sending, message."""


@dataclass(eq=False)
class SimulatedWorker:
    """One worker of the cluster, with its inbox. The simulation calls `round` when it is due. `speak` is given a run,
    how many tokens of output it has said, and how many it returns that come next."""

    name: str
    role: Role
    host: str
    hardware: Hardware
    speak: Callable[[str, int, int], list[int]]
    deliver: Send
    max_model_len: int
    stretch: float
    caching: bool
    disk: HostDisk
    eos: frozenset[int] = frozenset()
    now: float = 0.0
    """Its own time, which its steps move on."""
    num_pages: int = field(init=False)
    """Of host memory, whose `Slots` it is too."""
    copied: float = 0.0
    """When all copies to and from host memory are done."""
    busy: float = 0.0
    """Seconds in which the device computed."""
    inbox: list[Envelope] = field(default_factory=list)
    due: float = inf
    """The time of its next round; infinite while none is due."""
    stride: int = 1
    """Steps of the stride that the engine takes."""
    ends: list[float] = field(default_factory=list)
    """When the steps of the next stride end, as far as nothing comes between."""

    def __post_init__(self) -> None:
        hardware, clock = self.hardware, self.clock
        self._page_bytes = hardware.page_tokens * hardware.kv_bytes_per_token
        self.num_pages = hardware.swap_space // self._page_bytes
        host = HostPool(self, make_order("expected")) if self.num_pages else None
        pages, on_evict = hardware.kv_tokens // hardware.page_tokens, host.store if host is not None else None
        self.pool = PagePool(pages, make_order("expected"), caching=self.caching, on_evict=on_evict)
        disk = Disk(SimulatedDisk(self, self.disk), host, self.pool) if host and hardware.disk_space else None
        engine = self.engine = Strider(
            self,
            self.pool,
            page_tokens=hardware.page_tokens,
            max_num_batched_tokens=hardware.max_num_batched_tokens,
            max_num_seqs=hardware.max_num_seqs,
            max_model_len=self.max_model_len,
            host=host,
            disk=disk,
            pace=Pace(hardware.max_num_batched_tokens, self.stretch) if self.stretch else None,
            draft_rows=2**31,
            clock=clock,
        )
        handoffs = Handoffs(engine, self._page_bytes, LAYOUT, PATIENCE, self.send, self.connect, clock)
        self.worker = Worker(
            self.name, engine, handoffs, self, "frontend", layout=LAYOUT, vocab_size=2**31, clock=clock
        )

    @property
    def peer(self) -> Peer:
        pool = PoolInfo(0, -1, self.pool.num_pages, self._page_bytes, LAYOUT, host=self.host)
        return Peer(self.name, 1, self.name, pool, self.role)

    def connect(self, peer: Peer) -> SimulatedLink:
        return SimulatedLink(self, peer.pool.host == self.host)

    def clock(self) -> float:
        return self.now

    def launch(self, batch: list[Work]) -> Launched:
        """Make a step that takes as long as on the hardware, or a stride."""
        if self.ends:
            end = self.ends[self.stride - 1]
        else:
            chunks = [(work.count, work.start) for work in batch if not work.is_decode]
            kv_tokens = sum(len(work.sequence.tokens) for work in batch if work.is_decode)
            self._settle()
            end = self.now + self.hardware.step_seconds(chunks, len(batch) - len(chunks), kv_tokens)
        self.busy += end - self.now
        self.now = end
        samples = [(work.sequence, work.num_sampled) for work in batch if work.samples]
        spoken = [self.speak(sequence.turn, sequence.num_outputs, count) for sequence, count in samples]
        sampled: Sampled = [(token, None) for tokens in spoken for token in tokens]
        return lambda: sampled

    def _foresee(self) -> list[float]:
        """When the next steps will end if nothing comes: of none, unless all sequences decode and can go on alike."""
        engine, running = self.engine, self.engine.running
        if engine.waiting or engine.expecting or self.copied > self.now or self.worker.handoffs.receiver.copying:
            return []
        if not running or any(s.state is not State.RUNNING or s.to_launch != 1 or s.drafter is None for s in running):
            return []
        left = ((s.params.max_tokens or inf) - s.num_outputs for s in running)
        steps = int(min(LONGEST_STRIDE, *left))
        size = self.hardware.page_tokens
        more = sum(-(-(len(s.tokens) + steps) // size) - len(s.pages) for s in running)
        if more + engine.watermark > self.pool.num_available:
            return []
        ends, count, kv_tokens, now = [], len(running), sum(len(s.tokens) for s in running), self.now
        for step in range(steps):
            now += self.hardware.step_seconds((), count, kv_tokens + step * count)
            ends.append(now)
        return ends

    def reads(self, now: float) -> float:
        """When it reads what comes `now`: when the step that it makes has ended."""
        return self.ends[bisect_left(self.ends, now)] if self.ends else max(now, self.now)

    @property
    def page_seconds(self) -> float:
        return self.hardware.host_seconds(1)

    def copy(self, what: Literal["offload", "restore"], sources: list[int], targets: list[int]) -> None:
        """Copy pages to or from host memory, one after the other, beside what else happens until the next step."""
        self.copied = max(self.copied, self.now) + self.hardware.host_seconds(len(sources))

    def barrier(self) -> Callable[[], None]:
        return self._settle

    def _settle(self) -> None:
        self.now = max(self.now, self.copied)

    def round(self, now: float) -> float:
        """Run its loop once from `now` on; returns when the next round is due if no message comes before."""
        if self.ends:
            self.stride = bisect_left(self.ends, now) + 1
            self.worker.work([])
            self.stride, self.ends = 1, []
        self.now = now
        messages, self.inbox = self.inbox, []
        if not messages:
            self.ends = self._foresee()
        if self.ends:
            return self.ends[-1]
        self.worker.work(messages)
        return self.now + self.worker.rest

    def send(self, address: str, body: Message) -> None:
        self.deliver(self.name, address, self.now, body)

    def forget(self, address: str) -> None: ...


class Foresight(Drafter):
    """Drafts what a sequence will say, as far as the worker's stride goes."""

    def __init__(self, worker: SimulatedWorker, sequence: Sequence) -> None:
        self._worker, self._turn, self._prompt = worker, sequence.turn, len(sequence.tokens) - sequence.num_outputs

    def draft(self, tokens: list[int], most: int) -> list[int]:
        return self._worker.speak(self._turn, len(tokens) - self._prompt, self._worker.stride - 1)

    def observe(self, drafted: int, held: int) -> None: ...


class Strider(Engine):
    """The engine of a worker that takes strides. What it observes of one is the mean of its steps."""

    runner: SimulatedWorker

    def add(self, sequence: Sequence) -> None:
        super().add(sequence)
        if sequence.drafter is not None:
            sequence.drafter = Foresight(self.runner, sequence)

    def _timed(self, step: StepTime, seconds: float) -> StepTime:
        if (steps := self.runner.stride) == 1:
            return super()._timed(step, seconds)
        count = step.decodes // steps
        return StepTime(0, 0, count, step.decode_context + count * (steps - 1) // 2, seconds / steps)


@dataclass
class SimulatedLink:
    """A `kv.transfer` `Transfer` that makes one copy from a peer after the other: it is `free` at a time. A `near` peer
    is on the same host."""

    worker: SimulatedWorker
    near: bool
    free: float = 0.0

    def fetch(self, theirs: list[int], ours: list[int], lease: float = inf) -> SimulatedCopy:
        begin, seconds = max(self.free, self.worker.now), self.worker.hardware.transfer_seconds(len(theirs), self.near)
        self.free = begin + seconds
        return SimulatedCopy(self.worker, self.free, seconds)

    def close(self) -> None: ...


@dataclass
class SimulatedCopy:
    """What is there `at` a time, beside the workers' steps: a `kv.transfer` `Copy`, or a `kv.disk` `Job` of `pages`."""

    worker: SimulatedWorker
    at: float
    seconds: float = 0.0
    pages: int = 0

    @property
    def stored(self) -> bool:
        return self.worker.now >= self.at

    def abandon(self) -> None: ...

    def done(self) -> bool:
        return self.stored

    def result(self) -> int:
        return self.pages


@dataclass(frozen=True)
class SimulatedDisk:
    """The `kv.disk` `Store` of a worker, which reads and writes one after the other. What is to be written counts as
    there at once: to read it comes later anyhow."""

    worker: SimulatedWorker
    disk: HostDisk

    @property
    def page_seconds(self) -> float:
        return self.worker.hardware.disk_seconds(1)

    def find(self, hashes: list[bytes]) -> int:
        return self.disk.pieces.find(hashes)

    def refresh(self) -> None: ...

    def read(self, hashes: list[bytes], slots: list[int], ready: Callable[[], None]) -> SimulatedCopy:
        return SimulatedCopy(self.worker, self._busy(len(slots)), pages=len(slots))

    def write(self, piece: Piece, slots: list[int], ready: Callable[[], None], age: float) -> SimulatedCopy:
        pieces, now, hardware = self.disk.pieces, self.worker.now, self.worker.hardware
        self._busy(len(slots))
        piece, size = replace(piece, end=now - age), len(slots) * hardware.page_tokens * hardware.kv_bytes_per_token
        for name in pieces.surplus(hardware.disk_space - size, now, piece):
            pieces.drop(name)
        if pieces.total + size > hardware.disk_space:
            return SimulatedCopy(self.worker, now)
        pieces.add(piece, size)
        return SimulatedCopy(self.worker, now, pages=len(slots))

    def _busy(self, pages: int) -> float:
        """When so many pages are read or written."""
        self.disk.free = max(self.disk.free, self.worker.now) + self.worker.hardware.disk_seconds(pages)
        return self.disk.free
