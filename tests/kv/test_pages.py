"""The page pool against a plain model of it, and with host memory behind it: no leak, no double use, evictions in the
right order, and bytes that come back as they went."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from miniserve.cluster.messages import Keep
from miniserve.kv.hashing import page_hashes, root_hash
from miniserve.kv.host import HostPool
from miniserve.kv.memory import KVMemory, PageShape
from miniserve.kv.pages import RANKING_SECONDS, UNKNOWN, Evicted, Order, OutOfPages, PagePool, need

ROOT = root_hash("tiny")
PICK = st.integers(0, 1000)
KEEPS = st.builds(
    Keep,
    conversation=st.sampled_from("abcdef"),
    gap=st.sampled_from([0.0, 2.0, 30.0, 600.0]),
    chance=st.sampled_from([0.0, 0.3, 1.0]),
    page_seconds=st.sampled_from([0.0, 0.01, 0.1]),
)


class Turn:
    """A sequence that holds pages, the first `named` of which are registered. A page holds one token."""

    def __init__(self, tokens: list[int], pages: list[int], named: int) -> None:
        self.tokens = tokens
        self.pages = pages
        self.named = named


class Pool(RuleBasedStateMachine):
    """Turns come, register their pages one by one, and go. `memory` is what the pages hold: every token up to their
    end, written by whoever was given them. Pages of unknown conversations go in the order of their use, and with `lru`
    all pages do, whatever is known."""

    @initialize(num_pages=st.integers(1, 10), caching=st.booleans(), lru=st.booleans())
    def make(self, num_pages: int, caching: bool, lru: bool) -> None:
        self.pool = PagePool(num_pages, caching=caching, order="lru" if lru else "expected")
        self.lru = lru
        self.memory: list[tuple[int, ...] | None] = [None] * num_pages
        self.refs = [0] * num_pages
        self.named: dict[bytes, int] = {}
        self.unused: list[int] = []  # named pages nobody holds, the next to be evicted first
        self.turns: list[Turn] = []

    # --- what a worker does ---

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=7))
    def start(self, tokens: list[int]) -> None:
        hashes = page_hashes(ROOT, tokens, 1)
        pages = self.pool.match(hashes)
        known = [self.named.get(digest) for digest in hashes] + [None]
        assert pages == known[: known.index(None)], "not the longest cached prefix"
        for end, page in enumerate(pages, 1):
            assert self.memory[page] == tuple(tokens[:end]), "a page that holds something else"
            self.refs[page] += 1
            if page in self.unused:
                self.unused.remove(page)
        found = len(pages)
        try:
            pages += self.allocate(len(tokens) - found)
        except OutOfPages:
            self.release(pages)
            return
        for end in range(found, len(tokens)):
            self.memory[pages[end]] = tuple(tokens[: end + 1])
        self.turns.append(Turn(tokens, pages, found))

    @precondition(lambda self: self.turns)
    @rule(pick=PICK)
    def register(self, pick: int) -> None:
        turn = self.turns[pick % len(self.turns)]
        if turn.named < len(turn.pages):
            chain = page_hashes(ROOT, turn.tokens, 1)
            page, digest = turn.pages[turn.named], chain[turn.named]
            self.pool.register(page, digest, chain[turn.named - 1] if turn.named and self.lru else None)
            if self.pool.caching:
                self.named.setdefault(digest, page)
            turn.named += 1

    @precondition(lambda self: self.turns)
    @rule(pick=PICK, keep=KEEPS)
    def end(self, pick: int, keep: Keep) -> None:
        self.release(self.turns.pop(pick % len(self.turns)).pages, keep if self.lru else UNKNOWN)

    @rule(more=st.integers(1, 3))
    def ask_for_too_many(self, more: int) -> None:
        before = copy.deepcopy(vars(self.pool))
        with pytest.raises(OutOfPages):
            self.pool.allocate(self.pool.num_available + more)
        assert vars(self.pool) == before

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        self.named = {digest: page for digest, page in self.named.items() if self.refs[page]}
        self.unused = []

    # --- the same in the model ---

    def allocate(self, count: int) -> list[int]:
        free = self.refs.count(0) - len(self.unused)
        pages = self.pool.allocate(count)
        assert len(set(pages)) == count
        assert not any(self.refs[page] for page in pages), "a page that somebody holds was given away"
        evicted = self.unused[: max(0, count - free)]
        assert {page for page in pages if page in self.unused} == set(evicted), "not the oldest, or not needed"
        self.unused = self.unused[len(evicted) :]
        self.named = {digest: page for digest, page in self.named.items() if page not in evicted}
        for page in pages:
            self.refs[page] = 1
            self.memory[page] = None
        return pages

    def release(self, pages: list[int], keep: Keep = UNKNOWN) -> None:
        self.pool.release(pages, keep)
        for page in reversed(pages):
            self.refs[page] -= 1
            if not self.refs[page] and page in self.named.values():
                self.unused.append(page)

    # --- what always holds ---

    @invariant()
    def nothing_is_lost(self) -> None:
        self.pool.check()
        held = len(self.refs) - self.refs.count(0)
        assert self.pool.num_held == held
        assert self.pool.num_cached == len(self.unused)
        assert self.pool.num_free == len(self.refs) - held - len(self.unused)
        assert self.pool.num_available == self.pool.num_free + self.pool.num_cached

    @invariant()
    def every_turn_has_its_own_content(self) -> None:
        for turn in self.turns:
            for end, page in enumerate(turn.pages, 1):
                assert self.memory[page] == tuple(turn.tokens[:end])

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for turn in self.turns:
                self.release(turn.pages)
            self.turns = []
            self.nothing_is_lost()
            assert self.pool.num_held == 0


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40)


class PoolAndHost(RuleBasedStateMachine):
    """Conversations over a pool with host memory behind it, as the engine uses them. A page holds one token; its bytes
    are a number made of its hash. With `at_once` a turn registers its pages before another one starts, and then no page
    is ever there twice."""

    @initialize(pages=st.integers(1, 12), slots=st.integers(1, 12), lru=st.booleans(), at_once=st.booleans())
    def make(self, pages: int, slots: int, lru: bool, at_once: bool) -> None:
        memory = KVMemory(PageShape(1, 1, 1, 1, torch.int64), pages, torch.device("cpu"))
        order = "lru" if lru else "expected"
        self.bytes = memory.pages.view(pages, -1)
        self.host = HostPool(memory, slots, order=order)
        self.pool = PagePool(pages, order=order, on_evict=self.evict)
        self.at_once = at_once
        self.now = 1.0
        self.turns: list[Turn] = []
        self.stored = self.restored = 0

    def evict(self, evicted: Evicted, now: float) -> None:
        assert self.pool._refs[evicted.page] == 0
        assert self.pool._page_of[evicted.digest] == evicted.page
        assert now == self.now
        known = self.host.pool._page_of.get(evicted.digest)
        self.host.store(evicted, now)
        self.stored += known is None and evicted.digest in self.host.pool._page_of

    @rule(seconds=st.sampled_from([0.1, 1.5, 40.0, 1000.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=8), keep=KEEPS)
    def start(self, tokens: list[int], keep: Keep) -> None:
        chain = page_hashes(ROOT, tokens, 1)
        pages = self.pool.match(chain)
        slots = self.host.match(chain[len(pages) :], UNKNOWN)
        found = len(pages) + len(slots)
        if len(tokens) - len(pages) > self.pool.num_available:
            self.pool.release(pages, keep, self.now)
            self.host.release(slots, keep, self.now)
            return
        pages += self.pool.allocate(len(tokens) - len(pages), self.now)
        if slots:
            self.host.restore(slots, pages[found - len(slots) : found])
            self.restored += len(slots)
        for page, digest in zip(pages[:found], chain[:found], strict=True):
            assert self.holds(self.bytes[page], digest), "found, but of other tokens"
        for page, digest in zip(pages[found:], chain[found:], strict=True):
            self.bytes[page] = int.from_bytes(digest[:7])
        turn = Turn(tokens, pages, found - len(slots))
        self.turns.append(turn)
        self.register(turn, len(tokens) if self.at_once else found)

    @precondition(lambda self: self.turns)
    @rule(pick=PICK, keep=KEEPS, finished=st.booleans())
    def end(self, pick: int, keep: Keep, finished: bool) -> None:
        turn = self.turns.pop(pick % len(self.turns))
        if finished:
            self.register(turn, len(turn.tokens))
        self.pool.release(turn.pages, keep, self.now)

    def register(self, turn: Turn, end: int) -> None:
        chain = page_hashes(ROOT, turn.tokens, 1)
        for i in range(turn.named, end):
            self.pool.register(turn.pages[i], chain[i], chain[i - 1] if i else None)
        turn.named = end

    def holds(self, content: torch.Tensor, digest: bytes) -> bool:
        return content.tolist() == [int.from_bytes(digest[:7])] * 2

    @invariant()
    def nothing_is_lost(self) -> None:
        self.pool.check()
        self.host.check()
        held = {page for turn in self.turns for page in turn.pages}
        assert self.pool.num_held == len(held)
        assert self.pool.num_free + self.pool.num_cached + len(held) == self.pool.num_pages
        assert (self.host.offloaded, self.host.restored) == (self.stored, self.restored)

    @invariant()
    def what_has_a_name_holds_what_it_says(self) -> None:
        slots = self.host._host.view(self.host.num_pages, -1)
        assert all(self.holds(self.bytes[page], digest) for digest, page in self.pool._page_of.items())
        assert all(self.holds(slots[slot], digest) for digest, slot in self.host.pool._page_of.items())
        for turn in self.turns:
            chain = page_hashes(ROOT, turn.tokens, 1)
            assert all(self.holds(self.bytes[page], digest) for page, digest in zip(turn.pages, chain, strict=True))

    @invariant()
    def no_page_without_those_before_it(self) -> None:
        if self.at_once:
            parents = {self.pool._parent_of[page] for page in self.pool._page_of.values()} - {None}
            assert parents <= self.pool._page_of.keys()

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for turn in self.turns:
                self.pool.release(turn.pages)
            self.turns = []
            self.nothing_is_lost()
            self.pool.clear()
            assert self.pool.num_free == self.pool.num_pages


TestPoolAndHost = PoolAndHost.TestCase
TestPoolAndHost.settings = settings(max_examples=150, stateful_step_count=40)


# --- by hand --------------------------------------------------------------------------------------------------------


def hashes(*tokens: int) -> list[bytes]:
    return page_hashes(ROOT, list(tokens), 1)


def cache(pool: PagePool, *tokens: int, keep: Keep = UNKNOWN, now: float = 0.0) -> list[int]:
    """Put a sequence through the pool that nobody holds afterwards."""
    chain = hashes(*tokens)
    pages = pool.match(chain)
    pages += pool.allocate(len(tokens) - len(pages), now)
    for i, page in enumerate(pages):
        pool.register(page, chain[i], chain[i - 1] if i else None)
    pool.release(pages, keep, now)
    return pages


def cached(pool: PagePool, *tokens: int) -> int:
    """How many pages of a sequence are found; changes nothing."""
    return next((i for i, digest in enumerate(hashes(*tokens)) if digest not in pool._page_of), len(tokens))


def test_the_end_of_a_prefix_goes_before_its_beginning() -> None:
    pool = PagePool(3)
    cache(pool, 1, 2, 3)
    pool.release(pool.allocate(1))
    kept = pool.match(hashes(1, 2, 3))
    assert len(kept) == 2


def test_the_least_recently_used_prefix_goes_first_and_a_match_is_a_use() -> None:
    pool = PagePool(2)
    old, new = cache(pool, 1), cache(pool, 2)
    pool.release(pool.match(hashes(1)))
    assert pool.allocate(1) == new
    assert pool.match(hashes(1)) == old


def test_free_pages_are_taken_before_cached_ones() -> None:
    pool = PagePool(4)
    cache(pool, 1, 2)
    pool.allocate(2)
    assert len(pool.match(hashes(1, 2))) == 2


def test_of_two_pages_with_the_same_content_the_first_stays_findable() -> None:
    pool = PagePool(2)
    one, two = pool.allocate(1), pool.allocate(1)
    pool.register(one[0], hashes(1)[0])
    pool.register(two[0], hashes(1)[0])
    pool.release(two)
    assert (pool.num_free, pool.num_cached) == (1, 0)
    assert pool.match(hashes(1)) == one


def test_a_page_keeps_its_first_name() -> None:
    pool = PagePool(1)
    pages = pool.allocate(1)
    pool.register(pages[0], hashes(1)[0])
    pool.register(pages[0], hashes(2)[0])
    assert pool.match(hashes(2)) == []


def test_without_caching_released_pages_are_free() -> None:
    pool = PagePool(2, caching=False)
    cache(pool, 1, 2)
    assert (pool.num_free, pool.num_cached) == (2, 0)
    assert pool.match(hashes(1, 2)) == []


def test_nothing_is_matched_behind_a_gap() -> None:
    """Two turns computed the same pages at once, and each has the name of one: the first page may go alone."""
    pool = PagePool(4)
    one, two = pool.allocate(2), pool.allocate(2)
    pool.register(one[0], hashes(1)[0])
    pool.register(two[1], hashes(1, 2)[1])
    pool.release(one)
    pool.release(two)
    pool.allocate(3)  # two free pages and the oldest cached one
    assert pool.num_cached == 1
    assert pool.match(hashes(1, 2)) == []


@pytest.mark.parametrize(("order", "kept"), [("expected", 1), ("lru", 0)])
def test_what_builds_on_a_page_protects_it_but_not_from_lru(order: Order, kept: int) -> None:
    """As above, but the pool is told what comes before what."""
    pool = PagePool(4, order=order)
    one, two = pool.allocate(2), pool.allocate(2)
    pool.register(one[0], hashes(1)[0])
    pool.register(two[1], hashes(1, 2)[1], hashes(1)[0])
    pool.release(one)
    pool.release(two)
    pool.allocate(3)
    assert len(pool.match(hashes(1, 2))) == kept


def test_misuse_is_noticed() -> None:
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(pages)
    with pytest.raises(AssertionError, match="held"):
        pool.register(pages[0], hashes(1)[0])


def test_what_there_is_and_what_was_asked_for_is_in_the_error() -> None:
    pool = PagePool(4)
    pool.allocate(1)
    with pytest.raises(OutOfPages, match="5 pages asked for, 3 available of 4"):
        pool.allocate(5)


# --- by expected need -----------------------------------------------------------------------------------------------


def test_need_is_the_chance_over_the_wait() -> None:
    keep = Keep("a", gap=100.0, chance=0.5)
    assert need(keep, 0.0) == 0.5 / 100
    assert need(keep, 60.0) == 0.5 / 40
    assert need(keep, 95.0) == 0.5 / 11, "nobody returns to the second"
    # A gap late: it takes as long again, and half of those that return would have been here.
    assert need(keep, 200.0) == pytest.approx((0.25 / 0.75) / 100)
    assert need(keep, 300.0) == pytest.approx((0.125 / 0.625) / 200)
    assert need(Keep("a", gap=1.0, chance=1.0), 1e9) > need(Keep("a", gap=1.0, chance=0.99), 1e9) >= 0.0
    assert need(Keep("a", gap=1.0, chance=0.0), 0.5) == 0.0


@given(
    st.lists(st.tuples(KEEPS, st.integers(1, 4), st.sampled_from([0.0, 1.0, 25.0])), min_size=1, max_size=6),
    st.sampled_from([26.0, 31.0, 700.0, 1e6]),
)
def test_conversations_go_in_the_order_of_their_worth_each_from_its_end(
    conversations: list[tuple[Keep, int, float]], now: float
) -> None:
    conversations.sort(key=lambda c: c[2])
    keeps = [
        Keep(str(i), keep.gap or 5.0, keep.chance, keep.page_seconds or 0.02)
        for i, (keep, _, _) in enumerate(conversations)
    ]
    gone: list[int] = []
    pool = PagePool(
        sum(length for _, length, _ in conversations), on_evict=lambda evicted, _: gone.append(evicted.page)
    )
    pages = [
        cache(pool, *[i] * length, keep=keep, now=end)
        for i, (keep, (_, length, end)) in enumerate(zip(keeps, conversations, strict=True))
    ]
    by_worth = sorted(
        range(len(keeps)), key=lambda i: need(keeps[i], now - conversations[i][2]) * keeps[i].page_seconds
    )
    for _ in range(pool.num_pages):
        pool.allocate(1, now)
    assert gone == [page for i in by_worth for page in reversed(pages[i])]


SOON, LATER = Keep("soon", gap=5.0, page_seconds=0.1), Keep("later", gap=500.0, page_seconds=0.1)


def test_who_is_due_soon_stays_however_long_ago_it_was_used() -> None:
    pool = PagePool(8)
    cache(pool, 1, 1, 1, 1, keep=SOON, now=10.0)
    cache(pool, 2, 2, 2, 2, keep=LATER, now=14.0)
    pool.allocate(4, 14.5)
    assert (cached(pool, 1, 1, 1, 1), cached(pool, 2)) == (4, 0)


def test_who_does_not_come_goes_after_all() -> None:
    pool = PagePool(8)
    cache(pool, 1, 1, 1, 1, keep=Keep("soon", gap=5.0, chance=0.9, page_seconds=0.1), now=10.0)
    cache(pool, 2, 2, 2, 2, keep=LATER, now=14.0)
    pool.allocate(4, 60.0)
    assert (cached(pool, 1), cached(pool, 2, 2, 2, 2)) == (0, 4)


@pytest.mark.parametrize(
    "dear", [Keep("a", gap=50.0, page_seconds=0.2), Keep("a", gap=50.0, chance=1.0, page_seconds=0.1)]
)
def test_what_is_likelier_needed_or_dearer_to_compute_stays(dear: Keep) -> None:
    pool = PagePool(4)
    cache(pool, 1, 1, keep=dear, now=10.0)
    cache(pool, 2, 2, keep=Keep("b", gap=50.0, chance=0.6, page_seconds=0.1), now=10.0)
    pool.allocate(2, 11.0)
    assert (cached(pool, 1, 1), cached(pool, 2)) == (2, 0)


def test_of_an_unknown_cost_is_the_average() -> None:
    pool = PagePool(6)
    cache(pool, 1, 1, keep=Keep("a", gap=50.0, page_seconds=0.1), now=10.0)
    cache(pool, 2, 2, keep=Keep("b", gap=50.0), now=10.0)
    cache(pool, 3, 3, keep=Keep("c", gap=50.0, page_seconds=0.3), now=10.0)
    for left in ((0, 2, 2), (0, 0, 2)):
        pool.allocate(2, 11.0)
        assert tuple(cached(pool, i, i) for i in (1, 2, 3)) == left


def test_one_conversation_goes_all_of_it_before_the_next() -> None:
    """Half of two histories saves half of the work, but is not sooner needed than all of one."""
    pool = PagePool(8)
    cache(pool, 1, 1, 1, 1, keep=Keep("a", gap=50.0, page_seconds=0.1), now=10.0)
    cache(pool, 2, 2, 2, 2, keep=Keep("b", gap=51.0, page_seconds=0.1), now=10.0)
    for left in (3, 2, 1, 0):
        pool.allocate(1, 11.0)
        assert (cached(pool, 1, 1, 1, 1), cached(pool, 2, 2, 2, 2)) == (4, left)


def test_the_choice_ends_when_it_is_touched() -> None:
    pool = PagePool(8)
    cache(pool, 1, 1, 1, 1, keep=SOON, now=10.0)
    cache(pool, 2, 2, 2, 2, keep=LATER, now=10.0)
    pool.allocate(1, 11.0)
    assert cached(pool, 2, 2, 2, 2) == 3
    pool.release(pool.match(hashes(2, 2)), Keep("later", gap=1.0, page_seconds=0.1), 11.1)
    pool.allocate(1, 11.2)
    assert (cached(pool, 1, 1, 1, 1), cached(pool, 2, 2, 2)) == (3, 3)


def test_the_last_turn_counts_for_all_of_a_conversation() -> None:
    """It came back with half of its history: the other half is as likely needed, though it was not used."""
    pool = PagePool(6)
    cache(pool, 1, 1, 1, 1, keep=Keep("a", gap=9.0, chance=0.5, page_seconds=0.1), now=10.0)
    pool.release(pool.match(hashes(1, 1)), Keep("a", gap=50.0, chance=0.5, page_seconds=0.1), 100.0)
    cache(pool, 2, 2, keep=Keep("b", gap=55.0, chance=0.5, page_seconds=0.1), now=100.0)
    pool.allocate(1, 101.0)
    assert (cached(pool, 1, 1, 1, 1), cached(pool, 2, 2)) == (4, 1)


def test_the_choice_is_made_anew_when_all_are_gone() -> None:
    pool = PagePool(4)
    cache(pool, 1, keep=SOON, now=10.0)
    cache(pool, 2, keep=LATER, now=10.0)
    pages = pool.allocate(2, 10.0)
    for page, digest in zip(pages, (hashes(3)[0], hashes(4)[0]), strict=True):
        pool.register(page, digest)
    pool.allocate(2, 10.1)
    pool.release(pages[:1], SOON, 10.2)
    pool.release(pages[1:], LATER, 10.2)
    pool.allocate(1, 10.3)
    assert (cached(pool, 3), cached(pool, 4)) == (1, 0)


def test_the_choice_is_made_anew_after_a_while() -> None:
    pool = PagePool(8)
    cache(pool, 1, 1, 1, 1, keep=Keep("a", gap=20.0, page_seconds=0.1), now=10.0)  # due at 30
    cache(pool, 2, 2, 2, 2, keep=Keep("b", gap=10.0, page_seconds=0.1), now=10.0)  # late since 20
    for now, left in ((24.8, (3, 4)), (24.8 + RANKING_SECONDS / 2, (2, 4)), (24.8 + RANKING_SECONDS, (2, 3))):
        pool.allocate(1, now)
        assert (cached(pool, 1, 1, 1, 1), cached(pool, 2, 2, 2, 2)) == left


def test_a_shared_beginning_goes_with_the_last_that_builds_on_it() -> None:
    """A system prompt of 2 pages: the conversation that used it last is the first to go."""
    pool = PagePool(6)
    cache(pool, 9, 9, 1, 1, keep=SOON, now=10.0)
    cache(pool, 9, 9, 2, 2, keep=LATER, now=11.0)
    taken = pool.allocate(2, 12.0)
    assert (cached(pool, 9, 9, 1, 1), cached(pool, 9, 9, 2)) == (4, 2)
    taken += pool.allocate(1, 12.0)
    assert cached(pool, 9, 9, 1, 1) == 3, "what nothing builds on goes before what it builds on"
    taken += pool.allocate(3, 12.0)
    assert (pool.num_held, pool.num_cached) == (6, 0)
    pool.release(taken)
    pool.check()


def test_a_shared_beginning_goes_on_with_the_last_that_builds_on_it() -> None:
    """It was set aside when its conversation had gone. It is not kept for ever, nor taken for an unknown one's."""
    pool = PagePool(8)
    cache(pool, 3, 3, 3, 3, keep=Keep("other", gap=20.0, page_seconds=0.1), now=1.0)
    cache(pool, 9, 9, 1, keep=Keep("cheap", gap=5.0, page_seconds=0.001), now=150.0)
    cache(pool, 9, 9, 2, keep=Keep("cheaper", gap=5.0, page_seconds=0.0001), now=150.0)
    for count, left in ((1, (3, 2, 4)), (1, (2, 2, 4)), (2, (0, 0, 4))):
        pool.allocate(count, 200.0)
        assert (cached(pool, 9, 9, 1), cached(pool, 9, 9, 2), cached(pool, 3, 3, 3, 3)) == left


