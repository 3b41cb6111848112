"""A worker without a device: the engine, the page pool, the handoffs and the loop of a real one, on a virtual clock.

Only two things are replaced: `SimulatedRunner` has no model, it lets the time of a step pass and asks for the next
token; `SimulatedLink` moves no bytes, it lets the time of a copy pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from miniserve.bench.simulate.hardware import Hardware
from miniserve.cluster.messages import Envelope, Message, Peer, PoolInfo
from miniserve.config import Role
from miniserve.kv.eviction import make_order
from miniserve.kv.pages import PagePool
from miniserve.worker.engine import Engine
from miniserve.worker.handoff import Handoffs
from miniserve.worker.pace import Pace
from miniserve.worker.process import Worker
from miniserve.worker.sequence import Sequence
from miniserve.worker.step import Done, Work

LAYOUT = "simulated"
PATIENCE = 30.0
"""Seconds of a handoff's lease: the default of `serve`."""

Send = Callable[[str, str, float, Message], None]
"""Sender, receiver, the time of sending, message."""
Span = tuple[float, float, str]
"""Start, end, and what it was: prefill, decode, mixed or transfer."""


@dataclass
class Clock:
    """A worker's own time, which its steps move on."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class SimulatedRunner:
    """A `worker.engine.Runner` whose steps take as long as on the hardware. `speak` returns the next token of a
    complete sequence. `spans` gets (start, end, kind) of each step, if there is such a list. `busy` counts the seconds
    in which the device computed."""

    hardware: Hardware
    clock: Clock
    speak: Callable[[Sequence], int]
    spans: list[Span] | None
    busy: float = 0.0
    eos: frozenset[int] = frozenset()

    def launch(self, batch: list[Work]) -> Done:
        started = self.clock.now
        seconds = self.hardware.batch_seconds(batch)
        self.clock.now += seconds
        self.busy += seconds
        if self.spans is not None:
            prompts = sum(not work.is_decode for work in batch)
            kind = "decode" if not prompts else "prefill" if prompts == len(batch) else "mixed"
            self.spans.append((started, self.clock.now, kind))
        return Done([(self.speak(work.sequence), None) for work in batch if work.samples])


@dataclass
class SimulatedCopy:
    """A `kv.transfer` `Copy` whose pages arrive `at` a time, beside both workers' steps."""

    seconds: float
    at: float
    clock: Clock
    stored: bool = True

    @property
    def ready(self) -> bool:
        return self.clock.now >= self.at

    def store(self, ours: list[int]) -> None: ...

    def abandon(self) -> None: ...


@dataclass
class SimulatedLink:
    """A `kv.transfer` `Transfer` that makes one copy from a peer after the other: it is `free` at a time."""

    hardware: Hardware
    clock: Clock
    spans: list[Span] | None
    free: float = 0.0
    name: str = "simulated"

    def fetch(self, pages: list[int]) -> SimulatedCopy:
        begin, seconds = max(self.free, self.clock.now), self.hardware.transfer_seconds(len(pages))
        self.free = begin + seconds
        if self.spans is not None:
            self.spans.append((begin, self.free, "transfer"))
        return SimulatedCopy(seconds, self.free, self.clock)

    def close(self) -> None: ...


class SimulatedWorker:
    """One worker of the cluster, with its inbox. The simulation calls `round` when it is due."""

    def __init__(
        self,
        name: str,
        role: Role,
        hardware: Hardware,
        speak: Callable[[Sequence], int],
        send: Send,
        *,
        max_model_len: int,
        stretch: float,
        caching: bool,
        record: bool,
    ) -> None:
        self.name = name
        self.role = role
        self.hardware = hardware
        self.clock = Clock()
        self.inbox: list[Envelope] = []
        self.due = inf
        """The time of its next round; infinite while none is due."""
        self.spans: list[Span] = []
        """With `record`: what the device did, and when KV was on its way to this worker."""
        self.kv: list[tuple[float, int, int]] = []
        """With `record`: (time, held, cached pages) after each round."""
        self.pool = PagePool(hardware.kv_tokens // hardware.page_tokens, make_order("expected"), caching=caching)
        self._send = send
        self._page_bytes = hardware.page_tokens * hardware.kv_bytes_per_token
        self._record = record
        self.runner = SimulatedRunner(hardware, self.clock, speak, self.spans if record else None)
        engine = Engine(
            self.runner,
            self.pool,
            page_tokens=hardware.page_tokens,
            max_num_batched_tokens=hardware.max_num_batched_tokens,
            max_num_seqs=hardware.max_num_seqs,
            max_model_len=max_model_len,
            pace=Pace(hardware.max_num_batched_tokens, stretch) if stretch else None,
            clock=self.clock,
        )
        handoffs = Handoffs(
            engine,
            self._page_bytes,
            LAYOUT,
            PATIENCE,
            self.send,
            lambda peer: SimulatedLink(hardware, self.clock, self.spans if record else None),
            self.clock,
        )
        self.worker = Worker(
            name, engine, handoffs, self, "frontend", layout=LAYOUT, vocab_size=2**31, clock=self.clock
        )

    @property
    def peer(self) -> Peer:
        pool = PoolInfo(0, -1, self.pool.num_pages, self._page_bytes, LAYOUT)
        return Peer(self.name, 1, self.name, pool, self.role)

    def round(self, now: float) -> float:
        """Run its loop once from `now` on; returns when the next round is due if no message comes before."""
        self.clock.now = now
        messages, self.inbox = self.inbox, []
        self.worker.work(messages)
        if self._record:
            self.kv.append((self.clock.now, self.pool.num_held, self.pool.num_cached))
        return self.clock.now + self.worker.rest

    def send(self, address: str, body: Message) -> None:
        self._send(self.name, address, self.clock.now, body)

    def forget(self, address: str) -> None: ...
