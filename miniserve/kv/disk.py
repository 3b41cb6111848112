"""KV on disk, below host memory: what ended turns leave is written there, and found again when their conversations
come back, also by another worker or a later run of the server.

Everything passes through slots of host memory (`kv/host.py`). A few slots at a time are held while a piece of a
conversation is written, and those of the pages that a waiting turn gets back while they are read. No step waits for a
disk, and no page of the device is held for one. This is the bookkeeping; the files are in `kv/files.py`.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf
from typing import Protocol

import msgspec

from miniserve.cluster.messages import Keep
from miniserve.kv.eviction import need
from miniserve.kv.host import RESTORED, HostPool
from miniserve.kv.pages import PagePool

log = logging.getLogger("miniserve.disk")

PIECE_PAGES = 32
"""Pages written at once, to one file."""
PATIENCE = 10.0
"""Seconds that a turn waits for its pages before it computes them."""
PAUSE = 60.0
"""Seconds without a write after one that failed."""
UNKNOWN_GAP = 60.0
"""Seconds after which a conversation is expected again of which nothing is known."""
SPARE = 0.05
"""Share of the disk's size that is made free at once."""


class Piece(msgspec.Struct, frozen=True):
    """Consecutive pages of a conversation, by their `hashes`; `parent` is that of the page before them, `sums` are
    their checksums. `keep` is what was known of the conversation when its turn ended, `end` seconds after the epoch."""

    hashes: list[bytes]
    parent: bytes | None
    sums: list[int]
    keep: Keep
    end: float


class Pieces:
    """What there is on a disk."""

    def __init__(self) -> None:
        self.sizes: dict[bytes, tuple[Piece, int]] = {}
        """Pieces and their bytes, by the hash of their first page."""
        self.total = 0
        """Bytes of all of them."""
        self._home: dict[bytes, Piece] = {}
        """The piece that each page is in."""

    def __getitem__(self, digest: bytes) -> Piece:
        return self._home[digest]

    def add(self, piece: Piece, size: int) -> None:
        self.drop(piece.hashes[0])
        self.sizes[piece.hashes[0]] = piece, size
        self.total += size
        self._home |= dict.fromkeys(piece.hashes, piece)

    def drop(self, first: bytes) -> None:
        """Forget the piece that begins with that page, if it is here."""
        piece, size = self.sizes.pop(first, (None, 0))
        self.total -= size
        for digest in piece.hashes if piece is not None else ():
            if self._home.get(digest) is piece:
                del self._home[digest]

    def find(self, hashes: list[bytes]) -> int:
        """How many pages of the chain `hashes` are here, from its first on."""
        return known(hashes, self._home)

    def surplus(self, limit: int, now: float) -> list[bytes]:
        """What has to go for all others to take at most `limit` bytes, and some to spare: what is needed least first,
        but nothing before all that builds on it. By expected need times the cost of computing, as in the pool."""
        if self.total <= limit:
            return []
        pieces, total = dict(self.sizes), self.total
        children = Counter(piece.parent for piece, _ in pieces.values())
        leaves: list[tuple[float, bytes]] = []

        def leaf(piece: Piece) -> None:
            if not any(children[digest] for digest in piece.hashes):
                keep = msgspec.structs.replace(piece.keep, gap=piece.keep.gap or UNKNOWN_GAP)
                worth = need(keep, max(now - piece.end, 0.0)) * (keep.page_seconds or 1.0)
                heappush(leaves, (worth, piece.hashes[0]))

        for piece, _ in pieces.values():
            leaf(piece)
        going: list[bytes] = []
        while leaves and total > limit * (1 - SPARE):
            first = heappop(leaves)[1]
            piece, size = pieces.pop(first)
            going.append(first)
            total -= size
            children[piece.parent] -= 1
            before = self._home.get(piece.parent) if piece.parent is not None else None
            if before is not None and before.hashes[0] in pieces:
                leaf(before)
        return going


def known(hashes: list[bytes], names: PagePool | dict[bytes, Piece]) -> int:
    """How many of the `hashes`, from the first on, are among the `names`."""
    return next((i for i, digest in enumerate(hashes) if digest not in names), len(hashes))


class Job(Protocol):
    """What a disk does beside the engine's steps."""

    def done(self) -> bool: ...

    def result(self) -> int:
        """How many pages are whole, once `done`. Raises what went wrong."""


class Store(Protocol):
    """A disk that takes `page_seconds` to read a page as far as is known, else 0. The chain `hashes` is in `slots` of
    host memory, or is to come there; none of it is overwritten before the job is done."""

    @property
    def page_seconds(self) -> float: ...

    def find(self, hashes: list[bytes]) -> int:
        """How many pages of the chain are there, from its first on. Does not wait for the disk."""

    def refresh(self) -> None:
        """Look for what others have written, at times; does not wait for that."""

    def read(self, hashes: list[bytes], slots: list[int]) -> Job: ...

    def write(self, piece: Piece, slots: list[int], copied: Callable[[], None], age: float) -> Job:
        """Write a piece, which lacks sums and end, of a turn that ended `age` seconds ago, once it has `copied`."""


@dataclass(eq=False)
class Load:
    """Pages that come from disk, and until when a turn waits for them."""

    hashes: list[bytes]
    parent: bytes | None
    deadline: float = -inf
    slots: list[int] = field(default_factory=list)
    keep: Keep = Keep()  # noqa: RUF009 - immutable
    job: Job | None = None