def test_where_only_copies_build_on_a_page_it_can_go() -> None:
    """A turn has its own copy of page 1 and has named page 2: nobody else's page 1 is worth keeping for that."""
    pool = PagePool(3)
    one, two = pool.allocate(1), pool.allocate(2)
    pool.register(one[0], hashes(1)[0])
    pool.register(two[0], hashes(1)[0])
    pool.register(two[1], hashes(1, 2)[1], hashes(1)[0])
    pool.release(one, SOON, 1.0)
    assert pool.num_available == 1
    assert pool.allocate(1, 2.0) == one
    pool.check()
    pool.release(two, SOON, 2.0)
    assert (pool.num_cached, pool.num_free) == (1, 1)
    pool.check()


def test_unknown_conversations_go_by_use_among_the_known() -> None:
    """Those used just now stay, as if they were due; those used long ago go, one turn at a time."""
    pool = PagePool(8)
    cache(pool, 1, 1, now=10.0)
    cache(pool, 2, 2, keep=Keep("", gap=5.0), now=500.0)
    cache(pool, 3, 3, 3, 3, keep=Keep("a", gap=100.0, page_seconds=0.1), now=500.0)
    pool.allocate(2, 501.0)
    assert (cached(pool, 1), cached(pool, 2, 2), cached(pool, 3, 3, 3, 3)) == (0, 2, 4)
    pool.allocate(2, 501.0)
    assert (cached(pool, 2, 2), cached(pool, 3, 3, 3, 3)) == (2, 2)


