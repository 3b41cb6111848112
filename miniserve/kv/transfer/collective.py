"""Pages through a Gloo group of exactly two workers (`gloo.py`). Pages of a GPU go through its host's memory
(`staging.py`); docs/gpu.md says why not by NCCL.

Every pair of workers has its own group, so a peer that dies or hangs breaks only its pair. When a group breaks, all
that was under way in it is lost and both sides meet again in the next *generation*. Both see the group break, so both
count alike; a ticket names its generation, so bytes of one generation are never taken for bytes of another.
"""

import logging
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.distributed import Work

from miniserve.cluster.messages import Peer
from miniserve.kv.memory import KVMemory
from miniserve.kv.side import Fence, FencedCopy, PassedFence
from miniserve.kv.transfer.gloo import CONNECT_SECONDS, GlooGroup, SendRecv, meet
from miniserve.kv.transfer.interface import TransferError
from miniserve.kv.transfer.staging import DeviceStaging, HostStaging, Staging

log = logging.getLogger("miniserve.transfer")

AHEAD = 2
"""Publications posted at a time in one direction: the second follows the first without waiting for a thread of ours.
On a quiet machine 2.2 GB/s instead of 1.8 with one (scripts/bench_transfer.py); four are no better than two."""
RETRY_SECONDS = 0.1
"""From the end of one generation to our coming to the next."""
EXIT_SECONDS = 5.5 * CONNECT_SECONDS
"""How long the exit of this process waits for the threads of a pair: as long as the slowest call of theirs takes."""


class Shipment:
    """The bytes of one publication on their way, in either direction: `data` is `[page, byte]`, to be sent once `whole`
    is done."""

    def __init__(self, ticket: tuple[int, int], data: torch.Tensor, whole: Fence) -> None:
        self.generation, self.number = ticket
        self.data = data
        self.whole = whole
        self.begun = time.monotonic()
        self.seconds = 0.0
        """How long it took from then, or from the arrival of the one before it."""
        self.lost = False
        self.over = threading.Event()
        """Set when it has arrived, or is lost."""

    def lose(self) -> None:
        """It will not arrive any more, if it has not."""
        if not self.over.is_set():
            self.lost = True
            self.over.set()


@dataclass(eq=False)
class CollectiveCopy(FencedCopy):
    """A `Copy` into our pool, whose `staging` this is; `deadline` is a time on the monotonic clock."""

    incoming: Shipment
    staging: Staging
    deadline: float

    @property
    def seconds(self) -> float:
        return self.incoming.seconds + super().seconds

    @property
    def ready(self) -> bool:
        return self.incoming.over.is_set() or time.monotonic() > self.deadline

    def store(self, ours: list[int]) -> None:
        """As `Copy.store`; it waits for what is not `ready` yet."""
        if not self.incoming.over.wait(max(0.0, self.deadline - time.monotonic())):
            raise TransferError("the peer does not answer")
        if self.incoming.lost:
            raise TransferError("the connection to the peer broke")
        assert len(ours) == len(self.incoming.data)
        self.fence = self.staging.write(self.incoming.data, ours)

    def abandon(self) -> None:
        self.staging.abandon()


