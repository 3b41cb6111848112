"""What agents ask and when: sizes and times only, as traces and generators give them. Times are in seconds."""

from dataclasses import dataclass
from typing import NamedTuple

BLOCK_TOKENS = 512
"""Tokens of a shared block: those that `hash_ids` of Mooncake's traces stand for."""


class TurnSize(NamedTuple):
    """One turn: `new` tokens from the user or a tool (in the first turn: the whole prompt), `output` tokens from the
    model, and the `gap` between the end of the turn before and this one's arrival, in which the tool runs."""

    new: int
    output: int
    gap: float = 0.0


@dataclass(frozen=True, slots=True)
class Script:
    """What one agent does: all turns of a conversation. `arrival` counts from the start of the trace, None where the
    trace does not have it. `shared` names the blocks of `block` tokens that the first prompt begins with; scripts that
    name the same block begin with the same tokens."""

    key: str
    turns: tuple[TurnSize, ...]
    arrival: float | None = None
    shared: tuple[int, ...] = ()
    block: int = BLOCK_TOKENS

    @property
    def tokens(self) -> int:
        return sum(turn.new + turn.output for turn in self.turns)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Scripts, and when each of them starts. `rate` is the rate (conversations a second) that `starts` were drawn for,
    None where they are the trace's own. `seed` also decides the token ids."""

    scripts: list[Script]
    starts: list[float]
    rate: float | None = None
    seed: int = 0