def test_who_never_comes_back_says_nothing_of_the_unknown() -> None:
    pool = PagePool(6)
    cache(pool, 1, 1, keep=Keep("over", gap=1e6, chance=0.0, page_seconds=0.1), now=500.0)
    cache(pool, 2, 2, keep=Keep("a", gap=100.0, page_seconds=0.1), now=500.0)
    cache(pool, 3, 3, now=500.0)
    for left in ((0, 2, 2), (0, 0, 2)):
        pool.allocate(2, 501.0)
        assert tuple(cached(pool, i, i) for i in (1, 2, 3)) == left


def test_a_conversation_of_which_no_gap_is_known_is_unknown() -> None:
    pool = PagePool(4)
    cache(pool, 1, 1, keep=Keep("a", page_seconds=9.0), now=10.0)
    cache(pool, 2, 2, keep=Keep("b", page_seconds=0.1), now=11.0)
    pool.allocate(2, 12.0)
    assert (cached(pool, 1), cached(pool, 2, 2)) == (0, 2)


# --- host memory ----------------------------------------------------------------------------------------------------


class Offloading:
    """A pool of `pages` and a host pool of `slots`; the bytes of a page are a number that its writer chose."""

    def __init__(self, pages: int, slots: int, seconds_a_copy: float = 0.0) -> None:
        self.now = 0.0
        self.seconds_a_copy = seconds_a_copy
        memory = KVMemory(PageShape(1, 1, 1, 1, torch.int64), pages, torch.device("cpu"))
        self.bytes = memory.pages.view(pages, -1)
        self.host = HostPool(memory, slots, clock=self.clock)
        self.pool = PagePool(pages, on_evict=self.host.store)

    def clock(self) -> float:
        self.now += self.seconds_a_copy / 2
        return self.now

    def cache(self, *tokens: int, keep: Keep = UNKNOWN, now: float = 0.0) -> None:
        for page, token in zip(cache(self.pool, *tokens, keep=keep, now=now), tokens, strict=True):
            self.bytes[page] = token

    def restored(self, *tokens: int, keep: Keep = UNKNOWN) -> list[int]:
        """What comes back of a sequence that the pool has forgotten."""
        slots = self.host.match(hashes(*tokens), keep)
        pages = self.pool.allocate(len(slots))
        if slots:
            self.host.restore(slots, pages)
        content = [int(self.bytes[page, 0]) for page in pages]
        self.pool.release(pages)
        return content