class CollectiveTransfer:
    """A `Transfer`, made once for each pair of incarnations. One thread keeps the pair connected, one sends, one
    receives: no caller waits for the peer. Each publication under way has host memory of its own.
    """

    name = "collective"

    def __init__(self, memory: KVMemory, us: tuple[str, int], peer: Peer, run_dir: str, timeout: float = 30.0) -> None:
        """`us` is our name and epoch; a peer that does not answer for `timeout` seconds is taken for hung."""
        first, second = sorted([us, (peer.name, peer.epoch)])
        self._staging: Staging = HostStaging(memory) if memory.shared is not None else DeviceStaging(memory)
        self._peer = peer.name
        self._rank = 0 if us == first else 1
        self._path = f"{run_dir}/pair-{first[0]}.{first[1]}-{second[0]}.{second[1]}"
        self._timeout = timedelta(seconds=timeout)
        self._closed = threading.Event()
        self._changed = threading.Condition()  # guards all that follows
        self._generation = 0
        self._group: GlooGroup | None = None
        self._offered = 0
        self._arrival = 0.0  # of the last publication here
        self._sends: deque[Shipment] = deque()
        self._receives: deque[Shipment] = deque()
        self._acks: deque[Work] = deque(maxlen=AHEAD + 1)  # kept until sent, which the next but AHEAD arrival proves
        self._threads = [
            threading.Thread(target=self._keep_connected, daemon=True),
            threading.Thread(target=self._pump, args=("send", self._sends), daemon=True),
            threading.Thread(target=self._pump, args=("recv", self._receives), daemon=True),
        ]
        # Should a daemon thread return from C++ while the interpreter is torn down, the process would abort.
        weakref.finalize(self, _leave, weakref.ref(self))
        for thread in self._threads:
            thread.start()

    def offer(self, pages: list[int]) -> tuple[int, int]:
        """The pages are copied before anything else is done with them: their lease may end."""
        data, whole = self._staging.read(pages)
        with self._changed:
            ticket = (self._generation, self._offered)
            self._offered += 1
            if not self._closed.is_set():
                self._sends.append(Shipment(ticket, data, whole))
                self._changed.notify_all()
        return ticket

    def fetch(self, ticket: tuple[int, int], pages: list[int]) -> CollectiveCopy:
        incoming = Shipment(ticket, self._staging.room(len(pages)), PassedFence())
        with self._changed:
            if self._closed.is_set() or incoming.generation < self._generation:
                incoming.lose()
            else:
                self._receives.append(incoming)
                self._changed.notify_all()
        return CollectiveCopy(incoming, self._staging, time.monotonic() + self._timeout.total_seconds())

    def close(self) -> None:
        with self._changed:
            self._closed.set()
            self._drop()
            if self._group is not None:
                breaking = threading.Thread(target=self._group.shut, daemon=True)
                try:
                    breaking.start()
                    self._threads.append(breaking)
                except RuntimeError:  # while Python 3.12 exits, no thread can be started any more
                    self._group.shut()
            self._changed.notify_all()

    # --- the threads ------------------------------------------------------------------------------------------------

    def _keep_connected(self) -> None:
        """Connect, watch the connection until it breaks, and again in the next generation."""
        while True:
            group = meet(f"{self._path}.{self._generation}", self._rank, self._closed.wait)
            with self._changed:
                if self._closed.is_set():
                    return
                self._group = group
                self._changed.notify_all()
            if group is not None:
                group.await_break()
            with self._changed:
                self._group = group = None
                self._generation += 1
                self._drop()
            if self._closed.wait(RETRY_SECONDS):
                return
            log.warning("the connection to %s broke (%d so far), connecting again", self._peer, self._generation)

    def _drop(self) -> None:
        """Lose all that waits for a connection that will not come any more."""
        self._sends.clear()
        self._acks.clear()
        while self._receives and (self._closed.is_set() or self._receives[0].generation < self._generation):
            self._receives.popleft().lose()

    def _pump(self, way: SendRecv, queue: deque[Shipment]) -> None:
        """Move the publications of one direction in their order, each in its generation: post the next one, or else
        wait for the oldest that is posted."""
        posted: deque[tuple[Shipment, GlooGroup, list[Work]]] = deque()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: posted or self._can_post(queue) or self._closed.is_set())
                group = self._group if self._can_post(queue) and len(posted) < AHEAD else None
                if group is not None:
                    new = queue.popleft()
                elif not posted:
                    return
            if group is None:
                self._await(way, *posted.popleft())
                continue
            try:
                new.whole.wait()
                posted.append((new, group, group.post(way, new.number, new.data)))
            except RuntimeError:
                new.lose()

    def _await(self, way: SendRecv, flight: Shipment, group: GlooGroup, works: list[Work]) -> None:
        """Wait until a posted publication, all of its `works`, is over."""
        try:
            for work in reversed(works):
                work.wait(self._timeout)  # before that, is_completed() knows nothing
            if way == "recv":
                now = time.monotonic()
                flight.seconds, self._arrival = now - max(flight.begun, self._arrival), now
            flight.over.set()
            if way == "recv":
                self._acks.append(group.acknowledge(flight.number))
        except RuntimeError:
            flight.lose()

    def _can_post(self, queue: deque[Shipment]) -> bool:
        """Whether the head of `queue` can travel now."""
        return self._group is not None and bool(queue) and queue[0].generation == self._generation


def _leave(transfer: weakref.ref[CollectiveTransfer]) -> None:
    """The process exits: end the threads first."""
    if (living := transfer()) is not None:
        living.close()
        until = time.monotonic() + EXIT_SECONDS
        for thread in living._threads:
            thread.join(max(0.0, until - time.monotonic()))
