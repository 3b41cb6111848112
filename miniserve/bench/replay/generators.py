"""From what the user names to a workload: a trace's file, or made-up scripts whose sizes follow a distribution."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from miniserve.bench.replay.traces import read_trace
from miniserve.bench.replay.workload import WHOLE, Distribution, Script, TurnSize, Workload, arrivals, choose, generator
from miniserve.config import ConfigError, problem, tables

COUNT = 255
"""Scripts of a made-up workload by default: as many as in the paper's evaluation."""

_SWE = tables("bench/replay/swe_agent.toml")


@dataclass(frozen=True, kw_only=True)
class WorkloadConfig:
    """What the user asks for, each by the flag of its name (`cli/commands.toml`). `conversations` None: all of a trace,
    `COUNT` made up. With `same_prompt` all first prompts are beginnings of one, as in the paper's artifact."""

    trace: str
    max_turns: int | None = None
    gap: Distribution | None = None
    max_gap: float | None = None
    append: Distribution | None = None
    same_prompt: bool = False
    scale_tokens: float = 1.0
    arrivals: str = "poisson"
    conversations: int | None = None

    def load(self, rate: float | None, seed: int) -> Workload:
        """The scripts, arriving at `rate` a second; without one as the trace says, else at 1. Raises `ConfigError`."""
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
            gap = gap if self.max_gap is None else min(gap, self.max_gap)
            new = max(1, round(self.append.draw(appends))) if self.append and n else turn.new
            keep = WHOLE if turn.keep == WHOLE else round(turn.keep * self.scale_tokens)
            turns.append(TurnSize(scaled(new), scaled(turn.output), gap, keep))
        return replace(
            script,
            turns=tuple(turns),
            shared=tuple(range(script.turns[0].new // script.block)) if self.same_prompt else script.shared,
            block=scaled(script.block),
            agents=tuple(self.apply(agent, seed) for agent in script.agents if agent.after < len(turns)),
            prefix=round(script.prefix * self.scale_tokens),
        )


def load(text: str, count: int | None, seed: int) -> list[Script]:
    """Scripts of a workload by its name, or of the trace at a path (None: all of a trace, `COUNT` of a workload).
    `./chat` is a file, `chat` a workload. Raises `ConfigError`."""
    if text in _GENERATORS or text.startswith("mix:"):
        return generate(text, COUNT if count is None else count, seed)
    if not (path := Path(text)).exists():
        raise ConfigError(problem("bench.no_workload", text=text, known=", ".join(_GENERATORS)))
    return choose(read_trace(path), count, seed)


def generate(name: str, count: int, seed: int) -> list[Script]:
    """`count` scripts of a workload by its name, or of several by weight: `mix:swe-agent=0.5,chat=0.5`. Each is drawn
    by its number and the seed alone: fewer scripts are the first ones of more. Raises `ConfigError`."""
    names, shares = _mix(f"{name}=1" if name in _GENERATORS else name)
    drawn = [str(generator(seed, "mix", str(n)).choice(names, p=shares)) for n in range(count)]
    makers = {f"{name}-{n}": _GENERATORS[name] for n, name in enumerate(drawn)}
    return [make(generator(seed, "workload", key)).renamed(key) for key, make in makers.items()]


def _swe_agent(rng: np.random.Generator) -> Script:
    """Ten turns of a coding agent without gaps, 67 tokens appended at each, as mini-swe-agent has on SWE-bench. Sizes
    are drawn from the quantiles in swe_agent.toml, which says how well they fit. Outputs of a conversation correlate
    through a normal variable they have in common."""

    def between(quantile: float, table: list[int]) -> int:
        return round(math.exp(np.interp(quantile, _SWE["quantiles"], np.log(table))))

    first = between(rng.random(), _SWE["first"])
    common = rng.standard_normal() * math.sqrt(_SWE["correlation"])
    own = rng.standard_normal(len(_SWE["outputs"])) * math.sqrt(1 - _SWE["correlation"])
    outputs = (between(NormalDist().cdf(common + z), row) for z, row in zip(own, _SWE["outputs"], strict=True))
    return Script("", tuple(TurnSize(67 if n else first, output) for n, output in enumerate(outputs)))


def _agent(kinds: list[dict[str, Any]], rng: np.random.Generator) -> Script:
    """An agent of one of the `kinds` in agents.toml, which says what their tables mean and how well they fit: requests
    of a person, each of which takes steps with tools in between. A context that becomes too long is compacted: the
    beginning of the first prompt stays, and a summary. Sub-agents begin like that too; the next turn waits."""
    kind = kinds[rng.choice(len(kinds), p=[kind["share"] for kind in kinds])]

    def draw(name: str, count: int = 1) -> list[float]:
        quantiles, values = zip(*kind[name], strict=True)
        return np.exp(np.interp(rng.random(count), quantiles, np.log(values))).tolist()

    def sizes(name: str, count: int = 1) -> list[int]:
        return [round(value) for value in draw(name, count)]

    def turns(first: int, requests: list[int], said: int) -> tuple[TurnSize, ...]:
        made: list[TurnSize] = []
        (limit,) = sizes("context")
        for steps in requests:
            appends = [*sizes("asked"), *sizes("append", steps - 1)]
            gaps = [*draw("person"), *(sum(draw("tool", calls)) for calls in sizes("calls", steps - 1))]
            for new, output, gap in zip(appends, sizes("output", steps), gaps, strict=True):
                turn = TurnSize(new, output, round(gap, 3)) if made else TurnSize(first, output)
                if made and said + new + output > limit:
                    turn, said = TurnSize(new + sizes("summary")[0], output, turn.gap, system), system
                made.append(turn)
                said += turn.new + output
        return tuple(made)

    (first,) = sizes("first")
    system = min(first, *sizes("system"))
    requests = [*sizes("steps"), *sizes("later_steps", *(count - 1 for count in sizes("requests")))]
    agents = [
        Script(f"/{n}.{m}", turns(sizes("asked")[0], sizes("steps"), system), after=n, until=n + 1, prefix=system)
        for n in np.flatnonzero(rng.random(sum(requests) - 1) < kind["delegates"]).tolist()
        for m in range(*sizes("agents"))
    ]
    return Script("", turns(first, requests, 0), agents=tuple(agents))


_KINDS = tables("bench/replay/agents.toml")
_GENERATORS: dict[str, Callable[[np.random.Generator], Script]] = {
    "swe-agent": _swe_agent,
    **{name: partial(_agent, kinds) for name, kinds in _KINDS.items()},
}


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
