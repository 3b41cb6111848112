"""The page pool with host memory behind it: bytes come back as they went, and what is needed least is dropped."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from miniserve.cluster.messages import Keep
from miniserve.kv.eviction import UNKNOWN, ExpectedNeed, make_order
from miniserve.kv.host import HostPool
from miniserve.kv.memory import KVMemory, PageShape
from miniserve.kv.pages import Evicted, PagePool
from miniserve.kv.swap import SwapSpace
from tests.support.one_token_pages import KEEPS, LATER, SOON, Turn, cache, hashes
from tests.support.whole import check_pool


class PoolAndHost(RuleBasedStateMachine):
    """Conversations over a pool with host memory behind it, as the engine uses them. A page holds one token; its bytes
    are a number made of its hash. With `at_once` a turn registers its pages before another one starts, and then no page
    is ever there twice."""

    @initialize(pages=st.integers(1, 12), slots=st.integers(1, 12), lru=st.booleans(), at_once=st.booleans())
    def make(self, pages: int, slots: int, lru: bool, at_once: bool) -> None:
        memory = KVMemory(PageShape(1, 1, 1, 1, torch.int64), pages, torch.device("cpu"))
        order = "lru" if lru else "expected"
        self.bytes = memory.pages.view(pages, -1)
        self.host = HostPool(SwapSpace(memory, slots), make_order(order))
        self.pool = PagePool(pages, make_order(order), on_evict=self.evict)
        self.at_once = at_once
        self.now = 1.0
        self.turns: list[Turn] = []
        self.stored = self.restored = 0

    def evict(self, evicted: Evicted, now: float) -> None:
        assert self.pool._refs[evicted.page] == 0
        assert self.pool._page_of[evicted.digest] == evicted.page
        assert now == self.now
        known = self.host._page_of.get(evicted.digest)
        self.host.store(evicted, now)
        self.stored += known is None and evicted.digest in self.host._page_of

    @rule(seconds=st.sampled_from([0.1, 1.5, 40.0, 1000.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=8), keep=KEEPS)
    def start(self, tokens: list[int], keep: Keep) -> None:
        chain = hashes(*tokens)
        pages = self.pool.match(chain)
        slots = self.host.match(chain[len(pages) :], UNKNOWN)
        found = len(pages) + len(slots)
        if len(tokens) - len(pages) > self.pool.num_available:
            self.pool.release(pages, keep, self.now)
            self.host.release(slots, keep, self.now)
            return
        pages += self.pool.allocate(len(tokens) - len(pages), self.now)
        if slots:
            self.host.restore(slots, pages[found - len(slots) : found], self.now)
            self.restored += len(slots)
        for page, digest in zip(pages[:found], chain[:found], strict=True):
            assert self.holds(self.bytes[page], digest), "found, but of other tokens"
        for page, digest in zip(pages[found:], chain[found:], strict=True):
            self.bytes[page] = int.from_bytes(digest[:7])
        turn = Turn(tokens, pages, found - len(slots))
        self.turns.append(turn)
        self.register(turn, len(tokens) if self.at_once else found)

    @precondition(lambda self: self.turns)
    @rule(pick=st.integers(0, 1000), keep=KEEPS, finished=st.booleans())
    def end(self, pick: int, keep: Keep, finished: bool) -> None:
        turn = self.turns.pop(pick % len(self.turns))
        if finished:
            self.register(turn, len(turn.tokens))
        self.pool.release(turn.pages, keep, self.now)

    def register(self, turn: Turn, end: int) -> None:
        chain = hashes(*turn.tokens)
        for i in range(turn.named, end):
            self.pool.register(turn.pages[i], chain[i], chain[i - 1] if i else None)
        turn.named = end

    def holds(self, content: torch.Tensor, digest: bytes) -> bool:
        return content.tolist() == [int.from_bytes(digest[:7])] * 2

    @invariant()
    def nothing_is_lost(self) -> None:
        check_pool(self.pool)
        check_pool(self.host)
        held = {page for turn in self.turns for page in turn.pages}
        assert self.pool.num_held == len(held)
        assert self.pool.num_free + self.pool.num_cached + len(held) == self.pool.num_pages
        assert (self.host.offloaded, self.host.restored) == (self.stored, self.restored)

    @invariant()
    def what_has_a_name_holds_what_it_says(self) -> None:
        slots = self.host.slots.pages.view(self.host.num_pages, -1)
        assert all(self.holds(self.bytes[page], digest) for digest, page in self.pool._page_of.items())
        assert all(self.holds(slots[slot], digest) for digest, slot in self.host._page_of.items())
        for turn in self.turns:
            chain = hashes(*turn.tokens)
            assert all(self.holds(self.bytes[page], digest) for page, digest in zip(turn.pages, chain, strict=True))

    @invariant()
    def no_page_without_those_before_it(self) -> None:
        if self.at_once:
            parents = {self.pool._parent_of[page] for page in self.pool._page_of.values()} - {None}
            assert parents <= self.pool._page_of.keys()

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for turn in self.turns:
                self.pool.release(turn.pages, UNKNOWN, self.now)
            self.turns = []
            self.nothing_is_lost()
            self.pool.clear()
            assert self.pool.num_free == self.pool.num_pages


TestPoolAndHost = PoolAndHost.TestCase
TestPoolAndHost.settings = settings(max_examples=150, stateful_step_count=40)


class Offloading:
    """A pool of `pages` and a host pool of `slots`; the bytes of a page are a number that its writer chose."""

    def __init__(self, pages: int, slots: int, seconds_a_copy: float = 0.0) -> None:
        self.now = 0.0
        self.seconds_a_copy = seconds_a_copy
        memory = KVMemory(PageShape(1, 1, 1, 1, torch.int64), pages, torch.device("cpu"))
        self.bytes = memory.pages.view(pages, -1)
        swap = SwapSpace(memory, slots)
        swap.clock = self.clock
        self.host = HostPool(swap, ExpectedNeed())
        self.pool = PagePool(pages, ExpectedNeed(), on_evict=self.host.store)

    def clock(self) -> float:
        self.now += self.seconds_a_copy / 2
        return self.now

    def cache(self, *tokens: int, keep: Keep = UNKNOWN, now: float = 0.0) -> None:
        for page, token in zip(cache(self.pool, *tokens, keep=keep, now=now), tokens, strict=True):
            self.bytes[page] = token

    def evict(self, count: int, now: float = 0.0) -> None:
        """Make the pool forget what it must to give away so many pages."""
        self.pool.release(self.pool.allocate(count, now), UNKNOWN, now)

    def restored(self, *tokens: int, keep: Keep = UNKNOWN, now: float = 0.0) -> list[int]:
        """What comes back of a sequence that the pool has forgotten."""
        slots = self.host.match(hashes(*tokens), keep)
        pages = self.pool.allocate(len(slots), now)
        if slots:
            self.host.restore(slots, pages, now)
        content = [int(self.bytes[page, 0]) for page in pages]
        self.pool.release(pages, UNKNOWN, now)
        return content


def test_evicted_pages_come_back_with_their_bytes() -> None:
    both = Offloading(3, 4)
    both.cache(1, 2, 3)
    both.evict(3)
    assert both.pool.num_cached == 0
    assert both.restored(1, 2, 3) == [1, 2, 3]
    assert (both.host.offloaded, both.host.restored, both.host.num_used, both.host.num_pages) == (3, 3, 3, 4)
    assert both.restored(2, 3) == []


def test_a_full_host_drops_what_is_needed_least() -> None:
    both = Offloading(6, 4)
    both.cache(1, 2, keep=SOON, now=10.0)
    both.cache(3, 4, keep=LATER, now=10.0)
    both.cache(5, 6, keep=Keep("third", gap=50.0, page_seconds=0.1), now=10.0)
    both.evict(6, 11.0)  # evicted as: 4 3 6 5 2 1
    assert both.restored(3, 4, now=11.0) == []
    assert both.restored(5, 6, now=11.0) == [5, 6]
    assert both.restored(1, 2, now=11.0) == [1, 2]
    check_pool(both.host)


def test_a_conversation_is_due_no_later_for_having_been_evicted() -> None:
    both = Offloading(4, 4)
    both.cache(1, 2, keep=Keep("a", gap=100.0, page_seconds=0.1), now=10.0)  # due at 110
    both.cache(3, 4, keep=Keep("b", gap=60.0, page_seconds=0.1), now=40.0)  # due at 100
    both.evict(4, 45.0)
    both.cache(5, 6, keep=Keep("c", gap=9.0), now=117.0)
    both.evict(4, 118.0)
    assert both.restored(3, 4, now=118.0) == []
    assert both.restored(1, 2, now=118.0) == [1, 2]


def test_a_shared_beginning_goes_last_from_the_host_too() -> None:
    both = Offloading(6, 4)
    both.cache(9, 8, 1, keep=SOON, now=10.0)
    both.cache(9, 8, 2, keep=LATER, now=10.0)
    both.evict(6, 11.0)
    assert both.host.num_used == 4
    both.cache(5, 6, keep=Keep("c", gap=9.0), now=410.0)
    both.evict(6, 411.0)  # the first one has not come for 400 s, the second is due in 100 s
    assert both.restored(9, 8, 1, now=411.0) == [9, 8]


def test_copies_of_what_was_restored_go_first() -> None:
    both = Offloading(4, 4)
    both.cache(1, 2, keep=SOON, now=1.0)
    both.cache(3, 4, keep=LATER, now=1.0)
    both.evict(4, 2.0)
    both.restored(1, 2, now=2.0)
    both.cache(5, 6, keep=Keep("third", gap=900.0), now=2.0)
    both.evict(4, 3.0)
    assert both.restored(1, 2, now=3.0) == []
    assert both.restored(3, 4, now=3.0) == [3, 4]
    assert both.restored(5, 6, now=3.0) == [5, 6]


def test_a_copy_that_is_still_there_is_not_made_again() -> None:
    both = Offloading(2, 4)
    both.cache(1, 2, keep=SOON, now=1.0)
    both.evict(2, 2.0)
    slots, pages = both.host.match(hashes(1, 2), UNKNOWN), both.pool.allocate(2, 2.0)
    both.host.restore(slots, pages, 2.0)
    for page, digest in zip(pages, hashes(1, 2), strict=True):
        both.pool.register(page, digest)
    both.pool.release(pages, SOON, 3.0)
    both.evict(2, 4.0)
    assert (both.host.offloaded, both.host.num_used) == (2, 2)
    # It is one of those that are needed again, not the first to go.
    both.cache(3, 4, keep=LATER, now=4.0)
    both.evict(2, 4.0)
    both.cache(5, 6, keep=LATER, now=4.0)
    both.evict(2, 4.5)
    assert both.restored(1, 2, now=4.5) == [1, 2]


def test_slots_about_to_be_restored_are_not_given_away() -> None:
    both = Offloading(2, 2)
    both.cache(1, 2)
    both.evict(2)
    both.cache(3, 4)
    assert both.restored(1, 2) == [1, 2]  # evicts 3 and 4, for which there is no room
    assert both.host.offloaded == 2
    check_pool(both.host)


def test_what_is_computed_sooner_than_copied_is_not_restored() -> None:
    both = Offloading(2, 2, seconds_a_copy=0.5)
    both.cache(1, 2)
    both.evict(2)
    assert both.host.slots.page_seconds == pytest.approx(0.25)  # the clock is read twice
    assert both.restored(1, 2, keep=Keep("a", page_seconds=0.2)) == []
    assert both.restored(1, 2, keep=Keep("a", page_seconds=0.3)) == [1, 2]
    assert both.restored(1, 2, keep=UNKNOWN) == [1, 2]


def test_the_seconds_of_a_copy_are_a_running_average_of_pages() -> None:
    both = Offloading(4, 4, seconds_a_copy=0.4)
    both.cache(1, 2, 3, 4)
    both.evict(4)
    assert both.host.slots.page_seconds == pytest.approx(0.2)
    both.restored(1, 2, 3, 4)  # 0.2 s for all of them
    assert both.host.slots.page_seconds == pytest.approx(0.2 + (0.05 - 0.2) / 8)


def test_a_cleared_host_has_nothing() -> None:
    both = Offloading(2, 2)
    both.cache(1, 2)
    both.evict(2)
    both.host.clear()
    assert both.restored(1, 2) == []
    assert (both.host.num_used, both.host.offloaded, both.host.restored) == (0, 0, 0)
