"""A worker without a device: the engine, the page pool, the handoffs and the loop of a real one, on a virtual clock.

Only two things are replaced. Instead of the model, `SimulatedRunner` lets the time of a step pass and knows what the
turn will say. Instead of bytes, `SimulatedLink` lets the time of a copy pass.
"""

from __future__ import annotations

from collections.abc import Callable

from miniserve.bench.simulate.hardware import Hardware
from miniserve.cluster.messages import Envelope, Message, Peer, PoolInfo
from miniserve.kv.eviction import OrderName, make_order
from miniserve.kv.pages import PagePool
from miniserve.worker.engine import Engine
from miniserve.worker.handoff import Handoffs
from miniserve.worker.pace import Pace
from miniserve.worker.process import Worker
from miniserve.worker.sequence import Sequence
from miniserve.worker.step import Done, Work

LAYOUT = "simulated"
VOCAB = 2**31
PATIENCE = 30.0
"""Seconds of a handoff's lease, as `serve` has them by default."""

Send = Callable[[str, str, float, Message], None]
"""Sender, receiver, the time of sending, message."""
Span = tuple[float, float, str]
"""Start, end, and what it was: prefill, decode, mixed or transfer."""


class Clock:
    """A worker's own time: where it stands in what it is doing."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SimulatedRunner:
    """Takes as long as the hardware would. `speak` tells the next token of a sequence that is complete. `spans` gets
    (start, end, kind) of each step, if there is such a list."""

    eos: frozenset[int] = frozenset()

    def __init__(
        self, hardware: Hardware, clock: Clock, speak: Callable[[Sequence], int], spans: list[Span] | None
    ) -> None:
        self.busy = 0.0
        """Seconds in which the device computed."""
        self._hardware = hardware
        self._clock = clock
        self._speak = speak
        self._spans = spans

    def launch(self, batch: list[Work]) -> Done:
        """See `worker.engine.Runner`."""
        started = self._clock.now
        seconds = self._hardware.batch_seconds(batch)
        self._clock.now += seconds
        self.busy += seconds
        if self._spans is not None:
            prompts = sum(not work.is_decode for work in batch)
            kind = "decode" if not prompts else "prefill" if prompts == len(batch) else "mixed"
            self._spans.append((started, self._clock.now, kind))
        return Done([(self._speak(work.sequence), None) for work in batch if work.samples])


class SimulatedCopy:
    """See `kv.transfer.Copy`: pages that are here `seconds` after `begin`. The copy runs beside both workers' steps."""

    stored = True

    def __init__(self, begin: float, seconds: float, clock: Clock) -> None:
        self.seconds = seconds
        self.at = begin + seconds
        self._clock = clock

    @property
    def ready(self) -> bool:
        """Whether they have come."""
        return self._clock.now >= self.at

    def store(self, ours: list[int]) -> None:
        """See `kv.transfer.Copy`."""

    def abandon(self) -> None:
        """See `kv.transfer.Copy`."""


class SimulatedLink:
    """See `kv.transfer.Transfer`. One copy after the other on the way from a peer."""

    name = "simulated"

    def __init__(self, hardware: Hardware, clock: Clock, spans: list[Span] | None) -> None:
        self._hardware = hardware
        self._clock = clock
        self._spans = spans
        self._free = 0.0

    def offer(self, pages: list[int]) -> tuple[int, int]:
        """See `kv.transfer.Transfer`."""
        return (0, 0)

    def fetch(self, ticket: tuple[int, int], pages: list[int]) -> SimulatedCopy:
        """See `kv.transfer.Transfer`."""
        begin = max(self._free, self._clock.now)
        copy = SimulatedCopy(begin, self._hardware.transfer_seconds(len(pages)), self._clock)
        self._free = copy.at
        if self._spans is not None:
            self._spans.append((begin, copy.at, "transfer"))
        return copy

    def close(self) -> None:
        """See `kv.transfer.Transfer`."""


class SimulatedWorker:
    """`name` of the cluster, with its inbox. `round` is what happens when its turn has come."""

    def __init__(
        self,
        name: str,
        hardware: Hardware,
        speak: Callable[[Sequence], int],
        send: Send,
        *,
        max_model_len: int,
        order: OrderName = "expected",
        stretch: float = 0.0,
        caching: bool = True,
        record: bool = False,
    ) -> None:
        self.name = name
        self.hardware = hardware
        self.clock = Clock()
        self.inbox: list[Envelope] = []
        self.due = -1.0
        """When its next round is due; the latest word counts."""
        self.spans: list[Span] | None = [] if record else None
        self.copies: list[Span] = []
        """With `record`: when KV was on its way here."""
        self.kv: list[tuple[float, int, int]] = []
        """With `record`: (time, held, cached pages) after each round."""
        self.pool = PagePool(hardware.kv_tokens // hardware.page_tokens, make_order(order), caching=caching)
        self._send = send
        self.runner = SimulatedRunner(hardware, self.clock, speak, self.spans)
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
            hardware.page_tokens * hardware.kv_bytes_per_token,
            LAYOUT,
            PATIENCE,
            self.send,
            lambda peer: SimulatedLink(hardware, self.clock, self.copies if record else None),
            self.clock,
        )
        self.worker = Worker(
            name, engine, handoffs, self, "frontend", layout=LAYOUT, vocab_size=VOCAB, clock=self.clock
        )

    @property
    def peer(self) -> Peer:
        """It, as others see it."""
        page_bytes = self.hardware.page_tokens * self.hardware.kv_bytes_per_token
        return Peer(self.name, 1, self.name, PoolInfo(0, -1, self.pool.num_pages, page_bytes, LAYOUT))

    def round(self, now: float) -> float:
        """One round of its loop from `now` on; when the next one is due if nobody calls before."""
        self.clock.now = now
        heard, self.inbox = self.inbox, []
        self.worker.work(heard)
        if self.spans is not None:
            self.kv.append((self.clock.now, self.pool.num_held, self.pool.num_cached))
        return self.clock.now + self.worker.rest

    def send(self, address: str, body: Message) -> None:
        """See `worker.process.Outboxes`."""
        self._send(self.name, address, self.clock.now, body)

    def forget(self, address: str) -> None:
        """See `worker.process.Outboxes`."""
