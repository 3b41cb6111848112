"""The worker process: messages in, engine steps, reports out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Protocol

import msgspec

from miniserve.cluster import messages, rank_messages
from miniserve.cluster.channels import Inbox, Outboxes
from miniserve.cluster.launch import WorkerSpec
from miniserve.kv.transfer.door import Door
from miniserve.kv.transfer.interface import Transfer, connect
from miniserve.sampling_params import ParameterError
from miniserve.worker.engine import Engine
from miniserve.worker.handoff import Handoffs
from miniserve.worker.ranks import IDLE_SECONDS, SOON_SECONDS, EveryTransfer, Ranks, open_pool
from miniserve.worker.sender import SIGNS_OF_LIFE
from miniserve.worker.sequence import Sequence

if TYPE_CHECKING:
    from miniserve.worker.build import Built  # needs torch, which the simulator does not

log = logging.getLogger("miniserve.worker")


class MessageSink(Protocol):
    """Where a worker's messages go: ZeroMQ (`cluster/channels.py`), or the simulator."""

    def send(self, address: str, body: messages.Message) -> None:
        """Send to the inbox at `address`; never blocks, may drop."""

    def forget(self, address: str) -> None:
        """The owner of that inbox is gone."""


@dataclass(eq=False)
class Worker:
    """Drives one engine by messages: `work` is a round of its loop. Replies go to `frontend`, handoffs to peers.
    `ranks` are the worker's further processes. `clock` is the host's monotonic clock, in seconds; the simulator has one
    of its own, and no process."""

    name: str
    engine: Engine
    handoffs: Handoffs
    outboxes: MessageSink
    frontend: str
    _: KW_ONLY
    layout: str
    vocab_size: int
    host: str = ""
    ranks: Ranks | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.stopping = False
        self._early: list[messages.Envelope] = []  # messages of peers that have not been announced yet
        self._addresses: set[str] = set()  # the inboxes of the workers that live
        self._outputs: list[messages.TurnOutput] = []
        self._stopped: list[str] = []
        self._steps: list[messages.StepTime] = []
        self._busy = 0.0
        self._reported = 0.0
        self._idle = False

    @property
    def rest(self) -> float:
        """How long the next round may wait for messages, in seconds: not after a step, which may have made room."""
        if not self._idle:
            return 0.0
        soon = self.handoffs.receiver.copying or self.engine.expecting
        return SOON_SECONDS if soon else min(IDLE_SECONDS, self.handoffs.patience / SIGNS_OF_LIFE)

    def work(self, heard: list[messages.Envelope]) -> None:
        """One round: handle the messages `heard`, admit, step, and report if there is something to report."""
        started = self.clock()
        for envelope in heard:
            self._handle(envelope)
        self._admit()
        computed = self._step()
        now = self.clock()
        self._busy += now - started
        # A message to an idle worker (a release, an abort) has changed its state, and no step will report that.
        news = self._outputs or self.handoffs.receiver.moves
        if news or (self._idle and heard) or now - self._reported > IDLE_SECONDS:
            self._report(now)
        self._idle = not computed and not self.engine.has_work

    def _admit(self) -> None:
        """Let handoffs go on, and give pages to turns that wait for them."""
        self.handoffs.sender.expire()
        self.handoffs.receiver.poll()
        for sequence in self.engine.admit():
            self.handoffs.receiver.request(sequence)

    def _step(self) -> bool:
        """Run a step of the engine and collect what is to be reported; whether it computed anything."""
        step = self.engine.step()
        for sequence, first in step.prefilled:
            self.handoffs.sender.publish(sequence, first)
        for sequence, reason in step.refused:
            self.handoffs.sender.refuse(sequence, reason)
        self._outputs += self.handoffs.receiver.outputs + step.outputs
        self.handoffs.receiver.outputs.clear()
        if step.time is not None:
            self._steps.append(step.time)
        return step.time is not None

    def _handle(self, envelope: messages.Envelope) -> None:
        """Act on one message. Those of peers count only from the incarnation that lives now."""
        match envelope.body:
            case body if isinstance(body, messages.PeerMessage):  # first, since a `Prefill` is a `Run` too
                if self.handoffs.peers.lives(envelope.sender, envelope.epoch):
                    self.handoffs.handle(envelope.sender, body)
                elif self.handoffs.peers.is_early(envelope.sender, envelope.epoch):
                    self._early.append(envelope)  # this worker was announced to the peer before the peer to this one
            case messages.Run() as run:
                self._start(run)
            case messages.Abort(turn):
                self.handoffs.receiver.abort(turn)
                self.engine.abort(turn)
                self._stopped.append(turn)
            case messages.Peers(peers):
                self._meet(peers)
            case rank_messages.Stored() as stored if self.ranks is not None:
                self.ranks.heard(stored)
            case messages.Shutdown():
                self.stopping = True
            case other:
                log.error("dropped a %s: workers do not take it", type(other).__name__)

    def _meet(self, peers: list[messages.Peer]) -> None:
        peers = [msgspec.structs.replace(p, address=p.far) if p.far and p.pool.host != self.host else p for p in peers]
        others = [peer for peer in peers if peer.name != self.name]
        if self.ranks is not None:
            self.ranks.tell(messages.Peers(others))
        self.handoffs.set_peers(others)
        addresses = {peer.address for peer in peers}
        for gone in self._addresses - addresses:
            self.outboxes.forget(gone)
        self._addresses = addresses
        # Those of peers that are still unknown stay early: a later announcement of them is already under way.
        early, self._early = self._early, []
        for waiting in early:
            self._handle(waiting)

    def cut_off(self, addresses: set[str]) -> None:
        """The connections to these inboxes broke, and what was on its way is lost. Without the frontend it is over:
        what took this worker for dead has begun its turns elsewhere."""
        if self.frontend in addresses:
            log.error("the frontend cannot be reached any more")
            self.stopping = True
        self.handoffs.receiver.give_up_the_dead(addresses)

    def _start(self, run: messages.Run) -> None:
        """Queue a turn. The frontend has checked it; what slipped through ends this turn and nothing else."""
        limit, vocab, count = self.engine.max_model_len, self.vocab_size, len(run.tokens)
        try:
            run.params.validate(vocab)
            if not 0 < count < limit or not 0 <= min(run.tokens) <= max(run.tokens) < vocab:
                what = f"{count} tokens do not fit {limit}, or are outside the vocabulary of {vocab}."
                raise ParameterError("prompt", what)
            self.engine.add(Sequence.of(run, self.layout))
        except ParameterError as error:
            self._outputs.append(messages.Failed(run.turn, run.prior, error.message))

    def _report(self, now: float) -> None:
        moves, self.handoffs.receiver.moves = self.handoffs.receiver.moves, []
        report = messages.Report(self._outputs, moves, self._stats(), self._steps, self._stopped)
        self.outboxes.send(self.frontend, report)
        self._outputs, self._steps, self._stopped = [], [], []
        self._reported = now

    def _stats(self) -> messages.WorkerStats:
        engine, pool, host, disk = self.engine, self.engine.pool, self.engine.host, self.engine.disk
        kept = engine.snapshots
        return messages.WorkerStats(
            total_pages=pool.num_pages,
            free_pages=pool.num_free,
            cached_pages=pool.num_cached,
            held_pages=pool.num_held,
            running=len(engine.running),
            waiting=len(engine.waiting),
            queued_prefill_tokens=engine.queued_prefill_tokens,
            leases=len(self.handoffs.sender.leases),
            **msgspec.structs.asdict(engine.counters),
            busy_seconds=self._busy,
            host_total=host.num_pages if host else 0,
            host_pages=host.num_used if host else 0,
            offloaded=host.offloaded if host else 0,
            restored=host.restored if host else 0,
            saved=disk.saved if disk else 0,
            loaded=disk.loaded if disk else 0,
            snapshots=pool.snapshot_pages // kept.slots.pages if kept else 0,
            snapshots_saved=kept.saved if kept else 0,
            snapshots_used=kept.used if kept else 0,
        )


