"""Stored responses, which a later request may continue as its previous response. In memory, within bounds."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from miniserve.api.errors import ApiError
from miniserve.api.responses.items import Item

MAX_RESPONSES = 10_000
MAX_TOKENS = 32 * 2**20
"""Of all responses. Each counts in full, though those of one conversation share what they hold: this is an upper bound,
and of long conversations the latest responses stay."""
BYTES_PER_TOKEN = 4
"""Of answers, which count too: each repeats its tools and instructions."""


@dataclass
class Stored:
    """The whole conversation up to a response: `items`, `tokens` long. `conversation` is the scheduler's name of it,
    `answer` is the response itself as JSON, and `output` the number of items that it has added."""

    items: tuple[Item, ...]
    tokens: int
    conversation: str | int
    answer: bytes = b""
    output: int = 0
    continued: bool = False
    """Whether a response has followed already: the next one is a fork."""

    @property
    def size(self) -> int:
        """In tokens."""
        return self.tokens + len(self.answer) // BYTES_PER_TOKEN


class ResponseStore:
    """The least recently used response goes first. `what` is stored is for errors."""

    def __init__(self, what: str, max_responses: int = MAX_RESPONSES, max_tokens: int = MAX_TOKENS) -> None:
        self._what = what
        self._max_responses = max_responses
        self._max_tokens = max_tokens
        self._tokens = 0
        self._stored: OrderedDict[str, Stored] = OrderedDict()

    def put(self, id: str, stored: Stored) -> None:
        self.delete(id)
        self._stored[id] = stored
        self._tokens += stored.size
        while len(self._stored) > self._max_responses or self._tokens > self._max_tokens:
            self.delete(next(iter(self._stored)))

    def get(self, id: str) -> Stored | None:
        if id in self._stored:
            self._stored.move_to_end(id)
        return self._stored.get(id)

    def delete(self, id: str) -> bool:
        """Forget a response; whether it was there. Responses behind it keep the items that they share with it."""
        gone = self._stored.pop(id, None)
        self._tokens -= gone.size if gone else 0
        return gone is not None

    def find(self, id: str, more: str = ".", *, code: str, param: str | None = None) -> Stored:
        """As `get`. Raises `ApiError` with `code` if it is not here; `more` is the end of its message."""
        if (stored := self.get(id)) is None:
            kept = "the latest ones are kept, until the server stops"
            problem = f"There is no {self._what} {id[:128]!r} here (any more): {kept}{more}"
            raise ApiError(404, problem, param=param, code=code)
        return stored


@contextmanager
def continuing(previous: Stored | None) -> Iterator[str | int]:
    """The conversation of a response that follows `previous`, or "". Only one response continues the conversation,
    unless it fails. All others are forks, and the scheduler finds their conversations by their prompts."""
    if previous is None or previous.continued:
        yield ""
        return
    previous.continued = True
    try:
        yield previous.conversation
    except BaseException:
        previous.continued = False
        raise
