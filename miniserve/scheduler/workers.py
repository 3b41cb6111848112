"""What the scheduler knows of the workers: KV and load of each, the links between them, the prefixes they hold."""

from collections import OrderedDict
from collections.abc import Set
from dataclasses import dataclass, field

from miniserve.cluster.messages import Move, Report, WorkerStats
from miniserve.config import Role
from miniserve.scheduler.observations import Average, Speed, TimeAverage

LOAD_WINDOW = 30.0
"""Seconds over which a worker's load is averaged: what the next few turns will find there."""


@dataclass
class WorkerView:
    """A worker that lives. KV is counted in pages, times in seconds. The `Ledger` keeps `reserved`, `resident` and
    `wanted`."""

    name: str
    role: Role
    total_pages: int
    max_turns: int
    page_tokens: int
    epoch: int = 1
    page_bytes: int = 0
    snapshot_pages: int = 0
    """Of a snapshot of recurrent state, which goes with KV wherever that goes."""
    speed: Speed = field(default_factory=Speed)
    reserved: int = 0
    resident: int = 0
    """Held by conversations between turns; the worker may evict it."""
    wanted: float = 0.0
    """What of `resident` is expected to be needed again soon: the pages of each conversation times the chance of its
    next turn."""
    turns: int = 0
    """Turns whose home it is now, those that are prefilled elsewhere included."""
    queued_prefill_tokens: int = 0
    reported: float = 0.0
    """When its last report came, or when it came up."""
    stats: WorkerStats | None = None
    leaving: set[str] = field(default_factory=set)
    """Runs that the scheduler has asked it to stop, until it reports them stopped: it may still die of them."""
    load: TimeAverage = field(init=False)
    prefilling: TimeAverage = field(init=False)
    """The share of its time that it spends on prompts."""

    def __post_init__(self) -> None:
        self.load = TimeAverage(LOAD_WINDOW, self.reported)
        self.prefilling = TimeAverage(LOAD_WINDOW, self.reported)

    @property
    def free(self) -> int:
        """Pages that no turn runs in and no idle conversation holds; below zero when these hold more than fits."""
        return self.total_pages - self.reserved - self.resident

    @property
    def room(self) -> float:
        """Pages that a newcomer can take without driving out what is needed soon."""
        return self.total_pages - self.reserved - self.wanted

    @property
    def tokens_in_use(self) -> int:
        """Tokens that the turns here have room for."""
        return self.reserved * self.page_tokens

    @property
    def queue_seconds(self) -> float:
        """How long the prompts that wait here will take."""
        return self.speed.prefill(self.queued_prefill_tokens)

    def fits(self, pages: int) -> bool:
        """Whether a turn that needs `pages` can start here now. One turn alone always can."""
        if self.turns == 0:
            return True
        return self.turns < self.max_turns and self.reserved + pages <= self.total_pages

    def add_turn(self, pages: int, now: float) -> None:
        self.load.update(self.turns, now)
        self.reserved += pages
        self.turns += 1

    def drop_turn(self, pages: int, now: float) -> None:
        self.load.update(self.turns, now)
        self.reserved -= pages
        self.turns -= 1

    def observe(self, report: Report, now: float) -> None:
        self.stats = report.stats
        self.leaving.difference_update(report.stopped)
        self.queued_prefill_tokens = report.stats.queued_prefill_tokens
        for step in report.steps:
            self.speed.observe(step)
        spent = sum(step.seconds for step in report.steps if step.prefill)
        if now > self.reported:
            self.prefilling.update(min(spent / (now - self.reported), 1.0), now)
        self.load.update(self.turns, now)
        self.reported = now


@dataclass
class Link:
    """KV that went from one worker to another: totals, and how fast it went."""

    count: int = 0
    pages: int = 0
    bytes: int = 0
    seconds: float = 0.0
    exposed: Average = field(default_factory=Average)
    """Seconds of a handoff that no computing has hidden."""
    bandwidth: Average = field(default_factory=Average)
    """Bytes a second."""

    def observe(self, move: Move) -> None:
        self.count += 1
        self.pages += move.pages
        self.bytes += move.bytes
        self.seconds += move.seconds
        if not move.history:
            self.exposed.add(move.exposed)
        elapsed = max(move.seconds, move.exposed) if move.history else move.seconds
        if move.bytes and elapsed > 0:
            self.bandwidth.add(move.bytes / elapsed)


@dataclass
class Cluster:
    """All that a policy may look at beside the turn. `open` names the workers that may take this turn: the others are
    claimed by turns that wait before it."""

    prefillers: list[WorkerView]
    decoders: list[WorkerView]
    open: Set[str]
    links: dict[tuple[str, str], Link]

    def worker(self, name: str | None) -> WorkerView | None:
        return next((w for w in (*self.prefillers, *self.decoders) if w.name == name), None)

    def copy_seconds(self, source: WorkerView, destination: WorkerView, tokens: int) -> float:
        """How long the KV of `tokens` takes between two workers: by this link's bandwidth, else by that of any link
        that was measured, else 0."""
        if tokens <= 0:
            return 0.0
        link = self.links.get((source.name, destination.name))
        if link is None or not link.bandwidth.count:
            link = next((other for other in self.links.values() if other.bandwidth.count), None)
        if link is None:
            return 0.0
        return (tokens / source.page_tokens + source.snapshot_pages) * source.page_bytes / link.bandwidth.value

    def exposed_seconds(self, source: WorkerView, destination: WorkerView) -> float:
        """What a handoff costs beyond the prefill itself; 0 where none was measured."""
        link = self.links.get((source.name, destination.name))
        return link.exposed.value if link else 0.0


class PrefixIndex:
    """The workers that have computed the first 1, 2, 4, 8, ... pages of prompts, for the last `capacity` of these
    prefixes: system prompts, and tasks that share a beginning.

    Powers of two: a prompt of a thousand pages leaves ten entries, most of them shared with others like it; what is
    found is at least half of what was there. Workers evict pages without a message: it is an estimate.
    """

    def __init__(self, capacity: int = 65_536) -> None:
        self._capacity = capacity
        self._workers: OrderedDict[bytes, tuple[str, ...]] = OrderedDict()

    def add(self, chain: list[bytes], worker: str) -> None:
        """`worker` has computed the prompt with this `page_chain`."""
        for page in _powers(len(chain)):
            known = self._workers.pop(chain[page], ())
            self._workers[chain[page]] = known if worker in known else (*known, worker)
        while len(self._workers) > self._capacity:
            self._workers.popitem(last=False)

    def find(self, chain: list[bytes]) -> dict[str, int]:
        """Worker -> pages of this prompt that it has computed, at least."""
        found: dict[str, int] = {}
        for page in _powers(len(chain)):
            workers = self._workers.get(chain[page])
            if workers is None:
                break
            for worker in workers:
                found[worker] = page
        return found

    def drop(self, worker: str) -> None:
        for digest, known in self._workers.items():
            if worker in known:
                self._workers[digest] = tuple(name for name in known if name != worker)


def _powers(length: int) -> list[int]:
    """1, 2, 4, ... below `length`."""
    return [1 << n for n in range(max(length - 1, 0).bit_length())]
