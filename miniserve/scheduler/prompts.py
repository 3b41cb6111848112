"""An index of prompts: which conversation had the longest prompt that a new prompt begins with."""

from array import array
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from miniserve.kv.hashing import page_hashes, root_hash

ALIKE = 64
"""How many owners of the very same prompt the index keeps."""


@dataclass(frozen=True, slots=True)
class PromptMark:
    """A prompt of `length` tokens: the chain hash of its full pages, and the bytes of the tokens after them."""

    digest: bytes
    tail: bytes
    length: int


class Owner(Protocol):
    marks: list[PromptMark]


T = TypeVar("T", bound=Owner)


class PromptIndex(Generic[T]):
    """Marks and their owners. A lookup takes one step for each page of the prompt, however many marks there are.

    Nearly every mark is alone under its digest. There its owner alone is kept, which saves memory; where several marks
    share a digest, a dict leads from their tails to their owners.
    """

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._owners: dict[bytes, T | dict[bytes, tuple[T, ...]]] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def mark(self, tokens: list[int], chain: list[bytes]) -> PromptMark:
        return PromptMark(chain[-1], _bytes(tokens[(len(chain) - 1) * self._page_tokens :]), len(tokens))

    def begins(self, mark: PromptMark, tokens: list[int], chain: list[bytes]) -> bool:
        """Whether `tokens` begin with the prompt of `mark`, and go on."""
        full = mark.length // self._page_tokens
        if mark.length >= len(tokens) or chain[full] != mark.digest:
            return False
        return mark.tail == _bytes(tokens[full * self._page_tokens : mark.length])

    def add(self, mark: PromptMark, owner: T) -> None:
        """`owner` has this prompt; `mark` is among its marks already."""
        there = self._owners.get(mark.digest)
        if there is None:
            self._owners[mark.digest] = owner
            return
        if not isinstance(there, dict):
            (other,) = (m for m in there.marks if m.digest == mark.digest and not (there is owner and m == mark))
            there = self._owners[mark.digest] = {other.tail: (there,)}
        owners = (*there.get(mark.tail, ()), owner)
        for forgotten in owners[:-ALIKE]:
            forgotten.marks.remove(mark)  # what the index does not have is not among its owner's marks
        there[mark.tail] = owners[-ALIKE:]

    def remove(self, mark: PromptMark, owner: T) -> None:
        """The index no longer finds `owner` by this prompt."""
        there = self._owners.get(mark.digest)
        if isinstance(there, dict):
            left = tuple(other for other in there.get(mark.tail, ()) if other is not owner)
            if left:
                there[mark.tail] = left
            else:
                there.pop(mark.tail, None)
            if not there:
                del self._owners[mark.digest]
        elif there is owner:
            del self._owners[mark.digest]

    def longest(self, tokens: list[int], chain: list[bytes]) -> tuple[PromptMark, tuple[T, ...]] | None:
        """The longest mark that `tokens` begin with or are, and its owners."""
        size = self._page_tokens
        for pages in range(len(chain) - 1, -1, -1):
            there = self._owners.get(chain[pages])
            if there is None:
                continue
            rest = _bytes(tokens[pages * size : (pages + 1) * size])
            if not isinstance(there, dict):
                mark = next(m for m in there.marks if m.digest == chain[pages])
                if rest.startswith(mark.tail):
                    return mark, (there,)
                continue
            for end in range(len(rest), -1, -4):
                if owners := there.get(rest[:end]):
                    return PromptMark(chain[pages], rest[:end], pages * size + end // 4), owners
        return None


def page_chain(tokens: list[int], salt: str, page_tokens: int) -> list[bytes]:
    """The chain hashes of a prompt's full pages, after the hash that stands for no token at all."""
    root = root_hash("", salt)
    return [root, *page_hashes(root, tokens, page_tokens)]


def _bytes(tokens: list[int]) -> bytes:
    return array("i", tokens).tobytes()
