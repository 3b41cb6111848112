"""The engine: continuous batching over paged KV. No wires here; the worker process and `LLM` both drive it.

Each step runs one batch: a token for every decoding sequence, then pieces of prompts as far as the token budget goes,
so that a long prompt never stalls the sequences that are decoding, nor for long the short prompts behind it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import msgspec

from miniserve.cluster.messages import Keep, StepTime, TokenLogprob, TurnOutput
from miniserve.kv.pages import OutOfPages, PagePool
from miniserve.worker.drafts import ROWS, Drafter
from miniserve.worker.pace import Pace
from miniserve.worker.sequence import Sequence, Status

if TYPE_CHECKING:
    # They need torch or llguidance, which the simulator does not.
    from miniserve.kv.host import HostPool
    from miniserve.worker.grammar import Grammars


Sampled = tuple[list[int], list[TokenLogprob | None]]
"""A token, and perhaps its log-probability, for each sequence of a step that is complete with it, and then one for each
token of its draft: what comes after it, if it holds."""


class Launched(Protocol):
    """A step that the device works on."""

    def wait(self) -> Sampled:
        """What was sampled, in the order of the step's work, once it is done."""
        ...


class Runner(Protocol):
    """Who computes: the model (`worker/runner.py`), or the simulator."""

    eos: frozenset[int]
    """Tokens that end a turn."""

    def launch(self, work: list[tuple[Sequence, int]]) -> Launched:
        """Begin to compute the next `count` tokens of each (sequence, count), from where those that are under way end,
        and to sample for each sequence that is complete with this, and after each token of its draft. A token that is
        still being sampled comes from the step launched before."""
        ...


@dataclass(frozen=True)
class Known:
    """See `Launched`: the step of a runner that is done as soon as it is launched."""

    sampled: Sampled

    def wait(self) -> Sampled:
        """See `Launched`."""
        return self.sampled


@dataclass(frozen=True)
class Flight:
    """A step under way: (sequence, tokens, whether it samples, draft) of each sequence in it."""

    work: list[tuple[Sequence, int, bool, list[int]]]
    time: StepTime
    started: float
    launched: Launched


@dataclass
class Counters:
    """What the engine has done since it started; only grows."""

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    held_tokens: int = 0
    """Of those drafted."""
    prefix_queries: int = 0
    prefix_hits: int = 0


@dataclass
class Step:
    """What a step brought."""

    outputs: list[TurnOutput] = field(default_factory=list)
    prefilled: list[tuple[Sequence, TurnOutput | None]] = field(default_factory=list)
    """Sequences prefilled for another worker that this step advanced, each with its first token once it has one (then
    among `outputs` too)."""
    time: StepTime | None = None
    """What was computed and how long it took, None for nothing."""


