"""Which page is whose: reference counts, the prefix cache over full pages, and what to evict.

Bookkeeping only: page numbers in, page numbers out; the bytes are in `kv/memory.py`, the time comes from the caller.
Every page is in exactly one of three states: free (holds nothing), cached (holds a known prefix, nobody uses it), held
(referenced at least once).

Cached pages stand in groups, one for each conversation, and go in the order of least worth: expected need (`need`)
times the cost of computing them. Three rules keep that cheap and harmless:

- A page belongs to whom it was released for last. When its turn comes and other pages build on it, whoever's, it is set
  aside, and goes with the last of them: a system prompt outlives all conversations that begin with it.
- Within a group, pages go least recently used first, the end of a prefix before its beginning.
- Pages of no known conversation are a group too, in the order of their release. They count as the average conversation
  at the moment it is due, and the later the longer ago they were released.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from typing import Literal, NamedTuple

from miniserve.cluster.messages import Keep

Order = Literal["expected", "lru"]

UNKNOWN = Keep()
"""Of pages whose conversation is not known."""
RANKING_SECONDS = 1.0
"""How long groups are evicted in the order of what they were worth, unless they are touched. To find that order takes
time in proportion to their number."""


class OutOfPages(RuntimeError):
    """More pages were asked for than are free or evictable."""


class Evicted(NamedTuple):
    """A page about to be given away: the name of what it holds and of what comes before that, and whose it was, as
    `release` was told."""

    page: int
    digest: bytes
    parent: bytes | None
    keep: Keep
    end: float


def need(keep: Keep, elapsed: float) -> float:
    """How much the KV of a conversation is needed `elapsed` seconds after the end of its turn: the chance that it
    returns, divided by the expected wait until then in seconds.

    The wait is what is left of the gap; a conversation that is late is expected to take as long again as it is late.
    The later, the less likely it returns at all: let half of the returns that are still open come within each further
    gap, then a share s = 2^(-late/gap) of them is left, and Bayes makes c s / (1 - c + c s) of the chance c.
    """
    late = max(0.0, elapsed - keep.gap)
    still = 2.0 ** -min(late / keep.gap, 1000.0)  # not 0, which would make 0/0 of a chance of 1
    chance = keep.chance * still / (1.0 - keep.chance + keep.chance * still)
    # Nobody returns to the second: around the expected moment small differences mean nothing.
    return chance / max(abs(keep.gap - elapsed), keep.gap / 10 + 1.0)


@dataclass
class _Group:
    """Cached pages of one conversation ("": of unknown ones), the next to be evicted first, with the time each was
    released."""

    name: str
    keep: Keep
    touched: float
    pages: OrderedDict[int, float] = field(default_factory=OrderedDict)

    @property
    def end(self) -> float:
        """When the conversation's last turn ended; unknown ones have an end each."""
        return self.touched if self.name else next(iter(self.pages.values()))


