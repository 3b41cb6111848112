"""What of a workload is drawn at random: sizes, gaps, arrivals, token ids.

Everything is drawn from a seed: the same command replays the same workload. Token ids are made up here, so that no two
scripts share a prefix unless the trace says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from miniserve.bench.replay.workload import Script, TurnSize
from miniserve.config import ConfigError

BURST = 8
"""Conversations that arrive at once with `burst`."""


class Distribution(NamedTuple):
    """Of a number: `fixed` (low), `uniform` or `log` (uniform in the logarithm) from low to high, or `exp` (exponential
    with mean low)."""

    kind: str
    low: float
    high: float

    @classmethod
    def parse(cls, text: str) -> Distribution:
        """From `5`, `0..30`, `log:67..8000` or `exp:10`. Raises `ConfigError`."""
        kind, _, rest = text.rpartition(":")
        low, dots, high = rest.partition("..")
        kinds = ("uniform", "log") if dots else ("fixed", "exp")
        try:
            parsed = cls(kind or kinds[0], float(low), float(high if dots else low))
            least = math.ulp(0.0) if kind == "log" else 0.0
            if parsed.kind not in kinds or not least <= parsed.low <= parsed.high < 1e9:
                raise ValueError
        except ValueError:
            raise ConfigError(
                f"{text!r} is not a number or distribution: write 5, 0..30 (uniform), log:67..8000 or exp:10 (mean)"
            ) from None
        return parsed

    def __str__(self) -> str:
        prefix = f"{self.kind}:" if self.kind in ("log", "exp") else ""
        return f"{prefix}{self.low:g}" + (f"..{self.high:g}" if self.kind in ("uniform", "log") else "")

    def draw(self, rng: np.random.Generator) -> float:
        if self.kind == "exp":
            return float(rng.exponential(self.low))
        if self.kind == "log":
            return float(np.exp(rng.uniform(np.log(self.low), np.log(self.high))))
        return float(rng.uniform(self.low, self.high)) if self.high > self.low else self.low


@dataclass(frozen=True, slots=True)
class WorkloadShape:
    """What is changed of a trace's scripts: at most `max_turns` of each, token counts times `scale_tokens`, and instead
    of the trace's, `gap` seconds between turns and `append` new tokens in later ones. With `same_prompt` all first
    prompts are beginnings of one, so that their KV is computed once for all, as in the paper's artifact."""

    max_turns: int | None = None
    gap: Distribution | None = None
    append: Distribution | None = None
    same_prompt: bool = False
    scale_tokens: float = 1.0

    def apply(self, script: Script, seed: int) -> Script:
        def scaled(count: int) -> int:
            return max(1, round(count * self.scale_tokens))

        gaps, appends = generator(seed, "gap", script.key), generator(seed, "append", script.key)
        turns = []
        for n, turn in enumerate(script.turns[: self.max_turns]):
            gap = self.gap.draw(gaps) if self.gap and n else turn.gap
            new = max(1, round(self.append.draw(appends))) if self.append and n else turn.new
            turns.append(TurnSize(scaled(new), scaled(turn.output), gap))
        shared = tuple(range(script.turns[0].new // script.block)) if self.same_prompt else script.shared
        return replace(script, turns=tuple(turns), shared=shared, block=scaled(script.block))


def generator(seed: int, *names: str) -> np.random.Generator:
    """Random numbers of their own for each purpose, so that one more draw for one changes nothing for another."""
    digest = blake2b("\0".join((str(seed), *names)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def choose(scripts: Sequence[Script], count: int | None, seed: int) -> list[Script]:
    """`count` of the scripts (None: all), drawn by `seed`, each once as long as there are enough of them.

    Scripts whose arrival is known keep their order: the first ones are taken. If more are wanted, no arrival is known.
    """
    if count is None or (count <= len(scripts) and all(script.arrival is not None for script in scripts)):
        return list(scripts[:count])
    chosen: list[Script] = []
    rng = generator(seed, "choose")
    while len(chosen) < count:
        again = len(chosen) // len(scripts)
        for n in rng.permutation(len(scripts))[: count - len(chosen)]:
            script = scripts[int(n)]
            chosen.append(replace(script, key=f"{script.key}+{again}" if again else script.key, arrival=None))
    return chosen


def arrivals(kind: str, rate: float, count: int, seed: int) -> list[float]:
    """When `count` conversations arrive, in seconds, `rate` of them a second: `poisson`, `fixed` (evenly) or `burst`
    (`BURST` at once, the bursts at random). The first ones arrive at 0."""
    if kind == "fixed":
        return [n / rate for n in range(count)]
    size = BURST if kind == "burst" else 1
    gaps = generator(seed, "arrivals").exponential(size / rate, -(-count // size))
    starts = np.concatenate(([0.0], np.cumsum(gaps)))
    return [float(starts[n // size]) for n in range(count)]


class Text:
    """The token ids of one script, from its beginning on: `take` continues where it left off.

    Ids lie in [low, high): below are control tokens, above ends the vocabulary.
    """

    def __init__(self, script: Script, seed: int, low: int = 1000, high: int = 32_000) -> None:
        self._range = (low, high)
        self._rng = generator(seed, "text", script.key)
        blocks = [generator(seed, "block", str(n)).integers(low, high, script.block) for n in script.shared]
        shared = [int(token) for block in blocks for token in block]
        self._shared = shared[: script.turns[0].new]  # scaling rounds blocks and prompts separately

    def take(self, count: int) -> list[int]:
        shared, self._shared = self._shared[:count], self._shared[count:]
        return shared + self._rng.integers(*self._range, count - len(shared)).tolist()