class Engine:
    """Owns the sequences and the page pool of one worker; `runner` owns the model and the bytes of the pool. `host`, if
    any, keeps what `pool` evicts; `grammars` compiles those of turns that have one.

    Use it as `add`, then `admit` and `step` in turns while there is work. Every sequence in `running` holds pages for
    all the tokens it was admitted with, so a prefill never runs out in the middle.

    With `overlap` a step is launched before the one before it has ended, so that the device never waits for the host:
    what that one samples stays on the device and is not known here yet. A sequence that it turns out to end is in one
    step too many, whose token is dropped. That step may still write to its last page when that is free again. Nobody is
    disturbed: who gets the page computes after it on the same device, and what comes from elsewhere (another worker's
    KV) is stored in a later round at the earliest, when that step has ended.
    """

    def __init__(
        self,
        runner: Runner,
        pool: PagePool,
        *,
        page_tokens: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        host: HostPool | None = None,
        grammars: Grammars | None = None,
        pace: Pace | None = None,
        overlap: bool = False,
        drafts: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool = pool
        self.host = host
        self.compiling = False
        """Whether a turn waits for its grammar: it may be ready at any moment, and `admit` has to find it."""
        self.counters = Counters()
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """Admitted sequences, oldest first, those that receive their KV included."""
        self.max_model_len = max_model_len
        self.runner = runner
        self.page_tokens = page_tokens
        self.max_num_batched_tokens = max_num_batched_tokens
        self._grammars = grammars
        self._failed: list[Sequence] = []
        """Turns whose grammar did not compile, since the last step."""
        self._pace = pace
        self._overlap = overlap
        self._drafts = drafts
        self._flight: Flight | None = None
        self._ended = 0.0
        self._max_num_seqs = max_num_seqs
        self.clock = clock
        # Room left for decodes to grow into, so that admitting one sequence does not at once preempt another.
        self._watermark = max(1, pool.num_pages // 100)
        self._turns: dict[str, Sequence] = {}

    @property
    def has_work(self) -> bool:
        """Whether a step would bring something. What only waits, waits for a message or for pages."""
        return self._flight is not None or any(s.status is Status.RUNNING for s in self.running)

    @property
    def queued_prefill_tokens(self) -> int:
        """Prompt tokens this worker still has to compute."""
        ours = [s for s in (*self.waiting, *self.running) if not s.prefill_at]
        return sum(s.to_launch for s in ours if s.to_launch > 1)

    def add(self, sequence: Sequence) -> None:
        """Queue a turn. Its prompt must be shorter than `max_model_len`; a turn that is here already is ignored."""
        assert 0 < len(sequence.tokens) < self.max_model_len
        if sequence.turn not in self._turns:
            self._turns[sequence.turn] = sequence
            self.waiting.append(sequence)
            if self._drafts and not sequence.prefill_for and not sequence.params.looks_back:
                sequence.drafter = Drafter()
            if sequence.params.grammar is not None and self._grammars is not None:
                sequence.compiling = self._grammars.start(sequence.params.grammar, sequence.outputs)

    def find(self, turn: str) -> Sequence | None:
        """The unfinished sequence of a turn."""
        return self._turns.get(turn)

    def abort(self, turn: str) -> Sequence | None:
        """Drop a turn and free its pages at once; returns it if it was here."""
        if sequence := self._turns.get(turn):
            self.finish(sequence)
        return sequence

    def finish(self, sequence: Sequence, *, keep_pages: bool = False) -> None:
        """Take a sequence out. With `keep_pages` its pages stay held, until their lease ends (`Handoffs`)."""
        if self._turns.pop(sequence.turn, None) is None:
            return
        if sequence.compiling is not None:
            sequence.compiling.cancel()
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
        sequence.status = Status.FINISHED
        if not keep_pages:
            self.pool.release(sequence.pages, sequence.keep, self.clock())
            sequence.pages = []

    def reset(self) -> None:
        """Forget the prefix cache and the counters. Only while nothing is here."""
        assert not self._turns
        assert self._flight is None
        self.pool.clear()
        if self.host is not None:
            self.host.clear()
        self.counters = Counters()

    # --- admission --------------------------------------------------------------------------------------------------

    def admit(self) -> list[Sequence]:
        """Give pages to waiting sequences in their order, as many as fit. Those whose grammar is being compiled let the
        others pass.

        Returns those whose KV comes from another worker: all their pages are reserved now.
        """
        receiving: list[Sequence] = []
        deferred: list[Sequence] = []
        now = self.clock()
        self.compiling = False
        while self.waiting and len(self.running) < self._max_num_seqs:
            sequence = self.waiting[0]
            if sequence.compiling is not None and not sequence.compiling.done():
                self.compiling = True
                deferred.append(self.waiting.popleft())
                continue
            if sequence.compiling is not None and sequence.compiling.exception() is not None:
                self.finish(sequence)
                self._failed.append(sequence)
                continue
            matched, slots = self._match(sequence)
            found = len(matched) + len(slots)
            if self._is_being_computed(sequence, found):
                # Somebody computes the next page of this prefix right now: wait for it instead of doing it twice.
                self._unmatch(sequence, matched, slots, now)
                deferred.append(self.waiting.popleft())
                continue
            count = -(-len(sequence.tokens) // self.page_tokens) - len(matched)
            reserve = self._watermark if self.running else 0
            if count + reserve > self.pool.num_available:
                self._unmatch(sequence, matched, slots, now)
                break
            self.waiting.popleft()
            sequence.pages = matched + self.pool.allocate(count, now)
            sequence.computed = found * self.page_tokens
            sequence.registered = len(matched)
            if self.host is not None and slots:
                self.host.restore(slots, sequence.pages[len(matched) : found], now)
                self.register(sequence)
            if sequence.cached is None:
                sequence.admitted = self.clock()
                sequence.cached = sequence.computed
                if not sequence.prefill_at:  # the prefiller looks it up too, and counts
                    self.counters.prefix_queries += sequence.given
                    self.counters.prefix_hits += sequence.cached
            elsewhere = sequence.prefill_at or sequence.history_at
            sequence.status = Status.RECEIVING if elsewhere else Status.RUNNING
            self.running.append(sequence)
            if elsewhere:
                receiving.append(sequence)
        self.waiting.extendleft(reversed(deferred))
        return receiving

    def _match(self, sequence: Sequence) -> tuple[list[int], list[int]]:
        """Cached pages for the prefix, and slots of host memory for what follows them.

        The last token is always computed: its logits give the next one.
        """
        hashes = sequence.hashes(self.page_tokens)[: (len(sequence.tokens) - 1) // self.page_tokens]
        pages = self.pool.match(hashes)
        return pages, self.host.match(hashes[len(pages) :], sequence.keep) if self.host is not None else []

    def _unmatch(self, sequence: Sequence, pages: list[int], slots: list[int], now: float) -> None:
        """Give back what `_match` found for a sequence that has to wait; nothing is needed sooner."""
        self.pool.release(pages, _soon(sequence), now)
        if self.host is not None:
            self.host.release(slots, _soon(sequence), now)

    def _is_being_computed(self, sequence: Sequence, matched: int) -> bool:
        """Whether a running prefill will soon register the page after the first `matched` ones."""
        if not self.pool.caching or matched >= (len(sequence.tokens) - 1) // self.page_tokens:
            return False
        wanted = sequence.hashes(self.page_tokens)[matched]
        for other in self.running:
            if other.missing > 1 and other.registered <= matched:
                hashes = other.hashes(self.page_tokens)
                if matched < len(hashes) and hashes[matched] == wanted:
                    return True
        return False

    # --- steps ------------------------------------------------------------------------------------------------------

    def step(self) -> Step:
        """Run one batch; an empty step if there is nothing to compute. With `overlap` that launches a batch and brings
        what the one before it has sampled."""
        flight = self._launch()
        if self._overlap:
            flight, self._flight = self._flight, flight
        step = self._collect(flight) if flight is not None else Step()
        for sequence in self._failed:
            error = sequence.compiling.exception() if sequence.compiling is not None else None
            output = _failure(sequence, str(error))
            # For another worker: that one has compiled it, and goes on by itself.
            if sequence.prefill_for:
                step.prefilled.append((sequence, output))
            else:
                step.outputs.append(output)
        self._failed.clear()
        return step

    def _launch(self) -> Flight | None:
        """Begin the next batch, if there is anything to compute."""
        batch = self._schedule()
        if not batch:
            return None
        self.counters.steps += 1
        timed, started = _work(batch), self.clock()
        self.counters.prompt_tokens += timed.prefill
        launched = self.runner.launch(batch)
        work = []
        for sequence, count in batch:
            sampling = count == sequence.to_launch
            sequence.under_way += count
            sequence.sampling = sampling
            work.append((sequence, count, sampling, sequence.draft))
            sequence.draft = []
        return Flight(work, timed, started, launched)

    def _collect(self, flight: Flight) -> Step:
        """Wait for a batch; what it brought."""
        tokens, logprobs = flight.launched.wait()
        now = self.clock()
        # It began when the one before it had ended.
        seconds, self._ended = now - max(flight.started, self._ended), now
        done = Step(time=msgspec.structs.replace(flight.time, seconds=seconds))
        if self._pace is not None and done.time is not None:
            self._pace.observe(done.time)
        sampled = iter(zip(tokens, logprobs, strict=True))
        for sequence, count, sampling, draft in flight.work:
            found = list(islice(sampled, 1 + len(draft))) if sampling else []
            if sequence.status is Status.FINISHED:
                continue
            held = next((i for i, token in enumerate(draft) if found[i][0] != token), len(draft))
            if sequence.status is Status.RUNNING:  # else preempted since: only the tokens are left of it
                sequence.under_way -= count
                sequence.computed += count
                self.register(sequence)
            if draft and sequence.drafter is not None:
                sequence.drafter.observe(len(draft), held)
                self.counters.drafted_tokens += len(draft)
                self.counters.held_tokens += held
            output = None
            if sampling:
                # Of its own next step, if that is launched already, nothing is sampled that we know of either.
                sequence.sampling = sequence.under_way > 0
                index = sequence.num_outputs
                if sequence.compiling is not None and (reason := sequence.compiling.result().error):
                    sequence.finish = "error"
                    output = _failure(sequence, reason)
                else:
                    output = self._output(sequence, index, found[: held + 1], now)
                done.outputs.append(output)
            if sequence.prefill_for:
                done.prefilled.append((sequence, output))
            elif sequence.finish:
                self.finish(sequence)
        return done

    def resume(self, sequence: Sequence) -> None:
        """What a receiving sequence still lacks is computed here from now on."""
        if sequence.status is Status.RECEIVING:
            sequence.status = Status.RUNNING
            sequence.prefill_at = sequence.history_at = ""
            if sequence.missing > 1 and len(sequence.pages) * self.page_tokens < len(sequence.tokens):
                # It has got its first token but not all of its KV: more than it was admitted with is to be computed.
                self._preempt(sequence)

    def register(self, sequence: Sequence) -> None:
        """Make the full pages whose KV is complete known to the prefix cache."""
        full = sequence.computed // self.page_tokens
        if full > sequence.registered:
            hashes = sequence.hashes(self.page_tokens)
            for page in range(sequence.registered, full):
                self.pool.register(sequence.pages[page], hashes[page], hashes[page - 1] if page else None)
            sequence.registered = full

    def _schedule(self) -> list[tuple[Sequence, int]]:
        """Who computes how many tokens in this step: decodes first, then prompts."""
        batch: list[tuple[Sequence, int]] = []
        ready = [s for s in self.running if s.status is Status.RUNNING and s.can_go_on(self.max_model_len)]
        for sequence in [s for s in ready if s.to_launch == 1]:
            if sequence.status is Status.RUNNING and self._grow(sequence):
                batch.append((sequence, 1))
        # Growing may have preempted a sequence that was scheduled before: the youngest ones come last.
        batch = [(s, count) for s, count in batch if s.status is Status.RUNNING]
        self._draft([sequence for sequence, _ in batch])
        # At least one token, so that even a budget smaller than the decodes starves nobody.
        budget = max(self.max_num_batched_tokens - len(batch), 1)
        if batch and self._pace is not None:
            budget = min(budget, self._pace.tokens)
        return batch + self._share(budget)

    def _share(self, budget: int) -> list[tuple[Sequence, int]]:
        """Divide `budget` tokens of a step among prompts, oldest first. Up to half goes to short ones first: what
        follows in a conversation need not wait for all of another one's long prompt."""
        prompts = [s for s in self.running if s.status is Status.RUNNING and s.to_launch > 1]
        counts = [0] * len(prompts)
        for longest, share in ((self.max_num_batched_tokens // 2, budget // 2), (self.max_model_len, budget)):
            share -= sum(counts)
            for i, sequence in enumerate(prompts):
                if sequence.to_launch <= longest:
                    more = min(share, sequence.to_launch - counts[i])
                    counts[i] += more
                    share -= more
        return [(sequence, count) for sequence, count in zip(prompts, counts, strict=True) if count]

    def _draft(self, decodes: list[Sequence]) -> None:
        """Guess how some of the sequences go on that decode in this step, as far as rows and pages suffice."""
        rows = ROWS - len(decodes)
        for sequence in decodes:
            if rows > 0 and sequence.drafter is not None:
                limit = self.max_model_len - sequence.length
                if sequence.params.max_tokens is not None:
                    limit = min(limit, sequence.params.max_tokens - sequence.num_outputs)
                draft = sequence.drafter.draft(sequence.tokens, min(rows, limit - 1))
                more = -(-(sequence.length + len(draft)) // self.page_tokens) - len(sequence.pages)
                if more > 0 and self.pool.num_available >= more + self._watermark:
                    sequence.pages += self.pool.allocate(more, self.clock())
                sequence.draft = draft[: len(sequence.pages) * self.page_tokens - sequence.length]
                rows -= len(sequence.draft)

    def _grow(self, sequence: Sequence) -> bool:
        """A page for the next token, from the youngest sequences if need be; False if this one had to give way."""
        if len(sequence.pages) * self.page_tokens >= sequence.length:
            return True
        while True:
            try:
                sequence.pages += self.pool.allocate(1, self.clock())
                return True
            except OutOfPages:
                # Never one that gives its KV to another worker, or gets it: they do not grow and end by themselves.
                victim = next(s for s in reversed(self.running) if s.status is Status.RUNNING and not s.prefill_for)
                self._preempt(victim)
                if victim is sequence:
                    return False

    def _preempt(self, sequence: Sequence) -> None:
        """Give up the KV; it is recomputed, or found in the prefix cache, when there is room again."""
        self.counters.preemptions += 1
        self.running.remove(sequence)
        self.pool.release(sequence.pages, _soon(sequence), self.clock())
        sequence.pages = []
        sequence.computed = sequence.under_way = sequence.registered = 0
        sequence.prefill_at = sequence.history_at = ""
        sequence.status = Status.WAITING
        self.waiting.appendleft(sequence)

    def _output(
        self, sequence: Sequence, index: int, found: list[tuple[int, TokenLogprob | None]], now: float
    ) -> TurnOutput:
        """Take in the tokens that were `found`, as far as the turn goes; what is told of them."""
        first, before = index == sequence.prior, len(sequence.tokens)
        for token, _ in found:
            sequence.append(token, self.runner.eos, self.max_model_len)
            if sequence.finish:
                break
        taken = len(sequence.tokens) - before
        self.counters.generated_tokens += taken
        if sequence.status is Status.RUNNING:
            sequence.computed += taken - 1  # those of the draft: their KV is there
            self.register(sequence)
        logprobs = [logprob for _, logprob in found[:taken] if logprob is not None]
        return TurnOutput(
            turn=sequence.turn,
            index=index,
            tokens=sequence.tokens[before:],
            logprobs=logprobs or None,
            finish=sequence.finish,
            stop_token=sequence.stop_token,
            cached_tokens=sequence.cached if first else None,
            prefill=now - sequence.admitted if first else 0.0,
        )


def _failure(sequence: Sequence, reason: str) -> TurnOutput:
    """The end of a turn whose grammar cannot be followed (any further)."""
    error = f"The grammar that the output has to match cannot be followed: {reason}"
    return TurnOutput(sequence.turn, sequence.num_outputs, [], finish="error", error=error, invalid=True)


def _soon(sequence: Sequence) -> Keep:
    """What is known of the conversation of a waiting sequence: it needs its pages as soon as there is room."""
    keep = sequence.keep
    return Keep(keep.conversation, gap=1.0, chance=1.0, page_seconds=keep.page_seconds)


def _work(batch: list[tuple[Sequence, int]]) -> StepTime:
    """What a step is about to compute; each token of a prompt looks back on all before it."""
    prefill = context = decodes = decode_context = 0
    for sequence, count in batch:
        if sequence.to_launch > 1:
            prefill += count
            context += count * (sequence.computed + sequence.under_way) + count * count // 2
        else:
            decodes += 1 + len(sequence.draft)
            decode_context += sequence.length
    return StepTime(prefill, context, decodes, decode_context, 0.0)
