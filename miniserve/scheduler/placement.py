"""What a policy is: what it is asked, and what it answers.

To add a policy, write a class like those in `baselines.py`, and list it in `POLICIES` there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from miniserve.scheduler.conversation import Conversation
from miniserve.scheduler.prompts import Known
from miniserve.scheduler.workers import Cluster, WorkerView


@dataclass(frozen=True)
class Need:
    """What a turn needs: `tokens` of prompt and `output` tokens that are expected, which take `pages` in all. `known`
    says how many tokens of the prompt a worker probably holds. At `now` the turn has `waited` so many seconds."""

    conversation: Conversation
    tokens: int
    output: int
    pages: int
    known: Known
    now: float
    waited: float = 0.0

    def new(self, worker: str) -> int:
        """Tokens that this worker would have to compute: the last one always, for its logits."""
        return max(self.tokens - self.known[worker], 1)


class Option(msgspec.Struct, frozen=True):
    """One way to serve a turn: `home` decodes; `prefill_at` is the prefiller, "" where home prefills itself;
    `history_at` is the worker from which home fetches the KV of earlier turns, "" for none. And what that is expected
    to cost, in seconds.

    To this turn: `queue` before its prefill, the `prefill`, `transfer` of KV that nothing hides, and `decode`. To
    others: `harm`, the delay of all streams beside it, added up.
    """

    home: str
    prefill_at: str = ""
    history_at: str = ""
    queue: float = 0.0
    prefill: float = 0.0
    transfer: float = 0.0
    decode: float = 0.0
    harm: float = 0.0
    cost: float = 0.0
    """All of it; computed."""

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "cost", self.first_token + self.decode + self.harm)

    @property
    def first_token(self) -> float:
        return self.queue + self.prefill + self.transfer


@dataclass(frozen=True)
class Placement:
    """The option that was chosen, `reason` says in a word why. With `share_history` its prefiller may fetch the KV of
    earlier turns from home. `options` are what was compared, if anything was."""

    option: Option
    reason: str = ""
    options: Sequence[Option] = field(default=(), compare=False)
    share_history: bool = False


class Policy:
    """A pure function of what was observed. If it says nothing else, turns are served strictly in order and at home,
    and steps take as long as they take."""

    name = ""
    """Of the policy in `POLICIES`, for records of decisions."""
    step_stretch = 0.0
    """How many times longer than the step of a lone stream a step may take in which prompts are computed beside
    streams; 0 for as long as it takes."""

    def place(self, need: Need, cluster: Cluster) -> Placement | None:
        """Place a turn, at a home in `cluster.open` that has room for `need`; None if it has to wait."""
        raise NotImplementedError

    def elsewhere(self, worker: WorkerView) -> float:
        """The most pages that a turn may need for `place` to move its conversation to this worker, if that is open and
        its home is not or is full; 0 if it moves none. It never moves one of which other turns wait or run."""
        return 0.0

    def patience(self, need: Need, cluster: Cluster) -> float:
        """For how many seconds a newcomer lets turns with a home pass; then it claims the workers that it waits for."""
        return 0.0