class PagePool:
    """Reference-counted pages with a hash-addressed prefix cache.

    A page's content is immutable once it is registered under its hash, so several sequences may hold it at once.
    Unreferenced pages are evicted by expected need, or with `order` "lru" the least recently used first. `on_evict`
    hears of each while it still holds its content, with the time. Times are seconds on any one clock; who does not know
    it leaves it out, which means the latest the pool has heard of.
    """

    def __init__(
        self,
        num_pages: int,
        *,
        caching: bool = True,
        order: Order = "expected",
        on_evict: Callable[[Evicted, float], None] | None = None,
    ) -> None:
        self.num_pages = num_pages
        self.caching = caching
        self._order = order
        self._on_evict = on_evict
        self._refs = [0] * num_pages
        self._hash_of: list[bytes | None] = [None] * num_pages
        self._parent_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._children: dict[bytes, int] = {}
        """How many named pages follow directly on what a hash stands for; those with none are missing."""
        self._free = list(range(num_pages - 1, -1, -1))
        self._groups: dict[str, _Group] = {}
        """None of them is empty."""
        self._aside = _Group("", UNKNOWN, 0.0)
        """Pages whose turn to go had come while others built on them."""
        self._group_of: dict[int, _Group] = {}
        """Where each cached page stands."""
        self._ranking: list[tuple[float, int, float, _Group]] = []
        """A heap of what groups were worth when they had that end; made anew now and then."""
        self._ranked = 0.0
        self._typical = UNKNOWN
        """The average conversation at that time."""
        self._now = 0.0

    @property
    def num_free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages that hold a prefix nobody is using: the next allocation may take them."""
        return len(self._group_of)

    @property
    def num_available(self) -> int:
        """Pages an allocation could have now."""
        return len(self._free) + len(self._group_of)

    @property
    def num_held(self) -> int:
        """Pages referenced at least once."""
        return self.num_pages - self.num_available

    def allocate(self, count: int, now: float = 0.0) -> list[int]:
        """`count` pages with one reference each and undefined content, unused prefixes evicted if needed.

        Raises `OutOfPages`, and then changes nothing.
        """
        if count > self.num_available:
            raise OutOfPages(f"{count} pages asked for, {self.num_available} available of {self.num_pages}")
        self._now = max(self._now, now)
        pages = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._refs[page] = 1
            pages.append(page)
        return pages

    def match(self, hashes: list[bytes]) -> list[int]:
        """The pages of the longest cached prefix of the chain `hashes`, each with a reference more.

        Give them back with `release`.
        """
        pages = []
        for digest in hashes:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        for page in pages:
            if self._refs[page] == 0:
                self._take(page)
            self._refs[page] += 1
        return pages

    def register(self, page: int, digest: bytes, parent: bytes | None = None) -> None:
        """Make a held, full page findable under its chain hash; `parent` is that of the page before it.

        Where another page has that name already, it stays.
        """
        assert self._refs[page] > 0, "only a held page has content worth naming"
        if self.caching and digest not in self._page_of and self._hash_of[page] is None:
            self._page_of[digest] = page
            self._hash_of[page] = digest
            if parent is not None and self._order == "expected":
                self._parent_of[page] = parent
                self._children[parent] = self._children.get(parent, 0) + 1

    def release(self, pages: list[int], keep: Keep = UNKNOWN, now: float = 0.0) -> None:
        """Drop one reference of each page. Those nobody holds any more become cached, or free if they have no name.

        Pages are given in the order of the sequence; the end of a prefix is evicted before its beginning, since a
        page is of no use without those before it. `keep` tells what is known of the conversation whose turn ends `now`.
        """
        self._now = max(self._now, now)
        end = now or self._now
        if (name := self._name(keep)) and (group := self._groups.get(name)):
            group.keep, group.touched = keep, end
        for page in reversed(pages):
            assert self._refs[page] > 0, f"page {page} released more often than it was taken"
            self._refs[page] -= 1
            if self._refs[page] == 0:
                if self._hash_of[page] is None:
                    self._free.append(page)
                else:
                    self._put(page, keep, end)

    def clear(self) -> None:
        """Forget all cached prefixes; held pages stay and keep their names."""
        for page in list(self._group_of):
            self._take(page)
            self._forget(page)
            self._free.append(page)

    def check(self) -> None:
        """Raise AssertionError if a page is lost, doubled or miscounted (for tests; linear in the pool)."""
        free = set(self._free)
        assert len(free) == len(self._free)
        assert not free & set(self._group_of)
        for page in range(self.num_pages):
            unused = page in self._group_of or page in free
            assert (self._refs[page] == 0) == unused, f"page {page} has {self._refs[page]} references"
        assert self.num_free + self.num_cached + self.num_held == self.num_pages
        assert all(self._hash_of[page] == digest for digest, page in self._page_of.items())
        groups = [*self._groups.values(), self._aside]
        assert {page: id(group) for group in groups for page in group.pages} == {
            page: id(group) for page, group in self._group_of.items()
        }
        assert sum(len(group.pages) for group in groups) == self.num_cached
        assert all(group.pages and group.name == name for name, group in self._groups.items())
        parents = [self._parent_of[page] for page in self._page_of.values()]
        assert self._children == {parent: parents.count(parent) for parent in parents if parent is not None}

    # --- which page goes --------------------------------------------------------------------------------------------

    def _evict(self) -> int:
        """Take the cached page that is needed least, and its name. There must be one."""
        while True:
            # Set aside and yet nothing else left: what builds on it is held, by somebody with a copy of his own of it.
            group = self._least_worth() if self._groups else self._aside
            page = next(iter(group.pages))
            digest, parent, keep, end = self._hash_of[page], self._parent_of[page], group.keep, group.end
            assert digest is not None
            if digest not in self._children or group is self._aside:
                break
            self._take(page)
            self._aside.pages[page] = end
            self._group_of[page] = self._aside
        if self._on_evict is not None:
            self._on_evict(Evicted(page, digest, parent, keep, end), self._now)
        self._forget(page)
        if parent is not None and parent not in self._children:
            before = self._page_of.get(parent, -1)
            if before in self._aside.pages:
                self._take(before)
                self._put(before, keep, end)
        self._take(page)  # last, so that its group lives on in what was set aside
        return page

    def _least_worth(self) -> _Group:
        """The group whose pages are worth least, by the last ranking; one that has changed since is ranked again."""
        if len(self._groups) == 1:
            return next(iter(self._groups.values()))
        if not self._ranking or self._now - self._ranked >= RANKING_SECONDS:
            self._ranked = self._now
            self._typical = self._average()
            self._ranking = [(self._worth(group), i, group.end, group) for i, group in enumerate(self._groups.values())]
            heapify(self._ranking)
        while self._ranking:
            _, i, end, group = self._ranking[0]
            if not group.pages:
                heappop(self._ranking)
            elif group.end != end:
                heapreplace(self._ranking, (self._worth(group), i, group.end, group))
            else:
                return group
        return self._least_worth()  # all that were ranked are gone

    def _worth(self, group: _Group) -> float:
        """What the next page of a group is worth now: its need times the seconds to compute a page."""
        elapsed = self._now - group.end
        if group.name:
            return need(group.keep, elapsed) * (group.keep.page_seconds or self._typical.page_seconds)
        return need(self._typical, self._typical.gap + elapsed) * self._typical.page_seconds

    def _average(self) -> Keep:
        """The average of the conversations that have pages here and may return; any one if there are none."""
        keeps = [group.keep for group in self._groups.values() if group.name and group.keep.chance]
        if not keeps:
            return Keep(gap=1.0, page_seconds=1.0)
        seconds = [keep.page_seconds for keep in keeps if keep.page_seconds]
        return Keep(
            gap=sum(keep.gap for keep in keeps) / len(keeps),
            chance=sum(keep.chance for keep in keeps) / len(keeps),
            page_seconds=sum(seconds) / len(seconds) if seconds else 1.0,
        )

    def _name(self, keep: Keep) -> str:
        """Of the group for pages released with `keep`. Nothing is expected of a conversation without a gap."""
        return keep.conversation if self._order == "expected" and keep.gap > 0 else ""

    def _put(self, page: int, keep: Keep, end: float) -> None:
        """An unreferenced page joins its conversation's group, as the last to go."""
        name = self._name(keep)
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = _Group(name, keep if name else UNKNOWN, end)
        group.pages[page] = end
        self._group_of[page] = group

    def _take(self, page: int) -> None:
        """A cached page leaves its group."""
        group = self._group_of.pop(page)
        del group.pages[page]
        if not group.pages and group is not self._aside:
            del self._groups[group.name]

    def _forget(self, page: int) -> None:
        """A page loses its name."""
        digest, parent = self._hash_of[page], self._parent_of[page]
        assert digest is not None
        del self._page_of[digest]
        self._hash_of[page] = self._parent_of[page] = None
        if parent is not None:
            self._children[parent] -= 1
            if not self._children[parent]:
                del self._children[parent]
