"""The worker process: messages in, engine steps, reports out."""

from __future__ import annotations

import logging
import os
import time

import zmq

from miniserve.cluster.channels import Inbox, Outboxes
from miniserve.cluster.launch import WorkerSpec
from miniserve.cluster.messages import (
    Abort,
    Envelope,
    Fetch,
    Message,
    Peers,
    PoolInfo,
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
from miniserve.kv.transfer import connect
from miniserve.sampling import ParameterError
from miniserve.worker.build import Built
from miniserve.worker.handoff import SIGNS_OF_LIFE, Handoffs
from miniserve.worker.sequence import Sequence

log = logging.getLogger("miniserve.worker")

IDLE_SECONDS = 1.0
"""How often an idle worker looks at its leases and reports."""
COPY_SECONDS = 0.001
"""How often an otherwise idle worker looks for pages that are on their way here."""


class Worker:
    """Drives one engine by the messages in `inbox`. Replies go to the frontend, handoffs to peers."""

    def __init__(self, spec: WorkerSpec, built: Built, inbox: Inbox, outboxes: Outboxes) -> None:
        self._spec = spec
        self._built = built
        self._engine = built.engine
        self._inbox = inbox
        self._outboxes = outboxes
        self._handoffs = Handoffs(
            built.engine,
            built.memory,
            built.layout,
            spec.engine.handoff_deadline,
            outboxes.send,
            lambda peer: connect(
                built.memory, built.layout, (spec.name, spec.epoch), peer, spec.run_dir, spec.engine.kv_transfer
            ),
        )
        self._early: list[Envelope] = []
        """Messages of peers we have not been told about yet."""
        self._addresses: set[str] = set()
        """The inboxes of the workers that live."""
        self._outputs: list[TurnOutput] = []
        self._steps: list[StepTime] = []
        self._busy = 0.0
        self._reported = 0.0
        self._stopping = False

    def run(self) -> None:
        """Serve until told to shut down."""
        self._tell(self._ready())
        rest = min(IDLE_SECONDS, self._spec.engine.handoff_deadline / SIGNS_OF_LIFE)
        idle = False
        while not self._stopping:
            # After a step what waited may have room: only a round that computed nothing is followed by a rest.
            wait = (COPY_SECONDS if self._handoffs.copying else rest) if idle else 0.0
            heard = self._inbox.receive(int(wait * 1000))
            started = time.monotonic()
            computed = self._round(heard)
            now = time.monotonic()
            self._busy += now - started
            # What was heard in idleness (a release, an abort) has changed the state, and no step will tell of it.
            if self._outputs or self._handoffs.moves or (idle and heard) or now - self._reported > IDLE_SECONDS:
                self._report(now)
            idle = not computed and not self._engine.has_work

    def _round(self, heard: list[Envelope]) -> bool:
        """Messages, admission, a step; whether it computed anything."""
        for envelope in heard:
            self._handle(envelope)
        self._handoffs.expire()
        self._handoffs.poll()
        for sequence in self._engine.admit():
            self._handoffs.request(sequence)
        step = self._engine.step()
        for sequence, first_token in step.prefilled:
            self._handoffs.publish(sequence, first_token)
        self._outputs += self._handoffs.outputs + step.outputs
        self._handoffs.outputs.clear()
        if step.time is not None:
            self._steps.append(step.time)
        return step.time is not None

    def _handle(self, envelope: Envelope) -> None:
        """One message. Those of peers count only from the incarnation that lives now."""
        body = envelope.body
        if isinstance(body, Prefill | Fetch | Publish | Release | PrefillRefused):
            if self._handoffs.epoch(envelope.sender) == envelope.epoch:
                self._handle_peer(envelope.sender, body)
            elif self._handoffs.announced(envelope.sender) < envelope.epoch:
                self._early.append(envelope)  # it was told about us before we were told about it
        elif isinstance(body, Run):
            self._start(body)
        elif isinstance(body, Abort):
            self._handoffs.abort(body.turn)
            self._engine.abort(body.turn)
        elif isinstance(body, Peers):
            self._handoffs.set_peers([peer for peer in body.peers if peer.name != self._spec.name])
            addresses = {peer.address for peer in body.peers}
            for gone in self._addresses - addresses:
                self._outboxes.forget(gone)
            self._addresses = addresses
            # Whoever is still unknown stays early: a later announcement, already under way, tells of it.
            early, self._early = self._early, []
            for waiting in early:
                self._handle(waiting)
        elif isinstance(body, Shutdown):
            self._stopping = True
        else:
            log.error("dropped a %s: workers do not take it", type(body).__name__)

    def _handle_peer(self, sender: str, body: Prefill | Fetch | Publish | Release | PrefillRefused) -> None:
        match body:
            case Prefill():
                self._handoffs.on_prefill(body, sender)
            case Fetch():
                self._handoffs.on_fetch(body, sender)
            case Publish():
                self._handoffs.on_publish(body, sender)
            case Release():
                self._handoffs.on_release(body.turn)
            case PrefillRefused():
                self._handoffs.on_refused(body)

    def _start(self, run: Run) -> None:
        """Queue a turn. The frontend has checked it; what slipped through ends this turn and nothing else."""
        limit, vocab = self._engine.max_model_len, self._built.model.vocab_size
        error = ""
        if not 0 < len(run.tokens) < limit or not 0 <= min(run.tokens) <= max(run.tokens) < vocab:
            error = f"{len(run.tokens)} tokens do not fit {limit}, or are outside the vocabulary of {vocab}."
        try:
            run.params.validate(vocab)
        except ParameterError as wrong:
            error = wrong.message
        if error:
            self._outputs.append(TurnOutput(run.turn, run.prior, [], finish="error", error=error))
            return
        if run.prefill_at:
            self._handoffs.expect(run.turn, run.salt)
        self._engine.add(
            Sequence(
                run.turn,
                run.tokens,
                run.params,
                run.seed,
                root_hash(self._built.layout, run.salt),
                prior=run.prior,
                prefill_at=run.prefill_at,
                history_at=run.history_at,
                share_history=run.share_history,
                keep=run.keep,
            )
        )

    # --- reports ----------------------------------------------------------------------------------------------------

    def _tell(self, body: Message) -> None:
        self._outboxes.send(self._spec.frontend, body)

    def _ready(self) -> Ready:
        built, memory = self._built, self._built.memory
        return Ready(
            pool=PoolInfo(
                pid=os.getpid(),
                fd=memory.shared.fd if memory.shared else -1,
                num_pages=memory.num_pages,
                page_bytes=memory.shape.bytes,
                layout=built.layout,
            ),
            dtype=built.dtype,
            device=built.device,
            kernels=built.kernels,
            threads=built.threads,
            weights_bytes=built.weights_bytes,
            page_tokens=memory.shape.page_tokens,
            max_model_len=self._engine.max_model_len,
            vocab_size=built.model.vocab_size,
            phases=built.phases,
            kv_note=built.kv_note,
        )

    def _report(self, now: float) -> None:
        self._tell(Report(self._outputs, self._handoffs.moves, self._stats(), self._steps))
        self._outputs, self._handoffs.moves, self._steps = [], [], []
        self._reported = now

    def _stats(self) -> WorkerStats:
        engine, pool, counters = self._engine, self._engine.pool, self._engine.counters
        host = engine.host
        return WorkerStats(
            total_pages=pool.num_pages,
            free_pages=pool.num_free,
            cached_pages=pool.num_cached,
            held_pages=pool.num_held,
            running=len(engine.running),
            waiting=len(engine.waiting),
            queued_prefill_tokens=engine.queued_prefill_tokens,
            leases=self._handoffs.num_leases,
            steps=counters.steps,
            preemptions=counters.preemptions,
            prompt_tokens=counters.prompt_tokens,
            generated_tokens=counters.generated_tokens,
            prefix_queries=counters.prefix_queries,
            prefix_hits=counters.prefix_hits,
            busy_seconds=self._busy,
            host_total=host.num_pages if host else 0,
            host_pages=host.num_used if host else 0,
            offloaded=host.offloaded if host else 0,
            restored=host.restored if host else 0,
        )


def serve(spec: WorkerSpec, built: Built, context: zmq.Context, outboxes: Outboxes) -> None:
    """Bind the inbox and serve until shut down."""
    inbox = Inbox(context, spec.address)
    try:
        Worker(spec, built, inbox, outboxes).run()
    finally:
        inbox.close()
