"""What agents ask and when, as traces and generators give it, and what of it is drawn at random. Times are in seconds.

Everything is drawn from a seed: the same command replays the same workload. Token ids are made up here, so that no two
scripts share a prefix unless the trace says so.
"""

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Annotated, NamedTuple, Self

import msgspec
import numpy as np

from miniserve.config import ConfigError, problem

BLOCK_TOKENS = 512
"""Tokens of a shared block: those that `hash_ids` of Mooncake's traces stand for."""
WHOLE = 2**31
"""More tokens than any conversation has."""
IDS = 1000, 32_000
"""Ids of tokens that any vocabulary has, none of them a control token."""
BURST = 8
"""Conversations that arrive at once with `burst`."""
Tokens = Annotated[int, msgspec.Meta(ge=1, lt=WHOLE)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=WHOLE)]
Seconds = Annotated[float, msgspec.Meta(ge=0, lt=WHOLE)]


class TurnSize(NamedTuple):
    """One turn: `new` tokens from the user or a tool (in the first turn: the whole prompt), `output` tokens from the
    model, and the `gap` between the end of the turn before and this one's arrival, in which the tool runs. Of what was
    said before, at most the first `keep` tokens stay: the rest was compacted or edited away."""

    new: Tokens
    output: Tokens
    gap: Seconds = 0.0
    keep: Annotated[int, msgspec.Meta(ge=0)] = WHOLE


@dataclass(frozen=True, slots=True)
class Script:
    """What one agent does: all turns of a conversation. `arrival` counts from the start of the trace, None where the
    trace does not have it. `shared` names the blocks of `block` tokens that the first prompt begins with; scripts that
    name the same block begin with the same tokens.

    `agents` are its sub-agents; several may run at once. One begins when its parent's turn `after` (from 0) has ended
    and the gap of its own first turn is over: with the first `prefix` tokens of what the parent has said by then, and
    its first prompt behind. The parent's turn `until`, if there is one, waits for its end."""

    key: str
    turns: Annotated[tuple[TurnSize, ...], msgspec.Meta(min_length=1)]
    arrival: Seconds | None = None
    shared: tuple[int | str, ...] = ()
    block: Tokens = BLOCK_TOKENS
    agents: tuple["Script", ...] = ()
    after: Count = 0
    until: Count = 1
    prefix: Count = 0

    @property
    def tokens(self) -> int:
        """Of the longest turn: its own, or a sub-agent's."""
        longest = length = self.prefix
        for turn in self.turns:
            length = min(length, turn.keep) + turn.new + turn.output
            longest = max(longest, length)
        return max([longest, *(agent.tokens for agent in self.agents)])

    def renamed(self, key: str) -> "Script":
        """The same under another key, which stands before those of its sub-agents too."""
        agents = tuple(agent.renamed(key + agent.key.removeprefix(self.key)) for agent in self.agents)
        return replace(self, key=key, agents=agents)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Scripts, and when each of them starts. `rate` is the rate (conversations a second) that `starts` were drawn for,
    None where they are the trace's own. `seed` also decides the token ids."""

    scripts: list[Script]
    starts: list[float]
    rate: float | None = None
    seed: int = 0

    @property
    def conversations(self) -> list[Script]:
        """The scripts with all their sub-agents."""
        found = list(self.scripts)
        for script in found:  # which grows
            found += script.agents
        return found


class Distribution(NamedTuple):
    """Of a number: `fixed` (low), `uniform` or `log` (uniform in the logarithm) from low to high, `exp` (mean low)."""

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
    """`count` of the scripts (None: all), drawn by `seed`, each once as long as there are enough of them. Scripts whose
    arrival is known keep their order: the first ones are taken. If more are wanted, no arrival is known."""
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
    parent. New ones are made up by `take`, which continues where it left off. `ids` are at least the first and below
    the second: below are control tokens, above ends the vocabulary."""

    def __init__(self, script: Script, seed: int, ids: tuple[int, int] = IDS, said: Iterable[int] = ()) -> None:
        self.said, self._ids = array("i", said), ids
        self._rng = generator(seed, "text", script.key)
        blocks = [generator(seed, "block", str(n)).integers(*ids, script.block) for n in script.shared]
        shared = [int(token) for block in blocks for token in block]
        self._shared = shared[: script.turns[0].new]  # scaling rounds blocks and prompts separately

    def take(self, count: int) -> list[int]:
        shared, self._shared = self._shared[:count], self._shared[count:]
        return shared + self._rng.integers(*self._ids, count - len(shared)).tolist()

    def prompt(self, turn: TurnSize) -> "array[int]":
        """What a turn keeps of what was said, and its new tokens: `said` from now on."""
        del self.said[turn.keep :]
        self.said.fromlist(self.take(turn.new))
        return self.said
