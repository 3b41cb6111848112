"""Responses that a later one may name as its previous one. In memory, within bounds."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

MAX_RESPONSES = 10_000
MAX_TOKENS = 32 * 2**20
"""Of all of them. Each counts in full, though those of one conversation share what they hold; so it is an upper bound,
and what is kept of long conversations are their latest responses."""
BYTES_PER_TOKEN = 4
"""Of answers, which count as well: tools and instructions stand in each."""


@dataclass
class Stored(Generic[T]):
    """The whole conversation up to a response: `items`, `tokens` long. `conversation` is the scheduler's name of it,
    `answer` is the response itself as JSON."""

    items: tuple[T, ...]
    tokens: int
    conversation: str | int
    answer: bytes = b""
    continued: bool = False
    """Whether a response has followed already: the next one is a fork."""


class ResponseStore(Generic[T]):
    """The least recently used response goes first."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_tokens: int = MAX_TOKENS) -> None:
        self._max_responses = max_responses
        self._max_tokens = max_tokens
        self._tokens = 0
        self._stored: OrderedDict[str, Stored[T]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._stored)

    def put(self, id: str, stored: Stored[T]) -> None:
        """Keep a response."""
        self._stored[id] = stored
        self._tokens += _size(stored)
        while len(self._stored) > self._max_responses or self._tokens > self._max_tokens:
            self.delete(next(iter(self._stored)))

    def get(self, id: str) -> Stored[T] | None:
        """The response of that id; None where there never was one, or it is gone."""
        if id in self._stored:
            self._stored.move_to_end(id)
        return self._stored.get(id)

    def delete(self, id: str) -> bool:
        """Forget it; whether it was there. Responses behind it keep what they hold of it."""
        gone = self._stored.pop(id, None)
        self._tokens -= _size(gone) if gone else 0
        return gone is not None


def _size(stored: Stored[T]) -> int:
    return stored.tokens + len(stored.answer) // BYTES_PER_TOKEN