@dataclass(eq=False)
class Writing:
    """A piece that is being written, from `slots`, of a turn that ended at `end`."""

    job: Job
    piece: Piece
    slots: list[int]
    end: float


@dataclass(eq=False)
class Disk:
    """Moves pages between the slots of `host` and a `store`. `pool` is the device's."""

    store: Store
    host: HostPool
    pool: PagePool
    saved: int = 0
    """Pages written."""
    loaded: int = 0
    """Pages that came back."""

    def __post_init__(self) -> None:
        self._ended: deque[tuple[list[bytes], Keep, float]] = deque(maxlen=1024)
        """Turns to be written: hashes, what is known of the conversation, the time of their end."""
        self._writing: Writing | None = None
        self._loads: list[Load] = []
        self._paused = -inf
        """No turn is taken before that time."""

    @property
    def busy(self) -> bool:
        """Whether `poll` should be called again soon."""
        return bool(self._writing or self._ended or self._loads)

    def leave(self, hashes: list[bytes], keep: Keep, now: float) -> None:
        """A turn with these pages has ended: they are to be written, if its conversation may return."""
        if hashes and keep.conversation and keep.chance and now >= self._paused and self._pays(keep):
            self._ended.append((hashes, keep, now))

    def load(self, hashes: list[bytes], keep: Keep, now: float) -> Load:
        """Begin to bring back what of the chain `hashes` is on disk and nowhere above, as far as half of host memory
        goes. Turns that need the same page next get the same load."""
        above = known(hashes, self.pool)
        near = self.host.match(hashes[above:])
        self.host.release(near, keep, now)  # not the next to go
        at = above + len(near)
        wanted = hashes[at:]
        for load in self._loads:
            if wanted and wanted[0] in load.hashes:
                return load
        most = min(self.host.num_available - len(near), self.host.num_pages // 2)
        wanted = wanted[: max(most, 0)]
        load = Load(wanted[: self.store.find(wanted)], hashes[at - 1] if at else None, keep=keep)
        if load.hashes and self._pays(keep):
            load.slots = self.host.allocate(len(load.hashes), now)
            load.job, load.deadline = self.store.read(load.hashes, load.slots), now + PATIENCE
            self._loads.append(load)
        return load

    def poll(self, now: float) -> None:
        """Take in what was read, and write on. Call it between steps, and now and then while there are none."""
        self.store.refresh()
        for load in [*self._loads]:
            if load.job is not None and load.job.done():
                self._loads.remove(load)
                self._take(load, load.job, now)
        while self._writing is None or self._writing.job.done():
            if self._writing is not None:
                self._written(self._writing, now)
            if not self._ended:
                return
            self._write(now)

    def clear(self) -> None:
        """Forget the counters, and what was to be written."""
        self._ended.clear()
        self.saved = self.loaded = 0

    def _pays(self, keep: Keep) -> bool:
        """Whether reading a page is quicker than computing it, as far as both are known."""
        return not keep.page_seconds or self.store.page_seconds <= keep.page_seconds

    def _take(self, load: Load, job: Job, now: float) -> None:
        """What was read is in host memory from now on; what is not whole is not."""
        whole = _outcome(job, "read")
        for slot, digest, parent in zip(load.slots[:whole], load.hashes, [load.parent, *load.hashes], strict=False):
            self.host.register(slot, digest, parent)
        self.host.release(load.slots, load.keep, now)
        self.loaded += whole
        load.deadline = -inf

    def _write(self, now: float) -> None:
        """Begin to write the next piece of the first turn. What is there already, or is nowhere any more, is not."""
        hashes, keep, end = self._ended[0]
        at = self.store.find(hashes)
        parent = hashes[at - 1] if at else None
        slots: list[int] = []
        pages: list[int] = []
        targets: list[int] = []
        for digest in hashes[at : at + max(1, min(PIECE_PAGES, self.host.num_pages // 4))]:
            if not (found := self.host.match([digest])):
                page = self.pool.page(digest)
                if page is None or not self.host.num_available:
                    break
                found = self.host.allocate(1, now)
                before = at + len(slots) - 1
                self.host.register(found[0], digest, hashes[before] if before >= 0 else None)
                pages.append(page)
                targets += found
            slots += found
        if not slots:
            self._ended.popleft()
            return
        copied = self.host.offload(pages, targets)
        piece = Piece(hashes[at : at + len(slots)], parent, [], keep, 0.0)
        self._writing = Writing(self.store.write(piece, slots, copied, now - end), piece, slots, end)

    def _written(self, writing: Writing, now: float) -> None:
        """A piece is on disk, or could not be written: then no turn is taken for a while."""
        self._writing = None
        for slot, digest in zip(writing.slots, writing.piece.hashes, strict=True):
            # Slots of pages that are on the device as well are the first to go.
            self.host.release([slot], RESTORED if digest in self.pool else writing.piece.keep, writing.end)
        self.saved += (written := _outcome(writing.job, "written"))
        if not written:
            self._paused = now + PAUSE
            self._ended.clear()


def _outcome(job: Job, what: str) -> int:
    try:
        return job.result()
    except OSError as error:
        log.warning("KV was not %s: %s", what, error)
        return 0
