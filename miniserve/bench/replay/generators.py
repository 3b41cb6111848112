"""From what the user names to a workload: a trace's file, or made-up scripts whose sizes follow a distribution."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np

from miniserve.bench.replay.distributions import Distribution, arrivals, choose, generator
from miniserve.bench.replay.traces import read_trace
from miniserve.bench.replay.workload import Script, TurnSize, Workload
from miniserve.config import ConfigError, problem, tables

COUNT = 255
"""Scripts of a made-up workload by default: as many as in the paper's evaluation."""

_SWE = tables("bench/replay/swe_agent.toml")


@dataclass(frozen=True, kw_only=True)
class WorkloadConfig:
    """What the user asks for, each by the flag of its name. `trace` is a path or the name of a made-up workload,
    `conversations` how many are drawn from it (None: all of a trace, `COUNT` made up), `arrivals` how they come.

    The scripts are changed: at most `max_turns` of each, token counts times `scale_tokens`, and instead of the trace's,
    `gap` seconds between turns and `append` new tokens in later ones. With `same_prompt` all first prompts are
    beginnings of one, so that their KV is computed once for all, as in the paper's artifact.
    """

    trace: str
    max_turns: int | None = None
    gap: Distribution | None = None
    append: Distribution | None = None
    same_prompt: bool = False
    scale_tokens: float = 1.0
    arrivals: str = "poisson"
    conversations: int | None = None

    def load(self, rate: float | None, seed: int) -> Workload:
        """The scripts, arriving at `rate` a second. Without a rate they arrive as the trace says, else at 1 a second.

        Raises `ConfigError`."""
        scripts = [self.apply(script, seed) for script in load(self.trace, self.conversations, seed)]
        known = [script.arrival for script in scripts if script.arrival is not None]
        if rate is None and len(known) == len(scripts):
            starts = [arrival - min(known) for arrival in known]
        else:
            rate = rate or 1.0
            starts = arrivals(self.arrivals, rate, len(scripts), seed)
        return Workload(scripts=scripts, starts=starts, rate=rate, seed=seed)

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


def load(text: str, count: int | None, seed: int) -> list[Script]:
    """Scripts of a workload by its name, or of the trace at a path (None: all of a trace, `COUNT` of a workload).
    `./chat` is a file, `chat` a workload. Raises `ConfigError`."""
    if text in _GENERATORS or text.startswith("mix:"):
        return generate(text, COUNT if count is None else count, seed)
    if not (path := Path(text)).exists():
        raise ConfigError(problem("bench.no_workload", text=text, known=", ".join(_GENERATORS)))
    return choose(read_trace(path), count, seed)


def generate(name: str, count: int, seed: int) -> list[Script]:
    """`count` scripts of a workload by its name, or of several by weight: `mix:swe-agent=0.5,chat=0.5`.

    Each is drawn by its number and the seed alone: fewer scripts are the first ones of more. Raises `ConfigError`.
    """
    names, shares = _mix(f"{name}=1" if name in _GENERATORS else name)
    return [_script(str(generator(seed, "mix", str(n)).choice(names, p=shares)), n, seed) for n in range(count)]


def _swe_agent(rng: np.random.Generator) -> list[TurnSize]:
    """Ten turns of a coding agent without gaps, 67 tokens appended at each, as mini-swe-agent has on SWE-bench. Sizes
    are drawn from the quantiles in swe_agent.toml, which says how well they fit. Outputs of a conversation correlate
    through a normal variable they have in common."""

    def between(quantile: float, table: list[int]) -> int:
        return round(math.exp(np.interp(quantile, _SWE["quantiles"], np.log(table))))

    first = between(rng.random(), _SWE["first"])
    common = rng.standard_normal() * math.sqrt(_SWE["correlation"])
    own = rng.standard_normal(len(_SWE["outputs"])) * math.sqrt(1 - _SWE["correlation"])
    outputs = (between(NormalDist().cdf(common + z), row) for z, row in zip(own, _SWE["outputs"], strict=True))
    return [TurnSize(67 if n else first, output) for n, output in enumerate(outputs)]


def _chat(rng: np.random.Generator) -> list[TurnSize]:
    """A person: a first prompt of 100 to 500 tokens, shorter ones later, answers of 250, three turns on average, 10 to
    60 seconds to read and write. A plausible choice, no fit."""
    return [
        TurnSize(
            _lognormal(rng, 60 if n else 220, 0.8 if n else 0.5, 4000),
            _lognormal(rng, 180, 0.8, 2000),
            round(float(rng.lognormal(math.log(25), 0.55)), 3) if n else 0.0,
        )
        for n in range(min(int(rng.geometric(1 / 3)), 30))
    ]


def _deep_research(rng: np.random.Generator) -> list[TurnSize]:
    """A research agent: 5 to 15 turns, pages of 1,000 to 8,000 tokens appended, tools that take 1 to 30 seconds. A
    plausible choice, no fit."""
    return [
        TurnSize(
            round((Distribution("log", 1000, 8000) if n else Distribution("uniform", 2000, 4000)).draw(rng)),
            round(Distribution("log", 100, 600).draw(rng)),
            round(Distribution("log", 1, 30).draw(rng), 3) if n else 0.0,
        )
        for n in range(int(rng.integers(5, 16)))
    ]


_GENERATORS: dict[str, Callable[[np.random.Generator], list[TurnSize]]] = {
    "swe-agent": _swe_agent,
    "chat": _chat,
    "deep-research": _deep_research,
}


def _script(name: str, number: int, seed: int) -> Script:
    key = f"{name}-{number}"
    return Script(key, tuple(_GENERATORS[name](generator(seed, "workload", key))))


def _mix(text: str) -> tuple[list[str], list[float]]:
    """Names, and shares that sum to 1."""
    weights: dict[str, float] = {}
    for part in text.removeprefix("mix:").split(","):
        name, _, number = part.strip().partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if name not in _GENERATORS or name in weights or not 0 < weight < math.inf:
            raise ConfigError(problem("bench.no_mix", text=text, known=", ".join(_GENERATORS)))
        weights[name] = weight
    return list(weights), [weight / sum(weights.values()) for weight in weights.values()]


def _lognormal(rng: np.random.Generator, median: float, sigma: float, most: int) -> int:
    return min(max(round(float(rng.lognormal(math.log(median), sigma))), 1), most)
