"""What happens on the server: as events for listeners (GET /v1/events), and as JSON lines in the decision log.

Nothing is computed without a listener: the scheduler makes records of its decisions only for listeners (or for the
decision log), and the state of workers and turns is put together once for all listeners. A listener that does not keep
up loses its oldest events and gets an event that counts them; the server never waits for a listener.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from miniserve.config import ConfigError
from miniserve.monitor.views import live_turns, worker_list
from miniserve.scheduler.scheduler import Scheduler
from miniserve.scheduler.turns import Record

log = logging.getLogger("miniserve.events")

SNAPSHOT_SECONDS = 1.0
MOST_WAITING = 512
"""Events that wait for one listener: a few seconds of a busy server, and a bound on its memory."""
MOST_LISTENERS = 64


class TooManyListeners(RuntimeError):
    """Each costs a little; this many are likely a mistake."""


def feed_event(kind: str, content: object) -> bytes:
    """A server-sent event of a `kind` (start, workers, turns, decision, outcome, lost), its data JSON on one line."""
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode(content))


class Listener:
    """The events that one listener has not taken yet."""

    def __init__(self) -> None:
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)
        self._lost = 0
        self._ended = False
        self._news = asyncio.Event()

    def put(self, event: bytes) -> None:
        """Add an event; if too many wait, the oldest one is dropped and counted as lost."""
        self._lost += len(self._waiting) == MOST_WAITING
        self._waiting.append(event)
        self._news.set()

    def end(self) -> None:
        self._ended = True
        self._news.set()

    async def take(self) -> list[bytes]:
        """All events that wait, as soon as there is one; none at the end."""
        while not (self._waiting or self._ended):
            self._news.clear()
            await self._news.wait()
        lost = [feed_event("lost", {"events": self._lost})] if self._lost else []
        events = [*lost, *self._waiting]
        self._waiting.clear()
        self._lost = 0
        return events


class Feed:
    """Gives all listeners the decisions and outcomes that `note` gets, and once a second workers and turns."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._always_notes = scheduler.notes
        self._listeners: set[Listener] = set()
        self._snapshots: asyncio.Task[None] | None = None
        self._closed = False

    @contextmanager
    def listener(self) -> Iterator[Listener]:
        """One more listener, which first gets both clocks, and workers and turns. Raises `TooManyListeners`."""
        if len(self._listeners) >= MOST_LISTENERS:
            raise TooManyListeners(f"{MOST_LISTENERS} listen already.")
        listener = Listener()
        now = time.monotonic()
        start = feed_event("start", {"policy": self._scheduler.policy.name, "time": now, "unix_time": time.time()})
        for event in (start, *self._state(now)):
            listener.put(event)
        if self._closed:
            listener.end()
        self._listeners.add(listener)
        self._scheduler.notes = True
        if self._snapshots is None:
            self._snapshots = asyncio.create_task(self._put_state())
        try:
            yield listener
        finally:
            self._listeners.discard(listener)
            if not self._listeners:
                self._scheduler.notes = self._always_notes
                self._snapshots.cancel()
                self._snapshots = None

    def note(self, record: Record) -> None:
        """Pass on a decision or an outcome; costs nothing without a listener."""
        if self._listeners:
            self._put(feed_event(record["kind"], record))

    def close(self) -> None:
        """The server ends: all streams end after the events that wait. Safe to call twice."""
        self._closed = True
        for listener in self._listeners:
            listener.end()

    def _put(self, event: bytes) -> None:
        for listener in self._listeners:
            listener.put(event)

    async def _put_state(self) -> None:
        while True:
            await asyncio.sleep(SNAPSHOT_SECONDS)
            try:
                for event in self._state(time.monotonic()):
                    self._put(event)
            except Exception:
                log.exception("a snapshot failed; the next one may not")

    def _state(self, now: float) -> list[bytes]:
        workers = worker_list(self._scheduler, now)
        return [feed_event("workers", workers), feed_event("turns", live_turns(self._scheduler, now))]


class DecisionLog:
    """Appends to `path`; the first line of a run holds its policy, and its clock beside the time of day. Raises
    `ConfigError` if the file cannot be written to. A later write that fails ends the log; serving goes on."""

    def __init__(self, path: str, policy: str, now: float) -> None:
        try:
            self._file = Path(path).expanduser().open("ab", buffering=0)
        except (OSError, RuntimeError) as error:  # the latter for the home directory of an unknown user
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"--decision-log {path!r} cannot be written to: {reason}.") from error
        self.write({"kind": "start", "policy": policy, "time": now, "unix_time": time.time()})

    def close(self) -> None:
        """No more lines; safe to call twice."""
        self._file.close()

    def write(self, record: Record) -> None:
        if self._file.closed:
            return
        try:
            self._file.write(msgspec.json.encode(record) + b"\n")
        except OSError as error:
            log.error("the decision log ends here: %s", error)
            self.close()
