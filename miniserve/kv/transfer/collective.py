"""Pages through a `torch.distributed` process group of exactly two workers: Gloo over loopback TCP. Those of a GPU go
through its host's memory (`staging.py`); why not by NCCL is in docs/gpu.md.

Every pair of workers has its own group, so a peer that dies or hangs breaks nothing but its pair. When a group breaks,
all that was under way in it is lost and both sides meet again in the next *generation*. Both see the group break, so
both count alike; a ticket names its generation, so nothing of one is ever taken for something of another.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections import deque
from datetime import timedelta
from typing import Any, Literal

import torch
from torch.distributed import FileStore, ProcessGroupGloo, Work  # type: ignore[attr-defined]  # the stubs lack a store

from miniserve.cluster.messages import Peer
from miniserve.kv.memory import KVMemory
from miniserve.kv.side import Fence, PassedFence
from miniserve.kv.transfer.interface import TransferError
from miniserve.kv.transfer.staging import Staging, staging

log = logging.getLogger("miniserve.transfer")

AHEAD = 2
"""Messages posted at a time in one direction: the second follows the first without waiting for a thread of ours.
On a quiet machine 2.2 GB/s instead of 1.8 with one (scripts/bench_transfer.py); four are no better than two."""
TAGS = 2**20
"""After so many publications their tags begin again."""
DATA, DONE, ACK = range(3)
WATCH_TAG, BREAK_TAG = 8 * TAGS, 8 * TAGS + 1
"""Nobody ever sends with these."""
FOREVER = timedelta(days=1000)
LOOK_SECONDS = 0.01
"""How often we look whether the peer has come."""
RETRY_SECONDS = 0.1
"""From the end of one generation to our coming to the next."""
CONNECT_SECONDS = 1.0
"""How long two peers that both have come may take to connect; Gloo multiplies this by up to five."""
EXIT_SECONDS = 5.5 * CONNECT_SECONDS
"""How long the exit of this process waits for the threads of a pair: as long as the slowest call of theirs takes."""

Way = Literal["send", "recv"]


class Message:
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
        """Arrived, or lost."""

    def lose(self) -> None:
        """It will not arrive any more, if it has not."""
        if not self.over.is_set():
            self.lost = True
            self.over.set()


Posted = tuple[Message, Any, list[Work]]
"""A message, the group it travels in, and what has to end for it to be over."""


class CollectiveCopy:
    """See `Copy`. `staging` is that of our pool; `deadline` is a time on the monotonic clock."""

    def __init__(self, message: Message, staging: Staging, deadline: float) -> None:
        self._message = message
        self._staging = staging
        self._deadline = deadline
        self._fence: Fence | None = None

    @property
    def seconds(self) -> float:
        """See `Copy`."""
        return self._message.seconds + (self._fence.seconds if self._fence is not None else 0.0)

    @property
    def ready(self) -> bool:
        """See `Copy`."""
        return self._message.over.is_set() or time.monotonic() > self._deadline

    def store(self, ours: list[int]) -> None:
        """See `Copy`. Waits for what is not `ready` yet."""
        if not self._message.over.wait(max(0.0, self._deadline - time.monotonic())):
            raise TransferError("the peer does not answer")
        if self._message.lost:
            raise TransferError("the connection to the peer broke")
        assert len(ours) == len(self._message.data)
        self._fence = self._staging.write(self._message.data, ours)

    @property
    def stored(self) -> bool:
        """See `Copy`."""
        return self._fence is not None and self._fence.done

    def abandon(self) -> None:
        """See `Copy`."""
        self._staging.abandon()


class CollectiveTransfer:
    """See `Transfer`; made once for each pair of incarnations. One thread keeps the pair connected, one sends, one
    receives: nobody who calls waits for the peer. Each publication under way has host memory of its own.
    """

    name = "collective"

    def __init__(self, memory: KVMemory, us: tuple[str, int], peer: Peer, run_dir: str, timeout: float = 30.0) -> None:
        """`us` is our name and epoch; a peer that does not answer for `timeout` seconds is taken for hung."""
        first, second = sorted([us, (peer.name, peer.epoch)])
        self._staging = staging(memory)
        self._peer = peer.name
        self._rank = 0 if us == first else 1
        self._path = f"{run_dir}/pair-{first[0]}.{first[1]}-{second[0]}.{second[1]}"
        self._timeout = timedelta(seconds=timeout)
        self._closed = threading.Event()
        self._changed = threading.Condition()  # guards all that follows
        self._generation = 0
        self._group: Any = None  # a ProcessGroupGloo, once connected
        self._offered = 0
        self._arrival = 0.0  # of the last message here
        self._sends: deque[Message] = deque()
        self._receives: deque[Message] = deque()
        self._acks: deque[Work] = deque(maxlen=AHEAD + 1)  # kept until sent, which the next but AHEAD message proves
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
        """See `Transfer`. The pages are copied before anything else is done with them: their lease may end."""
        data, whole = self._staging.read(pages)
        with self._changed:
            ticket = (self._generation, self._offered)
            self._offered += 1
            if not self._closed.is_set():
                self._sends.append(Message(ticket, data, whole))
                self._changed.notify_all()
        return ticket

    def fetch(self, ticket: tuple[int, int], pages: list[int]) -> CollectiveCopy:
        """See `Transfer`."""
        message = Message(ticket, self._staging.room(len(pages)), PassedFence())
        with self._changed:
            if self._closed.is_set() or message.generation < self._generation:
                message.lose()
            else:
                self._receives.append(message)
                self._changed.notify_all()
        return CollectiveCopy(message, self._staging, time.monotonic() + self._timeout.total_seconds())

    def close(self) -> None:
        """See `Transfer`. What has not arrived is lost; the threads end soon."""
        with self._changed:
            self._closed.set()
            self._drop()
            if self._group is not None:  # breaking it takes 10 ms or more
                wait = (self._group, BREAK_TAG, timedelta(milliseconds=1))
                breaking = threading.Thread(target=self._await_break, args=wait, daemon=True)
                try:
                    breaking.start()
                    self._threads.append(breaking)
                except RuntimeError:  # while Python 3.12 exits, no thread can be started any more
                    self._await_break(*wait)
            self._changed.notify_all()

    # --- the threads ------------------------------------------------------------------------------------------------

    def _keep_connected(self) -> None:
        """Connect, watch the connection until it breaks, and again in the next generation."""
        while True:
            group = self._meet()
            with self._changed:
                if self._closed.is_set():
                    return
                self._group = group
                self._changed.notify_all()
            if group is not None:
                self._await_break(group, WATCH_TAG, FOREVER)
            with self._changed:
                self._group = group = None
                self._generation += 1
                self._drop()
            if self._closed.wait(RETRY_SECONDS):
                return
            log.warning("the connection to %s broke (%d so far), connecting again", self._peer, self._generation)

    def _meet(self) -> ProcessGroupGloo | None:
        """The group of this generation; None if it broke before it began, or we are closed.

        Gloo's own rendezvous begins when both are there: only a peer that hangs or dies meanwhile makes it fail, and
        then it fails for both.
        """
        try:
            store = FileStore(f"{self._path}.{self._generation}", 2)
            store.set_timeout(timedelta(seconds=CONNECT_SECONDS))
            store.set(f"here-{self._rank}", "")
            while not store.check([f"here-{1 - self._rank}"]):
                if self._closed.wait(LOOK_SECONDS):
                    return None
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._timeout = timedelta(seconds=CONNECT_SECONDS)
            options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1", lazy_init=False)]
            options._threads = 1  # they serve collectives of more than two
            return ProcessGroupGloo(store, self._rank, 2, options)
        except RuntimeError as error:
            log.debug("no connection to %s: %s", self._peer, error)
            return None

    def _await_break(self, group: Any, tag: int, wait: timedelta) -> None:
        """Return when the connection is broken; break it after `wait`.

        A receive that times out is the only way to close a Gloo connection (its `abort` does nothing), and one that is
        pending the only way to hear at once that it was closed.
        """
        with contextlib.suppress(RuntimeError):
            self._signal(group, "recv", tag).wait(wait)

    def _signal(self, group: Any, way: Way, tag: int) -> Work:
        """Begin to send or receive something that says nothing but that it comes."""
        return getattr(group, way)([torch.zeros(1, dtype=torch.uint8)], 1 - self._rank, tag)

    def _drop(self) -> None:
        """Whatever waits for a connection that will not come any more is lost."""
        self._sends.clear()
        self._acks.clear()
        while self._receives and (self._closed.is_set() or self._receives[0].generation < self._generation):
            self._receives.popleft().lose()

    def _pump(self, way: Way, queue: deque[Message]) -> None:
        """Move the messages of one direction in their order, each in its generation."""
        posted: deque[Posted] = deque()
        while self._step(way, queue, posted):
            pass

    def _step(self, way: Way, queue: deque[Message], posted: deque[Posted]) -> bool:
        """Post one message, or else wait for the oldest that is posted. False at the end.

        When a connection breaks, Gloo forgets to wake who waits for a message of which a part has moved. So we wait for
        a signal that follows it, and the sender for one that comes back.
        """
        with self._changed:
            self._changed.wait_for(lambda: posted or self._can_post(queue) or self._closed.is_set())
            new = self._can_post(queue) and len(posted) < AHEAD
            if not new and not posted:
                return False
            message, group, works = (queue.popleft(), self._group, []) if new else posted.popleft()
        tag = 4 * (2 * (message.number % TAGS) + (self._rank if way == "send" else 1 - self._rank))
        try:
            if new:
                message.whole.wait()
                works.append(getattr(group, way)([message.data], 1 - self._rank, tag + DATA))
                works.append(self._signal(group, way, tag + DONE))
                if way == "send":
                    works.append(self._signal(group, "recv", tag + ACK))
                posted.append((message, group, works))
                return True
            for work in reversed(works):
                work.wait(self._timeout)  # before that, is_completed() knows nothing
            if way == "recv":
                now = time.monotonic()
                message.seconds, self._arrival = now - max(message.begun, self._arrival), now
            message.over.set()
            if way == "recv":
                self._acks.append(self._signal(group, "send", tag + ACK))
        except RuntimeError:
            message.lose()
        return True

    def _can_post(self, queue: deque[Message]) -> bool:
        """Whether the head of `queue` can travel now."""
        return self._group is not None and bool(queue) and queue[0].generation == self._generation


def _leave(transfer: weakref.ref[CollectiveTransfer]) -> None:
    """The process exits: end the threads first."""
    if (living := transfer()) is not None:
        living.close()
        until = time.monotonic() + EXIT_SECONDS
        for thread in living._threads:
            thread.join(max(0.0, until - time.monotonic()))