def make_worker(
    spec: WorkerSpec, built: Built, pool: messages.PoolInfo, door: Door, outboxes: MessageSink, ranks: Ranks
) -> Worker:
    def send(address: str, message: messages.Message) -> None:
        if ranks.pools and isinstance(message, messages.Publish) and (message.pages or message.state):
            ranks.tell(rank_messages.Settle())
            built.runner.settle()  # peers may read the pages when all that was begun so far is done on all ranks
        outboxes.send(address, message)

    def way(peer: messages.Peer) -> Transfer | None:
        own = connect(built.memory, pool, door, peer, spec.engine.kv_transfer)
        return EveryTransfer(ranks, own, peer.name) if own is not None and ranks.pools else own

    page_bytes = built.memory.shape.bytes * spec.engine.tensor_parallel_size
    handoffs = Handoffs(built.engine, page_bytes, built.layout, spec.engine.handoff_deadline, send, way)
    vocab = built.model.vocab_size
    same = spec.name, built.engine, handoffs, outboxes, spec.frontend
    return Worker(*same, layout=built.layout, vocab_size=vocab, host=spec.host, ranks=ranks)


def serve(spec: WorkerSpec, built: Built, inbox: Inbox, outboxes: Outboxes, ranks: Ranks) -> None:
    """Report that the worker is ready, and serve until a `Shutdown` comes."""
    door, pool = open_pool(spec, built)
    worker = make_worker(spec, built, pool, door, outboxes, ranks)
    pool = msgspec.structs.replace(pool, others=ranks.pools)
    facts = msgspec.structs.asdict(built.facts)
    outboxes.send(spec.frontend, messages.Ready(**facts, pool=pool, far=inbox.far))
    built.grammars.prepare()  # not before: it would hold up the start, and the first turn seldom has one
    while not worker.stopping:
        worker.work(inbox.receive(int(worker.rest * 1000)))
        if broken := outboxes.broken():
            worker.cut_off(broken)
    door.close()
