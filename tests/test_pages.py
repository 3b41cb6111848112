"""The page pool against a plain model of it: no leak, no double use, and evictions in the right order."""

from __future__ import annotations

import copy

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from miniserve.kv.hashing import page_hashes, root_hash
from miniserve.kv.pages import OutOfPages, PagePool

ROOT = root_hash("tiny")
PICK = st.integers(0, 1000)


class Turn:
    """A sequence that holds pages, the first `named` of which are registered. A page holds one token."""

    def __init__(self, tokens: list[int], pages: list[int], named: int) -> None:
        self.tokens = tokens
        self.pages = pages
        self.named = named


class Pool(RuleBasedStateMachine):
    """Turns come, register their pages one by one, and go. `memory` is what the pages hold: every token up to their
    end, written by whoever was given them."""

    @initialize(num_pages=st.integers(1, 10), caching=st.booleans())
    def make(self, num_pages: int, caching: bool) -> None:
        self.pool = PagePool(num_pages, caching=caching)
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
            page, digest = turn.pages[turn.named], page_hashes(ROOT, turn.tokens, 1)[turn.named]
            self.pool.register(page, digest)
            if self.pool.caching:
                self.named.setdefault(digest, page)
            turn.named += 1

    @precondition(lambda self: self.turns)
    @rule(pick=PICK)
    def end(self, pick: int) -> None:
        self.release(self.turns.pop(pick % len(self.turns)).pages)

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

    def release(self, pages: list[int]) -> None:
        self.pool.release(pages)
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


# --- by hand --------------------------------------------------------------------------------------------------------


def hashes(*tokens: int) -> list[bytes]:
    return page_hashes(ROOT, list(tokens), 1)


def cache(pool: PagePool, *tokens: int) -> list[int]:
    """Put a sequence through the pool that nobody holds afterwards."""
    pages = pool.match(hashes(*tokens))
    pages += pool.allocate(len(tokens) - len(pages))
    for page, digest in zip(pages, hashes(*tokens), strict=True):
        pool.register(page, digest)
    pool.release(pages)
    return pages


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