def test_evicted_pages_come_back_with_their_bytes() -> None:
    both = Offloading(3, 4)
    both.cache(1, 2, 3)
    both.pool.release(both.pool.allocate(3))
    assert both.pool.num_cached == 0
    assert both.restored(1, 2, 3) == [1, 2, 3]
    assert (both.host.offloaded, both.host.restored, both.host.num_used, both.host.num_pages) == (3, 3, 3, 4)
    assert both.restored(2, 3) == []


def test_a_full_host_drops_what_is_needed_least() -> None:
    both = Offloading(6, 4)
    both.cache(1, 2, keep=SOON, now=10.0)
    both.cache(3, 4, keep=LATER, now=10.0)
    both.cache(5, 6, keep=Keep("third", gap=50.0, page_seconds=0.1), now=10.0)
    both.pool.release(both.pool.allocate(6, 11.0))  # evicted as: 4 3 6 5 2 1
    assert both.restored(3, 4) == []
    assert both.restored(5, 6) == [5, 6]
    assert both.restored(1, 2) == [1, 2]
    both.host.check()


def test_a_conversation_is_due_no_later_for_having_been_evicted() -> None:
    both = Offloading(4, 4)
    both.cache(1, 2, keep=Keep("a", gap=100.0, page_seconds=0.1), now=10.0)  # due at 110
    both.cache(3, 4, keep=Keep("b", gap=60.0, page_seconds=0.1), now=40.0)  # due at 100
    both.pool.release(both.pool.allocate(4, 45.0))
    both.cache(5, 6, keep=Keep("c", gap=9.0), now=117.0)
    both.pool.release(both.pool.allocate(4, 118.0))
    assert both.restored(3, 4) == []
    assert both.restored(1, 2) == [1, 2]


