"""What agents will ask: tasks of several turns, when they arrive, and the token ids they are made of.

Sizes only come from traces and generators; the ids are made up here, so that no two tasks share a prefix unless the
trace says so. Everything is drawn from a seed: the same command replays the same workload.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

BLOCK_TOKENS = 512
"""Tokens of a shared block: those that `hash_ids` of Mooncake's traces stand for."""

ARRIVALS = ("poisson", "fixed", "burst")


class TurnSize(NamedTuple):
    """One turn: `new` tokens from the user or a tool (the first turn: the whole prompt), `output` tokens from the
    model, and the `gap` in seconds between the end of the turn before and this one's arrival: the tool runs."""

    new: int
    output: int
    gap: float = 0.0


@dataclass(frozen=True, slots=True)
class Task:
    """All turns of one conversation. `arrival` is in seconds from the start, None where the trace does not tell.
    `shared` names the blocks of `block` tokens each that its first prompt begins with, and others may too."""

    key: str
    turns: tuple[TurnSize, ...]
    arrival: float | None = None
    shared: tuple[int, ...] = ()
    block: int = BLOCK_TOKENS

    @property
    def tokens(self) -> int:
        """Its length in tokens when it is over."""
        return sum(turn.new + turn.output for turn in self.turns)

    @property
    def gaps(self) -> float:
        """Seconds that its tools take in all."""
        return sum(turn.gap for turn in self.turns[1:])

    def scaled(self, factor: float) -> Task:
        """The same with all token counts times `factor`, at least 1 each: for machines that are small."""
        turns = tuple(TurnSize(_scale(t.new, factor), _scale(t.output, factor), t.gap) for t in self.turns)
        return replace(self, turns=turns, block=_scale(self.block, factor))


class Spread(NamedTuple):
    """A distribution of a number: `fixed` (low), `uniform` or `log` (uniform in the logarithm) from low to high, or
    `exp` (exponential with mean low)."""

    kind: str
    low: float
    high: float

    @classmethod
    def parse(cls, text: str) -> Spread:
        """From `5`, `0..30`, `log:67..8000` or `exp:10`. Raises ValueError."""
        kind, _, rest = text.rpartition(":")
        low, dots, high = rest.partition("..")
        try:
            spread = cls(kind or ("uniform" if dots else "fixed"), float(low), float(high) if dots else float(low))
        except ValueError:
            spread = cls("", 0, 0)
        known = spread.kind in ("uniform", "log") if dots else spread.kind in ("fixed", "exp")
        least = np.nextafter(0, 1) if spread.kind == "log" else 0
        if not known or not least <= spread.low <= spread.high < 1e9:
            raise ValueError(
                f"{text!r} is not a number or distribution: write 5, 0..30 (uniform), log:67..8000 or exp:10 (mean)"
            )
        return spread

    def __str__(self) -> str:
        """As `parse` reads it."""
        prefix = f"{self.kind}:" if self.kind in ("log", "exp") else ""
        return f"{prefix}{self.low:g}" + (f"..{self.high:g}" if self.kind in ("uniform", "log") else "")

    def draw(self, rng: np.random.Generator) -> float:
        """One number."""
        if self.kind == "exp":
            return float(rng.exponential(self.low))
        if self.kind == "log":
            return float(np.exp(rng.uniform(np.log(self.low), np.log(self.high))))
        return float(rng.uniform(self.low, self.high)) if self.high > self.low else self.low


@dataclass(frozen=True, slots=True)
class Shape:
    """What is done to the tasks of a trace: at most `max_turns` of each, token counts times `scale`, and instead of
    what the trace says, `gap` seconds between turns and `append` new tokens in later ones. With `same_prompt` all first
    prompts are beginnings of one and the same: their KV is there already, once for all, as in the paper's artifact."""

    max_turns: int | None = None
    scale: float = 1.0
    gap: Spread | None = None
    append: Spread | None = None
    same_prompt: bool = False

    def apply(self, task: Task, seed: int) -> Task:
        """The task as it will be replayed."""
        gaps, appends = generator(seed, "gap", task.key), generator(seed, "append", task.key)
        turns = []
        for n, turn in enumerate(task.turns[: self.max_turns]):
            gap = self.gap.draw(gaps) if self.gap and n else turn.gap
            new = max(1, round(self.append.draw(appends))) if self.append and n else turn.new
            turns.append(TurnSize(new, turn.output, gap))
        shared = tuple(range(turns[0].new // task.block)) if self.same_prompt else task.shared
        return replace(task, turns=tuple(turns), shared=shared).scaled(self.scale)


def generator(seed: int, *names: str) -> np.random.Generator:
    """Random numbers of their own for each purpose, so that one more draw here changes nothing there."""
    digest = blake2b("\0".join((str(seed), *names)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def choose(tasks: Sequence[Task], count: int | None, seed: int) -> list[Task]:
    """`count` of the tasks (None: all), drawn by `seed`, each once as long as there are enough of them.

    Tasks whose arrival is known keep their order: the first ones are taken. If more are wanted, no arrival is known.
    """
    if count is None or (count <= len(tasks) and all(task.arrival is not None for task in tasks)):
        return list(tasks[:count])
    chosen: list[Task] = []
    rng = generator(seed, "choose")
    while len(chosen) < count:
        again = len(chosen) // len(tasks)
        for n in rng.permutation(len(tasks))[: count - len(chosen)]:
            task = tasks[int(n)]
            chosen.append(replace(task, key=f"{task.key}+{again}" if again else task.key, arrival=None))
    return chosen


def arrivals(kind: str, rate: float, count: int, seed: int, burst: int = 8) -> list[float]:
    """When `count` tasks come, in seconds, `rate` of them a second: `poisson`, `fixed` (evenly) or `burst` (`burst` at
    once, the bursts at random). The first one or ones come at 0. Raises ValueError for another kind."""
    if kind not in ARRIVALS:
        raise ValueError(f"{kind!r} is not one of {', '.join(ARRIVALS)}")
    if kind == "fixed":
        return [n / rate for n in range(count)]
    size = burst if kind == "burst" else 1
    gaps = generator(seed, "arrivals").exponential(size / rate, -(-count // size))
    starts = np.concatenate(([0.0], np.cumsum(gaps)))
    return [float(starts[n // size]) for n in range(count)]


class Text:
    """The token ids of one task, from its beginning on: `take` continues where it left off.

    Ids lie in [low, high): below are control tokens, above is no vocabulary.
    """

    def __init__(self, task: Task, seed: int, low: int = 1000, high: int = 32_000) -> None:
        self._range = (low, high)
        self._rng = generator(seed, "text", task.key)
        self._seed = seed
        shared = [token for block in task.shared for token in self._block(block, task.block)]
        self._shared = shared[: task.turns[0].new]  # scaling rounds blocks and prompts each for themselves

    def take(self, count: int) -> list[int]:
        """The next `count` ids."""
        shared, self._shared = self._shared[:count], self._shared[count:]
        return shared + self._rng.integers(*self._range, count - len(shared)).tolist()

    def _block(self, block: int, length: int) -> list[int]:
        return generator(self._seed, "block", str(block)).integers(*self._range, length).tolist()


def _scale(count: int, factor: float) -> int:
    return max(1, round(count * factor))
