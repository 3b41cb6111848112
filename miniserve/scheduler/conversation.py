"""What is known of a conversation, and what a client says of a turn."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import msgspec

from miniserve.scheduler.forecast import History


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
    expectation: int | None = None
    """The number of that expectation in the `Ledger`."""
    began: float = 0.0
    last_end: float = 0.0
    moves: int = 0
    """Times that its KV went to another home."""
    moved_at: int = 0
    """The turn before which it last did."""
    edits: int = 0
    """Times that the client changed what had been said."""
    copy_at: str | None = None
    """The worker that prefilled a turn for the home last. It still holds the first `copy_tokens` tokens, unless it has
    evicted them."""
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
