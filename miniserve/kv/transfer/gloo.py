"""The connection of two workers by Gloo over loopback TCP: a `torch.distributed` process group of exactly two."""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch.distributed import FileStore, ProcessGroupGloo, Work  # type: ignore[attr-defined]  # the stubs lack a store

log = logging.getLogger("miniserve.transfer")

LOOK_SECONDS = 0.01
"""How often one side looks whether the other has come."""
CONNECT_SECONDS = 1.0
"""How long two peers that both have come may take to connect; Gloo multiplies this by up to five."""
TAGS = 2**20
"""After so many publications their tags begin again."""
DATA, DONE, ACK = range(3)
WATCH_TAG, BREAK_TAG = 8 * TAGS, 8 * TAGS + 1
"""No message ever has these."""
FOREVER = timedelta(days=1000)

SendRecv = Literal["send", "recv"]


@dataclass(eq=False)
class GlooGroup:
    """One connection, from here (`rank` 0 or 1) to the other rank. Publications are numbered in each direction."""

    group: Any
    rank: int

    def post(self, way: SendRecv, number: int, data: torch.Tensor) -> list[Work]:
        """Begin to move publication `number`: it is over when all that is returned has ended.

        When a connection breaks, Gloo forgets to wake the thread that waits for a message of which a part has moved. So
        the receiver waits for a signal that follows the data, and the sender for one that comes back (`acknowledge`).
        """
        works = [self._move(way, data, number, way, DATA), self._signal(way, number, way, DONE)]
        return [*works, self._signal("recv", number, way, ACK)] if way == "send" else works

    def acknowledge(self, number: int) -> Work:
        """Begin to say that publication `number` has arrived here."""
        return self._signal("send", number, "recv", ACK)

    def await_break(self) -> None:
        """Return when the connection is broken. A receive that is pending is the only way to learn that at once."""
        self._receive_nothing(WATCH_TAG, FOREVER)

    def shut(self) -> None:
        """Break the connection, which takes 10 ms or more. A receive that times out is the only way to close a Gloo
        connection: its `abort` does nothing."""
        self._receive_nothing(BREAK_TAG, timedelta(milliseconds=1))

    def _move(self, call: SendRecv, data: torch.Tensor, number: int, way: SendRecv, part: int) -> Work:
        """`call` something that belongs to publication `number`, which we send or receive (`way`)."""
        sender = self.rank if way == "send" else 1 - self.rank
        tag = 4 * (2 * (number % TAGS) + sender) + part
        return getattr(self.group, call)([data], 1 - self.rank, tag)

    def _signal(self, call: SendRecv, number: int, way: SendRecv, part: int) -> Work:
        """A message that says nothing but that it comes."""
        return self._move(call, torch.zeros(1, dtype=torch.uint8), number, way, part)

    def _receive_nothing(self, tag: int, wait: timedelta) -> None:
        with contextlib.suppress(RuntimeError):
            self.group.recv([torch.zeros(1, dtype=torch.uint8)], 1 - self.rank, tag).wait(wait)


def meet(path: str, rank: int, closed: Callable[[float], bool]) -> GlooGroup | None:
    """Connect to the peer that calls this with the same new `path` and the other rank, whenever it comes. None if the
    attempt failed, or `closed`, which waits for so many seconds, is true meanwhile.

    Gloo's own rendezvous begins when both are there: only a peer that hangs or dies then makes it fail, and it fails
    for both.
    """
    try:
        store = FileStore(path, 2)
        store.set_timeout(timedelta(seconds=CONNECT_SECONDS))
        store.set(f"here-{rank}", "")
        while not store.check([f"here-{1 - rank}"]):
            if closed(LOOK_SECONDS):
                return None
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=CONNECT_SECONDS)
        options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1", lazy_init=False)]
        options._threads = 1  # they serve collectives of more than two
        return GlooGroup(ProcessGroupGloo(store, rank, 2, options), rank)
    except RuntimeError as error:
        log.debug("no connection at %s: %s", path, error)
        return None
