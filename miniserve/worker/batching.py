"""The batch of the next step: a token for every decoding sequence, then pieces of prompts as far as tokens go."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from miniserve.cluster.messages import StepTime
from miniserve.kv.pages import PagePool
from miniserve.worker.sequence import Sequence, State
from miniserve.worker.snapshots import Snapshots
from miniserve.worker.step import Work

LEAST_SHARE = 16
"""A prompt gets at least one part in so many of the full budget in each step, however slow steps are."""
FORGET = 0.001
"""By which share the shortest step that is remembered grows with each decode step: machines change."""
SHORT_SHARE = 0.75
"""The part of a step's tokens of prompts that goes to short ones, if there are any: those that half a full step could
take."""


class Pace:
    """Keeps steps that mix prompts with streams within `stretch` times the shortest step of a stream, by how long such
    steps were.

    One number is adapted, the tokens of a prompt in a mixed step: by the ratio of the time that such a step may take to
    the time that it took. That comes to rest where both are equal, whatever a token costs on this device, with these
    streams, so far into a prompt. Where the streams alone take longer, prompts get the least share.
    """

    def __init__(self, budget: int, stretch: float) -> None:
        """`budget` is the tokens of a step with nothing to protect in it."""
        self.tokens = budget
        self._least = max(1, budget // LEAST_SHARE)
        self._most = budget
        self._stretch = stretch
        self._shortest = 0.0

    def observe(self, step: StepTime) -> None:
        if not step.prefill:
            longest = self._shortest * (1 + FORGET) or step.seconds
            self._shortest = min(step.seconds, longest)
        elif step.decodes and self._shortest and step.seconds > 0:
            ratio = self._stretch * self._shortest / step.seconds
            if ratio < 1 or step.prefill >= self.tokens:  # a short rest of a prompt says nothing about longer ones
                wanted = self.tokens * min(max(ratio, 0.5), 2.0)
                # Rounded in the direction it goes: else one token would stay one for ever.
                wanted = ceil(wanted) if ratio > 1 else int(wanted)
                self.tokens = min(max(wanted, self._least), self._most)


@dataclass(kw_only=True)
class Batching:
    """Composes batches: every decode, and tokens of prompts (at least one) up to `max_num_batched_tokens` in all, but
    no more than `pace` allows, if there is one. Drafts come on top: a batch with drafts has at most `draft_rows` rows.

    A decode that needs a page takes it from the youngest sequences: `preempt` gives up the KV of one.
    """

    pool: PagePool
    page_tokens: int
    max_num_batched_tokens: int
    max_model_len: int
    watermark: int
    """Pages that drafts leave free."""
    pace: Pace | None
    draft_rows: int
    preempt: Callable[[Sequence], None]
    snapshots: Snapshots | None = None

    def compose(self, running: list[Sequence], now: float) -> list[Work]:
        """The batch of the next step: decodes first, then prompts."""
        ready = [s for s in running if s.state is State.RUNNING]
        decodes = [s for s in ready if s.to_launch == 1 and (not s.sampling or s.can_go_on(self.max_model_len))]
        # Growing may preempt a sequence that has grown before: the youngest ones come last.
        grown = [s for s in decodes if s.state is State.RUNNING and self._grow(s, running, now)]
        batch = self._draft([s for s in grown if s.state is State.RUNNING], now)
        # At least one token, so that even a budget smaller than the decodes starves no prompt.
        budget = max(self.max_num_batched_tokens - len(batch), 1)
        if batch and self.pace is not None:
            budget = min(budget, self.pace.tokens)
        return batch + self._share(budget, ready) if len(ready) > len(decodes) else batch

    def _grow(self, sequence: Sequence, running: list[Sequence], now: float) -> bool:
        """A page for the next token, from the youngest sequences if need be; False if this one had to give way."""
        if len(sequence.pages) * self.page_tokens >= sequence.length:
            return True
        while not self.pool.num_available:
            if self.snapshots is not None and self.snapshots.shed(running, now):
                continue
            # Never one that gives its KV to another worker, or gets it: they do not grow and end by themselves.
            victim = next(s for s in reversed(running) if s.state is State.RUNNING and s.prefill_for is None)
            self.preempt(victim)
            if victim is sequence:
                return False
        sequence.pages += self.pool.allocate(1, now)
        return True

    def _draft(self, decodes: list[Sequence], now: float) -> list[Work]:
        """The next token of each, and where rows and pages suffice a guess of how it goes on."""
        rows = self.draft_rows - len(decodes)
        batch = []
        for sequence in decodes:
            draft: list[int] = []
            if rows > 0 and sequence.drafter is not None:
                limit = self.max_model_len - sequence.length
                if sequence.params.max_tokens is not None:
                    limit = min(limit, sequence.params.max_tokens - sequence.num_outputs)
                draft = sequence.drafter.draft(sequence.tokens, min(rows, limit - 1))
                more = -(-(sequence.length + len(draft)) // self.page_tokens) - len(sequence.pages)
                if more > 0 and self.pool.num_available >= more + self.watermark:
                    sequence.pages += self.pool.allocate(more, now)
                draft = draft[: len(sequence.pages) * self.page_tokens - sequence.length]
                rows -= len(draft)
            batch.append(Work.next(sequence, 1, draft))
        return batch

    def _share(self, budget: int, ready: list[Sequence]) -> list[Work]:
        """Divide at most `budget` tokens of a step among prompts, oldest first. Up to `SHORT_SHARE` of them goes to
        short prompts first. Beside these long ones get no more than the rest of that share, and at least a little: so
        what follows in a conversation waits for a step not much longer than its own, beside any long prompt."""
        prompts = [s for s in ready if s.state is State.RUNNING and s.to_launch > 1]
        counts = [0] * len(prompts)

        def give(tokens: int, longest: int) -> None:
            for i, sequence in enumerate(prompts):
                if sequence.to_launch <= longest:
                    more = min(tokens, sequence.next_piece - counts[i])
                    counts[i] += more
                    tokens -= more

        give(int(budget * SHORT_SHARE), self.max_num_batched_tokens // 2)
        if short := sum(counts):
            least = max(1, self.max_num_batched_tokens // LEAST_SHARE)
            budget = min(budget, max(int(short / SHORT_SHARE), short + least))
        give(budget - short, self.max_model_len)
        return [Work.next(sequence, count) for sequence, count in zip(prompts, counts, strict=True) if count]
