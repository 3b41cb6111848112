"""The worker process: messages in, engine steps, reports out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from miniserve.cluster.channels import Inbox
from miniserve.cluster.launch import WorkerSpec
from miniserve.cluster.messages import (
    Abort,
    Envelope,
    Failed,
    Fetch,
    Message,
    Peers,
    Prefill,
    PrefillRefused,
    Publish,
    Ready,
    Release,
    Report,
    Run,
    Shutdown,
    StepTime,
    TurnOutput,
    WorkerStats,
)
from miniserve.kv.hashing import root_hash
from miniserve.kv.transfer.connect import connect
from miniserve.sampling_params import ParameterError
from miniserve.worker.engine import Engine
from miniserve.worker.handoff import SIGNS_OF_LIFE, Handoffs
from miniserve.worker.sequence import Sequence

if TYPE_CHECKING:
    from miniserve.worker.build import Built  # needs torch, which the simulator does not

log = logging.getLogger("miniserve.worker")

IDLE_SECONDS = 1.0
"""How often an idle worker looks at its leases and reports."""
COPY_SECONDS = 0.001
"""How often an otherwise idle worker looks for what is about to come: pages on their way here, compiled grammars."""


class Outboxes(Protocol):
    """Where messages go; see `cluster.channels`."""

    def send(self, address: str, body: Message) -> None:
        """Send to the inbox at `address`; never blocks, may drop."""
        ...

    def forget(self, address: str) -> None:
        """Whoever was there is gone."""
        ...


class Worker:
    """Drives one engine by messages: `work` is a round of its loop. Replies go to `frontend`, handoffs to peers.

    `clock` is the host's monotonic clock, in seconds; the simulator has one of its own, and no process.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        handoffs: Handoffs,
        outboxes: Outboxes,
        frontend: str,
        *,
        layout: str,
        vocab_size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.handoffs = handoffs
        self.stopping = False
        self._name = name
        self._outboxes = outboxes
        self._frontend = frontend
        self._layout = layout
        self._vocab_size = vocab_size
        self._clock = clock
        self._early: list[Envelope] = []
        """Messages of peers we have not been told about yet."""
        self._addresses: set[str] = set()
        """The inboxes of the workers that live."""
        self._outputs: list[TurnOutput] = []
        self._steps: list[StepTime] = []
        self._busy = 0.0
        self._reported = 0.0
        self._idle = False

    @property
    def rest(self) -> float:
        """How long the next round may wait for messages, in seconds. After a step what waited may have room: only a
        round that computed nothing is followed by a rest."""
        if not self._idle:
            return 0.0
        soon = self.handoffs.copying or self.engine.compiling
        return COPY_SECONDS if soon else min(IDLE_SECONDS, self.handoffs.patience / SIGNS_OF_LIFE)

    def work(self, heard: list[Envelope]) -> None:
        """One round: what was heard, a step, and a report if there is something to tell."""
        started = self._clock()
        computed = self._round(heard)
        now = self._clock()
        self._busy += now - started
        # What was heard in idleness (a release, an abort) has changed the state, and no step will tell of it.
        if self._outputs or self.handoffs.moves or (self._idle and heard) or now - self._reported > IDLE_SECONDS:
            self._report(now)
        self._idle = not computed and not self.engine.has_work

    def _round(self, heard: list[Envelope]) -> bool:
        """Messages, admission, a step; whether it computed anything."""
        for envelope in heard:
            self._handle(envelope)
        self.handoffs.expire()
        self.handoffs.poll()
        for sequence in self.engine.admit():
            self.handoffs.request(sequence)
        step = self.engine.step()
        for prefilled in step.prefilled:
            self.handoffs.publish(prefilled.sequence, prefilled.first)
        for sequence, reason in step.refused:
            self.handoffs.refuse(sequence, reason)
        self._outputs += self.handoffs.outputs + step.outputs
        self.handoffs.outputs.clear()
        if step.time is not None:
            self._steps.append(step.time)
        return step.time is not None

    def _handle(self, envelope: Envelope) -> None:
        """One message. Those of peers count only from the incarnation that lives now."""
        body = envelope.body
        if isinstance(body, Prefill | Fetch | Publish | Release | PrefillRefused):
            if self.handoffs.epoch(envelope.sender) == envelope.epoch:
                self._handle_peer(envelope.sender, body)
            elif self.handoffs.announced(envelope.sender) < envelope.epoch:
                self._early.append(envelope)  # it was told about us before we were told about it
        elif isinstance(body, Run):
            self._start(body)
        elif isinstance(body, Abort):
            self.handoffs.abort(body.turn)
            self.engine.abort(body.turn)
        elif isinstance(body, Peers):
            self.handoffs.set_peers([peer for peer in body.peers if peer.name != self._name])
            addresses = {peer.address for peer in body.peers}
            for gone in self._addresses - addresses:
                self._outboxes.forget(gone)
            self._addresses = addresses
            # Whoever is still unknown stays early: a later announcement, already under way, tells of it.
            early, self._early = self._early, []
            for waiting in early:
                self._handle(waiting)
        elif isinstance(body, Shutdown):
            self.stopping = True
        else:
            log.error("dropped a %s: workers do not take it", type(body).__name__)

    def _handle_peer(self, sender: str, body: Prefill | Fetch | Publish | Release | PrefillRefused) -> None:
        match body:
            case Prefill():
                self.handoffs.on_prefill(body, sender)
            case Fetch():
                self.handoffs.on_fetch(body, sender)
            case Publish():
                self.handoffs.on_publish(body, sender)
            case Release():
                self.handoffs.on_release(body.turn)
            case PrefillRefused():
                self.handoffs.on_refused(body)

    def _start(self, run: Run) -> None:
        """Queue a turn. The frontend has checked it; what slipped through ends this turn and nothing else."""
        limit, vocab = self.engine.max_model_len, self._vocab_size
        error = ""
        if not 0 < len(run.tokens) < limit or not 0 <= min(run.tokens) <= max(run.tokens) < vocab:
            error = f"{len(run.tokens)} tokens do not fit {limit}, or are outside the vocabulary of {vocab}."
        try:
            run.params.validate(vocab)
        except ParameterError as wrong:
            error = wrong.message
        if error:
            self._outputs.append(Failed(run.turn, run.prior, error))
            return
        if run.prefill_at:
            self.handoffs.expect(run.turn, run.salt)
        self.engine.add(
            Sequence(
                run.turn,
                run.tokens,
                run.params,
                run.seed,
                root_hash(self._layout, run.salt),
                prior=run.prior,
                prefill_at=run.prefill_at,
                history_at=run.history_at,
                share_history=run.share_history,
                keep=run.keep,
            )
        )

    # --- reports ----------------------------------------------------------------------------------------------------

    def _report(self, now: float) -> None:
        self._outboxes.send(self._frontend, Report(self._outputs, self.handoffs.moves, self._stats(), self._steps))
        self._outputs, self.handoffs.moves, self._steps = [], [], []
        self._reported = now

    def _stats(self) -> WorkerStats:
        engine, pool, counters = self.engine, self.engine.pool, self.engine.counters
        host = engine.host
        return WorkerStats(
            total_pages=pool.num_pages,
            free_pages=pool.num_free,
            cached_pages=pool.num_cached,
            held_pages=pool.num_held,
            running=len(engine.running),
            waiting=len(engine.waiting),
            queued_prefill_tokens=engine.queued_prefill_tokens,
            leases=self.handoffs.num_leases,
            steps=counters.steps,
            preemptions=counters.preemptions,
            prompt_tokens=counters.prompt_tokens,
            generated_tokens=counters.generated_tokens,
            prefix_queries=counters.prefix_queries,
            prefix_hits=counters.prefix_hits,
            drafted_tokens=counters.drafted_tokens,
            held_tokens=counters.held_tokens,
            busy_seconds=self._busy,
            host_total=host.num_pages if host else 0,
            host_pages=host.num_used if host else 0,
            offloaded=host.offloaded if host else 0,
            restored=host.restored if host else 0,
        )


