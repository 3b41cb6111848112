"""Admission: a waiting sequence gets all pages of its tokens at once, minus those that are found with its prefix."""

from dataclasses import dataclass

from miniserve.cluster.messages import Counters
from miniserve.kv.disk import Disk
from miniserve.kv.host import HostPool
from miniserve.kv.pages import PagePool
from miniserve.worker.sequence import Admission, Deferral, Sequence, State
from miniserve.worker.snapshots import Snapshots


@dataclass(eq=False)
class Admissions:
    """Finds the KV that a sequence can begin with, and reserves the pages it lacks. `host`, if any, keeps what `pool`
    has evicted, and `disk` what turns have left; with `snapshots` what is found ends at one of these. `watermark` pages
    are kept back for running sequences to grow into: admitting one must not at once preempt another."""

    pool: PagePool
    host: HostPool | None
    disk: Disk | None
    snapshots: Snapshots | None
    page_tokens: int
    watermark: int

    def try_admit(self, sequence: Sequence, running: list[Sequence], counters: Counters, now: float) -> Admission:
        """Give a waiting sequence all pages of its tokens, if it may have them now, and move it to its next state."""
        if self.disk is not None:
            load = sequence.load
            if load is None or (load.turn != sequence.turn and load.whole):
                findable = sequence.hashes(self.page_tokens)[: sequence.findable // self.page_tokens]
                load = sequence.load = self.disk.load(sequence.turn, findable, sequence.needed_soon, now)
            if now < load.deadline:
                return Admission.LOADING
        if (deferral := sequence.deferral) is not None and self._holds(deferral, sequence, running, now):
            return deferral.admission
        # The last token is always computed: its logits give the next one.
        hashes = sequence.hashes(self.page_tokens)[: sequence.findable // self.page_tokens]
        matched = self.pool.match(hashes)
        slots = self.host.match(hashes[len(matched) :], sequence.keep) if self.host is not None else []
        known = len(matched) + len(slots)
        state: tuple[list[int], list[int]] = [], []
        if self.snapshots is not None:
            matched, slots, state = self._cut(sequence, matched, slots, now)
        found = len(matched) + len(slots)
        wanted = missing = -(-len(sequence.tokens) // self.page_tokens) - len(matched)
        if self.snapshots is not None:
            wanted += len(state[1]) + self.snapshots.reserved(sequence)
        shared = self._is_being_computed(sequence, found, running)
        if shared or wanted + (self.watermark if running else 0) > self.pool.num_available:
            # Whatever was found is needed as soon as there is room.
            self._release(sequence, matched, slots, now)
            if self.snapshots is not None:
                self.snapshots.release(sequence, *state, now)
            admission = Admission.SHARED if shared else Admission.NO_PAGES
            page = found if shared else known if self.snapshots is not None else len(matched)
            sequence.deferral = Deferral(admission, page, self.pool.freed, now + 1.0)
            return admission
        sequence.deferral = None
        pages = self.pool.allocate(wanted, now)
        sequence.pages, sequence.arriving = matched + pages[:missing], pages[missing:]
        sequence.computed = found * self.page_tokens
        sequence.registered = len(matched)
        if sequence.load is not None and sequence.load.whole and sequence.missing < sequence.computed:
            sequence.prefill_at = None  # who chose a prefiller could not know that most of it is on disk
        if self.host is not None and slots:
            self.host.restore(slots, sequence.pages[len(matched) : found], now)
            sequence.register(self.pool, self.page_tokens)
        if self.snapshots is not None:
            self.snapshots.begin(sequence, *state, known * self.page_tokens, now)
        if sequence.cached is None:
            sequence.admitted = now
            sequence.cached = sequence.computed
            if sequence.prefill_at is None:  # else the prefiller looks it up too, and counts
                counters.prefix_queries += sequence.given
                counters.prefix_hits += sequence.cached
        if sequence.history_at is not None:
            sequence.move(State.FETCHING)
        else:
            sequence.move(State.RUNNING if sequence.prefill_at is None else State.RECEIVING)
        return Admission.ADMITTED

    def history(self, hashes: list[bytes], now: float) -> list[int]:
        """The pages, held and whole, of what is here of the chain `hashes`. What is in host memory comes back first, as
        far as there is room; not with snapshots, which would have to come too."""
        pages = self.pool.match(hashes)
        if self.host is None:
            return pages
        if self.snapshots is None:
            room = max(self.pool.num_available - self.watermark, 0)
            slots = self.host.match(hashes[len(pages) :][:room])
            back = self.pool.allocate(len(slots), now)
            if slots:
                self.host.restore(slots, back, now)
            for page in back:
                at = len(pages)
                self.pool.register(page, hashes[at], hashes[at - 1] if at else None)
                pages.append(page)
        self.host.slots.barrier()()  # also what was on its way back before
        return pages

    def _holds(self, deferral: Deferral, sequence: Sequence, running: list[Sequence], now: float) -> bool:
        """Whether a sequence would have to wait once more if it was matched anew, which takes long with a long one."""
        if deferral.admission is Admission.SHARED:
            return self._is_being_computed(sequence, deferral.page, running)
        hashes = sequence.hashes(self.page_tokens)
        known = deferral.page < len(hashes) and hashes[deferral.page] in self.pool
        return bool(running) and not known and self.pool.freed == deferral.freed and now < deferral.until

    def _cut(
        self, sequence: Sequence, pages: list[int], slots: list[int], now: float
    ) -> tuple[list[int], list[int], tuple[list[int], list[int]]]:
        """What was found, up to the last snapshot; and where that is."""
        assert self.snapshots is not None
        count, *state = self.snapshots.find(sequence, len(pages) + len(slots), now)
        states = len(state[0]) + len(state[1]) + self.snapshots.reserved(sequence)
        if -(-len(sequence.tokens) // self.page_tokens) + states > self.pool.num_pages:  # it would wait for ever
            self.snapshots.release(sequence, state[0], state[1], now)
            count, state = 0, [[], []]
        from_host = max(count - len(pages), 0)
        self._release(sequence, pages[count:], slots[from_host:], now)
        return pages[:count], slots[:from_host], (state[0], state[1])

    def _release(self, sequence: Sequence, pages: list[int], slots: list[int], now: float) -> None:
        self.pool.release(pages, sequence.needed_soon, now)
        if self.host is not None:
            self.host.release(slots, sequence.needed_soon, now)

    def _is_being_computed(self, sequence: Sequence, matched: int, running: list[Sequence]) -> bool:
        """Whether a page that a running prefill registers next follows on the first `matched` ones of `sequence`."""
        limit = sequence.findable // self.page_tokens if self.pool.caching else 0
        ours = sequence.hashes(self.page_tokens)
        for other in running:
            if self.snapshots is not None:
                if self.pool.caching and other.missing > 1 and self.snapshots.awaits(sequence, matched, other):
                    return True
            elif other.missing > 1 and (page := max(matched, other.registered)) < limit:
                hashes = other.hashes(self.page_tokens)
                if page < len(hashes) and hashes[page] == ours[page]:
                    return True
        return False
