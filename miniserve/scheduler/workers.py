"""What the scheduler knows of the workers: KV and load of each, and the links between them."""

import math
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from heapq import nsmallest

from miniserve.cluster.messages import Move, Peer, Report, WorkerStats
from miniserve.config import Role
from miniserve.scheduler.observations import Average, Speed, TimeAverage
from miniserve.scheduler.prompts import Known, PrefixIndex

FEW_PREFILLERS, SHORTEST_QUEUES = 8, 2
"""Of more prefillers than that, those with so many of the shortest queues are compared."""
LOAD_WINDOW = 30.0
"""Seconds over which a worker's load is averaged: what the next few turns will find there."""


@dataclass(eq=False)
class WorkerView:
    """A worker that lives, as `peer` says what it is. KV is counted in pages, times in seconds. The `Ledger` keeps
    `reserved`, `resident` and `wanted`."""

    peer: Peer
    max_turns: int
    page_tokens: int
    speed: Speed = field(default_factory=Speed)
    reported: float = 0.0
    """When its last report came, or when it came up."""
    reserved: int = 0
    resident: int = 0
    """Held by conversations between turns; the worker may evict it."""
    wanted: float = 0.0
    """What of `resident` is expected to be needed soon: each conversation's pages times the chance of its next turn."""
    turns: int = 0
    """Turns whose home it is now, those that are prefilled elsewhere included."""
    queued_prefill_tokens: int = 0
    stats: WorkerStats | None = None
    leaving: set[str] = field(default_factory=set)
    """Runs that the scheduler has asked it to stop, until it reports them stopped: it may still die of them."""

    def __post_init__(self) -> None:
        self.name, self.role, self.epoch = self.peer.name, self.peer.role, self.peer.epoch
        self.total_pages, self.host = self.peer.pool.num_pages, self.peer.pool.host
        self.load = TimeAverage(LOAD_WINDOW, self.reported)
        self.prefilling = TimeAverage(LOAD_WINDOW, self.reported)
        """The share of its time that it spends on prompts."""

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
        room = self.turns < self.max_turns and self.reserved + pages <= self.total_pages
        return room or self.turns == 0

    def change(self, turns: int, pages: int, now: float) -> None:
        """So many turns begin here, for which so many pages are reserved; below zero if they end."""
        self.load.update(self.turns, now)
        self.turns += turns
        self.reserved += pages

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
class Ranking:
    """Names of workers in an order by their `burdens`, which are to be computed again for `stale` ones."""

    names: list[str]
    stale: set[str]
    burdens: dict[str, float] = field(default_factory=dict)


class Cluster:
    """All that a policy may look at beside the turn. Workers that are not `open` are claimed by turns before it."""

    def __init__(self, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.snapshot_pages = 0
        """Of a snapshot of recurrent state, which goes with KV wherever that goes."""
        self.workers: dict[str, WorkerView] = {}
        """Those that live."""
        self.prefillers: list[WorkerView] = []
        self.decoders: list[WorkerView] = []
        self.open: Set[str] = self.workers.keys()
        self.retired: set[str] = set()
        self.links: dict[tuple[str, str], Link] = {}
        """(from, to) -> KV that was moved."""
        self.prefixes = PrefixIndex()
        self.changed: set[str] = set()
        """Workers whose KV was reserved or given back since the queue was served last."""
        self._kinds = {True: Link(), False: Link()}  # all links within hosts, all between hosts
        self._rankings: dict[int, Ranking] = {}
        self._shortest: list[WorkerView] = []  # prefillers with the shortest queues; empty when that may have changed

    def join(self, worker: WorkerView) -> None:
        self.leave(worker.name)
        self.workers[worker.name] = worker
        self.snapshot_pages = worker.peer.pool.snapshot_pages
        (self.prefillers if worker.role is Role.PREFILLER else self.decoders).append(worker)

    def leave(self, name: str) -> None:
        self.retire(name)
        self.retired.discard(name)
        self.workers.pop(name, None)
        self.prefixes.drop(name)

    def retire(self, name: str) -> None:
        """A worker lives, but nothing more is to be placed there."""
        self._rankings.clear()
        self._shortest = []
        if going := self.workers.get(name):
            self.retired.add(name)
            for those in (self.prefillers, self.decoders):
                those[:] = [worker for worker in those if worker is not going]

    def worker(self, name: str | None) -> WorkerView | None:
        return self.workers.get(name) if name is not None else None

    def touch(self, name: str) -> None:
        """How busy a worker is has changed."""
        for ranking in self._rankings.values():
            ranking.stale.add(name)
        if self.workers[name].role is Role.PREFILLER:
            self._shortest = []

    def ranked(self, tokens: int, burden: Callable[[int, WorkerView], float]) -> Iterator[WorkerView]:
        """All workers, those first to which a turn of about so many tokens is the least `burden`. It is asked only of
        workers that have changed since, for a power of four of tokens, so it has to be the same function each time."""
        size = 4 ** round(math.log(tokens, 4))
        if (ranking := self._rankings.get(size)) is None:
            names = [worker.name for worker in (*self.decoders, *self.prefillers)]
            ranking = self._rankings[size] = Ranking(names, set(names))
        for name in ranking.stale:
            if worker := self.workers.get(name):
                ranking.burdens[name] = burden(size, worker)
        ranking.stale.clear()
        ranking.names.sort(key=ranking.burdens.__getitem__)
        return map(self.workers.__getitem__, ranking.names)

    def prefillers_for(self, home: WorkerView, known: Known) -> list[WorkerView]:
        """The prefillers that are worth comparing for a turn: all, if they are few; else those with the shortest
        queues, those on the host of its home, and those that have computed the conversation."""
        if len(self.prefillers) <= FEW_PREFILLERS:
            return self.prefillers
        if not self._shortest:
            self._shortest = nsmallest(SHORTEST_QUEUES, self.prefillers, lambda p: p.queued_prefill_tokens)
        host = home.host or None
        return [p for p in self.prefillers if p.host == host or p.name in known or p in self._shortest]

    def moved(self, move: Move, to: str) -> None:
        self.links.setdefault((move.source, to), Link()).observe(move)
        source, destination = self.worker(move.source), self.worker(to)
        if source and destination:
            self._kinds[source.host == destination.host].observe(move)

    def _link(self, source: WorkerView, destination: WorkerView) -> Link:
        """What tells most of a link: itself if it was measured, else all of its kind, else those of the other kind."""
        link = self.links.get((source.name, destination.name))
        if link is None or not link.bandwidth.count:
            near = source.host == destination.host
            link = self._kinds[near] if self._kinds[near].bandwidth.count else self._kinds[not near]
        return link

    def copy_seconds(self, source: WorkerView, destination: WorkerView, tokens: int) -> float:
        """Seconds to copy KV of `tokens`, as measured on this link, else on its kind, else on any; 0 if on none."""
        if tokens <= 0:
            return 0.0
        bandwidth = self._link(source, destination).bandwidth
        pages = tokens / self.page_tokens + self.snapshot_pages
        return pages * source.peer.pool.page_bytes / bandwidth.value if bandwidth.count else 0.0

    def exposed_seconds(self, source: WorkerView, destination: WorkerView) -> float:
        """What a handoff costs beyond the prefill itself; 0 where none was measured."""
        return self._link(source, destination).exposed.value