def make_worker(spec: WorkerSpec, built: Built, outboxes: Outboxes) -> Worker:
    """The worker of a process."""
    us = (spec.name, spec.epoch)
    handoffs = Handoffs(
        built.engine,
        built.memory.shape.bytes,
        built.layout,
        spec.engine.handoff_deadline,
        outboxes.send,
        lambda peer: connect(built.memory, built.layout, us, peer, spec.run_dir, spec.engine.kv_transfer),
    )
    return Worker(
        spec.name,
        built.engine,
        handoffs,
        outboxes,
        spec.frontend,
        layout=built.layout,
        vocab_size=built.model.vocab_size,
    )


def serve(spec: WorkerSpec, built: Built, inbox: Inbox, outboxes: Outboxes) -> None:
    """Say that we are ready, and serve until told to shut down."""
    worker = make_worker(spec, built, outboxes)
    outboxes.send(spec.frontend, ready(built))
    while not worker.stopping:
        worker.work(inbox.receive(int(worker.rest * 1000)))


def ready(built: Built) -> Ready:
    """What the frontend should know of a worker that is up."""
    memory = built.memory
    return Ready(
        pool=memory.info(built.layout),
        dtype=built.dtype,
        device=built.device,
        kernels=built.kernels,
        threads=built.threads,
        weights_bytes=built.weights_bytes,
        page_tokens=memory.shape.page_tokens,
        max_model_len=built.engine.max_model_len,
        vocab_size=built.model.vocab_size,
        phases=built.phases,
        kv_note=built.kv_note,
    )
