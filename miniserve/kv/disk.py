"""KV on disk, below host memory: what ended turns leave is written there, and found again when their conversations
come back, also by another worker or a later run of the server.

Everything passes through slots of host memory (`kv/host.py`). A few slots at a time are held while a piece of a
conversation is written, and those of the pages that a waiting turn gets back while they are read. No step waits for a
disk, and no page of the device is held for one. This is the bookkeeping; the files are in `kv/files.py`.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, nextafter
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

    @property
    def name(self) -> bytes:
        """The hashes of its first and its last page, which say what is in it."""
        return self.hashes[0] + self.hashes[-1]


class Pieces:
    """What there is on a disk."""

    def __init__(self) -> None:
        self.sizes: dict[bytes, tuple[Piece, int]] = {}
        """Pieces and their bytes, by their names."""
        self.total = 0
        """Bytes of all of them."""
        self._home: dict[bytes, Piece] = {}
        """The piece that each page is in."""

    def __getitem__(self, digest: bytes) -> Piece:
        return self._home[digest]

    def add(self, piece: Piece, size: int) -> None:
        self.drop(piece.name)
        self.sizes[piece.name] = piece, size
        self.total += size
        self._home |= dict.fromkeys(piece.hashes, piece)

    def drop(self, name: bytes) -> None:
        """Forget the piece of that name, if it is here."""
        piece, size = self.sizes.pop(name, (None, 0))
        self.total -= size
        for digest in piece.hashes if piece is not None else ():
            if self._home.get(digest) is piece:
                del self._home[digest]

    def find(self, hashes: list[bytes]) -> int:
        """How many pages of the chain `hashes` are here, from its first on."""
        return known(hashes, self._home)

    def surplus(self, limit: int, now: float, coming: Piece) -> list[bytes]:
        """What has to go for all others to take at most `limit` bytes, and some to spare: what is needed least first,
        but nothing before all that builds on it, as the `coming` piece does on what it follows. By expected need times
        the cost of computing, as in the pool."""
        if self.total <= limit:
            return []
        worth = dict[bytes, float]()
        for piece, _ in self.sizes.values():
            keep = msgspec.structs.replace(piece.keep, gap=piece.keep.gap or UNKNOWN_GAP)
            worth[piece.name] = need(keep, max(now - piece.end, 0.0)) * (keep.page_seconds or 1.0)
        # The dearest first, of equals the latest: so each is raised once, however long a conversation is.
        pieces = sorted((piece for piece, _ in reversed(self.sizes.values())), key=lambda piece: -worth[piece.name])
        worth[coming.name] = inf
        for piece in (coming, *pieces):
            least, before = worth[piece.name], self._home.get(piece.parent or b"")
            while before is not None and worth[before.name] <= least:  # what comes before is worth more
                worth[before.name] = least = nextafter(least, inf)
                before = self._home.get(before.parent or b"")
        going, total = list[bytes](), self.total
        for name in sorted(self.sizes, key=worth.__getitem__):
            if total <= limit * (1 - SPARE) or worth[name] == inf:
                break
            going.append(name)
            total -= self.sizes[name][1]
        return going


def known(hashes: list[bytes], names: PagePool | dict[bytes, Piece]) -> int:
    """How many of the `hashes`, from the first on, are among the `names`."""
    return next((i for i, digest in enumerate(hashes) if digest not in names), len(hashes))


class Job(Protocol):
    """What a disk does beside the engine's steps."""

    def done(self) -> bool: ...

    def result(self) -> int:
        """How many pages are whole, once `done`; none of a piece for which there is no room. Raises OSError."""


class Store(Protocol):
    """A disk that takes `page_seconds` to read a page as far as is known, else 0. The chain `hashes` is in `slots` of
    host memory, or is to come there, when `ready` has returned, which blocks; no other copy is made there before the
    job is done."""

    @property
    def page_seconds(self) -> float: ...

    def find(self, hashes: list[bytes]) -> int:
        """How many pages of the chain are there, from its first on. Does not wait for the disk."""

    def refresh(self) -> None:
        """Look for what others have written, at times; does not wait for that."""

    def read(self, hashes: list[bytes], slots: list[int], ready: Callable[[], None]) -> Job: ...

    def write(self, piece: Piece, slots: list[int], ready: Callable[[], None], age: float) -> Job:
        """Write a piece, which lacks sums and end, of a turn that ended `age` seconds ago."""


@dataclass(eq=False)
class Load:
    """Pages that come from disk for a turn, and until when it waits for them. So many came `whole`."""

    turn: str
    hashes: list[bytes] = field(default_factory=list)
    parent: bytes | None = None
    deadline: float = -inf
    slots: list[int] = field(default_factory=list)
    keep: Keep = Keep()  # noqa: RUF009 - immutable
    job: Job | None = None
    whole: int = 0


