"""What happens on the server, as server-sent events for whoever listens: GET /v1/events.

Nothing is computed while nobody listens: the scheduler makes notes of its decisions only then (or for the decision
log), and the state of workers and turns is put together once for all listeners. A listener that does not keep up loses
its oldest events and is told how many; the server never waits for one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from miniserve.monitor import views
from miniserve.scheduler.records import Record
from miniserve.scheduler.scheduler import Scheduler

log = logging.getLogger("miniserve.events")

SNAPSHOT_SECONDS = 1.0
MOST_WAITING = 512
"""Events that wait for one listener: a few seconds of a busy server, and a bound on its memory."""
MOST_LISTENERS = 64


class TooManyListeners(RuntimeError):
    """Each costs a little; this many are likely a mistake."""


class Listener:
    """The events that one listener has not been sent yet."""

    def __init__(self) -> None:
        self._waiting: deque[bytes] = deque()
        self._lost = 0
        self._ended = False
        self._news = asyncio.Event()

    def put(self, event: bytes) -> None:
        """Called with each event; the oldest one goes if too many wait."""
        if len(self._waiting) >= MOST_WAITING:
            self._waiting.popleft()
            self._lost += 1
        self._waiting.append(event)
        self._news.set()

    def end(self) -> None:
        """No more will come."""
        self._ended = True
        self._news.set()

    async def take(self) -> bytes:
        """All that waits, as soon as there is any; nothing at the end."""
        while not (self._waiting or self._ended):
            self._news.clear()
            await self._news.wait()
        lost = [encoded("lost", {"events": self._lost})] if self._lost else []
        data = b"".join([*lost, *self._waiting])
        self._waiting.clear()
        self._lost = 0
        return data


class Feed:
    """Tells all listeners of decisions and outcomes as they are made, and once a second how things stand."""

    def __init__(self, scheduler: Scheduler, policy: str) -> None:
        self._scheduler = scheduler
        self._policy = policy
        self._always_notes = scheduler.notes
        self._listeners: set[Listener] = set()
        self._snapshots: asyncio.Task[None] | None = None
        self._closed = False

    @contextmanager
    def listener(self) -> Iterator[Listener]:
        """One more listener, which is first told what the clock shows and how things stand. Raises
        `TooManyListeners`."""
        if len(self._listeners) >= MOST_LISTENERS:
            raise TooManyListeners(f"{MOST_LISTENERS} listen already.")
        listener = Listener()
        now = time.monotonic()
        listener.put(encoded("start", {"policy": self._policy, "time": now, "unix_time": time.time()}))
        if self._closed:
            listener.end()
        for event in self._state(now):
            listener.put(event)
        self._listeners.add(listener)
        self._scheduler.notes = True
        if self._snapshots is None:
            self._snapshots = asyncio.create_task(self._tell_state())
        try:
            yield listener
        finally:
            self._listeners.discard(listener)
            if not self._listeners:
                self._scheduler.notes = self._always_notes
                self._snapshots.cancel()
                self._snapshots = None

    def tell(self, record: Record) -> None:
        """Called with each decision and outcome; costs nothing while nobody listens."""
        if self._listeners:
            self._put(encoded(record.__struct_config__.tag, record))

    def close(self) -> None:
        """The server ends: so do all streams, after what is on its way. Safe to call twice."""
        self._closed = True
        for listener in self._listeners:
            listener.end()

    def _put(self, event: bytes) -> None:
        for listener in self._listeners:
            listener.put(event)

    async def _tell_state(self) -> None:
        while True:
            await asyncio.sleep(SNAPSHOT_SECONDS)
            try:
                for event in self._state(time.monotonic()):
                    self._put(event)
            except Exception:
                log.exception("a snapshot failed; the next one may not")

    def _state(self, now: float) -> list[bytes]:
        workers = views.worker_list(self._scheduler, self._policy, now)
        return [encoded("workers", workers), encoded("turns", views.live_turns(self._scheduler, now))]


def encoded(kind: object, content: object) -> bytes:
    """As an event; JSON holds no line breaks."""
    return b"event: %s\ndata: %s\n\n" % (str(kind).encode(), msgspec.json.encode(content))
