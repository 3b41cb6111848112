"""What workers do at each moment of a simulated run, recorded for `timeline_plot`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any

from miniserve.bench.simulate.cluster import Simulation, SimulationConfig
from miniserve.bench.simulate.worker import SimulatedCopy, SimulatedLink, SimulatedWorker
from miniserve.cluster.messages import Peer
from miniserve.worker.step import Launched, Work

Span = tuple[float, float, str]
"""Start, end, and what it was: prefill, decode, mixed or transfer."""


@dataclass(eq=False)
class RecordedWorker(SimulatedWorker):
    """A worker that remembers what its device did, and when KV was on its way to it (`spans`); and (time, held, cached
    pages) after each round (`kv`)."""

    spans: list[Span] = field(default_factory=list)
    kv: list[tuple[float, int, int]] = field(default_factory=list)

    def launch(self, batch: list[Work]) -> Launched:
        started, decodes = self.now, sum(work.is_decode for work in batch)
        launched = super().launch(batch)
        kind = "decode" if decodes == len(batch) else "mixed" if decodes else "prefill"
        self.spans.append((started, self.now, kind))
        return launched

    def round(self, now: float) -> float:
        due = super().round(now)
        self.kv.append((self.now, self.pool.num_held, self.pool.num_cached))
        return due

    def connect(self, peer: Peer) -> SimulatedLink:
        return RecordedLink(self, peer.pool.host == self.host, record=self.spans.append)


@dataclass
class RecordedLink(SimulatedLink):
    record: Callable[[Span], None] = lambda span: None

    def fetch(self, theirs: list[int], ours: list[int], lease: float = inf) -> SimulatedCopy:
        copy = super().fetch(theirs, ours, lease)
        self.record((copy.at - copy.seconds, copy.at, "transfer"))
        return copy


def timeline(config: SimulationConfig, start: float, end: float) -> dict[str, Any]:
    """What workers do between `start` and `end`, in seconds."""
    simulation = Simulation(config, worker=RecordedWorker)
    simulation.run()
    workers = {name: w for name, w in simulation.workers.items() if isinstance(w, RecordedWorker)}
    return {
        "policy": config.policy,
        "topology": str(config.topology),
        "rate": config.workload.rate,
        "window": [start, end],
        "spans": {name: [span for span in w.spans if span[1] > start and span[0] < end] for name, w in workers.items()},
        "kv": {name: [row for row in w.kv if start <= row[0] <= end] for name, w in workers.items()},
        "pages": {name: w.pool.num_pages for name, w in workers.items()},
    }
