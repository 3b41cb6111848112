"""Which conversation a turn belongs to."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from miniserve.scheduler.forecast import TURNS, History
from miniserve.scheduler.prompts import PromptIndex, PromptMark


@dataclass(slots=True)
class Conversation:
    """All turns of one agent's context. Times are in seconds of the scheduler's clock."""

    key: str | int
    """The client's id, or a number where it gave none."""
    home: str | None = None
    """The worker that holds its KV between turns; None before the first turn and when that worker has died."""
    turns: int = 0
    """Turns that have ended, those of a fork's parent included."""
    tokens: int = 0
    """Length of the last turn, with its output."""
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


class Conversations:
    """Conversations by explicit id, else by the longest earlier prompt that a new prompt begins with.

    A prompt that begins with the last prompt of a conversation continues it. What the model answered need not match:
    clients resend it in their own rendering. A prompt that begins with an earlier prompt is an edited history. A prompt
    that shares only the first prompt is another conversation with the same beginning. While a turn of the found
    conversation still runs, the new prompt is a fork: a new conversation, which begins at the same home, since its
    pages are shared.

    Lookups hash the prompt once, whatever the number of conversations. `capacity` conversations are kept; beyond it,
    and after `max_idle` seconds, those idle for longest are forgotten, which costs nothing but a placement made anew.
    """

    def __init__(self, page_tokens: int, *, capacity: int = 100_000, max_idle: float = 3600.0) -> None:
        self._capacity = capacity
        self._max_idle = max_idle
        # Least recently active first.
        self._by_key: OrderedDict[str | int, Conversation] = OrderedDict()
        self._prompts: PromptIndex[Conversation] = PromptIndex(page_tokens)
        self._made = 0

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Conversation]:
        return iter(self._by_key.values())

    def get(self, key: str | int) -> Conversation | None:
        return self._by_key.get(key)

    def latest(self, count: int) -> list[Conversation]:
        """The `count` conversations that had a turn last, the latest first."""
        return list(islice(reversed(self._by_key.values()), count))

    def find(self, key: str | int, tokens: list[int], chain: list[bytes], now: float) -> tuple[Conversation, int]:
        """The conversation of a prompt: that of the explicit `key` ("" for none), one that it continues or edits, or a
        new one; and how many of the prompt's tokens the conversation has seen before.

        `chain` is the prompt's `page_chain`.
        """
        parent, known = None, 0
        if not key:
            conversation, parent, known = self._by_prefix(tokens, chain)
        elif (conversation := self._by_key.get(key)) is not None and conversation.marks:
            known = self._seen(conversation, tokens, chain)
            last = conversation.marks[-1]
            if self._prompts.mark(tokens, chain) != last and not self._prompts.begins(last, tokens, chain):
                conversation.edits += 1
        if conversation is None:
            self._made += 1
            conversation = Conversation(key or self._made, began=now, last_end=now)
            if parent is not None and parent.marks[0].length < len(tokens):
                conversation.home = parent.home
                conversation.turns = 1  # Its first turn was the parent's.
            self._by_key[conversation.key] = conversation
        self._by_key.move_to_end(conversation.key)
        self._mark(conversation, tokens, chain)
        return conversation, min(known, len(tokens))

    def _by_prefix(self, tokens: list[int], chain: list[bytes]) -> tuple[Conversation | None, Conversation | None, int]:
        """The conversation that a prompt continues or edits, if any; the one whose prompt is its longest prefix, which
        may still run or share its first prompt alone; and how many of the prompt's tokens that one has seen."""
        found = self._prompts.longest(tokens, chain)
        if found is None:
            return None, None, 0
        mark, owners = found
        parent = max(owners, key=lambda owner: (not owner.active, owner.marks[-1] == mark))
        if parent.active:
            return None, parent, mark.length
        is_first, is_last = mark == parent.marks[0], mark == parent.marks[-1]
        known = parent.tokens if is_last else mark.length
        if is_first and not (is_last and mark.length < len(tokens)):
            return None, parent, known
        parent.edits += not is_last
        return parent, parent, known

    def _seen(self, conversation: Conversation, tokens: list[int], chain: list[bytes]) -> int:
        for mark in reversed(conversation.marks):
            if self._prompts.begins(mark, tokens, chain):
                return conversation.tokens if mark is conversation.marks[-1] else mark.length
        return 0

    def expire(self, now: float) -> list[Conversation]:
        gone: list[Conversation] = []
        for conversation in self._by_key.values():
            too_many = len(self._by_key) - len(gone) > self._capacity
            if not conversation.active and (too_many or now - conversation.last_end > self._max_idle):
                gone.append(conversation)
            elif not too_many and not conversation.active:
                break  # All others had a turn later.
        for conversation in gone:
            del self._by_key[conversation.key]
            for mark in conversation.marks:
                self._prompts.remove(mark, conversation)
        return gone

    def _mark(self, conversation: Conversation, tokens: list[int], chain: list[bytes]) -> None:
        """Make this the conversation's last prompt, and forget earlier ones that it does not begin with."""
        kept = [mark for mark in conversation.marks if self._prompts.begins(mark, tokens, chain)]
        kept = kept[:1] + kept[1:][-(TURNS - 2) :]
        for mark in conversation.marks:
            if mark not in kept:
                self._prompts.remove(mark, conversation)
        newest = self._prompts.mark(tokens, chain)
        conversation.marks = [*kept, newest]
        self._prompts.add(newest, conversation)
