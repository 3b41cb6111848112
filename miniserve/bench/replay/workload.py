"""What agents ask and when: sizes and times only, as traces and generators give them. Times are in seconds."""

from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import msgspec

BLOCK_TOKENS = 512
"""Tokens of a shared block: those that `hash_ids` of Mooncake's traces stand for."""
WHOLE = 2**31
"""More tokens than any conversation has."""
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
