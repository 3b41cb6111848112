"""One step of an engine: what goes in, what computes it, what comes out."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, Self

import msgspec

from miniserve.cluster.messages import FirstToken, StepTime, TokenLogprob, TurnOutput
from miniserve.worker.sequence import Sequence

Sampled = list[tuple[int, TokenLogprob | None]]
"""Tokens and perhaps their log-probabilities, in the order of a step's `Work`: first all tokens of prompts that were
scored, then for each `Work` that samples the next token, and one after each token of its draft."""


class Work(msgspec.Struct, frozen=True, eq=False):
    """What a step does for one sequence: it computes the KV of the next `count` tokens from position `start` on. One
    that `samples` is complete with these: the step samples its next token. Then it also computes the tokens of `draft`,
    which may follow, and samples after each. Of its first tokens `scored` tell the log-probability of the next one in
    the prompt."""

    sequence: Sequence
    start: int
    count: int
    samples: bool
    draft: list[int]
    scored: int = 0

    @classmethod
    def next(cls, sequence: Sequence, count: int, draft: list[int] | None = None) -> Self:
        """The next `count` tokens of a sequence, behind those that are under way."""
        start = sequence.computed + sequence.under_way
        scored = max(min(count, sequence.given - 1 - start), 0) if sequence.scoring else 0
        return cls(sequence, start, count, count == sequence.to_launch, draft or [], scored)

    @property
    def is_decode(self) -> bool:
        """Whether the prompt was complete before."""
        return self.samples and self.count == 1

    @property
    def num_sampled(self) -> int:
        """How many tokens the step samples for this sequence."""
        return 1 + len(self.draft) if self.samples else 0


def step_time(batch: list[Work]) -> StepTime:
    """What a step computes, its seconds still unknown. Each token of a prompt looks back on all before it."""
    prefill = context = decodes = decode_context = 0
    for work in batch:
        if work.is_decode:
            decodes += 1 + len(work.draft)
            decode_context += work.sequence.length
        else:
            prefill += work.count
            context += work.count * work.start + work.count * work.count // 2
    return StepTime(prefill, context, decodes, decode_context, 0.0)


Launched = Callable[[], Sampled]
"""A step that the device works on: the call blocks until it is done, and gives what it has sampled."""


class Runner(Protocol):
    """What computes steps: the model (`worker/runner.py`), or the simulator."""

    eos: frozenset[int]
    """Tokens that end a turn."""

    def launch(self, batch: list[Work]) -> Launched:
        """Begin a step. A token that is still being sampled comes from the step launched before."""


@dataclass(frozen=True)
class InFlight:
    """A launched step: `started` in seconds of the engine's clock."""

    batch: list[Work]
    time: StepTime
    started: float
    launched: Launched


@dataclass
class StepResult:
    """What a step brought. `time` is None where nothing was computed."""

    outputs: list[TurnOutput] = field(default_factory=list)
    prefilled: list[tuple[Sequence, FirstToken | None]] = field(default_factory=list)
    """Sequences prefilled for other workers that have come further, or with a first token to their end."""
    refused: list[tuple[Sequence, str]] = field(default_factory=list)
    """Prefills for other workers that cannot be finished here, and why."""
    time: StepTime | None = None
