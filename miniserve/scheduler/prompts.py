"""Prompts: which conversation had the longest one that a new one begins with, which ones began alike, where a new one
differs from the one before, and which workers have computed its beginning."""

from collections import OrderedDict
from collections.abc import Sequence, Set

from miniserve.kv.hashing import page_hashes, root_hash
from miniserve.scheduler.conversation import Conversation, PromptMark

ALIKE = 64
"""How many owners of the very same prompt the index keeps."""
ALIKE_AT_FIRST = 6
"""How many owners of the same first pages are kept, the latest ones."""
KEPT_BYTES = 2**28
"""Of last prompts: those of the latest 3,300 conversations, if they are 20,000 tokens long."""


class PromptIndex:
    """Marks and their owners. A lookup takes one step for each page of the prompt, however many marks there are. A
    prompt is given as 4 bytes a token, with its `page_chain`.

    Nearly every mark is alone under its digest. There its owner alone is kept, which saves memory; where several marks
    share a digest, a dict leads from their tails to their owners.
    """

    def __init__(self, page_tokens: int) -> None:
        self._page_bytes = 4 * page_tokens
        self._owners: dict[bytes, Conversation | dict[bytes, tuple[Conversation, ...]]] = {}

    def mark(self, prompt: bytes, chain: list[bytes]) -> PromptMark:
        return PromptMark(chain[-1], prompt[(len(chain) - 1) * self._page_bytes :], len(prompt) // 4)

    def begins(self, mark: PromptMark, prompt: bytes, chain: list[bytes]) -> bool:
        """Whether a prompt begins with that of `mark`, and goes on."""
        end = 4 * mark.length
        full = end // self._page_bytes
        return end < len(prompt) and chain[full] == mark.digest and prompt[full * self._page_bytes : end] == mark.tail

    def add(self, mark: PromptMark, owner: Conversation) -> None:
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

    def remove(self, mark: PromptMark, owner: Conversation) -> None:
        """The index no longer finds `owner` by this prompt."""
        there = self._owners.get(mark.digest)
        if isinstance(there, dict):
            there[mark.tail] = tuple(other for other in there.get(mark.tail, ()) if other is not owner)
            if not there[mark.tail]:
                del there[mark.tail]
            if not there:
                del self._owners[mark.digest]
        elif there is owner:
            del self._owners[mark.digest]

    def longest(self, prompt: bytes, chain: list[bytes]) -> tuple[PromptMark, tuple[Conversation, ...]] | None:
        """The longest mark that a prompt begins with or is, and its owners."""
        size = self._page_bytes
        for behind, there in enumerate(map(self._owners.get, reversed(chain)), 1):
            if there is None:
                continue
            pages = len(chain) - behind
            rest = prompt[pages * size : (pages + 1) * size]
            if not isinstance(there, dict):
                mark = next(m for m in there.marks if m.digest == chain[pages])
                if rest.startswith(mark.tail):
                    return mark, (there,)
                continue
            for end in range(len(rest), -1, -4):
                if owners := there.get(rest[:end]):
                    return PromptMark(chain[pages], rest[:end], (pages * size + end) // 4), owners
        return None


class FirstPages:
    """Owners by a few pages of their first prompts, each four times as far in as the one before: which prompts share at
    least a quarter of what they share at most takes a few look-ups, and a kilobyte for each owner."""

    def __init__(self) -> None:
        self._owners: dict[bytes, list[Conversation]] = {}

    def add(self, chain: list[bytes], owner: Conversation) -> tuple[bytes, ...]:
        """Where `owner` stands now; `remove` wants that again."""
        places = tuple(chain[page] for page in _powers(4, len(chain)))
        for place in places:
            owners = self._owners.setdefault(place, [])
            owners.append(owner)
            del owners[:-ALIKE_AT_FIRST]
        return places

    def remove(self, places: tuple[bytes, ...], owner: Conversation) -> None:
        for place in places:
            self._owners[place] = [other for other in self._owners.get(place, ()) if other is not owner]
            if not self._owners[place]:
                del self._owners[place]

    def alike(self, chain: list[bytes]) -> list[Conversation]:
        """The owners that share the most of these pages, the latest first."""
        for page in reversed(_powers(4, len(chain))):
            if owners := self._owners.get(chain[page]):
                return owners[::-1]
        return []


class LastPrompts:
    """What was computed last of each conversation, prompt and answer: 4 bytes a token, at most `most` bytes in all."""

    def __init__(self, most: int = KEPT_BYTES) -> None:
        self._most = most
        self._kept: OrderedDict[str | int, bytes] = OrderedDict()
        self.size = 0

    def get(self, key: str | int) -> bytes:
        """Empty for one that is not kept (any more)."""
        return self._kept.get(key, b"")

    def put(self, key: str | int, tokens: bytes) -> None:
        """Keep `tokens` as the last ones of a conversation; none: forget them."""
        self.size += len(tokens) - len(self._kept.pop(key, b""))
        if tokens:
            self._kept[key] = tokens
        while self.size > self._most:
            self.size -= len(self._kept.popitem(last=False)[1])


class PrefixIndex:
    """The workers that have computed the first 1, 2, 4, 8, ... pages of prompts, for the last `capacity` of these
    prefixes: system prompts, and tasks that share a beginning.

    Powers of two: a prompt of a thousand pages leaves ten entries, most of them shared with others like it; what is
    found is at least half of what was there. Workers evict pages without a message: it is an estimate.
    """

    def __init__(self, capacity: int = 65_536) -> None:
        self._capacity = capacity
        self._workers: OrderedDict[bytes, set[str]] = OrderedDict()

    def add(self, chain: list[bytes], worker: str) -> None:
        """`worker` has computed the prompt with this `page_chain`."""
        for page in _powers(2, len(chain)):
            known = self._workers[chain[page]] = self._workers.pop(chain[page], set())
            known.add(worker)
        while len(self._workers) > self._capacity:
            self._workers.popitem(last=False)

    def find(self, chain: list[bytes]) -> list[tuple[int, Set[str]]]:
        """(pages, the workers that have computed at least so many of this prompt), the most pages first."""
        found: list[tuple[int, Set[str]]] = []
        for page in _powers(2, len(chain)):
            workers = self._workers.get(chain[page])
            if workers is None:
                break
            found.append((page, workers))
        return found[::-1]

    def drop(self, worker: str) -> None:
        for known in self._workers.values():
            known.discard(worker)


class Known(dict[str, int]):
    """Tokens of a prompt that each worker probably holds: set, or by what `PrefixIndex` has `found`, when asked for."""

    def __init__(self, found: list[tuple[int, Set[str]]], page_tokens: int) -> None:
        self._found = found
        self._page_tokens = page_tokens

    def __missing__(self, worker: str) -> int:
        for pages, workers in self._found:
            if worker in workers:
                return pages * self._page_tokens
        return 0

    @property
    def best(self) -> Set[str]:
        """The workers that hold the most of what others have computed."""
        return self._found[0][1] if self._found else frozenset()


def _powers(base: int, pages: int) -> list[int]:
    """1, `base`, its square, ... below `pages`."""
    return [power for power in (base**n for n in range(pages.bit_length())) if power < pages]


def common_run(before: bytes, tokens: bytes) -> int:
    """How many tokens two prompts begin with alike."""
    import numpy as np  # not at the top: see observations.py

    if tokens.startswith(before):
        return len(before) // 4
    n = min(len(before), len(tokens)) // 4
    differ = np.frombuffer(before, np.int32, n) != np.frombuffer(tokens, np.int32, n)
    at = int(differ.argmax()) if n else 0
    return at if n and differ[at] else n


def page_chain(tokens: Sequence[int], salt: str, page_tokens: int) -> list[bytes]:
    """The chain hashes of a prompt's full pages, after the hash that stands for no token at all."""
    root = root_hash("", salt)
    return [root, *page_hashes(root, tokens, page_tokens)]