@dataclass(eq=False)
class Left:
    """What a turn has left, to be written; its first `written` pages were."""

    hashes: list[bytes]
    keep: Keep
    end: float
    written: int = 0


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
        self._ended: deque[Left] = deque(maxlen=1024)
        self._writing: tuple[Job, Piece, list[int]] | None = None
        """A piece that is being written, from slots."""
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
            self._ended.append(Left(hashes, keep, now))

    def load(self, turn: str, hashes: list[bytes], keep: Keep, now: float) -> Load:
        """Begin to bring back what of the chain `hashes` is on disk and nowhere above, as far as half of host memory
        goes. A turn may get another's load: of the page it needs next, or of slots that it needs. It asks again after
        that. Nothing is begun while the disk lets a turn wait for too long."""
        above = known(hashes, self.pool)
        near = self.host.match(hashes[above:])
        self.host.release(near, keep, now)  # not the next to go
        at = above + len(near)
        wanted, parent = hashes[at:], hashes[at - 1] if at else None
        count, room = min(self.store.find(wanted), self.host.num_pages // 2), self.host.num_available - len(near)
        if not count or not self._pays(keep) or any(now >= other.deadline for other in self._loads):
            return Load(turn)
        for other in self._loads:
            if wanted[0] in other.hashes or count > room:
                return other
        if not (hashes := wanted[: max(min(count, room), 0)]):
            return Load(turn)
        slots = self.host.allocate(len(hashes), now)
        load = Load(turn, hashes, parent, now + PATIENCE, slots, keep)
        load.job = self.store.read(hashes, slots, self.host.slots.barrier())
        self._loads.append(load)
        return load

    def poll(self, now: float) -> None:
        """Take in what was read, and write on. Call it between steps, and now and then while there are none."""
        self.store.refresh()
        for load in [*self._loads]:
            if load.job is not None and load.job.done():
                self._loads.remove(load)
                self._take(load, load.job, now)
        while self._writing is None or self._writing[0].done():
            if self._writing is not None:
                self._written(*self._writing, now)
            if not self._ended:
                return
            self._write(now)

    def _pays(self, keep: Keep) -> bool:
        """Whether reading a page is quicker than computing it, as far as both are known."""
        return not keep.page_seconds or self.store.page_seconds <= keep.page_seconds

    def _take(self, load: Load, job: Job, now: float) -> None:
        """What was read is in host memory from now on; what is not whole is not."""
        try:
            load.whole = job.result()
        except OSError as error:
            log.warning("KV was not read: %s", error)
        names = zip(load.slots[: load.whole], load.hashes, [load.parent, *load.hashes], strict=False)
        for slot, digest, parent in names:
            self.host.register(slot, digest, parent)
        self.host.release(load.slots, load.keep, now)
        self.loaded += load.whole
        load.deadline = -inf

    def _write(self, now: float) -> None:
        """Begin to write the next piece of the first turn: not what is there already, or behind what is gone."""
        turn = self._ended[0]
        hashes, at = turn.hashes, self.store.find(turn.hashes)
        slots: list[int] = []
        pages: list[int] = []
        targets: list[int] = []
        most = max(1, min(PIECE_PAGES, self.host.num_pages // 4)) if at >= turn.written else 0
        for i in range(at, min(at + most, len(hashes))):
            if not (found := self.host.match([hashes[i]])):
                page = self.pool.page(hashes[i])
                if page is None or not self.host.num_available:
                    break
                found = self.host.allocate(1, now)
                self.host.register(found[0], hashes[i], hashes[i - 1] if i else None)
                pages.append(page)
                targets += found
            slots += found
        if not slots:
            self._ended.popleft()
            return
        if pages:
            self.host.offload(pages, targets)
        turn.written = at + len(slots)
        piece = Piece(hashes[at : turn.written], hashes[at - 1] if at else None, [], turn.keep, 0.0)
        self._writing = self.store.write(piece, slots, self.host.slots.barrier(), now - turn.end), piece, slots

    def _written(self, job: Job, piece: Piece, slots: list[int], now: float) -> None:
        """A piece is on disk, or its turn has no more room there, or it failed: then no turn is taken for a while."""
        self._writing = None
        for slot, digest in zip(reversed(slots), reversed(piece.hashes), strict=True):
            # Slots of pages that are on the device as well are the first to go.
            self.host.release([slot], RESTORED if digest in self.pool else piece.keep, now)
        try:
            self.saved += (written := job.result())
        except OSError as error:
            log.warning("KV was not written: %s", error)
            self._paused, written = now + PAUSE, 0
            self._ended.clear()
        if not written and self._ended:
            self._ended.popleft()
