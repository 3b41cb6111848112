"""From the times of tokens to the figures of a report.

The metrics are those of the paper (arXiv 2606.01839). Each conversation counts once for TTFET, last-turn TBT and E2E,
each turn once for TTFT. Normalised figures divide by what the same conversation took alone on an idle worker. The time
its tools took is left out of TTFET and E2E: it is not the server's, and would hide what is.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from statistics import geometric_mean
from typing import Any, NamedTuple

import numpy as np

SLO = 5.0
"""An SLO is this many times standalone."""


class TurnTimes(NamedTuple):
    """One turn as its client saw it, in seconds of any one clock: when it was sent, when its `first` and `last` token
    came; and tokens: of its prompt, found in a cache (None: not reported), generated. `error` is why it failed."""

    sent: float
    first: float
    last: float
    prompt: int
    cached: int | None
    output: int
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.first - self.sent

    @property
    def tbt(self) -> float | None:
        """The mean gap between tokens; None with one token."""
        return (self.last - self.first) / (self.output - 1) if self.output > 1 else None


@dataclass
class ConversationTimes:
    """A conversation's turns so far. `arrival` is in seconds, `gaps` the seconds between turns: of these, `tools` is
    what its tools took, the rest it waited for sub-agents. `parent` is the one whose sub-agent it is."""

    key: str
    arrival: float
    turns: list[TurnTimes] = field(default_factory=list)
    gaps: float = 0.0
    tools: float = 0.0
    parent: "ConversationTimes | None" = None

    @property
    def failed(self) -> bool:
        return any(turn.error for turn in self.turns)

    @property
    def root(self) -> "ConversationTimes":
        return self.parent.root if self.parent else self


class Latency(NamedTuple):
    """Of one conversation, in seconds. `tbt` is the mean gap between tokens of its last turn, None with one token."""

    ttft: tuple[float, ...]
    ttfet: float
    tbt: float | None
    e2e: float


def latency(times: ConversationTimes) -> Latency:
    last, since = times.turns[-1], times.arrival + times.gaps
    return Latency(tuple(turn.ttft for turn in times.turns), last.first - since, last.tbt, last.last - since)


def groups(conversations: Sequence[ConversationTimes]) -> list[float]:
    """What each agent took with all its sub-agents: the seconds from its arrival to the last token of any of them, but
    for its own tools' time. A group of which one failed is left out."""
    ends: defaultdict[str, float] = defaultdict(float)
    for times in conversations:
        end = times.turns[-1].last if times.turns and not times.failed else inf
        ends[times.root.key] = max(ends[times.root.key], end)
    roots = [times for times in conversations if times.parent is None and ends[times.key] < inf]
    return [ends[times.key] - times.arrival - times.tools for times in roots]


def percentile(values: Sequence[float], q: float) -> float:
    """The `q` quantile of values, interpolated linearly between them."""
    return float(np.quantile(values, q))


def seconds(values: Iterable[float]) -> dict[str, float] | None:
    """p50, p95, p99; None without values."""
    known = list(values)
    return {f"p{q}": percentile(known, q / 100) for q in (50, 95, 99)} if known else None


def normalised(pairs: Iterable[tuple[float, float]]) -> dict[str, float] | None:
    """gmean, p50 and p95 of (value, standalone) pairs as ratios; None without pairs. A value of 0 (a server that sends
    all tokens at once) counts as a thousandth: the geometric mean knows no zero."""
    ratios = [max(value / alone, 1e-3) for value, alone in pairs if alone > 0]
    if not ratios:
        return None
    return {"gmean": geometric_mean(ratios), "p50": percentile(ratios, 0.5), "p95": percentile(ratios, 0.95)}


def summary(
    conversations: Sequence[ConversationTimes], standalone: dict[str, Latency] | None, duration: float
) -> dict[str, Any]:
    """The keys of the contract (docs/evaluation.md) that come from tokens' times. `standalone` has the latencies of the
    same conversations alone, by their keys, as far as they were measured. A failed conversation breaks all its SLOs and
    counts for nothing else but `errors`."""
    done = {times.key: latency(times) for times in conversations if times.turns and not times.failed}
    alone = {key: standalone[key] for key in done if key in standalone} if standalone else {}
    failed = sum(times.failed for times in conversations)
    turns = [turn for times in conversations for turn in times.turns]
    output = sum(turn.output for turn in turns)
    tbts = {key: value.tbt for key, value in done.items() if value.tbt is not None}
    ratios: dict[str, list[tuple[float, float]]] = {
        "ttft": [pair for key, a in alone.items() for pair in zip(done[key].ttft, a.ttft, strict=True)],
        "ttfet": [(done[key].ttfet, a.ttfet) for key, a in alone.items()],
        "last_turn_tbt": [(tbts[key], a.tbt) for key, a in alone.items() if key in tbts and a.tbt],
        "e2e": [(done[key].e2e, a.e2e) for key, a in alone.items()],
    }
    broken = {
        name: (sum(value > SLO * standard for value, standard in pairs) + failed) / max(len(pairs) + failed, 1)
        for name, pairs in ratios.items()
        if name != "ttft"
    }
    return {
        "conversations": len(conversations),
        "turns": len(turns),
        "output_tokens": output,
        "duration_s": duration,
        "ttft_s": seconds(t for value in done.values() for t in value.ttft),
        "later_ttft_s": seconds(t for value in done.values() for t in value.ttft[1:]),
        "ttfet_s": seconds(value.ttfet for value in done.values()),
        "last_turn_tbt_s": seconds(tbts.values()),
        "e2e_s": seconds(value.e2e for value in done.values()),
        "group_e2e_s": seconds(groups(conversations)),
        **{f"{name}_norm": normalised(pairs) for name, pairs in ratios.items()},
        "slo_violation": broken if standalone else dict.fromkeys(broken),
        "throughput": {
            "conversations_per_s": len(done) / duration if duration > 0 else 0.0,
            "output_tokens_per_s": output / duration if duration > 0 else 0.0,
        },
        "cached_tokens": sum(turn.cached or 0 for turn in turns),
        "prompt_tokens": sum(turn.prompt for turn in turns),
        "errors": failed,
    }
