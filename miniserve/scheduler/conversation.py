"""What is known of a conversation: what its client says of a turn, its last turns, and what to expect of the next."""

import math
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_type_hints

import msgspec

from miniserve.cluster.messages import FinishReason
from miniserve.scheduler.observations import quantile

TURNS = 16
"""Turns of a conversation that are remembered one by one: behaviour changes, and memory is bounded."""
RECENT = 256
"""Outputs and gaps of all conversations that are remembered, the latest ones."""
RESERVED_OUTPUT = 256
"""Output tokens expected of a turn before any was seen."""
OUTPUT_QUANTILE = 0.9
"""The share of turns that should get by with the pages they were given at their start."""
TurnEnd = FinishReason | Literal["error"]
FINISHES: tuple[TurnEnd, ...] = ("stop", "length", "abort", "error")


class Said(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a client says of a turn beside its prompt: hints, all of them."""

    client: str = ""
    """The name of the program, by the table of clients."""
    parent: str = ""
    """The key of the conversation that has started this one."""
    side: bool = False
    """A request beside the turns: a title, a summary."""
    session: bool = True
    """Whether the key names a session, not only what shares a cache."""
    sure: bool = False
    """Whether the server itself knows that the turn goes on with the conversation of its key."""
    tools: bool = False
    """Whether the request offers tools."""
    tool_result: bool = False
    """Whether the prompt ends in the result of one."""
    priority: int = 0
    """Turns with a lower one are placed before others that wait."""
    osl: int | None = None
    """Tokens that the client expects to be generated."""


UNSAID = Said()


class Change(NamedTuple):
    """Where a prompt, `after`, stops to be like what was computed last of its conversation, `before` (both 4 bytes a
    token): after `shared` tokens. If the conversation is new (`first`), `before` is of one that began alike."""

    shared: int
    before: bytes
    after: bytes
    first: bool


@dataclass(frozen=True, slots=True)
class PromptMark:
    """A prompt of `length` tokens: the chain hash of its full pages, and the bytes of the tokens after them."""

    digest: bytes
    tail: bytes
    length: int


class TurnRecord(NamedTuple):
    """One turn that has ended. Times in seconds; lengths in tokens.

    `arrived` counts from the conversation's first turn, `gap` from the end of the turn before (None for the first). The
    phases follow each other: `queued` for a placement, `waited` at its workers for steps of others and for pages,
    `prefill`; these make up the time to the `first_token`; then `decode`. Beside them: `transfer` is the time of
    copying KV, `exposed` what of it began when the prefill was done (so it is part of `decode`) or held up a prefill.
    `home` and `prefill_at` are numbers of workers (`prefill_at` None: at home); `tool` is whether the prompt ended in a
    tool's result: the turn before has called one.
    """

    turn: int
    arrived: float
    gap: float | None
    prompt: int
    new: int
    cached: int
    output: int
    queued: float
    waited: float
    prefill: float
    transfer: float
    exposed: float
    first_token: float
    decode: float
    moved_pages: int
    home: int
    prefill_at: int | None
    tool: bool
    runs: int
    finish: int
    """Which of `FINISHES`."""


COLUMNS = len(TurnRecord._fields)
WHOLE = tuple(i for i, kind in enumerate(get_type_hints(TurnRecord).values()) if kind in (int, bool, int | None))


class History:
    """The last `TURNS` turns of a conversation, in 4 bytes a number: float32, with NaN for None."""

    __slots__ = ("_numbers",)

    def __init__(self) -> None:
        self._numbers = array("f")

    def __len__(self) -> int:
        return len(self._numbers) // COLUMNS

    def __iter__(self) -> Iterator[TurnRecord]:
        for start in range(0, len(self._numbers), COLUMNS):
            row = [None if math.isnan(number) else number for number in self._numbers[start : start + COLUMNS]]
            for i in WHOLE:
                row[i] = None if (number := row[i]) is None else int(number)
            yield TurnRecord(*row)  # type: ignore[arg-type]

    def append(self, record: TurnRecord) -> None:
        if len(self) == TURNS:
            del self._numbers[:COLUMNS]
        self._numbers.extend(math.nan if value is None else value for value in record)

    def quantile(self, name: str, q: float) -> float | None:
        """A quantile of one number over the turns that have it; None with fewer than two such turns."""
        column = self._numbers[TurnRecord._fields.index(name) :: COLUMNS]
        values = [number for number in column if not math.isnan(number)]
        return quantile(values, q, 0.0) if len(values) > 1 else None


@dataclass(slots=True)
class Conversation:
    """All turns of one agent's context. Times are in seconds of the scheduler's clock."""

    key: str | int
    """The client's id, or a number where it gave none; of a fork the id and a number."""
    said: Said = UNSAID
    """What the client said of its first turn."""
    group: str | int = ""
    """The key of the conversation that it, its parent and its siblings come from: its own if it has no parent."""
    parent: str | int | None = None
    by: Literal["", "header", "key", "prefix"] = ""
    """How the parent is known: from the client, by a key of both, or guessed from a shared prefix and time."""
    family: str | int = ""
    """The client's id."""
    root: bytes = b""
    """Stands for the `salt` of its prompts."""
    salt: str = ""
    home: str | None = None
    """The worker that holds its KV between turns; None before the first turn and when that worker has died."""
    turns: int = 0
    """Turns that have ended, those of a fork's parent included."""
    tokens: int = 0
    """Length of the last turn, with its output."""
    ends: tuple[int, int] = 0, 0
    """Tokens of the last turn's prompt, and of the turn as far as it was computed: after the last full page of either
    there is a snapshot of its recurrent state, if the model has one."""
    active: int = 0
    """Turns that run or wait now."""
    resident: int = 0
    """Pages that it holds at home while no turn runs, by the `Ledger`."""
    wanted: float = 0.0
    """What of that it is expected to come back for."""
    expected_until: float | None = None
    began: float = 0.0
    last_end: float = 0.0
    moves: int = 0
    """Times that its KV went to another home."""
    moved_at: int = 0
    """The turn before which it last did."""
    edits: int = 0
    """Times that the client changed what had been said."""
    copy_at: str | None = None
    """The worker that last prefilled a turn for the home: it holds the first `copy_tokens` tokens, if not evicted."""
    copy_tokens: int = 0
    history: History = field(default_factory=History)
    marks: list[PromptMark] = field(default_factory=list, repr=False)
    """Its first prompt and those of its last turns: what the index finds it by."""
    first: int = 0
    """Tokens of the earliest of these prompts."""
    last: int = 0
    """Tokens of the last one."""
    places: tuple[bytes, ...] = field(default=(), repr=False)
    """Where it stands in `FirstPages`."""


class Forecast:
    """Outputs, gaps and the chance of another turn; where one's own history is too short, by what all did lately."""

    def __init__(self) -> None:
        self._outputs: deque[float] = deque(maxlen=RECENT)
        self._gaps: deque[float] = deque(maxlen=RECENT)
        # By the number of a turn: how many have ended, and after how many of those another turn came.
        self._ended = [0] * (TURNS + 1)
        self._continued = [0] * (TURNS + 1)

    def arrived(self, turns: int, gap: float | None) -> None:
        """A turn came `gap` seconds after turn number `turns` had ended; None: no turn was before it."""
        if gap is not None:
            self._gaps.append(gap)
            self._continued[min(turns, TURNS)] += 1

    def ended(self, record: TurnRecord) -> None:
        self._outputs.append(record.output)
        self._ended[min(record.turn, TURNS)] += 1

    def output(self, history: History, max_tokens: int | None, said: int | None = None) -> int:
        """Tokens a turn should be given room for: a high quantile of its own conversation's outputs, else what the
        client has `said`, else a quantile of all; never more than it may generate."""
        own = history.quantile("output", OUTPUT_QUANTILE)
        own = said if own is None else own
        expected = quantile(self._outputs, OUTPUT_QUANTILE, RESERVED_OUTPUT) if own is None else own
        return max(1, min(int(expected), max_tokens or int(expected)))

    def outlook(self, history: History, turn: int) -> tuple[float, float]:
        """After turn number `turn`: the gap to expect in seconds (the conversation's own median, else that of all), and
        the chance that another turn comes at all (the share of such turns that were followed by one). The chance begins
        at 2/3: agents' conversations go on, and those that are idle now may still do."""
        own = history.quantile("gap", 0.5)
        gap = quantile(self._gaps, 0.5, 0.0) if own is None else own
        n = min(turn, TURNS)
        return gap, min((self._continued[n] + 2) / (self._ended[n] + 3), 1.0)