def test_a_shared_beginning_goes_last_from_the_host_too() -> None:
    both = Offloading(6, 4)
    both.cache(9, 8, 1, keep=SOON, now=10.0)
    both.cache(9, 8, 2, keep=LATER, now=10.0)
    both.pool.release(both.pool.allocate(6, 11.0))
    assert both.host.num_used == 4
    both.cache(5, 6, keep=Keep("c", gap=9.0), now=410.0)
    both.pool.release(both.pool.allocate(6, 411.0))  # the first one has not come for 400 s, the second is due in 100 s
    assert both.restored(9, 8, 1) == [9, 8]


def test_copies_of_what_was_restored_go_first() -> None:
    both = Offloading(4, 4)
    both.cache(1, 2, keep=SOON, now=1.0)
    both.cache(3, 4, keep=LATER, now=1.0)
    both.pool.release(both.pool.allocate(4, 2.0))
    both.restored(1, 2)
    both.cache(5, 6, keep=Keep("third", gap=900.0), now=2.0)
    both.pool.release(both.pool.allocate(4, 3.0))
    assert both.restored(1, 2) == []
    assert both.restored(3, 4) == [3, 4]
    assert both.restored(5, 6) == [5, 6]


def test_a_copy_that_is_still_there_is_not_made_again() -> None:
    both = Offloading(2, 4)
    both.cache(1, 2, keep=SOON, now=1.0)
    both.pool.release(both.pool.allocate(2, 2.0))
    slots, pages = both.host.match(hashes(1, 2), UNKNOWN), both.pool.allocate(2)
    both.host.restore(slots, pages)
    for page, digest in zip(pages, hashes(1, 2), strict=True):
        both.pool.register(page, digest)
    both.pool.release(pages, SOON, 3.0)
    both.pool.release(both.pool.allocate(2, 4.0))
    assert (both.host.offloaded, both.host.num_used) == (2, 2)
    # It is one of those that are needed again, not the first to go.
    both.cache(3, 4, keep=LATER, now=4.0)
    both.pool.release(both.pool.allocate(2, 4.0))
    both.cache(5, 6, keep=LATER, now=4.0)
    both.pool.release(both.pool.allocate(2, 4.5))
    assert both.restored(1, 2) == [1, 2]


