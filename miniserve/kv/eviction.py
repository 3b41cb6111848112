"""Which cached page goes first: by the expected need of its conversation (default), or the least recently used. Times
are seconds on the clock of the engine that calls."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from typing import Literal

from miniserve.cluster.messages import Keep

UNKNOWN = Keep()
RANKING_SECONDS = 1.0
"""How long groups go in the order of what they were worth, unless touched: finding that takes time for each group."""


def need(keep: Keep, elapsed: float) -> float:
    """How much the KV of a conversation is needed `elapsed` seconds after the end of its turn: the chance that the
    conversation returns, divided by the expected wait until then in seconds.

    The wait is what is left of the gap; a conversation that is late is expected to take as long again as it is late.
    The later, the less likely it returns at all: let half of the returns that are still open come within each further
    gap, then a share s = 2^(-late/gap) of them is left, and Bayes makes c s / (1 - c + c s) of the chance c.
    """
    late = max(0.0, elapsed - keep.gap)
    still = 2.0 ** -min(late / keep.gap, 1000.0)  # not 0, which would make 0/0 of a chance of 1
    chance = keep.chance * still / (1.0 - keep.chance + keep.chance * still)
    # A return is never predicted to the second: around the expected moment small differences mean nothing.
    return chance / max(abs(keep.gap - elapsed), keep.gap / 10 + 1.0)


@dataclass
class Group:
    """Cached pages of one conversation, the next to be evicted first, with the time at which each was released. The
    group without a `name` holds the pages of all unknown conversations."""

    name: str
    keep: Keep
    touched: float
    pages: OrderedDict[int, float] = field(default_factory=OrderedDict)

    @property
    def end(self) -> float:
        """When the conversation's last turn ended; an unknown conversation's turn ended when its page was released."""
        return self.touched if self.name else next(iter(self.pages.values()))


class ExpectedNeed:
    """The cached pages of one pool. Groups of them, one for each conversation, are evicted in the order of least worth:
    expected `need` times the cost of computing the pages. Three rules keep that cheap and harmless:

    - A page belongs to the conversation that released it last. When its turn to go comes and pages of any conversation
      build on it, it is set aside, and goes with the last of them: a system prompt outlives all conversations that
      begin with it.
    - Within a group, pages go least recently used first, the end of a prefix before its beginning.
    - Pages of unknown conversations are one group, in the order of their release. They count as an average
      conversation that was due at the moment of their release.
    """

    def __init__(self, lru: bool = False) -> None:
        """With `lru` pages of all conversations go in the order of their release, also those that others build on."""
        self.lru = lru
        self._groups: dict[str, Group] = {}
        """None of them is empty."""
        self._aside = Group("", UNKNOWN, 0.0)
        """Pages whose turn to go came while others built on them."""
        self._group_of: dict[int, Group] = {}
        self._ranking: list[tuple[float, int, float, Group]] = []
        """A heap of (worth, tie-breaker, the group's `end` at that time, group), made anew after `RANKING_SECONDS`."""
        self._ranked = 0.0  # when the heap was built
        self._typical = UNKNOWN  # the average conversation at that time

    def __len__(self) -> int:
        return len(self._group_of)

    def release(self, pages: list[int], keep: Keep, now: float) -> None:
        """A turn of the conversation ends: the pages join its group as the last to go, whose `keep` this is now."""
        name = self._name(keep)
        if not pages and name not in self._groups:
            return
        group = self._groups.setdefault(name, Group(name, UNKNOWN, now))
        if name:
            group.keep, group.touched = keep, now
        for page in pages:
            self._move(page, group, now)

    def remove(self, page: int) -> None:
        """The page is not cached any more."""
        group = self._group_of.pop(page)
        del group.pages[page]
        if not group.pages and group is not self._aside:
            del self._groups[group.name]

    def choose(self, now: float, has_children: Callable[[int], bool]) -> tuple[int, Keep, float]:
        """The page to be evicted next, which stays until `remove`; what was said of its conversation, and when its last
        turn ended. There must be a cached page. A page has children while the pool knows pages that follow on it."""
        while self._groups:
            group = self._least_worth(now)
            page, end = next(iter(group.pages)), group.end
            if self.lru or not has_children(page):
                return page, group.keep, end
            self.remove(page)
            self._move(page, self._aside, end)
        # Only pages that were set aside are left. What builds on them is held, by sequences that computed these pages
        # once more for themselves.
        page, end = next(iter(self._aside.pages.items()))
        return page, UNKNOWN, end

    def owner(self, page: int) -> str | None:
        """The conversation that a cached page belongs to, "" for unknown ones; None for a page that is not cached."""
        group = self._group_of.get(page)
        return None if group is None else group.name

    def pages_of(self, conversation: str) -> list[int]:
        """The cached pages that belong to a conversation."""
        group = self._groups.get(conversation) if conversation else None
        return [*group.pages] if group else []

    def childless(self, page: int, last_child: int) -> None:
        """`last_child`, just chosen, is about to go, and no other child of `page`, cached or not, is left: if the page
        was set aside, it joins that child's group."""
        if page in self._aside.pages:
            self.remove(page)
            group = self._group_of[last_child]
            self.release([page], group.keep, group.end)

    def _name(self, keep: Keep) -> str:
        """The name of the group for pages released with `keep`. Nothing is expected of a conversation without a gap."""
        return keep.conversation if keep.gap > 0 and not self.lru else ""

    def _move(self, page: int, group: Group, end: float) -> None:
        group.pages[page] = end
        self._group_of[page] = group

    def _least_worth(self, now: float) -> Group:
        """The group that was worth least at the last ranking; a group that has changed since is ranked again."""
        if len(self._groups) == 1:
            return next(iter(self._groups.values()))
        if not self._ranking or now - self._ranked >= RANKING_SECONDS:
            self._ranked = now
            self._typical = _average([group.keep for group in self._groups.values() if group.name])
            self._ranking = [
                (self._worth(group, now), i, group.end, group) for i, group in enumerate(self._groups.values())
            ]
            heapify(self._ranking)
        while self._ranking:
            _, i, end, group = self._ranking[0]
            if not group.pages:
                heappop(self._ranking)
            elif group.end != end:
                heapreplace(self._ranking, (self._worth(group, now), i, group.end, group))
            else:
                return group
        return self._least_worth(now)  # all that were ranked are gone

    def _worth(self, group: Group, now: float) -> float:
        """What the next page of a group is worth now: its need times the seconds to compute a page."""
        elapsed = now - group.end
        if group.name:
            return need(group.keep, elapsed) * (group.keep.page_seconds or self._typical.page_seconds)
        return need(self._typical, self._typical.gap + elapsed) * self._typical.page_seconds


def make_order(name: Literal["expected", "lru"]) -> ExpectedNeed:
    return ExpectedNeed(lru=name == "lru")


def _average(keeps: list[Keep]) -> Keep:
    """The average of those conversations that may return; arbitrary numbers if there are none."""
    keeps = [keep for keep in keeps if keep.chance]
    if not keeps:
        return Keep(gap=1.0, page_seconds=1.0)
    seconds = [keep.page_seconds for keep in keeps if keep.page_seconds]
    return Keep(
        gap=sum(keep.gap for keep in keeps) / len(keeps),
        chance=sum(keep.chance for keep in keeps) / len(keeps),
        page_seconds=sum(seconds) / len(seconds) if seconds else 1.0,
    )
