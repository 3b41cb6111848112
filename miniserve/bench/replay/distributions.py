"""What of a workload is drawn at random: sizes, gaps, arrivals, token ids.

Everything is drawn from a seed: the same command replays the same workload. Token ids are made up here, so that no two
scripts share a prefix unless the trace says so.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import NamedTuple, Self

import numpy as np

from miniserve.bench.replay.workload import Script, TurnSize
from miniserve.config import ConfigError, problem

BURST = 8
"""Conversations that arrive at once with `burst`."""


class Distribution(NamedTuple):
    """Of a number: `fixed` (low), `uniform` or `log` (uniform in the logarithm) from low to high, or `exp` (exponential
    with mean low)."""

    kind: str
    low: float
    high: float

    @classmethod
    def parse(cls, text: str) -> Self:
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
            raise ConfigError(problem("bench.no_distribution", text=text)) from None
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
    rng = generator(seed, "choose")
    rounds = range(-(-count // len(scripts)))
    order = [(scripts[n], f"+{again}" if again else "") for again in rounds for n in rng.permutation(len(scripts))]
    return [replace(script.renamed(f"{script.key}{again}"), arrival=None) for script, again in order[:count]]


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
    """The token ids of one script. `said` are those of its conversation so far, at first what it shares with its
    parent. New ones are made up by `take`, which continues where it left off.

    Ids lie in [low, high): below are control tokens, above ends the vocabulary.
    """

    def __init__(
        self, script: Script, seed: int, low: int = 1000, high: int = 32_000, said: Iterable[int] = ()
    ) -> None:
        self.said = array("i", said)
        self._range = (low, high)
        self._rng = generator(seed, "text", script.key)
        blocks = [generator(seed, "block", str(n)).integers(low, high, script.block) for n in script.shared]
        shared = [int(token) for block in blocks for token in block]
        self._shared = shared[: script.turns[0].new]  # scaling rounds blocks and prompts separately

    def take(self, count: int) -> list[int]:
        shared, self._shared = self._shared[:count], self._shared[count:]
        return shared + self._rng.integers(*self._range, count - len(shared)).tolist()

    def prompt(self, turn: TurnSize) -> array[int]:
        """What a turn keeps of what was said, and its new tokens: `said` from now on."""
        del self.said[turn.keep :]
        self.said.fromlist(self.take(turn.new))
        return self.said
