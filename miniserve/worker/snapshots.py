"""Recurrent state of an engine's sequences, and the snapshots from which a later turn goes on.

Keys and values can be cut after any page; a recurrent state holds all tokens before it, and no fewer. So a copy of it
is kept where a later prompt is likely to leave an earlier one: at the last page end of each turn's prompt (templates
drop reasoning, so the next prompt often leaves there), at the last page end of the turn, and where a prompt's pages
were found to end, which is the end of a prefix that conversations share. What is found of a prompt reaches as far as
pages and a snapshot do.

A snapshot lies in pages of the pool, named by the hash of the tokens before it. So it is counted, evicted by expected
need, kept in host memory, handed over and checked as pages are.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

from miniserve.cluster.messages import Keep
from miniserve.kv.hashing import snapshot_names
from miniserve.kv.host import HostPool
from miniserve.kv.pages import PagePool
from miniserve.worker.sequence import Sequence, Snapshot, State
from miniserve.worker.step import Work

if TYPE_CHECKING:
    from miniserve.kv.states import StateMemory


@dataclass(eq=False)
class Snapshots:
    """Gives slots to sequences, and saves, finds and drops snapshots. Saving never takes a page that a running sequence
    may need soon: a hundredth stays free, and a turn without a snapshot only costs its successor more."""

    slots: StateMemory
    pool: PagePool
    host: HostPool | None
    page_tokens: int
    saved: int = 0
    """Snapshots that were given a name."""
    used: int = 0
    """Sequences that began from one."""

    def __post_init__(self) -> None:
        self._free = list(range(self.slots.slots))
        self._watermark = max(1, self.pool.num_pages // 100)

    def find(self, sequence: Sequence, most: int, now: float) -> tuple[int, list[int], list[int]]:
        """After how many of its first `most` pages there is a snapshot, the pages of that in the pool and the slots of
        host memory for what follows them, all with a reference more."""
        hashes = sequence.hashes(self.page_tokens)
        for count in range(most, 0, -1):
            (first,) = snapshot_names(hashes[count - 1], 1)
            if first not in self.pool and (self.host is None or first not in self.host):
                continue
            names = snapshot_names(hashes[count - 1], self.slots.pages)
            owner = (self.pool if first in self.pool or self.host is None else self.host).owner(first)
            sequence.owns_snapshot = bool(owner) and owner == sequence.keep.conversation
            pages = self.pool.match(names)
            slots = self.host.match(names[len(pages) :]) if self.host is not None else []
            if len(pages) + len(slots) == self.slots.pages:
                return count, pages, slots
            self.release(sequence, pages, slots, now)
        return 0, [], []

    def release(self, sequence: Sequence, pages: list[int], slots: list[int], now: float) -> None:
        """Give back what was found. It stays its own conversation's, or belongs to none, as several may share it."""
        keep = sequence.needed_soon if sequence.owns_snapshot else Keep()
        self.pool.release(pages, keep, now)
        if self.host is not None:
            self.host.release(slots, keep, now)

    def match(self, digest: bytes) -> list[int]:
        """The pages of the snapshot after what `digest` stands for, with a reference more; none if it is not whole."""
        if snapshot_names(digest, 1)[0] not in self.pool:
            return []
        names = snapshot_names(digest, self.slots.pages)
        return self.pool.match(names) if all(name in self.pool for name in names) else []

    def awaits(self, sequence: Sequence, found: int, other: Sequence) -> bool:
        """Whether `other`, which is prefilled here, will leave a snapshot that takes `sequence` further than the
        `found` pages: it is told to, if it has not come to the end of what both share."""
        ours, theirs = sequence.hashes(self.page_tokens), other.hashes(self.page_tokens)
        most = min(len(ours), len(theirs), sequence.findable // self.page_tokens)
        # Equal up to some page, and different from there on.
        shared = bisect_left(range(most), True, key=lambda page: ours[page] != theirs[page])
        end = shared * self.page_tokens
        if shared <= found or other.state is not State.RUNNING:
            return False
        if end <= other.computed + other.under_way:
            return any(snapshot.tokens == end and not snapshot.named for snapshot in other.snapshots)
        other.stops = sorted({*other.stops, end})
        return True

    def reserved(self, sequence: Sequence) -> int:
        """Pages that a sequence gets for a state that comes from another worker, or that is handed over."""
        moves = sequence.prefill_at or sequence.prefill_for or sequence.history_at
        return self.slots.pages if moves and self.handed(sequence) else 0

    def begin(self, sequence: Sequence, pages: list[int], slots: list[int], known: int, now: float) -> None:
        """Give an admitted sequence a slot with the state after its computed tokens, that in `pages` and in `slots` of
        host memory if there is any. `known` tokens of the prompt were found in pages."""
        sequence.slot = self._free.pop()
        if self.host is not None and slots:
            back, sequence.arriving = sequence.arriving[: len(slots)], sequence.arriving[len(slots) :]
            self.host.restore(slots, back, now)
            pages = pages + back
        if not pages:
            self.slots.clear(sequence.slot)
        else:
            self.used += 1
            self.slots.load(sequence.slot, pages)
            if sequence.prefill_for and sequence.computed == self.handed(sequence):
                sequence.snapshots.append(Snapshot(sequence.computed, pages, named=True))  # to be handed over
                self.pool.release(sequence.arriving, Keep(), now)
                sequence.arriving = []
            else:
                self.release(sequence, pages, [], now)
        ends = {self.handed(sequence), known} if self.pool.caching or sequence.prefill_for else set()
        sequence.stops = sorted(end for end in ends if end > sequence.computed)

    def handed(self, sequence: Sequence) -> int:
        """How many of its given tokens another worker can be given: up to the last snapshot."""
        return sequence.given // self.page_tokens * self.page_tokens

    def launched(self, work: Work, now: float) -> None:
        """A step goes as far as `work` says: save the state there, if it is a place for that."""
        sequence, end = work.sequence, work.start + work.count
        stop = end in sequence.stops
        rolling = work.is_decode and end % self.page_tokens == 0 and self.pool.caching
        if sequence.slot is None or not (stop or rolling):
            return
        pages: list[int] = []
        # Where a step before this one may still end the sequence, the snapshot before stays until that is known.
        certain = sequence.under_way == work.count
        if rolling and certain and sequence.snapshots and sequence.snapshots[-1].rolls:
            pages = sequence.snapshots.pop().pages
        if sequence.prefill_for is not None and end == self.handed(sequence):
            pages, sequence.arriving = sequence.arriving, []
        if not pages and self.pool.num_available >= self.slots.pages + self._watermark:
            pages = self.pool.allocate(self.slots.pages, now)
        if pages:
            saved = self.slots.save(sequence.slot, pages)
            sequence.snapshots.append(Snapshot(end, pages, saved, rolls=rolling and not stop))

    def register(self, sequence: Sequence, now: float) -> None:
        """Name the snapshots of a prompt that the steps done so far have made. They are cached at once, so that running
        sequences may have their pages, but for one that is to be handed over. Of those that roll the last one stays."""
        rolling = [made for made in sequence.snapshots if made.rolls and made.tokens <= sequence.computed]
        for snapshot in rolling[:-1]:
            sequence.snapshots.remove(snapshot)
            self.pool.release(snapshot.pages, Keep(), now)
        for snapshot in sequence.snapshots:
            if not snapshot.named and not snapshot.rolls and snapshot.tokens <= sequence.computed:
                self._name(sequence, snapshot)
                if sequence.prefill_for is None:
                    self.pool.release(snapshot.pages, sequence.needed_soon, now)
                    snapshot.pages = []

    def shed(self, running: list[Sequence], now: float) -> bool:
        """Give up the unfinished snapshots of running sequences, since one needs a page; whether there were any."""
        rolling = [(s, snapshot) for s in running for snapshot in s.snapshots if snapshot.rolls]
        for sequence, snapshot in rolling:
            sequence.snapshots.remove(snapshot)
            self.pool.release(snapshot.pages, Keep(), now)
        return bool(rolling)

    def _name(self, sequence: Sequence, snapshot: Snapshot) -> None:
        snapshot.named = True
        self.saved += 1
        if snapshot.saved is not None:
            snapshot.saved.wait()  # others may read the pages from now on
        parent = sequence.hashes(self.page_tokens)[snapshot.tokens // self.page_tokens - 1]
        for page, name in zip(snapshot.pages, snapshot_names(parent, self.slots.pages), strict=True):
            self.pool.register(page, name, parent)
            parent = name

    def arrive(self, sequence: Sequence, tokens: int, now: float) -> None:
        """The state after `tokens` came from another worker, in the pages that the sequence has for it."""
        assert sequence.slot is not None
        self.slots.load(sequence.slot, sequence.arriving)
        history = sequence.state is State.FETCHING
        if history and (sequence.prefill_at or (sequence.prefill_for and tokens < self.handed(sequence))):
            return  # the pages are kept for the state after the whole prompt
        sequence.snapshots.append(Snapshot(tokens, sequence.arriving))
        sequence.arriving = []
        self.register(sequence, now)

    def end(self, sequence: Sequence, keep: Keep, now: float) -> None:
        """The sequence is over here, or preempted: its snapshots replace earlier ones of its conversation."""
        for snapshot in sequence.snapshots:
            if snapshot.rolls and snapshot.tokens <= sequence.computed:
                self._name(sequence, snapshot)
        if ends := [snapshot.tokens for snapshot in sequence.snapshots if snapshot.named]:
            # That after the prompt may have been there before.
            hashes, ends = sequence.hashes(self.page_tokens), [*ends, self.handed(sequence)]
            self.pool.drop_snapshots(keep.conversation, {hashes[end // self.page_tokens - 1] for end in ends if end})
        for snapshot in sequence.snapshots:
            self.pool.release(snapshot.pages, keep, now)
        self.pool.release(sequence.arriving, keep, now)
        sequence.snapshots, sequence.arriving, sequence.stops = [], [], []
        self.leave(sequence)

    def leave(self, sequence: Sequence) -> None:
        """Nothing more is computed of the sequence: its slot is free."""
        if sequence.slot is not None:
            self._free.append(sequence.slot)
            sequence.slot = None
