"""The engine: continuous batching over paged KV. No wires here; the worker process and `LLM` both drive it.

Each step runs one batch: a token for every decoding sequence, then pieces of prompts as far as the token budget goes,
so that a long prompt never stalls the sequences that are decoding, nor for long the short prompts behind it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from typing import TYPE_CHECKING

import msgspec

from miniserve.cluster.messages import Counters, Ended, Failed, FirstToken, Keep, StepTime, Tokens, TurnOutput
from miniserve.kv.disk import Disk
from miniserve.kv.host import HostPool
from miniserve.kv.pages import PagePool
from miniserve.worker.admission import Admissions
from miniserve.worker.batching import Batching, Pace
from miniserve.worker.drafts import Drafter
from miniserve.worker.sequence import Admission, Sequence, State
from miniserve.worker.snapshots import Snapshots
from miniserve.worker.step import InFlight, Runner, Sampled, StepResult, Work, step_time

if TYPE_CHECKING:
    from miniserve.worker.grammar import Grammars  # needs llguidance, which the simulator does not


@dataclass(eq=False)
class Engine:
    """Owns the sequences and the page pool of one worker; `runner` owns the model and the bytes of the pool. `host`, if
    any, keeps what `pool` evicts, and `disk` what turns leave; `snapshots` has the recurrent state of a model that has
    one; `grammars` compiles those of turns that have one.

    Use it as `add`, then `admit` and `step` in turns while there is work. Every sequence in `running` holds pages for
    all the tokens it was admitted with, so a prefill never runs out in the middle.

    With `overlap` a step is launched before the one before it has ended, so that the device never waits for the host:
    what that one samples stays on the device and is not known here yet. A sequence that it turns out to end is in one
    step too many, whose token is dropped. That step may still write to the sequence's last page when the page is free
    again. That is harmless: the next owner of the page computes after it on the same device, and what comes from
    elsewhere (another worker's KV) is stored in a later round at the earliest, when that step has ended.

    A step in which sequences draft has at most `draft_rows` rows; 0: none drafts.
    """

    runner: Runner
    pool: PagePool
    _: KW_ONLY
    page_tokens: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    host: HostPool | None = None
    disk: Disk | None = None
    snapshots: Snapshots | None = None
    grammars: Grammars | None = None
    pace: Pace | None = None
    overlap: bool = False
    draft_rows: int = 0
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.counters = Counters()
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """Admitted sequences, oldest first, those that receive their KV included."""
        self._refused: list[tuple[Sequence, str]] = []
        """Sequences whose grammar cannot be followed, since the last step, and why."""
        self._in_flight: InFlight | None = None
        self._ended = 0.0  # when the last step ended
        self.watermark = max(1, self.pool.num_pages // 100)
        """Pages that are kept back for running sequences to grow into."""
        self._admissions = Admissions(self.pool, self.host, self.disk, self.snapshots, self.page_tokens, self.watermark)
        same = {field.name: getattr(self, field.name) for field in fields(Batching) if field.name != "preempt"}
        self._batching = Batching(**same, preempt=self._preempt)
        self._turns: dict[str, Sequence] = {}

    @property
    def has_work(self) -> bool:
        """Whether a step would bring something. What only waits, waits for a message or for pages."""
        return self._in_flight is not None or any(s.state is State.RUNNING for s in self.running)

    @property
    def expecting(self) -> bool:
        """Whether a grammar is being compiled, or a disk is at work: `admit` should look again soon."""
        return (self.disk is not None and self.disk.busy) or any(s.state is State.COMPILING for s in self.waiting)

    @property
    def queued_prefill_tokens(self) -> int:
        """Prompt tokens this worker still has to compute."""
        ours = [s for s in (*self.waiting, *self.running) if s.prefill_at is None]
        return sum(s.to_launch for s in ours if s.to_launch > 1)

    def add(self, sequence: Sequence) -> None:
        """Queue a turn. Its prompt must be shorter than `max_model_len`; a turn that is here already is ignored."""
        assert 0 < len(sequence.tokens) < self.max_model_len
        if sequence.turn in self._turns:
            return
        self._turns[sequence.turn] = sequence
        self.waiting.append(sequence)
        if self.draft_rows and not (sequence.prefill_for or sequence.params.penalized or sequence.params.grammar):
            sequence.drafter = Drafter(self.draft_rows)
        if sequence.params.grammar is not None and self.grammars is not None:
            sequence.move(State.COMPILING)
            sequence.compiling = self.grammars.start(sequence.params.grammar, sequence.outputs)

    def find(self, turn: str) -> Sequence | None:
        """The unfinished sequence of a turn."""
        return self._turns.get(turn)

    def abort(self, turn: str) -> None:
        """Drop a turn, if it is here, and free its pages at once."""
        if sequence := self._turns.get(turn):
            self.finish(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out and give its pages back."""
        if self._turns.pop(sequence.turn, None) is None:
            return
        if sequence.compiling is not None:
            sequence.compiling.cancel()
        if sequence.state in (State.COMPILING, State.WAITING):
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
        if self.disk is not None and sequence.prefill_for is None:
            self.disk.leave(sequence.hashes(self.page_tokens)[: sequence.registered], sequence.keep, self.clock())
        self.unpublish(sequence)

    def history(self, hashes: list[bytes]) -> list[int]:
        """The pages, held, of what is here of the chain `hashes`, in the pool or in host memory."""
        return self._admissions.history(hashes, self.clock())

    def publish(self, sequence: Sequence) -> None:
        """A sequence has been prefilled for another worker: its pages stay held until `unpublish`."""
        del self._turns[sequence.turn]
        self.running.remove(sequence)
        sequence.move(State.PUBLISHED)
        if self.snapshots is not None:
            self.snapshots.leave(sequence)

    def unpublish(self, sequence: Sequence) -> None:
        """It is over, and the pages become ordinary prefix cache: the other worker has them, or does not want them."""
        sequence.move(State.FINISHED)
        self._give_back(sequence, sequence.keep)

    def _give_back(self, sequence: Sequence, keep: Keep) -> None:
        """Its pages become prefix cache, of a conversation of which `keep` is known."""
        now = self.clock()
        if self.snapshots is not None:
            self.snapshots.end(sequence, keep, now)
        self.pool.release(sequence.pages, keep, now)
        sequence.pages = []

    def reset(self) -> None:
        """Forget the prefix cache and the counters. Only while no sequence is here."""
        assert not self._turns
        assert self._in_flight is None
        self.pool.clear()
        if self.host is not None:
            self.host.clear()
        if self.snapshots is not None:
            self.snapshots.saved = self.snapshots.used = 0
        self.counters = Counters()

    def admit(self) -> list[Sequence]:
        """Give pages to waiting sequences in their order, as many as fit. One that waits for its grammar, for pages
        from disk, or for a page that is just being computed, lets the others pass. Returns those whose KV comes from
        another worker: all their pages are reserved now."""
        if self.disk is not None:
            self.disk.poll(self.clock())
        passed: list[Sequence] = []
        receiving: list[Sequence] = []
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            admission = self.try_admit(sequence)
            if admission is Admission.NO_PAGES:
                break
            if admission is Admission.ADMITTED and sequence.state is not State.RUNNING:
                receiving.append(sequence)
            elif admission in (Admission.COMPILING, Admission.LOADING, Admission.SHARED):
                passed.append(self.waiting.popleft())
        self.waiting.extendleft(reversed(passed))
        return receiving

    def try_admit(self, sequence: Sequence) -> Admission:
        """Give `sequence`, the first that waits, its pages, once its grammar is compiled."""
        if sequence.compiling is not None:
            if not sequence.compiling.done():
                return Admission.COMPILING
            if error := sequence.compiling.exception():
                self._refuse(sequence, str(error))
                return Admission.REFUSED
            sequence.matcher, sequence.compiling = sequence.compiling.result(), None
            sequence.move(State.WAITING)
        admission = self._admissions.try_admit(sequence, self.running, self.counters, self.clock())
        if admission is Admission.ADMITTED:
            self.running.append(self.waiting.popleft())
        return admission

    def _refuse(self, sequence: Sequence, reason: str) -> None:
        self.finish(sequence)
        self._refused.append((sequence, f"The grammar that the output has to match cannot be followed: {reason}"))

    def _preempt(self, sequence: Sequence) -> None:
        """Give up the KV; it is recomputed, or found in the prefix cache, when there is room again."""
        self.counters.preemptions += 1
        self.running.remove(sequence)
        self._give_back(sequence, sequence.needed_soon)
        sequence.computed = sequence.under_way = sequence.registered = 0
        sequence.move(State.WAITING)
        self.waiting.appendleft(sequence)

    def step(self) -> StepResult:
        """Run one batch; an empty result if there is nothing to compute. With `overlap` that launches a batch and
        brings what the one before it has sampled."""
        in_flight = self._launch()
        if self.overlap:
            in_flight, self._in_flight = self._in_flight, in_flight
        result = self._collect(in_flight) if in_flight is not None else StepResult()
        for sequence, reason in self._refused:
            if sequence.prefill_for is None:
                result.outputs.append(Failed(sequence.turn, sequence.num_outputs, reason, invalid=True))
            else:
                result.refused.append((sequence, reason))
        self._refused.clear()
        return result

    def _launch(self) -> InFlight | None:
        """Begin the next batch, if there is anything to compute."""
        batch = self._batching.compose(self.running, self.clock())
        if not batch:
            return None
        timed, started = step_time(batch), self.clock()
        self.counters.steps += 1
        self.counters.prompt_tokens += timed.prefill
        launched = self.runner.launch(batch)
        for work in batch:
            work.sequence.under_way += work.count
            work.sequence.sampling = work.samples
            if self.snapshots is not None:
                self.snapshots.launched(work, started)
        return InFlight(batch, timed, started, launched)

    def _collect(self, step: InFlight) -> StepResult:
        """Wait for a batch, and take in what it computed and sampled for each sequence."""
        sampled = step.launched()
        now = self.clock()
        # The device began with it when the step before had ended.
        timed, self._ended = self._timed(step.time, now - max(step.started, self._ended)), now
        if self.pace is not None:
            self.pace.observe(timed)
        result = StepResult(time=timed)
        first_score, first_row = 0, sum(work.scored for work in step.batch)
        for work in step.batch:
            scores = sampled[first_score : first_score + work.scored]
            found = sampled[first_row : first_row + work.num_sampled]
            first_score, first_row = first_score + work.scored, first_row + work.num_sampled
            if scores:  # what a preemption made a step compute again takes the place of what was there
                work.sequence.scores[work.start : work.start + work.scored] = [score for _, score in scores if score]
            if work.sequence.state is State.FINISHED:
                continue
            self._computed(work)
            kept = self._keep_draft(work, found)
            if work.samples:
                self._sampled(work.sequence, kept, now, result)
            elif work.sequence.prefill_for is not None:
                result.prefilled.append((work.sequence, None))
        return result

    def _timed(self, step: StepTime, seconds: float) -> StepTime:
        """What is observed of a step that took so long."""
        return msgspec.structs.replace(step, seconds=seconds)

    def _computed(self, work: Work) -> None:
        """The KV of the work's tokens is there, unless the sequence was preempted since: then only tokens are left."""
        sequence = work.sequence
        if sequence.state is State.RUNNING:
            sequence.under_way -= work.count
            sequence.computed += work.count
            self.register(sequence)
        if work.samples:
            # If its next step is launched already, that one samples too, and its token is not known yet.
            sequence.sampling = sequence.under_way > 0

    def _keep_draft(self, work: Work, found: Sampled) -> Sampled:
        """What was sampled up to the first token that differs from the draft: later ones follow a wrong guess."""
        if not work.draft:
            return found
        held = next((i for i, token in enumerate(work.draft) if found[i][0] != token), len(work.draft))
        assert work.sequence.drafter is not None
        work.sequence.drafter.observe(len(work.draft), held)
        self.counters.drafted_tokens += len(work.draft)
        self.counters.held_tokens += held
        return found[: held + 1]

    def _sampled(self, sequence: Sequence, found: Sampled, now: float, result: StepResult) -> None:
        """Append the tokens that a step `found`, as far as the turn goes, and report them in `result`."""
        if sequence.matcher is not None and sequence.matcher.error:
            self._refuse(sequence, sequence.matcher.error)
            return
        index, before = sequence.num_outputs, len(sequence.tokens)
        scored = sequence.scores if sequence.scoring else None
        sequence.extend([token for token, _ in found], self.runner.eos, self.max_model_len)
        tokens = sequence.tokens[before:]
        self.counters.generated_tokens += len(tokens)
        if sequence.state is State.RUNNING:
            sequence.computed += len(tokens) - 1  # the drafted ones: their KV is there
            sequence.register(self.pool, self.page_tokens)
        logprobs = [logprob for _, logprob in found[: len(tokens)] if logprob is not None] or None
        if index == sequence.prior:
            seconds = now - sequence.admitted
            first = FirstToken(sequence.turn, index, tokens, sequence.cached or 0, seconds, logprobs, scored)
            result.outputs += first_outputs(sequence, first)
            if sequence.prefill_for is not None:
                result.prefilled.append((sequence, first))
        elif sequence.finish is not None:
            result.outputs.append(Ended(sequence.turn, index, tokens, sequence.finish, sequence.stop_token, logprobs))
        else:
            result.outputs.append(Tokens(sequence.turn, index, tokens, logprobs))
        if sequence.finish is not None and sequence.prefill_for is None:
            self.finish(sequence)

    def register(self, sequence: Sequence) -> None:
        """Make known what is computed of it, or came from elsewhere."""
        sequence.register(self.pool, self.page_tokens)
        if self.snapshots is not None:
            self.snapshots.register(sequence, self.clock())

    def handed(self, sequence: Sequence) -> int:
        """How many of its given tokens a prefiller hands over."""
        return sequence.given if self.snapshots is None else self.snapshots.handed(sequence)

    def commit(self, sequence: Sequence, first: FirstToken) -> list[TurnOutput]:
        """Go on from the first token that a prefiller sampled; what to report of it."""
        sequence.extend(first.tokens, self.runner.eos, self.max_model_len)
        return first_outputs(sequence, first)

    def resume(self, sequence: Sequence) -> None:
        """Compute here what a sequence still lacks of KV from elsewhere."""
        if sequence.state not in (State.FETCHING, State.RECEIVING):
            return
        sequence.move(State.RUNNING)
        sequence.prefill_at = sequence.history_at = None
        if sequence.prefill_for is None:
            self.pool.release(sequence.arriving, Keep(), self.clock())
            sequence.arriving = []
        short = sequence.missing > 1 and len(sequence.pages) * self.page_tokens < len(sequence.tokens)
        if short or sequence.computed > sequence.findable:
            # It has its first token but not all of its KV, or KV but no scores: more than planned is to be computed.
            self._preempt(sequence)


def first_outputs(sequence: Sequence, first: FirstToken) -> list[TurnOutput]:
    """What is reported of a turn's first tokens, which may be its last ones as well."""
    if sequence.finish is None:
        return [first]
    ended = Ended(first.turn, first.index, first.tokens, sequence.finish, sequence.stop_token, first.logprobs)
    return [msgspec.structs.replace(first, tokens=[], logprobs=None), ended]