def test_slots_about_to_be_restored_are_not_given_away() -> None:
    both = Offloading(2, 2)
    both.cache(1, 2)
    both.pool.release(both.pool.allocate(2))
    both.cache(3, 4)
    assert both.restored(1, 2) == [1, 2]  # evicts 3 and 4, for which there is no room
    assert both.host.offloaded == 2
    both.host.check()


def test_what_is_computed_sooner_than_copied_is_not_restored() -> None:
    both = Offloading(2, 2, seconds_a_copy=0.5)
    both.cache(1, 2)
    both.pool.release(both.pool.allocate(2))
    assert both.host.page_seconds == pytest.approx(0.25)  # the clock is read twice
    assert both.restored(1, 2, keep=Keep("a", page_seconds=0.2)) == []
    assert both.restored(1, 2, keep=Keep("a", page_seconds=0.3)) == [1, 2]
    assert both.restored(1, 2, keep=UNKNOWN) == [1, 2]


def test_the_seconds_of_a_copy_are_a_running_average_of_pages() -> None:
    both = Offloading(4, 4, seconds_a_copy=0.4)
    both.cache(1, 2, 3, 4)
    both.pool.release(both.pool.allocate(4))
    assert both.host.page_seconds == pytest.approx(0.2)
    both.restored(1, 2, 3, 4)  # 0.2 s for all of them
    assert both.host.page_seconds == pytest.approx(0.2 + (0.05 - 0.2) / 8)


def test_a_cleared_host_has_nothing() -> None:
    both = Offloading(2, 2)
    both.cache(1, 2)
    both.pool.release(both.pool.allocate(2))
    both.host.clear()
    assert both.restored(1, 2) == []
    assert (both.host.num_used, both.host.offloaded, both.host.restored) == (0, 0, 0)
