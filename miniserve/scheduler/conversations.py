"""Which conversation a turn belongs to, and what has been observed of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from miniserve.kv.hashing import page_hashes, root_hash


@dataclass
class Conversation:
    """All turns of one agent task.

    `key` is the client's id, or a number where it gave none. `home` is the worker that holds its KV between turns, ""
    before the first turn and when that worker is gone. `tokens` is the length of the last turn, with its output;
    times are in seconds.
    """

    key: str | int
    home: str = ""
    turns: int = 0
    tokens: int = 0
    active: int = 0
    """Turns that run or wait now."""
    resident: int = 0
    """Pages it is thought to hold at home while no turn runs."""
    last_end: float = 0.0
    prompt: tuple[bytes, tuple[int, ...]] | None = field(default=None, repr=False)
    """Where the index finds it: the chain hash of the last prompt's full pages, and the tokens after them."""


class Conversations:
    """Conversations by explicit id, else by the longest prompt that a new prompt continues.

    A prompt continues a conversation if that one's last prompt is a prefix of it. What the model answered need not
    match: clients resend it in their own rendering. Lookups hash the prompt once, whatever the number of conversations.
    `capacity` conversations are kept; beyond it, and after `max_idle` seconds, those idle for longest are forgotten,
    which costs nothing but a placement made anew.
    """

    def __init__(self, page_tokens: int, *, capacity: int = 10_000, max_idle: float = 3600.0) -> None:
        self._page_tokens = page_tokens
        self._capacity = capacity
        self._max_idle = max_idle
        # Least recently active first.
        self._by_key: OrderedDict[str | int, Conversation] = OrderedDict()
        self._by_prompt: dict[bytes, dict[tuple[int, ...], Conversation]] = {}
        self._made = 0

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Conversation]:
        return iter(self._by_key.values())

    def find(self, key: str, tokens: list[int], salt: str) -> Conversation:
        """The conversation of a prompt: that of the explicit `key`, one that it continues, or a new one.

        A prompt that continues a conversation while a turn of it still runs is a fork: a new conversation, which
        begins at the same home, since its pages are shared.
        """
        parent = None
        conversation = self._by_key.get(key) if key else None
        if conversation is None and not key:
            parent = self._longest_prefix(tokens, salt)
            if parent is not None and not parent.active:
                conversation = parent
        if conversation is None:
            self._made += 1
            conversation = Conversation(key or self._made, home=parent.home if parent else "")
            if parent is not None:
                conversation.turns = 1  # its first turn was the parent's
            self._by_key[conversation.key] = conversation
        self._by_key.move_to_end(conversation.key)
        self._index(conversation, tokens, salt)
        return conversation

    def expire(self, now: float) -> list[Conversation]:
        """Forget what has been idle too long or is too much; returns it."""
        gone: list[Conversation] = []
        for conversation in self._by_key.values():
            too_many = len(self._by_key) - len(gone) > self._capacity
            if not conversation.active and (too_many or now - conversation.last_end > self._max_idle):
                gone.append(conversation)
            elif not too_many:
                break  # all others were active later
        for conversation in gone:
            del self._by_key[conversation.key]
            self._unindex(conversation)
        return gone

    def _place(self, tokens: list[int], salt: str) -> tuple[bytes, tuple[int, ...]]:
        root = root_hash("", salt)
        hashes = page_hashes(root, tokens, self._page_tokens)
        return hashes[-1] if hashes else root, tuple(tokens[len(hashes) * self._page_tokens :])

    def _index(self, conversation: Conversation, tokens: list[int], salt: str) -> None:
        self._unindex(conversation)
        conversation.prompt = self._place(tokens, salt)
        digest, tail = conversation.prompt
        self._by_prompt.setdefault(digest, {})[tail] = conversation

    def _unindex(self, conversation: Conversation) -> None:
        if conversation.prompt is None:
            return
        digest, tail = conversation.prompt
        found = self._by_prompt.get(digest, {})
        if found.get(tail) is conversation:
            del found[tail]
            if not found:
                del self._by_prompt[digest]

    def _longest_prefix(self, tokens: list[int], salt: str) -> Conversation | None:
        """The conversation whose last prompt is the longest proper prefix of `tokens`."""
        size = self._page_tokens
        root = root_hash("", salt)
        chain = [root, *page_hashes(root, tokens, size)]
        for pages in range(len(chain) - 1, -1, -1):
            tails = self._by_prompt.get(chain[pages])
            if tails is None:
                continue
            rest = tokens[pages * size : (pages + 1) * size]
            for length in range(len(rest), -1, -1):
                if pages * size + length < len(tokens) and (found := tails.get(tuple(rest[:length]))):
                    return found
        return None
